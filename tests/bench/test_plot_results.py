"""The plot script, end to end, on runs of a small queue simulation."""

import importlib.util
import random
from pathlib import Path

import pytest
from matplotlib.image import imread

from flexjax.metrics import RequestRecord, RunRecord, StepRecord, TrainRecord

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "plot_results.py"
# Inference steps between two that finetune, and finetuning rows of those.
POLICIES = {
    "co_serve": (1, 256),
    "temporal(64)": (64, 4096),
    "temporal(128)": (128, 4096),
    "dynamic_temporal": (32, 1024),
    "spatial": (1, 384),
    "inference_only": (1, 0),
}


def load_script():
    spec = importlib.util.spec_from_file_location("plot_results", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


main = load_script().main


def arrivals(rate, length_s, seed):
    """Poisson arrivals with a burst of three times the rate in the third quarter."""
    draws, time_s, due_s = random.Random(seed), 0.0, []
    while True:
        burst = 3.0 if 0.5 * length_s < time_s < 0.6 * length_s else 1.0
        time_s += draws.expovariate(rate * burst)
        if time_s >= length_s:
            return due_s
        due_s.append(time_s)


class Simulation:
    """Requests of one policy, decoded together; finetuning rows make steps longer."""

    def __init__(self, policy, rate, length_s, seed=0):
        self.policy, self.rate, self.length_s = policy, rate, length_s
        self.draws = random.Random(seed + 1)
        self.due_s = arrivals(rate, length_s, seed) if rate else []
        self.wanted = [self.draws.randint(2, 200) for _ in self.due_s]
        self.admitted_s = {}
        self.tokens = {index: [] for index in range(len(self.due_s))}
        self.steps, self.training, self.target_tokens = [], [], 0.0

    def run(self, start_s=100.0):
        time_s, number, limit_s = 0.0, 0, 1.2 * self.length_s
        while time_s < limit_s:
            time_s = self.step(time_s, number)
            number += 1
        records = tuple(self.request(index, start_s) for index in self.tokens)
        shift = {"begin_s": start_s, "end_s": start_s + time_s}
        steps = tuple(StepRecord(b + start_s, e + start_s, *rest) for b, e, *rest in self.steps)
        training = tuple(TrainRecord(t + start_s, *rest) for t, *rest in self.training)
        return RunRecord(
            header(policy=self.policy, rate=self.rate),
            **shift,
            requests=records,
            steps=steps,
            training=training,
            measured_until_s=start_s + self.length_s,
        )

    def step(self, time_s, number):
        running = [
            index
            for index, due_s in enumerate(self.due_s)
            if due_s <= time_s and len(self.tokens[index]) < self.wanted[index]
        ][:64]
        interval, rows = POLICIES.get(self.policy, (1, 2048))
        rows = rows if number % interval == 0 or not running else 0
        if self.policy == "co_serve":
            rows = max(0, rows - 4 * len(running)) if running else 512
        if self.policy == "inference_only":
            rows = 0
        expected_ms = 12 + 0.15 * len(running) + 0.045 * rows
        ms = expected_ms * self.draws.lognormvariate(0, 0.04) if running or rows else 5.0
        end_s = time_s + ms / 1e3
        for index in running:
            self.admitted_s.setdefault(index, time_s)
            self.tokens[index].append(end_s)
        if running or rows:
            counts = (len(running), 0, rows // 2, rows - rows // 2)
            buckets = (64 if running else 0, 2048 if rows else 0, 2048 if rows else 0)
            row = (*counts, *buckets, ms, 0.7, expected_ms, 0.4 * rows)
            self.steps.append((time_s, end_s, *row))
        self.target_tokens += 0.4 * rows
        if self.target_tokens >= 4000:
            step = len(self.training) + 1
            self.training.append((end_s, "job", step, 5000, 4000, 3 / step**0.2))
            self.target_tokens -= 4000
        return end_s + 2e-4

    def request(self, index, start_s):
        times_s, due_s = self.tokens[index], self.due_s[index] + start_s
        is_done = len(times_s) == self.wanted[index]
        return RequestRecord(
            request_id=index,
            adapter="math" if index % 2 else None,
            slo_class="interactive",
            due_s=due_s,
            prompt_tokens=50,
            output_tokens=self.wanted[index],
            token_times_s=tuple(t + start_s for t in times_s),
            status="finished" if is_done else "unfinished",
            finish_reason="length" if is_done else None,
            admitted_s=self.admitted_s[index] + start_s if times_s else None,
        )


def header(**more):
    return {
        "command": "python bench.py",
        "device": {"platform": "gpu", "kind": "NVIDIA H200"},
        "versions": {"jax": "0.10.2"},
        "commit": "abc",
        "seed": 0,
        "policy": "co_serve",
        "rate": 1.0,
        "workload": "synthetic bursts",
        "model": "llama-3.1-8b",
        "config": {},
        **more,
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    for policy in ("co_serve", "inference_only"):
        for rate in (1.0, 4.0):
            run = Simulation(policy, rate, 5.0).run()
            run.save(folder / f"{policy}.jsonl", append=rate > 1)
    Simulation("finetune_only", None, 5.0).run().save(folder / "finetune_only.jsonl")
    return folder


def run_script(capsys, *arguments):
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        status = exit_.code
    found = capsys.readouterr()
    return status, found.out, found.err


def test_draws_every_figure_and_prints_the_table(results, tmp_path, capsys):
    output = tmp_path / "new" / "figures"
    status, text, error = run_script(capsys, results, "--output-dir", output)
    assert (status, error) == (0, "")
    names = {"load.png", "latency.png", "timeline_co_serve.png"}
    assert {path.name for path in output.iterdir()} == names
    for name in names:
        pixels = imread(output / name)[..., :3]
        assert pixels.shape[0] > 400 and pixels.shape[1] > 1000
        # The curve of co-serving, of output and of finetuning are there in their colours.
        assert (abs(pixels - (0, 0x72 / 255, 0xB2 / 255)).max(-1) < 0.02).sum() > 200, name
    assert "llama-3.1-8b on NVIDIA H200, synthetic bursts; tier tight" in text
    rows = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows == [
        ["| co_serve", "1"],
        ["| co_serve", "4"],
        ["| finetune_only", "-"],
        ["| inference_only", "1"],
        ["| inference_only", "4"],
    ]


def test_options_choose_rate_tiers_and_policies(results, tmp_path, capsys):
    status, text, error = run_script(
        capsys,
        results / "co_serve.jsonl",
        results / "inference_only.jsonl",
        *("--output-dir", tmp_path, "--rate", 1, "--timeline", "inference_only", "--bin", 0.5),
        *("--tier", "paper=5,45", "--tier", "strict=0.5,20,60", "--drop-head", 1),
    )
    assert (status, error) == (0, "")
    names = {"load.png", "latency.png", "timeline_inference_only.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert "tier paper" in text


def test_workloads_are_not_mixed(results, tmp_path, capsys):
    other = Simulation("co_serve", 1.0, 2.0).run()
    other = RunRecord(header(model="tiny"), other.begin_s, other.end_s, other.requests)
    other.save(tmp_path / "other.jsonl")
    output = tmp_path / "figures"
    status, text, _ = run_script(
        capsys, results / "co_serve.jsonl", tmp_path / "other.jsonl", "--output-dir", output
    )
    assert status == 0
    assert {path.name for path in output.iterdir()} == {
        f"{number}_{name}.png"
        for number in (1, 2)
        for name in ("load", "latency", "timeline_co_serve")
    }
    assert "tiny on NVIDIA H200" in text


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "required: results"),
        (("missing.jsonl",), "No such file"),
        (("empty",), "holds no *.jsonl file"),
        (("bad.jsonl",), "bad.jsonl, line 2: not JSON"),
        (("good.jsonl", "--rate", 7), "`--rate` must be one of 1; got 7"),
        (("good.jsonl", "--timeline", "x"), "`--timeline` must be one of co_serve; got 'x'"),
        (("good.jsonl", "--bin", 0), "`bin_s` must be positive; got 0"),
        (("good.jsonl", "--drop-head", 9), "`drop_head_s` must be >= 0 and below the 2 s"),
        (("good.jsonl", "--tier", "a=1"), "must be NAME=TTFT_S,TPOT_MS"),
        (("good.jsonl", "--tier", "a=1,-5"), "`tpot_s` must be > 0; got -0.005"),
        (("good.jsonl", "--tier", "a=1,5", "--tier", "a=2,5"), "`tiers` must be named differently"),
        (("nothing.jsonl",), "no run has a rate, a request or finetuning"),
    ],
)
def test_says_what_is_wrong_and_writes_nothing(arguments, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    run = Simulation("co_serve", 1.0, 2.0).run()
    run.save("good.jsonl")
    RunRecord(header(policy="idle", rate=None), 0.0, 1.0).save("nothing.jsonl")
    first = (tmp_path / "good.jsonl").read_text().splitlines()[0]
    (tmp_path / "bad.jsonl").write_text(first + "\n{\n")
    status, _, error = run_script(capsys, *arguments, "--output-dir", "figures")
    assert status == 2
    assert reason in error and "Traceback" not in error
    assert not (tmp_path / "figures").exists()


def test_help(capsys):
    status, text, _ = run_script(capsys, "--help")
    assert status == 0 and "--drop-head SECONDS" in text and "tight=1,50" in text
