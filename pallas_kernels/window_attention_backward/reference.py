"""Attention backward of a window in plain jnp: blocks of pages against the tiles that see them."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention.reference import (
    RowTiles,
    gather_block,
    pad_pages,
)
from pallas_kernels.paged_attention.types import PageList


def window_attention_backward(
    q: Float[Array, "W N H"],
    out: Float[Array, "W N H"],
    lse: Float[Array, "W N"],
    d_out: Float[Array, "W N H"],
    k_pool: Float[Array, "L P Z K H"],
    v_pool: Float[Array, "L P Z K H"],
    layer: Int[Array, ""],
    page_list: PageList,
    row_segments: Int[Array, "W"],
    row_positions: Int[Array, "W"],
    dk_acc: Float[Array, "l p Z K H"],
    dv_acc: Float[Array, "l p Z K H"],
    acc_layer: Int[Array, ""],
    acc_pages: Int[Array, "M"],
    *,
    sm_scale: float,
    sliding_window: int | None = None,
) -> tuple[Float[Array, "W N H"], Float[Array, "l p Z K H"], Float[Array, "l p Z K H"]]:
    """Backward of `ragged_attention` for the rows of one window; see `api`."""
    page_size, num_kv_heads, head_dim = k_pool.shape[2:]
    tiles = RowTiles(row_segments, row_positions, page_list, page_size, sliding_window)
    block_pages = tiles.block_pages

    def split(x):  # [W, N, H] -> [n, K, GR, H], float32
        return tiles.split_heads(x, num_kv_heads)

    queries, d_heads = split(q.astype(jnp.float32) * sm_scale), split(d_out)
    delta = (split(out) * d_heads).sum(-1)  # [n, K, GR]
    lse_heads = split(lse[..., None])[..., 0]
    # What is multiplied from the left has its rows last: a product that must turn its left side
    # takes twice as long.
    queries_by_dim, d_heads_by_dim = queries.swapaxes(2, 3), d_heads.swapaxes(2, 3)
    padded_acc_pages = pad_pages(acc_pages, block_pages)

    def block_body(block, carry):
        d_queries, dk_acc, dv_acc = carry
        pages, mask = tiles.keys(block)  # [m], [n, R, S]
        is_read = mask.any((0, 1))[:, None, None]
        k = jnp.where(is_read, gather_block(k_pool, layer, pages).astype(jnp.float32), 0)
        v = jnp.where(is_read, gather_block(v_pool, layer, pages).astype(jnp.float32), 0)
        k, v = k.transpose(1, 2, 0), v.transpose(1, 2, 0)  # [K, H, S]
        by_key = k.transpose(0, 2, 1)  # [K, S, H]

        def tile_body(tile, carry):
            d_queries, dk, dv = carry  # [n, K, GR, H], [K, H, S], [K, H, S]
            query, d_head = queries[tile], d_heads[tile]  # [K, GR, H]
            scores = jnp.matmul(query, k) - lse_heads[tile][..., None]  # [K, GR, S]
            seen = jnp.tile(mask[tile], (scores.shape[1] // tiles.size, 1))
            probs = jnp.where(seen[None], jnp.exp(scores), 0.0)
            d_probs = jnp.matmul(d_head, v)
            d_scores = probs * (d_probs - delta[tile][..., None])
            d_query = jnp.matmul(d_scores, by_key)
            dk = dk + jnp.matmul(queries_by_dim[tile], d_scores)
            dv = dv + jnp.matmul(d_heads_by_dim[tile], probs)
            return d_queries.at[tile].add(d_query), dk, dv

        zeros = jnp.zeros(k.shape, jnp.float32)
        sums = (d_queries, zeros, zeros)
        d_queries, dk, dv = lax.fori_loop(*tiles.meeting(block), tile_body, sums)
        targets = lax.dynamic_slice_in_dim(padded_acc_pages, block * block_pages, block_pages)
        targets = jnp.where(targets >= 0, targets, dk_acc.shape[1])  # out of range: dropped
        shape = (block_pages, page_size, num_kv_heads, head_dim)

        def add(acc, d):
            # A row that is not finite must not reach slots that nobody reads, and nobody clears.
            d = jnp.where(is_read, d.transpose(2, 0, 1), 0).reshape(shape)
            return acc.at[acc_layer, targets].add(d, mode="drop")

        return d_queries, add(dk_acc, dk), add(dv_acc, dv)

    init = (jnp.zeros(queries.shape, jnp.float32), dk_acc, dv_acc)
    d_queries, dk_acc, dv_acc = lax.fori_loop(0, tiles.num_blocks, block_body, init)
    return tiles.join_heads(d_queries * sm_scale), dk_acc, dv_acc
