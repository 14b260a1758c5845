"""Attention of a whole co-serving step: forward rows and a backward tile in one launch."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._dispatch import dispatch
from pallas_kernels.co_serve_attention import pallas_triton, reference
from pallas_kernels.co_serve_attention.types import ChunkRows as ChunkRows
from pallas_kernels.co_serve_attention.types import CoServed as CoServed
from pallas_kernels.co_serve_attention.types import DecodeRows as DecodeRows
from pallas_kernels.co_serve_attention.types import WindowRows as WindowRows
from pallas_kernels.paged_attention.api import check_pool


def co_serve_attention(
    k_pool: Float[Array, "L P Z K H"],
    v_pool: Float[Array, "L P Z K H"],
    layer: Int[Array, ""],
    decode: DecodeRows | None,
    chunk: ChunkRows | None,
    window: WindowRows | None,
    *,
    sm_scale: float,
    sliding_window: int | None = None,
    implementation: str | None = None,
) -> CoServed:
    """`decode_attention`, `ragged_attention` and `window_attention_backward` at once.

    Decode reads much and computes little, the backward pass the other way round: in one launch the
    multiprocessors do both at the same time (FlexLLM, arXiv 2402.18789, fuses them to this end).

    Args:
      k_pool: Keys of all pages and layers.
      v_pool: Values, same shape.
      layer: Layer of the pool that the forward rows read.
      decode: Decode rows; None, or no rows, if there are none.
      chunk: Rows of prompt chunks and of finetuning's forward pass; None likewise.
      window: Rows of the backward tile; None likewise. Its accumulators are added to in place when
        donated.
      sm_scale: Multiplies the scores.
      sliding_window: Keys that a query sees, itself included; None for all.
      implementation: "pallas_triton", "reference", or None for the first that can run.

    Returns:
      What the three ops return; None for a part that is None.

    Raises:
      ValueError: If there is no part, or shapes do not fit; see `paged_attention.api.check_pool`.
      NotImplementedError: If the implementation named cannot run this here.
    """
    given = [part for part in (decode, chunk, window) if part is not None]
    if not given:
        raise ValueError("One of `decode`, `chunk` and `window` must not be None; got None thrice.")
    for part in given:
        check_pool(part.q.shape, k_pool.shape, v_pool.shape)
    present = [part if part and part.q.shape[0] else None for part in (decode, chunk, window)]
    served = CoServed(None, None, None, None, None, None)
    if any(part is not None for part in present):
        served = dispatch(
            "co_serve_attention",
            {
                "pallas_triton": pallas_triton.co_serve_attention,
                "reference": reference.co_serve_attention,
            },
            implementation,
            k_pool,
            v_pool,
            layer,
            *present,
            sm_scale=sm_scale,
            sliding_window=sliding_window,
        )
    return _with_empty_parts(served, decode, chunk, window)


def _with_empty_parts(
    served: CoServed,
    decode: DecodeRows | None,
    chunk: ChunkRows | None,
    window: WindowRows | None,
) -> CoServed:
    """Adds the results of parts that are there and have no rows."""
    if decode is not None and served.decode_out is None:
        served = served._replace(decode_out=decode.q)
    if chunk is not None and served.chunk_out is None:
        lse = jnp.zeros(chunk.q.shape[:2], jnp.float32)
        served = served._replace(chunk_out=chunk.q, chunk_lse=lse)
    if window is not None and served.dq is None:
        dq = window.q.astype(jnp.float32)
        served = served._replace(dq=dq, dk_acc=window.dk_acc, dv_acc=window.dv_acc)
    return served
