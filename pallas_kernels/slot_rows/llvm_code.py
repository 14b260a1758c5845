"""The code of `llvm`: tasks are ranges of rows, of all stacks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._llvm.builder import Builder, Pointer, Value
from pallas_kernels._llvm.compile import call
from pallas_kernels._llvm.tasks import each_row, row_pieces
from pallas_kernels.slot_rows.shapes import feature_shape

_VECTORS = 4
"""Vectors that are read before they are written."""

Stacks = tuple[Float[Array, "..."], ...]


@dataclasses.dataclass(frozen=True)
class _Slots:
    """How the slots of a call are cut into tasks, and where rows lie.

    Attributes:
      kinds: Of each stack its shape and the shape of what lies at one slot.
      num_rows: Number of slots.
    """

    kinds: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    num_rows: int

    @classmethod
    def of(cls, stacks: Stacks, slots: Array) -> _Slots:
        """Those of a call."""
        kinds = tuple((stack.shape, feature_shape(stack)) for stack in stacks)
        return cls(kinds, slots.shape[0])

    @property
    def widths(self) -> list[int]:
        """Numbers at one slot of each stack."""
        return [math.prod(features) for _, features in self.kinds]

    @property
    def pieces(self) -> list[int]:
        """Rows of each task."""
        return row_pieces(self.num_rows, sum(self.widths))

    def rows(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes of one row a slot, of each stack."""
        shapes = [(self.num_rows, *features) for _, features in self.kinds]
        return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def stacks(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes of the stacks."""
        return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape, _ in self.kinds]

    def each(self, b: Builder, task: Value, one: Callable[[Value], None]) -> None:
        """Calls `one(row)` for the rows of a task."""
        each_row(b, task, self.pieces, self.num_rows, one)

    def places(self, layer: Pointer, slot: Value, buffers: Sequence[Pointer]) -> list[Pointer]:
        """Where a slot lies in each stack."""
        found = []
        for buffer, (shape, _), width in zip(buffers, self.kinds, self.widths, strict=True):
            size = math.prod(shape[1:])
            found.append(buffer.at(layer[0] * size + slot * width))
        return found

    def lines(self, row: Value, buffers: Sequence[Pointer]) -> list[Pointer]:
        """Where a row lies among the rows of each stack."""
        pairs = zip(buffers, self.widths, strict=True)
        return [buffer.at(row * width) for buffer, width in pairs]


def store_rows(
    stacks: Stacks,
    rows: tuple[Float[Array, "T ..."], ...],
    layer: Int[Array, ""],
    slots: Int[Array, "T"],
    is_read_soon: bool,
) -> list[Float[Array, "..."]]:
    """The stacks, written in place."""
    cut, count = _Slots.of(stacks, slots), len(stacks)

    def body(b: Builder, task: Value, layer: Pointer, slots: Pointer, *buffers: Pointer) -> None:
        def one(row: Value) -> None:
            slot = slots[row]
            with b.when(slot >= 0):
                sources = cut.lines(row, buffers[:count])
                targets = cut.places(layer, slot, buffers[2 * count :])
                for source, target, width in zip(sources, targets, cut.widths, strict=True):
                    _copy(b, source, target, width, is_streamed=not is_read_soon)

        cut.each(b, task, one)
        if not is_read_soon:
            b.fence()

    args = [*_ints(layer, slots), *rows]
    return call(
        "store_rows",
        (is_read_soon, *cut.pieces),
        body,
        cut.stacks(),
        [*args, *stacks],
        num_tasks=len(cut.pieces),
        aliases={len(args) + n: n for n in range(count)},
    )


def load_rows(
    stacks: Stacks, layer: Int[Array, ""], slots: Int[Array, "T"]
) -> list[Float[Array, "T ..."]]:
    """Rows of each stack; those of slot -1 are zero."""
    cut, count = _Slots.of(stacks, slots), len(stacks)

    def body(b: Builder, task: Value, layer: Pointer, slots: Pointer, *buffers: Pointer) -> None:
        def one(row: Value) -> None:
            targets = cut.lines(row, buffers[count:])
            _read(b, cut, slots[row], layer, buffers[:count], targets)

        cut.each(b, task, one)

    args = [*_ints(layer, slots), *stacks]
    num_tasks = len(cut.pieces)
    return call("load_rows", tuple(cut.pieces), body, cut.rows(), args, num_tasks=num_tasks)


def take_rows(
    stacks: Stacks, layer: Int[Array, ""], slots: Int[Array, "T"]
) -> tuple[list[Float[Array, "T ..."]], list[Float[Array, "..."]]]:
    """Rows of each stack, and the stacks with zeros in their place."""
    cut, count = _Slots.of(stacks, slots), len(stacks)

    def body(b: Builder, task: Value, layer: Pointer, slots: Pointer, *buffers: Pointer) -> None:
        rows, results = buffers[count : 2 * count], buffers[2 * count :]

        def one(row: Value) -> None:
            slot, targets = slots[row], cut.lines(row, rows)
            _read(b, cut, slot, layer, results, targets)
            with b.when(slot >= 0):
                for place, width in zip(cut.places(layer, slot, results), cut.widths, strict=True):
                    _clear(b, place, width)

        cut.each(b, task, one)

    args = [*_ints(layer, slots), *stacks]
    found = call(
        "take_rows",
        tuple(cut.pieces),
        body,
        [*cut.rows(), *cut.stacks()],
        args,
        num_tasks=len(cut.pieces),
        aliases={2 + n: count + n for n in range(count)},
    )
    return found[:count], found[count:]


def _read(b: Builder, cut: _Slots, slot: Value, layer: Pointer, stacks, targets) -> None:
    """Copies what is at a slot, or zeros for slot -1."""
    with b.either(slot >= 0) as (found, missing):
        with found:
            sources = cut.places(layer, slot, stacks)
            for source, target, width in zip(sources, targets, cut.widths, strict=True):
                _copy(b, source, target, width)
        with missing:
            for target, width in zip(targets, cut.widths, strict=True):
                _clear(b, target, width)


def _copy(
    b: Builder, source: Pointer, target: Pointer, width: int, *, is_streamed: bool = False
) -> None:
    is_streamed = is_streamed and width % b.lanes == 0
    step, vectors = _VECTORS * b.lanes, width // b.lanes * b.lanes
    whole = width // step * step
    with b.loop(0, whole, step) as index:
        found = [source.vector(index + n, b.lanes) for n in range(0, step, b.lanes)]
        for n, vector in enumerate(found):
            target.store(index + n * b.lanes, vector, is_streamed=is_streamed)
    for index in range(whole, vectors, b.lanes):
        target.store(index, source.vector(index, b.lanes), is_streamed=is_streamed)
    for index in range(vectors, width):
        target[index] = source[index]


def _clear(b: Builder, target: Pointer, width: int) -> None:
    vectors = width // b.lanes * b.lanes
    with b.loop(0, vectors, b.lanes) as index:
        target.store(index, b.splat(0.0))
    for index in range(vectors, width):
        target[index] = 0.0


def _ints(*arrays: Array) -> list[Array]:
    return [array.astype(jnp.int32) for array in arrays]
