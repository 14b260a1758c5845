"""The decoder as a Flax nnx module, used functionally.

The module owns the parameters and is convenient in notebooks (`decoder(tokens)`); the engine splits
it once, at load, and below that there are only pure functions over `DecoderWeights`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from flexjax.builtin_models import builtin_model_config
from flexjax.model_config import ModelConfig
from flexjax.models.layers import (
    LayerWeights,
    Linear,
    embed,
    logits,
    post_attention,
    pre_attention,
    products,
)
from flexjax.models.weights import DecoderWeights, random_weights, weight_specs

LoraParams = Mapping[str, Mapping[str, Array]]
"""LoRA arrays by linear: {"q_proj": {"A": [L, in, R], "B": [L, R, out]}, ...}."""


class Decoder(nnx.Module):
    """A decoder of any supported family.

    Attributes:
      config: Architecture.
      embed: Token embedding, [V, D].
      final_norm: Scale of the last norm, [D].
      lm_head: Output head, [D, V]; None when tied.
      layers: Stacked arrays by name, layer axis first.
    """

    def __init__(self, config: ModelConfig, weights: DecoderWeights):
        specs = weight_specs(config)

        def param(array: jax.Array, axis_names: tuple[str, ...]) -> nnx.Param:
            return nnx.Param(array, axis_names=axis_names)

        self.config = config
        self.embed = param(weights.embed, specs.embed.axes)  # type: ignore[attr-defined]
        self.final_norm = param(weights.final_norm, specs.final_norm.axes)  # type: ignore[attr-defined]
        self.lm_head = (
            None if weights.lm_head is None else param(weights.lm_head, specs.lm_head.axes)  # type: ignore[union-attr]
        )
        self.layers = nnx.Dict(
            {
                name.replace(".", "/"): param(weights.layers[name], spec.axes)  # type: ignore[attr-defined]
                for name, spec in specs.layers.items()
            }
        )

    @classmethod
    def random(cls, config: ModelConfig | str, *, dtype: str = "float32", seed: int = 0) -> Decoder:
        """Makes a decoder with random weights.

        Args:
          config: Architecture, or the name of a built-in one.
          dtype: Dtype of the weights.
          seed: Seed of the draws.
        """
        if isinstance(config, str):
            config = builtin_model_config(config)
        return cls(config, random_weights(config, dtype, seed))

    def weights(self) -> DecoderWeights:
        """Splits the module once into the arrays that pure functions take."""
        _, state = nnx.split(self, nnx.Param)
        pure = nnx.to_pure_dict(state)
        return DecoderWeights(
            embed=pure["embed"],
            final_norm=pure["final_norm"],
            lm_head=pure.get("lm_head"),
            layers={name.replace("/", "."): array for name, array in pure["layers"].items()},
        )

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        lora: LoraParams | None = None,
        *,
        lora_scale: float = 1.0,
    ) -> Float[Array, "B S V"]:
        """Logits of whole sequences, float32; see `decoder_logits`."""
        return decoder_logits(self.config, self.weights(), tokens, lora, lora_scale=lora_scale)


def lora_linear(
    weights: LayerWeights, lora: Mapping[str, Mapping[str, Array]], scale: float | Array
) -> Linear:
    """Linears of one layer with one adapter for all rows; differentiable in the adapter."""

    def add_delta(name: str, x: Array, y: Array) -> Array:
        if name in lora:
            a, b = lora[name]["A"], lora[name]["B"]
            bottleneck = jnp.dot(x, a.astype(x.dtype), preferred_element_type=jnp.float32) * scale
            bottleneck = bottleneck.astype(x.dtype)
            y = y + jnp.dot(bottleneck, b.astype(x.dtype), preferred_element_type=jnp.float32)
        return y.astype(x.dtype)

    def linear(names: Sequence[str], x: Array) -> list[Array]:
        ys = products(weights, names, x)
        return [add_delta(name, x, y) for name, y in zip(names, ys, strict=True)]

    return linear


def decoder_logits(
    config: ModelConfig,
    weights: DecoderWeights,
    tokens: Int[Array, "B S"],
    lora: LoraParams | None = None,
    *,
    lora_scale: float | Array = 1.0,
) -> Float[Array, "B S V"]:
    """Logits of whole sequences by plain dense causal attention.

    The straightforward definition of the model: no pages, no windows. `jax.grad` of it is what the
    windowed backward pass is compared with; the co-serving step does not use it.

    Args:
      config: Architecture.
      weights: Its weights.
      tokens: Token ids, all valid.
      lora: Adapter applied to every row, or None.
      lora_scale: Multiplies x A B.

    Returns:
      Logits, float32.
    """
    num_seqs, seq_len = tokens.shape
    positions = jnp.tile(jnp.arange(seq_len), num_seqs)
    x = embed(weights, tokens.reshape(-1))

    def body(x: Array, layer: tuple[dict[str, Array], dict]) -> tuple[Array, None]:
        layer_weights, layer_lora = layer
        linear = lora_linear(layer_weights, layer_lora, lora_scale)
        q, k, v = pre_attention(config, layer_weights, linear, x, positions)
        attn = _dense_attention(config, q, k, v, num_seqs)
        return post_attention(config, layer_weights, linear, x, attn), None

    stacked = {name: dict(pair) for name, pair in (lora or {}).items()}
    x, _ = lax.scan(body, x, (weights.layers, stacked))
    return logits(config, weights, x).reshape(num_seqs, seq_len, -1)


def _dense_attention(
    config: ModelConfig,
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    num_seqs: int,
) -> Float[Array, "T N H"]:
    """Causal attention of `num_seqs` sequences of equal length, scores in float32."""

    def split(x: Array) -> Array:
        return x.reshape(num_seqs, -1, *x.shape[1:]).astype(jnp.float32)

    queries, keys, values = split(q), split(k), split(v)
    repeats = config.num_heads // config.num_kv_heads
    keys, values = (jnp.repeat(x, repeats, axis=2) for x in (keys, values))
    scores = jnp.einsum("bqnh,bknh->bnqk", queries, keys) / math.sqrt(config.head_dim)
    index = jnp.arange(queries.shape[1])
    mask = index[:, None] >= index[None, :]
    if config.sliding_window is not None:
        mask &= index[:, None] - index[None, :] < config.sliding_window
    probs = jax.nn.softmax(jnp.where(mask[None, None], scores, -1e30), axis=-1)
    return jnp.einsum("bnqk,bknh->bqnh", probs, values).reshape(q.shape).astype(q.dtype)
