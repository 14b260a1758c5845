"""The layer's elementwise parts on the CPU: one pass over memory each, on all cores."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._llvm import require_llvm


def rms_norm(x: Float[Array, "*T D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "*T D"]:
    """See `api.rms_norm`."""
    require_llvm("rms_norm", x=x, scale=scale)
    _code()
    normed: Any = _rms_norm(_as_rows(x), scale, eps)
    return normed.reshape(x.shape)


def add_rms_norm(
    x: Float[Array, "*T D"], y: Float[Array, "*T D"], scale: Float[Array, "D"], eps: float
) -> tuple[Float[Array, "*T D"], Float[Array, "*T D"]]:
    """See `api.add_rms_norm`."""
    require_llvm("add_rms_norm", x=x, y=y, scale=scale)
    _code()
    found: Any = _add_rms_norm(_as_rows(x), _as_rows(y), scale, eps)
    total, normed = found
    return total.reshape(x.shape), normed.reshape(x.shape)


def swiglu(gate: Float[Array, "T F"], up: Float[Array, "T F"]) -> Float[Array, "T F"]:
    """See `api.swiglu`."""
    require_llvm("swiglu", gate=gate, up=up)
    _code()
    return _swiglu(gate, up)


def _code() -> Any:
    from pallas_kernels.elementwise import llvm_code

    return llvm_code


def _as_rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x: Array, scale: Array, eps: float) -> Array:
    return _code().norm((x,), scale, eps)[-1]


def _rms_norm_forward(x, scale, eps):
    return _rms_norm(x, scale, eps), (x, scale)


def _rms_norm_backward(eps, residuals, d_normed):
    x, scale = residuals
    return _norm_gradients(x, scale, eps, d_normed, None)


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _add_rms_norm(x: Array, y: Array, scale: Array, eps: float) -> tuple[Array, Array]:
    total, normed = _code().norm((x, y), scale, eps)
    return total, normed


def _add_rms_norm_forward(x, y, scale, eps):
    found: Any = _add_rms_norm(x, y, scale, eps)
    return found, (found[0], scale)


def _add_rms_norm_backward(eps, residuals, d_outputs):
    total, scale = residuals
    d_total, d_normed = d_outputs
    d_sum, d_scale = _norm_gradients(total, scale, eps, d_normed, d_total)
    return d_sum, d_sum, d_scale


_add_rms_norm.defvjp(_add_rms_norm_forward, _add_rms_norm_backward)


def _norm_gradients(x, scale, eps, d_normed, d_x):
    """Gradients at the rows, those that came another way included, and at the scale."""
    d_rows = _code().norm_backward(x, scale, eps, d_normed, d_x)
    normalized = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return d_rows, jnp.sum(d_normed * normalized, axis=0)


@jax.custom_vjp
def _swiglu(gate: Array, up: Array) -> Array:
    return _code().swiglu(gate, up)


def _swiglu_forward(gate, up):
    return _swiglu(gate, up), (gate, up)


def _swiglu_backward(residuals, d_gated):
    gate, up = residuals
    return _code().swiglu_backward(gate, up, d_gated)


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)
