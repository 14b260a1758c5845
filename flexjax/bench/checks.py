"""What a comparison of policies must show: named yes or no, with the figures behind it.

Finetuning throughput is that of finished backward work, since a short window holds few optimizer
steps. Where the repeats of a run differ, throughputs and latencies count by their medians, and
attainment by all requests of all repeats.

No machine is equally fast at all times, and what policies differ by is less than that. Every run
holds steps of the same kind, finetuning alone in the largest buckets; what they took in this run,
over what they take in all, is the run's pace, and throughputs are compared at equal pace.
"""

from __future__ import annotations

import collections
import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from flexjax.metrics import (
    RunRecord,
    RunSummary,
    StepRecord,
    Tier,
    all_gaps_s,
    percentile,
    summarize_run,
)

OURS = "co_serve"
BASELINE = "inference_only"
_WITHOUT_REQUESTS = "finetune_only"

ATTAINMENT = 0.99
"""Share of requests that must meet the targets."""
MARGIN = 1.03
"""A throughput within this factor of another counts as equal."""
RETENTION = 0.85
INTERFERENCE = 1.3
RETURN_S = 1.0
"""Seconds after a burst within which finetuning must be back."""
MEDIAN_ERROR = 0.08
UNDER_ERROR = 0.15
PACE_STEPS = 10
"""Steps of finetuning alone that a run must hold to have a pace."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that must hold.

    Attributes:
      name: What, in a few words.
      passed: Whether it holds; None where the runs cannot tell.
      figures: What it was judged by, JSON values.
    """

    name: str
    passed: bool | None
    figures: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class _Point:
    """A policy at a rate, all repeats together; None without requests.

    `trained` is at equal pace, `measured` is not.
    """

    attainment: float | None
    trained: float
    measured: float

    @property
    def attains(self) -> bool:
        return self.attainment is not None and self.attainment >= ATTAINMENT


_Points = dict[str, dict[float, _Point]]


def check_sweep(
    runs: Sequence[RunRecord], tier: Tier, capped: Sequence[RunRecord] = ()
) -> tuple[Check, ...]:
    """Judges a sweep.

      no_policy_trains_more        at no rate has a policy that attains 99 % more than 1.03 times
                                   the finetuning throughput of co-serving, at equal pace
      no_fixed_policy_is_equal     no other policy attains what co-serving does, and trains as
                                   much within 3 %, at every rate
      finetuning_is_retained       co-serving trains at the highest rate at which inference alone
                                   attains 99 % at least 85 % of what it does at the lowest rate,
                                   at equal pace; where runs have none, each as a share of what
                                   finetuning alone did just before, if it ran
      interference_is_small        up to that rate, p99 of co-serving's gaps between tokens, of all
                                   repeats together, is at most 1.3 times that of inference alone;
                                   in `capped` runs, if there are any
      latency_model_is_right       of co-serving's steps, the median absolute error of predictions
                                   is at most 8 %, and the 95th percentile of time above the high
                                   quantile that budgets go by at most 15 %

    Args:
      runs: Of `run_sweep`.
      tier: Targets to judge by.
      capped: Of `run_capped`.

    Raises:
      ValueError: If there is no run of co-serving.
    """
    paces = run_paces(runs)
    points = _points([summarize_run(run, (tier,)) for run in runs], paces)
    if OURS not in points:
        raise ValueError(f"`runs` must hold runs of {OURS}; got {sorted(points)}.")
    return (
        _no_policy_trains_more(points),
        _no_fixed_policy_is_equal(points),
        _finetuning_is_retained(points, _shares_of_alone(runs), is_paced=bool(paces)),
        _interference_is_small(capped or runs, _attained_rates(points)),
        _latency_model_is_right([run for run in runs if run.policy == OURS]),
    )


def run_paces(runs: Sequence[RunRecord]) -> list[float]:
    """How slow the machine was in each run: 1 in the middle one, 2 where it took twice as long.

    By the median time of steps that hold finetuning alone, forward and backward, in the largest
    buckets. 1 for runs that trained nothing; empty if another has fewer than `PACE_STEPS` of them.
    """
    alone = [
        [s for s in run.steps if s.forward_rows and s.backward_rows and not _request_rows(s)]
        for run in runs
    ]
    buckets = {(s.chunk_bucket, s.window_bucket) for steps in alone for s in steps}
    largest = max(buckets, default=(0, 0))
    times_ms: list[float | None] = []
    for run, steps in zip(runs, alone, strict=True):
        found = [s.measured_ms for s in steps if (s.chunk_bucket, s.window_bucket) == largest]
        if any(s.backward_target_tokens for s in run.steps):
            if len(found) < PACE_STEPS:
                return []
            times_ms.append(statistics.median(found))
        else:
            times_ms.append(None)
    middle_ms = statistics.median([ms for ms in times_ms if ms is not None] or [1.0])
    return [1.0 if ms is None else ms / middle_ms for ms in times_ms]


def _request_rows(step: StepRecord) -> int:
    return step.decode_rows + step.prefill_rows


def _points(summaries: Sequence[RunSummary], paces: Sequence[float] = ()) -> _Points:
    """Policies by rate; throughputs as they were measured where there are no paces."""
    groups: dict[tuple[str, float], list[tuple[RunSummary, float]]] = collections.defaultdict(list)
    for summary, pace in zip(summaries, paces or [1.0] * len(summaries), strict=True):
        if summary.rate is not None and summary.policy != _WITHOUT_REQUESTS:
            groups[summary.policy, summary.rate].append((summary, pace))
    points: _Points = collections.defaultdict(dict)
    for (policy, rate), found in sorted(groups.items()):
        tiers = [summary.requests.tiers[0] for summary, _ in found]
        num_requests = sum(tier.num_requests for tier in tiers)
        trained = [s.finetuning.throughput for s, _ in found]
        points[policy][rate] = _Point(
            sum(t.num_met for t in tiers) / num_requests if num_requests else None,
            statistics.median(t * pace for t, (_, pace) in zip(trained, found, strict=True)),
            statistics.median(trained),
        )
    return dict(points)


def _ratio(value: float, base: float) -> float | None:
    return value / base if base else None


def _no_policy_trains_more(points: _Points) -> Check:
    figures: dict[str, Any] = {}
    passed = True
    for rate, ours in points[OURS].items():
        rivals = {
            policy: by_rate[rate]
            for policy, by_rate in points.items()
            if policy != OURS and rate in by_rate and by_rate[rate].attains
        }
        best = max(rivals, key=lambda policy: rivals[policy].trained, default=None)
        trained = rivals[best].trained if best else 0.0
        passed &= trained <= MARGIN * ours.trained
        measured = max((rival.measured for rival in rivals.values()), default=0.0)
        figures[f"{rate:g}"] = {
            "co_serve": ours.trained,
            "co_serve_attainment": ours.attainment,
            "best_rival": best,
            "rival": trained if best else None,
            "rival_over_co_serve": _ratio(trained, ours.trained) if best else None,
            "as_measured": _ratio(measured, ours.measured) if best else None,
        }
    return Check("no_policy_trains_more", passed, figures)


def _no_fixed_policy_is_equal(points: _Points) -> Check:
    figures: dict[str, Any] = {}
    equals = []
    for policy, by_rate in points.items():
        if policy == OURS:
            continue
        shortfalls = {}
        for rate, ours in points[OURS].items():
            theirs = by_rate.get(rate)
            if theirs is None:
                shortfalls[f"{rate:g}"] = "not run"
            elif (theirs.attainment or 0.0) < min(ATTAINMENT, ours.attainment or 0.0):
                shortfalls[f"{rate:g}"] = "attainment"
            elif MARGIN * theirs.trained < ours.trained:
                shortfalls[f"{rate:g}"] = "finetuning"
        figures[policy] = shortfalls
        if not shortfalls:
            equals.append(policy)
    figures["equals"] = equals
    return Check("no_fixed_policy_is_equal", not equals if len(points) > 1 else None, figures)


def _attained_rates(points: _Points) -> list[float]:
    """Rates of co-serving up to the highest at which inference alone attains."""
    attained = [rate for rate, point in points.get(BASELINE, {}).items() if point.attains]
    return [rate for rate in points[OURS] if rate <= max(attained, default=0.0)]


def _shares_of_alone(runs: Sequence[RunRecord]) -> dict[float, float]:
    """By rate, co-serving's finetuning over that of finetuning alone in the run before: medians."""
    shares: dict[float, list[float]] = collections.defaultdict(list)
    alone = 0.0
    for run in runs:
        if run.policy not in (OURS, _WITHOUT_REQUESTS):
            continue
        trained = summarize_run(run, ()).finetuning.throughput
        if run.policy == _WITHOUT_REQUESTS:
            alone = trained
        elif alone and run.rate is not None:
            shares[run.rate].append(trained / alone)
    return {rate: statistics.median(found) for rate, found in shares.items()}


def _finetuning_is_retained(
    points: _Points, shares: dict[float, float], *, is_paced: bool
) -> Check:
    rates = _attained_rates(points)
    if len(rates) < 2:
        return Check("finetuning_is_retained", None, {"rates": rates})
    trained = {rate: points[OURS][rate].trained for rate in rates}
    measured = {rate: points[OURS][rate].measured for rate in rates}
    figures: dict[str, Any] = {
        "trained": {f"{rate:g}": value for rate, value in trained.items()},
        "of_alone": {f"{rate:g}": shares[rate] for rate in rates if rate in shares},
        "as_measured": _ratio(measured[rates[-1]], measured[rates[0]]),
        "co_serve_attainment": points[OURS][rates[-1]].attainment,
    }
    has_shares = rates[0] in shares and rates[-1] in shares
    ends = shares if has_shares and not is_paced else trained
    retained = figures["retained"] = _ratio(ends[rates[-1]], ends[rates[0]])
    return Check("finetuning_is_retained", retained is not None and retained >= RETENTION, figures)


def _interference_is_small(runs: Sequence[RunRecord], rates: Sequence[float]) -> Check:
    figures: dict[str, dict[str, float]] = {}
    for rate in rates:
        at_rate = [run for run in runs if run.rate == rate]
        alone = all_gaps_s([run for run in at_rate if run.policy == BASELINE])
        ours = all_gaps_s([run for run in at_rate if run.policy == OURS])
        if not alone or not ours or not percentile(alone, 99):
            continue
        ours_ms, alone_ms = (1e3 * percentile(gaps, 99) for gaps in (ours, alone))
        figures[f"{rate:g}"] = {
            "ratio": ours_ms / alone_ms,
            "p99_ms": ours_ms,
            "alone_p99_ms": alone_ms,
            "gaps": len(ours),
        }
    passed = max(f["ratio"] for f in figures.values()) <= INTERFERENCE if figures else None
    return Check("interference_is_small", passed, figures)


def _latency_model_is_right(runs: Sequence[RunRecord]) -> Check:
    errors = [s.measured_ms / s.predicted_ms - 1 for r in runs for s in r.steps if s.predicted_ms]
    if not errors:
        return Check("latency_model_is_right", None, {"steps": 0})
    over = [s.measured_ms / s.budget_ms - 1 for r in runs for s in r.steps if s.budget_ms]
    median_abs = percentile([abs(error) for error in errors], 50)
    p95_over_median = percentile([max(0.0, error) for error in errors], 95)
    # Where budgets were not recorded, predictions are all there is.
    p95_under = percentile([max(0.0, e) for e in over], 95) if over else p95_over_median
    figures = {
        "steps": len(errors),
        "median_abs": median_abs,
        "p95_under": p95_under,
        "p95_under_median": p95_over_median,
        "bias": percentile(errors, 50),
    }
    passed = median_abs <= MEDIAN_ERROR and p95_under <= UNDER_ERROR
    return Check("latency_model_is_right", passed, figures)


def attained_rates(runs: Sequence[RunRecord], tier: Tier) -> list[float]:
    """Rates of a sweep up to the highest at which inference alone attains 99 %."""
    return _attained_rates(_points([summarize_run(run, (tier,)) for run in runs]))


def check_burst(
    run: RunRecord,
    tier: Tier,
    *,
    start_s: float,
    length_s: float,
    baseline: RunRecord | None = None,
) -> Check:
    """Judges a run with a burst: finetuning must give way, come back, and cost no request.

    The phase "during" goes from the burst's first request to the last token of its requests. The
    reaction counts the steps that were planned after that first request came, up to the first one
    whose finetuning rows are at most halfway between the means of "before" and "during": it must
    be the first. The return is the time from the end of "during" to the first step that holds more
    than that again: at most a second.

    Args:
      run: Of `run_burst`.
      tier: Targets to judge by.
      start_s: Begin of the burst, on the run's clock from 0.
      length_s: Seconds of the burst.
      baseline: The same requests under inference alone: co-serving must attain 99 % only where it
        does. None to ask for it in any case.

    Raises:
      ValueError: If no request was due in the burst.
    """
    first_s, last_s = run.begin_s + start_s, run.begin_s + start_s + length_s
    inside = [r for r in run.requests if first_s <= r.due_s < last_s]
    if not inside:
        raise ValueError(f"`run` must have requests in the burst; got {len(run.requests)} others.")
    begin_s = inside[0].due_s
    end_s = max([last_s, *(r.token_times_s[-1] for r in inside if r.token_times_s)])
    before = [s for s in run.steps if s.begin_s < begin_s]
    during = [s for s in run.steps if begin_s <= s.begin_s < end_s]
    after = [s for s in run.steps if s.begin_s >= end_s]
    rows = [_rows_per_step(steps) for steps in (before, during, after)]
    judged = summarize_run(run, (tier,)).requests.tiers[0]
    figures: dict[str, Any] = {
        "rows_per_step": dict(zip(("before", "during", "after"), rows, strict=True)),
        "steps": [len(before), len(during), len(after)],
        "tpot_ms": 1e3 * tier.tpot_s,
        "num_requests": judged.num_requests,
        "num_in_burst": len(inside),
        "attainment": judged.attainment,
        "inference_only_attainment": None,
        "reaction_steps": None,
        "reaction_s": None,
        "return_s": None,
    }
    if baseline is not None:
        alone = summarize_run(baseline, (tier,)).requests.tiers[0].attainment
        figures["inference_only_attainment"] = alone
    if rows[0] is None or rows[1] is None or rows[2] is None:
        return Check("burst_is_absorbed", None, figures)
    middle = (rows[0] + rows[1]) / 2
    planned = [s for s in during if _planned_s(s) >= begin_s]
    for number, step in enumerate(planned, start=1):
        if step.forward_rows + step.backward_rows <= middle:
            figures |= {"reaction_steps": number, "reaction_s": step.begin_s - begin_s}
            break
    for step in after:
        if step.forward_rows + step.backward_rows > middle:
            figures["return_s"] = step.begin_s - end_s
            break
    is_quick = figures["reaction_steps"] == 1 and (figures["return_s"] or 0.0) <= RETURN_S
    gave_way = rows[1] < rows[0] and rows[2] > rows[1] and figures["return_s"] is not None
    alone = figures["inference_only_attainment"]
    is_asked = alone is None or alone >= ATTAINMENT
    attains = (judged.attainment or 0.0) >= ATTAINMENT or not is_asked
    return Check("burst_is_absorbed", gave_way and is_quick and attains, figures)


def _planned_s(step: StepRecord) -> float:
    return step.begin_s if step.planned_s is None else step.planned_s


def _rows_per_step(steps: Sequence[StepRecord]) -> float | None:
    if not steps:
        return None
    return sum(s.forward_rows + s.backward_rows for s in steps) / len(steps)
