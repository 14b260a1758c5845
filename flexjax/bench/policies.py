"""Policies over loads on one engine: what runs in which order, and the table of it.

Runs of all policies are interleaved, so that a machine that becomes slower hits all alike. What
the figures must satisfy is `checks`'.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexjax.bench.loads import Burst, LoadSource
from flexjax.bench.serving import run_workload
from flexjax.config import FinetuneConfig
from flexjax.engine.engine import Engine
from flexjax.metrics import (
    CompareRow,
    RunRecord,
    RunSummary,
    Tier,
    all_gaps_s,
    compare_table,
    percentile,
    summarize_run,
)
from flexjax.metrics.checks import require
from flexjax.slo import SLO
from flexjax.workload import Workload

TIER = "targets"
"""Name of the tier that a bench judges by."""
DEFAULT_POLICIES = (
    "co_serve",
    "inference_only",
    "temporal:16",
    "temporal:64",
    "dynamic_temporal",
    "spatial:0.25",
    "spatial:0.5",
    "finetune_only",
)
DEFAULT_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Offered loads, as shares of what the engine can answer."""


def check_sweep_fields(
    policies: Sequence[str], rates: Sequence[float], targets: SLO, window_s: float
) -> None:
    """Refuses what no sweep over policies and rates can run.

    Args:
      policies: Names.
      rates: Requests per second.
      targets: Latency targets.
      window_s: Seconds of a run.

    Raises:
      ValueError: If a list is empty or repeats itself, a number is not positive, or a target is
        missing.
    """
    for name, value in (("policies", policies), ("rates", rates)):
        is_right = len(value) > 0 and len(set(value)) == len(value)
        require(is_right, name, "not empty and without repetitions", value)
    for rate in rates:
        require(math.isfinite(rate) and rate > 0, "rates", "numbers > 0", rate)
    has_both = targets.ttft_ms is not None and targets.tpot_ms is not None
    require(has_both, "targets", "an SLO with TTFT and TPOT", targets)
    require(window_s > 0, "window_s", "> 0", window_s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """What a sweep runs.

    Attributes:
      policies: Names, as `make_policy` takes them. "finetune_only" runs without requests.
      rates: Offered loads, requests per second.
      targets: Latency targets; both are needed.
      window_s: Seconds of a run over which rates are averaged.
      tail_s: Seconds at the end of those in which no request arrives. Where it covers what an
        answer takes, every policy does all of the inference within the window; without, one that
        answers slowly leaves some of it for later, and gains by it.
      drain_s: Seconds that answers may take after it.
      repeats: Times that everything is run, each with requests of its own.
      least_gaps: Gaps between tokens that `run_capped` gathers at each rate, at least, if there are
        requests enough: a p99 of few is the chance of a step or two.
      seed: Seed of the first repeat.

    Raises:
      ValueError: If a list is empty or repeats itself, or a number is out of range.
    """

    policies: Sequence[str] = DEFAULT_POLICIES
    rates: Sequence[float]
    targets: SLO
    window_s: float = 8.0
    tail_s: float = 0.0
    drain_s: float = 3.0
    repeats: int = 1
    least_gaps: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_sweep_fields(self.policies, self.rates, self.targets, self.window_s)
        is_right = 0 <= self.tail_s < self.window_s
        require(is_right, "tail_s", f">= 0 and below `window_s`={self.window_s:g}", self.tail_s)
        for name in ("repeats", "least_gaps"):
            value = getattr(self, name)
            require(value >= 1, name, "at least 1", value)

    @property
    def tier(self) -> Tier:
        """The targets, to judge by."""
        return tier_of(self.targets)

    @property
    def arrivals_s(self) -> float:
        """Seconds in which requests arrive."""
        return self.window_s - self.tail_s


def tier_of(targets: SLO) -> Tier:
    """Targets as a tier; one that is missing is infinite."""
    return Tier(TIER, targets.ttft_s, targets.tpot_s)


def run_sweep(
    engine: Engine,
    settings: SweepSettings,
    source: LoadSource,
    jobs: Sequence[FinetuneConfig],
    *,
    header: Mapping[str, Any] | None = None,
    on_run: Callable[[RunRecord], None] = lambda run: None,
) -> list[RunRecord]:
    """Runs every policy at every rate.

    At each rate all policies answer the same requests, one after the other, in an order that
    turns with the rate and the repeat, and finetuning alone, which has no requests, goes before
    them: what the machine can do at that time. A first run that is not recorded warms up.

    Args:
      engine: Idle; see `run_workload`.
      settings: What to run.
      source: Of the workloads.
      jobs: What is finetuned in every run.
      header: See `run_workload`.
      on_run: Called with each record as soon as it is there.

    Returns:
      The records, in the order in which they ran.

    Raises:
      ValueError, JobStateError: See `run_workload` and `LoadSource.workload`.
    """
    common: dict[str, Any] = {"jobs": jobs, "header": header, "horizon_s": settings.window_s}
    serving = {**common, "drain_s": settings.drain_s, "targets": settings.targets}
    shared = [name for name in settings.policies if name != "finetune_only"]
    loads = [
        (repeat, index, source.workload(rate, settings.arrivals_s, settings.seed + repeat))
        for repeat in range(settings.repeats)
        for index, rate in enumerate(settings.rates)
    ]
    warm_up = {**serving, "horizon_s": settings.window_s / 2, "drain_s": 0.0}
    run_workload(engine, loads[len(settings.rates) // 2][2], policy="co_serve", **warm_up)
    runs: list[RunRecord] = []

    def add(run: RunRecord) -> None:
        runs.append(run)
        on_run(run)

    for repeat, index, workload in loads:
        seed, rate = settings.seed + repeat, settings.rates[index]
        if "finetune_only" in settings.policies:
            alone = run_workload(engine, None, policy="finetune_only", seed=seed, **common)
            named = {**alone.header, "workload": workload.name}
            add(dataclasses.replace(alone, header=named))
        turn = (index + repeat) % len(shared) if shared else 0
        for policy in shared[turn:] + shared[:turn]:
            add(run_workload(engine, workload, policy=policy, rate=rate, seed=seed, **serving))
    return runs


def run_capped(
    engine: Engine,
    settings: SweepSettings,
    source: LoadSource,
    jobs: Sequence[FinetuneConfig],
    *,
    alone: Sequence[RunRecord] = (),
    header: Mapping[str, Any] | None = None,
) -> list[RunRecord]:
    """Runs inference alone, and co-serving with no gap to be longer than p99 of those it saw.

    In a sweep finetuning may save up time for a long step, as far as `SLO.itl_ms` of its targets
    allows; from these runs it can be read off what it gets done where it may not. Requests arrive
    for as long as it takes to have `SweepSettings.least_gaps`, in all repeats together.

    Args:
      engine: Idle; see `run_workload`.
      settings: What to run.
      source: Of the workloads.
      jobs: What is finetuned beside the requests.
      alone: Earlier runs; the gaps of those under inference alone count for the p99 of their rate.
      header: See `run_workload`.

    Returns:
      Two records a rate and repeat, in the order in which they ran.

    Raises:
      ValueError, JobStateError: See `run_workload` and `LoadSource.workload`.
    """
    common: dict[str, Any] = {"jobs": jobs, "header": header, "drain_s": settings.drain_s}
    runs: list[RunRecord] = []
    for rate in settings.rates:
        seen = [run for run in alone if (run.policy, run.rate) == ("inference_only", rate)]
        gaps_s = all_gaps_s(seen)
        for seed in range(settings.seed, settings.seed + settings.repeats):
            workload = _with_gaps(source, rate, settings, seed)
            seconds = workload.settings["seconds"] + settings.tail_s
            fields: dict[str, Any] = {"rate": rate, "seed": seed, "horizon_s": seconds, **common}
            targets = settings.targets
            base = run_workload(
                engine, workload, policy="inference_only", targets=targets, **fields
            )
            gaps_s += all_gaps_s([base])
            if gaps_s:
                targets = dataclasses.replace(targets, itl_ms=1e3 * percentile(gaps_s, 99))
            ours = run_workload(engine, workload, policy="co_serve", targets=targets, **fields)
            runs += [base, ours]
    return runs


def _with_gaps(source: LoadSource, rate: float, settings: SweepSettings, seed: int) -> Workload:
    """Requests that have a repeat's part of the gaps, or as many as there are.

    At least those of a run of the sweep.
    """
    seconds = settings.arrivals_s
    longest_s = math.inf if source.trace is None else (len(source.trace) - 1) / rate
    while True:
        workload = source.workload(rate, seconds, seed)
        found = sum((arrival.output_tokens or 1) - 1 for arrival in workload.arrivals)
        is_enough = found * settings.repeats >= settings.least_gaps
        if is_enough or not found or seconds >= longest_s:
            return workload
        # Lengths differ from request to request: a little more than it seems to take.
        seconds = min(1.1 * seconds * settings.least_gaps / (settings.repeats * found), longest_s)


def run_burst(
    engine: Engine,
    settings: SweepSettings,
    source: LoadSource,
    jobs: Sequence[FinetuneConfig],
    burst: Burst,
    *,
    policy: str = "co_serve",
    header: Mapping[str, Any] | None = None,
) -> RunRecord:
    """Runs a policy through a burst, as long after it as before.

    Raises:
      ValueError, JobStateError: See `run_workload` and `burst_arrivals`.
    """
    seconds = 2 * burst.start_s + burst.length_s
    return run_workload(
        engine,
        source.burst(burst, seconds, settings.seed),
        policy=policy,
        jobs=jobs,
        targets=settings.targets,
        rate=burst.base_rate,
        horizon_s=seconds,
        drain_s=settings.drain_s,
        seed=settings.seed,
        header=header,
    )


def save_run(path: Path | str, run: RunRecord, tier: Tier) -> RunSummary:
    """Adds a run, with its figures, to a file of JSON lines; returns the figures."""
    summary = summarize_run(run, (tier,))
    dataclasses.replace(run, summary=summary.as_dict()).save(path, append=True)
    return summary


def median_rows(summaries: Sequence[RunSummary], tier: str = TIER) -> tuple[CompareRow, ...]:
    """One row a policy and rate: medians over the repeats, each figure by itself.

    Raises:
      ValueError: If a run was not judged by `tier`.
    """
    groups: dict[tuple[str, float | None], list[CompareRow]] = collections.defaultdict(list)
    for row in compare_table(summaries, tier):
        groups[row.policy, row.rate].append(row)
    return tuple(_median_row(rows) for rows in groups.values())


def _median_row(rows: Sequence[CompareRow]) -> CompareRow:
    figures: dict[str, Any] = {}
    for field in dataclasses.fields(CompareRow):
        values = [getattr(row, field.name) for row in rows]
        if field.name in ("policy", "rate"):
            figures[field.name] = values[0]
        elif field.name == "num_requests":
            figures[field.name] = sum(values)
        else:
            known = [value for value in values if value is not None]
            figures[field.name] = statistics.median(known) if known else None
    return CompareRow(**figures)
