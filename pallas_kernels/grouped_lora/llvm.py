"""LoRA deltas of rows with different adapters on the CPU, and their backward pass."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Array, Float, Int

from pallas_kernels._llvm import require_llvm
from pallas_kernels.grouped_lora.groups import RowGroups

MAX_RANK = 256
"""A task holds the bottlenecks of its rows on its stack."""


def grouped_lora_many(
    x: Float[Array, "T I"],
    accs: Sequence[Array],
    lora_a: Sequence[Array],
    lora_b: Sequence[Array],
    scale: Float[Array, "A"],
    layer: Int[Array, ""],
    row_slots: Int[Array, "T"],
    active_slots: Int[Array, "n"],
    num_active: Int[Array, ""],
    *,
    groups: RowGroups | None = None,
    ranks: Int[Array, "A"] | None = None,
) -> tuple[Array, ...]:
    """See `api.grouped_lora_many`."""
    del active_slots, num_active, groups, ranks  # neighbouring rows of one slot go together
    _require("grouped_lora", x, lora_a, lora_b)
    from pallas_kernels.grouped_lora import llvm_code

    return llvm_code.forward(x, accs, lora_a, lora_b, scale, layer, row_slots)


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
    _require("grouped_lora_backward", x, (lora_a,), (lora_b,))
    from pallas_kernels.grouped_lora import llvm_code

    d_y = d_y.astype(x.dtype)
    d_x, h, d_h = llvm_code.through_bottleneck(x, d_y, d_x, lora_a, lora_b, scale, layer, row_slots)
    slots = (row_slots, active_slots, num_active)
    d_a = llvm_code.outer(x, d_h, *slots)
    d_b = llvm_code.outer(d_y, h, *slots)
    return d_x, d_a, d_b.swapaxes(1, 2)


def _require(op: str, x: Array, lora_a: Sequence[Array], lora_b: Sequence[Array]) -> None:
    names = {f"lora_a[{n}]": a for n, a in enumerate(lora_a)}
    names |= {f"lora_b[{n}]": b for n, b in enumerate(lora_b)}
    require_llvm(op, x=x, **names)
    rank = lora_a[0].shape[3]
    if rank > MAX_RANK:
        raise NotImplementedError(f"{op} by LLVM takes ranks up to {MAX_RANK}; got {rank}.")
