"""Attention over paged keys and values in plain jnp: a loop over blocks of pages.

Online softmax with float32 accumulation. The loop ends with the last page that is in use, so the
cost follows the live context lengths, not the padded shapes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.paged_attention.types import PageList

MASKED = -1e30
"""Score of a key that a query must not see; finite, so that fully masked rows stay finite."""

_KEYS_PER_BLOCK = 128


def pages_per_block(page_size: int) -> int:
    """Pages that one loop iteration reads."""
    return max(1, _KEYS_PER_BLOCK // page_size)


def pad_pages(pages: Int[Array, "*B M"], multiple: int) -> Int[Array, "*B m"]:
    """Pads the last axis with -1 to a multiple, so that every block slice is whole."""
    padding = -pages.shape[-1] % multiple
    widths = [(0, 0)] * (pages.ndim - 1) + [(0, padding)]
    return jnp.pad(pages, widths, constant_values=-1)


def visible(
    query_positions: Int[Array, "... Q #S"],
    key_positions: Int[Array, "... #Q S"],
    sliding_window: int | None,
) -> Bool[Array, "... Q S"]:
    """Causal (and sliding-window) mask; negative positions are padding on either side."""
    mask = (key_positions >= 0) & (query_positions >= key_positions)
    if sliding_window is not None:
        mask &= query_positions - key_positions < sliding_window
    return mask


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
    num_rows, num_heads, head_dim = q.shape
    page_size, num_kv_heads = k_pool.shape[2:4]
    block_pages = pages_per_block(page_size)
    block_keys = block_pages * page_size
    groups = num_heads // num_kv_heads
    queries = (q.astype(jnp.float32) * sm_scale).reshape(num_rows, num_kv_heads, groups, head_dim)
    by_group = [queries[:, None, :, group] for group in range(groups)]  # [B, 1, K, H] each
    table = pad_pages(page_table, block_pages)

    def body(block, carry):
        maximum, total, acc = carry  # [B, K, G], [B, K, G], [B, K, G, H]
        pages = lax.dynamic_slice_in_dim(table, block * block_pages, block_pages, axis=1)
        key_positions = (block * block_keys + jnp.arange(block_keys))[None, :]
        named = jnp.repeat(pages >= 0, page_size, axis=1)
        mask = visible(
            positions[:, None, None], jnp.where(named, key_positions, -1)[:, None], sliding_window
        )[:, 0, :, None]  # [B, S, 1]
        shape = (num_rows, block_keys, num_kv_heads, head_dim)
        k = k_pool[layer, jnp.maximum(pages, 0)].reshape(shape).astype(jnp.float32)
        v = v_pool[layer, jnp.maximum(pages, 0)].reshape(shape).astype(jnp.float32)
        v = jnp.where(mask[..., None], v, 0)
        # Products and sums, not dots: a dot would transpose the keys it has just gathered.
        k, v = lax.optimization_barrier((k, v))
        scores = jnp.stack([(query * k).sum(-1) for query in by_group], axis=-1)  # [B, S, K, G]
        scores = jnp.where(mask[..., None], scores, MASKED)
        new_maximum = jnp.maximum(maximum, scores.max(1))
        probs = jnp.where(mask[..., None], jnp.exp(scores - new_maximum[:, None]), 0.0)
        decay = jnp.exp(maximum - new_maximum)
        added = [(probs[..., group, None] * v).sum(1) for group in range(groups)]
        acc = acc * decay[..., None] + jnp.stack(added, axis=2)
        return new_maximum, total * decay + probs.sum(1), acc

    shape = (num_rows, num_kv_heads, groups)
    init = (
        jnp.full(shape, MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )
    num_blocks = (jnp.max(positions) + block_keys) // block_keys
    _, total, acc = lax.fori_loop(0, num_blocks, body, init)
    out = acc / jnp.where(total > 0, total, 1.0)[..., None]
    return out.reshape(q.shape).astype(q.dtype)


def gather_block(
    pool: Float[Array, "L P Z K H"],
    layer: Int[Array, ""],
    pages: Int[Array, "m"],
) -> Float[Array, "S K H"]:
    """Reads the tokens of a few pages of one layer; padding pages read page 0."""
    block = pool[layer, jnp.maximum(pages, 0)]
    return block.reshape(-1, *block.shape[2:])


def block_keys(
    page_list: PageList, block: Int[Array, ""], page_size: int
) -> tuple[Int[Array, "m"], Int[Array, "S"], Int[Array, "S"]]:
    """Pages, key positions (-1 padding) and key segments of one block of the list."""
    size = pages_per_block(page_size)

    def take(values: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(pad_pages(values, size), block * size, size)

    pages, segments, starts = map(take, (page_list.pages, page_list.segments, page_list.starts))
    offsets = jnp.arange(page_size)[None, :]
    positions = jnp.where((pages >= 0)[:, None], starts[:, None] + offsets, -1).reshape(-1)
    return pages, positions, jnp.repeat(segments, page_size)


def num_blocks(page_list: PageList, page_size: int) -> Int[Array, ""]:
    """Loop length that covers the pages in use."""
    size = pages_per_block(page_size)
    return (page_list.num_pages + size - 1) // size


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
    num_rows, num_heads, head_dim = q.shape
    page_size, num_kv_heads = k_pool.shape[2:4]
    groups = num_heads // num_kv_heads
    queries = (q.astype(jnp.float32) * sm_scale).reshape(num_rows, num_kv_heads, groups, head_dim)
    queries = queries.transpose(1, 2, 0, 3)  # [K, G, T, H]

    def body(block, carry):
        maximum, total, acc = carry
        pages, key_positions, key_segments = block_keys(page_list, block, page_size)
        mask = visible(row_positions[:, None], key_positions[None, :], sliding_window)
        mask &= row_segments[:, None] == key_segments[None, :]  # [T, S]
        k = gather_block(k_pool, layer, pages).astype(jnp.float32)
        v = gather_block(v_pool, layer, pages).astype(jnp.float32)
        # Rows of other segments meet these values with probability zero, and 0 * NaN is NaN: a
        # value that is not finite goes only to the rows that see it.
        is_bad = mask.any(0) & ~jnp.isfinite(v).all((1, 2))
        sees_bad = (mask & is_bad[None, :]).any(1)
        v = jnp.where((mask.any(0) & ~is_bad)[:, None, None], v, 0)
        scores = jnp.einsum("kgth,skh->kgts", queries, k)
        scores = jnp.where(mask[None, None], scores, MASKED)
        new_maximum = jnp.maximum(maximum, scores.max(-1))
        probs = jnp.where(mask[None, None], jnp.exp(scores - new_maximum[..., None]), 0.0)
        decay = jnp.exp(maximum - new_maximum)
        added = jnp.einsum("kgts,skh->kgth", probs, v)
        added = jnp.where(sees_bad[None, None, :, None], jnp.nan, added)
        return new_maximum, total * decay + probs.sum(-1), acc * decay[..., None] + added

    shape = (num_kv_heads, groups, num_rows)
    init = (
        jnp.full(shape, MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )
    maximum, total, acc = lax.fori_loop(0, num_blocks(page_list, page_size), body, init)
    total = jnp.where(total > 0, total, 1.0)
    out = (acc / total[..., None]).transpose(2, 0, 1, 3).reshape(q.shape)
    lse = (maximum + jnp.log(total)).transpose(2, 0, 1).reshape(num_rows, num_heads)
    return out.astype(q.dtype), lse
