"""How much finetuning an iteration may hold: the simplest policies behind one interface.

Imports no jax.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

from flexjax.scheduler.buckets import BucketLadder
from flexjax.scheduler.latency import LatencyTable


@dataclasses.dataclass(frozen=True)
class Load:
    """What inference puts into an iteration.

    Attributes:
      decode_rows: Decode rows.
      prefill_rows: Prefill rows.
      has_requests: Whether any request is alive, waiting ones included.
      has_tile: Whether finetuning has a backward tile ready.
    """

    decode_rows: int
    prefill_rows: int
    has_requests: bool
    has_tile: bool = True


@dataclasses.dataclass(frozen=True)
class FinetuneBudget:
    """Rows that finetuning may take in one iteration.

    Attributes:
      forward_rows: Forward rows at most.
      backward_rows: Rows of the backward tile at most.
    """

    forward_rows: int
    backward_rows: int


@runtime_checkable
class BudgetPolicy(Protocol):
    """Decides, once an iteration, how many finetuning rows fit."""

    def budget(self, load: Load, ladder: BucketLadder, latency: LatencyTable) -> FinetuneBudget:
        """Returns the rows that finetuning may take beside `load`."""
        ...


@dataclasses.dataclass(frozen=True)
class FixedBudget:
    """A token budget, a time budget, or both, while requests are alive; everything otherwise.

    Attributes:
      max_rows: Finetuning rows, forward and backward together; None for no limit.
      max_ms: Expected milliseconds of a step with finetuning; None for no limit. Where nothing
        fits, finetuning waits.
    """

    max_rows: int | None = None
    max_ms: float | None = None

    def budget(self, load: Load, ladder: BucketLadder, latency: LatencyTable) -> FinetuneBudget:
        """See `BudgetPolicy.budget`; takes the mix with the most rows that fits both limits.

        A tile that is ready comes first: mixes without one are taken only where none with one
        fits, because a backward pass that waits holds pages, and forward rows alone end nothing.
        """
        whole = FinetuneBudget(ladder.max_chunk - load.prefill_rows, ladder.max_window)
        if not load.has_requests or (self.max_rows is None and self.max_ms is None):
            return whole
        windows = ladder.window if load.has_tile else ()
        best = self._largest(load, windows, ladder, latency)
        return best if _rows(best) else self._largest(load, (0,), ladder, latency)

    def _largest(
        self, load: Load, windows: tuple[int, ...], ladder: BucketLadder, latency: LatencyTable
    ) -> FinetuneBudget:
        best = FinetuneBudget(0, 0)
        for window in windows:
            for chunk in (0, *ladder.chunk):
                forward = max(0, chunk - load.prefill_rows)
                mix = FinetuneBudget(forward, window)
                if self.max_rows is not None:
                    mix = self._within_rows(mix)
                is_larger = _rows(mix) > _rows(best)
                if is_larger and self._fits_time(load, mix, ladder, latency):
                    best = mix
        return best

    def _within_rows(self, mix: FinetuneBudget) -> FinetuneBudget:
        assert self.max_rows is not None
        backward = min(mix.backward_rows, self.max_rows)
        if mix.forward_rows and mix.backward_rows:
            backward = min(mix.backward_rows, max(1, self.max_rows // 2))
        return FinetuneBudget(min(mix.forward_rows, self.max_rows - backward), backward)

    def _fits_time(
        self, load: Load, mix: FinetuneBudget, ladder: BucketLadder, latency: LatencyTable
    ) -> bool:
        if self.max_ms is None:
            return True
        bucket = ladder.bucket(
            load.decode_rows, load.prefill_rows + mix.forward_rows, mix.backward_rows
        )
        expected = latency.predict(bucket)
        return expected is not None and expected <= self.max_ms


def _rows(mix: FinetuneBudget) -> int:
    return mix.forward_rows + mix.backward_rows
