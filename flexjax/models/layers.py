"""The decoder layer as pure functions.

A layer is two halves around attention, `pre_attention(x) -> q, k, v` and `post_attention(x, attn)
-> y`. Both take their linears as a function `linear(name, x)`, so that the same code serves plain
decoding, rows with different adapters, and the backward pass with kept outputs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from flexjax.model_config import ModelConfig
from flexjax.models.weights import DecoderWeights
from pallas_kernels import prefers_llvm, stacked_matmul, stacked_matmul_transposed

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


class StackedLayer(Mapping[str, Array]):
    """One layer's arrays, read in place from the arrays of all layers.

    XLA copies a layer's kernel out of its stack before a product reads it, which triples what a
    step of few rows moves. Here products take the arrays of all layers and the layer's index, see
    `Kernel`; only the small arrays are sliced.
    """

    def __init__(
        self,
        stacks: Mapping[str, Float[Array, "L ..."] | tuple[Array, ...]],
        layer: Int[Array, ""],
        implementation: str | None = None,
    ):
        self._stacks, self._layer, self._implementation = stacks, layer, implementation

    def __getitem__(self, name: str) -> Array:
        array = self._stacks[name]
        if isinstance(array, tuple):
            return lax.switch(self._layer, [lambda one=one: one for one in array])
        return lax.dynamic_index_in_dim(array, self._layer, keepdims=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stacks)

    def __len__(self) -> int:
        return len(self._stacks)

    def kernel(self, name: str) -> Kernel:
        """The kernel of a linear, in its stack."""
        return Kernel(self._stacks[f"{name}.kernel"], self._layer, self._implementation)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kernel:
    """The kernel of one linear.

    Attributes:
      array: [in, out]; or the kernels of all layers: one array with their axis first, which goes to
        a kernel that reads it in place, or a tuple of arrays, of which a branch takes one.
      layer: Layer to read of all, int32; None for a kernel of its own.
      implementation: Of the products with a stack; static.
    """

    array: Any  # an array, but for what jax puts into a tree in its place
    layer: Any = None
    implementation: str | None = dataclasses.field(default=None, metadata={"static": True})

    def multiply(self, x: Float[Array, "T I"]) -> Float[Array, "T O"]:
        """Returns X W, float32."""
        if self.layer is None:
            return _multiply(x, self.array)
        if isinstance(self.array, tuple):
            return self._choose(_multiply, x)
        kernels = (self.array,)
        return stacked_matmul(x, kernels, self.layer, implementation=self.implementation)[0]

    def multiply_transposed(self, dy: Float[Array, "T O"]) -> Float[Array, "T I"]:
        """Returns dY W^T, float32."""
        if self.layer is None:
            return _multiply_transposed(dy, self.array)
        if isinstance(self.array, tuple):
            return self._choose(_multiply_transposed, dy)
        return stacked_matmul_transposed(
            (dy,), (self.array,), self.layer, implementation=self.implementation
        )

    def _choose(self, multiply: Callable[[Array, Array], Array], rows: Array) -> Array:
        def branch(index: int, rows: Array, kernels: tuple[Array, ...]) -> Array:
            return multiply(rows, kernels[index])

        branches = [functools.partial(branch, index) for index in range(len(self.array))]
        return lax.switch(self.layer, branches, rows, self.array)


def _multiply(x: Array, kernel: Array) -> Array:
    return jnp.dot(x, kernel, preferred_element_type=jnp.float32)


def _multiply_transposed(dy: Array, kernel: Array) -> Array:
    dims = (((1,), (1,)), ((), ()))
    return lax.dot_general(dy, kernel, dims, preferred_element_type=jnp.float32)


def kernel_of(weights: LayerWeights, name: str) -> Kernel:
    """The kernel of a linear of one layer."""
    if isinstance(weights, StackedLayer):
        return weights.kernel(name)
    return Kernel(weights[f"{name}.kernel"])


def product(weights: LayerWeights, name: str, x: Float[Array, "T I"]) -> Float[Array, "T O"]:
    """X W (+ bias), float32: what a linear yields before adapters and the cast to x's dtype."""
    y = kernel_of(weights, name).multiply(x)
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
    q, k, v = (linear(name, h) for name in ("q_proj", "k_proj", "v_proj"))
    return split_heads(config, weights, q, k, v, positions)


def split_heads(
    config: ModelConfig,
    weights: LayerWeights,
    q: Float[Array, "T _"],
    k: Float[Array, "T _"],
    v: Float[Array, "T _"],
    positions: Int[Array, "T"],
) -> tuple[Float[Array, "T N H"], Float[Array, "T K H"], Float[Array, "T K H"]]:
    """From the outputs of the q, k and v linears to heads: head norms, rotary embedding."""
    q = q.reshape(-1, config.num_heads, config.head_dim)
    k = k.reshape(-1, config.num_kv_heads, config.head_dim)
    v = v.reshape(-1, config.num_kv_heads, config.head_dim)
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
    config: ModelConfig,
    weights: DecoderWeights,
    hidden: Float[Array, "T D"],
    implementation: str | None = "reference",
) -> Float[Array, "T V"]:
    """Final norm and head of rows as they leave the last layer, float32.

    Args:
      config: Architecture.
      weights: Final norm and head are read.
      hidden: Rows.
      implementation: Of the product; only the default can be differentiated.
    """
    x = rms_norm(hidden, weights.final_norm, config.rms_norm_eps)
    if prefers_llvm(implementation, x.dtype):
        first = jnp.zeros((), jnp.int32)
        options: dict[str, Any] = {"implementation": "llvm"}
        if weights.lm_head is None:
            return stacked_matmul_transposed((x,), (weights.embed[None],), first, **options)
        return stacked_matmul(x, (weights.lm_head[None],), first, **options)[0]
    return jnp.dot(x, head_kernel(weights), preferred_element_type=jnp.float32)
