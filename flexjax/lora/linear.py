"""Linears with adapters: for rows of many adapters, and for one adapter with gradients."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from flexjax.lora.bank import AdapterBank, LoraTree
from flexjax.models.layers import (
    Kernels,
    LayerWeights,
    Linear,
    add_bias,
    kernels_of,
    products,
)
from pallas_kernels import RowGroups, grouped_lora_backward, grouped_lora_many, prefers_llvm


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

    def add_deltas(names: Sequence[str], x: Array, accs: Sequence[Array], part: slice) -> Any:
        a, b = ([side[name] for name in names] for side in (bank.a, bank.b))
        given = (bank.scale, layer, rows.slots[part], rows.active, rows.num_active)
        options: dict[str, Any] = {"groups": rows.groups, "implementation": implementation}
        accs = [acc[part] for acc in accs]
        return grouped_lora_many(x[part], accs, a, b, *given, **options)

    def linear(names: Sequence[str], x: Array) -> list[Array]:
        accs = products(weights, names, x)
        if rows.groups is not None or not 0 < num_decode < x.shape[0]:
            ys = add_deltas(names, x, accs, slice(None))
        else:
            parts = (slice(0, num_decode), slice(num_decode, None))
            pairs = zip(*(add_deltas(names, x, accs, part) for part in parts), strict=True)
            ys = [jnp.concatenate(pair) for pair in pairs]
        return [y.astype(x.dtype) for y in ys]

    return linear


def tile_linear(
    weights: LayerWeights,
    lora: LoraTree,
    scale: Float[Array, ""],
    kept: Mapping[str, Array],
    implementation: str | None = None,
    is_input_needed: Bool[Array, ""] | None = None,
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
      is_input_needed: Whether anybody reads the gradient at x; None for always. What the frozen
        weights add to it is left out where not.
    """

    def linear(names: Sequence[str], x: Array) -> tuple[Array, ...]:
        pairs = tuple((lora.a[name], lora.b[name]) for name in names)
        biases = tuple(weights.get(f"{name}.bias") for name in names)
        found = tuple(kept.get(name) for name in names)
        kernels = kernels_of(weights, names)
        return _adapted(implementation, x, pairs, kernels, biases, scale, found, is_input_needed)

    return linear


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _adapted(
    implementation: str | None,
    x: Array,
    pairs: tuple[tuple[Array, Array], ...],
    kernels: Kernels,
    biases: tuple[Array | None, ...],
    scale: Array,
    kept: tuple[Array | None, ...],
    is_input_needed: Array | None,
) -> tuple[Array, ...]:
    """Returns x W + bias + scale x A B in the dtype of x, or what is kept, which is that value."""
    del implementation, is_input_needed  # of the backward pass
    ys: list[Any] = list(kept)
    missing = [n for n, y in enumerate(kept) if y is None]
    accs = kernels.take(missing).multiply(x) if missing else ()
    for n, acc in zip(missing, accs, strict=True):
        a, b = (matrix.astype(x.dtype) for matrix in pairs[n])
        bottleneck = jnp.dot(x, a, preferred_element_type=jnp.float32) * scale
        delta = jnp.dot(bottleneck.astype(x.dtype), b, preferred_element_type=jnp.float32)
        ys[n] = (add_bias(acc, biases[n]) + delta).astype(x.dtype)
    return tuple(ys)


def _adapted_forward(implementation, x, pairs, kernels, biases, scale, kept, is_input_needed):
    ys = _adapted(implementation, x, pairs, kernels, biases, scale, kept, is_input_needed)
    return ys, (x, pairs, kernels, scale, is_input_needed)


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


def _adapted_backward(implementation, residuals, d_ys):
    x, pairs, kernels, scale, is_input_needed = residuals
    dx = kernels.multiply_transposed(d_ys, is_input_needed)
    d_pairs = []
    for dy, (a, b) in zip(d_ys, pairs, strict=True):
        if prefers_llvm(implementation, x.dtype):
            dx, da, db = _gradients_in_place(x, dy, dx, a, b, scale)
        else:
            d_delta, da, db = linear_gradients(x, dy, a, b, scale)
            dx = dx + d_delta
        d_pairs.append((da, db))
    return dx.astype(x.dtype), tuple(d_pairs), None, None, None, None, None


_adapted.defvjp(_adapted_forward, _adapted_backward)
