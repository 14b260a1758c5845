"""One layer of a backward tile: the vjp of the two halves with the attention backward between.

For the rows of one window, with dy the gradient at the layer's output (DESIGN, section 3):

    (dx_res, d_attn, d_lora) = vjp(post_attention)(dy)
    dQ, dK_ctx, dV_ctx       = attention backward of the window's queries against keys 0..end
    dK_acc, dV_acc          += dK_ctx, dV_ctx
    (dx, d_lora')            = vjp(pre_attention)(dQ, dK_acc[window], dV_acc[window])

Exact for every order of tiles in which a window's later layers, and a layer's later windows, come
first. The accumulators' rows of the window are read once they are complete and set back to zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flexjax.autodiff.arena import INPUT, KVGrads, recall
from flexjax.cache.pages import KVPool
from flexjax.lora.bank import LoraTree
from flexjax.lora.linear import tile_linear
from flexjax.model_config import ModelConfig
from flexjax.models.layers import LayerWeights, post_attention, pre_attention
from pallas_kernels import (
    PageList,
    cpu_implementation,
    prefers_llvm,
    ragged_attention,
    take_rows,
    window_attention_backward,
)


class TileRows(NamedTuple):
    """The rows of one window and the pages that they saw.

    Attributes:
      positions: Position of each row in its sequence, -1 padding.
      segments: Sequence of each row, -1 padding.
      slots: Arena token slot of each row, -1 padding.
      page_list: KV pages of the sequences, up to the window's last row.
      acc_pages: Arena page of each entry of `page_list`, -1 padding.
    """

    positions: Int[Array, "W"]
    segments: Int[Array, "W"]
    slots: Int[Array, "W"]
    page_list: PageList
    acc_pages: Int[Array, "M"]


def sm_scale(config: ModelConfig) -> float:
    """What attention scores are multiplied by."""
    return 1.0 / math.sqrt(config.head_dim)


def backward_layer(
    config: ModelConfig,
    weights: LayerWeights,
    lora: LoraTree,
    scale: Float[Array, ""],
    pool: KVPool,
    kept: Mapping[str, Array],
    kv_grads: KVGrads,
    layer: Int[Array, ""],
    acc_layer: Int[Array, ""],
    rows: TileRows,
    dy: Float[Array, "W D"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "W D"], LoraTree, KVGrads]:
    """Backpropagates one window through one layer.

    Args:
      config: Architecture.
      weights: The layer's frozen arrays.
      lora: The layer's adapter, float32.
      scale: The adapter's scale.
      pool: Keys and values; the window's own and its predecessors'.
      kept: What the forward pass kept, as in `Arena.kept`.
      kv_grads: Accumulators; may be donated.
      layer: Index of the layer.
      acc_layer: Index of the layer in the accumulators.
      rows: The window.
      dy: Gradient at the layer's output, float32; zero for padding rows.
      implementation: Of attention, and of the adapters' products.

    Returns:
      Gradient at the layer's input (float32; of layer 0, which nobody reads, it may be a part),
      this window's gradient of the layer's adapter (summed over its rows, float32), and the
      accumulators.
    """
    saved = recall(kept, layer, rows.slots, implementation)
    x = saved.pop(INPUT)
    heads = (x.shape[0], config.num_heads, config.head_dim)

    # Nobody reads the gradient at the embeddings. A GPU would have to ask the host at each layer.
    has_layer_below = layer > 0 if prefers_llvm(implementation, x.dtype) else None

    def before(x: Array, lora: LoraTree) -> tuple[Array, Array, Array]:
        linear = tile_linear(weights, lora, scale, saved, implementation, has_layer_below)
        return pre_attention(config, weights, linear, x, rows.positions, implementation)

    def after(x: Array, attn: Array, lora: LoraTree) -> Array:
        linear = tile_linear(weights, lora, scale, saved, implementation)
        return post_attention(config, weights, linear, x, attn, implementation)

    with jax.named_scope("tile_recompute"):
        (q, k, v), before_vjp = jax.vjp(before, x, lora)
        if "attn" in saved:
            attn, lse = saved["attn"].reshape(heads), saved["lse"]
        else:
            attn, lse = _attention(config, q, pool, layer, rows, implementation)
    with jax.named_scope("tile_post_attention"):
        _, after_vjp = jax.vjp(after, x, attn, lora)
        dx_residual, d_attn, d_lora_after = after_vjp(dy.astype(x.dtype))
    with jax.named_scope("tile_attention"):
        dq, dk_acc, dv_acc = window_attention_backward(
            q,
            attn,
            lse,
            d_attn,
            pool.k,
            pool.v,
            layer,
            rows.page_list,
            rows.segments,
            rows.positions,
            kv_grads.k,
            kv_grads.v,
            acc_layer,
            rows.acc_pages,
            sm_scale=sm_scale(config),
            sliding_window=config.sliding_window,
            implementation=implementation,
        )
        acc, (dk, dv) = take_tokens(KVGrads(dk_acc, dv_acc), acc_layer, rows.slots, implementation)
    with jax.named_scope("tile_pre_attention"):
        dx, d_lora_before = before_vjp((dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)))
    d_lora = jax.tree.map(jnp.add, d_lora_after, d_lora_before)
    d_input = dx.astype(jnp.float32) + dx_residual.astype(jnp.float32)
    return d_input, d_lora, acc


def _attention(
    config: ModelConfig,
    q: Array,
    pool: KVPool,
    layer: Array,
    rows: TileRows,
    implementation: str | None,
) -> tuple[Array, Array]:
    return ragged_attention(
        q,
        pool.k,
        pool.v,
        layer,
        rows.page_list,
        rows.segments,
        rows.positions,
        sm_scale=sm_scale(config),
        sliding_window=config.sliding_window,
        implementation=implementation,
    )


def take_tokens(
    acc: KVGrads, layer: Array, slots: Int[Array, "W"], implementation: str | None = "reference"
) -> tuple[KVGrads, tuple[Float[Array, "W K H"], Float[Array, "W K H"]]]:
    """Reads the window's complete rows and sets them back to zero; padding rows read zero."""
    implementation = cpu_implementation(implementation)
    (dk, dv), halves = take_rows(acc, layer, slots, implementation=implementation)
    return KVGrads(*halves), (dk, dv)
