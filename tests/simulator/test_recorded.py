"""Devices and hosts made from recorded steps, and where optimizer steps take their time."""

import dataclasses
import statistics

import numpy as np
import pytest
from simulator_cases import COSTS, endless_job, make_engine, make_job, make_profile, make_workload

from flexjax.layout import Bucket
from flexjax.metrics import Tier, summarize_run
from flexjax.scheduler.features import EXTRA_TERMS, LatencySample, StepFeatures
from flexjax.simulator import (
    DeviceTimes,
    HostTimes,
    RecordedDevice,
    RecordedStep,
    SimulationOptions,
    Simulator,
    recorded_host,
    recorded_profile,
    simulate,
)
from flexjax.simulator.recorded import device_samples
from flexjax.slo import SLO
from flexjax.workload import Arrival, Workload

DECODE, TILE = Bucket(4, 0, 0, 0), Bucket(0, 0, 64, 4)
ABOUT = {"device": "test", "model": "test", "versions": {}, "sizes": {}}


@pytest.fixture(scope="module")
def profile():
    return make_profile()


def step(bucket=DECODE, ms=5.0, plan_ms=0.2, host_ms=0.7, **counts):
    return RecordedStep(StepFeatures(bucket, **counts), ms, plan_ms, host_ms)


def test_an_optimizer_step_counts_with_the_step_whose_time_it_took():
    steps = [step(num_optimizer_steps=1), step(TILE, ms=8.0), step(num_optimizer_steps=2), step()]
    samples = device_samples(steps)
    assert [s.features.num_optimizer_steps for s in samples] == [0, 1, 0, 2]
    assert [s.ms for s in samples] == [5.0, 8.0, 5.0, 5.0]
    assert [s.features.bucket for s in samples] == [DECODE, TILE, DECODE, DECODE]


def test_the_fit_tells_optimizer_steps_from_rows():
    """5 ms a step, and 3 ms more for every step after an optimizer step."""
    numbers = range(200)
    steps = [
        step(ms=8.0 if n % 5 == 1 else 5.0, num_optimizer_steps=int(n % 5 == 0)) for n in numbers
    ]
    fitted = recorded_profile([steps], **ABOUT).coefficients
    assert fitted.base_ms(DECODE) == pytest.approx(5.0, rel=0.01)
    optimizer_ms = fitted.extra_ms[EXTRA_TERMS.index("num_optimizer_steps")]
    assert optimizer_ms == pytest.approx(3.0, rel=0.01)


def test_host_times_are_medians():
    steps = [step(plan_ms=p, host_ms=h) for p, h in ((0.1, 0.5), (0.2, 0.9), (0.3, 30.0))]
    host = recorded_host([steps[:1], steps[1:]])
    assert (host.plan_ms, host.read_ms) == (0.2, 0.0)
    assert host.launch_ms == pytest.approx(0.7)


def test_reading_is_told_apart_where_it_was_recorded():
    steps = [dataclasses.replace(step(), read_ms=ms) for ms in (None, 0.1, 0.2, 40.0)]
    host = recorded_host([steps])
    assert (host.plan_ms, host.read_ms) == (0.2, 0.2)
    assert host.launch_ms == pytest.approx(0.3)
    assert host.total_ms == pytest.approx(0.7)


def test_remainders_are_those_of_the_kind_in_their_order():
    """Tiles vary by 30 %, decode steps take turns of slow and quick ones."""
    rng = np.random.default_rng(0)
    tiles = [step(TILE, ms=20.0 * float(np.exp(0.3 * rng.standard_normal()))) for _ in range(3000)]
    decodes = [step(ms=6.0 if n // 8 % 2 else 4.0) for n in range(3000)]
    device = RecordedDevice(recorded_profile([tiles, decodes], **ABOUT), seed=3)
    drawn = [device.ms(StepFeatures(TILE)) for _ in range(6000)]
    measured = [s.ms for s in tiles]
    for share in (5, 50, 95):
        assert np.percentile(drawn, share) == pytest.approx(
            np.percentile(measured, share), rel=0.05
        )
    assert statistics.fmean(drawn) == pytest.approx(statistics.fmean(measured), rel=0.03)
    paces = [device.ms(StepFeatures(DECODE)) for _ in range(320)]
    assert {round(ms, 6) for ms in paces} == {4.0, 6.0}
    changes = sum(a != b for a, b in zip(paces, paces[1:], strict=False))
    assert changes < 80  # alone, each would differ from the one before every second time: 160


def test_rare_kinds_draw_from_all_steps():
    decodes = [step(ms=5.0 * (1 + n % 3)) for n in range(300)]
    device = RecordedDevice(recorded_profile([decodes, [step(TILE, ms=10.0)]], **ABOUT))
    assert len({round(device.ms(StepFeatures(TILE)), 6) for _ in range(100)}) > 1


def test_tokens_do_not_wait_for_an_optimizer_step_but_the_next_step_does():
    costs = dataclasses.replace(COSTS, optimizer=40.0)
    profile = make_profile(costs)
    options = SimulationOptions(host=HostTimes(plan_ms=0, launch_ms=0, read_ms=0))
    workload = Workload("one", [Arrival(0.0, 20, 60)])
    run = simulate(workload, profile, make_engine(), "co_serve", [make_job()], options=options)
    done_s = [record.time_s for record in run.training]
    assert len(done_s) == 3
    for end_s in done_s:
        (own,) = [s for s in run.steps if s.end_s == end_s]
        (after,) = [s for s in run.steps if s.begin_s == end_s]
        assert own.measured_ms < 40.0 <= after.measured_ms
    assert set(done_s) & set(run.requests[0].token_times_s)


def record(simulator):
    """Notes the steps that a simulator's latency model is told of."""
    steps, observe = [], simulator.latency.observe

    def note(features, ms):
        steps.append(RecordedStep(features, ms, 0.2, 0.7))
        observe(features, ms)

    simulator.latency.observe = note
    return steps


def test_a_device_recorded_from_other_requests_foretells_a_run(profile):
    """The whole way of the check, on a device whose truth is known: 30 % slower, with noise."""
    slo, tier = SLO(ttft_ms=1_000.0, tpot_ms=25.0), Tier("own", 1.0, 0.025)
    host = HostTimes(plan_ms=0.2, launch_ms=0.5, read_ms=0.0)

    def run(device, seed):
        options = SimulationOptions(slo=slo, device=device, host=host)
        simulator = Simulator(profile, make_engine(), "co_serve", [endless_job()], options)
        for request_id, arrival in enumerate(make_workload(48, 6.0, seed).arrivals):
            simulator.submit(request_id, arrival)
        steps = record(simulator)
        simulator.run(8.0)
        names = ("command", "device", "workload", "model")
        about = {**dict.fromkeys(names, "test"), "versions": {}, "commit": None, "seed": seed}
        about |= {"policy": "co_serve", "rate": 6.0, "config": {}}
        return steps, summarize_run(simulator.run_record(about), [tier])

    def truth(seed):
        return DeviceTimes(profile, noise=0.15, factor=1.3, seed=seed)

    others = [run(truth(seed), seed)[0] for seed in (1, 2)]
    device = recorded_profile(others, **ABOUT)
    ratios = []
    for seed in (4, 5, 6):  # one alone may be 3 % off by chance
        _, measured = run(truth(seed), seed)
        _, foretold = run(RecordedDevice(device, seed=seed + 1), seed)
        attained = [s.requests.tiers[0].attainment for s in (measured, foretold)]
        assert attained[1] == pytest.approx(attained[0], abs=0.03)
        trained = [s.finetuning.backward_target_tokens_per_s for s in (measured, foretold)]
        ratios.append(trained[1] / trained[0])
    assert statistics.median(ratios) == pytest.approx(1.0, abs=0.03)
    assert all(0.9 < ratio < 1.1 for ratio in ratios)


def test_bad_input_is_refused(profile):
    with pytest.raises(ValueError, match="`runs` must be of at least one step; got 0"):
        recorded_profile([], **ABOUT)
    with pytest.raises(ValueError, match="`runs` must be of at least one step; got 0"):
        recorded_host([[]])
    with pytest.raises(ValueError, match="`profile` must be of at least one sample; got 0"):
        RecordedDevice(dataclasses.replace(profile, samples=()))
    with pytest.raises(ValueError, match="`seed` must be an integer >= 0; got -1"):
        RecordedDevice(profile, seed=-1)
    with pytest.raises(ValueError, match="`ms` must be a finite number above 0; got 0"):
        device_samples([step(ms=0.0)])
    assert isinstance(profile.samples[0], LatencySample)
