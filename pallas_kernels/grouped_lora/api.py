"""LoRA deltas for rows that belong to different adapters (S-LoRA, arXiv 2311.03285; Punica).

The backward pass is an op of its own: adapters of many jobs may be trained in the batch that serves
others (Loquetier, arXiv 2511.00101).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels._dispatch import dispatch
from pallas_kernels.grouped_lora import llvm, pallas_triton, reference, triton
from pallas_kernels.grouped_lora.groups import RowGroups

_BACKENDS = {
    "triton": triton,
    "pallas_triton": pallas_triton,
    "llvm": llvm,
    "reference": reference,
}


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
    *,
    groups: RowGroups | None = None,
    ranks: Int[Array, "A"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "T O"]:
    """Returns acc + scale[s] * (x A_s) B_s, with s the slot of each row.

    Args:
      x: Input rows of the linear.
      acc: The linear's own product, float32; kernels add to it in place.
      lora_a: All adapters' A, zero-padded to the maximum rank.
      lora_b: All adapters' B.
      scale: alpha / r (or alpha / sqrt(r)) of each slot, float32.
      layer: Layer to read.
      row_slots: Slot of each row; -1 for rows without an adapter, which get `acc` bit for bit.
        Rows may stand in any order.
      active_slots: Slots that occur in `row_slots`, each once, -1 padding. Others among them cost
        little.
      num_active: How many; the cost follows this number.
      groups: `group_rows(row_slots, A)`, which calls with the same rows may share.
      ranks: Rank of each slot; kernels read no weights beyond it, which must be zero.
      implementation: None, "reference", "pallas_triton", "triton" or "llvm" (on a CPU, float32).

    Returns:
      The sum, float32. A row never reads another row's adapter, not even multiplied by zero.
      The bottleneck x A_s is rounded to the dtype of x.

    Raises:
      ValueError: If shapes or dtypes do not fit together.
      NotImplementedError: If a named implementation cannot run this.
    """
    (y,) = grouped_lora_many(
        x,
        (acc,),
        (lora_a,),
        (lora_b,),
        scale,
        layer,
        row_slots,
        active_slots,
        num_active,
        groups=groups,
        ranks=ranks,
        implementation=implementation,
    )
    return y


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
    implementation: str | None = None,
) -> tuple[Array, ...]:
    """`grouped_lora` of linears that share their input: q, k, v, or gate and up.

    The kernels read x once, in two launches for all the linears.

    Args:
      x: Input rows of the linears.
      accs: Each linear's own product [T, O], float32; kernels add to them in place.
      lora_a: Each linear's A, [A, L, I, R].
      lora_b: Each linear's B, [A, L, R, O].
      scale: As in `grouped_lora`, like all that follows.
      layer: Layer to read.
      row_slots: Slot of each row, or -1.
      active_slots: Slots that occur.
      num_active: How many.
      groups: `group_rows(row_slots, A)`.
      ranks: Rank of each slot.
      implementation: None, "reference", "pallas_triton", "triton" or "llvm" (on a CPU, float32).

    Returns:
      The sum of each linear, float32.

    Raises:
      ValueError: If shapes or dtypes do not fit together.
      NotImplementedError: If a named implementation cannot run this.
    """
    if not len(accs) == len(lora_a) == len(lora_b) > 0:
        raise ValueError(
            "`accs`, `lora_a` and `lora_b` must have one array for each linear; got "
            f"{len(accs)}, {len(lora_a)} and {len(lora_b)}."
        )
    for acc, a, b in zip(accs, lora_a, lora_b, strict=True):
        _check("acc", acc, (x.shape[0], b.shape[3]))
        _check_weights(x, a, b, scale, lora_a[0])
    return _run(
        "grouped_lora_many",
        implementation,
        x,
        tuple(accs),
        tuple(lora_a),
        tuple(lora_b),
        scale,
        layer,
        row_slots,
        active_slots,
        num_active,
        groups=groups,
        ranks=ranks,
    )


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
    implementation: str | None = None,
) -> tuple[Float[Array, "T I"], Float[Array, "n I R"], Float[Array, "n R O"]]:
    """Backward pass of `grouped_lora`, for rows of many adapters.

        d_x[t] + scale[s] * d_y[t] B_s^T A_s^T    for each row t, with s its slot
        sum_t scale[s] * x[t]^T (d_y[t] B_s^T)    over the rows t of each active slot s
        sum_t scale[s] * (x[t] A_s)^T d_y[t]

    Sums are taken in an order fixed by the shapes and `row_slots`: the same call gives the same
    bits.

    Args:
      x: Input rows of the linear.
      d_y: Gradient at the linear's output, float32 or the dtype of x, to which it is rounded.
      d_x: The linear's own gradient at x, float32; kernels add to it in place.
      lora_a: All adapters' A.
      lora_b: All adapters' B.
      scale: Factor of each slot, float32.
      layer: Layer to read.
      row_slots: Slot of each row; -1 for rows without an adapter, which get `d_x` bit for bit.
      active_slots: Slots that occur in `row_slots`, each once, -1 padding. There is one gradient
        for each entry, so give as few as occur.
      num_active: How many.
      groups: `group_rows(row_slots, A)`.
      ranks: Rank of each slot.
      implementation: None, "reference", "pallas_triton", "triton" or "llvm" (on a CPU, float32).

    Returns:
      The sum at x, and the gradients of each active slot's A and B in this layer, zero for padding;
      all float32.

    Raises:
      ValueError: If shapes or dtypes do not fit together.
      NotImplementedError: If a named implementation cannot run this.
    """
    _check("d_x", d_x, x.shape)
    _check_weights(x, lora_a, lora_b, scale, lora_a)
    return _run(
        "grouped_lora_backward",
        implementation,
        x,
        d_y,
        d_x,
        lora_a,
        lora_b,
        scale,
        layer,
        row_slots,
        active_slots,
        num_active,
        groups=groups,
        ranks=ranks,
    )


def _run(op: str, implementation: str | None, *args: Any, **kwargs: Any) -> Any:
    functions = {name: getattr(module, op) for name, module in _BACKENDS.items()}
    return dispatch(op, functions, implementation, *args, **kwargs)


def _check(name: str, acc: Array, shape: tuple[int, ...]) -> None:
    if acc.shape != shape or acc.dtype.name != "float32":
        raise ValueError(
            f"`{name}` must be float32 of shape {shape}; got {acc.dtype.name} of {acc.shape}."
        )


def _check_weights(x: Array, a: Array, b: Array, scale: Array, first: Array) -> None:
    if a.shape[3] != b.shape[2]:
        raise ValueError(f"`lora_b` must have rank {a.shape[3]}; got {b.shape[2]}.")
    if a.shape[:2] != b.shape[:2] or a.shape[0] != scale.shape[0]:
        raise ValueError(
            "`lora_a`, `lora_b` and `scale` must have the same slots and layers; got "
            f"{a.shape[:2]}, {b.shape[:2]} and {scale.shape}."
        )
    if a.shape[2] != x.shape[1]:
        raise ValueError(f"`lora_a` must take {x.shape[1]} features; got {a.shape[2]}.")
    if a.shape != first.shape:
        raise ValueError(f"`lora_a` must have one shape; got {first.shape} and {a.shape}.")
