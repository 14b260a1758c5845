"""Programs of paged attention in Pallas for Triton: a tile of query rows over its keys.

Plain functions of refs, program indices and a static `Tiling`; see `pallas_triton` for the method.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels._platform import (
    exp2,
    exp2_scaled,
    plgpu,
)
from pallas_kernels.paged_attention.reference import MASKED
from pallas_kernels.paged_attention.tiling import Tiling
from pallas_kernels.paged_attention.types import Ref

_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2.0)


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
