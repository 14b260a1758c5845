"""`scripts/bench_simulator.py`, as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "bench_simulator.py"


def run(*args) -> subprocess.CompletedProcess:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_quick_run_compares_both_sides_under_drawn_and_traced_arrivals(tmp_path):
    trace = tmp_path / "trace.csv"
    rows = [f"{0.1 * n},{20 + n % 7},{5 + n % 3}" for n in range(60)]
    header = "arrival_s,context_tokens,generated_tokens"
    trace.write_text("\n".join([header, *rows]) + "\n")
    stem = tmp_path / "found"
    for options in ([], ["--trace", trace, "--append"], ["--unpaced", "--append"]):
        done = run("--quick", "--output", stem, *options)
        assert done.returncode == 0, done.stderr
    found = json.loads(stem.with_suffix(".json").read_text())
    assert [part["workload"] for part in found] == ["poisson", "trace", "poisson"]
    assert [part["is_paced"] for part in found] == [True, True, False]
    for part in found:
        assert len(part["rows"]) == 9
        for row in part["rows"]:
            assert row["simulator"]["num_requests"] >= row["engine"]["num_requests"] > 0
            assert (row["matched"] is None) is part["is_paced"]
    text = stem.with_suffix(".md").read_text()
    assert text.count("| co_serve |") == 9
    assert "## trace, paced" in text and "## poisson, unpaced" in text
    assert "## poisson, unpaced" in done.stdout


def test_the_papers_table_says_that_it_was_not_measured(tmp_path):
    stem = tmp_path / "paper"
    for policy in ("inference_only", "spatial:0.5", "inference_only"):
        options = ["--policies", policy, "--output", stem, "--append"]
        done = run("--paper", "--hours", 0.001, *options)
        assert done.returncode == 0, done.stderr
    found = json.loads(stem.with_suffix(".json").read_text())
    assert "not measured" in found["profile"] and len(found["rows"]) == 10
    assert all(row["cpu_s"] > 0 for row in found["rows"])
    text = stem.with_suffix(".md").read_text()
    assert "**No step time here was measured.**" in text
    assert text.count("| inference_only |") == text.count("| spatial:0.5 |") == 5
    done = run("--paper", "--hours", 0.002, *options)
    assert done.returncode == 2
    assert "`parts` must be made from the same; they differ in ['duration_s']" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeats", 1], "`repeats` must be at least 2; got 1"),
        (["--paper", "--hours", 0], "`--hours` must be a number > 0; got 0.0"),
        (["--paper", "--policies", "greedy"], "`policy` must be one of"),
        (["--trace", "/nowhere.csv"], "/nowhere.csv"),
    ],
)
def test_bad_options_are_refused(options, message, tmp_path):
    done = run("--output", tmp_path / "x", *options)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.strip().splitlines()[-1]) < 400


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    done = run("--output", tmp_path / "no" / "x")
    assert done.returncode == 2
    assert "`--output` must be in a folder that exists" in done.stderr
