"""Cross entropy of a linear head without the full matrix of logits."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels._dispatch import dispatch
from pallas_kernels.linear_cross_entropy import llvm, pallas_triton, reference

_IMPLEMENTATIONS = {
    "llvm": llvm.linear_cross_entropy,
    "pallas_triton": pallas_triton.linear_cross_entropy,
    "reference": reference.linear_cross_entropy,
}


def linear_cross_entropy(
    hidden: Float[Array, "W D"],
    lm_head: Float[Array, "_ _"],
    targets: Int[Array, "W"],
    *,
    transposed_head: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, "W D"]]:
    """Summed token loss of `hidden @ lm_head`, and its gradient at `hidden`.

    Args:
      hidden: Rows after the final norm.
      lm_head: Frozen head, [D, V]; gets no gradient.
      targets: Token each row must predict; negative for rows that do not count, whose gradient is
        zero whatever they hold.
      transposed_head: Whether `lm_head` is [V, D], as a tied embedding is: multiplied transposed,
        without a copy.
      implementation: None, "reference", "pallas_triton", or "llvm" (CPU, float32).

    Returns:
      Sum of the losses in nats, float32 scalar, and d sum / d hidden, float32. The log-sum-exp is
      taken in float32; at most a block of rows' or of columns' logits exists at a time.

    Raises:
      ValueError: If the widths of `hidden` and `lm_head` differ.
      NotImplementedError: If the implementation cannot run here, or not with these dtypes.
    """
    width = lm_head.shape[1 if transposed_head else 0]
    if width != hidden.shape[1]:
        layout = "[V, D]" if transposed_head else "[D, V]"
        raise ValueError(f"`lm_head` must be {layout} with D = {hidden.shape[1]}; got D = {width}.")
    return dispatch(
        "linear_cross_entropy",
        _IMPLEMENTATIONS,
        implementation,
        hidden,
        lm_head,
        targets,
        transposed_head=transposed_head,
    )
