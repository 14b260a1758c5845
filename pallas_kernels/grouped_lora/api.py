"""LoRA deltas for rows that belong to different adapters (S-LoRA, arXiv 2311.03285; Punica)."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels._dispatch import dispatch
from pallas_kernels.grouped_lora import reference


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
    *,
    implementation: str | None = None,
) -> Float[Array, "T O"]:
    """Returns acc + scale[s] * (x A_s) B_s, with s the slot of each row.

    Args:
      x: Input rows of the linear.
      acc: The linear's own product, float32.
      lora_a: All adapters' A, zero-padded to the maximum rank.
      lora_b: All adapters' B.
      scale: alpha / r (or alpha / sqrt(r)) of each slot, float32.
      layer: Layer to read.
      row_slots: Slot of each row; -1 for rows without an adapter, which get `acc` bit for bit.
      active_slots: Slots that occur in `row_slots`, each once, -1 padding.
      num_active: How many; the cost follows this number.
      implementation: None or "reference".

    Returns:
      The sum, float32. A row never reads another row's adapter, not even multiplied by zero.

    Raises:
      ValueError: If the ranks of `lora_a` and `lora_b` differ.
    """
    if lora_a.shape[3] != lora_b.shape[2]:
        raise ValueError(f"`lora_b` must have rank {lora_a.shape[3]}; got {lora_b.shape[2]}.")
    return dispatch(
        "grouped_lora",
        {"reference": reference.grouped_lora},
        implementation,
        x,
        acc,
        lora_a,
        lora_b,
        scale,
        layer,
        row_slots,
        active_slots,
        num_active,
    )
