"""Rows of one layer, stored at slots of a stack of all layers and read from there.

A stack is [layers, slots, features], or paged as keys and values are: [layers, pages, page size,
heads, head dim], where slot s is the place s % page size of page s // page size.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Array, Float, Int

from pallas_kernels._dispatch import dispatch
from pallas_kernels.slot_rows import llvm, reference
from pallas_kernels.slot_rows.shapes import feature_shape


def store_rows(
    stacks: Sequence[Float[Array, "..."]],
    rows: Sequence[Float[Array, "T ..."]],
    layer: Int[Array, ""],
    slots: Int[Array, "T"],
    *,
    is_read_soon: bool = True,
    implementation: str | None = None,
) -> list[Float[Array, "..."]]:
    """Stores rows in stacks, in place where nobody needs the old ones.

    Args:
      stacks: Arrays of all layers; they may have different numbers of layers and features.
      rows: For each stack what is stored in it, [T, features] or [T, heads, head dim], in its
        dtype.
      layer: Layer to write, int32.
      slots: Slot of each row, int32, each at most once; -1 is dropped.
      is_read_soon: Whether what is written should stay in the caches of a CPU.
      implementation: None, "reference", or "llvm" (on a CPU, float32).

    Returns:
      The stacks.

    Raises:
      ValueError: If stacks and rows do not fit each other, or `implementation` names none of these.
      NotImplementedError: If the implementation cannot run here, or not with these dtypes.
    """
    _check(stacks, slots, rows)
    functions = {"llvm": llvm.store_rows, "reference": reference.store_rows}
    args = (tuple(stacks), tuple(rows), layer, slots, is_read_soon)
    return dispatch("store_rows", functions, implementation, *args)


def load_rows(
    stacks: Sequence[Float[Array, "..."]],
    layer: Int[Array, ""],
    slots: Int[Array, "T"],
    *,
    implementation: str | None = None,
) -> list[Float[Array, "T ..."]]:
    """Reads rows from stacks.

    Args:
      stacks: Arrays of all layers, as in `store_rows`.
      layer: Layer to read, int32.
      slots: Slot of each row, int32; a row of slot -1 is zero.
      implementation: As in `store_rows`.

    Returns:
      Rows of each stack, in its dtype.

    Raises:
      ValueError: If `implementation` names none of these.
      NotImplementedError: If the implementation cannot run here, or not with these dtypes.
    """
    functions = {"llvm": llvm.load_rows, "reference": reference.load_rows}
    return dispatch("load_rows", functions, implementation, tuple(stacks), layer, slots)


def take_rows(
    stacks: Sequence[Float[Array, "..."]],
    layer: Int[Array, ""],
    slots: Int[Array, "T"],
    *,
    implementation: str | None = None,
) -> tuple[list[Float[Array, "T ..."]], list[Float[Array, "..."]]]:
    """Reads rows as `load_rows` does and leaves zeros in their place.

    Args:
      stacks: Arrays of all layers, as in `store_rows`.
      layer: Layer of the rows, int32.
      slots: Slot of each row, int32, each at most once; a row of slot -1 is zero.
      implementation: As in `store_rows`.

    Returns:
      Rows of each stack, and the stacks.

    Raises:
      ValueError: If `implementation` names none of these.
      NotImplementedError: If the implementation cannot run here, or not with these dtypes.
    """
    functions = {"llvm": llvm.take_rows, "reference": reference.take_rows}
    return dispatch("take_rows", functions, implementation, tuple(stacks), layer, slots)


def _check(stacks, slots, rows) -> None:
    if len(stacks) != len(rows):
        raise ValueError(f"`rows` must have {len(stacks)} entries; got {len(rows)}.")
    for n, (stack, some) in enumerate(zip(stacks, rows, strict=True)):
        wanted = (slots.shape[0], *feature_shape(stack))
        if some.shape != wanted or some.dtype != stack.dtype:
            raise ValueError(
                f"`rows[{n}]` must be {stack.dtype}{list(wanted)}; "
                f"got {some.dtype}{list(some.shape)}."
            )
