"""What a step holds before finetuning, and how many prefill rows it may hold. Imports no jax."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple, Protocol, runtime_checkable

from flexjax.scheduler.buckets import BucketLadder
from flexjax.scheduler.features import StepFeatures
from flexjax.scheduler.kv_reads import GroupRows, SequenceRows
from flexjax.scheduler.policy import Turn
from flexjax.scheduler.training import Group


@runtime_checkable
class StepPredictor(Protocol):
    """What the scheduler asks of a latency model."""

    def predict(self, features: StepFeatures) -> float:
        """Expected milliseconds of a step."""
        ...

    def predict_high(self, features: StepFeatures) -> float:
        """Milliseconds that a step will rarely exceed."""
        ...

    def tail_factor(self) -> float:
        """Factor above `predict_high` within which all but one mixed step in a hundred stay."""
        ...


@dataclasses.dataclass(slots=True)
class Load:
    """What a step holds before finetuning is added, and what finetuning could add.

    Attributes:
      decode_rows: Decode rows.
      prefill_rows: Prefill rows.
      decode_kv_tokens: Tokens that the decode rows read, summed over rows.
      prefill_kv_pairs: Tokens that the prefill rows read, summed over rows.
      prefill: The same rows, by sequence.
      sample_rows: Sequences that get a token.
      forward_rows: Finetuning rows that could go forward.
      forward_kv_tokens: Tokens that one of them reads, on average.
      forward_groups: Groups that they are of, in order.
      tile_rows: Rows of the next backward tile if nothing limits it; 0 without one.
      tile_kv_tokens: Tokens that one of them reads, on average.
      tile_group: The group that they are of.
      tile_end: End of the tile among the group's rows.
      tile_layers: Layers of the tile.
      has_loss: Whether the tile begins with the loss of its rows.
    """

    decode_rows: int = 0
    prefill_rows: int = 0
    decode_kv_tokens: int = 0
    prefill_kv_pairs: int = 0
    prefill: tuple[SequenceRows, ...] = ()
    sample_rows: int = 0
    forward_rows: int = 0
    forward_kv_tokens: float = 0.0
    forward_groups: tuple[Group, ...] = ()
    tile_rows: int = 0
    tile_kv_tokens: float = 0.0
    tile_group: Group | None = None
    tile_end: int = 0
    tile_layers: int | None = None
    has_loss: bool = False

    def features(self, ladder: BucketLadder, forward_rows: int, tile_rows: int) -> StepFeatures:
        """What the latency model is told of this load with finetuning rows added."""
        bucket = ladder.bucket(
            self.decode_rows, self.prefill_rows + forward_rows, tile_rows, self.tile_layers
        )
        has_loss = self.has_loss and tile_rows > 0
        is_usual = self.sample_rows == self.decode_rows
        sample_rows = bucket.decode if is_usual else ladder.padded_decode(self.sample_rows)
        if ladder.reads:
            chunk_kv_pairs = ladder.reads.pairs(bucket.chunk, self._chunk_pieces(forward_rows))
            tile_kv_pairs = ladder.reads.pairs(bucket.window, self._tile_pieces(tile_rows))
        else:
            chunk_kv_pairs = self.prefill_kv_pairs + int(forward_rows * self.forward_kv_tokens)
            tile_kv_pairs = int(tile_rows * self.tile_kv_tokens)
        return StepFeatures(
            bucket=bucket,
            decode_rows=self.decode_rows,
            prefill_rows=self.prefill_rows,
            forward_rows=forward_rows,
            backward_rows=tile_rows,
            decode_kv_tokens=self.decode_kv_tokens,
            chunk_kv_pairs=chunk_kv_pairs,
            tile_kv_pairs=tile_kv_pairs * bucket.tile_layers,
            sample_rows=sample_rows,
            num_losses=int(has_loss),
            loss_rows=bucket.window if has_loss else 0,
        )

    def finetuning(self) -> Load:
        """A load that holds nothing, and has the same finetuning to offer."""
        return Load(
            forward_rows=self.forward_rows,
            forward_kv_tokens=self.forward_kv_tokens,
            forward_groups=self.forward_groups,
            tile_rows=self.tile_rows,
            tile_kv_tokens=self.tile_kv_tokens,
            tile_group=self.tile_group,
            tile_end=self.tile_end,
            tile_layers=self.tile_layers,
            has_loss=self.has_loss,
        )

    def _chunk_pieces(self, forward_rows: int) -> list[SequenceRows | GroupRows]:
        """The prefill rows, and as many forward rows."""
        pieces: list[SequenceRows | GroupRows] = list(self.prefill)
        left = forward_rows
        for group in self.forward_groups:
            length = min(left, group.num_rows - group.forward_end)
            pieces.append(GroupRows(group, group.forward_end, length))
            left -= length
        return [*pieces, SequenceRows(int(self.forward_kv_tokens), left)]

    def _tile_pieces(self, tile_rows: int) -> list[SequenceRows | GroupRows]:
        if self.tile_group is None:
            return [SequenceRows(0, tile_rows)]
        return [GroupRows(self.tile_group, self.tile_end - tile_rows, tile_rows)]


class FinetuneBudget(NamedTuple):
    """Rows that finetuning may take in one iteration.

    Attributes:
      forward_rows: Forward rows at most.
      backward_rows: Rows of the backward tile at most.
    """

    forward_rows: int
    backward_rows: int

    @property
    def rows(self) -> int:
        """Both together."""
        return self.forward_rows + self.backward_rows


NOTHING = FinetuneBudget(0, 0)
"""No finetuning."""


def decode_ms(rows: int, ladder: BucketLadder, latency: StepPredictor) -> float:
    """Expected milliseconds of a step that only decodes."""
    return latency.predict(_decode_only(rows, ladder)) if rows else 0.0


def prefill_row_ms(ladder: BucketLadder, latency: StepPredictor) -> float:
    """Expected milliseconds of a row in a full chunk, alone."""
    return latency.predict(_full_chunk(ladder)) / ladder.max_chunk


@functools.cache
def _decode_only(rows: int, ladder: BucketLadder) -> StepFeatures:
    return Load(decode_rows=rows, sample_rows=rows).features(ladder, 0, 0)


@functools.cache
def _full_chunk(ladder: BucketLadder) -> StepFeatures:
    return Load().features(ladder, ladder.max_chunk, 0)


def chunk_limit(load: Load, turn: Turn, ladder: BucketLadder, latency: StepPredictor) -> int:
    """Prefill rows that fit a turn; never less than the smallest chunk, so that none starves.

    Args:
      load: The step's decode rows.
      turn: Its limits.
      ladder: Buckets.
      latency: See `choose_mix`.
    """
    most = ladder.max_chunk
    if turn.chunk_share is not None:
        most = max(ladder.chunk[0], int((1.0 - turn.chunk_share) * most))
    if turn.max_ms == math.inf:
        return most
    fitting = ladder.chunk[0]
    for chunk in ladder.chunk[1:]:
        features = load.features(ladder, chunk, 0)
        if chunk > most or latency.predict_high(features) > turn.max_ms:
            break
        fitting = chunk
    return min(most, fitting)
