"""How many finetuning rows fit into a step, and how many prefill rows. Imports no jax."""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol, runtime_checkable

from flexjax.scheduler.buckets import BucketLadder
from flexjax.scheduler.features import StepFeatures
from flexjax.scheduler.policy import Turn


@runtime_checkable
class StepPredictor(Protocol):
    """What the scheduler asks of a latency model."""

    def predict(self, features: StepFeatures) -> float:
        """Expected milliseconds of a step."""
        ...

    def predict_high(self, features: StepFeatures) -> float:
        """Milliseconds that a step will rarely exceed."""
        ...


@dataclasses.dataclass(slots=True)
class Load:
    """What a step holds before finetuning is added, and what finetuning could add.

    Attributes:
      decode_rows: Decode rows.
      prefill_rows: Prefill rows.
      decode_kv_tokens: Tokens that the decode rows read, summed over rows.
      prefill_kv_pairs: Tokens that the prefill rows read, summed over rows.
      sample_rows: Sequences that get a token.
      forward_rows: Finetuning rows that could go forward.
      forward_kv_tokens: Tokens that one of them reads, on average.
      tile_rows: Rows of the next backward tile if nothing limits it; 0 without one.
      tile_kv_tokens: Tokens that one of them reads, on average.
      tile_layers: Layers of the tile.
      has_loss: Whether the tile begins with the loss of its rows.
    """

    decode_rows: int = 0
    prefill_rows: int = 0
    decode_kv_tokens: int = 0
    prefill_kv_pairs: int = 0
    sample_rows: int = 0
    forward_rows: int = 0
    forward_kv_tokens: float = 0.0
    tile_rows: int = 0
    tile_kv_tokens: float = 0.0
    tile_layers: int | None = None
    has_loss: bool = False

    def features(self, ladder: BucketLadder, forward_rows: int, tile_rows: int) -> StepFeatures:
        """What the latency model is told of this load with finetuning rows added."""
        bucket = ladder.bucket(
            self.decode_rows, self.prefill_rows + forward_rows, tile_rows, self.tile_layers
        )
        has_loss = self.has_loss and tile_rows > 0
        return StepFeatures(
            bucket=bucket,
            decode_rows=self.decode_rows,
            prefill_rows=self.prefill_rows,
            forward_rows=forward_rows,
            backward_rows=tile_rows,
            decode_kv_tokens=self.decode_kv_tokens,
            chunk_kv_pairs=self.prefill_kv_pairs + int(forward_rows * self.forward_kv_tokens),
            tile_kv_pairs=int(tile_rows * self.tile_kv_tokens) * bucket.tile_layers,
            sample_rows=ladder.padded_decode(self.sample_rows),
            num_losses=int(has_loss),
            loss_rows=bucket.window if has_loss else 0,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class FinetuneBudget:
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


def choose_mix(
    load: Load, turn: Turn, ladder: BucketLadder, latency: StepPredictor
) -> FinetuneBudget:
    """The finetuning rows that fit a turn: as many as there is use for.

    A tile that is ready comes first: mixes without one are taken only where none with one fits,
    because a backward pass that waits holds pages, and forward rows alone end nothing. Among mixes
    with as many useful rows the quickest is taken.

    Args:
      load: What the step holds already, and what finetuning has to offer.
      turn: Its limits.
      ladder: Buckets.
      latency: Predicts milliseconds; `predict_high` is held against `turn.max_ms`.
    """
    share = 1.0 if turn.chunk_share is None else turn.chunk_share
    room = min(ladder.max_chunk - load.prefill_rows, int(share * ladder.max_chunk))
    widest = int(share * ladder.max_window)
    if turn.max_ms == math.inf and turn.max_rows is None:
        return FinetuneBudget(max(room, 0), widest)
    best = _largest(load, turn, ladder, latency, room, widest) if load.tile_rows else None
    if best is None or not best.backward_rows:
        best = _largest(load, turn, ladder, latency, room, 0)
    return best


def _largest(
    load: Load,
    turn: Turn,
    ladder: BucketLadder,
    latency: StepPredictor,
    room: int,
    widest: int,
) -> FinetuneBudget:
    """The mix of most useful rows; with a tile if `widest` allows one and any such mix fits."""
    best, best_key = FinetuneBudget(0, 0), (0, 0.0)
    tiles = sorted({min(w, load.tile_rows, widest) for w in ladder.window}) if widest else [0]
    forwards = {
        max(0, min(chunk - load.prefill_rows, load.forward_rows, room)) for chunk in ladder.chunk
    }
    for tile in tiles:
        for forward in sorted(forwards | {0}):
            mix = FinetuneBudget(forward, tile)
            if turn.max_rows is not None:
                mix = _within_rows(mix, turn.max_rows)
            if mix.rows < best_key[0] or (widest and not mix.backward_rows) or not mix.rows:
                continue
            ms = 0.0
            if turn.max_ms < math.inf:
                features = load.features(ladder, mix.forward_rows, mix.backward_rows)
                ms = latency.predict_high(features)
                if ms > turn.max_ms:
                    break  # more forward rows only take longer
            key = (mix.rows, -ms)
            if key > best_key:
                best, best_key = mix, key
    return best


def _within_rows(mix: FinetuneBudget, max_rows: int) -> FinetuneBudget:
    backward = min(mix.backward_rows, max_rows)
    if mix.forward_rows and mix.backward_rows:
        backward = min(mix.backward_rows, max(1, max_rows // 2))
    return FinetuneBudget(min(mix.forward_rows, max_rows - backward), backward)


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
