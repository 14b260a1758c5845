"""What requests are owed when a step begins: tokens of the running, first tokens of the others.

Imports no jax.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

from flexjax.scheduler.sequence import RESERVE_SHARE, Sequence, SequenceStatus
from flexjax.scheduler.waiting import WaitingQueue

_PREFILL_MARGIN = 2.0
"""A first token is urgent once less than this many times its expected prefill is left."""

_BLOCKED_SHARE = 0.5
"""A first token that waits for memory or a slot is urgent once this share of its time is left."""


@dataclasses.dataclass(slots=True)
class Survey:
    """The running requests, sorted, and the time that they leave.

    Attributes:
      prefilling: Those whose prompts are not computed yet, in the order given.
      decoding: Those that get a token from the step, in the order given.
      slack_ms: Milliseconds to the earliest token that one of those is owed; infinite without
        targets, as are the next two.
      reach_ms: The same for tokens after it at the most, were finetuning to wait.
      mean_ms: What steps may take on average.
    """

    prefilling: list[Sequence]
    decoding: list[Sequence]
    slack_ms: float
    reach_ms: float
    mean_ms: float


def survey(
    running: Iterable[Sequence], begin_s: float, pace_s: float, itl_share: float = 1.0
) -> Survey:
    """Sorts the running requests into those that decode and those that prefill.

    Once for each running request and iteration, so it does by hand what properties of `Sequence`
    do.

    Args:
      running: Requests with pages.
      begin_s: Clock when the step is expected to begin.
      pace_s: Seconds of a step without finetuning.
      itl_share: See `Sequence.due_and_reach_s`.
    """
    prefilling: list[Sequence] = []
    decoding: list[Sequence] = []
    least_s = least_reach_s = least_tpot_s = infinity = math.inf
    for sequence in running:
        num_tokens = len(sequence.tokens) + sequence.in_flight
        if sequence.num_computed != num_tokens - 1 or num_tokens == sequence.prompt_len:
            if sequence.num_computed < num_tokens:
                prefilling.append(sequence)
            continue
        if num_tokens >= sequence.max_tokens:
            continue  # its last token is on its way
        decoding.append(sequence)
        if sequence.tpot_s == infinity:
            continue
        previous_s = sequence.last_token_s
        if sequence.in_flight or previous_s is None:
            previous_s = begin_s  # the step before ends with it
        due_s, reach_s = sequence.due_and_reach_s(previous_s, pace_s, itl_share)
        if due_s < least_s:
            least_s = due_s
        if reach_s < least_reach_s:
            least_reach_s = reach_s
        if sequence.tpot_s < least_tpot_s:
            least_tpot_s = sequence.tpot_s
    mean_s = (1.0 - RESERVE_SHARE) * least_tpot_s
    return Survey(
        prefilling, decoding, 1e3 * (least_s - begin_s), 1e3 * least_reach_s, 1e3 * mean_s
    )


def first_token_is_urgent(
    prefilling: Iterable[Sequence],
    waiting: WaitingQueue,
    begin_s: float,
    *,
    pace_ms: float,
    row_ms: Callable[[], float],
    is_blocked: bool,
) -> bool:
    """Whether a first token would come late if finetuning took its share.

    Args:
      prefilling: As in `Survey`.
      waiting: Requests without pages.
      begin_s: Clock when the step is expected to begin.
      pace_ms: Milliseconds of a step that only decodes.
      row_ms: Gives the milliseconds of a prefill row; called only where one has a target.
      is_blocked: Whether the next in the queue waits for memory or a slot.
    """
    prefilling = [s for s in prefilling if not s.num_sampled]
    heads = [s for s in waiting.heads() if not s.num_sampled]
    if not any(s.request.slo.ttft_ms is not None for s in (*prefilling, *heads)):
        return False
    per_row_ms = row_ms()
    ahead = sum(s.num_tokens - s.num_computed for s in prefilling)
    for sequence in (*prefilling, *heads):
        slo = sequence.request.slo
        slack_ms = 1e3 * (sequence.request.arrival_s + slo.ttft_s - begin_s)
        is_head = sequence.status is SequenceStatus.WAITING
        rows = ahead + (sequence.num_tokens if is_head else 0)
        needed_ms = _PREFILL_MARGIN * (rows * per_row_ms + 2 * pace_ms)
        if is_head and is_blocked:
            needed_ms = max(needed_ms, _BLOCKED_SHARE * 1e3 * slo.ttft_s)
        if slack_ms < needed_ms:
            return True
    # The last in the queue arrived at the earliest now: it has its whole time yet.
    longest_ms = max(1e3 * s.request.slo.ttft_s for s in (*prefilling, *heads))
    return (ahead + waiting.num_tokens) * per_row_ms > _BLOCKED_SHARE * longest_ms
