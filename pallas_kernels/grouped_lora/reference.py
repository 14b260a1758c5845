"""LoRA deltas of rows with different adapters, in plain jnp."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def grouped_lora(
    x: Float[Array, "T I"],
    acc: Float[Array, "T O"],
    lora_a: Float[Array, "A L I R"],
    lora_b: Float[Array, "A L R O"],
    scale: Float[Array, "A"],
    layer: Int[Array, ""],
    row_slots: Int[Array, "T"],
    active_slots: Int[Array, "A"],
    num_active: Int[Array, ""],
) -> Float[Array, "T O"]:
    """Adds each row's adapter delta to `acc`; see `api.grouped_lora`."""
    in_features, rank = lora_a.shape[2:]
    out_features = lora_b.shape[3]

    def body(index, acc):
        slot = active_slots[index]
        start = (slot, layer, 0, 0)
        a = lax.dynamic_slice(lora_a, start, (1, 1, in_features, rank))[0, 0]
        b = lax.dynamic_slice(lora_b, start, (1, 1, rank, out_features))[0, 0]
        bottleneck = jnp.dot(x, a, preferred_element_type=jnp.float32)
        is_mine = (row_slots == slot)[:, None]
        bottleneck = jnp.where(is_mine, bottleneck * scale[slot], 0.0).astype(x.dtype)
        delta = jnp.dot(bottleneck, b, preferred_element_type=jnp.float32)
        return acc + jnp.where(is_mine, delta, 0.0)

    return lax.fori_loop(0, num_active, body, acc)
