import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax.bench.busy_step import busy_batch
from flexjax.bench.device_time import FastDraws, device_times, repeated
from flexjax.layout import Bucket, StepSizes, step_fields, unpack

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_dry_run_goes_through_every_part(tmp_path):
    env = {**os.environ, "PYTHON": sys.executable, "FLEXJAX_GPU_CHECK_OUT": str(tmp_path)}
    command = [str(ROOT / "scripts" / "gpu_check.sh"), "--dry-run"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "gpu_check.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    kinds = [record["kind"] for record in records]
    assert kinds[0] == "header"
    assert records[-1]["failures"] == []
    assert {"numerics", "kernel", "step", "engine", "end"} <= set(kinds)
    ops = {r["name"].split("-")[0] for r in records if r["kind"] == "numerics"}
    assert len(ops) == 6
    assert all(r["difference"] <= r["tolerance"] for r in records if r["kind"] == "numerics")
    (finetuning,) = [r for r in records if r.get("name") == "finetuning alone"]
    assert finetuning["finetuning_tokens_per_s"] > 0
    assert all(np.isfinite(finetuning["losses"]))


def test_without_a_gpu_the_check_says_so(tmp_path):
    env = {**os.environ, "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    command = [str(ROOT / "scripts" / "gpu_check.sh"), "--output", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no GPU" in done.stderr


def test_repeated_calls_really_run_and_add_in_place():
    def add(x, total):
        return jnp.sum(x), total + x

    x = jnp.arange(4.0)
    (total,), token = jax.jit(repeated(add, (1,), 5))(x, jnp.zeros(4))
    np.testing.assert_allclose(total, 5 * x)
    # Every call adds the first element of each result: sum(x), and total[0].
    assert float(token) == 5 * 6.0


def test_device_times_leave_the_arguments_alone():
    total = jnp.zeros(8)
    times = device_times(
        lambda x, total: total + x,
        (jnp.ones(8), total),
        donate_argnums=(1,),
        num_calls=3,
        repeats=2,
    )
    assert len(times) == 2
    assert min(times) > 0
    np.testing.assert_array_equal(total, 0.0)


def test_large_draws_repeat_and_small_ones_do_not():
    draws = FastDraws(0)
    small = draws.standard_normal((3, 4))
    np.testing.assert_array_equal(small.shape, (3, 4))
    large = draws.standard_normal((3, 1 << 20))
    np.testing.assert_array_equal(large[0], large[1])
    assert abs(float(large.std()) - 1.0) < 0.01
    assert FastDraws(0).integers(10) == FastDraws(0).integers(10)


def test_busy_batch_uses_every_row():
    bucket, sizes = Bucket(3, 8, 16, 2), StepSizes(8, 64, 16, 4)
    packed = busy_batch(bucket, sizes, page_size=4, num_pages=64, context_len=20)
    fields = unpack(packed, step_fields(bucket, sizes))
    assert (fields["positions"] >= 0).all()
    assert (fields["kv_slots"] >= 0).all()
    assert len(set(fields["kv_slots"].tolist())) == 11
    assert fields["positions"][:3].tolist() == [19, 19, 19]
    assert (fields["decode_pages"][:, :5] >= 0).all()
    assert (fields["decode_pages"][:, 5:] == -1).all()
    assert fields["num_chunk_pages"] == fields["num_tile_pages"] == 5
    assert fields["tile_arena_slots"].tolist() == list(range(4, 20))
    with pytest.raises(ValueError, match="`context_len` must be at least 16; got 8"):
        busy_batch(bucket, sizes, page_size=4, num_pages=64, context_len=8)
