"""Measured runs: that records hold what happened, and that checks follow from the records."""

import dataclasses
import math

import numpy as np
import pytest
from helpers import make_engine, text_of, tiny_config, tiny_weights

from flexjax.bench.checks import check_burst, check_sweep
from flexjax.bench.loads import (
    Burst,
    LoadSource,
    constant_lengths,
    measure_capacity,
    measure_idle_itl_s,
)
from flexjax.bench.policies import (
    TIER,
    SweepSettings,
    median_rows,
    run_burst,
    run_sweep,
    save_run,
)
from flexjax.bench.serving import run_workload
from flexjax.config import FinetuneConfig, LoraConfig
from flexjax.metrics import RequestRecord, RunRecord, StepRecord, Tier, load_runs, summarize_run
from flexjax.slo import SLO
from flexjax.workload import Arrival, Workload

ROWS = [
    {"prompt": text_of(range(n, n + 4)), "completion": text_of(range(n + 4, n + 10))}
    for n in range(6)
]
JOB = FinetuneConfig(adapter="job", dataset=ROWS, lora=LoraConfig(r=2, alpha=4.0), batch_size=2)
LOOSE = SLO(ttft_ms=60_000.0, tpot_ms=60_000.0)


@pytest.fixture(scope="module")
def engine():
    config = tiny_config()
    return make_engine(config, tiny_weights(config))


def requests(*times, prompt=5, output=4):
    return Workload("hand-made", [Arrival(time_s, prompt, output) for time_s in times], 3)


def test_records_hold_every_request_step_and_batch(engine):
    workload = requests(0.0, 0.0, 0.01, 0.02, 0.3, prompt=20, output=7)
    run = run_workload(
        engine, workload, policy="co_serve", jobs=[JOB], targets=LOOSE, rate=10.0, seed=5
    )
    assert run.policy == "co_serve" and run.rate == 10.0
    assert run.header["workload"] == "hand-made" and run.header["targets"]["ttft_ms"] == 60_000
    assert [r.due_s - run.begin_s for r in run.requests] == pytest.approx([0, 0, 0.01, 0.02, 0.3])
    for request in run.requests:
        assert request.status == "finished" and request.is_complete
        assert len(request.token_times_s) == request.output_tokens == 7
        assert request.prompt_tokens == 20 and request.ttft_target_ms == 60_000
        assert request.due_s <= request.admitted_s <= request.token_times_s[0]
        assert run.begin_s < request.token_times_s[-1] <= run.end_s
    assert sum(step.prefill_rows for step in run.steps) == 5 * 20
    # A step is launched before the tokens of the one before are read: one row may be too many.
    assert 5 * 6 <= sum(step.decode_rows for step in run.steps) <= 5 * 7
    assert all(step.predicted_ms > 0 and step.host_ms > 0 for step in run.steps)
    assert [r.step for r in run.training] == list(range(1, len(run.training) + 1))
    worth = sum(step.backward_target_tokens for step in run.steps)
    trained = sum(record.target_tokens for record in run.training)
    rows = sum(step.backward_rows for step in run.steps)
    assert 0 < trained <= worth + 1e-6 and worth <= rows


def test_the_engine_serves_the_next_run_as_if_there_had_been_none(engine):
    num_programs = engine.num_programs
    runs = []
    for _ in range(2):
        runs.append(
            run_workload(engine, requests(0.0, 0.02), policy="co_serve", jobs=[JOB], forget=True)
        )
        assert engine.on_step is None
        assert engine.stats().num_running == engine.stats().num_waiting == 0
        assert "job" not in {info.name for info in engine.adapters()}
        engine.check_integrity()
    first, second = ([r.output_tokens for r in run.requests] for run in runs)
    assert first == second
    assert engine.num_programs == num_programs


def test_without_finetuning_and_without_requests(engine):
    run = run_workload(engine, requests(0.0, 0.1), policy="inference_only", jobs=[JOB])
    assert run.training == () and len(run.requests) == 2
    assert not any(step.forward_rows + step.backward_rows for step in run.steps)
    run = run_workload(engine, None, policy="finetune_only", jobs=[JOB], horizon_s=0.5)
    assert run.requests == () and len(run.training) > 0
    assert run.measured_until_s == pytest.approx(run.begin_s + 0.5)
    assert not any(step.decode_rows + step.prefill_rows for step in run.steps)
    assert summarize_run(run).finetuning.target_tokens_per_s > 0


def test_the_horizon_leaves_out_what_comes_later_and_keeps_what_is_not_answered(engine):
    workload = Workload("late", [Arrival(0.0, 5, 2), Arrival(0.299, 5, 90), Arrival(0.31, 5, 2)], 0)
    run = run_workload(engine, workload, policy="inference_only", horizon_s=0.3, drain_s=0.0)
    assert [r.status for r in run.requests] == ["finished", "unfinished"]
    assert len(run.requests[1].token_times_s) < 90
    assert run.measured_until_s == pytest.approx(run.begin_s + 0.3)
    again = run_workload(engine, workload, policy="inference_only", horizon_s=0.3, drain_s=60.0)
    assert [r.status for r in again.requests] == ["finished", "finished"]
    assert again.end_s < again.begin_s + 30


def test_what_cannot_run_is_refused_before_anything_runs(engine):
    steps = engine.stats().steps
    bad = Workload("none", [Arrival(0.0)], 0)
    with pytest.raises(ValueError, match="`workload` must have lengths; request 0"):
        run_workload(engine, bad, policy="co_serve")
    with pytest.raises(ValueError, match="`workload` must fit the context, 96 tokens; request 0"):
        run_workload(engine, requests(0.0, prompt=90, output=7), policy="co_serve")
    unknown = Workload("adapter", [Arrival(0.0, 1, 1, adapter="nobody")], 0)
    with pytest.raises(ValueError, match="`workload` must name loaded adapters.*'nobody'"):
        run_workload(engine, unknown, policy="co_serve")
    unknown = Workload("class", [Arrival(0.0, 1, 1, slo_class="royal")], 0)
    with pytest.raises(ValueError, match="`slo` must be an SLO or one of.*'royal'"):
        run_workload(engine, unknown, policy="co_serve")
    with pytest.raises(ValueError, match="`policy` must be one of"):
        run_workload(engine, requests(0.0), policy="fair")
    with pytest.raises(ValueError, match="`horizon_s` must be a number > 0 without a workload"):
        run_workload(engine, None, policy="finetune_only")
    with pytest.raises(ValueError, match="`horizon_s` must be a number > 0 or None; got -1"):
        run_workload(engine, requests(0.0), policy="co_serve", horizon_s=-1.0)
    with pytest.raises(ValueError, match="`drain_s` must be a number >= 0; got -2"):
        run_workload(engine, requests(0.0), policy="co_serve", drain_s=-2.0)
    output = engine.add_request([1, 2])
    with pytest.raises(ValueError, match="`engine` must be idle; got 1 requests and 0 jobs"):
        run_workload(engine, requests(0.0), policy="co_serve")
    engine.abort(output)
    assert engine.stats().steps == steps


@pytest.mark.parametrize("rate, seconds, count", [(10.0, 2.0, 20), (0.1, 1.0, 1), (3.3, 2.0, 7)])
@pytest.mark.parametrize("burstiness", [1.0, 0.25])
def test_loads_have_exactly_their_rate(rate, seconds, count, burstiness):
    source = LoadSource(name="load", lengths=constant_lengths(6, 3), burstiness=burstiness)
    workload = source.workload(rate, seconds, 1)
    times = [arrival.arrival_s for arrival in workload.arrivals]
    assert len(times) == count and times[0] == 0 and times[-1] < seconds
    assert {(a.prompt_tokens, a.output_tokens) for a in workload.arrivals} == {(6, 3)}
    assert source.workload(rate, seconds, 1) == workload
    if count > 2:
        assert source.workload(rate, seconds, 2) != workload


def test_a_trace_keeps_its_shape_and_lengths():
    trace = [Arrival(100.0 + n * n, n + 1, n + 2) for n in range(12)]
    workload = LoadSource(name="trace", trace=trace).workload(4.0, 2.0, 0)
    times = [arrival.arrival_s for arrival in workload.arrivals]
    first = workload.arrivals[0].prompt_tokens - 1
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    original = [2 * n + 1 for n in range(first, first + 7)]
    assert np.allclose(np.divide(gaps, gaps[0]), np.divide(original, original[0]))
    assert [a.output_tokens for a in workload.arrivals] == list(range(first + 2, first + 10))
    named = LoadSource(name="trace", trace=trace, adapters=["a", "b"], popularity="distinct")
    assert [a.adapter for a in named.workload(4.0, 1.0, 0).arrivals] == ["a", "b", "a", "b"]
    with pytest.raises(ValueError, match="`trace` must be at least 13 requests long"):
        LoadSource(name="trace", trace=trace).workload(6.0, 2.0, 0)
    with pytest.raises(ValueError, match="`lengths` must be given where the trace has none"):
        LoadSource(name="trace", trace=[Arrival(0.0)])


def test_a_sweep_runs_every_policy_under_the_same_requests(engine, tmp_path):
    settings = SweepSettings(
        policies=("co_serve", "inference_only", "spatial:0.5", "finetune_only"),
        rates=(5.0, 20.0),
        targets=LOOSE,
        window_s=0.5,
        tail_s=0.1,
        drain_s=30.0,
        repeats=2,
    )
    source = LoadSource(name="load", lengths=constant_lengths(6, 3))
    path = tmp_path / "runs.jsonl"
    summaries = []
    runs = run_sweep(
        engine, settings, source, [JOB],
        on_run=lambda run: summaries.append(save_run(path, run, settings.tier)),
    )  # fmt: skip
    assert [run.policy for run in runs] == [
        "finetune_only", "co_serve", "inference_only", "spatial:0.5",
        "finetune_only", "inference_only", "spatial:0.5", "co_serve",
        "finetune_only", "inference_only", "spatial:0.5", "co_serve",
        "finetune_only", "spatial:0.5", "co_serve", "inference_only",
    ]  # fmt: skip
    for rate, count in ((5.0, 2), (20.0, 8)):
        same = [run for run in runs if run.rate == rate]
        assert {len(run.requests) for run in same} == {count}
        offsets = [[r.due_s - run.begin_s for r in run.requests] for run in same[:3]]
        assert all(found == pytest.approx(offsets[0]) for found in offsets)
    loaded = load_runs(path)
    assert [run.requests for run in loaded] == [run.requests for run in runs]
    assert all(run.summary["policy"] == run.policy for run in loaded)
    rows = median_rows(summaries)
    assert len(rows) == 7 and {row.num_requests for row in rows} == {0, 4, 16}
    assert all(row.attainment == 1.0 for row in rows if row.rate is not None)
    middle = [s for s in summaries if (s.policy, s.rate) == ("spatial:0.5", 20.0)]
    row = next(row for row in rows if (row.policy, row.rate) == ("spatial:0.5", 20.0))
    assert row.output_tokens_per_s == pytest.approx(
        sum(summary.output_tokens_per_s for summary in middle) / 2
    )
    checks = {check.name: check for check in check_sweep(runs, settings.tier)}
    assert len(checks) == 5
    assert set(checks["no_policy_trains_more"].figures) == {"5", "20"}
    assert set(checks["finetuning_is_retained"].figures["trained"]) == {"5", "20"}
    assert set(checks["finetuning_is_retained"].figures["of_alone"]) == {"5", "20"}
    assert checks["latency_model_is_right"].figures["steps"] > 0


def test_a_burst_run_and_what_the_machine_can_do(engine):
    source = LoadSource(name="load", lengths=constant_lengths(6, 3))
    assert 0 < measure_idle_itl_s(engine, prompt_tokens=6, output_tokens=8) < 60
    capacity = measure_capacity(engine, source, num_requests=8, seed=0)
    assert 0 < capacity < math.inf
    settings = SweepSettings(rates=(4.0,), targets=LOOSE, drain_s=30.0)
    run = run_burst(engine, settings, source, [JOB], Burst(20.0, 5.0, 0.2, 0.2))
    assert run.measured_until_s == pytest.approx(run.begin_s + 0.6)
    assert all(s.planned_s is not None and s.planned_s <= s.begin_s for s in run.steps)
    check = check_burst(run, settings.tier, start_s=0.2, length_s=0.2)
    figures = check.figures
    assert figures["num_requests"] == len(run.requests) > figures["num_in_burst"] > 0
    assert figures["attainment"] == 1.0
    assert sum(figures["steps"]) == len(run.steps)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("rates", (), "`rates` must be not empty"),
        ("rates", (1.0, 1.0), "`rates` must be not empty and without repetitions"),
        ("rates", (0.0,), "`rates` must be numbers > 0; got 0.0"),
        ("targets", SLO(ttft_ms=1.0), "`targets` must be an SLO with TTFT and TPOT"),
        ("window_s", 0.0, "`window_s` must be > 0; got 0.0"),
        ("repeats", 0, "`repeats` must be at least 1; got 0"),
        ("least_gaps", 0, "`least_gaps` must be at least 1; got 0"),
    ],
)
def test_settings_that_cannot_run_are_refused(field, value, message):
    fields = {"rates": (1.0,), "targets": LOOSE, field: value}
    with pytest.raises(ValueError, match=message):
        SweepSettings(**fields)


# Checks on made-up runs.

HEADER = {
    "command": "test", "device": "none", "versions": {}, "commit": "none", "seed": 0,
    "workload": "made-up", "model": "none", "config": {},
}  # fmt: skip
JUDGED = Tier(TIER, 1.0, 0.1)


def step(begin_s, *, rows=0, ms=10.0, predicted_ms=10.0, worth=0.0):
    return StepRecord(
        begin_s=begin_s, end_s=begin_s + ms / 1e3, decode_rows=1, prefill_rows=0, forward_rows=0,
        backward_rows=rows, decode_bucket=4, chunk_bucket=0, window_bucket=rows, measured_ms=ms,
        host_ms=1.0, predicted_ms=predicted_ms, backward_target_tokens=worth,
    )  # fmt: skip


def request(number, due_s, *, first_s=0.1, gap_s=0.02):
    times = (due_s + first_s, due_s + first_s + gap_s, due_s + first_s + 2 * gap_s)
    return RequestRecord(number, None, None, due_s, 4, 3, times, "finished", "length")


def made_up(policy, rate, trained, *, late=0, gap_s=0.02, steps=None):
    """Ten seconds: a request a second, of which `late` come late, and `trained` tokens/s."""
    done = [request(n, 0.5 + n, first_s=2.0 if n < late else 0.1, gap_s=gap_s) for n in range(8)]
    made = steps or [step(float(n), rows=1000, worth=float(trained)) for n in range(10)]
    header = {**HEADER, "policy": policy, "rate": rate}
    return RunRecord(header, 0.0, 11.0, tuple(done), tuple(made), measured_until_s=10.0)


def sweep(**changes):
    """Runs that pass every check, but for the changes: (policy, rate) -> fields."""
    base = {
        "co_serve_1": (500, {}), "co_serve_2": (450, {}),
        "inference_only_1": (0, {}), "inference_only_2": (0, {}),
        "spatial_1": (505, {}), "spatial_2": (300, {}),
        "temporal_1": (400, {}), "temporal_2": (800, {"late": 3}),
    }  # fmt: skip
    runs = []
    for key, (trained, fields) in {**base, **changes}.items():
        policy, _, rate = key.rpartition("_")
        runs.append(made_up(policy, float(rate), trained, **fields))
    return runs


def verdicts(runs):
    return {check.name: check.passed for check in check_sweep(runs, JUDGED)}


def test_a_sweep_that_shows_what_it_should_passes_every_check():
    assert set(verdicts(sweep()).values()) == {True}
    figures = {check.name: check.figures for check in check_sweep(sweep(), JUDGED)}
    assert figures["no_policy_trains_more"]["1"] == {
        "co_serve": 500, "co_serve_attainment": 1.0, "best_rival": "spatial", "rival": 505,
        "rival_over_co_serve": 1.01, "as_measured": 1.01,
    }  # fmt: skip
    assert figures["no_fixed_policy_is_equal"]["spatial"] == {"2": "finetuning"}
    assert figures["no_fixed_policy_is_equal"]["temporal"]["2"] == "attainment"
    assert figures["finetuning_is_retained"]["retained"] == pytest.approx(0.9)
    assert {rate: f["ratio"] for rate, f in figures["interference_is_small"].items()} == (
        pytest.approx({"1": 1.0, "2": 1.0})
    )


@pytest.mark.parametrize(
    "name, changes",
    [
        ("no_policy_trains_more", {"spatial_2": (464, {})}),
        ("no_fixed_policy_is_equal", {"spatial_2": (440, {})}),
        ("finetuning_is_retained", {"co_serve_2": (420, {})}),
        ("interference_is_small", {"co_serve_2": (450, {"gap_s": 0.027})}),
        (
            "latency_model_is_right",
            {"co_serve_1": (0, {"steps": [step(float(n), ms=11.7) for n in range(10)]})},
        ),
    ],
)
def test_each_check_fails_by_what_it_is_about(name, changes):
    assert verdicts(sweep(**changes))[name] is False


@pytest.mark.parametrize("tail_s", [-0.1, 2.0, float("nan")])
def test_a_tail_must_leave_time_for_arrivals(tail_s):
    with pytest.raises(ValueError, match="`tail_s` must be >= 0 and below `window_s`=2; got"):
        SweepSettings(rates=(1.0,), targets=LOOSE, window_s=2.0, tail_s=tail_s)


def test_finetuning_is_held_against_what_the_machine_could_do_at_the_time():
    def figures(alone_1, alone_2):
        alone = [made_up("finetune_only", None, trained) for trained in (alone_1, alone_2)]
        ours = [run for run in sweep() if run.policy != "co_serve"]
        first, second = (run for run in sweep() if run.policy == "co_serve")
        checks = check_sweep([alone[0], first, alone[1], second, *ours], JUDGED)
        return next(check for check in checks if check.name == "finetuning_is_retained")

    slower = figures(1000, 600)
    assert slower.figures["retained"] == pytest.approx((450 / 600) / (500 / 1000))
    assert slower.figures["as_measured"] == pytest.approx(0.9)
    faster = figures(800, 1000)
    assert faster.figures["of_alone"] == pytest.approx({"1": 0.625, "2": 0.45})
    assert slower.passed and faster.passed is False


def paced(run, ms, count=10):
    """The run with steps of finetuning alone that took `ms`; small ones do not count."""
    large = {"decode_rows": 0, "forward_rows": 200, "chunk_bucket": 256}
    small = {**large, "forward_rows": 20, "chunk_bucket": 32}
    made = [dataclasses.replace(step(float(n), rows=8, ms=ms), **large) for n in range(count)]
    made += [dataclasses.replace(step(float(n), rows=8, ms=1.0), **small) for n in range(20)]
    return dataclasses.replace(run, steps=(*run.steps, *made))


def test_throughputs_are_compared_at_the_same_pace_of_the_machine():
    slow = {"co_serve": 20.0, "spatial": 10.0, "temporal": 10.0}

    def figures(count):
        runs = [
            paced(run, slow[run.policy], count) if run.policy in slow else run for run in sweep()
        ]
        alone = [made_up("finetune_only", None, 1000), made_up("finetune_only", None, 500)]
        alone = [paced(run, 10.0, count) for run in alone]
        runs = [
            alone[0],
            *[r for r in runs if r.rate == 1],
            alone[1],
            *[r for r in runs if r.rate == 2],
        ]
        return {check.name: check for check in check_sweep(runs, JUDGED)}

    even = figures(10)["no_policy_trains_more"]
    assert even.figures["1"]["rival_over_co_serve"] == pytest.approx(505 / 1000)
    assert even.figures["1"]["as_measured"] == pytest.approx(1.01)
    kept = figures(10)["finetuning_is_retained"]
    assert kept.figures["retained"] == kept.figures["as_measured"] == pytest.approx(0.9)
    assert kept.figures["of_alone"] == pytest.approx({"1": 0.5, "2": 0.9})
    # With too few such steps in some run, it stays at what was measured.
    few = figures(9)
    assert few["no_policy_trains_more"].figures["1"]["rival_over_co_serve"] == pytest.approx(1.01)
    assert few["finetuning_is_retained"].figures["retained"] == pytest.approx(0.9 / 0.5)


def test_a_check_without_runs_to_judge_by_cannot_tell():
    runs = [run for run in sweep() if run.policy == "co_serve"]
    found = verdicts(runs)
    assert found["finetuning_is_retained"] is None
    assert found["interference_is_small"] is None
    assert found["no_fixed_policy_is_equal"] is None
    with pytest.raises(ValueError, match="`runs` must hold runs of co_serve; got \\['spatial'\\]"):
        check_sweep([run for run in sweep() if run.policy == "spatial"], JUDGED)


def burst_run(rows_of, late=0):
    run = made_up("co_serve", 1.0, 0, late=late)
    steps = tuple(step(n / 10, rows=rows_of(n)) for n in range(100))
    return dataclasses.replace(run, steps=steps)


def test_a_burst_is_absorbed_where_finetuning_gives_way_and_comes_back():
    # The burst goes from 3.5 s, its first request, to 5.5 s.
    run = burst_run(lambda n: 10 if 35 <= n < 55 else 100)
    check = check_burst(run, JUDGED, start_s=3.0, length_s=2.5)
    assert check.passed is True
    assert check.figures["reaction_steps"] == 1
    assert check.figures["reaction_s"] == pytest.approx(0.0)
    assert check.figures["return_s"] == pytest.approx(0.0)
    rows = check.figures["rows_per_step"]
    assert rows["before"] == rows["after"] == 100 and rows["during"] == pytest.approx(10)
    assert check.figures["num_in_burst"] == 2
    slow = check_burst(
        burst_run(lambda n: 10 if 39 <= n < 55 else 100), JUDGED, start_s=3.0, length_s=2.5
    )
    assert slow.passed is False and slow.figures["reaction_steps"] == 5
    tired = check_burst(
        burst_run(lambda n: 10 if 35 <= n < 67 else 100), JUDGED, start_s=3.0, length_s=2.5
    )
    assert tired.passed is False and tired.figures["return_s"] == pytest.approx(1.2)
    assert check_burst(burst_run(lambda n: 50), JUDGED, start_s=3.0, length_s=2.5).passed is False
    for_ever = burst_run(lambda n: 10 if n >= 35 else 100)
    assert check_burst(for_ever, JUDGED, start_s=3.0, length_s=2.5).passed is False
    late = burst_run(lambda n: 10 if 35 <= n < 55 else 100, late=1)
    assert check_burst(late, JUDGED, start_s=3.0, length_s=2.5).passed is False
    for baseline, expected in ((run, False), (late, True)):
        check = check_burst(late, JUDGED, start_s=3.0, length_s=2.5, baseline=baseline)
        assert check.passed is expected
    with pytest.raises(ValueError, match="`run` must have requests in the burst; got 8 others"):
        check_burst(run, JUDGED, start_s=9.0, length_s=0.5)
