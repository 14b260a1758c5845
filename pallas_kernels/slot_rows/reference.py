"""Rows at slots, by scatter and gather."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.slot_rows.shapes import slot_axes


def store_rows(
    stacks: tuple[Float[Array, "..."], ...],
    rows: tuple[Float[Array, "T ..."], ...],
    layer: Int[Array, ""],
    slots: Int[Array, "T"],
    is_read_soon: bool,
) -> list[Float[Array, "..."]]:
    """See `api.store_rows`."""
    del is_read_soon
    stored = []
    for stack, some in zip(stacks, rows, strict=True):
        stored.append(stack.at[layer, *_index(stack, slots)].set(some, mode="drop"))
    return stored


def take_rows(
    stacks: tuple[Float[Array, "..."], ...], layer: Int[Array, ""], slots: Int[Array, "T"]
) -> tuple[list[Float[Array, "T ..."]], list[Float[Array, "..."]]]:
    """See `api.take_rows`.

    The zeros are made to depend on what was read: without an order between reading and writing,
    XLA copies the whole stack.
    """
    rows = load_rows(stacks, layer, slots)
    zeros = [jnp.where(_mask(some, slots), jnp.zeros((), some.dtype), some) for some in rows]
    return rows, store_rows(stacks, tuple(zeros), layer, slots, True)


def load_rows(
    stacks: tuple[Float[Array, "..."], ...], layer: Int[Array, ""], slots: Int[Array, "T"]
) -> list[Float[Array, "T ..."]]:
    """See `api.load_rows`."""
    found = [stack[layer, *_index(stack, jnp.maximum(slots, 0))] for stack in stacks]
    return [jnp.where(_mask(rows, slots), rows, jnp.zeros((), rows.dtype)) for rows in found]


def _index(stack: Array, slots: Array) -> tuple[Array, ...]:
    """Indices of slots; -1 is out of range, so that it is dropped, not counted from the end."""
    if slot_axes(stack) == 1:
        return (jnp.where(slots >= 0, slots, stack.shape[1]),)
    num_pages, page_size = stack.shape[1:3]
    pages = jnp.where(slots >= 0, slots // page_size, num_pages)
    return pages, jnp.where(slots >= 0, slots % page_size, 0)


def _mask(rows: Array, slots: Array) -> Array:
    return (slots >= 0).reshape(-1, *[1] * (rows.ndim - 1))
