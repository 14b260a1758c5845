"""Co-serving attention as three ops, one after the other."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.co_serve_attention.types import ChunkRows, CoServed, DecodeRows, WindowRows
from pallas_kernels.paged_attention import reference as forward
from pallas_kernels.window_attention_backward import reference as backward


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
) -> CoServed:
    """Attention of forward rows and attention backward of a window; see `api`."""
    options = {"sm_scale": sm_scale, "sliding_window": sliding_window}
    decode_out = chunk_out = chunk_lse = dq = dk_acc = dv_acc = None
    if decode is not None:
        decode_out = forward.decode_attention(
            decode.q, k_pool, v_pool, layer, decode.page_table, decode.positions, **options
        )
    if chunk is not None:
        rows = (chunk.page_list, chunk.segments, chunk.positions)
        chunk_out, chunk_lse = forward.ragged_attention(
            chunk.q, k_pool, v_pool, layer, *rows, **options
        )
    if window is not None:
        dq, dk_acc, dv_acc = backward.window_attention_backward(
            *window[:4], k_pool, v_pool, *window[4:], **options
        )
    return CoServed(decode_out, chunk_out, chunk_lse, dq, dk_acc, dv_acc)
