"""Cross entropy of a linear head without the full matrix of logits."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels._dispatch import dispatch
from pallas_kernels.linear_cross_entropy import reference


def linear_cross_entropy(
    hidden: Float[Array, "W D"],
    lm_head: Float[Array, "D V"],
    targets: Int[Array, "W"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, "W D"]]:
    """Summed token loss of `hidden @ lm_head`, and its gradient at `hidden`.

    Args:
      hidden: Rows after the final norm.
      lm_head: Frozen head; gets no gradient.
      targets: Token each row must predict; negative for rows that do not count.
      implementation: None or "reference".

    Returns:
      Sum of the losses in nats, float32 scalar, and d sum / d hidden, float32. The log-sum-exp is
      taken in float32; at most a block of rows' logits exists at a time.
    """
    return dispatch(
        "linear_cross_entropy",
        {"reference": reference.linear_cross_entropy},
        implementation,
        hidden,
        lm_head,
        targets,
    )
