"""Code for matrix products: a packed panel of the right side against rows of the left side.

The right side is copied, a panel of a few columns and a block of the contracted axis at a time, to
where the innermost loop reads it from the nearest cache in one line; the left side is read where it
lies, or packed beforehand. Each number of the result is summed in an order that depends on shapes
alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

from pallas_kernels._llvm.builder import Builder, Number, Pointer, Value
from pallas_kernels._llvm.packing import (
    VECTORS,
    Columns,
    Output,
    Rows,
    pack,
    panel_columns,
    split_evenly,
    tile_rows,
)

DEPTH = 256
"""Length of the contracted axis in a panel: with two vectors of columns, half of the cache."""


def multiply_tile(
    b: Builder,
    rows: Rows,
    num_rows: int,
    depth: Number,
    panel: Pointer,
    sums: list,
    panel_stride: int | None = None,
) -> None:
    """Adds `num_rows` rows times a panel to `sums`, variables [rows][vectors].

    The panel's rows lie `panel_stride` elements apart; None for next to each other.
    """
    full, vectors = panel_stride or panel_columns(), len(sums[0])
    lines = [rows.base.at(n * rows.row_stride) for n in range(num_rows)]
    with b.loop(0, depth) as k:
        right = [panel.vector(k * full + n * b.lanes, b.lanes) for n in range(vectors)]
        for line, row_sums in zip(lines, sums, strict=True):
            left = b.splat(line[k * rows.k_stride])
            for variable, column in zip(row_sums, right, strict=True):
                variable.set(b.fma(left, column, variable.get()))


def sweep(
    b: Builder,
    rows: Rows,
    row_range: tuple[Number, int],
    depth: Number,
    panel: Pointer,
    output: Output,
    width: int,
    *,
    is_first: bool,
    ahead: Callable[[Value, int], None] | None = None,
) -> None:
    """Multiplies rows with one packed panel, a tile of rows at a time.

    Args:
      b: Where the code goes.
      rows: Left side, from the panel's first k on.
      row_range: First row and number of rows.
      depth: Length of the contracted axis in the panel.
      panel: [depth, panel columns].
      output: Where the panel's first column goes.
      width: Columns that are stored.
      is_first: Whether the products replace what is there, unless `output.is_added`.
      ahead: Called with a whole tile's number and how many there are, to ask for what comes next.
    """
    first, count = row_range
    tile = tile_rows()
    whole = count // tile * tile

    def one(row: Number, size: int) -> None:
        row = b.integer(row)
        at = rows.from_row(row)
        place = output.base.at(row * output.row_stride)
        for n in range(size):
            place.prefetch(n * output.row_stride, is_written=True)
        sums = b.zeros(size, VECTORS)
        multiply_tile(b, at, size, depth, panel, sums)
        store_tile(b, sums, place, output.row_stride, width, output.is_added or not is_first)

    if whole:
        with b.loop(first, b.integer(first) + whole, tile) as row:
            if ahead is not None:
                ahead((row - first) // tile, whole // tile)
            one(row, tile)
    if count > whole:
        one(b.integer(first) + whole, count - whole)


def store_tile(
    b: Builder, sums: list, place: Pointer, row_stride: int, width: int, is_added: bool
) -> None:
    """Stores the first `width` columns of a tile, or adds them to what is there."""
    for n, row_sums in enumerate(sums):
        line = place.at(n * row_stride)
        values = [variable.get() for variable in row_sums]
        if width == panel_columns():
            for m, value in enumerate(values):
                if is_added:
                    value = line.vector(m * b.lanes, b.lanes) + value
                line.store(m * b.lanes, value)
            continue
        spare = b.buffer(panel_columns())
        for m, value in enumerate(values):
            spare.store(m * b.lanes, value)
        with b.loop(0, width) as column:
            value = spare[column]
            line[column] = line[column] + value if is_added else value


def each_piece(
    b: Builder, sizes: Sequence[int], piece: Callable[[Number, int, bool], None]
) -> None:
    """Calls `piece(start, size, is_first)` for pieces of the contracted axis, in order.

    Args:
      b: Where the code goes.
      sizes: Sizes of the pieces, as `split_evenly` gives them: all but the last are equal.
      piece: Writes the code of one; called at most three times.
    """
    full, start_of_last = sizes[0], sum(sizes[:-1])
    piece(0, full, True)
    if len(sizes) > 2:
        with b.loop(full, start_of_last, full) as start:
            piece(start, full, False)
    if len(sizes) > 1:
        piece(start_of_last, sizes[-1], False)


def each_step(
    b: Builder,
    column_range: tuple[Number, Number],
    num_columns: int,
    width: int,
    step: Callable[[Value, int], None],
) -> None:
    """Calls `step(first column, columns)` for steps of columns.

    Args:
      b: Where the code goes.
      column_range: The first step, and the one behind the last.
      num_columns: Columns of all steps; what is no whole step is the last one.
      width: Columns of a step.
      step: Writes the code of one; called at most twice.
    """
    first, behind = (b.integer(number) for number in column_range)
    whole = num_columns // width
    with b.loop(first, b.minimum(behind, b.integer(whole))) as index:
        step(index * width, width)
    if num_columns % width:
        with b.when(behind > whole):
            step(b.integer(whole * width), num_columns % width)


_LINE = 16
"""Elements of a line of the caches."""


def _prefetch(b: Builder, columns: Columns, depth: int, part: Value, num_parts: int) -> None:
    """Asks for one of `num_parts` parts of a panel that is packed later."""
    is_by_k = columns.column_stride == 1
    lines = -(-panel_columns() // _LINE) if is_by_k else -(-depth // _LINE)
    total = lines * (depth if is_by_k else panel_columns())
    stride = columns.k_stride if is_by_k else columns.column_stride
    per_part = min(-(-total // num_parts), 32)
    for n in range(per_part):
        line = part * per_part + n
        columns.base.prefetch(line // lines * stride + line % lines * _LINE)


def product(
    b: Builder,
    rows: Rows,
    row_range: tuple[Number, int],
    columns: Columns,
    column_range: tuple[Number, Number],
    num_columns: int,
    depth: int,
    output: Output,
) -> None:
    """Multiplies some rows with some panels of columns.

    Args:
      b: Where the code goes.
      rows: Left side.
      row_range: First row and number of rows.
      columns: Right side, all of it.
      column_range: First panel and the one behind the last.
      num_columns: Columns of the right side.
      depth: Length of the contracted axis.
      output: Where row 0 and column 0 of the product go.
    """
    full = panel_columns()
    pieces = split_evenly(depth, DEPTH, b.lanes)
    panel = b.buffer(pieces[0] * full)
    first, behind = (b.integer(number) for number in column_range)

    def following(column: Value, start: Number, size: int) -> Columns:
        """What is packed after a panel: the next one, or the next piece of the first."""
        here, below = (b.integer(start) + k for k in (0, size))
        next_panel = columns.from_column(column + full).from_k(here)
        next_piece = columns.from_column(first * full).from_k(below)
        is_last = behind <= column // full + 1
        base = b.select_pointer(is_last, next_piece.base, next_panel.base)
        return dataclasses.replace(columns, base=base)

    def piece(start: Number, size: int, is_first: bool) -> None:
        left = rows.from_k(start)

        def step(column: Value, width: int) -> None:
            pack(b, columns.from_column(column), start, size, width, panel)
            ahead = functools.partial(_prefetch, b, following(column, start, size), size)
            place = dataclasses.replace(output, base=output.base.at(column))
            sweep(b, left, row_range, size, panel, place, width, is_first=is_first, ahead=ahead)

        each_step(b, column_range, num_columns, full, step)

    each_piece(b, pieces, piece)
