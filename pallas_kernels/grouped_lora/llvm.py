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
    *rows: Array,
    groups: RowGroups | None = None,
    ranks: Int[Array, "A"] | None = None,
) -> tuple[Array, ...]:
    """See `api.grouped_lora_many`; `rows` are its arguments from `scale` on."""
    del groups, ranks  # neighbouring rows of one slot go together, whichever slots are active
    _require("grouped_lora", x, lora_a, lora_b)
    from pallas_kernels.grouped_lora import llvm_code

    scale, layer, row_slots, *_ = rows
    return llvm_code.forward(x, accs, lora_a, lora_b, scale, layer, row_slots)


def grouped_lora_backward(
    x: Float[Array, "T I"],
    d_y: Float[Array, "T O"],
    d_x: Float[Array, "T I"],
    lora_a: Float[Array, "A L I R"],
    lora_b: Float[Array, "A L R O"],
    *rows: Array,
    groups: RowGroups | None = None,
    ranks: Int[Array, "A"] | None = None,
) -> tuple[Float[Array, "T I"], Float[Array, "n I R"], Float[Array, "n R O"]]:
    """See `api.grouped_lora_backward`; `rows` are its arguments from `scale` on."""
    del groups, ranks
    _require("grouped_lora_backward", x, (lora_a,), (lora_b,))
    from pallas_kernels.grouped_lora import llvm_code

    scale, layer, *slots = rows  # of each row, those that are active, and how many
    d_y = d_y.astype(x.dtype)
    weights = (lora_a, lora_b, scale, layer, slots[0])
    d_x, h, d_h = llvm_code.through_bottleneck(x, d_y, d_x, *weights)
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
