"""Code for products of few rows, which are bound by reading the right side.

The right side is read once, where it lies, and every row meets it while it is in the nearest cache.
Each number of the result is summed in an order that depends on shapes alone.
"""

from __future__ import annotations

from pallas_kernels._llvm.builder import Builder, Number, Pointer, Value
from pallas_kernels._llvm.gemm import each_piece, each_step
from pallas_kernels._llvm.packing import Columns, Output, Rows, split_evenly

MAX_ROWS = 48
"""Above it, a packed panel of the right side is read often enough to pay."""

_DEPTH = 128
_GROUP = 4
_MAX_LINES_ROWS = 2
_LINES = 8


def columns_per_step(num_rows: int, lanes: int, *, is_contiguous: bool) -> int:
    """Columns that belong together: what tasks are cut at.

    Args:
      num_rows: Rows of the left side.
      lanes: Elements of a vector.
      is_contiguous: Whether neighbours in memory are of neighbouring columns.
    """
    if is_contiguous:
        return 2 * lanes
    return 4 if num_rows <= 2 else 2


def product(
    b: Builder,
    rows: Rows,
    num_rows: int,
    columns: Columns,
    column_range: tuple[Number, Number],
    num_columns: int,
    depth: int,
    output: Output,
    *,
    is_contiguous: bool,
) -> None:
    """Multiplies a few rows with some columns.

    Args:
      b: Where the code goes.
      rows: Left side, its rows contiguous.
      num_rows: Number of rows.
      columns: Right side; one of its strides is 1.
      column_range: First step of `columns_per_step` columns, and the one behind the last.
      num_columns: Columns of the right side.
      depth: Length of the contracted axis.
      output: Where row 0 and column 0 of the product go.
      is_contiguous: As for `columns_per_step`; shapes of size one do not tell it.
    """
    write = _by_dots
    if is_contiguous:
        write = _by_lines if num_rows <= _MAX_LINES_ROWS else _by_columns
    write(b, rows, num_rows, columns, column_range, num_columns, depth, output)


def _by_columns(b, rows, num_rows, columns, column_range, num_columns, depth, output) -> None:
    width = columns_per_step(num_rows, b.lanes, is_contiguous=True)

    def piece(start: Number, size: int, is_first: bool) -> None:
        is_added = output.is_added or not is_first
        right = columns.base.at(b.integer(start) * columns.k_stride)
        left = rows.base.at(start)

        def step(column: Value, count: int) -> None:
            for first in range(0, num_rows, _GROUP):
                lines = range(first, min(first + _GROUP, num_rows))
                at = (left, right.at(column), output.base.at(column))
                strides = (rows.row_stride, columns.k_stride, output.row_stride)
                if count == width:
                    _tile(b, at, strides, lines, size, width // b.lanes, is_added)
                else:
                    _narrow(b, at, strides, lines, size, count, is_added)

        each_step(b, column_range, num_columns, width, step)

    each_piece(b, split_evenly(depth, _DEPTH), piece)


def _by_lines(b, rows, num_rows, columns, column_range, num_columns, depth, output) -> None:
    """A few lines of the right side at a time, for all columns of the task.

    One or two rows wait for memory only, and it is fastest where it is read in long lines.
    """
    width = columns_per_step(num_rows, b.lanes, is_contiguous=True)
    first, behind = (b.integer(number) for number in column_range)
    start, stop = first * width, b.minimum(behind * width, b.integer(num_columns))
    whole = start + (stop - start) // b.lanes * b.lanes
    places = [output.base.at(line * output.row_stride) for line in range(num_rows)]
    if not output.is_added:
        for place in places:
            with b.loop(start, stop) as column:
                place[column] = 0.0

    def add(k: Number, count: int) -> None:
        lefts = [rows.base.at(b.integer(k) + line * rows.row_stride) for line in range(num_rows)]
        factors = [[left[n] for n in range(count)] for left in lefts]
        vectors = [[b.splat(factor) for factor in line] for line in factors]
        lines = [columns.base.at((b.integer(k) + n) * columns.k_stride) for n in range(count)]
        with b.loop(start, whole, b.lanes) as column:
            values = [line.vector(column, b.lanes) for line in lines]
            for place, weights in zip(places, vectors, strict=True):
                total = place.vector(column, b.lanes)
                for weight, value in zip(weights, values, strict=True):
                    total = b.fma(weight, value, total)
                place.store(column, total)
        with b.loop(whole, stop) as column:
            for place, weights in zip(places, factors, strict=True):
                total = place[column]
                for weight, line in zip(weights, lines, strict=True):
                    total = b.fma(weight, line[column], total)
                place[column] = total

    full = depth // _LINES * _LINES
    with b.loop(0, full, _LINES) as k:
        add(k, _LINES)
    if depth > full:
        add(full, depth - full)


def _tile(b, at, strides, lines, size, vectors, is_added) -> None:
    """A group of rows times a block of the right side, a few vectors wide."""
    left, right, place = at
    row_stride, k_stride, out_stride = strides
    sums = b.zeros(len(lines), vectors)
    if is_added:
        for line, row_sums in zip(lines, sums, strict=True):
            for n, variable in enumerate(row_sums):
                variable.set(place.at(line * out_stride).vector(n * b.lanes, b.lanes))
    with b.loop(0, size) as k:
        source = right.at(k * k_stride)
        values = [source.vector(n * b.lanes, b.lanes) for n in range(vectors)]
        if lines[0] == 0:  # later groups of rows find it in the cache
            for n in range(0, vectors * b.lanes, 16):
                source.prefetch(2 * vectors * b.lanes + n)
        for line, row_sums in zip(lines, sums, strict=True):
            one = b.splat(left.at(line * row_stride)[k])
            for variable, value in zip(row_sums, values, strict=True):
                variable.set(b.fma(one, value, variable.get()))
    for line, row_sums in zip(lines, sums, strict=True):
        for n, variable in enumerate(row_sums):
            place.at(line * out_stride).store(n * b.lanes, variable.get())


def _narrow(b, at, strides, lines, size, count, is_added) -> None:
    """The same for the columns that are left, one at a time."""
    left, right, place = at
    row_stride, k_stride, out_stride = strides
    with b.loop(0, count) as column:
        for line in lines:
            target = place.at(line * out_stride)
            total = b.variable(target[column] if is_added else 0.0)
            with b.loop(0, size) as k:
                value = left.at(line * row_stride)[k] * right[k * k_stride + column]
                total.set(total.get() + value)
            target[column] = total.get()


def _by_dots(b, rows, num_rows, columns, column_range, num_columns, depth, output) -> None:
    width = columns_per_step(num_rows, b.lanes, is_contiguous=False)

    def step(column: Value, count: int) -> None:
        sources = [columns.base.at((column + n) * columns.column_stride) for n in range(count)]
        for first in range(0, num_rows, _GROUP):
            lines = range(first, min(first + _GROUP, num_rows))
            lefts = [rows.base.at(line * rows.row_stride) for line in lines]
            places = [output.base.at(column + line * output.row_stride) for line in lines]
            _dots(b, lefts, sources, depth, places, output.is_added)

    each_step(b, column_range, num_columns, width, step)


def _dots(b, lefts: list[Pointer], rights: list[Pointer], depth, places, is_added) -> None:
    """Products of some rows with some columns that both lie contiguously."""
    whole = depth // b.lanes * b.lanes
    sums = b.zeros(len(lefts), len(rights))
    with b.loop(0, whole, b.lanes) as k:
        values = [right.vector(k, b.lanes) for right in rights]
        for left, row_sums in zip(lefts, sums, strict=True):
            one = left.vector(k, b.lanes)
            for variable, value in zip(row_sums, values, strict=True):
                variable.set(b.fma(one, value, variable.get()))
    for left, row_sums, place in zip(lefts, sums, places, strict=True):
        for n, (variable, right) in enumerate(zip(row_sums, rights, strict=True)):
            total = b.variable(b.reduce("fadd", variable.get()))
            if whole < depth:
                with b.loop(whole, depth) as k:
                    total.set(total.get() + left[k] * right[k])
            place[n] = place[n] + total.get() if is_added else total.get()
