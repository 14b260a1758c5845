import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "bench_cpu.py"


def run(*args: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), *args]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_quick_run_measures_every_part(tmp_path):
    output = tmp_path / "bench.json"
    done = run("--quick", "--repeats", "1", "--output", str(output))
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["kind"] for record in records[:2]] == ["header", "start"]
    assert records[0]["config"]["model"] == "quick"
    assert records[1]["compile_s"] > 0
    ratios = {r["part"]: r for r in records if r["kind"] == "ratio"}
    assert set(ratios) == {"finetune", "generate 1", "generate 8", "coserve"}
    for part, record in ratios.items():
        measured = [r for r in records if r["kind"] == "timing" and r["part"] == part]
        timings = {r["side"]: r for r in measured if r["unit"] == "s"}
        expected = timings["peer"]["median"] / timings["flexjax"]["median"]
        assert record["ratio"] == pytest.approx(expected)
        assert timings["peer"]["runs"] == timings["flexjax"]["runs"] == 1
        assert {r["unit"] for r in measured} == {"s", "cpu s"}
        assert part in done.stdout


def test_unknown_part_is_refused():
    done = run("--parts", "generate,sleep")
    assert done.returncode == 2
    assert "--parts must be out of finetune, generate, coserve, bound; got sleep" in done.stderr


def test_zero_repeats_are_refused():
    done = run("--repeats", "0")
    assert done.returncode == 2
    assert "--repeats must be at least 1; got 0" in done.stderr


def test_more_cores_than_there_are_is_refused():
    done = run("--cores", "100000")
    assert done.returncode == 2
    assert "--cores must be between 1 and" in done.stderr
