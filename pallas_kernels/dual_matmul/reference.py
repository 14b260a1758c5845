"""Products with stacked weights, in plain jnp."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def dual_matmul(
    x: Float[Array, "T I"] | None,
    kernels: tuple[Float[Array, "L I _"], ...],
    layer: Int[Array, ""] | None,
    d_ys: tuple[Float[Array, "M _"], ...],
    d_kernels: tuple[Float[Array, "_ Q _"], ...],
    d_layer: Int[Array, ""] | None,
    *,
    accs: tuple[Float[Array, "T _"] | None, ...],
    d_acc: Float[Array, "M Q"] | None,
    out_dtype: Any,
) -> tuple[tuple[Float[Array, "T _"], ...], Float[Array, "M Q"] | None]:
    """The products, one after the other; see `api.dual_matmul`."""
    ys = []
    for kernel, acc in zip(kernels, accs, strict=True):
        assert x is not None
        y = jnp.dot(x, _read(kernel, layer), preferred_element_type=jnp.float32)
        ys.append((y if acc is None else acc + y).astype(out_dtype))
    dx = d_acc
    for d_y, kernel in zip(d_ys, d_kernels, strict=True):
        dims = (((1,), (1,)), ((), ()))
        term = lax.dot_general(
            d_y, _read(kernel, d_layer), dims, preferred_element_type=jnp.float32
        )
        dx = term if dx is None else dx + term
    return tuple(ys), None if dx is None else dx.astype(out_dtype)


def _read(stack, layer):
    return lax.dynamic_index_in_dim(stack, layer, keepdims=False)
