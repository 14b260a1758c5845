"""Loquetier's settings: that both sides do the same work, and that tables follow from records."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from flexjax.bench import peft_model, peft_serving
from flexjax.bench.loquetier import RATES, Bench, Settings
from flexjax.bench.loquetier_sides import Sides, SideSizes, draw_prompt, served, trained
from flexjax.bench.loquetier_table import (
    Measured,
    make_ratios,
    make_rows,
    markdown,
    ratio_cells,
    row_cells,
)
from flexjax.bench.peft_model import FORMS, PeftJob
from flexjax.bench.peft_serving import PeftRequest, serve
from flexjax.bench.side_by_side import check_losses, check_tokens
from flexjax.config import EngineConfig
from flexjax.metrics import RequestRecord, RunRecord, StepRecord, Tier
from flexjax.slo import NO_SLO
from flexjax.workload import Arrival, Workload

ROOT = Path(__file__).resolve().parents[2]
ENGINE = EngineConfig(
    max_context_len=64,
    max_running=4,
    max_adapters=9,
    max_lora_rank=8,
    max_jobs=4,
    decode_buckets=(4,),
    chunk_buckets=(64,),
    window_buckets=(64,),
)
SIZES = SideSizes(
    engine=ENGINE,
    num_adapters=4,
    prompt_tokens=(3, 9),
    output_tokens=(2, 5),
    max_seq_len=64,
    num_samples=8,
    batch_size=4,
)
HEADER = {
    **{"command": "test", "device": "none", "versions": {}, "commit": "none", "seed": 0},
    **{"policy": "peft", "rate": None, "workload": "hand-made", "model": "tiny", "config": {}},
}
PROMPTS = [[5, 900, 33], [7] * 6, [1200, 4], [61, 62, 63, 64, 65]]
LENGTHS = [12, 1, 7, 9]


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    return Sides(SIZES, tmp_path_factory.mktemp("adapters"))


@pytest.mark.parametrize("form", FORMS)
def test_the_peer_generates_what_flexjax_does(sides, form):
    found = []
    for number in range(SIZES.num_adapters):
        ours = sides.flexjax_tokens(PROMPTS, LENGTHS, served(number))
        theirs = sides.peer_tokens(PROMPTS, LENGTHS, [served(number)] * 4, form)
        assert [len(tokens) for tokens in theirs] == LENGTHS
        check_tokens(ours, theirs)
        found.append(ours[0])
    assert len(set(map(tuple, found))) == SIZES.num_adapters  # adapters make a difference


def test_a_batch_of_several_adapters(sides):
    names = [served(number) for number in (3, 0, 1, 3)]
    theirs = sides.peer_tokens(PROMPTS, LENGTHS, names, "mixed")
    for row, name in enumerate(names):
        check_tokens(sides.flexjax_tokens(PROMPTS, LENGTHS, name)[row : row + 1], [theirs[row]])


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_the_peer_trains_as_flexjax_does(sides, micro_batch):
    # The sixth batch comes after two rounds of the samples, far from where the first was.
    config = dataclasses.replace(sides.job_configs(1)[0], learning_rate=1e-2, max_steps=6)
    job = sides.engine.finetune(config)
    job.wait()
    sides.engine.unload_adapter(config.adapter)
    sides.peer.reset(config.adapter, config.init_adapter)
    peer = PeftJob(sides.peer, config, sides.rows, micro_batch)
    steps = [peer.run_pass() for _ in range(6 * SIZES.batch_size // micro_batch)]
    ours, theirs = job.metrics(), peer.records
    check_losses(ours.losses, [record.loss for record in theirs])
    assert theirs[-1].loss < theirs[1].loss - 0.5
    assert [s.target_tokens for s in ours.steps] == [r.target_tokens for r in theirs]
    assert [s.tokens for s in ours.steps] == [r.tokens for r in theirs]
    assert sum(s.backward_rows for s in steps) == sum(r.tokens for r in theirs)
    worth = sum(step.backward_target_tokens for step in steps)
    assert worth == sum(record.target_tokens for record in theirs)
    assert sum(step.padding_rows for step in steps) > 0 or micro_batch == 1


def test_training_leaves_what_is_served_alone_and_starts_anew(sides):
    before = sides.peer_tokens(PROMPTS, LENGTHS, [served(0)] * 4, "merged")
    losses = sides.peer_losses(2)
    assert sides.peer_tokens(PROMPTS, LENGTHS, [served(0)] * 4, "merged") == before
    assert sides.peer_losses(2) == pytest.approx(losses, rel=1e-5)


def test_both_sides_get_the_same_prompts(sides, monkeypatch):
    arrivals = [Arrival(0.0, 3, 2, served(0)), Arrival(0.0, 9, 1, served(1))]
    sent = []
    add = sides.engine.add_request
    monkeypatch.setattr(
        sides.engine,
        "add_request",
        lambda prompt, *a, **k: sent.append(prompt) or add(prompt, *a, **k),
    )
    sides.run_flexjax(Workload("two", arrivals), 0, 7, header=HEADER)
    assert sent == [draw_prompt(sides.model, a, 7, index) for index, a in enumerate(arrivals)]
    assert [len(prompt) for prompt in sent] == [3, 9]


class Clock:
    """A clock of its own for the peer's server: every look at it takes a millisecond."""

    def __init__(self):
        self.now_s = 100.0

    def perf_counter(self):
        self.now_s += 0.001
        return self.now_s

    def sleep(self, duration_s):
        self.now_s += duration_s


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    for module in (peft_model, peft_serving):
        monkeypatch.setattr(module, "time", made)
    return made


def requests(*rows):
    return [
        PeftRequest(Arrival(due_s, len(PROMPTS[0]), output, served(number)), PROMPTS[0])
        for due_s, output, number in rows
    ]


def test_batches_of_one_adapter_in_order_of_arrival(sides, clock):
    sent = requests((0, 3, 0), (0, 2, 1), (0, 4, 0), (0, 1, 0), (0, 2, 0), (0, 2, 0), (0.5, 2, 1))
    run = serve(sides.peer, sent, form="separate", max_batch=4, header=HEADER, targets=NO_SLO)
    assert [r.status for r in run.requests] == ["finished"] * 7
    assert [len(r.token_times_s) for r in run.requests] == [3, 2, 4, 1, 2, 2, 2]
    prefills = [step for step in run.steps if step.prefill_rows]
    assert [step.prefill_rows for step in prefills] == [12, 3, 3, 3]  # 4 of adapter 0, then 1, 0, 1
    assert [step.decode_rows for step in run.steps[:4]] == [0, 3, 2, 1]  # rows leave when done
    admitted = [r.admitted_s for r in run.requests]
    assert admitted[0] == admitted[2] == admitted[3] == admitted[4] < admitted[1] < admitted[5]
    last = run.requests[6]
    assert last.due_s == pytest.approx(run.begin_s + 0.5) and last.due_s <= last.admitted_s


def test_one_batch_of_all_adapters(sides, clock):
    sent = requests((0, 3, 0), (0, 2, 1), (0, 3, 2))
    run = serve(sides.peer, sent, form="mixed", max_batch=4, header=HEADER, targets=NO_SLO)
    assert [step.prefill_rows for step in run.steps] == [9, 0, 0]


def test_batches_and_jobs_take_turns(sides, clock):
    sides.micro_batch = 2
    sent = requests((0, 2, 0), (0, 2, 1), (0, 2, 2))
    jobs = sides.peer_jobs(2)
    options = {"header": HEADER, "targets": NO_SLO, "horizon_s": 1.0}
    run = serve(sides.peer, sent, form="merged", max_batch=4, jobs=jobs, **options)
    kinds = ["t" if s.backward_rows else "p" if s.prefill_rows else "d" for s in run.steps]
    assert "".join(kinds).startswith("pdtpdtpdtt")  # with nobody left, training goes on
    assert set(kinds[9:]) == {"t"}
    done = [sum(r.job == trained(number) for r in run.training) for number in (0, 1)]
    assert min(done) >= 1 and abs(done[0] - done[1]) <= 1
    assert run.measured_until_s == pytest.approx(run.begin_s + 1.0)
    assert all(a.end_s <= b.begin_s for a, b in zip(run.steps, run.steps[1:], strict=False))


def test_late_requests_are_refused_where_that_is_the_rule(sides, clock):
    sent = requests((0, 40, 0), (0.001, 2, 1))
    options = {"form": "separate", "max_batch": 4, "header": HEADER, "targets": NO_SLO}
    run = serve(sides.peer, sent, **options, patience_s=0.002)
    assert [r.status for r in run.requests] == ["finished", "refused"]
    run = serve(sides.peer, sent, **options)
    assert [r.status for r in run.requests] == ["finished", "finished"]


def test_the_horizon_leaves_out_what_comes_later_and_what_is_not_answered(sides, clock):
    sent = requests((0, 2, 0), (0.049, 50, 1), (0.06, 2, 1))
    options = {"form": "separate", "max_batch": 4, "header": HEADER, "targets": NO_SLO}
    run = serve(sides.peer, sent, **options, horizon_s=0.05, drain_s=0.0)
    assert [r.status for r in run.requests] == ["finished", "unfinished"]


def test_the_bench_runs_every_setting_on_both_sides(sides):
    settings = Settings(window_s=0.4, drain_s=0.1, repeats=1, num_threads=1)
    bench = Bench(sides, settings, HEADER)
    assert set(bench.choice.forms) == {1, 4} and bench.choice.forms[1] in FORMS[:2]
    assert bench.choice.micro_batch in (2, 4) and len(bench.choice.tried) == 2 + 3 + 2
    slowest = max(bench.limits.idle_gap_s.values())
    assert bench.limits.targets.tpot_ms == pytest.approx(3e3 * slowest)
    assert bench.limits.targets.ttft_ms == pytest.approx(200 * slowest * 1e3)
    assert bench.limits.admission_s == pytest.approx(6 / 5 * bench.limits.targets.ttft_s)
    found = bench.run()
    tier = Tier("targets", 1.0, 1.0)
    rows = make_rows(found, tier, bench.limits.admission_s)
    assert {(row.setting, row.load) for row in rows} == {
        *(("inference", load) for load in ("all at once", "low", "high")),
        ("finetuning", ""),
        *(("unified", load) for load in RATES),
    }
    by_key = {(*row.key, row.side): row for row in rows}
    assert len(by_key) == len(rows) == 2 * (2 * (1 + 2 + 1 + 4) + 3)
    for row in rows:
        # In less than half a second FlexJAX may give all to the requests.
        assert row.trained > 0 or row.setting != "finetuning"
        assert row.trained == 0 or row.setting != "inference"
        assert (row.num_requests > 0) == (row.setting != "finetuning")
        if row.load in RATES:
            side, share = RATES[row.load]
            assert row.rate == pytest.approx(share * bench.capacity[row.adapters][side])
            assert row.num_requests == max(1, round(row.rate * settings.window_s))
    assert sum(row.trained for row in rows if row.setting == "unified") > 0
    run = next(m.run for m in found if (m.adapters, m.load, m.side) == (4, "high", "FlexJAX"))
    assert {r.adapter for r in run.requests} <= {served(number) for number in range(4)}
    assert {r.job for m in found if m.setting == "finetuning" for r in m.run.training} <= {
        trained(number) for number in range(4)
    }


def hand_made(times_s, worth, *, measured_s=2.0):
    """A run of requests that were due at 0, admitted 0.1 s before their first token."""
    made = [
        RequestRecord(
            request_id=number,
            adapter="a",
            slo_class=None,
            due_s=0.0,
            prompt_tokens=1,
            output_tokens=2,
            token_times_s=times,
            status="finished" if times else "refused",
            admitted_s=times[0] - 0.1 if times else None,
        )
        for number, times in enumerate(times_s)
    ]
    step = StepRecord(0.0, 1.0, 0, 0, worth, worth, 0, worth, worth, 1e3, 0.0, None, worth)
    return RunRecord(HEADER, 0.0, 3.0, tuple(made), (step,), (), measured_s)


def test_rows_and_ratios_follow_from_the_records():
    tier = Tier("targets", 1.0, 0.5)
    ours = hand_made([(0.5, 1.0), (0.9, 1.2), (1.2, 1.3), (0.2, 0.3)], 80)
    more = hand_made([(0.5, 1.0), (0.5, 1.0), (0.5, 2.5), (0.5, 1.0)], 120)
    peer = hand_made([(0.5, 1.0), (1.5, 1.6), (1.7, 1.8), (1.8, 1.9)], 25)
    drops = hand_made([(0.5, 1.0), (0.6, 1.0), (), ()], 20)
    found = [
        Measured(1, "unified", "high", "PEFT", peer),
        Measured(1, "unified", "high", "FlexJAX", ours),
        Measured(1, "unified", "high", "PEFT, drops", drops),
        Measured(1, "unified", "high", "FlexJAX", more),
    ]
    rows = make_rows(found, tier, 0.6)
    assert [row.side for row in rows] == ["FlexJAX", "PEFT", "PEFT, drops"]
    first, second, third = rows
    assert (first.runs, first.num_requests) == (2, 8)
    assert first.attainment == 6 / 8 and first.admitted == 6 / 8
    assert first.output_tokens_per_s == (4.0, 3.5) and first.output == 3.75
    assert first.target_tokens_per_s == (40.0, 60.0) and first.trained == 50.0
    assert (second.attainment, third.attainment) == (1 / 4, 2 / 4)
    assert (second.admitted, third.admitted) == (1 / 4, 2 / 4)
    assert second.ttft_p50_s == pytest.approx(1.6) and second.tpot_p99_s == pytest.approx(0.488)
    (ratio,) = make_ratios(rows)
    assert (ratio.output, ratio.trained) == (3.75 / 4.0, 50 / 12.5)
    assert (ratio.attainment, ratio.admitted) == (1.5, 1.5)  # over the better of the peer's two
    assert row_cells(rows)[1][4:8] == ("FlexJAX", "75.0%", "75.0%", "500 / 1179")
    assert ratio_cells([ratio])[1][3:] == ("0.94", "4.00", "1.50", "1.50")
    lines = markdown(row_cells(rows)).splitlines()
    assert len(lines) == 5 and lines[1] == "|" + "---|" * 11


def test_a_peer_that_never_attains_has_no_ratio():
    rows = make_rows(
        [
            Measured(1, "unified", "high", "PEFT", hand_made([()], 0)),
            Measured(1, "unified", "high", "FlexJAX", hand_made([(0.5, 1.0)], 5)),
        ],
        Tier("targets", 1.0, 1.0),
        6.0,
    )
    (ratio,) = make_ratios(rows)
    assert ratio.attainment is ratio.admitted is ratio.trained is ratio.output is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Settings(adapters=(2,)), r"`adapters` must be out of 1 and 4.*got \(2,\)"),
        (lambda: Settings(adapters=()), "`adapters` must be out of 1 and 4"),
        (lambda: Settings(repeats=0), "`repeats` must be at least 1; got 0"),
        (lambda: Settings(window_s=0.0), "`window_s` must be a number > 0; got 0.0"),
        (lambda: Settings(drain_s=-1.0), "`drain_s` must be a number >= 0; got -1.0"),
        (
            lambda: dataclasses.replace(SIZES, num_samples=6),
            "`num_samples` must be a multiple of `batch_size`=4; got 6",
        ),
        (
            lambda: dataclasses.replace(SIZES, prompt_tokens=(5, 4)),
            r"`prompt_tokens` must be two numbers >= 1 in order; got \(5, 4\)",
        ),
        (
            lambda: dataclasses.replace(SIZES, num_adapters=5),
            "`engine.max_adapters` must be at least 10, for as many served as trained; got 9",
        ),
        (
            lambda: dataclasses.replace(SIZES, engine=dataclasses.replace(ENGINE, max_jobs=3)),
            "`engine.max_jobs` must be at least 4; got 3",
        ),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_work_is_refused(sides):
    with pytest.raises(ValueError, match="`form` must be one of merged, .*; got 'other'"):
        sides.peer.generate(PROMPTS, LENGTHS, [served(0)] * 4, "other")
    names = [served(0), served(1), served(0), served(0)]
    with pytest.raises(ValueError, match="`adapters` must be one for a batch that is 'merged'"):
        sides.peer.generate(PROMPTS, LENGTHS, names, "merged")
    config = sides.job_configs(1)[0]
    with pytest.raises(ValueError, match="`micro_batch` must divide .* got 3, 4 and 8"):
        PeftJob(sides.peer, config, sides.rows, 3)
    options = {"form": "merged", "max_batch": 4, "header": HEADER, "targets": NO_SLO}
    with pytest.raises(ValueError, match="`horizon_s` must be given where there are no requests"):
        serve(sides.peer, [], **options)
    with pytest.raises(ValueError, match="`requests` must have output lengths and adapters"):
        serve(sides.peer, [PeftRequest(Arrival(0.0, 3, 2), PROMPTS[0])], **options)


def run_script(*arguments):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / "bench_loquetier.py"), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_quick_run_writes_every_figure(tmp_path):
    output, text = tmp_path / "bench.json", tmp_path / "bench.md"
    arrivals = tmp_path / "arrivals.txt"
    arrivals.write_text("".join(f"{index // 3}\n" for index in range(300)))
    done = run_script(
        *("--quick", "--adapters", "1", "--output", str(output), "--markdown", str(text)),
        *("--burst", str(arrivals), "--seed", "3"),
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    kinds = [record["kind"] for record in records]
    assert kinds[:2] == ["header", "start"] and set(kinds[2:]) == {"row", "ratio"}
    assert kinds.count("row") == 2 * 8 + 3 and kinds.count("ratio") == 8
    head = records[0]
    assert head["seed"] == 3 and head["config"]["settings"]["burst"] == "300 arrivals"
    assert str(tmp_path) not in json.dumps(head)
    assert {"device", "versions", "commit", "command"} <= set(head)
    assert "FlexJAX over PEFT" in done.stdout
    assert text.read_text().count("| FlexJAX |") == 8


def test_script_refuses_bad_arguments():
    done = run_script("--adapters", "3")
    assert done.returncode == 2
    assert "`adapters` must be out of 1 and 4, Loquetier's numbers; got (3,)" in done.stderr
