"""The tuning script: what it would measure, and that it keeps the fastest config that is right."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels._platform import interpreted
from pallas_kernels.dual_matmul.cases import CASES as DUAL_MATMUL_CASES
from pallas_kernels.linear_cross_entropy.cases import CASES as CROSS_ENTROPY_CASES

SCRIPT = Path(__file__).parents[2] / "scripts" / "tune_kernels.py"


@pytest.fixture(scope="module")
def tuner():
    spec = importlib.util.spec_from_file_location("tune_kernels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["tune_kernels"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["tune_kernels"]


def case_named(name):
    return next(case for case in DUAL_MATMUL_CASES + CROSS_ENTROPY_CASES if str(case) == name)


def test_dry_run_lists_distinct_configs_of_hot_cases():
    command = [sys.executable, str(SCRIPT), "--dry-run", "--limit", "5"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(set(lines)) == len(lines)
    planned = [json.loads(line) for line in lines]
    hot = [str(case) for case in DUAL_MATMUL_CASES + CROSS_ENTROPY_CASES if "hot" in case.tags]
    assert {record["case"] for record in planned} == set(hot)
    assert all(record["case"].startswith(record["key"].split()[0]) for record in planned)


def test_without_a_gpu_it_measures_nothing(tmp_path):
    table = tmp_path / "tuned.json"
    command = [sys.executable, str(SCRIPT), "--table", str(table)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "--dry-run" in done.stderr and not table.exists()


@pytest.mark.parametrize("name", ["dual_matmul-one-row", "linear_cross_entropy-one-row"])
def test_the_fastest_record_goes_into_the_table(tuner, tmp_path, monkeypatch, capsys, name):
    times = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(tuner, "measured_ms", lambda *_: next(times))
    with interpreted():
        key, record = tuner.tune_case(case_named(name), 3, 1)
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        times_printed = [line["ms"] for line in lines]
        assert times_printed == [3.0, 1.0, 2.0][: len(lines)]
        assert record["ms"] == min(times_printed)
        table = tmp_path / "tuned.json"
        table.write_text(json.dumps({"sm_1": {"kept": 1}}))
        tuner.write_record(table, key, record)
    content = json.loads(table.read_text())
    assert content == {"sm_1": {"kept": 1}, "sm_None": {key: record}}


def test_a_wrong_result_is_rejected(tuner, monkeypatch, capsys):
    def wrong(case, config):
        def call(count, *arguments):
            return [1.5 * y for y in case.function("reference")(*arguments)[0]]

        return call

    monkeypatch.setattr(tuner, "_dual_matmul_call", wrong)
    assert tuner.tune_case(case_named("dual_matmul-one-row"), 2, 1) is None
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2 and all("error above" in line["rejected"] for line in lines)


def test_milliseconds_are_of_one_call_and_the_median_of_the_runs(tuner, monkeypatch):
    clock = iter([0.0, 0.8, 10.0, 10.4, 20.0, 28.0])
    monkeypatch.setattr(tuner.time, "perf_counter", lambda: next(clock))
    called = []

    def call(count, x):
        jax.debug.callback(lambda count: called.append(int(count)), count, ordered=True)
        return x + count

    assert tuner.measured_ms(call, (jnp.ones(3, jnp.int32),), 4, runs=3) == pytest.approx(200.0)
    jax.effects_barrier()
    assert called == [0, 1, 2, 3] * 4
