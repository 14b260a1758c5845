"""The simulated engine: conservation, the scheduler's books, determinism, noise, policies."""

import dataclasses
import math

import pytest
from simulator_cases import (
    COSTS,
    endless_job,
    make_engine,
    make_job,
    make_profile,
    make_workload,
)

from flexjax.layout import Bucket
from flexjax.metrics import Tier, measured_window, summarize_run
from flexjax.scheduler.features import StepFeatures
from flexjax.simulator import (
    DeviceTimes,
    HostTimes,
    SimulatedJob,
    SimulationOptions,
    Simulator,
    simulate,
)
from flexjax.slo import NO_SLO, SLO
from flexjax.workload import Arrival, Workload

NO_HOST = HostTimes(plan_ms=0, launch_ms=0, read_ms=0)


@pytest.fixture(scope="module")
def profile():
    return make_profile()


def one_request(prompt, output, **fields):
    return Workload("one", [Arrival(0.5, prompt, output, **fields)])


@pytest.mark.parametrize("policy", ["co_serve", "temporal:4", "spatial:0.5", "finetune_only"])
def test_every_request_ends_once_and_every_row_is_trained(profile, policy):
    workload = make_workload()
    jobs = [make_job("first"), make_job("second", epochs=2), make_job("third")]
    run = simulate(workload, profile, make_engine(), policy, jobs)
    assert [r.request_id for r in run.requests] == list(range(30))
    for request, arrival in zip(run.requests, workload.arrivals, strict=True):
        assert request.status == "finished" and request.finish_reason == "length"
        assert len(request.token_times_s) == request.output_tokens == arrival.output_tokens
        assert request.due_s == arrival.arrival_s
        assert request.due_s <= request.admitted_s < request.token_times_s[0]
        assert len(set(request.token_times_s)) == len(request.token_times_s)
    rows = sum(job.config.epochs * sum(job.lengths) for job in jobs)
    for name, steps in {"first": 3, "second": 6, "third": 3}.items():
        records = [r for r in run.training if r.job == name]
        assert [r.step for r in records] == list(range(1, steps + 1))
    assert sum(r.tokens for r in run.training) == rows
    targets = sum(job.config.epochs * sum(n - 1 for n in job.lengths) for job in jobs)
    assert sum(r.target_tokens for r in run.training) == targets
    # A group that lost its pages starts over: never fewer rows than the sequences have.
    assert sum(s.forward_rows for s in run.steps) >= rows
    assert sum(s.backward_target_tokens for s in run.steps) >= targets


def test_without_evictions_each_row_goes_once(profile):
    run = simulate(make_workload(), profile, make_engine(), "co_serve", [make_job(epochs=3)])
    assert sum(s.forward_rows for s in run.steps) == 3 * 695
    assert sum(s.backward_rows for s in run.steps) == 3 * 695
    assert sum(s.backward_target_tokens for s in run.steps) == pytest.approx(3 * 690)
    assert sum(s.prefill_rows for s in run.steps) == sum(r.prompt_tokens for r in run.requests)
    sampled = sum(r.output_tokens - 1 for r in run.requests)
    assert sum(s.decode_rows for s in run.steps) == sampled


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("policy", ["co_serve", "dynamic_temporal", "spatial:0.25"])
def test_the_books_balance_after_each_step_on_few_pages(profile, policy, seed):
    """Preemptions and evictions included: pages cover a fraction of what is asked for."""
    engine = make_engine(num_pages=80, arena_pages=64)
    options = SimulationOptions(device=DeviceTimes(profile, noise=0.3, seed=seed))
    simulator = Simulator(profile, engine, policy, [endless_job()], options)
    workload = make_workload(60, rate=40.0, seed=seed)
    for request_id, arrival in enumerate(workload.arrivals):
        simulator.submit(request_id, arrival)
    num_steps = 0
    while simulator.num_alive and num_steps < 20_000:
        if not simulator.step():
            simulator.now_s += 0.01
        simulator.scheduler.check_integrity()
        num_steps += 1
    records = simulator.request_records()
    assert {r.status for r in records} == {"finished"} and len(records) == 60
    assert all(len(r.token_times_s) == r.output_tokens for r in records)
    assert sum(r.num_preemptions for r in records) > 0
    assert num_steps > 300


def test_times_of_a_lone_request_are_those_of_the_profile(profile):
    """Prefill, then one decode step a token; step k + 1 begins when step k ends."""
    options = SimulationOptions(host=NO_HOST)
    run = simulate(one_request(20, 6), profile, make_engine(), "inference_only", options=options)
    (request,) = run.requests
    times_s = (request.due_s, *request.token_times_s)
    took_ms = [1e3 * (b - a) for a, b in zip(times_s, times_s[1:], strict=False)]
    assert len(run.steps) == 6
    assert took_ms == pytest.approx([step.measured_ms for step in run.steps])
    # From the costs: the fixed one, the weights, and a head of one row.
    least = COSTS.fixed + COSTS.forward_floor + COSTS.head_floor + COSTS.head_row
    for ms, rows in zip(took_ms[1:], range(21, 26), strict=True):
        assert ms == pytest.approx(least + COSTS.decode_kv * rows, rel=0.02)


def test_host_hides_behind_the_device_or_sets_the_pace(profile):
    def pace_ms(host_ms):
        host = HostTimes(plan_ms=host_ms / 2, launch_ms=host_ms / 4, read_ms=host_ms / 4)
        options = SimulationOptions(host=host)
        workload, engine = one_request(20, 50), make_engine()
        run = simulate(workload, profile, engine, "inference_only", options=options)
        return 1e3 * sorted(run.requests[0].itl_s)[25]

    assert pace_ms(2.0) == pytest.approx(pace_ms(0.0), rel=0.01)
    assert pace_ms(40.0) == pytest.approx(40.0)


def test_rows_launched_ahead_of_an_early_stop_are_wasted(profile):
    """The scheduler does not know when a request stops: one more row is on its way by then."""
    options = SimulationOptions(max_output_tokens=100)
    run = simulate(one_request(20, 6), profile, make_engine(), "co_serve", options=options)
    (request,) = run.requests
    assert (request.finish_reason, len(request.token_times_s)) == ("stop", 6)
    assert request.output_tokens == 100 and request.is_complete
    assert sum(s.decode_rows for s in run.steps) == 6  # 5 for its tokens, 1 in vain


def test_the_context_ends_a_request_and_refuses_a_prompt(profile):
    arrivals = [Arrival(0.0, 500, 40), Arrival(0.1, 512, 3), Arrival(0.2, 511, 1)]
    run = simulate(Workload("long", arrivals), profile, make_engine())
    full, refused, fitting = run.requests
    assert (full.status, len(full.token_times_s), full.is_complete) == ("finished", 12, False)
    assert (refused.status, refused.token_times_s) == ("refused", ())
    assert fitting.is_complete


def test_the_same_seed_gives_the_same_run(profile):
    def run(seed, noise=0.1):
        device = DeviceTimes(profile, noise=noise, seed=seed)
        options = SimulationOptions(device=device)
        jobs = [endless_job()]
        return simulate(
            make_workload(),
            profile,
            make_engine(),
            "co_serve",
            jobs,
            options=options,
            measure_s=2,
            drain_s=0,
        )

    def facts(run):
        return run.requests, run.steps, [(r.time_s, r.tokens) for r in run.training]

    assert facts(run(1)) == facts(run(1))
    assert facts(run(1)) != facts(run(2))
    assert facts(run(1, noise=0.0)) == facts(run(2, noise=0.0))


def test_noise_has_the_median_and_spread_that_were_asked_for(profile):
    plain, noisy = DeviceTimes(profile), DeviceTimes(profile, noise=0.2, factor=1.5, seed=7)
    features = StepFeatures(Bucket(4, 0, 0, 0), decode_rows=3)
    base = plain.ms(features)
    logs = sorted(math.log(noisy.ms(features) / base) for _ in range(9_000))
    assert logs[4_500] == pytest.approx(math.log(1.5), abs=0.02)
    spread = math.sqrt(sum((x - math.log(1.5)) ** 2 for x in logs) / len(logs))
    assert spread == pytest.approx(0.2, rel=0.05)


def test_targets_hold_on_a_device_slower_than_its_profile(profile):
    """The latency model learns the factor; finetuning pays for it, not the requests."""
    slo = SLO(ttft_ms=2_000.0, tpot_ms=25.0)
    trained = {}
    for factor in (1.0, 1.6):
        device = DeviceTimes(profile, noise=0.05, factor=factor, seed=1)
        options = SimulationOptions(slo=slo, device=device)
        run = simulate(
            make_workload(45, rate=3.0),
            profile,
            make_engine(),
            "co_serve",
            [endless_job()],
            options=options,
            measure_s=15,
        )
        summary = summarize_run(run, [Tier("own", 2.0, 0.025)])
        assert summary.requests.tiers[0].attainment >= 0.95
        trained[factor] = summary.finetuning.forward_tokens_per_s
        error = summary.device.model_error
        assert abs(error.bias) < 0.03
    assert 0 < trained[1.6] < trained[1.0]


def test_policies_order_as_their_definitions_say(profile):
    slo = SLO(ttft_ms=1_000.0, tpot_ms=30.0)
    workload, engine = make_workload(48, rate=4.0), make_engine()

    def summary(policy):
        device = DeviceTimes(profile, noise=0.05, seed=2)
        options = SimulationOptions(slo=slo, device=device)
        run = simulate(
            workload, profile, engine, policy, [endless_job()], options=options, measure_s=12
        )
        assert measured_window(run) == (0.0, 12)
        return summarize_run(run, [Tier("own", 1.0, 0.030)])

    alone, both = summary("inference_only"), summary("co_serve")
    rare, often = summary("temporal:512"), summary("temporal:64")
    trained = [s.finetuning.forward_tokens_per_s for s in (alone, rare, often, both)]
    assert trained == sorted(trained) and trained[0] == 0 < trained[1] < trained[3]
    attained = {
        name: s.requests.tiers[0].attainment
        for name, s in (("alone", alone), ("both", both), ("rare", rare), ("often", often))
    }
    assert attained["alone"] == max(attained.values()) and attained["both"] >= 0.97
    # No gap is longer than the TPOT target, but for the device's noise of 5 % (four of them).
    assert both.requests.itl_s.max < 1.2 * 0.030
    assert alone.requests.tpot_s.mean < both.requests.tpot_s.mean


def test_records_can_be_thinned_and_totals_stay(profile):
    def simulator(every):
        options = SimulationOptions(slo=NO_SLO, record_every=every)
        made = Simulator(profile, make_engine(), "co_serve", [endless_job()], options)
        for request_id, arrival in enumerate(make_workload().arrivals):
            made.submit(request_id, arrival)
        made.run(3.0)
        return made.recording

    every, some, none = simulator(1), simulator(7), simulator(0)
    assert some.steps == every.steps[::7] and none.steps == []
    assert every.totals == some.totals == none.totals
    ended = [s for s in every.steps if s.end_s <= 3.0]
    totals = every.totals
    assert totals.num_steps == len(ended)
    assert totals.forward_rows == sum(s.forward_rows for s in ended)
    assert totals.backward_rows == sum(s.backward_rows for s in ended)
    worth = math.fsum(s.backward_target_tokens for s in ended)
    assert totals.backward_target_tokens == pytest.approx(worth)
    times_s = [t for r in every.requests for t in r.token_times_s if t <= 3.0]
    assert totals.output_tokens == len(times_s)


def test_time_that_runs_out_leaves_requests_unfinished(profile):
    workload = Workload("two", [Arrival(0.0, 10, 400), Arrival(0.2, 10, 400), Arrival(9.0, 1, 1)])
    engine = make_engine()
    run = simulate(workload, profile, engine, "inference_only", measure_s=0.5, drain_s=0.0)
    assert [r.status for r in run.requests] == ["unfinished", "unfinished"]  # the third was not due
    assert 0 < len(run.requests[0].token_times_s) < 400
    assert run.measured_until_s == 0.5
    drained = simulate(workload, profile, engine, "inference_only", measure_s=0.5)
    assert [r.status for r in drained.requests] == ["finished"] * 3


def test_jobs_wait_for_one_another(profile):
    engine = make_engine(max_jobs=1)
    run = simulate(one_request(5, 5), profile, engine, "co_serve", [make_job("x"), make_job("y")])
    assert [r.job for r in run.training] == ["x"] * 3 + ["y"] * 3


def test_given_targets_and_evaluations_are_counted(profile):
    config = make_job(batch_size=3).config
    job = SimulatedJob(config, (40, 30, 20), target_counts=(7, 0, 19), eval_lengths=(25,))
    run = simulate(one_request(5, 5), profile, make_engine(), "co_serve", [job])
    (record,) = run.training
    assert (record.tokens, record.target_tokens) == (90, 26)
    assert math.isnan(record.loss)
    assert sum(s.forward_rows for s in run.steps) == 90 + 25


def test_a_run_can_be_saved_and_loaded(profile, tmp_path):
    run = simulate(make_workload(10), profile, make_engine(), "co_serve", [make_job()])
    run.save(tmp_path / "run.jsonl")
    loaded = type(run).load(tmp_path / "run.jsonl")
    assert (loaded.header, loaded.requests, loaded.steps) == (run.header, run.requests, run.steps)
    assert "simulated" in run.device_name and run.rate == 8.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_pages": 10}, "`num_pages` must be at least 64"),
        ({"arena_pages": 10}, "`arena_pages` must be at least 64"),
        ({"max_running": 17}, "`ladder.max_decode` must be at least"),
        ({"tile_order": "diagonal"}, "`tile_order` must be one of"),
    ],
)
def test_engines_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_engine(**change)


def test_bad_input_is_refused(profile):
    engine = make_engine()
    with pytest.raises(ValueError, match="`arrival` must be of known lengths"):
        simulate(Workload("w", [Arrival(0.0)]), profile, engine)
    with pytest.raises(ValueError, match="`slo_class` must be one of interactive, batch"):
        simulate(one_request(1, 1, slo_class="gold"), profile, engine)
    with pytest.raises(ValueError, match="`lengths` must be at most `max_context_len`=512"):
        simulate(one_request(1, 1), profile, engine, "co_serve", [make_job(lengths=(513,))])
    with pytest.raises(ValueError, match="`max_jobs` must be at least 1"):
        unable = make_engine(max_jobs=0)
        simulate(one_request(1, 1), profile, unable, "co_serve", [make_job()])
    with pytest.raises(ValueError, match="`adapter` must be at most 7 names"):
        arrivals = [Arrival(float(i), 1, 1, f"a{i}") for i in range(8)]
        simulate(Workload("w", arrivals), profile, engine, "co_serve", [make_job()])
    with pytest.raises(ValueError, match="`policy` must be one of"):
        simulate(one_request(1, 1), profile, engine, "greedy")
    with pytest.raises(ValueError, match="`target_counts` must be below"):
        SimulatedJob(make_job().config, (4,), target_counts=(4,))
    with pytest.raises(ValueError, match="`noise` must be a finite number >= 0; got -1"):
        DeviceTimes(profile, noise=-1)
    with pytest.raises(ValueError, match="`record_every` must be an integer >= 0; got -1"):
        SimulationOptions(record_every=-1)
    simulator = Simulator(profile, engine)
    simulator.submit(0, Arrival(2.0, 1, 1))
    with pytest.raises(ValueError, match="`arrival_s` must be at least 2.0"):
        simulator.submit(1, Arrival(1.0, 1, 1))


def test_a_profile_must_cover_the_engine(profile):
    serving = dataclasses.replace(
        profile.coefficients,
        measured_ms=tuple(x for x in profile.coefficients.measured_ms if not x[0].window),
    )
    with pytest.raises(ValueError, match="`profile` must be of measured steps like all"):
        Simulator(dataclasses.replace(profile, coefficients=serving), make_engine())
