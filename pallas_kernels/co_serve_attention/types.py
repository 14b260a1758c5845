"""The three parts of a co-serving launch, and what it returns."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention.types import PageList


class DecodeRows(NamedTuple):
    """One row a sequence; see `decode_attention`.

    Attributes:
      q: Queries.
      page_table: Pages of each sequence in order, -1 padding.
      positions: Position of each query, -1 padding.
    """

    q: Float[Array, "B N H"]
    page_table: Int[Array, "B M"]
    positions: Int[Array, "B"]


class ChunkRows(NamedTuple):
    """Rows of prompt chunks and of finetuning windows going forward; see `ragged_attention`.

    Attributes:
      q: Queries.
      page_list: Pages of all sequences that have a row here.
      segments: Segment of each row, -1 padding.
      positions: Position of each row, -1 padding.
    """

    q: Float[Array, "T N H"]
    page_list: PageList
    segments: Int[Array, "T"]
    positions: Int[Array, "T"]


class WindowRows(NamedTuple):
    """Rows of a finetuning window going backward; see `window_attention_backward`.

    Attributes:
      q: Queries.
      out: Their attention outputs.
      lse: Log-sum-exp of their scores, float32.
      d_out: Gradient at `out`.
      layer: Layer of the pool to read, which need not be the forward rows'.
      page_list: Pages of the sequences that have a row here.
      segments: Segment of each row, -1 padding.
      positions: Position of each row, -1 padding.
      dk_acc: Float32 gradient accumulators of keys, added to.
      dv_acc: The same for values.
      acc_layer: Layer of the accumulators to add to.
      acc_pages: Accumulator page of each entry of `page_list`, -1 to add nowhere; no page twice.
    """

    q: Float[Array, "W N H"]
    out: Float[Array, "W N H"]
    lse: Float[Array, "W N"]
    d_out: Float[Array, "W N H"]
    layer: Int[Array, ""]
    page_list: PageList
    segments: Int[Array, "W"]
    positions: Int[Array, "W"]
    dk_acc: Float[Array, "l p Z K H"]
    dv_acc: Float[Array, "l p Z K H"]
    acc_layer: Int[Array, ""]
    acc_pages: Int[Array, "m"]


class CoServed(NamedTuple):
    """Results of the parts; None where a part is absent.

    Attributes:
      decode_out: Attention outputs of the decode rows.
      chunk_out: Attention outputs of the chunk rows.
      chunk_lse: Log-sum-exp of their scores, float32.
      dq: Gradient at the window's queries, float32.
      dk_acc: Accumulators of keys, added to.
      dv_acc: Accumulators of values, added to.
    """

    decode_out: Float[Array, "B N H"] | None
    chunk_out: Float[Array, "T N H"] | None
    chunk_lse: Float[Array, "T N"] | None
    dq: Float[Array, "W N H"] | None
    dk_acc: Float[Array, "l p Z K H"] | None
    dv_acc: Float[Array, "l p Z K H"] | None
