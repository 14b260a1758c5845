"""Rows gathered into blocks of one adapter each, and the tile sizes of the kernels.

A block is what one program of a kernel multiplies with one adapter's weights. Rows may come in any
order: the kernels read and write them through the table of their block.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels._platform import next_power_of_two

MIN_DOT = 16
"""Smallest extent of a matrix product on tensor cores."""


_PIPELINE_BYTES = 64 * 1024
"""Shared memory that a shrink's loads may take, so that a multiprocessor holds a few programs."""


class RowGroups(NamedTuple):
    """Blocks of rows that use the same adapter; depends on the rows' slots alone.

    Every layer and linear of a step may share one. Blocks of a slot follow one another, slots in
    ascending order, and rows within a slot keep their order.

    Attributes:
      rows: Rows of each block, -1 padding; int32 [blocks, block rows].
      slots: Slot of each block; -1 for the blocks left over, which stand last; int32.
      starts: First block of each slot, then the number of blocks used; int32 [slots + 1].
    """

    rows: Int[Array, "blocks block_rows"]
    slots: Int[Array, "blocks"]
    starts: Int[Array, "slots_and_one"]


def block_rows_for(num_rows: int) -> int:
    """Rows of a block: the least for decode, the 64 of a warp group's product for chunks."""
    return MIN_DOT if num_rows <= 128 else 64


def group_rows(
    row_slots: Int[Array, "T"], num_slots: int, *, block_rows: int | None = None
) -> RowGroups:
    """Groups rows by slot, without sorting: linear in rows times slots.

    Args:
      row_slots: Slot of each row, below `num_slots`; -1 for rows without an adapter.
      num_slots: Adapters in the bank.
      block_rows: Rows of a block, a power of two and at least 16; by default a choice by T.

    Raises:
      ValueError: If `block_rows` is not such a number.
    """
    num_rows = row_slots.shape[0]
    size = block_rows_for(num_rows) if block_rows is None else block_rows
    if size < MIN_DOT or size & (size - 1):
        raise ValueError(f"`block_rows` must be a power of two and at least 16; got {size}.")
    used = max(1, min(num_rows, num_slots))
    # Each slot that occurs leaves at most size - 1 places empty.
    num_blocks = max(1, (num_rows + used * (size - 1)) // size)

    is_mine = row_slots[:, None] == jnp.arange(num_slots, dtype=row_slots.dtype)[None, :]
    seen = lax.cumsum(is_mine.astype(jnp.int32), axis=0)
    blocks_of_slot = (jnp.sum(is_mine, axis=0, dtype=jnp.int32) + size - 1) // size
    starts = jnp.concatenate([jnp.zeros((1,), jnp.int32), lax.cumsum(blocks_of_slot)])

    slot = jnp.maximum(row_slots, 0)
    rank = jnp.take_along_axis(seen, slot[:, None], axis=1)[:, 0] - 1
    place = jnp.where(row_slots >= 0, starts[slot] * size + rank, num_blocks * size)
    rows = jnp.full((num_blocks * size,), -1, jnp.int32)
    rows = rows.at[place].set(jnp.arange(num_rows, dtype=jnp.int32), mode="drop")
    block = jnp.arange(num_blocks, dtype=jnp.int32)
    owner = jnp.sum(starts[None, 1:] <= block[:, None], axis=1, dtype=jnp.int32)
    slots = jnp.where(block < starts[num_slots], owner, -1)
    return RowGroups(rows.reshape(num_blocks, size), slots, starts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Sizes of the kernels' tiles; what a tuner varies.

    Attributes:
      block_k: Columns of the rows that one iteration of a shrink multiplies.
      max_splits: Programs that may share the columns of one shrink.
      min_split: Columns below which a program's share is not split further.
      block_o: Output columns of a program of an expand.
      num_stages: Depth of a shrink's pipeline of loads.
      block_outer: Columns of a program of a weight gradient.
      num_warps: Of every kernel.
    """

    block_k: int
    max_splits: int
    min_split: int
    block_o: int
    num_stages: int
    block_outer: int = 64
    num_warps: int = 4

    def splits(self, columns: int) -> int:
        """Programs that share a shrink over `columns`."""
        return max(1, min(self.max_splits, columns // self.min_split))

    def split_steps(self, columns: int) -> int:
        """Iterations of each of them; steps past `columns` read nothing."""
        return -(-columns // (self.splits(columns) * self.block_k))


def tiles_for(block_rows: int, rank: int, *, num_linears: int = 1, itemsize: int = 2) -> Tiles:
    """Tile sizes for blocks of `block_rows`, and adapters of linears that share their rows."""
    is_decode = block_rows <= MIN_DOT  # few bytes a program, so many programs, many loads each
    num_stages = 4 if is_decode else 3
    column_bytes = itemsize * (block_rows + num_linears * padded_rank(rank))
    fitting = _PIPELINE_BYTES // (column_bytes * (num_stages - 1))
    block_k = min(64, next_power_of_two(fitting + 1) // 2)
    return Tiles(
        block_k=max(MIN_DOT, block_k),
        max_splits=16 if is_decode else 8,
        min_split=512 if is_decode else 1024,
        block_o=64 if padded_rank(rank) > 64 else 128,
        num_stages=num_stages,
        num_warps=8 if block_rows * num_linears * padded_rank(rank) > 2**14 else 4,
    )


def padded_rank(rank: int) -> int:
    """Smallest extent of a tile that holds `rank` columns."""
    return max(MIN_DOT, next_power_of_two(rank))
