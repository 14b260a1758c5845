"""Operands of the backward launch: blocks, shapes, and which keys and queries meet."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int

from pallas_kernels import _platform
from pallas_kernels.paged_attention.types import PageList, Ref

_PROGRAMS_TO_FILL = 256  # about two for each multiprocessor of an H200 or an A100
_MAX_SPLITS = 8


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Block sizes: what is tuned.

    Attributes:
      dq_block_q: (row, head) pairs that a dQ program owns.
      dq_block_k: Keys that it loads at a time.
      dkv_block_q: (row, head) pairs that a dK/dV program loads at a time.
      dkv_block_k: Keys that it owns.
      num_splits: dQ programs among which the keys of one query block are split.
      num_warps: Warps of a program.
      num_stages: Depth of the software pipeline of loads.
    """

    dq_block_q: int
    dq_block_k: int
    dkv_block_q: int
    dkv_block_k: int
    num_splits: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class Shape:
    """Everything static that the programs need.

    Attributes:
      num_rows: Rows of the window, padding included.
      num_keys: Keys that the page list can hold.
      groups: Query heads per KV head.
    """

    num_rows: int
    num_keys: int
    page_size: int
    num_kv_heads: int
    groups: int
    head_dim: int
    sm_scale: float
    sliding_window: int | None
    tiling: Tiling

    @property
    def num_loaded_keys(self) -> int:
        """Keys of whole blocks, of either part of the grid."""
        block_k = max(self.tiling.dq_block_k, self.tiling.dkv_block_k)
        return pl.cdiv(self.num_keys, block_k) * block_k

    @property
    def num_dq_programs(self) -> int:
        """Programs that compute dQ."""
        q_blocks = pl.cdiv(self.num_rows * self.groups, self.tiling.dq_block_q)
        return q_blocks * self.tiling.num_splits * self.num_kv_heads

    @property
    def num_dkv_programs(self) -> int:
        """Programs that compute dK and dV."""
        return self.num_loaded_keys // self.tiling.dkv_block_k * self.num_kv_heads


class Metadata(NamedTuple):
    """Which keys there are, who sees them, and where the programs' loops begin and end; int32.

    Segments lie end to end on one line: a coordinate is a position plus the lengths of all segments
    before. A row sees a key if 0 <= row_coord - key_coord < key_reach, which says at once that both
    are of one segment, that the key is not later, and that it is in the sliding window.

    Attributes:
      key_slots: Token slot (page * Z + offset) of each key in its layer; -1 if no row sees it.
      key_coords: Coordinate of each key.
      key_reaches: How far behind the key the rows that see it end; 0 if there is none.
      acc_slots: Token slot of each key in the accumulators; -1 where nothing may be written.
      row_coords: Coordinate of each row; -1 padding.
      k_starts: First key block that each query block of a dQ program sees.
      k_stops: One past the last.
      q_starts: First query block that sees each key block of a dK/dV program.
      q_stops: One past the last.
    """

    key_slots: Ref  # [S]
    key_coords: Ref  # [S]
    key_reaches: Ref  # [S]
    acc_slots: Ref  # [S]
    row_coords: Ref  # [W]
    k_starts: Ref  # [query blocks of dQ]
    k_stops: Ref  # [query blocks of dQ]
    q_starts: Ref  # [key blocks of dK/dV]
    q_stops: Ref  # [key blocks of dK/dV]


class Inputs(NamedTuple):
    """Operands of the launch: arrays outside, refs inside."""

    q: Ref  # [W, N, H]
    d_out: Ref  # [W, N, H]
    lse: Ref  # [W, N]
    delta: Ref  # [W, N]: sum(out * d_out)
    k_pool: Ref  # [L, P, Z, K, H]
    v_pool: Ref  # [L, P, Z, K, H]
    layer: Ref  # [1]
    acc_layer: Ref  # [1]
    metadata: Metadata


class Outputs(NamedTuple):
    """Results of the launch; the accumulators are added to in place."""

    dq: Ref  # [splits, W, N, H]
    dk_acc: Ref  # [l, p, Z, K, H], float32
    dv_acc: Ref  # [l, p, Z, K, H], float32


def default_tiling(
    num_rows: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype
) -> Tiling:
    """Block sizes that fill the registers of the target, without spills up to a head dim of 128."""
    # wgmma takes its right operands from shared memory; before it, they fill registers, too.
    has_wgmma = (_platform.target().compute_capability or 90) >= 90
    if jnp.dtype(dtype) == jnp.float32:  # multiplied on CUDA cores
        blocks, num_warps, num_stages = (16, 16, 16, 16), 8, 1
    elif head_dim > 128:
        blocks = (64, 64, 32, 64) if has_wgmma else (64, 32, 32, 32)
        num_warps, num_stages = 8, 2
    else:
        groups = num_heads // num_kv_heads
        is_plain = all(size & (size - 1) == 0 for size in (head_dim, groups))
        blocks = (64, 64 if has_wgmma else 32, 64 if has_wgmma and is_plain else 32, 64)
        num_warps, num_stages = 4, 2
    programs = pl.cdiv(num_rows * (num_heads // num_kv_heads), blocks[0]) * num_kv_heads
    num_splits = max(1, min(_MAX_SPLITS, _PROGRAMS_TO_FILL // programs))
    return Tiling(*blocks, num_splits, num_warps, num_stages)


def _range(is_member: Bool[Array, "n m"]) -> tuple[Int[Array, "n"], Int[Array, "n"]]:
    """First True of each row and one past the last; 0 and 0 if there is none."""
    start = jnp.argmax(is_member, axis=1).astype(jnp.int32)
    after_last = jnp.argmax(is_member[:, ::-1], axis=1).astype(jnp.int32)
    stop = jnp.where(is_member.any(1), is_member.shape[1] - after_last, 0)
    return start, stop


def _lay_out(
    page_list: PageList,
    is_named: Bool[Array, "M"],
    row_segments: Int[Array, "W"],
    row_positions: Int[Array, "W"],
    page_size: int,
) -> tuple[Int[Array, "M"], Int[Array, "M"], Int[Array, "W"]]:
    """Lays segments end to end; where each page's segment begins and ends, and the rows' begins."""
    segments = page_list.segments
    is_same = (segments[:, None] == segments[None, :]) & is_named[None, :]  # [M, M]
    is_mine = segments[:, None] == row_segments[None, :]  # [M, W]
    ends = jnp.where(is_same, page_list.starts[None, :] + page_size, 0).max(1)
    lengths = jnp.maximum(ends, jnp.where(is_mine, row_positions[None, :] + 1, 0).max(1))
    is_first = is_named & (jnp.argmax(is_same, axis=1) == jnp.arange(segments.size))
    is_before = (segments[None, :] < segments[:, None]) & is_first[None, :]
    begins = jnp.where(is_before, lengths[None, :], 0).sum(1)
    row_begins = jnp.where(is_mine & is_named[:, None], begins[:, None], -1).max(0)
    return begins, begins + lengths, row_begins


def describe(
    shape: Shape,
    page_list: PageList,
    acc_pages: Int[Array, "M"],
    row_segments: Int[Array, "W"],
    row_positions: Int[Array, "W"],
) -> Metadata:
    """Flattens the page list to keys, and finds which blocks meet. The same for every layer."""
    tiling, page_size = shape.tiling, shape.page_size
    is_named = (page_list.pages >= 0) & (jnp.arange(page_list.pages.size) < page_list.num_pages)
    begins, ends, row_begins = _lay_out(page_list, is_named, row_segments, row_positions, page_size)
    row_coords = jnp.where((row_positions >= 0) & (row_begins >= 0), row_begins + row_positions, -1)

    def by_key(per_page: jax.Array, fill: int, step: int = 1) -> jax.Array:
        keys = per_page[:, None] + step * jnp.arange(page_size)[None, :]
        keys = jnp.where(is_named[:, None], keys, fill).reshape(-1)
        return jnp.pad(keys, (0, shape.num_loaded_keys - keys.size), constant_values=fill)

    coords = by_key(begins + page_list.starts, 0)
    reaches = by_key(ends - begins - page_list.starts, 0, step=-1)
    if shape.sliding_window is not None:
        reaches = jnp.minimum(reaches, shape.sliding_window)
    sees = is_seen(row_coords[:, None], coords[None, :], reaches[None, :])  # [W, S]
    is_read = sees.any(0)
    acc_slots = jnp.where(acc_pages >= 0, acc_pages * page_size, -page_size)

    def blocks_of_rows(block_q: int) -> jax.Array:
        pairs = jnp.arange(pl.cdiv(shape.num_rows * shape.groups, block_q) * block_q)
        return jnp.minimum(pairs // shape.groups, shape.num_rows - 1).reshape(-1, block_q)

    def meets(block_q: int, block_k: int) -> Bool[Array, "q_blocks k_blocks"]:
        row_sees = sees.reshape(shape.num_rows, -1, block_k).any(-1)
        return row_sees[blocks_of_rows(block_q)].any(1)

    return Metadata(
        jnp.where(is_read, by_key(page_list.pages * page_size, -1), -1),
        coords,
        jnp.where(is_read, reaches, 0),
        jnp.where(is_read, jnp.maximum(by_key(acc_slots, -1), -1), -1),
        row_coords,
        *_range(meets(tiling.dq_block_q, tiling.dq_block_k)),
        *_range(meets(tiling.dkv_block_q, tiling.dkv_block_k).T),
    )


def is_seen(row_coords: jax.Array, key_coords: jax.Array, key_reaches: jax.Array) -> jax.Array:
    """Whether rows see keys; see `Metadata`."""
    gap = row_coords - key_coords
    return (gap >= 0) & (gap < key_reaches)
