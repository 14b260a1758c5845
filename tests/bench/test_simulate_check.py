"""The simulator held against the engine: what is run, what is pooled, and what counts as near."""

import dataclasses
import math

import pytest
from helpers import make_engine, text_of, tiny_config, tiny_weights

from flexjax.bench import sim_check
from flexjax.bench.loads import LoadSource, constant_lengths
from flexjax.bench.paced import paced
from flexjax.bench.serving import run_workload
from flexjax.bench.sim_check import (
    CheckSettings,
    compare,
    device_profile,
    run_engine,
    simulate_case,
    simulated_job,
    start_profile,
)
from flexjax.bench.sim_report import ComparedRow, Figures, comparison_markdown
from flexjax.bench.simulate import simulated_engine
from flexjax.config import FinetuneConfig, LoraConfig
from flexjax.scheduler.features import RooflineCosts
from flexjax.scheduler.latency_profile import synthetic_profile
from flexjax.simulator import (
    DeviceTimes,
    RecordedDevice,
    SimulationOptions,
    Simulator,
    recorded_host,
)
from flexjax.slo import NO_SLO, SLO
from flexjax.workload import Arrival, Workload

ROWS = [
    {"prompt": text_of(range(n, n + 4)), "completion": text_of(range(n + 4, n + 10))}
    for n in range(6)
]
JOB = FinetuneConfig(adapter="job", dataset=ROWS, lora=LoraConfig(r=2, alpha=4.0), batch_size=2)
SOURCE = LoadSource(name="poisson", lengths=constant_lengths(10, 6))
SETTINGS = CheckSettings(
    policies=("co_serve", "inference_only"),
    rates=(8.0,),
    targets=SLO(ttft_ms=60_000.0, tpot_ms=60_000.0),
    window_s=0.5,
    repeats=2,
    num_simulations=1,
    seed=3,
)


@pytest.fixture(scope="module")
def engine():
    config = tiny_config()
    return make_engine(config, tiny_weights(config))


@pytest.fixture(scope="module")
def cases(engine):
    return run_engine(engine, SETTINGS, SOURCE, [JOB])


def test_every_policy_runs_with_every_seed_on_the_same_requests(cases):
    ran = sorted((case.policy, case.rate, case.seed) for case in cases)
    assert ran == sorted((p, 8.0, seed) for p in SETTINGS.policies for seed in (3, 4))
    for seed in (3, 4):
        first, second = (case.workload.arrivals for case in cases if case.seed == seed)
        assert first == second
    for case in cases:
        assert len(case.run.requests) == 4
        assert {request.status for request in case.run.requests} == {"finished"}
        told = [(s.features.decode_rows, s.features.prefill_rows, s.ms) for s in case.steps]
        kept = [(s.decode_rows, s.prefill_rows, s.measured_ms) for s in case.run.steps]
        assert told[: len(kept)] == kept
        assert all(0 <= step.plan_ms <= step.host_ms for step in case.steps)
    trained = {case.policy: bool(case.run.training) for case in cases}
    assert trained == {"co_serve": True, "inference_only": False}


def test_a_simulated_case_has_the_requests_and_rows_of_the_engine(engine, cases):
    (case,) = [c for c in cases if (c.policy, c.seed) == ("inference_only", 3)]
    device = RecordedDevice(device_profile(engine, cases))
    host = recorded_host([case.steps])
    run = simulate_case(engine, case, SETTINGS, [JOB], device=device, host=host)
    assert run.rate == 8.0 and run.policy == "inference_only"
    measured, simulated = case.run, run
    assert [r.due_s for r in simulated.requests] == pytest.approx(
        [r.due_s - measured.begin_s for r in measured.requests]
    )
    for ours, theirs in zip(simulated.requests, measured.requests, strict=True):
        assert len(ours.token_times_s) == len(theirs.token_times_s) == theirs.output_tokens
        assert (ours.ttft_target_ms, ours.status) == (theirs.ttft_target_ms, "finished")
    rows = [sum(s.prefill_rows for s in run.steps) for run in (measured, simulated)]
    assert rows == [40, 40]
    # A decode row a token after the first, whatever the speed; nothing was launched in vain.
    assert [sum(s.decode_rows for s in run.steps) for run in (measured, simulated)] == [20, 20]


def test_the_job_has_the_lengths_and_targets_of_the_dataset(engine):
    job = simulated_job(engine, JOB)
    assert len(job.lengths) == 6 and len(set(job.lengths)) == 1
    assert job.target_counts is not None
    assert set(job.target_counts) == {7}  # six tokens of the completion, and its end
    assert job.lengths[0] == 4 + 7
    assert job.config.max_steps == 10**9 and job.config.schedule == "constant"


def test_the_scheduler_starts_from_the_engines_own_fit(engine):
    assert start_profile(engine).coefficients == engine.latency.coefficients


def test_a_case_is_simulated_from_the_other_seeds_alone(engine, cases, monkeypatch):
    """Steps that are ten times as slow in one seed slow the simulation of the other."""
    slowed = [
        dataclasses.replace(
            case, steps=tuple(dataclasses.replace(s, ms=10 * s.ms) for s in case.steps)
        )
        if case.seed == 4
        else case
        for case in cases
    ]
    seen = []
    simulate = sim_check.simulate

    def note(*args, **options):
        run = simulate(*args, **options)
        seen.append((run.header["seed"], [s.measured_ms for s in run.steps]))
        return run

    monkeypatch.setattr(sim_check, "simulate", note)
    settings = dataclasses.replace(SETTINGS, policies=("inference_only",))
    compare(engine, slowed, settings, [JOB])
    mean_ms: dict[int, float] = {}
    for seed, ms in seen:  # first as the other seeds were, later as the run itself was on average
        mean_ms.setdefault(seed, math.fsum(ms) / len(ms))
    assert mean_ms[3] > 3 * mean_ms[4]


def launched(features):
    """What decides a step, apart from its time."""
    return dataclasses.astuple(features)


@pytest.mark.parametrize("policy", ["inference_only", "co_serve", "temporal:4", "spatial:0.5"])
def test_without_targets_the_simulator_plans_the_very_steps_of_the_engine(engine, policy):
    """Requests that all come at once leave nothing to the clock."""
    arrivals = [Arrival(0.0, 3 + 7 * n, 4 + 3 * n) for n in range(9)]
    workload, jobs, events = Workload("at once", arrivals), [JOB], []
    run_workload(engine, workload, policy=policy, jobs=jobs, on_step=events.append)
    simulator = Simulator(
        start_profile(engine),
        simulated_engine(engine.model, engine.config, "cpu"),
        policy,
        [simulated_job(engine, JOB)],
        SimulationOptions(slo=NO_SLO),
    )
    told = []
    observe = simulator.latency.observe

    def note(features, ms):
        told.append(features)
        observe(features, ms)

    simulator.latency.observe = note
    for request_id, arrival in enumerate(arrivals):
        simulator.submit(request_id, arrival)
    while simulator.num_alive:
        simulator.step()
    ours = [launched(features) for features in told]
    theirs = [launched(event.features) for event in events]
    count = min(len(ours), len(theirs))
    assert count > 25 and abs(len(ours) - len(theirs)) <= 1
    assert ours[:count] == theirs[:count]


def slow_profile(engine, **costs):
    """A device of which every step takes tens of milliseconds."""
    ladder = simulated_engine(engine.model, engine.config, "cpu").ladder
    return synthetic_profile(ladder, RooflineCosts(fixed=40.0, **costs), context_len=96)


def test_a_paced_engine_has_tokens_when_the_device_would(engine):
    device, launch = DeviceTimes(slow_profile(engine)), engine._runner.launch
    workload, events = Workload("one", [Arrival(0.0, 5, 6)]), []
    with paced(engine, device) as pace:
        run = run_workload(engine, workload, policy="co_serve", jobs=[JOB], on_step=events.append)
    assert engine._runner.launch == launch
    assert pace.num_steps >= len(events) > 5
    assert {r.status for r in run.requests} == {"finished"}
    # All together: when one begins is noted late where the host is not given a core in time.
    took_ms = sum(1e3 * (event.end_s - event.begin_s) for event in events)
    found = [event.features for event in events]
    assert took_ms > 0.98 * sum(device.ms(f) - device.tail_ms(f) for f in found)
    assert min(run.requests[0].itl_s) > 0.040


def test_an_optimizer_step_takes_the_time_of_the_step_after_it(engine):
    device = DeviceTimes(slow_profile(engine, optimizer=60.0))
    events = []
    with paced(engine, device):
        run_workload(
            engine,
            None,
            policy="co_serve",
            jobs=[JOB],
            horizon_s=4.0,  # of real time: a machine may stand still for a second
            drain_s=0.0,
            on_step=events.append,
        )
    pairs = list(zip(events, events[1:], strict=False))
    after = [b for a, b in pairs if a.features.num_optimizer_steps]
    assert after
    for event in after:
        assert 1e3 * (event.end_s - event.begin_s) > 99.0


def test_paced_runs_are_simulated_on_the_same_device(engine):
    profile = slow_profile(engine)
    settings = dataclasses.replace(SETTINGS, policies=("co_serve",), rates=(6.0,))
    cases = run_engine(engine, settings, SOURCE, [JOB], profile=profile)
    assert all(case.pace is not None and case.pace.num_steps for case in cases)
    comparison = compare(engine, cases, settings, [JOB], profile=profile)
    (row,) = comparison.rows
    assert row.matched is None and comparison.late_share is not None
    assert row.simulator.num_runs == 2
    # Steps of 45 ms or more: were they simulated from the fit of this engine, they took 5 ms.
    assert row.engine.step_ms > 40 and row.simulator.step_ms > 40


def test_figures_are_pooled_and_judged(engine, cases):
    rows = []
    comparison = compare(engine, cases, SETTINGS, [JOB], on_row=rows.append)
    assert list(comparison.rows) == rows and len(rows) == 2
    both, alone = rows
    assert (both.policy, alone.policy) == ("co_serve", "inference_only")
    assert both.engine.num_runs == both.simulator.num_runs == 2
    assert both.engine.num_requests == both.simulator.num_requests == 8
    assert both.engine.attainment == both.simulator.attainment == 1.0
    ratio = both.simulator.tokens_per_s / both.engine.tokens_per_s
    assert both.share(both.simulator) == pytest.approx(ratio - 1)
    assert alone.engine.tokens_per_s == alone.simulator.tokens_per_s == 0
    assert alone.share(alone.simulator) is None
    listed = comparison.as_dict()
    assert listed["passed"] is comparison.passed and len(listed["rows"]) == 2
    assert listed["rows"][0]["matched"]["share"] == both.share(both.matched)
    assert listed["late_share"] is None and len(both.levels) == 2
    text = comparison_markdown(comparison)
    assert "| inference_only | 8 | 8 | 100.0% ± 0.0 | 100.0% | +0.0 (+0.0) | - | - | - |" in text


@pytest.mark.parametrize(
    ("attainment", "trained", "is_near"),
    [(0.915, 104.9, True), (0.879, 100.0, False), (0.9, 94.9, False), (0.9, 100.0, True)],
)
def test_a_row_is_near_within_two_points_and_five_percent(attainment, trained, is_near):
    def figures(attainment, trained):
        return Figures(1, 1, attainment, trained, trained, None, None, 1.0, 1.0)

    engine, simulated = figures(0.9, 100.0), figures(attainment, trained)
    row = ComparedRow("co_serve", 1.0, engine, simulated, None, (), 0.0, None)
    assert row.is_near(simulated) is is_near and row.is_near(engine)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repeats": 1}, "`repeats` must be at least 2; got 1"),
        ({"rates": ()}, "`rates` must be not empty and without repetitions"),
        ({"rates": (-1.0,)}, "`rates` must be numbers > 0; got -1.0"),
        ({"policies": ("co_serve", "co_serve")}, "`policies` must be not empty and without"),
        ({"targets": SLO(ttft_ms=5.0)}, "`targets` must be an SLO with TTFT and TPOT"),
        ({"num_simulations": 0}, "`num_simulations` must be at least 1; got 0"),
        ({"window_s": 0.0}, "`window_s` must be > 0; got 0.0"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **change)
