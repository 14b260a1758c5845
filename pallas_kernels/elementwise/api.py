"""What a layer does between its products: norms and the gate, differentiable.

On a GPU the compiler makes one kernel of each with what stands beside it. On a CPU it makes
several passes, most of them on one core; the kernels here are one pass on all of them.
"""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels._dispatch import dispatch
from pallas_kernels.elementwise import llvm, reference


def rms_norm(
    x: Float[Array, "*T D"],
    scale: Float[Array, "D"],
    eps: float,
    *,
    implementation: str | None = None,
) -> Float[Array, "*T D"]:
    """Root-mean-square norm, computed in float32 and scaled in the dtype of x.

    Args:
      x: Rows.
      scale: What each normalized feature is multiplied by.
      eps: Added to the mean of squares.
      implementation: None, "reference", or "llvm" (on a CPU, float32).

    Returns:
      x / sqrt(mean(x^2) + eps) * scale, in the dtype of x.

    Raises:
      ValueError: If `implementation` names none of these.
      NotImplementedError: If the implementation cannot run here, or not with these arrays.
    """
    functions = {"llvm": llvm.rms_norm, "reference": reference.rms_norm}
    return dispatch("rms_norm", functions, implementation, x, scale, eps)


def add_rms_norm(
    x: Float[Array, "*T D"],
    y: Float[Array, "*T D"],
    scale: Float[Array, "D"],
    eps: float,
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "*T D"], Float[Array, "*T D"]]:
    """A residual branch's sum and its norm: (x + y, rms_norm(x + y)).

    Arguments and errors are those of `rms_norm`; y is what is added to x.
    """
    functions = {"llvm": llvm.add_rms_norm, "reference": reference.add_rms_norm}
    return dispatch("add_rms_norm", functions, implementation, x, y, scale, eps)


def swiglu(
    gate: Float[Array, "T F"], up: Float[Array, "T F"], *, implementation: str | None = None
) -> Float[Array, "T F"]:
    """The gate of an MLP, silu(gate) * up (Shazeer, arXiv 2002.05202).

    Args:
      gate: Outputs of the gate's linear.
      up: Outputs of the other linear.
      implementation: None, "reference", or "llvm" (on a CPU, float32).

    Returns:
      gate / (1 + exp(-gate)) * up, in their dtype.

    Raises:
      ValueError: If `implementation` names none of these.
      NotImplementedError: If the implementation cannot run here, or not with these arrays.
    """
    functions = {"llvm": llvm.swiglu, "reference": reference.swiglu}
    return dispatch("swiglu", functions, implementation, gate, up)
