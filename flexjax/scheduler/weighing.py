"""What mixes of finetuning rows are worth in a step beside the time they take. Imports no jax.

Several steps together are `mixing`'s.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from flexjax.scheduler.buckets import BucketLadder
from flexjax.scheduler.budget import NOTHING, FinetuneBudget, Load, StepPredictor, prefill_row_ms
from flexjax.scheduler.features import StepFeatures
from flexjax.scheduler.policy import Turn

_WORTH = 0.95
"""Share of the best mix's work per added millisecond that another must reach to be taken."""

_GROWTH = 1.01
"""Time that a later step may have, over that of this one, from which on it is worth waiting."""

_LEAST_ADDED_MS = 1e-3


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
    can_save = scale.reach_ms > _GROWTH * turn.max_ms
    search = _fitting if can_save or turn.max_rows is not None else _largest
    with_whole_tile = search(scale, tiles[-1:], forwards)
    # Rows of which even the fewest do not fit beside the rest do not fit before it either: where
    # steps are short, that is soon known.
    if not with_whole_tile and not search(scale, tiles[:1], [0]):
        tiles = []
    for widths in (tiles[-1:], tiles[:-1], [0]):
        is_first = widths == tiles[-1:]
        found = with_whole_tile if is_first else search(scale, widths, forwards)
        if can_be_alone and widths and (found or widths[-1]):
            found += _fitting_alone(scale, widths[-1], forwards[-1])
        if found:
            best = _best(found, turn, can_save=can_save)
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

    def weigh(self, mix: FinetuneBudget) -> _Weighed:
        """A mix beside what the step holds; worth nothing if no step could hold it."""
        rows, tile_rows = mix
        features = self.load.features(self.ladder, rows, tile_rows)
        high_ms = self.latency.predict_high(features)
        if not self.fits(high_ms, features):
            return _Weighed(mix, False, 0.0, 0.0, high_ms)
        added_ms = max(self.latency.predict(features) - self.base_ms, _LEAST_ADDED_MS)
        row_ms, tile_row_ms = self.values
        return _Weighed(mix, False, rows * row_ms + tile_rows * tile_row_ms, added_ms, high_ms)

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
    max_rows = scale.turn.max_rows
    found: list[_Weighed] = []
    for tile in tiles:
        for forward in forwards:
            mix = FinetuneBudget(forward, tile)
            if max_rows is not None:
                mix = _within_rows(mix, max_rows)
            if not mix.rows or (tile and not mix.backward_rows):
                continue
            weighed = scale.weigh(mix)
            if weighed.high_ms > scale.reach_ms:
                break  # more forward rows only take longer
            found.append(weighed)
    return found


def _largest(scale: _Scale, tiles: list[int], forwards: list[int]) -> list[_Weighed]:
    """For each tile the mix with the most forward rows that fits now, where no time is saved up.

    Where none does, the one with the fewest, if some step could hold it.
    """
    found: list[_Weighed] = []
    for tile in tiles:
        mixes = [FinetuneBudget(forward, tile) for forward in forwards if forward or tile]
        if not mixes:
            continue
        best = scale.weigh(mixes[-1])
        if best.high_ms > scale.turn.max_ms and len(mixes) > 1:
            best, fitting, too_many = scale.weigh(mixes[0]), 0, len(mixes) - 1
            while best.high_ms <= scale.turn.max_ms and too_many - fitting > 1:
                middle = (fitting + too_many) // 2
                weighed = scale.weigh(mixes[middle])
                if weighed.high_ms <= scale.turn.max_ms:
                    best, fitting = weighed, middle
                else:
                    too_many = middle
        if best.high_ms <= scale.reach_ms:
            found.append(best)
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


def _best(found: list[_Weighed], turn: Turn, *, can_save: bool) -> _Weighed | None:
    """What is worth most beyond the price of its time; None to wait for a better."""
    price = 0.0
    if can_save:
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


@functools.cache
def _full_tile(ladder: BucketLadder, tile_layers: int | None, has_loss: bool) -> StepFeatures:
    alone = Load(tile_layers=tile_layers, has_loss=has_loss)
    return alone.features(ladder, 0, ladder.max_window)


def _within_rows(mix: FinetuneBudget, max_rows: int) -> FinetuneBudget:
    backward = min(mix.backward_rows, max_rows)
    if mix.forward_rows and mix.backward_rows:
        backward = min(mix.backward_rows, max(1, max_rows // 2))
    return FinetuneBudget(min(mix.forward_rows, max_rows - backward), backward)
