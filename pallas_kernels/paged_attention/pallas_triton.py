"""Paged attention in Pallas for Triton: decode rows and ragged rows over one pool.

Both kernels are FlashAttention-2 (Dao 2023, arXiv 2307.08691): one program holds a tile of query
rows, walks the keys once, and keeps a running maximum, sum and output in float32. Keys and values
are gathered through page indices (PagedAttention, Kwon et al. 2023, arXiv 2309.06180): a page's
index is read per key, one block ahead of use, and the head dim is contiguous, so that every warp
reads whole 128-byte lines. Query heads that share a KV head share a tile, and so every key and
value is read once per tile: the rows of a tile are *folded*, row r being query head r % G of token
r // G.

**Splitting the keys** (Flash-Decoding, Dao, Haziza, Massa, Sizov 2023). A grid of rows and KV
heads alone does not fill the chip when there are few rows, so it has a third axis of `num_splits`,
chosen from shapes alone (`tiling.py`): enough programs for every multiprocessor, and no split
shorter than a few blocks of the longest possible context. Each row's own live blocks are divided
evenly among its splits, whatever its length, so that short contexts fill the chip as well; splits
without a block end at once. A split writes its normalized output and its log-sum-exp, and a small
kernel weighs the splits of each row by exp(lse - lse of all). With one split there is no second
kernel.

**Skipping.** What a tile of ragged rows can see is worked out before the launch (`tile_bounds`): a
range of the page list, and within it the blocks that every row of the tile sees whole. The latter
need no mask, and are most of a long prompt's blocks; only blocks on the diagonal, at the edge of a
sliding window or between two sequences pay for the mask.

To put these programs into a launch of another kernel: `decode_block` and `ragged_block` are plain
functions of refs, program indices and a static `Tiling`. Choose a `Tiling` with `decode_tiling` or
`ragged_tiling`, pass whole arrays without BlockSpecs, and give as many programs as
`Tiling.num_tiles(rows)` x KV heads x `num_splits` to the function; then, when `num_splits` is above
one, call `combine_splits`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels._platform import (
    exp2,
    exp2_scaled,
    next_power_of_two,
    plgpu,
    triton_call,
)
from pallas_kernels.paged_attention.reference import MASKED
from pallas_kernels.paged_attention.tiling import Tiling as Tiling
from pallas_kernels.paged_attention.tiling import decode_tiling as decode_tiling
from pallas_kernels.paged_attention.tiling import ragged_tiling as ragged_tiling
from pallas_kernels.paged_attention.types import PageList

Ref = Any
"""A Pallas reference to an array in the GPU's memory."""

_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2.0)
_MAX_HEAD_DIM = 256
_COMBINED_ELEMENTS = 4096
"""Partial outputs that one program of `combine_splits` holds in registers."""


class Pool(NamedTuple):
    """Refs of the keys and values.

    Attributes:
      k: Keys, [L, P, Z, K, H].
      v: Values, same shape.
      layer: Layer to read, [1].
    """

    k: Ref
    v: Ref
    layer: Ref


class DecodeInputs(NamedTuple):
    """Refs that `decode_block` reads.

    Attributes:
      q: Queries, [B, N, H].
      pool: Keys and values.
      page_table: Pages of each row, [B, M].
      positions: Position of each row, [B].
    """

    q: Ref
    pool: Pool
    page_table: Ref
    positions: Ref


class RaggedInputs(NamedTuple):
    """Refs that `ragged_block` reads.

    Attributes:
      q: Queries, [T, N, H].
      pool: Keys and values.
      pages: Pages of the list, [M].
      page_segments: Segment of each page, [M].
      page_starts: Position of each page's first token, [M].
      row_segments: Segment of each row, [T].
      row_positions: Position of each row, [T].
      bounds: Result of `tile_bounds`, [tiles, 4].
    """

    q: Ref
    pool: Pool
    pages: Ref
    page_segments: Ref
    page_starts: Ref
    row_segments: Ref
    row_positions: Ref
    bounds: Ref


class _State(NamedTuple):
    """Online softmax of a tile; scores are in base 2.

    Attributes:
      maximum: Largest score so far, [block_rows].
      total: Sum of exp2(score - maximum), [block_rows].
      acc: Sum of exp2(score - maximum) times value, [block_rows, block_dims].
    """

    maximum: Array
    total: Array
    acc: Array


def _empty(tiling: Tiling) -> _State:
    rows = tiling.block_rows
    return _State(
        jnp.full((rows,), MASKED, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows, tiling.block_dims), jnp.float32),
    )


def _dims(tiling: Tiling) -> tuple[Array, Array | None]:
    """Indices of a load along the head dim, [1, block_dims], and its mask where it needs one."""
    dims = jnp.arange(tiling.block_dims)[None, :]
    return dims, None if tiling.block_dims == tiling.head_dim else dims < tiling.head_dim


def _load(ref: Ref, mask: Array | None) -> Array:
    """Loads what the mask names, and zeros."""
    return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask, other=0)


def _and(a: Array | None, b: Array | None) -> Array | None:
    return b if a is None else a if b is None else a & b


def _dot(a: Array, b: Array, *, trans_b: bool = False) -> Array:
    """Product with float32 accumulation; float32 operands are not rounded to TF32."""
    return lax.dot_general(
        a,
        b,
        dimension_numbers=(((1,), (1 if trans_b else 0,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _load_keys(
    ref: Ref, layer: Array, pages: Array, offsets: Array, head: Array, is_read, tiling: Tiling
) -> Array:
    """Gathers tokens of one KV head, [block_keys, block_dims]; `is_read` masks tokens, [S, 1]."""
    dims, is_dim = _dims(tiling)
    return _load(ref.at[layer, pages[:, None], offsets[:, None], head, dims], _and(is_read, is_dim))


def _weigh(
    state: _State, products: Array, scale: float, mask: Array | None
) -> tuple[_State, Array]:
    """Takes in a block's products of queries and keys, [rows, keys], multiplied by `scale`.

    Returns the state, to which the values are still to be added, and what they are weighed by.
    """
    if mask is None:
        largest = (products.max(1) if scale > 0 else products.min(1)) * scale
        maximum = jnp.maximum(state.maximum, largest)
        probs = exp2_scaled(products, scale, -maximum[:, None])
    else:
        scores = jnp.where(mask, products * scale, MASKED)
        maximum = jnp.maximum(state.maximum, scores.max(1))
        probs = jnp.where(mask, exp2(scores - maximum[:, None]), 0.0)
    decay = exp2(state.maximum - maximum)
    return _State(maximum, state.total * decay + probs.sum(1), state.acc * decay[:, None]), probs


def _finish(
    state: _State, out_ref: Ref, lse_ref: Ref, split: Array, tokens: Array, heads: Array,
    is_row: Array, is_stored: Array, tiling: Tiling,
) -> None:  # fmt: skip
    """Writes normalized outputs and natural log-sum-exp of the rows of one split.

    Args:
      state: Of the tile.
      out_ref: [num_splits, T, N, H].
      lse_ref: [num_splits, T, N].
      split: Index of the split.
      tokens: Token of each row, [block_rows].
      heads: Query head of each row, [block_rows].
      is_row: Whether there is such a row, [block_rows].
      is_stored: Whether the row's output is to be written, [block_rows]; its log-sum-exp always is.
      tiling: Of the kernel.
    """
    is_live = state.total != 0  # of NaN as well: it must be seen
    total = jnp.where(is_live, state.total, 1.0)
    lse = jnp.where(is_live, (state.maximum + jnp.log2(total)) * _LN_2, MASKED)
    plgpu.store(lse_ref.at[split, tokens, heads], lse, mask=is_row)
    dims, is_dim = _dims(tiling)
    out = (state.acc / total[:, None]).astype(out_ref.dtype)
    mask = _and((is_row & is_stored)[:, None], is_dim)
    plgpu.store(out_ref.at[split, tokens[:, None], heads[:, None], dims], out, mask=mask)


def _divide(count: Array, divisor: int) -> Array:
    """Quotient of a count, which is not negative; `//` would look at signs."""
    return lax.div(count, jnp.full_like(count, divisor))


def _share(count: Array, split: Array, num_splits: int) -> tuple[Array, Array]:
    """Range of the even share that `split` has of `count` blocks."""
    if num_splits == 1:
        return jnp.zeros_like(count), count
    return _divide(count * split, num_splits), _divide(count * (split + 1), num_splits)


def decode_block(
    inputs: DecodeInputs,
    out_ref: Ref,
    lse_ref: Ref,
    row: Array,
    head: Array,
    split: Array,
    tiling: Tiling,
) -> None:
    """One program of decode attention: the query heads of a KV head, of one row.

    Args:
      inputs: What it reads.
      out_ref: [num_splits, B, N, H], float32 if there are several splits.
      lse_ref: [num_splits, B, N], float32; -1e30 where a split has no key.
      row: Row of `q`.
      head: KV head.
      split: Share of the row's keys.
      tiling: `block_rows` covers the group.
    """
    layer = inputs.pool.layer[0]
    position = inputs.positions[row]
    # The tile's rows are the group's heads; those past the group are computed and not stored.
    index = jnp.arange(tiling.block_rows)
    is_row = index < tiling.group
    # An index out of range, and masked: the interpreter of masked stores takes no index twice.
    heads = jnp.where(is_row, head * tiling.group + index, inputs.q.shape[1])
    rows = jnp.full((tiling.block_rows,), row, jnp.int32)
    dims, is_dim = _dims(tiling)
    q = _load(inputs.q.at[row, heads[:, None], dims], _and(is_row[:, None], is_dim))

    first = jnp.int32(0)
    if tiling.sliding_window is not None:
        first = jnp.maximum(position - (tiling.sliding_window - 1), 0)
        first = _divide(first, tiling.block_keys)
    num_blocks = _divide(position + tiling.block_keys, tiling.block_keys) - first
    begin, end = _share(num_blocks, split, tiling.num_splits)
    max_pages = inputs.page_table.shape[1]
    scale = tiling.sm_scale * _LOG2_E

    def locate(block):
        """Of the keys of a block: page, offset in it and whether the row sees it, [block_keys]."""
        slots = (first + block) * tiling.block_keys + jnp.arange(tiling.block_keys)
        is_seen = slots <= position
        if tiling.sliding_window is not None:
            is_seen &= position - slots < tiling.sliding_window
        entries = _divide(slots, tiling.page_size)
        is_seen &= entries < max_pages
        pages = _load(inputs.page_table.at[row, jnp.minimum(entries, max_pages - 1)], is_seen)
        return jnp.maximum(pages, 0), slots & (tiling.page_size - 1), is_seen & (pages >= 0)

    def body(block, carry):
        state, pages, offsets, is_seen = carry
        where = layer, pages, offsets, head, is_seen[:, None]
        k = _load_keys(inputs.pool.k, *where, tiling)
        v = _load_keys(inputs.pool.v, *where, tiling)
        products = _dot(q, k, trans_b=True)
        state, probs = _weigh(_State(*state), products, scale, is_seen[None, :])
        state = state._replace(acc=state.acc + _dot(probs.astype(v.dtype), v))
        # One block ahead: loads that wait for other loads of their iteration are not pipelined.
        return state, *locate(block + 1)

    state, *_ = lax.fori_loop(begin, end, body, (_empty(tiling), *locate(begin)))
    state = _State(*state)
    is_stored = is_row & ((end > begin) | (tiling.num_splits == 1))
    _finish(state, out_ref, lse_ref, split, rows, heads, is_row, is_stored, tiling)


def ragged_block(
    inputs: RaggedInputs,
    out_ref: Ref,
    lse_ref: Ref,
    tile: Array,
    head: Array,
    split: Array,
    tiling: Tiling,
) -> None:
    """One program of ragged attention: a tile of folded rows of one KV head.

    Args:
      inputs: What it reads.
      out_ref: [num_splits, T, N, H], float32 if there are several splits.
      lse_ref: [num_splits, T, N], float32; -1e30 where a split has no key for the row.
      tile: Tile of folded rows.
      head: KV head.
      split: Share of the tile's keys.
      tiling: As it was given to `tile_bounds`.
    """
    layer = inputs.pool.layer[0]
    num_tokens, num_pages = inputs.q.shape[0], inputs.pages.shape[0]
    folded = tile * tiling.block_rows + jnp.arange(tiling.block_rows)
    is_row = folded < num_tokens * tiling.group
    tokens = _divide(folded, tiling.group)  # out of range past the last row, and masked
    heads = head * tiling.group + (folded - tokens * tiling.group)
    row_segments = plgpu.load(inputs.row_segments.at[tokens], mask=is_row, other=-1)
    row_positions = plgpu.load(inputs.row_positions.at[tokens], mask=is_row, other=-1)
    is_valid = (row_segments >= 0) & (row_positions >= 0)
    dims, is_dim = _dims(tiling)
    q = _load(inputs.q.at[tokens[:, None], heads[:, None], dims], _and(is_row[:, None], is_dim))

    first_slot, num_blocks, first_whole, num_whole = (inputs.bounds[tile, i] for i in range(4))
    scale = tiling.sm_scale * _LOG2_E

    def locate(slot, count):
        """Of `count` keys from a slot: entry of the page list and offset in its page, [count]."""
        slots = first_slot + slot + jnp.arange(count)
        return _divide(slots, tiling.page_size), slots & (tiling.page_size - 1)

    def whole_pages(block):
        entries, offsets = locate((first_whole + block) * tiling.block_keys, tiling.block_keys)
        pages = plgpu.load(inputs.pages.at[jnp.minimum(entries, num_pages - 1)])
        return jnp.maximum(pages, 0), offsets

    def whole_body(block, carry):
        state, pages, offsets = carry
        where = layer, pages, offsets, head, None
        k = _load_keys(inputs.pool.k, *where, tiling)
        v = _load_keys(inputs.pool.v, *where, tiling)
        state, probs = _weigh(_State(*state), _dot(q, k, trans_b=True), scale, None)
        state = state._replace(acc=state.acc + _dot(probs.astype(v.dtype), v))
        # One block ahead: loads that wait for other loads of their iteration are not pipelined.
        return state, *whole_pages(block + 1)

    def masked_body(step, state):
        slot = step * tiling.masked_keys
        slot += jnp.where(slot >= first_whole * tiling.block_keys, num_whole * tiling.block_keys, 0)
        entries, offsets = locate(slot, tiling.masked_keys)
        is_named = entries < num_pages
        entries = jnp.minimum(entries, num_pages - 1)
        pages = plgpu.load(inputs.pages.at[entries])
        is_named &= pages >= 0
        key_positions = plgpu.load(inputs.page_starts.at[entries]) + offsets
        key_segments = plgpu.load(inputs.page_segments.at[entries])
        mask = is_named[None, :] & (row_segments[:, None] == key_segments[None, :])
        mask &= row_positions[:, None] >= key_positions[None, :]
        if tiling.sliding_window is not None:
            mask &= row_positions[:, None] - key_positions[None, :] < tiling.sliding_window
        where = layer, jnp.maximum(pages, 0), offsets, head, is_named[:, None]
        k = _load_keys(inputs.pool.k, *where, tiling)
        v = _load_keys(inputs.pool.v, *where, tiling)
        # Rows of other sequences meet these values with probability zero, and 0 * NaN is NaN: a
        # value that is not finite goes only to the rows that see it.
        is_bad = jnp.max(jnp.where(jnp.abs(v.astype(jnp.float32)) < jnp.inf, 0, 1), axis=1) > 0
        sees_bad = jnp.max(jnp.where(mask & is_bad[None, :], 1, 0), axis=1) > 0
        v = jnp.where(is_bad[:, None], jnp.zeros_like(v), v)
        state, probs = _weigh(_State(*state), _dot(q, k, trans_b=True), scale, mask)
        acc = state.acc + _dot(probs.astype(v.dtype), v)
        return state._replace(acc=jnp.where(sees_bad[:, None], jnp.nan, acc))

    state = _empty(tiling)
    bounds = _share(num_whole, split, tiling.num_splits)
    state, *_ = lax.fori_loop(*bounds, whole_body, (state, *whole_pages(bounds[0])))
    steps_per_block = tiling.block_keys // tiling.masked_keys
    bounds = _share((num_blocks - num_whole) * steps_per_block, split, tiling.num_splits)
    state = _State(*lax.fori_loop(*bounds, masked_body, state))
    # Padding rows of a tile go through blocks without a mask as well.
    state = _State(
        state.maximum,
        jnp.where(is_valid, state.total, 0.0),
        jnp.where(is_valid[:, None], state.acc, 0.0),
    )
    _finish(state, out_ref, lse_ref, split, tokens, heads, is_row, is_row, tiling)


def tile_bounds(
    page_list: PageList,
    row_segments: Int[Array, "T"],
    row_positions: Int[Array, "T"],
    tiling: Tiling,
) -> Int[Array, "tiles 4"]:
    """What the rows of each tile can see.

    Keys are counted in slots, the tokens of the page list laid end to end. Only a whole range of
    slots is skipped or not masked: sequences whose rows and pages stand in the same order pay
    nothing for each other, other orders are right and slower.

    Args:
      page_list: Pages that the rows may read.
      row_segments: Segment of each row, -1 padding.
      row_positions: Position of each row, -1 padding.
      tiling: Of the kernel.

    Returns:
      Per tile: first slot, number of blocks of keys from there that some row sees, the first of
      these that every row sees whole, and how many in sequence are such.
    """
    num_rows = row_segments.shape[0]
    num_tiles = tiling.num_tiles(num_rows)
    # A piece is what may be skipped: a page, or a block of keys where that is smaller.
    piece = min(tiling.page_size, tiling.block_keys)
    per_page, per_block = tiling.page_size // piece, tiling.block_keys // piece
    first_row = np.arange(num_tiles) * tiling.block_rows // tiling.group
    last_row = ((np.arange(num_tiles) + 1) * tiling.block_rows - 1) // tiling.group
    reach = int((last_row - first_row).max()) + 1
    rows = np.minimum(first_row[:, None] + np.arange(reach), num_rows - 1)  # some twice: harmless
    segments, positions = row_segments[rows], row_positions[rows]  # [tiles, reach]
    segments, positions = segments[:, :, None], positions[:, :, None]

    entries = jnp.arange(page_list.pages.shape[0])
    is_named = (page_list.pages >= 0) & (entries < page_list.num_pages)
    page_segments = jnp.repeat(jnp.where(is_named, page_list.segments, -1), per_page)
    starts = jnp.repeat(page_list.starts, per_page) + jnp.tile(
        jnp.arange(per_page) * piece, entries.shape[0]
    )
    page_segments, starts = page_segments[None, None], starts[None, None]
    is_row = (segments >= 0) & (positions >= 0)
    sees = is_row & (segments == page_segments) & (positions >= starts)
    sees_whole = sees & (positions >= starts + (piece - 1))
    if tiling.sliding_window is not None:
        sees &= positions - (starts + (piece - 1)) < tiling.sliding_window
        sees_whole &= positions - starts < tiling.sliding_window
    is_seen = sees.any(1)  # [tiles, pieces]
    is_whole = is_seen & (sees_whole | ~is_row).all(1)

    pieces = jnp.arange(is_seen.shape[1])[None, :]
    num_pieces = is_seen.shape[1]
    first = jnp.where(is_seen, pieces, num_pieces).min(1)
    behind = jnp.maximum(jnp.where(is_seen, pieces + 1, 0).max(1), first)
    run = jnp.where(is_whole, pieces, num_pieces).min(1)
    run_end = jnp.where(~is_whole & (pieces > run[:, None]), pieces, num_pieces).min(1)
    num_blocks = (behind - first + per_block - 1) // per_block
    first_whole = (run - first + per_block - 1) // per_block
    num_whole = jnp.maximum((run_end - first) // per_block - first_whole, 0)
    return jnp.stack([first * piece, num_blocks, first_whole, num_whole], axis=1)


def _combine_block(
    outs_ref: Ref, lses_ref: Ref, out_ref: Ref, lse_ref: Ref, block: Array, block_rows: int
) -> None:
    """Weighs the splits of `block_rows` rows of X, a token's query head each.

    Args:
      outs_ref: [splits, X, H] float32.
      lses_ref: [splits, X] float32.
      out_ref: [X, H].
      lse_ref: [X] float32.
      block: Block of the X axis.
      block_rows: Size of a block, a power of two.
    """
    num_splits, num_rows, head_dim = outs_ref.shape
    splits = jnp.arange(next_power_of_two(num_splits))[:, None]
    rows = block * block_rows + jnp.arange(block_rows)
    is_row = rows < num_rows
    is_split = (splits < num_splits) & is_row[None, :]
    lses = plgpu.load(lses_ref.at[splits, rows[None, :]], mask=is_split, other=MASKED)
    maximum = jnp.max(lses, axis=0)
    # A split without a key has written no output. NaN compares false, and is kept.
    weights = jnp.where(lses < MASKED / 2, 0.0, jnp.exp(lses - maximum[None, :]))
    total = jnp.sum(weights, axis=0)
    total = jnp.where(total == 0, 1.0, total)
    dims = jnp.arange(next_power_of_two(head_dim))
    outs = plgpu.load(
        outs_ref.at[splits[:, :, None], rows[None, :, None], dims[None, None, :]],
        mask=(weights != 0)[:, :, None] & (dims < head_dim)[None, None, :],
        other=0.0,
    )
    out = jnp.sum(outs * weights[:, :, None], axis=0) / total[:, None]
    plgpu.store(
        out_ref.at[rows[:, None], dims[None, :]],
        out.astype(out_ref.dtype),
        mask=is_row[:, None] & (dims < head_dim)[None, :],
    )
    plgpu.store(lse_ref.at[rows], maximum + jnp.log(total), mask=is_row)


def combine_splits(
    outs: Float[Array, "splits T N H"], lses: Float[Array, "splits T N"], dtype: Any
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """Joins what the splits of each row wrote.

    Args:
      outs: Normalized outputs, float32; not read where a split has no key.
      lses: Their log-sum-exps, float32; -1e30 where a split has no key.
      dtype: Of the result.

    Returns:
      Attention outputs, and log-sum-exps in float32.
    """
    num_splits, num_tokens, num_heads, head_dim = outs.shape
    if num_splits == 1:
        return outs[0].astype(dtype), lses[0]
    rows = num_tokens * num_heads
    elements = next_power_of_two(num_splits) * next_power_of_two(head_dim)
    block_rows = max(1, _COMBINED_ELEMENTS // elements)

    def combine_splits(outs_ref, lses_ref, out_ref, lse_ref):
        _combine_block(outs_ref, lses_ref, out_ref, lse_ref, pl.program_id(0), block_rows)

    out, lse = triton_call(
        combine_splits,
        [
            jax.ShapeDtypeStruct((rows, head_dim), dtype),
            jax.ShapeDtypeStruct((rows,), jnp.float32),
        ],
        grid=(pl.cdiv(rows, block_rows),),
        name="combine_splits",
        num_warps=4,
        num_stages=1,
    )(outs.reshape(num_splits, rows, head_dim), lses.reshape(num_splits, rows))
    return out.reshape(outs.shape[1:]), lse.reshape(lses.shape[1:])


def _split_shapes(
    num_splits: int, shape: tuple[int, ...], dtype: Any
) -> list[jax.ShapeDtypeStruct]:
    """Outputs of a kernel with splits: partial outputs stay in float32."""
    return [
        jax.ShapeDtypeStruct((num_splits, *shape), dtype if num_splits == 1 else jnp.float32),
        jax.ShapeDtypeStruct((num_splits, *shape[:-1]), jnp.float32),
    ]


def check_supported(q: Array, k_pool: Array, v_pool: Array) -> None:
    """Checks that these kernels can run on the operands.

    Raises:
      NotImplementedError: If dtypes differ or are not floats of 16 or 32 bits, or the head dim is
        above 256.
    """
    dtypes = {q.dtype.name, k_pool.dtype.name, v_pool.dtype.name}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16", "float32"}:
        raise NotImplementedError(
            "Paged attention in Triton needs queries, keys and values of one dtype, bfloat16, "
            f"float16 or float32; got {sorted(dtypes)}."
        )
    if q.shape[-1] > _MAX_HEAD_DIM:
        raise NotImplementedError(
            f"Paged attention in Triton needs a head dim of at most {_MAX_HEAD_DIM}; "
            f"got {q.shape[-1]}."
        )


def decode_attention(
    q: Float[Array, "B N H"],
    k_pool: Float[Array, "L P Z K H"],
    v_pool: Float[Array, "L P Z K H"],
    layer: Int[Array, ""],
    page_table: Int[Array, "B M"],
    positions: Int[Array, "B"],
    *,
    sm_scale: float,
    sliding_window: int | None = None,
) -> Float[Array, "B N H"]:
    """Attention of one query row per sequence; see `api.decode_attention`."""
    check_supported(q, k_pool, v_pool)
    tiling = decode_tiling(q.shape, k_pool.shape, page_table.shape[1], q.dtype,
                           sm_scale=sm_scale, sliding_window=sliding_window)  # fmt: skip

    def decode_attention(q, k, v, layer, page_table, positions, out, lse):
        inputs = DecodeInputs(q, Pool(k, v, layer), page_table, positions)
        # Heads of one token lie side by side in memory, and so do their programs in time.
        head, split, row = (pl.program_id(axis) for axis in range(3))
        decode_block(inputs, out, lse, row, head, split, tiling)

    outs, lses = triton_call(
        decode_attention,
        _split_shapes(tiling.num_splits, q.shape, q.dtype),
        grid=(k_pool.shape[3], tiling.num_splits, q.shape[0]),
        name="decode_attention",
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )(q, k_pool, v_pool, layer.reshape(1), page_table, positions)
    return combine_splits(outs, lses, q.dtype)[0]


def ragged_attention(
    q: Float[Array, "T N H"],
    k_pool: Float[Array, "L P Z K H"],
    v_pool: Float[Array, "L P Z K H"],
    layer: Int[Array, ""],
    page_list: PageList,
    row_segments: Int[Array, "T"],
    row_positions: Int[Array, "T"],
    *,
    sm_scale: float,
    sliding_window: int | None = None,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """Attention of rows of several sequences; see `api.ragged_attention`."""
    check_supported(q, k_pool, v_pool)
    tiling = ragged_tiling(q.shape, k_pool.shape, page_list.pages.shape[0], q.dtype,
                           sm_scale=sm_scale, sliding_window=sliding_window)  # fmt: skip
    num_tiles = tiling.num_tiles(q.shape[0])

    def ragged_attention(q, k, v, layer, pages, segments, starts, row_segments, row_positions,
                         bounds, out, lse):  # fmt: skip
        inputs = RaggedInputs(q, Pool(k, v, layer), pages, segments, starts, row_segments,
                              row_positions, bounds)  # fmt: skip
        head, split, index = (pl.program_id(axis) for axis in range(3))
        # The last rows see most: what takes longest begins first.
        ragged_block(inputs, out, lse, num_tiles - 1 - index, head, split, tiling)

    outs, lses = triton_call(
        ragged_attention,
        _split_shapes(tiling.num_splits, q.shape, q.dtype),
        grid=(k_pool.shape[3], tiling.num_splits, num_tiles),
        name="ragged_attention",
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )(
        q,
        k_pool,
        v_pool,
        layer.reshape(1),
        page_list.pages,
        page_list.segments,
        page_list.starts,
        row_segments,
        row_positions,
        tile_bounds(page_list, row_segments, row_positions, tiling),
    )
    return combine_splits(outs, lses, q.dtype)
