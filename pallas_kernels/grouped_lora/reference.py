"""LoRA deltas of rows with different adapters, and their backward pass, in plain jnp."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_lora.groups import RowGroups


def grouped_lora(
    x: Float[Array, "T I"],
    acc: Float[Array, "T O"],
    lora_a: Float[Array, "A L I R"],
    lora_b: Float[Array, "A L R O"],
    scale: Float[Array, "A"],
    layer: Int[Array, ""],
    row_slots: Int[Array, "T"],
    active_slots: Int[Array, "n"],
    num_active: Int[Array, ""],
) -> Float[Array, "T O"]:
    """Adds each row's adapter delta to `acc`; see `api.grouped_lora`."""

    def add_delta(slot, acc):
        a, b = (_of_layer(weights, slot, layer) for weights in (lora_a, lora_b))
        bottleneck = jnp.dot(x, a, preferred_element_type=jnp.float32)
        is_mine = (row_slots == slot)[:, None]
        bottleneck = jnp.where(is_mine, bottleneck * scale[slot], 0.0).astype(x.dtype)
        delta = jnp.dot(bottleneck, b, preferred_element_type=jnp.float32)
        return acc + jnp.where(is_mine, delta, 0.0)

    def body(index, acc):
        slot = active_slots[index]
        occurs = (row_slots == slot).any()  # the rows may be a part of those that `active` is of
        return lax.cond(occurs, add_delta, lambda slot, acc: acc, slot, acc)

    return lax.fori_loop(0, num_active, body, acc)


def grouped_lora_many(
    x: Float[Array, "T I"],
    accs: Sequence[Array],
    lora_a: Sequence[Array],
    lora_b: Sequence[Array],
    *rows: Array,
    groups: RowGroups | None = None,
    ranks: Int[Array, "A"] | None = None,
) -> tuple[Array, ...]:
    """One linear after another; see `api.grouped_lora_many`."""
    del groups, ranks  # spare work for the kernels, and change no result
    linears = zip(accs, lora_a, lora_b, strict=True)
    return tuple(grouped_lora(x, acc, a, b, *rows) for acc, a, b in linears)


def grouped_lora_backward(
    x: Float[Array, "T I"],
    d_y: Float[Array, "T O"],
    d_x: Float[Array, "T I"],
    lora_a: Float[Array, "A L I R"],
    lora_b: Float[Array, "A L R O"],
    scale: Float[Array, "A"],
    layer: Int[Array, ""],
    row_slots: Int[Array, "T"],
    active_slots: Int[Array, "n"],
    num_active: Int[Array, ""],
    *,
    groups: RowGroups | None = None,
    ranks: Int[Array, "A"] | None = None,
) -> tuple[Float[Array, "T I"], Float[Array, "n I R"], Float[Array, "n R O"]]:
    """See `api.grouped_lora_backward`."""
    del groups, ranks
    num_slots = active_slots.shape[0]
    d_y = d_y.astype(x.dtype)

    def contract(left, right, left_axis, right_axis):
        dims = (((left_axis,), (right_axis,)), ((), ()))
        return lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)

    def body(index, carry):
        d_x, d_a, d_b = carry
        slot = active_slots[index]
        a, b = (_of_layer(weights, slot, layer) for weights in (lora_a, lora_b))
        is_mine = (row_slots == slot)[:, None]

        def bottleneck(product):
            return jnp.where(is_mine, product * scale[slot], 0.0).astype(x.dtype)

        h, d_h = bottleneck(contract(x, a, 1, 0)), bottleneck(contract(d_y, b, 1, 1))
        d_x = d_x + jnp.where(is_mine, contract(d_h, a, 1, 1), 0.0)
        zero = jnp.zeros((), x.dtype)
        d_a = d_a.at[index].set(contract(jnp.where(is_mine, x, zero), d_h, 0, 0))
        d_b = d_b.at[index].set(contract(h, jnp.where(is_mine, d_y, zero), 0, 0))
        return d_x, d_a, d_b

    d_a = jnp.zeros((num_slots, *lora_a.shape[2:]), jnp.float32)
    d_b = jnp.zeros((num_slots, *lora_b.shape[2:]), jnp.float32)
    return lax.fori_loop(0, num_active, body, (d_x, d_a, d_b))


def _of_layer(weights: Array, slot: Array, layer: Array) -> Array:
    sizes = (1, 1, *weights.shape[2:])
    return lax.dynamic_slice(weights, (slot, layer, 0, 0), sizes)[0, 0]
