"""The decoder layer as pure functions.

A layer is two halves around attention, `pre_attention(x) -> q, k, v` and `post_attention(x, attn)
-> y`. Both take their linears as a function `linear(name, x)`, so that the same code serves plain
decoding, rows with different adapters, and the backward pass with kept outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from flexjax.model_config import ModelConfig
from flexjax.models.weights import DecoderWeights

Linear = Callable[[str, Array], Array]
"""`linear(name, x[T, in]) -> [T, out]`, in the dtype of x."""

LayerWeights = Mapping[str, Array]
"""One layer's arrays by name, without the layer axis."""


def rms_norm(x: Float[Array, "*T D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "*T D"]:
    """Root-mean-square norm, computed in float32 and scaled in the dtype of x."""
    wide = x.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    normalized = (wide * inverse).astype(x.dtype)
    return normalized * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


def rotary(
    x: Float[Array, "T heads H"], positions: Int[Array, "T"], config: ModelConfig
) -> Float[Array, "T heads H"]:
    """Rotary position embedding of each head's halves, angles in float32."""
    inv_freq = jnp.asarray(config.rope.inv_freq(config.head_dim), jnp.float32)
    angles = positions.astype(jnp.float32)[:, None] * inv_freq[None, :]
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def product(weights: LayerWeights, name: str, x: Float[Array, "T I"]) -> Float[Array, "T O"]:
    """X W (+ bias), float32: what a linear yields before adapters and the cast to x's dtype."""
    y = jnp.dot(x, weights[f"{name}.kernel"], preferred_element_type=jnp.float32)
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + bias.astype(jnp.float32)[None, :]


def base_linear(weights: LayerWeights) -> Linear:
    """The frozen linears of one layer, without adapters."""
    return lambda name, x: product(weights, name, x).astype(x.dtype)


def pre_attention(
    config: ModelConfig,
    weights: LayerWeights,
    linear: Linear,
    x: Float[Array, "T D"],
    positions: Int[Array, "T"],
) -> tuple[Float[Array, "T N H"], Float[Array, "T K H"], Float[Array, "T K H"]]:
    """First half of a layer: norm, q/k/v, head norms, rotary embedding."""
    h = rms_norm(x, weights["input_norm"], config.rms_norm_eps)
    q = linear("q_proj", h).reshape(-1, config.num_heads, config.head_dim)
    k = linear("k_proj", h).reshape(-1, config.num_kv_heads, config.head_dim)
    v = linear("v_proj", h).reshape(-1, config.num_kv_heads, config.head_dim)
    if config.qk_norm:
        q = rms_norm(q, weights["q_norm"], config.rms_norm_eps)
        k = rms_norm(k, weights["k_norm"], config.rms_norm_eps)
    return rotary(q, positions, config), rotary(k, positions, config), v


def post_attention(
    config: ModelConfig,
    weights: LayerWeights,
    linear: Linear,
    x: Float[Array, "T D"],
    attn: Float[Array, "T N H"],
) -> Float[Array, "T D"]:
    """Second half of a layer: output projection, residual, norm, gated MLP, residual."""
    x = x + linear("o_proj", attn.reshape(x.shape[0], -1))
    h = rms_norm(x, weights["post_attention_norm"], config.rms_norm_eps)
    gated = jax.nn.silu(linear("gate_proj", h)) * linear("up_proj", h)
    return x + linear("down_proj", gated)


def embed(weights: DecoderWeights, tokens: Int[Array, "T"]) -> Float[Array, "T D"]:
    """Token embeddings; padding (-1) reads token 0."""
    return weights.embed[jnp.maximum(tokens, 0)]


def head_kernel(weights: DecoderWeights) -> Float[Array, "D V"]:
    """The output head, tied or not."""
    return weights.embed.T if weights.lm_head is None else weights.lm_head


def logits(
    config: ModelConfig, weights: DecoderWeights, hidden: Float[Array, "T D"]
) -> Float[Array, "T V"]:
    """Final norm and head of rows as they leave the last layer, float32."""
    x = rms_norm(hidden, weights.final_norm, config.rms_norm_eps)
    return jnp.dot(x, head_kernel(weights), preferred_element_type=jnp.float32)
