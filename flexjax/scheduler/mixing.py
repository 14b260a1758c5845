"""Which finetuning rows a step gets, step after step: patience, and what is not weighed again.

What mixes are worth in a single step is `weighing`'s. Imports no jax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from flexjax.scheduler.buckets import BucketLadder
from flexjax.scheduler.budget import NOTHING, FinetuneBudget, Load, StepPredictor
from flexjax.scheduler.plan import StepPlan
from flexjax.scheduler.policy import Turn
from flexjax.scheduler.weighing import MixChoice, choose_mix, weigh_mixes

_PATIENCE_STEPS = 32
"""Steps that finetuning waits for one that can hold more of it, before it takes what it gets."""

_TRUST_STEPS = 16
"""Steps in a row that may take the word of an earlier one that what it weighed takes too long."""


class MixChooser:
    """Chooses the finetuning rows of one step after the other.

    Where targets are short, most steps hold none: nothing fits, or it waits for a step with more
    time. Weighing says so again and again, and takes as long as the rest of planning. So the next
    steps ask only whether the shortest of what was weighed still takes too long.
    """

    def __init__(self, ladder: BucketLadder, offer: Callable[[Load], None]):
        """Begins with the first step.

        Args:
          ladder: Buckets.
          offer: Writes into a load what finetuning could add to it.
        """
        self._ladder = ladder
        self._offer = offer
        self._num_waits = 0  # steps in a row that held no finetuning
        self._weighed: tuple[int, FinetuneBudget] | None = None  # for so many decode rows
        self._last: MixChoice | None = None  # while steps may take its word
        self._num_trusted = 0

    def forget(self) -> None:
        """Forgets what was weighed: finetuning has other rows to offer now."""
        self._weighed = self._last = None

    def choose_alone(
        self, num_rows: int, kv_tokens: Callable[[], int], turn: Turn, latency: StepPredictor
    ) -> FinetuneBudget | None:
        """Rows for a step without the decode rows, where they can wait and that is quicker.

        Args:
          num_rows: Decode rows.
          kv_tokens: Gives the tokens that they read.
          turn: The step's limits.
          latency: See `weigh_mixes`.

        Returns:
          The rows; None to go on with the decode rows, and `choose`.
        """
        last = self._last
        self.forget()
        if last is not None and self._still_holds(last, num_rows, turn, latency):
            self._last, self._num_trusted = last, self._num_trusted + 1
            self._weighed = num_rows, NOTHING
            return None
        load = Load(decode_rows=num_rows, sample_rows=num_rows)
        load.decode_kv_tokens = kv_tokens()
        self._offer(load)
        choice = weigh_mixes(load, turn, self._ladder, latency, can_be_alone=True)
        if choice.is_alone:
            self._num_waits = 0
            return choice.budget
        self._weighed = num_rows, choice.budget
        if choice.shortest and not choice.budget.rows:
            self._last, self._num_trusted = choice, 0
        return None

    def _still_holds(
        self, last: MixChoice, num_rows: int, turn: Turn, latency: StepPredictor
    ) -> bool:
        """Whether what took too long beside as many decode rows a moment ago still does."""
        is_alike = self._ladder.padded_decode(num_rows) == last.shortest[-1].bucket.decode
        if self._num_trusted >= _TRUST_STEPS or not is_alike:
            return False
        shortest_ms = sum(latency.predict_high(features) for features in last.shortest)
        reach_ms = turn.max_ms if turn.reach_ms is None else turn.reach_ms
        # What could fit a later step must still be able to: otherwise, less may be worth taking.
        return shortest_ms > turn.max_ms and (shortest_ms <= reach_ms) == last.can_fit

    def choose(
        self, plan: StepPlan, load: Load, turn: Turn, latency: StepPredictor
    ) -> FinetuneBudget:
        """Rows beside what a step holds.

        Args:
          plan: The step.
          load: The same; what finetuning could add is written into it.
          turn: Its limits.
          latency: See `choose_mix`.
        """
        is_patient = self._num_waits < _PATIENCE_STEPS
        # What no step can hold, patience or not, needs no second look.
        is_settled = is_patient or (self._last is not None and not self._last.can_fit)
        weighed = self._weighed if is_settled and not plan.prefill else None
        if weighed is not None and weighed[0] == load.decode_rows:
            budget = weighed[1]  # of the same load, a moment ago
        else:
            self._offer(load)
            turn = _for_plan(turn, plan, is_patient=is_patient)
            budget = choose_mix(load, turn, self._ladder, latency)
        self._num_waits += 1
        if budget.rows:
            self._num_waits = 0
            self._last = None  # what there is to offer is about to change
        return budget


def _for_plan(turn: Turn, plan: StepPlan, *, is_patient: bool) -> Turn:
    """The limits of a step that holds a plan."""
    max_ms, reach_ms = turn.max_ms, turn.reach_ms if is_patient else None
    if turn.reach_ms is not None and plan.prefill and not plan.decode:
        # Nobody has a token due yet, but somebody waits for the first.
        longest_ms = 1e3 * min(chunk.sequence.tpot_s for chunk in plan.prefill)
        max_ms, reach_ms = min(max_ms, longest_ms), None
    if (max_ms, reach_ms) == (turn.max_ms, turn.reach_ms):
        return turn
    return dataclasses.replace(turn, max_ms=max_ms, reach_ms=reach_ms)
