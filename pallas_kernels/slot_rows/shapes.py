"""A stack is [layers, slots, features] or [layers, pages, size, heads, head dim]."""

from __future__ import annotations

from jaxtyping import Array


def feature_shape(stack: Array) -> tuple[int, ...]:
    """Shape of what lies at one slot of one layer."""
    return stack.shape[slot_axes(stack) + 1 :]


def slot_axes(stack: Array) -> int:
    """Number of axes that a slot is counted through."""
    return 2 if stack.ndim == 5 else 1
