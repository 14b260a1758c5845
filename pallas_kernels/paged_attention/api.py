"""Attention of query rows over a paged pool of keys and values.

The pool is shared by every sequence and every layer; ops take the whole pool and a layer index, so
that no layer of it is ever copied out.
"""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels._dispatch import dispatch
from pallas_kernels.paged_attention import llvm, pallas_triton, reference
from pallas_kernels.paged_attention.types import PageList as PageList


def check_pool(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], v_shape: tuple[int, ...]
) -> None:
    """Checks what shapes alone cannot say.

    Raises:
      ValueError: If the pools differ, the page size is not a power of two, or the number of
        query heads is not a multiple of the number of KV heads.
    """
    if k_shape != v_shape:
        raise ValueError(f"`v_pool` must have the shape of `k_pool`, {k_shape}; got {v_shape}.")
    page_size, num_kv_heads, head_dim = k_shape[2:]
    if page_size & (page_size - 1):
        raise ValueError(f"`page_size` must be a power of two; got {page_size}.")
    if q_shape[1] % num_kv_heads:
        raise ValueError(f"`q` heads must be a multiple of {num_kv_heads}; got {q_shape[1]}.")
    if q_shape[2] != head_dim:
        raise ValueError(f"`q` head dim must be {head_dim}; got {q_shape[2]}.")


def decode_attention(
    q: Float[Array, "B N H"],
    k_pool: Float[Array, "L P Z K H"],
    v_pool: Float[Array, "L P Z K H"],
    layer: Int[Array, ""],
    page_table: Int[Array, "B M"],
    positions: Int[Array, "B"],
    *,
    sm_scale: float,
    sliding_window: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B N H"]:
    """Attention of one query row per sequence over its pages.

    Args:
      q: Queries, one row a sequence.
      k_pool: Keys of all pages and layers.
      v_pool: Values, same shape.
      layer: Layer of the pool to read.
      page_table: Pages of each sequence in order, -1 padding.
      positions: Position of each query; it sees the keys at 0..position. -1 marks a padding row,
        whose output is zero.
      sm_scale: Multiplies the scores.
      sliding_window: Keys that a query sees, itself included; None for all.
      implementation: "llvm", "pallas_triton", "reference", or None for the first that can run.

    Returns:
      Attention outputs in the dtype of `q`; accumulated in float32.

    Raises:
      ValueError: If shapes do not fit; see `check_pool`.
      NotImplementedError: If the implementation named cannot run this here.
    """
    check_pool(q.shape, k_pool.shape, v_pool.shape)
    return dispatch(
        "decode_attention",
        {
            "llvm": llvm.decode_attention,
            "pallas_triton": pallas_triton.decode_attention,
            "reference": reference.decode_attention,
        },
        implementation,
        q,
        k_pool,
        v_pool,
        layer,
        page_table,
        positions,
        sm_scale=sm_scale,
        sliding_window=sliding_window,
    )


def ragged_attention(
    q: Float[Array, "T N H"],
    k_pool: Float[Array, "L P Z K H"],
    v_pool: Float[Array, "L P Z K H"],
    layer: Int[Array, ""],
    page_list: PageList,
    row_segments: Int[Array, "T"],
    row_positions: Int[Array, "T"],
    *,
    sm_scale: float,
    sliding_window: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """Attention of rows that belong to several sequences (prefill chunks, finetuning windows).

    Args:
      q: Query rows, in any order.
      k_pool: Keys of all pages and layers.
      v_pool: Values, same shape.
      layer: Layer of the pool to read.
      page_list: Pages of all sequences that have a row here.
      row_segments: Segment of each row; -1 marks padding, whose output is zero.
      row_positions: Position of each row in its sequence; -1 for padding.
      sm_scale: Multiplies the scores.
      sliding_window: Keys that a query sees, itself included; None for all.
      implementation: "llvm", "pallas_triton", "reference", or None for the first that can run.

    Returns:
      Attention outputs in the dtype of `q`, and the log-sum-exp of each row's scores, float32.

    Raises:
      ValueError: If shapes do not fit; see `check_pool`.
      NotImplementedError: If the implementation named cannot run this here.
    """
    check_pool(q.shape, k_pool.shape, v_pool.shape)
    return dispatch(
        "ragged_attention",
        {
            "llvm": llvm.ragged_attention,
            "pallas_triton": pallas_triton.ragged_attention,
            "reference": reference.ragged_attention,
        },
        implementation,
        q,
        k_pool,
        v_pool,
        layer,
        page_list,
        row_segments,
        row_positions,
        sm_scale=sm_scale,
        sliding_window=sliding_window,
    )
