"""Tiles and splits of the paged attention kernels, chosen from shapes and the target alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels._platform import next_power_of_two, target

NUM_MULTIPROCESSORS = 132
_MAX_SPLITS = 64
_DECODE_PROGRAMS_PER_MULTIPROCESSOR = 4
_FLOPS_PER_S = 0.6 * 790e12 / NUM_MULTIPROCESSORS
"""Of one multiprocessor of an H200, as attention attains; only compared with what follows."""
_MEMORY_BYTES_PER_S = 4.3e12
_LAUNCH_S = 3e-6
"""Time that a program or a launch costs before it does anything."""
_MIN_BLOCKS_PER_SPLIT = 2


@dataclasses.dataclass(frozen=True)
class Tiling:
    """What is fixed when a kernel is compiled.

    Attributes:
      group: Query heads per KV head.
      head_dim: Of queries, keys and values.
      page_size: Tokens of a page.
      block_rows: Folded rows of a tile; a power of two, at least 16.
      block_keys: Keys of one loop iteration; a power of two, at least 16.
      masked_keys: The same where rows see different keys; at most `block_keys`.
      num_splits: Programs that share the keys of a tile.
      num_warps: Warps of a program.
      num_stages: Loop iterations whose loads are in flight.
      sm_scale: Multiplies the scores.
      sliding_window: Keys that a query sees, itself included; None for all.
    """

    group: int
    head_dim: int
    page_size: int
    block_rows: int
    block_keys: int
    masked_keys: int
    num_splits: int
    num_warps: int
    num_stages: int
    sm_scale: float
    sliding_window: int | None

    @property
    def block_dims(self) -> int:
        """Size of a load along the head dim."""
        return max(16, next_power_of_two(self.head_dim))

    def num_tiles(self, num_rows: int) -> int:
        """Tiles that cover the folded rows of `num_rows` tokens."""
        return pl.cdiv(num_rows * self.group, self.block_rows)


def _possible_splits(max_blocks: int) -> list[int]:
    """Powers of two that leave every split a few blocks of the longest context."""
    largest = max(1, min(_MAX_SPLITS, max_blocks // _MIN_BLOCKS_PER_SPLIT))
    return [1 << bits for bits in range(largest.bit_length())]


def _decode_splits(num_programs: int, max_blocks: int) -> int:
    """Splits that give every multiprocessor a few programs, which reads from memory wait for."""
    wanted = pl.cdiv(_DECODE_PROGRAMS_PER_MULTIPROCESSOR * NUM_MULTIPROCESSORS, num_programs)
    possible = _possible_splits(max_blocks)
    return next((splits for splits in possible if splits >= wanted), possible[-1])


def _ragged_splits(num_programs: int, tile_s: float, out_bytes: int, max_blocks: int) -> int:
    """Splits that take least time, a multiprocessor having one program at a time.

    Args:
      num_programs: Without splits.
      tile_s: Time of a program without splits.
      out_bytes: Of the outputs in float32.
      max_blocks: Blocks of the longest possible context.
    """

    def seconds(splits: int) -> float:
        waves = pl.cdiv(num_programs * splits, NUM_MULTIPROCESSORS)
        combine_s = _LAUNCH_S + 2 * splits * out_bytes / _MEMORY_BYTES_PER_S
        return waves * (tile_s / splits + _LAUNCH_S) + (combine_s if splits > 1 else 0.0)

    return min(_possible_splits(max_blocks), key=seconds)


def _shared_memory_limit() -> int:
    """Bytes of shared memory that a program of the target may have."""
    kib = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}
    return kib.get(target().compute_capability or 90, 99) * 1024


def _block_keys(wanted: int, dims: int, dtype: Any, num_stages: int, rows: int) -> int:
    """Keys of an iteration: as wanted, or as many as shared memory holds beside the queries."""
    itemsize, keys = jnp.dtype(dtype).itemsize, wanted
    while keys > 16 and (2 * keys * num_stages + rows) * dims * itemsize > _shared_memory_limit():
        keys //= 2
    return keys


def decode_tiling(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    max_pages: int,
    dtype: Any,
    *,
    sm_scale: float,
    sliding_window: int | None = None,
) -> Tiling:
    """Tiling of `decode_block` for queries [B, N, H], a pool [L, P, Z, K, H] and M pages a row.

    Three programs fit on a multiprocessor, each with two blocks of 64 keys on their way.
    """
    page_size, num_kv_heads, head_dim = k_shape[2:]
    group = q_shape[1] // num_kv_heads
    block_rows = max(16, next_power_of_two(group))
    dims = max(16, next_power_of_two(head_dim))
    bytes_per_key = dims * jnp.dtype(dtype).itemsize
    block_keys = min(64, max(16, 64 * 256 // bytes_per_key))
    max_keys = max_pages * page_size
    if sliding_window is not None:
        max_keys = min(max_keys, sliding_window)
    return Tiling(
        group=group,
        head_dim=head_dim,
        page_size=page_size,
        block_rows=block_rows,
        block_keys=block_keys,
        masked_keys=block_keys,
        num_splits=_decode_splits(q_shape[0] * num_kv_heads, pl.cdiv(max_keys, block_keys)),
        num_warps=4 if jnp.dtype(dtype).itemsize == 2 else 8,
        num_stages=3,
        sm_scale=sm_scale,
        sliding_window=sliding_window,
    )


def ragged_tiling(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    max_pages: int,
    dtype: Any,
    *,
    sm_scale: float,
    sliding_window: int | None = None,
) -> Tiling:
    """Tiling of `ragged_block` for queries [T, N, H], a pool [L, P, Z, K, H] and M pages listed.

    Keys come from L2 once per tile, so tiles are as high as registers allow: 128 rows.
    """
    page_size, num_kv_heads, head_dim = k_shape[2:]
    group = q_shape[1] // num_kv_heads
    dims = max(16, next_power_of_two(head_dim))
    is_half = jnp.dtype(dtype).itemsize == 2
    num_folded = q_shape[0] * group
    num_stages = 3
    if not is_half:  # Products of float32 use no tensor core, and their operands many registers.
        block_rows, wanted, num_warps = 32, 16, 8
    else:
        is_wide, has_wgmma = dims > 128, (target().compute_capability or 90) >= 90
        block_rows = 64 if num_folded <= 64 or (is_wide and not has_wgmma) else 128
        wanted = 128 if not is_wide else 64 if has_wgmma else 32
        num_warps = 8 if is_wide else block_rows // 16
    block_keys = _block_keys(wanted, dims, dtype, num_stages, block_rows)
    max_keys = max_pages * page_size
    # Prompts fill their pages step by step, and on average have half of them.
    tile_s = 2 * max_keys * block_rows * dims / _FLOPS_PER_S
    num_splits = _ragged_splits(
        pl.cdiv(num_folded, block_rows) * num_kv_heads,
        tile_s,
        4 * math.prod(q_shape),
        pl.cdiv(max_keys, block_keys),
    )
    return Tiling(
        group=group,
        head_dim=head_dim,
        page_size=page_size,
        block_rows=block_rows,
        block_keys=block_keys,
        masked_keys=min(block_keys, 32),
        num_splits=num_splits,
        num_warps=num_warps,
        num_stages=num_stages,
        sm_scale=sm_scale,
        sliding_window=sliding_window,
    )
