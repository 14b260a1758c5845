"""Linears with adapters: for rows of many adapters, and for one adapter with gradients."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from flexjax.lora.bank import AdapterBank, LoraTree
from flexjax.models.layers import Kernel, LayerWeights, Linear, kernel_of, product
from pallas_kernels import RowGroups, grouped_lora, grouped_lora_backward, prefers_llvm


class AdapterRows(NamedTuple):
    """Which adapter each forward row uses.

    Attributes:
      slots: Slot of each row, -1 for the base model and for padding.
      active: The slots that occur, each once, -1 padding.
      num_active: How many occur.
      groups: What kernels read of `slots`, worked out once for all linears; None for when needed.
    """

    slots: Int[Array, "T"]
    active: Int[Array, "A"]
    num_active: Int[Array, ""]
    groups: RowGroups | None = None


def bank_linear(
    weights: LayerWeights,
    bank: AdapterBank,
    layer: Int[Array, ""],
    rows: AdapterRows,
    implementation: str | None = None,
    *,
    num_decode: int = 0,
) -> Linear:
    """Linears of one layer for rows with different adapters.

    Args:
      weights: The layer's frozen arrays.
      bank: Adapters.
      layer: Index of the layer.
      rows: Which adapter each row uses.
      implementation: Of the adapters' products.
      num_decode: Rows at the front that decode. They are few and of many adapters; without row
        groups, where an adapter costs a product of all rows, they get products of their own.
    """
    options = {"groups": rows.groups, "implementation": implementation}

    def add_deltas(name: str, x: Array, acc: Array, slots: Array) -> Array:
        a, b = bank.a[name], bank.b[name]
        return grouped_lora(
            x, acc, a, b, bank.scale, layer, slots, rows.active, rows.num_active, **options
        )

    def linear(name: str, x: Array) -> Array:
        acc, at = product(weights, name, x), num_decode
        if rows.groups is not None or not 0 < at < x.shape[0]:
            return add_deltas(name, x, acc, rows.slots).astype(x.dtype)
        parts = (slice(0, at), slice(at, None))
        ys = [add_deltas(name, x[part], acc[part], rows.slots[part]) for part in parts]
        return jnp.concatenate(ys).astype(x.dtype)

    return linear


def tile_linear(
    weights: LayerWeights,
    lora: LoraTree,
    scale: Float[Array, ""],
    kept: Mapping[str, Array],
    implementation: str | None = None,
) -> Linear:
    """Linears of one layer for the rows of a backward tile, all of one adapter.

    Differentiable in x and the adapter, never in the frozen weights. Where the forward pass kept a
    linear's output, it is taken from there and the product is not repeated.

    Args:
      weights: The layer's frozen arrays.
      lora: The layer's adapter, float32: a [in, R], b [R, out].
      scale: Multiplies x A B.
      kept: Kept outputs by linear, [W, out].
      implementation: Of the backward products of the adapter.
    """

    def linear(name: str, x: Array) -> Array:
        kernel, bias = kernel_of(weights, name), weights.get(f"{name}.bias")
        a, b = lora.a[name], lora.b[name]
        return _adapted(implementation, x, a, b, kernel, bias, scale, kept.get(name))

    return linear


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _adapted(
    implementation: str | None,
    x: Array,
    a: Array,
    b: Array,
    kernel: Kernel,
    bias: Array | None,
    scale: Array,
    kept: Array | None,
) -> Array:
    """Returns x W + bias + scale x A B in the dtype of x, or `kept`, which is that value."""
    del implementation  # of the backward pass
    if kept is not None:
        return kept
    y = kernel.multiply(x)
    if bias is not None:
        y = y + bias.astype(jnp.float32)[None, :]
    bottleneck = jnp.dot(x, a.astype(x.dtype), preferred_element_type=jnp.float32) * scale
    delta = jnp.dot(
        bottleneck.astype(x.dtype), b.astype(x.dtype), preferred_element_type=jnp.float32
    )
    return (y + delta).astype(x.dtype)


def _adapted_forward(implementation, x, a, b, kernel, bias, scale, kept):
    y = _adapted(implementation, x, a, b, kernel, bias, scale, kept)
    return y, (x, a, b, kernel, scale)


def _contract(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    dims = (((x_axis,), (y_axis,)), ((), ()))
    return lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


def linear_gradients(
    x: Float[Array, "W I"],
    dy: Float[Array, "W O"],
    a: Float[Array, "I R"],
    b: Float[Array, "R O"],
    scale: Float[Array, ""],
) -> tuple[Float[Array, "W I"], Float[Array, "I R"], Float[Array, "R O"]]:
    """Gradients of scale x A B at x, A and B, float32, for rows of one adapter."""
    d_bottleneck = (_contract(dy, b.astype(dy.dtype), 1, 1) * scale).astype(x.dtype)
    dx = _contract(d_bottleneck, a.astype(x.dtype), 1, 1)
    bottleneck = (_contract(x, a.astype(x.dtype), 1, 0) * scale).astype(x.dtype)
    return dx, _contract(x, d_bottleneck, 0, 0), _contract(bottleneck, dy, 0, 0)


def _gradients_in_place(x, dy, dx, a, b, scale):
    """`linear_gradients` by the kernels of many adapters, added to `dx`."""
    first = jnp.zeros((), jnp.int32)
    slots, active = jnp.zeros(x.shape[:1], jnp.int32), jnp.zeros((1,), jnp.int32)
    rows = (scale[None], first, slots, active, first + 1)
    weights = a[None, None], b[None, None]
    dx, da, db = grouped_lora_backward(x, dy, dx, *weights, *rows, implementation="llvm")
    return dx, da[0], db[0]


def _adapted_backward(implementation, residuals, dy):
    x, a, b, kernel, scale = residuals
    if prefers_llvm(implementation, x.dtype):
        dx = kernel.multiply_transposed(dy)
        dx, da, db = _gradients_in_place(x, dy, dx, a, b, scale)
    else:
        dx, da, db = linear_gradients(x, dy, a, b, scale)
        dx = dx + kernel.multiply_transposed(dy)
    return dx.astype(x.dtype), da, db, None, None, None, None


_adapted.defvjp(_adapted_forward, _adapted_backward)
