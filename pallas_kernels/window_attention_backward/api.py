"""Backward of attention for one window of a sequence, over paged keys and values."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels._dispatch import dispatch
from pallas_kernels.paged_attention.api import check_pool
from pallas_kernels.paged_attention.types import PageList
from pallas_kernels.window_attention_backward import llvm, pallas_triton, reference


def window_attention_backward(
    q: Float[Array, "W N H"],
    out: Float[Array, "W N H"],
    lse: Float[Array, "W N"],
    d_out: Float[Array, "W N H"],
    k_pool: Float[Array, "L P Z K H"],
    v_pool: Float[Array, "L P Z K H"],
    layer: Int[Array, ""],
    page_list: PageList,
    row_segments: Int[Array, "W"],
    row_positions: Int[Array, "W"],
    dk_acc: Float[Array, "l p Z K H"],
    dv_acc: Float[Array, "l p Z K H"],
    acc_layer: Int[Array, ""],
    acc_pages: Int[Array, "M"],
    *,
    sm_scale: float,
    sliding_window: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "W N H"], Float[Array, "l p Z K H"], Float[Array, "l p Z K H"]]:
    """Gradients of a window's queries, and of every key and value that they saw.

    With P = exp(scores - lse) and delta = sum(out * d_out):
    dV += P^T d_out, dS = P (d_out V^T - delta), dQ = dS K, dK += dS^T Q.

    Args:
      q: The window's queries as they entered attention.
      out: Their attention outputs.
      lse: Log-sum-exp of their scores, float32.
      d_out: Gradient at `out`.
      k_pool: Keys of all pages and layers.
      v_pool: Values, same shape.
      layer: Layer of the pool to read.
      page_list: Pages of the sequences that have a row in the window, up to its last row.
      row_segments: Segment of each row, -1 padding.
      row_positions: Position of each row, -1 padding; padding rows add zero.
      dk_acc: Float32 gradient accumulators of keys, paged like the pool but with pages of their
        own; added to in place when donated.
      dv_acc: The same for values.
      acc_layer: Layer of the accumulators to add to.
      acc_pages: Accumulator page of each entry of `page_list`, -1 to add nowhere; no page twice.
      sm_scale: Multiplies the scores.
      sliding_window: As in the forward pass.
      implementation: "llvm", "pallas_triton", "reference", or None for the first that can run.

    Returns:
      dQ in float32, and both accumulators. The result does not depend on the order of rows.

    Raises:
      ValueError: If shapes do not fit; see `paged_attention.api.check_pool`.
      NotImplementedError: If the implementation named cannot run this here.
    """
    check_pool(q.shape, k_pool.shape, v_pool.shape)
    return dispatch(
        "window_attention_backward",
        {
            "llvm": llvm.window_attention_backward,
            "pallas_triton": pallas_triton.window_attention_backward,
            "reference": reference.window_attention_backward,
        },
        implementation,
        q,
        out,
        lse,
        d_out,
        k_pool,
        v_pool,
        layer,
        page_list,
        row_segments,
        row_positions,
        dk_acc,
        dv_acc,
        acc_layer,
        acc_pages,
        sm_scale=sm_scale,
        sliding_window=sliding_window,
    )
