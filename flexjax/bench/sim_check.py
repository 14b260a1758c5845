"""Holds the simulator against the engine: the same requests, policy and jobs on both.

The engine runs every policy at every rate with requests of several seeds, all interleaved. There
are two ways. *Paced*: its steps last as a given profile says, and so do the simulator's; what is
compared is everything else. *Unpaced*: a seed is simulated on the device and the host that the
runs of the *other* seeds recorded, so that nothing of a run goes into its own simulation; then the
machine's drift between runs is part of the difference. In both, the scheduler's latency model
starts from the fit that the engine started with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax

from flexjax.bench.loads import LoadSource
from flexjax.bench.paced import Pace, paced
from flexjax.bench.policies import check_sweep_fields, tier_of
from flexjax.bench.serving import run_workload
from flexjax.bench.sim_report import ComparedRow, Comparison, compare_row
from flexjax.bench.simulate import simulated_engine
from flexjax.config import FinetuneConfig
from flexjax.engine.engine import Engine
from flexjax.engine.pipeline import StepEvent
from flexjax.engine.sizing import Sizing
from flexjax.io.dataset import load_dataset
from flexjax.metrics import RunRecord, RunSummary, summarize_run
from flexjax.metrics.checks import require
from flexjax.scheduler.latency_profile import LatencyProfile, profile_sizes
from flexjax.simulator import (
    DeviceTimes,
    HostTimes,
    RecordedDevice,
    RecordedStep,
    SimulatedJob,
    SimulationOptions,
    recorded_host,
    recorded_profile,
    simulate,
)
from flexjax.slo import SLO
from flexjax.workload import Workload

MOST_LATE = 0.05
"""Share of steps of a paced run that may be computed too late; the run is repeated otherwise."""
_MOST_TRIES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckSettings:
    """What is run on both sides.

    Attributes:
      policies: Names, as `make_policy` takes them.
      rates: Offered loads, requests per second.
      targets: Latency targets; both are needed.
      window_s: Seconds of a run over which rates are averaged.
      drain_s: Seconds that answers may take after it.
      repeats: Seeds; at least two, for each is simulated from the others.
      num_simulations: Simulations of each run, with different draws of the device's remainders;
        paced runs need no more than one.
      noise: Of a paced device; see `DeviceTimes`. Both sides draw the same.
      seed: The first seed.

    Raises:
      ValueError: If a list is empty or repeats itself, or a number is out of range.
    """

    policies: Sequence[str] = ("co_serve", "temporal:64", "inference_only")
    rates: Sequence[float]
    targets: SLO
    window_s: float = 10.0
    drain_s: float = 3.0
    repeats: int = 3
    num_simulations: int = 3
    noise: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_sweep_fields(self.policies, self.rates, self.targets, self.window_s)
        require(self.drain_s >= 0, "drain_s", ">= 0", self.drain_s)
        require(self.repeats >= 2, "repeats", "at least 2", self.repeats)
        require(self.num_simulations >= 1, "num_simulations", "at least 1", self.num_simulations)
        require(self.seed >= 0, "seed", ">= 0", self.seed)

    @property
    def seeds(self) -> range:
        """All seeds."""
        return range(self.seed, self.seed + self.repeats)


@dataclasses.dataclass(frozen=True)
class Case:
    """What one run on the engine was, and what came of it.

    Attributes:
      policy: Name of the policy.
      rate: Requests per second.
      seed: Of arrivals, lengths and prompts.
      workload: The requests.
      run: The engine's record.
      steps: All its steps, with what their times depend on.
      pace: How well the machine kept up with the paced device; None if it was not paced.
      num_dropped: Runs before this one that were dropped, because the machine did not keep up.
    """

    policy: str
    rate: float
    seed: int
    workload: Workload
    run: RunRecord
    steps: tuple[RecordedStep, ...]
    pace: Pace | None = None
    num_dropped: int = 0


def run_engine(
    engine: Engine,
    settings: CheckSettings,
    source: LoadSource,
    jobs: Sequence[FinetuneConfig],
    *,
    profile: LatencyProfile | None = None,
    header: Mapping[str, Any] | None = None,
    on_run: Callable[[Case], None] = lambda case: None,
) -> list[Case]:
    """Runs every policy at every rate with every seed, after a run that warms up.

    A paced run in which the machine did not keep up (`MOST_LATE`) is no run on the paced device; it
    is dropped and repeated, at most twice, before anything is compared.

    Args:
      engine: Idle; see `run_workload`.
      settings: What to run.
      source: Of the workloads.
      jobs: What is finetuned in every run.
      profile: Of the device that paces the steps; None for no pacing.
      header: See `run_workload`.
      on_run: Called with each case as soon as it is there.

    Raises:
      ValueError, JobStateError: See `run_workload` and `LoadSource.workload`.
    """
    options: dict[str, Any] = {"jobs": jobs, "targets": settings.targets, "header": header}
    options |= {"horizon_s": settings.window_s, "drain_s": settings.drain_s, "forget": True}
    loads = [
        (index, rate, seed, source.workload(rate, settings.window_s, seed))
        for seed in settings.seeds
        for index, rate in enumerate(settings.rates)
    ]
    run_workload(engine, loads[0][3], policy="co_serve", **options)
    cases: list[Case] = []
    for index, rate, seed, workload in loads:
        turn = (index + seed) % len(settings.policies)
        for policy in (*settings.policies[turn:], *settings.policies[:turn]):
            named = {"policy": policy, "rate": rate, "seed": seed}
            device = None if profile is None else partial(paced_device, profile, settings, seed)
            for num_dropped in range(_MOST_TRIES):
                run, steps, pace = _run_once(engine, workload, device, {**named, **options})
                case = Case(policy, rate, seed, workload, run, steps, pace, num_dropped)
                if pace is None or pace.late_share <= MOST_LATE:
                    break
            cases.append(case)
            on_run(case)
    return cases


def _run_once(
    engine: Engine,
    workload: Workload,
    device: Callable[[], DeviceTimes] | None,
    options: Mapping[str, Any],
) -> tuple[RunRecord, tuple[RecordedStep, ...], Pace | None]:
    events: list[StepEvent] = []
    with contextlib.ExitStack() as stack:
        pace = None if device is None else stack.enter_context(paced(engine, device()))
        run = run_workload(engine, workload, on_step=events.append, **options)
    return run, recorded_steps(events), pace


def paced_device(profile: LatencyProfile, settings: CheckSettings, seed: int) -> DeviceTimes:
    """The device of both sides in a paced run with a seed, from its first step on."""
    return DeviceTimes(profile, noise=settings.noise, seed=seed)


def recorded_steps(events: Sequence[StepEvent]) -> tuple[RecordedStep, ...]:
    """A run's steps, in order, as the simulator's device and host are made from them."""
    steps = []
    for number, event in enumerate(events):
        # While a step is planned the one before it is on the device; the one before that was read.
        read_ms = None
        if number >= 2:
            read_ms = max(0.0, 1e3 * (event.planned_s - events[number - 2].end_s))
        ms = 1e3 * (event.end_s - event.begin_s)
        plan_ms, host_ms = event.schedule_ms, event.host_ms
        steps.append(RecordedStep(event.features, ms, plan_ms, host_ms, read_ms))
    return tuple(steps)


def simulate_case(
    engine: Engine,
    case: Case,
    settings: CheckSettings,
    jobs: Sequence[FinetuneConfig],
    *,
    device: DeviceTimes,
    host: HostTimes,
) -> RunRecord:
    """Simulates what a case ran on the engine.

    Args:
      engine: That ran it; gives sizes and the scheduler's starting fit.
      case: What to simulate.
      settings: As the case was run with.
      jobs: As the case was run with.
      device: How long steps take.
      host: How long the host takes.
    """
    return simulate(
        case.workload,
        start_profile(engine),
        simulated_engine(engine.model, engine.config, jax.default_backend()),
        case.policy,
        [simulated_job(engine, config) for config in jobs],
        options=SimulationOptions(slo=settings.targets, device=device, host=host),
        measure_s=settings.window_s,
        drain_s=settings.drain_s,
        header={"rate": case.rate, "seed": case.seed},
    )


def start_profile(engine: Engine) -> LatencyProfile:
    """The fit that the engine's scheduler starts from."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = _about(engine)
    return LatencyProfile(**about, date=date, samples=(), coefficients=engine.latency.coefficients)


def device_profile(engine: Engine, cases: Sequence[Case]) -> LatencyProfile:
    """The formula fitted to the steps of cases.

    Raises:
      ValueError: If there are none.
    """
    return recorded_profile([case.steps for case in cases], **_about(engine))


def _about(engine: Engine) -> dict[str, Any]:
    config = engine.config
    sizing = Sizing.derive(engine.model, config, jax.default_backend())
    sizes = profile_sizes(
        sizing.ladder, page_size=config.page_size, kernels=config.kernels, dtype=sizing.dtype
    )
    kind = jax.devices()[0].device_kind
    return {"device": kind, "model": "engine", "versions": {}, "sizes": sizes, "source": "measured"}


def simulated_job(engine: Engine, config: FinetuneConfig) -> SimulatedJob:
    """A job by its lengths, without a last step, as `run_workload` runs it.

    Raises:
      ValueError: If the engine has no tokenizer.
      DatasetError: If a row cannot be used.
    """
    require(engine.tokenizer is not None, "engine", "one with a tokenizer", None)
    assert engine.tokenizer is not None
    context = Sizing.derive(engine.model, engine.config, jax.default_backend()).max_context_len
    rows = load_dataset(
        config.dataset,
        engine.tokenizer,
        max_seq_len=config.max_seq_len or context,
        overlong=config.overlong,
        vocab_size=engine.model.vocab_size,
    ).rows
    endless = dataclasses.replace(
        config, max_steps=10**9, schedule="constant", warmup_ratio=0.0, publish_every=0
    )
    return SimulatedJob(
        endless, [len(row.tokens) for row in rows], [row.num_targets for row in rows]
    )


def compare(
    engine: Engine,
    cases: Sequence[Case],
    settings: CheckSettings,
    jobs: Sequence[FinetuneConfig],
    *,
    profile: LatencyProfile | None = None,
    on_row: Callable[[ComparedRow], None] = lambda row: None,
) -> Comparison:
    """Simulates every case, and compares.

    Args:
      engine: That ran them; idle.
      cases: What `run_engine` returned.
      settings: As the cases were run with.
      jobs: As the cases were run with.
      profile: As the cases were run with.
      on_row: Called with each row once it is there.

    Raises:
      ValueError: If the cases are of fewer than two seeds.
    """
    seeds = sorted({case.seed for case in cases})
    require(len(seeds) >= 2, "cases", "of at least two seeds", seeds)
    others = {seed: [c for c in cases if c.seed != seed] for seed in seeds}
    hosts = {seed: recorded_host([c.steps for c in found]) for seed, found in others.items()}
    recorded = {seed: device_profile(engine, found) for seed, found in others.items()}
    tier = tier_of(settings.targets)

    def run(case: Case, device: DeviceTimes) -> RunSummary:
        host = hosts[case.seed]
        record = simulate_case(engine, case, settings, jobs, device=device, host=host)
        return summarize_run(record, (tier,))

    rows = []
    for policy in settings.policies:
        for rate in settings.rates:
            found = [c for c in cases if (c.policy, c.rate) == (policy, rate)]
            measured = [summarize_run(case.run, (tier,)) for case in found]
            levels = [RecordedDevice(recorded[c.seed]).level(c.steps) for c in found]
            matched: list[RunSummary] | None = None
            if profile is not None:
                simulated = [run(c, paced_device(profile, settings, c.seed)) for c in found]
            else:
                draws = [(c, draw) for c in found for draw in range(settings.num_simulations)]
                numbers = {c.seed: 1000 * c.seed for c in found}
                simulated = [
                    run(c, RecordedDevice(recorded[c.seed], seed=numbers[c.seed] + draw))
                    for c, draw in draws
                ]
                factors = {c.seed: level for c, level in zip(found, levels, strict=True)}
                matched = [
                    run(
                        c,
                        RecordedDevice(
                            recorded[c.seed], factor=factors[c.seed], seed=numbers[c.seed] + draw
                        ),
                    )
                    for c, draw in draws
                ]
            rows.append(compare_row(policy, rate, measured, simulated, matched, levels))
            on_row(rows[-1])
    steps = [case.steps for case in cases]
    noise = device_profile(engine, cases).coefficients.noise
    shares = [case.pace.late_share for case in cases if case.pace]
    late_share = math.fsum(shares) / len(shares) if shares else None
    num_dropped = sum(case.num_dropped for case in cases)
    return Comparison(tuple(rows), recorded_host(steps), noise, late_share, num_dropped)
