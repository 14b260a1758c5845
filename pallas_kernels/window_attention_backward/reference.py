"""Attention backward of a window in plain jnp: a loop over blocks of pages."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention.reference import (
    block_keys,
    gather_block,
    num_blocks,
    pad_pages,
    pages_per_block,
    visible,
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
    num_rows, num_heads, head_dim = q.shape
    page_size, num_kv_heads = k_pool.shape[2:4]
    groups = num_heads // num_kv_heads
    block_pages = pages_per_block(page_size)

    def heads(x):  # [W, N, H] -> [K, G, W, H], float32
        x = x.astype(jnp.float32).reshape(num_rows, num_kv_heads, groups, -1)
        return x.transpose(1, 2, 0, 3)

    queries, d_heads = heads(q), heads(d_out)
    delta = (heads(out) * d_heads).sum(-1)  # [K, G, W]
    lse_heads = lse.reshape(num_rows, num_kv_heads, groups).transpose(1, 2, 0)
    padded_acc_pages = pad_pages(acc_pages, block_pages)

    def body(block, carry):
        d_queries, dk_acc, dv_acc = carry
        pages, key_positions, key_segments = block_keys(page_list, block, page_size)
        mask = visible(row_positions[:, None], key_positions[None, :], sliding_window)
        mask &= row_segments[:, None] == key_segments[None, :]  # [W, S]
        is_read = mask.any(0)[:, None, None]
        k = jnp.where(is_read, gather_block(k_pool, layer, pages).astype(jnp.float32), 0)
        v = jnp.where(is_read, gather_block(v_pool, layer, pages).astype(jnp.float32), 0)
        scores = jnp.einsum("kgwh,skh->kgws", queries, k) * sm_scale
        probs = jnp.where(mask[None, None], jnp.exp(scores - lse_heads[..., None]), 0.0)
        dv = jnp.einsum("kgws,kgwh->skh", probs, d_heads)
        d_probs = jnp.einsum("kgwh,skh->kgws", d_heads, v)
        d_scores = probs * (d_probs - delta[..., None]) * sm_scale
        d_queries = d_queries + jnp.einsum("kgws,skh->kgwh", d_scores, k)
        dk = jnp.einsum("kgws,kgwh->skh", d_scores, queries)
        targets = lax.dynamic_slice_in_dim(padded_acc_pages, block * block_pages, block_pages)
        targets = jnp.where(targets >= 0, targets, dk_acc.shape[1])  # out of range: dropped
        # A row that is not finite must not reach slots that nobody reads, and nobody clears.
        dk, dv = jnp.where(is_read, dk, 0), jnp.where(is_read, dv, 0)
        shape = (block_pages, page_size, num_kv_heads, head_dim)
        dk_acc = dk_acc.at[acc_layer, targets].add(dk.reshape(shape), mode="drop")
        dv_acc = dv_acc.at[acc_layer, targets].add(dv.reshape(shape), mode="drop")
        return d_queries, dk_acc, dv_acc

    init = (jnp.zeros(queries.shape, jnp.float32), dk_acc, dv_acc)
    d_queries, dk_acc, dv_acc = lax.fori_loop(0, num_blocks(page_list, page_size), body, init)
    return d_queries.transpose(2, 0, 1, 3).reshape(q.shape), dk_acc, dv_acc
