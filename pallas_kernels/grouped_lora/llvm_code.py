"""The code of `llvm`: tasks are ranges of rows, which go through the bottleneck tile by tile.

Rows that stand together and have one slot are multiplied together; where a tile holds rows of
several slots, each row goes alone. Either way a row's numbers are summed in the same order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._llvm import gemm
from pallas_kernels._llvm.builder import Builder, Number, Pointer, Value
from pallas_kernels._llvm.compile import call, num_threads
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

_MAX_TASK_ROWS = 132
_FEW_ROWS = 16


@dataclasses.dataclass(frozen=True)
class RowTiles:
    """Rows of one task, whole tiles of which every task but the last has the same number."""

    num_rows: int
    rows: int

    @classmethod
    def cut(cls, num_rows: int) -> RowTiles:
        """Cuts rows into tasks; few rows are one, which costs no other thread's waking."""
        if num_rows <= _FEW_ROWS:
            return cls(num_rows, num_rows)
        most = min(_MAX_TASK_ROWS, -(-num_rows // num_threads()))
        return cls(num_rows, split_evenly(num_rows, most, tile_rows())[0])

    @property
    def num_tasks(self) -> int:
        """Number of tasks."""
        return -(-self.num_rows // self.rows)

    def each(
        self, b: Builder, task: Value, slots: Pointer, tile: Callable[[Value, int, Value], None]
    ) -> None:
        """Calls `tile(first row, rows, slot)` for all rows of a task that have a slot.

        It is called with a full tile's rows, or with one.
        """
        start = task * self.rows
        stop = b.minimum(start + self.rows, b.integer(self.num_rows))
        size = tile_rows()
        full = start + (stop - start) // size * size

        def one(row: Value) -> None:
            slot = slots[row]
            with b.when(slot >= 0):
                tile(row, 1, slot)

        with b.loop(start, full, size) as row:
            slot = slots[row]
            is_same = slot.equals(slots[row + 1])
            for n in range(2, size):
                is_same = is_same & slot.equals(slots[row + n])
            with b.either(is_same) as (together, apart):
                with together, b.when(slot >= 0):
                    tile(row, size, slot)
                with apart, b.loop(row, row + size) as single:
                    one(single)
        with b.loop(full, stop) as row:
            one(row)


@dataclasses.dataclass(frozen=True)
class _Task:
    """Writes one task's products of rows with matrices that their slots choose.

    Attributes:
      b: Where the code goes.
      cut: How rows are cut.
      index: The task.
      slots: Slot of each row.
      panel: Room for a packed panel.
    """

    b: Builder
    cut: RowTiles
    index: Value
    slots: Pointer
    panel: Pointer

    def product(
        self,
        rows: Rows,
        columns: Callable[[Value], Columns],
        num_columns: int,
        depth: int,
        output: Output,
    ) -> None:
        """Multiplies the task's rows, panel by panel; a panel is packed when the slot changes.

        Args:
          rows: Left side, of all tasks.
          columns: The right side of a slot.
          num_columns: Its columns.
          depth: Length of the contracted axis.
          output: Where row 0 and column 0 of the product go.
        """
        b, full = self.b, panel_columns()

        def block(start: Number, size: int, is_first: bool) -> None:
            left, is_added = rows.from_k(start), output.is_added or not is_first

            def step(column: Value, width: int) -> None:
                self._panel(left, columns, (start, size), (column, width), output, is_added)

            gemm.each_step(b, (0, -(-num_columns // full)), num_columns, full, step)

        gemm.each_piece(b, split_evenly(depth, gemm.DEPTH), block)

    def _panel(self, left, columns, depth_range, column_range, output, is_added) -> None:
        b, (start, size), (column, width) = self.b, depth_range, column_range
        packed = b.variable(-1)

        def tile(row: Value, num_rows: int, slot: Value) -> None:
            with b.when(packed.get().differs(slot)):
                pack(b, columns(slot).from_column(column), start, size, width, self.panel)
                packed.set(slot)
            sums = b.zeros(num_rows, VECTORS)
            gemm.multiply_tile(b, left.from_row(row), num_rows, size, self.panel, sums)
            place = output.base.at(row * output.row_stride).at(column)
            gemm.store_tile(b, sums, place, output.row_stride, width, is_added)

        self.cut.each(b, self.index, self.slots, tile)

    def scale(self, rows: Pointer, width: int, scale: Pointer) -> None:
        """Multiplies rows that have a slot by its factor."""
        b = self.b

        def tile(row: Value, num_rows: int, slot: Value) -> None:
            factor, whole = scale[slot], width // b.lanes * b.lanes
            for n in range(num_rows):
                line = rows.at((row + n) * width)
                for column in range(0, whole, b.lanes):
                    line.store(column, line.vector(column, b.lanes) * factor)
                for column in range(whole, width):
                    line[column] = line[column] * factor

        self.cut.each(b, self.index, self.slots, tile)


@dataclasses.dataclass(frozen=True)
class _Weights:
    """A stack of adapters' matrices [A, L, rows, columns]."""

    base: Pointer
    shape: tuple[int, ...]

    def at(self, slot: Value, layer: Value) -> Pointer:
        """The matrix of a slot and a layer."""
        _, layers, rows, columns = self.shape
        return self.base.at((slot * layers + layer) * (rows * columns))

    def columns(self, layer: Value, *, is_turned: bool = False) -> Callable[[Value], Columns]:
        """The right side that a slot's matrix is, or its transpose."""
        width = self.shape[3]
        strides = (1, width) if is_turned else (width, 1)
        return lambda slot: Columns(self.at(slot, layer), *strides)


def forward(
    x: Float[Array, "T I"],
    accs: Sequence[Array],
    lora_a: Sequence[Array],
    lora_b: Sequence[Array],
    scale: Float[Array, "A"],
    layer: Int[Array, ""],
    row_slots: Int[Array, "T"],
) -> tuple[Array, ...]:
    """Sums acc + scale[s] (x A_s) B_s of each linear, float32 [T, O]; accs may be overwritten."""
    (num_rows, depth), rank, count = x.shape, lora_a[0].shape[3], len(accs)
    cut = RowTiles.cut(num_rows)
    shapes = [weights.shape for weights in (*lora_a, *lora_b)]

    def body(b: Builder, task: Value, layer, slots, scale, x, *buffers: Pointer) -> None:
        stacks = [_Weights(*pair) for pair in zip(buffers, shapes, strict=False)]
        *ys, bottleneck = buffers[len(buffers) - count - 1 :]
        now, write = layer[0], _Task(b, cut, task, slots, b.buffer(gemm.DEPTH * panel_columns()))
        for a, weights, y in zip(stacks[:count], stacks[count:], ys, strict=True):
            middle = Output(bottleneck, rank)
            write.product(Rows(x, depth), a.columns(now), rank, depth, middle)
            write.scale(bottleneck, rank, scale)
            width = weights.shape[3]
            left, target = Rows(bottleneck, rank), Output(y, width, is_added=True)
            write.product(left, weights.columns(now), width, rank, target)

    args = [_int(layer), _int(row_slots), scale, x, *lora_a, *lora_b]
    *ys, _ = call(
        "grouped_lora",
        (count, dataclasses.astuple(cut)),
        body,
        [
            *(jax.ShapeDtypeStruct(acc.shape, jnp.float32) for acc in accs),
            jax.ShapeDtypeStruct((num_rows, rank), jnp.float32),
        ],
        [*args, *accs],
        num_tasks=cut.num_tasks,
        aliases={len(args) + n: n for n in range(count)},
    )
    return tuple(ys)


def through_bottleneck(
    x: Float[Array, "T I"],
    d_y: Float[Array, "T O"],
    d_x: Float[Array, "T I"],
    lora_a: Float[Array, "A L I R"],
    lora_b: Float[Array, "A L R O"],
    scale: Float[Array, "A"],
    layer: Int[Array, ""],
    row_slots: Int[Array, "T"],
) -> tuple[Float[Array, "T I"], Float[Array, "T R"], Float[Array, "T R"]]:
    """The part of the backward pass that goes by rows.

    Returns:
      d_x + h' A^T, the bottlenecks h = scale x A, and their gradients h' = scale d_y B^T; rows
      without a slot have the last two undefined.
    """
    (num_rows, width), out_width, rank = x.shape, d_y.shape[1], lora_a.shape[3]
    cut = RowTiles.cut(num_rows)

    def body(b, task, layer, slots, scale, x, d_y, a, weights, old, d_x, h, d_h) -> None:
        del old  # is d_x
        now, write = layer[0], _Task(b, cut, task, slots, b.buffer(gemm.DEPTH * panel_columns()))
        stack_a, stack_b = _Weights(a, lora_a.shape), _Weights(weights, lora_b.shape)
        write.product(Rows(x, width), stack_a.columns(now), rank, width, Output(h, rank))
        left, turned = Rows(d_y, out_width), stack_b.columns(now, is_turned=True)
        write.product(left, turned, rank, out_width, Output(d_h, rank))
        for rows in (h, d_h):
            write.scale(rows, rank, scale)
        turned, target = stack_a.columns(now, is_turned=True), Output(d_x, width, is_added=True)
        write.product(Rows(d_h, rank), turned, width, rank, target)

    args = [_int(layer), _int(row_slots), scale, x, d_y, lora_a, lora_b, d_x]
    narrow = jax.ShapeDtypeStruct((num_rows, rank), jnp.float32)
    d_x, h, d_h = call(
        "grouped_lora_bottleneck",
        dataclasses.astuple(cut),
        body,
        [jax.ShapeDtypeStruct(x.shape, jnp.float32), narrow, narrow],
        args,
        num_tasks=cut.num_tasks,
        aliases={len(args) - 1: 0},
    )
    return d_x, h, d_h


def outer(
    rows: Float[Array, "T C"],
    bottlenecks: Float[Array, "T R"],
    row_slots: Int[Array, "T"],
    active_slots: Int[Array, "n"],
    num_active: Int[Array, ""],
) -> Float[Array, "n C R"]:
    """For each active slot, the sum over its rows of row^T bottleneck; zero for padding.

    No number of another slot's row is read, so what is not finite stays where it is.
    """
    (num_rows, width), rank, num_slots = rows.shape, bottlenecks.shape[1], active_slots.shape[0]
    tile, full = tile_rows(), panel_columns()
    pieces = split_evenly(width, max(tile, -(-width // (2 * num_threads()))), tile)

    def body(b: Builder, task: Value, slots, active, num, rows, bottlenecks, out) -> None:
        panel = b.buffer(gemm.DEPTH * full)
        index, piece = task // len(pieces), task % len(pieces)
        first, place = piece * pieces[0], out.at(index * (width * rank))
        slot = b.select(index < num[0], active[index], b.integer(-2))

        def add_run(count: int, start: Value, stop: Value) -> None:
            left = Rows(rows.at(start * width), 1, width)
            for column in range(0, rank, full):
                used = min(full, rank - column)
                at = Columns(bottlenecks.at(start * rank + column), rank)
                pack(b, at, 0, stop - start, used, panel)
                target = Output(place.at(column), rank, is_added=True)
                gemm.sweep(b, left, (first, count), stop - start, panel, target, used,
                           is_first=False)  # fmt: skip

        def part(count: int) -> None:
            with b.loop(first * rank, (first + count) * rank) as n:
                place[n] = 0.0
            _each_run(b, slots, num_rows, slot, functools.partial(add_run, count))

        if pieces[-1] == pieces[0]:
            part(pieces[0])
        else:
            with b.either(piece < len(pieces) - 1) as (whole, last):
                with whole:
                    part(pieces[0])
                with last:
                    part(pieces[-1])

    args = [_int(row_slots), _int(active_slots), _int(num_active), rows, bottlenecks]
    (found,) = call(
        "grouped_lora_outer",
        tuple(pieces),
        body,
        [jax.ShapeDtypeStruct((num_slots, width, rank), jnp.float32)],
        args,
        num_tasks=num_slots * len(pieces),
    )
    return found


def _each_run(
    b: Builder,
    slots: Pointer,
    num_rows: int,
    slot: Value,
    run: Callable[[Value, Value], None],
) -> None:
    """Calls `run(first row, row behind the last)` for rows of a slot that stand together."""
    behind, stop = b.variable(0), b.variable(0)
    with b.loop(0, num_rows) as start:
        with b.when((start >= behind.get()) & slots[start].equals(slot)):
            stop.set(start)
            with b.loop(start, b.minimum(start + gemm.DEPTH, b.integer(num_rows))) as row:
                with b.when(stop.get().equals(row) & slots[row].equals(slot)):
                    stop.set(row + 1)
            run(start, stop.get())
            behind.set(stop.get())


def _int(array: Array) -> Array:
    return array.astype(jnp.int32)
