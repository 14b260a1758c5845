"""How many finetuning rows fit into a step, and how many prefill rows. Imports no jax."""

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

_WORTH = 0.95
"""Share of the best mix's work per added millisecond that another must reach to be taken."""

_GROWTH = 1.01
"""Time that a later step may have, over that of this one, from which on it is worth waiting."""

_LEAST_ADDED_MS = 1e-3


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


class MixChoice(NamedTuple):
    """What finetuning gets of a step.

    Attributes:
      budget: Its rows; none to wait for a better step.
      is_alone: Whether the step holds nothing else: decode rows wait for the next.
      can_fit: Whether some step could hold some rows, this one or a later.
      shortest: The shortest that was considered, as the steps that it takes, the decode rows' last;
        empty where nothing was.
    """

    budget: FinetuneBudget
    is_alone: bool = False
    can_fit: bool = True
    shortest: tuple[StepFeatures, ...] = ()


NOTHING = FinetuneBudget(0, 0)
"""No finetuning."""


def choose_mix(
    load: Load, turn: Turn, ladder: BucketLadder, latency: StepPredictor
) -> FinetuneBudget:
    """The finetuning rows of a step beside what it holds; see `weigh_mixes`."""
    return weigh_mixes(load, turn, ladder, latency).budget


def weigh_mixes(
    load: Load,
    turn: Turn,
    ladder: BucketLadder,
    latency: StepPredictor,
    *,
    can_be_alone: bool = False,
) -> MixChoice:
    """The finetuning rows of a step: as many as fit, or none where waiting gets more done.

    A tile that is ready comes first, and whole: mixes with a part of it, or without, are taken
    only where none with all of it could ever fit. What is left of a tile costs nearly as much as
    the tile, a backward pass that waits holds pages, and forward rows alone end nothing.

    Large mixes train more in a millisecond than small ones, and time that a step leaves free is
    there for a later one, up to `Turn.reach_ms`. So the time that a mix adds has a price: what the
    best of the mixes that must save up for theirs would make of it, nearly: of those that do not
    fit now, or take more than steps may on average. Of the mixes that fit now, the one that is
    worth most beyond that price is taken, if one is. Rows are worth what they take in the largest
    buckets.

    Args:
      load: What the step holds already, and what finetuning has to offer.
      turn: Its limits.
      ladder: Buckets.
      latency: Predicts milliseconds; `predict_high` is held against `turn.max_ms`.
      can_be_alone: Whether what the step holds can wait for the next one, if finetuning alone and
        then that takes less time than both together.
    """
    share = 1.0 if turn.chunk_share is None else turn.chunk_share
    room = min(ladder.max_chunk - load.prefill_rows, int(share * ladder.max_chunk))
    widest = int(share * ladder.max_window)
    if turn.max_ms == math.inf and turn.max_rows is None:
        return MixChoice(FinetuneBudget(max(room, 0), widest))
    tiles = sorted({min(w, load.tile_rows, widest) for w in ladder.window} - {0})
    sizes = {max(0, min(c - load.prefill_rows, load.forward_rows, room)) for c in ladder.chunk}
    forwards = sorted(sizes | {0})
    scale = _Scale(load, turn, ladder, latency)
    with_whole_tile = _fitting(scale, tiles[-1:], forwards)
    # Rows of which even the fewest do not fit beside the rest do not fit before it either: where
    # steps are short, that is soon known.
    if not with_whole_tile and not _fitting(scale, tiles[:1], [0]):
        tiles = []
    for widths in (tiles[-1:], tiles[:-1], [0]):
        is_first = widths == tiles[-1:]
        found = with_whole_tile if is_first else _fitting(scale, widths, forwards)
        if can_be_alone and widths and (found or widths[-1]):
            found += _fitting_alone(scale, widths[-1], forwards[-1])
        if found:
            best = _best(found, turn, scale.reach_ms)
            mix, is_alone = (best.mix, best.is_alone) if best else (NOTHING, False)
            return MixChoice(mix, is_alone, shortest=scale.shortest)
    return MixChoice(NOTHING, can_fit=False, shortest=scale.shortest)


class _Scale:
    """What mixes are weighed with."""

    def __init__(self, load: Load, turn: Turn, ladder: BucketLadder, latency: StepPredictor):
        self.load, self.turn, self.ladder, self.latency = load, turn, ladder, latency
        self.reach_ms = turn.max_ms if turn.reach_ms is None else max(turn.reach_ms, turn.max_ms)
        self.shortest: tuple[StepFeatures, ...] = ()
        self._shortest_ms = math.inf
        self.base: StepFeatures | None = None
        self.base_ms = self.base_high_ms = 0.0
        if load.decode_rows + load.prefill_rows:
            self.base = load.features(ladder, 0, 0)
            self.base_ms = latency.predict(self.base)
            self.base_high_ms = latency.predict_high(self.base)

    @functools.cached_property
    def values(self) -> tuple[float, float]:
        """Milliseconds of a forward row and of a backward row, alone in the largest buckets."""
        return _row_values(self.load, self.ladder, self.latency)

    def fits(self, high_ms: float, *steps: StepFeatures) -> bool:
        """Whether some step could take that long; remembers the shortest."""
        if high_ms < self._shortest_ms:
            self.shortest, self._shortest_ms = steps, high_ms
        return high_ms <= self.reach_ms


class _Weighed(NamedTuple):
    mix: FinetuneBudget
    is_alone: bool
    worth: float  # milliseconds that its rows take in the largest buckets
    added_ms: float
    high_ms: float


def _fitting(scale: _Scale, tiles: list[int], forwards: list[int]) -> list[_Weighed]:
    """Mixes beside what the step holds that some step could hold."""
    load, max_rows, ladder, latency = scale.load, scale.turn.max_rows, scale.ladder, scale.latency
    found: list[_Weighed] = []
    for tile in tiles:
        for forward in forwards:
            mix = FinetuneBudget(forward, tile)
            if max_rows is not None:
                mix = _within_rows(mix, max_rows)
            rows, tile_rows = mix
            if not rows + tile_rows or (tile and not tile_rows):
                continue
            features = load.features(ladder, rows, tile_rows)
            high_ms = latency.predict_high(features)
            if not scale.fits(high_ms, features):
                break  # more forward rows only take longer
            added_ms = max(latency.predict(features) - scale.base_ms, _LEAST_ADDED_MS)
            row_ms, tile_row_ms = scale.values
            worth = rows * row_ms + tile_rows * tile_row_ms
            found.append(_Weighed(mix, False, worth, added_ms, high_ms))
    return found


def _fitting_alone(scale: _Scale, tile: int, most_forward: int) -> list[_Weighed]:
    """Large mixes for a step of their own, before one with what this one would have held."""
    alone, ladder, latency = scale.load.finetuning(), scale.ladder, scale.latency
    assert scale.base is not None
    found: list[_Weighed] = []
    for forward in sorted({0, most_forward}):
        mix = FinetuneBudget(forward, tile)
        if not mix.rows:
            continue
        features = alone.features(ladder, forward, tile)
        high_ms = latency.predict_high(features) + scale.base_high_ms
        if not scale.fits(high_ms, features, scale.base):
            break
        row_ms, tile_row_ms = scale.values
        worth = forward * row_ms + tile * tile_row_ms
        found.append(_Weighed(mix, True, worth, latency.predict(features), high_ms))
    return found


def _best(found: list[_Weighed], turn: Turn, reach_ms: float) -> _Weighed | None:
    """What is worth most beyond the price of its time; None to wait for a better."""
    price = 0.0
    if reach_ms > _GROWTH * turn.max_ms:
        free_ms = min(turn.mean_ms, turn.max_ms)
        saved_for = [w.worth / w.added_ms for w in found if w.high_ms > free_ms]
        price = _WORTH * max(saved_for, default=0.0)
    best, best_key = None, (0.0, 0.0)
    for weighed in found:
        if weighed.high_ms <= turn.max_ms:
            key = (weighed.worth - price * weighed.added_ms, -weighed.high_ms)
            if key > best_key:
                best, best_key = weighed, key
    return best


def _row_values(load: Load, ladder: BucketLadder, latency: StepPredictor) -> tuple[float, float]:
    """Milliseconds of a forward row and of a backward row, alone in the largest buckets."""
    forward = prefill_row_ms(ladder, latency)
    if not load.tile_rows:
        return forward, 0.0
    features = _full_tile(ladder, load.tile_layers, load.has_loss)
    return forward, latency.predict(features) / ladder.max_window


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


@functools.cache
def _full_tile(ladder: BucketLadder, tile_layers: int | None, has_loss: bool) -> StepFeatures:
    alone = Load(tile_layers=tile_layers, has_loss=has_loss)
    return alone.features(ladder, 0, ladder.max_window)


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
