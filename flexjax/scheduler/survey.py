"""What requests are owed when a step begins: tokens of the running, first tokens of the others.

Imports no jax.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import numpy as np

from flexjax.scheduler.plan import DecodeRows
from flexjax.scheduler.running import RunningRequests
from flexjax.scheduler.sequence import Sequence, SequenceStatus
from flexjax.scheduler.waiting import WaitingQueue

_PREFILL_MARGIN = 2.0
"""A first token is urgent once less than this many times its expected prefill is left."""

_BLOCKED_SHARE = 0.5
"""A first token that waits for memory or a slot is urgent once this share of its time is left."""


RESERVE_START = 0.25
"""What is held back of a request's first time per token, for steps that take long."""
RESERVE_SHARE = 0.05
"""Share of each further one that is added to it."""
RESERVE_TOKENS = 2.0
"""What is held back at most, in times per token."""


@dataclasses.dataclass(slots=True)
class Survey:
    """The running requests, sorted, and the time that they leave.

    Attributes:
      prefilling: Those whose prompts are not computed yet, in order of admission.
      decoding: The rows of those that get a token from the step, in the same order.
      slack_ms: Milliseconds to the earliest token that one of those is owed; infinite without
        targets, as are the next two.
      reach_ms: The same for tokens after it at the most, were finetuning to wait.
      mean_ms: What steps may take on average.
    """

    prefilling: list[Sequence]
    decoding: DecodeRows
    slack_ms: float = math.inf
    reach_ms: float = math.inf
    mean_ms: float = math.inf


def survey(
    running: RunningRequests, begin_s: float, pace_s: float, itl_share: float = 1.0
) -> Survey:
    """Sorts the running requests into those that decode and those that prefill.

    Args:
      running: Requests with pages.
      begin_s: Clock when the step is expected to begin.
      pace_s: Seconds of a step without finetuning.
      itl_share: See `due_and_reach_s`.
    """
    found = Survey(list(running.prefilling), running.decode_rows())
    if not found.decoding:
        return found
    slots = found.decoding.slots
    tpot_s = running.tpot_s[slots]
    slots = slots[tpot_s < math.inf]
    if len(slots):
        due_s, reach_s = due_and_reach_s(running, slots, begin_s, pace_s, itl_share)
        found.slack_ms = 1e3 * (float(due_s.min()) - begin_s)
        found.reach_ms = 1e3 * float(reach_s.min())
        found.mean_ms = 1e3 * ((1.0 - RESERVE_SHARE) * float(tpot_s.min()))
    return found


def due_and_reach_s(
    running: RunningRequests,
    slots: np.ndarray,
    begin_s: float,
    pace_s: float,
    itl_share: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """When the next tokens of requests that have some are due, and what patience would give.

    Token j after the first is due j TPOTs after it, so that time saved on early tokens may be
    spent on later ones; less a reserve, so that a step which takes longer than was expected
    makes no request late. But never more than the longest gap (`SLO.itl_ms`) after the token
    before, so that what was saved is not spent on one long stall. What is late beyond catching
    up keeps the pace.

    Args:
      running: Requests with pages.
      slots: Slots of those that are asked about; all have a target.
      begin_s: Clock when the step is expected to begin, and with it a token that the host has not
        read is there.
      pace_s: Seconds of a step without finetuning, by which it is told whether a late request
        can catch up.
      itl_share: Share of `SLO.itl_ms` that may be planned for, so that what takes longer than
        expected still keeps it; see `StepPredictor.tail_factor`.

    Returns:
      For each, the clock at which it is due, and the most seconds that there will be for one of
      the tokens after it, if the steps until then hold no finetuning.
    """
    tpot_s, itl_s = running.tpot_s[slots], running.itl_s[slots]
    itl_s[running.has_itl[slots]] *= itl_share
    # What is nan comes with the step before, and nothing that was read came after its beginning.
    previous_s = np.fmin(running.last_token_s[slots], begin_s)
    first_s = np.fmin(running.first_token_s[slots], previous_s)
    num_tokens = running.num_tokens[slots]
    number = num_tokens - running.prompt_len[slots]
    reserve = np.minimum(RESERVE_START + RESERVE_SHARE * number, RESERVE_TOKENS)
    free_s = first_s + (number - reserve) * tpot_s - previous_s
    gain_s = (running.max_tokens[slots] - num_tokens) * (tpot_s - pace_s)  # until the last token
    reach_s = np.minimum(free_s + np.maximum(gain_s, 0.0), itl_s)
    due_s = previous_s + np.minimum(free_s, reach_s)
    (late,) = (free_s < 0.0).nonzero()
    if len(late):
        is_lost = (free_s + reserve * tpot_s + gain_s)[late] < 0.0
        due_s[late] = previous_s[late] + np.where(is_lost, tpot_s[late], 0.0)
        reach_s[late] = np.where(is_lost, tpot_s[late], itl_s[late])
    return due_s, reach_s


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
