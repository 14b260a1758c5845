"""How many keys and values a step's attention reads. Imports no jax.

Kernels read for each row what it sees. The reference implementation takes rows in tiles and pages
in blocks, and every row of a tile meets every key of the blocks that the tile sees any of; its time
follows that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from flexjax.layout import Bucket
from flexjax.scheduler.plan import StepPlan
from flexjax.scheduler.training import Group

_DECODE_KEYS_PER_BLOCK = 128
_FEW_ROWS = 256
_FEW_ROWS_TILE, _MANY_ROWS_TILE = (64, 64), (128, 256)


class SequenceRows(NamedTuple):
    """Consecutive rows of one sequence.

    Attributes:
      start: Position of the first.
      length: Rows.
    """

    start: int
    length: int

    def span(self, done: int, rows: int, page_size: int) -> tuple[int, int]:
        """The pages that some of the rows see: first and one behind the last of those listed."""
        return 0, -(-(self.start + done + rows) // page_size)


class GroupRows(NamedTuple):
    """Consecutive rows of a group's stream.

    Attributes:
      group: The group.
      start: Row of the first.
      length: Rows.
    """

    group: Group
    start: int
    length: int

    def span(self, done: int, rows: int, page_size: int) -> tuple[int, int]:
        """The pages that some of the rows see: first and one behind the last of those listed."""
        return self.group.page_span(self.start, self.start + done, rows, page_size)


@dataclasses.dataclass(frozen=True)
class TiledReads:
    """Attention in tiles of rows and blocks of pages, as the reference implementation runs it.

    Attributes:
      page_size: Tokens of a page.
    """

    page_size: int

    def tile(self, padded_rows: int) -> tuple[int, int]:
        """Rows of a tile and pages of a block, as `pallas_kernels.paged_attention.reference`."""
        rows, keys = _FEW_ROWS_TILE if padded_rows <= _FEW_ROWS else _MANY_ROWS_TILE
        return -(-padded_rows // -(-padded_rows // rows)), max(1, keys // self.page_size)

    def decode_keys(self, num_tokens: int) -> int:
        """Keys that every decode row meets, when one of them sees so many tokens."""
        size = max(1, _DECODE_KEYS_PER_BLOCK // self.page_size) * self.page_size
        return -(-num_tokens // size) * size

    def pairs(self, padded_rows: int, pieces: Iterable[SequenceRows | GroupRows]) -> int:
        """Rows times keys that they meet.

        Args:
          padded_rows: Rows of the bucket.
          pieces: The rows in use, in order.
        """
        if not padded_rows:
            return 0
        tile, block = self.tile(padded_rows)
        num_blocks = row = listed = first = last = 0
        for piece in pieces:
            done = 0
            while done < piece.length:
                rows = min(tile - row, piece.length - done)
                begin, end = piece.span(done, rows, self.page_size)
                first, last = (listed + begin if row == 0 else first), listed + end
                row, done = row + rows, done + rows
                if row == tile:
                    num_blocks += -(-last // block) - first // block
                    row = 0
            listed = last
        if row:
            num_blocks += -(-last // block) - first // block
        return num_blocks * tile * block * self.page_size


def causal_pairs(start: int, length: int) -> int:
    """Tokens attended by rows at positions [start, start + length) of one sequence, summed."""
    return length * start + length * (length + 1) // 2


def decode_kv(positions: np.ndarray, padded_rows: int, reads: TiledReads | None) -> int:
    """Context tokens that decode rows read, summed over rows.

    Args:
      positions: Of the rows' tokens.
      padded_rows: Rows of the bucket.
      reads: As `BucketLadder.reads`.
    """
    if not len(positions):
        return 0
    if reads is None:
        return int(positions.sum()) + len(positions)
    return padded_rows * reads.decode_keys(int(positions.max()) + 1)


def tiled_pairs(plan: StepPlan, bucket: Bucket, reads: TiledReads) -> tuple[int, int]:
    """Keys that chunk rows, and the tile's rows in its layers, meet, padding included."""
    tile = plan.tile
    pieces: list[SequenceRows | GroupRows] = [SequenceRows(c.start, c.length) for c in plan.prefill]
    pieces += [GroupRows(p.group, p.start, p.length) for p in plan.forward]
    chunk_pairs = reads.pairs(bucket.chunk, pieces)
    if tile is None:
        return chunk_pairs, 0
    pairs = reads.pairs(bucket.window, [GroupRows(tile.group, tile.start, tile.length)])
    return chunk_pairs, tile.num_layers * pairs


def seen_pairs(plan: StepPlan) -> tuple[int, int]:
    """Tokens that chunk rows, and the tile's rows in its layers, see."""
    chunk_pairs = sum(causal_pairs(chunk.start, chunk.length) for chunk in plan.prefill)
    for piece in plan.forward:
        chunk_pairs += piece.group.num_seen(piece.start, piece.length)
    tile = plan.tile
    if tile is None:
        return chunk_pairs, 0
    return chunk_pairs, tile.num_layers * tile.group.num_seen(tile.start, tile.length)
