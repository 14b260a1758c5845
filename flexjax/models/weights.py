"""Every weight of a decoder, declared once: shape, logical axes, initial value.

Initialization, loading, memory planning and placement all follow from `weight_specs`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flexjax import axes
from flexjax.model_config import ModelConfig


class DecoderWeights(NamedTuple):
    """Arrays of one decoder; a pytree that jitted functions take.

    Attributes:
      embed: Token embedding.
      final_norm: Scale of the last RMS norm.
      lm_head: Output head, or None when it is the embedding.
      layers: Arrays of all layers by name ("q_proj.kernel", "q_proj.bias", "input_norm", ...),
        stacked on a leading layer axis; kernels are [L, in, out], or, after `split_kernels`, tuples
        of L arrays [in, out].
    """

    embed: Float[Array, "V D"]
    final_norm: Float[Array, "D"]
    lm_head: Float[Array, "D V"] | None
    layers: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """One array: its shape, what its dimensions mean, and how it starts.

    Attributes:
      shape: Shape, layer axis first where there is one.
      axes: Logical axis of each dimension.
      init: "normal" (standard deviation 0.02), "ones" or "zeros".
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: str = "normal"


_PROJECTION_AXES = {
    "q_proj": (axes.EMBED, axes.Q_HEADS),
    "k_proj": (axes.EMBED, axes.KV_HEADS),
    "v_proj": (axes.EMBED, axes.KV_HEADS),
    "o_proj": (axes.Q_HEADS, axes.EMBED),
    "gate_proj": (axes.EMBED, axes.MLP),
    "up_proj": (axes.EMBED, axes.MLP),
    "down_proj": (axes.MLP, axes.EMBED),
}


def projection_axes(name: str) -> tuple[str, str]:
    """Logical axes of a linear's (in, out) features."""
    return _PROJECTION_AXES[name]


def weight_specs(config: ModelConfig) -> DecoderWeights:
    """Returns a `DecoderWeights` whose leaves are `WeightSpec`s."""
    layers: dict[str, WeightSpec] = {}
    num_layers, dim = config.num_layers, config.hidden_size
    for name, (num_in, num_out) in config.projection_dims().items():
        in_axis, out_axis = _PROJECTION_AXES[name]
        layers[f"{name}.kernel"] = WeightSpec(
            (num_layers, num_in, num_out), (axes.LAYERS, in_axis, out_axis)
        )
        if config.has_bias(name):
            layers[f"{name}.bias"] = WeightSpec(
                (num_layers, num_out), (axes.LAYERS, out_axis), "zeros"
            )
    for name in ("input_norm", "post_attention_norm"):
        layers[name] = WeightSpec((num_layers, dim), (axes.LAYERS, axes.EMBED), "ones")
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            shape = (num_layers, config.head_dim)
            layers[name] = WeightSpec(shape, (axes.LAYERS, axes.HEAD_DIM), "ones")
    head = None
    if not config.tie_embeddings:
        head = WeightSpec((dim, config.vocab_size), (axes.EMBED, axes.VOCAB))
    return DecoderWeights(
        embed=WeightSpec((config.vocab_size, dim), (axes.VOCAB, axes.EMBED)),  # type: ignore[arg-type]
        final_norm=WeightSpec((dim,), (axes.EMBED,), "ones"),  # type: ignore[arg-type]
        lm_head=head,  # type: ignore[arg-type]
        layers=layers,  # type: ignore[arg-type]
    )


def split_kernels(weights: DecoderWeights) -> DecoderWeights:
    """Gives the kernels of each layer arrays of their own, for a backend that cannot read a stack.

    XLA's CPU backend materializes a slice of a stack before a product reads it, which is about half
    of the time of a decode step, and a sixth of a finetuning step's. A step that unrolls its layers
    names the kernels of each; one that loops over them takes a branch for each product; see
    `models.layers.Kernel`.

    Args:
      weights: Stacked weights. Drop them afterwards, or there are two copies.

    Returns:
      The same with a tuple of [in, out] arrays, one a layer, for each kernel. Norms and biases stay
      stacked.
    """

    def split(name: str, stack: Array) -> Array | tuple[Array, ...]:
        return tuple(jnp.array(one) for one in stack) if name.endswith(".kernel") else stack

    layers = {name: split(name, stack) for name, stack in weights.layers.items()}
    return weights._replace(layers=layers)  # type: ignore[arg-type]


def has_split_kernels(weights: DecoderWeights) -> bool:
    """Whether `split_kernels` made these weights."""
    return any(isinstance(array, tuple) for array in weights.layers.values())


def abstract_weights(config: ModelConfig, dtype: str) -> DecoderWeights:
    """Returns `ShapeDtypeStruct`s of the weights, for compilation without arrays."""
    return jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(dtype)), weight_specs(config)
    )


def random_weights(config: ModelConfig, dtype: str, seed: int) -> DecoderWeights:
    """Returns random weights; the same seed gives the same values on every device.

    Args:
      config: Architecture.
      dtype: Dtype of every array.
      seed: Seed of the draws.
    """
    specs, treedef = jax.tree.flatten(weight_specs(config))
    generator = np.random.default_rng(seed)
    keys = [jax.random.key(int(generator.integers(2**31))) for _ in specs]

    def draw(spec: WeightSpec, key: jax.Array) -> jax.Array:
        if spec.init == "ones":
            return jnp.ones(spec.shape, dtype)
        if spec.init == "zeros":
            return jnp.zeros(spec.shape, dtype)
        return (jax.random.normal(key, spec.shape, dtype) * 0.02).astype(dtype)

    return jax.tree.unflatten(treedef, [draw(*pair) for pair in zip(specs, keys, strict=True)])


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of all weights."""
    specs = jax.tree.leaves(weight_specs(config))
    return sum(math.prod(spec.shape) for spec in specs) * jnp.dtype(dtype).itemsize
