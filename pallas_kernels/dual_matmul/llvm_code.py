"""The code of `llvm`: tasks are ranges of a product's columns."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._llvm import few_rows, gemm, packing
from pallas_kernels._llvm.builder import Builder, Pointer, Value
from pallas_kernels._llvm.compile import call, num_threads, vector_lanes
from pallas_kernels._llvm.packing import Columns, Output, Rows


@dataclasses.dataclass(frozen=True)
class Share:
    """The tasks of one product.

    Attributes:
      first: Its first task.
      count: Number of tasks.
      steps: Steps of columns of a task; the last may have fewer.
      num_steps: Steps of all.
    """

    first: int
    count: int
    steps: int
    num_steps: int

    def column_range(self, b: Builder, task: Value) -> tuple[Value, Value]:
        """Steps of one task: the first, and the one behind the last."""
        start = (task - self.first) * self.steps
        return start, b.minimum(start + self.steps, b.integer(self.num_steps))


def shares(widths: Sequence[int], num_rows: int, *, is_contiguous: bool) -> list[Share]:
    """Cuts products into tasks.

    Few rows take about two tasks for each thread, many rows eight: a thread that has no task left
    waits for those of the others.

    Args:
      widths: Columns of each product.
      num_rows: Rows of each.
      is_contiguous: Whether neighbouring columns of the right side are neighbours in memory.
    """
    step = step_columns(num_rows, is_contiguous=is_contiguous)
    wanted = (8 if num_rows > few_rows.MAX_ROWS else 2) * num_threads()
    found: list[Share] = []
    for width in widths:
        num_steps = -(-width // step)
        tasks = max(1, min(num_steps, -(-wanted * width // sum(widths))))
        steps = -(-num_steps // tasks)
        first = found[-1].first + found[-1].count if found else 0
        found.append(Share(first, -(-num_steps // steps), steps, num_steps))
    return found


def step_columns(num_rows: int, *, is_contiguous: bool) -> int:
    """Columns that a task is a multiple of."""
    if num_rows > few_rows.MAX_ROWS:
        return packing.panel_columns()
    return few_rows.columns_per_step(num_rows, vector_lanes(), is_contiguous=is_contiguous)


def pack(x: Float[Array, "T I"]) -> Array:
    """Many rows, packed for the products of every column; few rows are read where they lie."""
    num_rows, depth = x.shape
    if num_rows <= few_rows.MAX_ROWS:
        return x
    tile, stride = packing.tile_rows(), packing.tile_stride(depth)
    pieces = packing.split_evenly(num_rows, -(-num_rows // (2 * num_threads())), tile)

    def body(b: Builder, task: Value, x: Pointer, packed: Pointer) -> None:
        first = task * pieces[0]
        count = b.minimum(b.integer(num_rows) - first, b.integer(pieces[0]))
        rows, target = Rows(x, depth).from_row(first), packed.at(first // tile * stride)
        packing.pack_rows(b, rows, count, num_rows % tile, depth, target, stride)

    size = -(-num_rows // tile) * stride
    result = jax.ShapeDtypeStruct((size,), jnp.float32)
    (packed,) = call("pack_rows", tuple(pieces), body, [result], [x], num_tasks=len(pieces))
    return packed


def packed_rows(base: Pointer, num_rows: int, depth: int) -> Rows:
    """Rows as `pack` leaves them."""
    return Rows.packed(base, depth) if num_rows > few_rows.MAX_ROWS else Rows(base, depth)


def product(
    b: Builder,
    rows: Rows,
    num_rows: int,
    columns: Columns,
    column_range: tuple[Value, Value],
    num_columns: int,
    depth: int,
    output: Output,
    *,
    is_contiguous: bool,
) -> None:
    """The product of all rows with some columns, as suits their number."""
    args = (columns, column_range, num_columns, depth, output)
    if num_rows > few_rows.MAX_ROWS:
        gemm.product(b, rows, (0, num_rows), *args)
    else:
        few_rows.product(b, rows, num_rows, *args, is_contiguous=is_contiguous)


def forward(
    x: Float[Array, "T I"],
    kernels: tuple[Float[Array, "L I _"], ...],
    layer: Int[Array, ""],
    accs: tuple[Float[Array, "T _"] | None, ...],
) -> tuple[Array, ...]:
    """Sums acc_k + x W_k[layer] of each kernel, float32 [T, out]; accs may be overwritten."""
    num_rows, depth = x.shape
    widths = [kernel.shape[2] for kernel in kernels]
    cut = shares(widths, num_rows, is_contiguous=True)
    given = [n for n, acc in enumerate(accs) if acc is not None]

    def body(b: Builder, task: Value, layer: Pointer, x: Pointer, *buffers: Pointer) -> None:
        stacks, ys = buffers[: len(widths)], buffers[len(buffers) - len(widths) :]
        rows = packed_rows(x, num_rows, depth)
        for n, (width, share) in enumerate(zip(widths, cut, strict=True)):
            with b.when((task >= share.first) & (task < share.first + share.count)):
                columns = Columns(stacks[n].at(layer[0] * (depth * width)), width)
                output = Output(ys[n], width, is_added=n in given)
                at = share.column_range(b, task)
                product(b, rows, num_rows, columns, at, width, depth, output, is_contiguous=True)

    args = [layer.astype(jnp.int32), pack(x), *kernels]
    aliases = {len(args) + place: n for place, n in enumerate(given)}
    return tuple(
        call(
            "stacked_matmul",
            (num_rows, tuple(given), *map(dataclasses.astuple, cut)),
            body,
            [jax.ShapeDtypeStruct((num_rows, width), jnp.float32) for width in widths],
            [*args, *(acc for acc in accs if acc is not None)],
            num_tasks=sum(share.count for share in cut),
            aliases=aliases,
        )
    )


def backward(
    d_ys: tuple[Float[Array, "M _"], ...],
    kernels: tuple[Float[Array, "_ Q _"], ...],
    layer: Int[Array, ""],
    acc: Float[Array, "M Q"] | None,
) -> Float[Array, "M Q"]:
    """Sums acc + dY_k W_k[layer]^T over the kernels, float32 [M, Q]; acc may be overwritten."""
    num_rows, num_columns = d_ys[0].shape[0], kernels[0].shape[1]
    depths = [kernel.shape[2] for kernel in kernels]
    (share,) = shares([num_columns], num_rows, is_contiguous=False)

    def body(b: Builder, task: Value, layer: Pointer, *buffers: Pointer) -> None:
        sides = zip(buffers, buffers[len(depths) :], depths, strict=False)
        add = functools.partial(product, b, is_contiguous=False)
        for n, (d_y, stack, depth) in enumerate(sides):
            start = layer[0] * (num_columns * depth)
            columns = Columns(stack.at(start), k_stride=1, column_stride=depth)
            output = Output(buffers[-1], num_columns, is_added=n > 0 or acc is not None)
            at = share.column_range(b, task)
            add(
                packed_rows(d_y, num_rows, depth), num_rows, columns, at, num_columns, depth, output
            )

    args = [layer.astype(jnp.int32), *map(pack, d_ys), *kernels]
    (dx,) = call(
        "stacked_matmul_transposed",
        (num_rows, acc is not None, dataclasses.astuple(share)),
        body,
        [jax.ShapeDtypeStruct((num_rows, num_columns), jnp.float32)],
        args if acc is None else [*args, acc],
        num_tasks=share.count,
        aliases={} if acc is None else {len(args): 0},
    )
    return dx
