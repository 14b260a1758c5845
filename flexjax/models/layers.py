"""The decoder layer as pure functions.

A layer is two halves around attention, `pre_attention(x) -> q, k, v` and `post_attention(x, attn)
-> y`. Both take their linears as a function `linear(names, x)`, so that the same code serves plain
decoding, rows with different adapters, and the backward pass with kept outputs. Linears that read
the same rows (q, k and v; gate and up) are asked for together.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from flexjax.model_config import ModelConfig
from flexjax.models.weights import DecoderWeights
from pallas_kernels import (
    add_rms_norm,
    cpu_implementation,
    prefers_llvm,
    rms_norm,
    stacked_matmul,
    stacked_matmul_transposed,
    swiglu,
)

Linear = Callable[[Sequence[str], Array], Sequence[Array]]
"""`linear(names, x[T, in])`: the output [T, out] of each linear, in the dtype of x."""

LayerWeights = Mapping[str, Array]
"""One layer's arrays by name, without the layer axis."""


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
    `Kernels`; only the small arrays are sliced.
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

    def kernels(self, names: Sequence[str]) -> Kernels:
        """The kernels of some linears, in their stacks."""
        arrays = tuple(self._stacks[f"{name}.kernel"] for name in names)
        return Kernels(arrays, self._layer, self._implementation)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernels of linears that read the same rows.

    Attributes:
      arrays: Of each linear [in, out]; or the kernels of all layers: one array with their axis
        first, which goes to a kernel that reads it in place, or a tuple of arrays, of which a
        branch takes one.
      layer: Layer to read of all, int32; None for kernels of their own.
      implementation: Of the products with stacks; static.
    """

    arrays: tuple[Any, ...]  # arrays, but for what jax puts into a tree in their place
    layer: Any = None
    implementation: str | None = dataclasses.field(default=None, metadata={"static": True})

    def take(self, indices: Sequence[int]) -> Kernels:
        """Those of some of the linears."""
        return dataclasses.replace(self, arrays=tuple(self.arrays[n] for n in indices))

    def multiply(self, x: Float[Array, "T I"]) -> tuple[Float[Array, "T _"], ...]:
        """Returns X W of each, float32."""
        if not self._is_stacked():
            return tuple(self._choose(_multiply, x, array) for array in self.arrays)
        return stacked_matmul(x, self.arrays, self.layer, implementation=self.implementation)

    def multiply_transposed(
        self, d_ys: Sequence[Float[Array, "T _"]], is_needed: Bool[Array, ""] | None = None
    ) -> Float[Array, "T I"]:
        """Returns the sum of dY W^T over all, float32; zeros where it is not needed."""
        if is_needed is not None:
            zeros = jnp.zeros((d_ys[0].shape[0], self.arrays[0].shape[-2]), jnp.float32)
            return lax.cond(is_needed, lambda: self.multiply_transposed(d_ys), lambda: zeros)
        if not self._is_stacked():
            pairs = zip(d_ys, self.arrays, strict=True)
            terms = (self._choose(_multiply_transposed, d_y, array) for d_y, array in pairs)
            return functools.reduce(jnp.add, terms)
        return stacked_matmul_transposed(
            d_ys, self.arrays, self.layer, implementation=self.implementation
        )

    def _is_stacked(self) -> bool:
        return self.layer is not None and not isinstance(self.arrays[0], tuple)

    def _choose(self, multiply: Callable[[Array, Array], Array], rows: Array, array: Any) -> Array:
        if self.layer is None:
            return multiply(rows, array)

        def branch(index: int, rows: Array, kernels: tuple[Array, ...]) -> Array:
            return multiply(rows, kernels[index])

        branches = [functools.partial(branch, index) for index in range(len(array))]
        return lax.switch(self.layer, branches, rows, array)


def _multiply(x: Array, kernel: Array) -> Array:
    return jnp.dot(x, kernel, preferred_element_type=jnp.float32)


def _multiply_transposed(dy: Array, kernel: Array) -> Array:
    dims = (((1,), (1,)), ((), ()))
    return lax.dot_general(dy, kernel, dims, preferred_element_type=jnp.float32)


def kernels_of(weights: LayerWeights, names: Sequence[str]) -> Kernels:
    """The kernels of some linears of one layer, which read the same rows."""
    if isinstance(weights, StackedLayer):
        return weights.kernels(names)
    return Kernels(tuple(weights[f"{name}.kernel"] for name in names))


def add_bias(y: Float[Array, "T O"], bias: Float[Array, "O"] | None) -> Float[Array, "T O"]:
    """Adds a linear's bias, if it has one, to its float32 product."""
    return y if bias is None else y + bias.astype(jnp.float32)[None, :]


def products(
    weights: LayerWeights, names: Sequence[str], x: Float[Array, "T I"]
) -> list[Float[Array, "T _"]]:
    """X W (+ bias), float32: what linears yield before adapters and the cast to x's dtype."""
    ys = kernels_of(weights, names).multiply(x)
    return [add_bias(y, weights.get(f"{name}.bias")) for name, y in zip(names, ys, strict=True)]


def base_linear(weights: LayerWeights) -> Linear:
    """The frozen linears of one layer, without adapters."""
    return lambda names, x: [y.astype(x.dtype) for y in products(weights, names, x)]


def recording(linear: Linear, outputs: dict[str, Array]) -> Linear:
    """The same linears, which leave each of their outputs in a dict by name."""

    def record(names: Sequence[str], x: Array) -> Sequence[Array]:
        ys = linear(names, x)
        outputs.update(zip(names, ys, strict=True))
        return ys

    return record


def pre_attention(
    config: ModelConfig,
    weights: LayerWeights,
    linear: Linear,
    x: Float[Array, "T D"],
    positions: Int[Array, "T"],
    implementation: str | None = "reference",
) -> tuple[Float[Array, "T N H"], Float[Array, "T K H"], Float[Array, "T K H"]]:
    """First half of a layer: norm, q/k/v, head norms, rotary embedding."""
    options: dict[str, Any] = {"implementation": cpu_implementation(implementation)}
    h = rms_norm(x, weights["input_norm"], config.rms_norm_eps, **options)
    q, k, v = linear(("q_proj", "k_proj", "v_proj"), h)
    return split_heads(config, weights, q, k, v, positions, implementation)


def split_heads(
    config: ModelConfig,
    weights: LayerWeights,
    q: Float[Array, "T _"],
    k: Float[Array, "T _"],
    v: Float[Array, "T _"],
    positions: Int[Array, "T"],
    implementation: str | None = "reference",
) -> tuple[Float[Array, "T N H"], Float[Array, "T K H"], Float[Array, "T K H"]]:
    """From the outputs of the q, k and v linears to heads: head norms, rotary embedding."""
    q = q.reshape(-1, config.num_heads, config.head_dim)
    k = k.reshape(-1, config.num_kv_heads, config.head_dim)
    v = v.reshape(-1, config.num_kv_heads, config.head_dim)
    if config.qk_norm:
        options: dict[str, Any] = {"implementation": cpu_implementation(implementation)}
        q = rms_norm(q, weights["q_norm"], config.rms_norm_eps, **options)
        k = rms_norm(k, weights["k_norm"], config.rms_norm_eps, **options)
    return rotary(q, positions, config), rotary(k, positions, config), v


def post_attention(
    config: ModelConfig,
    weights: LayerWeights,
    linear: Linear,
    x: Float[Array, "T D"],
    attn: Float[Array, "T N H"],
    implementation: str | None = "reference",
) -> Float[Array, "T D"]:
    """Second half of a layer: output projection, residual, norm, gated MLP, residual."""
    options: dict[str, Any] = {"implementation": cpu_implementation(implementation)}
    (out,) = linear(("o_proj",), attn.reshape(x.shape[0], -1))
    norm = weights["post_attention_norm"]
    x, h = add_rms_norm(x, out, norm, config.rms_norm_eps, **options)
    gate, up = linear(("gate_proj", "up_proj"), h)
    (down,) = linear(("down_proj",), swiglu(gate, up, **options))
    return x + down


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
      implementation: Of norm and product; only the default can be differentiated.
    """
    is_cpu = prefers_llvm(implementation, hidden.dtype)
    options: dict[str, Any] = {"implementation": "llvm" if is_cpu else "reference"}
    x = rms_norm(hidden, weights.final_norm, config.rms_norm_eps, **options)
    if is_cpu:
        first = jnp.zeros((), jnp.int32)
        if weights.lm_head is None:
            return stacked_matmul_transposed((x,), (weights.embed[None],), first, **options)
        return stacked_matmul(x, (weights.lm_head[None],), first, **options)[0]
    return jnp.dot(x, head_kernel(weights), preferred_element_type=jnp.float32)
