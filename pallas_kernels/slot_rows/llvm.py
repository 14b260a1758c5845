"""Rows at slots on the CPU: all stacks in one call, on all cores."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels._llvm import require_llvm


def store_rows(
    stacks: tuple[Float[Array, "..."], ...],
    rows: tuple[Float[Array, "T ..."], ...],
    layer: Int[Array, ""],
    slots: Int[Array, "T"],
    is_read_soon: bool,
) -> list[Float[Array, "..."]]:
    """See `api.store_rows`."""
    _require("store_rows", stacks)
    from pallas_kernels.slot_rows import llvm_code

    return llvm_code.store_rows(stacks, rows, layer, slots, is_read_soon)


def load_rows(
    stacks: tuple[Float[Array, "..."], ...], layer: Int[Array, ""], slots: Int[Array, "T"]
) -> list[Float[Array, "T ..."]]:
    """See `api.load_rows`."""
    _require("load_rows", stacks)
    from pallas_kernels.slot_rows import llvm_code

    return llvm_code.load_rows(stacks, layer, slots)


def take_rows(
    stacks: tuple[Float[Array, "..."], ...], layer: Int[Array, ""], slots: Int[Array, "T"]
) -> tuple[list[Float[Array, "T ..."]], list[Float[Array, "..."]]]:
    """See `api.take_rows`."""
    _require("take_rows", stacks)
    from pallas_kernels.slot_rows import llvm_code

    return llvm_code.take_rows(stacks, layer, slots)


def _require(op: str, stacks: tuple[Array, ...]) -> None:
    require_llvm(op, **{f"stacks[{n}]": stack for n, stack in enumerate(stacks)})
