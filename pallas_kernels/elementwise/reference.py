"""The layer's elementwise parts in plain jnp, which a GPU's compiler fuses well."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*T D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "*T D"]:
    """See `api.rms_norm`."""
    wide = x.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    normalized = (wide * inverse).astype(x.dtype)
    return normalized * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


def add_rms_norm(
    x: Float[Array, "*T D"], y: Float[Array, "*T D"], scale: Float[Array, "D"], eps: float
) -> tuple[Float[Array, "*T D"], Float[Array, "*T D"]]:
    """See `api.add_rms_norm`."""
    total = x + y
    return total, rms_norm(total, scale, eps)


def swiglu(gate: Float[Array, "T F"], up: Float[Array, "T F"]) -> Float[Array, "T F"]:
    """See `api.swiglu`."""
    return jax.nn.silu(gate) * up
