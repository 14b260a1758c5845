"""All figures of a measured run, the same for every policy.

Rates are totals over one measured window, never means of parts of it.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from flexjax.metrics.checks import require
from flexjax.metrics.records import RequestRecord
from flexjax.metrics.run import RunRecord
from flexjax.metrics.slo import DEFAULT_TIERS, RequestsSummary, Tier, summarize_requests
from flexjax.metrics.work import (
    DeviceSummary,
    FinetuningSummary,
    summarize_device,
    summarize_finetuning,
)

NO_CLASS = "(no class)"
BASE_MODEL = "(base model)"


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """Figures of one run.

    Attributes:
      policy: Name of the policy.
      rate: Offered load, requests per second, or None.
      begin_s: Begin of the measured window, on the run's clock.
      end_s: Its end.
      num_outside: Requests due outside the window, which only count towards its tokens per second.
      output_tokens_per_s: Tokens generated in the window, of all requests, per second.
      requests: All requests that were due in the window.
      by_class: The same by latency class; `NO_CLASS` for those without.
      by_adapter: The same by adapter; `BASE_MODEL` for those without.
      finetuning: What finetuning got.
      device: What the device did, or None where no step ended in the window.
    """

    policy: str
    rate: float | None
    begin_s: float
    end_s: float
    num_outside: int
    output_tokens_per_s: float
    requests: RequestsSummary
    by_class: dict[str, RequestsSummary]
    by_adapter: dict[str, RequestsSummary]
    finetuning: FinetuningSummary
    device: DeviceSummary | None

    @property
    def duration_s(self) -> float:
        """Length of the measured window."""
        return self.end_s - self.begin_s

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for the summary line of a run's file."""
        return dataclasses.asdict(self)


def measured_window(run: RunRecord, drop_head_s: float = 0.0) -> tuple[float, float]:
    """The time that rates are averaged over, the same rule for every policy.

    It begins `drop_head_s` after the run does. It ends at `measured_until_s` where the run says
    so: runs that are compared should, with the same length, since otherwise a policy that needs
    longer for its last requests also gets longer for its finetuning. Otherwise it ends with the
    last token of any request, or with the run where a request is unfinished or none has a token.

    Args:
      run: The run.
      drop_head_s: Seconds at the start that are left out, to let a run settle.

    Returns:
      Begin and end, on the run's clock.

    Raises:
      ValueError: If `drop_head_s` is negative or leaves nothing.
    """
    end_s = run.measured_until_s
    if end_s is None:
        lasts = [r.token_times_s[-1] for r in run.requests if r.token_times_s]
        is_open = any(r.status == "unfinished" for r in run.requests) or not lasts
        end_s = run.end_s if is_open else max(lasts)
    rule = f">= 0 and below the {end_s - run.begin_s:g} s of the run"
    require(0 <= drop_head_s < end_s - run.begin_s, "drop_head_s", rule, drop_head_s)
    return run.begin_s + drop_head_s, end_s


def summarize_run(
    run: RunRecord, tiers: Sequence[Tier] = DEFAULT_TIERS, drop_head_s: float = 0.0
) -> RunSummary:
    """Computes every figure of a run.

    Requests count if they were due in `measured_window`, with all their tokens, also later ones.
    Tokens, optimizer steps and steps count by the time at which they were done, whichever request
    or batch they belong to.

    Args:
      run: The run.
      tiers: Targets to judge by.
      drop_head_s: Seconds at the start that are left out.

    Raises:
      ValueError: If two tiers share a name, or there is no time left to measure.
    """
    names = [tier.name for tier in tiers]
    require(len(set(names)) == len(names), "tiers", "named differently", names)
    begin_s, end_s = measured_window(run, drop_head_s)
    due = [r for r in run.requests if begin_s <= r.due_s <= end_s]
    duration_s = end_s - begin_s
    num_tokens = sum(_count_within(r.token_times_s, begin_s, end_s) for r in run.requests)
    whole = summarize_requests(due, tiers, duration_s)
    return RunSummary(
        policy=run.policy,
        rate=run.rate,
        begin_s=begin_s,
        end_s=end_s,
        num_outside=len(run.requests) - len(due),
        output_tokens_per_s=num_tokens / duration_s,
        requests=whole,
        by_class=_grouped([(r.slo_class or NO_CLASS, r) for r in due], whole, tiers, duration_s),
        by_adapter=_grouped([(r.adapter or BASE_MODEL, r) for r in due], whole, tiers, duration_s),
        finetuning=summarize_finetuning(run, begin_s, end_s),
        device=summarize_device(run.steps, begin_s, end_s),
    )


def _count_within(times_s: Sequence[float], begin_s: float, end_s: float) -> int:
    """How many of some times, in order, are within a window, its ends included."""
    return bisect.bisect_right(times_s, end_s) - bisect.bisect_left(times_s, begin_s)


def _grouped(
    named: Sequence[tuple[str, RequestRecord]],
    whole: RequestsSummary,
    tiers: Sequence[Tier],
    duration_s: float,
) -> dict[str, RequestsSummary]:
    groups: dict[str, list[RequestRecord]] = collections.defaultdict(list)
    for name, request in named:
        groups[name].append(request)
    if len(groups) == 1:
        return dict.fromkeys(groups, whole)
    return {name: summarize_requests(groups[name], tiers, duration_s) for name in sorted(groups)}
