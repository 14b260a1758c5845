"""`flexjax bench` and `flexjax profile`, and the scripts that rest on them."""

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from flexjax.cli.profile import find_measured, read_profile
from flexjax.config import EngineConfig
from flexjax.metrics import all_gaps_s, load_runs, percentile
from flexjax.scheduler.latency_model import LatencyModel
from flexjax.scheduler.latency_profile import LatencyProfile
from pallas_kernels import can_run_llvm

ROOT = Path(__file__).resolve().parents[2]
SIZES = (
    *("--max-context-len", 64, "--max-running", 2, "--rank", 2),
    *("--decode-buckets", 2, "--chunk-buckets", 16, "--window-buckets", 16),
)


@pytest.mark.slow
def test_bench_compares_policies_and_writes_what_it_found(flexjax, model_dir, data, tmp_path):
    output = tmp_path / "out"
    status, out, error = flexjax(
        "bench", "--model", model_dir, "--data", data, *SIZES, "--rates", 4, 8,
        "--policies", "co_serve", "inference_only", "finetune_only", "--seconds", 0.5,
        "--drain-seconds", 20, "--prompt-tokens", 6, "--output-tokens", 4, "--tpot-ms", 60000,
        "--ttft-ms", 60000, "--batch-size", 2, "--adapters", 1, "--burst-seconds", 0.5,
        "--burst-tpot-ms", 30000, "--least-gaps", 8, "--output", output, "--json",
    )  # fmt: skip
    assert status == 0, error
    start, *rows, checks = [json.loads(line) for line in out.splitlines()]
    assert start["kind"] == "start" and start["idle_itl_s"] > 0 and start["capacity"] is None
    assert start["targets"] == {"ttft_ms": 60000, "tpot_ms": 60000, "itl_ms": 240000}
    assert [(row["policy"], row["rate"]) for row in rows] == [
        ("finetune_only", None), ("co_serve", 4), ("inference_only", 4),
        ("finetune_only", None), ("inference_only", 8), ("co_serve", 8),
    ]  # fmt: skip
    assert all(row["attainment"] == (row["rate"] and 1.0) for row in rows)
    names = [check["name"] for check in checks["checks"]]
    assert len(names) == 6 and names[-1] == "burst_is_absorbed"
    assert json.loads((output / "checks.json").read_text()) == checks["checks"]
    runs = load_runs(output / "runs.jsonl")
    assert [(run.policy, run.rate) for run in runs] == [(r["policy"], r["rate"]) for r in rows]
    assert {r.adapter for run in runs for r in run.requests} == {"adapter-0"}
    assert all(run.header["config"]["bench"]["seconds"] == 0.5 for run in runs)
    policies = ["inference_only", "co_serve"]
    burst = load_runs(output / "burst.jsonl")
    assert [run.policy for run in burst] == policies
    for run in burst:
        assert run.header["targets"] == {"ttft_ms": 60000, "tpot_ms": 30000, "itl_ms": 120000}
    assert checks["checks"][-1]["figures"]["tpot_ms"] == pytest.approx(30000)
    capped = load_runs(output / "capped.jsonl")
    for rate in (4, 8):
        seen = all_gaps_s(r for r in runs if (r.policy, r.rate) == (policies[0], rate))
        pairs = [run for run in capped if run.rate == rate]
        found = 0
        for alone, ours in zip(pairs[::2], pairs[1::2], strict=True):
            assert [alone.policy, ours.policy] == policies
            found += len(all_gaps_s([alone]))
            seen += all_gaps_s([alone])
            assert ours.header["targets"]["itl_ms"] == pytest.approx(1e3 * percentile(seen, 99))
        assert found >= 8
    assert (output / "table.md").read_text().count("\n") == 2 + 5
    status, _, error = flexjax("bench", "--output", output)
    assert status == 2 and "`--output`" in error and "is not empty" in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--policies", "fair"), "`policy` must be one of"),
        (("--rates", 0), "`rates` must be numbers > 0; got 0.0"),
        (("--ttft-ms", 0), "`--ttft-ms` must be above 0; got 0"),
        (("--tpot-ms", -1), "`tpot_ms` must be a number > 0 or None; got -1"),
        (("--seconds", -1), "`--seconds` must be above 0; got -1"),
        (("--burst-seconds", 0), "`--burst-seconds` must be above 0; got 0"),
        (("--burst-tpot-ms", 0), "`--burst-tpot-ms` must be above 0; got 0"),
        (("--itl-factor", 0.5), "`--itl-factor` must be at least 1; got 0.5"),
        (("--repeats", 0), "`repeats` must be at least 1; got 0"),
        (("--adapters", -1), "`--adapters` must be at least 0; got -1"),
        (("--prompt-tokens", 60), "must fit the context, 64 tokens"),
        (("--prompt-tokens", 0), "`--prompt-tokens` must be at least 1; got 0"),
        (("--trace", "no.csv"), "Trace 'no.csv' is not a file"),
        (("--data", "no.jsonl"), "no.jsonl"),
        (("--model", "gpt-9"), "`--model` must be a directory, or one of"),
        (("--profile", "no.json"), "no.json"),
    ],
)
def test_bench_refuses_before_it_starts(flexjax, model_dir, data, arguments, message):
    given = ("--model", model_dir, "--data", data, "--prompt-tokens", 8, "--output-tokens", 4)
    status, out, error = flexjax("bench", *given, *SIZES, *arguments)
    assert status == 2 and out == ""
    assert message in error


@pytest.mark.slow
def test_profile_measures_every_bucket_and_can_be_loaded(flexjax, model_dir, data, tmp_path):
    path = tmp_path / "profile.json"
    given = ("--model", model_dir, *SIZES, "--contexts", 0.5, 1, "--repeats", 1)
    status, out, error = flexjax("profile", *given, "--output", path, "--json")
    assert status == 0, error
    summary = json.loads(out)
    profile = LatencyProfile.load(path)
    assert summary["output"] == str(path) and profile.source == "measured"
    idle = {tuple(row["bucket"]) for row in summary["samples"] if not row["counts"]}
    # Steps that only decode sample in the same program; the head has samples of its own beside.
    sampled = [row["bucket"] for row in summary["samples"] if row["counts"] == {"sample_rows": 2}]
    assert len(idle) == 6 and sampled == [[2, 0, 0, 0], [0, 0, 0, 0]]
    reads = [row["counts"] for row in summary["samples"] if "decode_kv_tokens" in row["counts"]]
    # XLA's attention meets whole blocks of 128 keys, the CPU's kernel the two rows' own.
    expected = [2 * 32, 2 * 64] if can_run_llvm() else [2 * 128, 2 * 128]
    assert [counts["decode_kv_tokens"] for counts in reads] == expected
    assert all(row["ms"] > 0 and row["fitted_ms"] > 0 for row in summary["samples"])
    assert len(profile.samples) == len(summary["samples"])
    given = ("--model", model_dir, "--data", data, "--prompt-tokens", 8, "--output-tokens", 4)
    more = ("--profile", path, "--kernels", "reference")
    status, out, error = flexjax("bench", *given, *SIZES, *more)
    assert status == 2 and out == ""
    assert "`--profile` must fit the engine: `sizes." in error
    assert "`sizes.kernels` is None in the profile and 'reference' in the engine" in error
    assert profile.sizes["page_size"] == 16 and profile.sizes["ladder"]["chunk"] == [16]
    older = dataclasses.replace(profile, versions={**profile.versions, "jaxlib": "0.0.1"})
    older.save(tmp_path / "older.json")
    measured = find_measured(str(model_dir))
    config = EngineConfig(
        max_context_len=64, max_running=2, max_lora_rank=2, decode_buckets=(2,),
        chunk_buckets=(16,), window_buckets=(16,),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_profile(path, measured, config) == profile
    with pytest.warns(UserWarning, match="`versions.jaxlib` is '0.0.1' in the profile and"):
        assert read_profile(tmp_path / "older.json", measured, config) == older
    assert (
        LatencyModel.from_profile(profile).missing(s.features.bucket for s in profile.samples) == []
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--contexts", 0.5, 2), "`--contexts` must be above 0 and at most 1; got 2"),
        (("--repeats", 0), "`--repeats` must be at least 1; got 0"),
        (("--output", "no/where.json"), "`--output` must be in a directory that exists"),
        (("--model", "gpt-9"), "`--model` must be a directory, or one of"),
    ],
)
def test_profile_refuses_before_it_measures(flexjax, model_dir, arguments, message):
    status, out, error = flexjax("profile", "--model", model_dir, *SIZES, *arguments)
    assert status == 2 and out == ""
    assert message in error


def run_script(name, *arguments):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_quick_policies_script_runs_traced_arrivals(tmp_path):
    trace = tmp_path / "trace.csv"
    lines = [f"{n / 4},{20 + n},{10 + n}" for n in range(40)]
    trace.write_text("\n".join(["arrival_s,context_tokens,generated_tokens", *lines]) + "\n")
    output = tmp_path / "out"
    done = run_script("bench_policies.py", "--quick", "--trace", trace, "--output", output)
    assert done.returncode == 0, done.stderr
    runs = load_runs(output / "trace" / "runs.jsonl")
    assert len(runs) == 2 * (1 + 2)
    assert {run.header["workload"] for run in runs} == {"trace"}
    assert len(json.loads((output / "trace" / "checks.json").read_text())) == 6
    assert [path.name for path in output.iterdir()] == ["trace"]


@pytest.mark.slow
def test_quick_overhead_script_measures_each_case(tmp_path):
    output = tmp_path / "overhead.json"
    done = run_script("bench_overhead.py", "--quick", "--iterations", 20, "--output", output)
    assert done.returncode == 0, done.stderr
    head, *records = [json.loads(line) for line in output.read_text().splitlines()]
    assert head["kind"] == "header" and head["config"]["iterations"] == 20
    host = [r for r in records if r["part"] == "host"]
    assert {(r["running"], r["waiting"]) for r in host} == {(8, 0), (8, 100)}
    for record in host:
        assert record["runs"] == 20 and 0 < record["median"] <= record["p99"]
    alls = [r for r in host if r["name"] == "all"]
    for whole in alls:
        parts = [r for r in host if r["waiting"] == whole["waiting"] and r["name"] != "all"]
        sums = [sum(values) for values in zip(*(r["samples"] for r in parts), strict=True)]
        assert whole["samples"] == pytest.approx(sums)
    assert {r["name"] for r in records if r["part"] == "engine"} >= {"schedule", "all", "step"}


def test_overhead_script_refuses_no_iterations():
    done = run_script("bench_overhead.py", "--iterations", 0)
    assert done.returncode == 2
    assert "--iterations must be at least 1; got 0" in done.stderr
