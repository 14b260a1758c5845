"""How kernels that take rows one by one are cut into tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pallas_kernels._llvm.builder import Builder, Value
from pallas_kernels._llvm.compile import num_threads
from pallas_kernels._llvm.packing import split_evenly

_SMALL = 16_384
"""Numbers that are one task: another thread would wake when they are done."""


def row_pieces(num_rows: int, width: int, multiple: int = 1) -> list[int]:
    """Rows of each task, for rows of `width` numbers; all but the last are a `multiple`."""
    if num_rows * width <= _SMALL:
        return [num_rows]
    return split_evenly(num_rows, -(-num_rows // (4 * num_threads())), multiple)


def row_range(b: Builder, task: Value, pieces: Sequence[int], num_rows: int) -> tuple[Value, Value]:
    """The first row of a task and the one behind its last."""
    start = task * pieces[0]
    return start, b.minimum(start + pieces[0], b.integer(num_rows))


def each_row(
    b: Builder, task: Value, pieces: Sequence[int], num_rows: int, one: Callable[[Value], None]
) -> None:
    """Calls `one(row)` for the rows of a task."""
    with b.loop(*row_range(b, task, pieces, num_rows)) as row:
        one(row)
