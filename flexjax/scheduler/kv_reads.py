"""How many keys and values a step's attention reads. Imports no jax.

Kernels read for each row what it sees. The reference implementation lets every row of a kind meet
every key that any of them needs; its time follows that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from flexjax.layout import Bucket
from flexjax.scheduler.plan import StepPlan

_KEYS_PER_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class DenseReads:
    """Attention in which all rows of a kind meet every key that any of them needs.

    So does the reference implementation: its time follows rows times keys listed, not tokens seen.

    Attributes:
      page_size: Tokens of a page.
      block_pages: Pages that are read at once.
    """

    page_size: int
    block_pages: int

    @classmethod
    def of(cls, page_size: int) -> DenseReads:
        """What `pallas_kernels.paged_attention.reference` does, which is not imported for it."""
        return cls(page_size, max(1, _KEYS_PER_BLOCK // page_size))

    def pages(self, num_tokens: int) -> int:
        """Pages that hold so many tokens of a sequence."""
        return -(-num_tokens // self.page_size)

    def keys(self, num_pages: int) -> int:
        """Keys that every row meets, when so many pages are listed."""
        return -(-num_pages // self.block_pages) * self.block_pages * self.page_size


def causal_pairs(start: int, length: int) -> int:
    """Tokens attended by rows at positions [start, start + length) of one sequence, summed."""
    return length * start + length * (length + 1) // 2


def decode_kv(contexts: Sequence[int], padded_rows: int, reads: DenseReads | None) -> int:
    """Context tokens that decode rows read, summed over rows.

    Args:
      contexts: Tokens that each row sees.
      padded_rows: Rows of the bucket.
      reads: As `BucketLadder.reads`.
    """
    if reads is None or not contexts:
        return sum(contexts)
    return padded_rows * reads.keys(reads.pages(max(contexts)))


def dense_pairs(plan: StepPlan, bucket: Bucket, reads: DenseReads) -> tuple[int, int]:
    """Keys that chunk rows, and the tile's rows in its layers, meet, padding included."""
    size, tile = reads.page_size, plan.tile
    pages = sum(reads.pages(chunk.start + chunk.length) for chunk in plan.prefill)
    pages += sum(p.group.pages_read(p.start, p.length, size) for p in plan.forward)
    chunk_pairs = bucket.chunk * reads.keys(pages)
    if tile is None:
        return chunk_pairs, 0
    pages = tile.group.pages_read(tile.start, tile.length, size)
    return chunk_pairs, tile.num_layers * bucket.window * reads.keys(pages)


def seen_pairs(plan: StepPlan) -> tuple[int, int]:
    """Tokens that chunk rows, and the tile's rows in its layers, see."""
    chunk_pairs = sum(causal_pairs(chunk.start, chunk.length) for chunk in plan.prefill)
    for piece in plan.forward:
        chunk_pairs += _stream_pairs(piece.group.positions, piece.start, piece.length)
    tile = plan.tile
    if tile is None:
        return chunk_pairs, 0
    pairs = _stream_pairs(tile.group.positions, tile.start, tile.length)
    return chunk_pairs, tile.num_layers * pairs


def _stream_pairs(positions: np.ndarray, start: int, length: int) -> int:
    return length + int(positions[start : start + length].sum(dtype=np.int64))
