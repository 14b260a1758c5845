"""Tiles of matrix products in Triton: loads, products, program order, and which tile to take.

A tile is chosen from static shapes: a record of `tuned.json` when the shape was measured
(`scripts/tune_kernels.py` writes it), else the one that a small cost model predicts to be fastest.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels._platform import plgpu, target

Ref = Any
"""A Pallas reference to an array in the GPU's memory."""

MIN_DOT = 16
NUM_MULTIPROCESSORS = 132

# An H200 as the cost model sees it: bf16 products and reads that hit L2, of one multiprocessor;
# reads of the GPU's memory, of all; a launch. Products and memory are measured, the others assumed.
_FLOPS_PER_S = 790e12 / NUM_MULTIPROCESSORS
_L2_BYTES_PER_S = 7e12 / NUM_MULTIPROCESSORS
_MEMORY_BYTES_PER_S = 4.3e12
_LAUNCH_S = 3e-6
_L2_BYTES = 48 * 2**20
_SHORTEST_SPLIT = 8
_GROUP = 8


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a product [M, K] x [K, N] is cut.

    Attributes:
      block_m: Rows of a program.
      block_n: Columns of a program.
      block_k: Columns of the left operand per loop iteration.
      splits: Programs that share the K axis of one block of the result; each leaves a partial sum.
    """

    block_m: int
    block_n: int
    block_k: int
    splits: int = 1

    def num_blocks(self, rows: int, columns: int) -> int:
        """Blocks of a result of this shape."""
        return pl.cdiv(rows, self.block_m) * pl.cdiv(columns, self.block_n)

    def num_programs(self, rows: int, columns: int) -> int:
        """Programs of a result of this shape."""
        return self.num_blocks(rows, columns) * self.splits


def load_tile(
    ref: Ref,
    index: tuple[Any, ...],
    start: tuple[Any, Any],
    block: tuple[int, int],
    limits: tuple[int | None, int | None],
) -> jax.Array:
    """Loads a block of the last two axes; what lies beyond `limits` is zero.

    Args:
      ref: Whole array, [..., rows, columns].
      index: Scalar index of each axis before the last two.
      start: First row and column: a multiple of `block`.
      block: Rows and columns, powers of two.
      limits: Rows and columns that may be read; None where the block is known to end before.
    """
    at, mask = _place(start, block, limits)
    if mask is None:
        return plgpu.load(ref.at[(*index, *at)])
    return plgpu.load(ref.at[(*index, *at)], mask=mask, other=0)


def store_tile(
    ref: Ref,
    index: tuple[Any, ...],
    start: tuple[Any, Any],
    limits: tuple[int | None, int | None],
    values: jax.Array,
) -> None:
    """Stores a block of the last two axes, except what lies beyond `limits`; see `load_tile`."""
    at, mask = _place(start, values.shape, limits)
    plgpu.store(ref.at[(*index, *at)], values.astype(ref.dtype), mask=mask)


def _place(start, block, limits):
    """Indices of a block, and a mask: None if every limit is a multiple of the block."""
    if not any(
        limit is not None and limit % size for limit, size in zip(limits, block, strict=True)
    ):
        return tuple(pl.ds(first, size) for first, size in zip(start, block, strict=True)), None
    rows = (start[0] + jnp.arange(block[0], dtype=jnp.int32))[:, None]
    columns = (start[1] + jnp.arange(block[1], dtype=jnp.int32))[None, :]
    mask = jnp.ones(block, jnp.bool_)
    for indices, limit, size in zip((rows, columns), limits, block, strict=True):
        if limit is not None and limit % size:
            mask &= indices < limit
    return (rows, columns), mask


def dot(a: jax.Array, b: jax.Array, *, transposed: bool) -> jax.Array:
    """Multiplies: a @ b, or a @ b.T if `transposed`, in float32; float32 operands without TF32."""
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(
        a, b, dims, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def block_of_program(program: Any, num_m: int, num_n: int) -> tuple[Any, Any]:
    """Row and column block of a program.

    Neighbours in time share operands in L2: rows go fastest within a group of `_GROUP` row blocks,
    so that a block of the weights leaves the GPU's memory once per group.
    """
    if num_m <= _GROUP:
        return lax.rem(program, num_m), lax.div(program, num_m)
    group, within = lax.div(program, _GROUP * num_n), lax.rem(program, _GROUP * num_n)
    first = group * _GROUP
    size = jnp.minimum(num_m - first, _GROUP)
    return first + lax.rem(within, size), lax.div(within, size)


def predicted_s(tile: Tile, rows: int, columns: Sequence[int], depth: int, itemsize: int) -> float:
    """Predicted time of products [rows, depth] x [depth, n] for each n of `columns`, on an H200.

    A multiprocessor takes one program after the other; a program is bound by its products or by
    reading its operands from L2; the whole by reading the weights from memory, which takes two
    programs on every multiprocessor to have enough reads under way. Splits add a pass over the
    partial sums.
    """
    programs = sum(tile.num_programs(rows, n) for n in columns)
    steps = pl.cdiv(pl.cdiv(depth, tile.block_k), tile.splits)
    products_s = 2 * tile.block_m * tile.block_n * tile.block_k / _FLOPS_PER_S
    reads_s = (tile.block_m + tile.block_n) * tile.block_k * itemsize / _L2_BYTES_PER_S
    waves = pl.cdiv(programs, NUM_MULTIPROCESSORS)
    memory_s = depth * sum(columns) * itemsize / _MEMORY_BYTES_PER_S
    filled = min(1.0, programs / (2 * NUM_MULTIPROCESSORS))
    total = max(waves * steps * max(products_s, reads_s), memory_s / filled)
    if tile.splits > 1:
        total += _LAUNCH_S + 8 * tile.splits * rows * sum(columns) / _MEMORY_BYTES_PER_S
    return total


def candidate_tiles(
    rows: int,
    columns: Sequence[int],
    depth: int,
    dtype: Any,
    *,
    max_splits: int = 8,
    is_aligned: bool = True,
) -> list[Tile]:
    """Tiles of products [rows, depth] x [depth, n] for each n of `columns`.

    Args:
      rows: Rows of the left operand.
      columns: Columns of every right operand.
      depth: What they share.
      dtype: Of the operands.
      max_splits: Most programs that share the K axis.
      is_aligned: Whether rows of the weights begin at multiples of 16 bytes.

    Returns:
      Tiles worth measuring, the one predicted to be fastest first.
    """
    itemsize = jnp.dtype(dtype).itemsize
    largest_k = min(_power_of_two(depth), 64 if itemsize <= 2 else 32)
    tiles = set()
    for block_m, block_n in _block_shapes(rows, itemsize, is_aligned):
        block_n = min(block_n, _power_of_two(max(columns)))
        splits = 1
        while splits == 1 or (
            splits <= max_splits
            and splits * _SHORTEST_SPLIT * largest_k <= depth
            and splits * rows * sum(columns) * 4 <= _L2_BYTES
        ):
            tiles.add(Tile(block_m, block_n, largest_k, splits))
            splits *= 2

    def cost(tile: Tile) -> tuple[float, int, int]:
        seconds = predicted_s(tile, rows, columns, depth, itemsize)
        return seconds, tile.splits, -tile.block_m * tile.block_n

    return sorted(tiles, key=cost)


def _block_shapes(rows: int, itemsize: int, is_aligned: bool) -> list[tuple[int, int]]:
    """Rows and columns of a program that are worth a trial."""
    if itemsize > 2:
        # Multiplied on CUDA cores: what fits the registers.
        return [(min(32, _power_of_two(rows)), 64)]
    if rows <= 64:
        return [(_power_of_two(rows), 64), (_power_of_two(rows), 128)]
    shapes = [(64, 128), (128, 128)]
    # Before Hopper operands pass through registers, and so do loads of odd alignment: the largest
    # block's sum leaves no room for them.
    if is_aligned and (target().compute_capability or 90) >= 90:
        shapes.append((128, 256))
    return shapes


def _power_of_two(value: int) -> int:
    return max(MIN_DOT, 1 << max(0, value - 1).bit_length())


def warps_and_stages(*tiles: Tile) -> tuple[int, int]:
    """Warps of a program and loop iterations in flight, for a launch that holds these tiles."""
    largest = max(tile.block_m * tile.block_n for tile in tiles)
    # Four warps are one warpgroup, which multiplies 64 rows at a time.
    num_warps = 4 if largest <= 64 * 128 else 8
    bytes_per_stage = max((tile.block_m + tile.block_n) * tile.block_k for tile in tiles) * 2
    return num_warps, 4 if bytes_per_stage <= 24 * 1024 else 3


@functools.cache
def _tuned() -> dict[str, dict[str, Any]]:
    return json.loads(
        importlib.resources.files("pallas_kernels").joinpath("tuned.json").read_text()
    )


def tuned(op: str, signature: str) -> dict[str, Any] | None:
    """Measured choice for these static shapes on the target; None if there is none.

    Args:
      op: Name of the op.
      signature: Its shapes and dtype, as the op spells them.
    """
    capability = target().compute_capability
    return _tuned().get(f"sm_{capability}", {}).get(f"{op} {signature}")
