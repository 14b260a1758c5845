"""Jobs: two at once, queue, pause, cancel, evaluation, waiting."""

import numpy as np
import pytest
from helpers import (
    drain,
    draw_lora,
    draw_rows,
    make_engine,
    relative,
    tiny_config,
    tiny_weights,
    whole_sequence_gradients,
    write_adapter,
)

from flexjax.config import FinetuneConfig, LoraConfig, SamplingParams
from flexjax.errors import CapacityError, DatasetError, JobStateError
from flexjax.io.peft_adapter import load_peft_adapter

CONFIG = tiny_config("qwen3", num_layers=2)
WEIGHTS = tiny_weights(CONFIG, seed=8)
LORA = LoraConfig(r=3, alpha=5.0)


@pytest.fixture(scope="module")
def engine():
    return make_engine(CONFIG, WEIGHTS, max_jobs=2, page_size=4)


@pytest.fixture(scope="module")
def adapter_dirs(tmp_path_factory):
    rng, path = np.random.default_rng(3), tmp_path_factory.mktemp("adapters")
    return [
        write_adapter(path / str(i), CONFIG, LORA, draw_lora(rng, CONFIG, LORA)) for i in range(2)
    ]


@pytest.fixture(autouse=True)
def clean(engine):
    yield
    for job in engine.jobs():
        if job.status in ("queued", "running", "paused"):
            job.cancel()
    drain(engine)
    for info in engine.adapters():
        engine.unload_adapter(info.name)
    engine.check_integrity()


def start(engine, name, rows, path, **options):
    defaults = {"batch_size": 2, "learning_rate": 1e-2, "schedule": "cosine", "epochs": 2}
    config = FinetuneConfig(
        adapter=name,
        dataset=[row.source for row in rows],
        init_adapter=path,
        **{**defaults, **options},
    )
    return engine.finetune(config)


def trained(engine, name, tmp_path):
    engine.save_adapter(name, tmp_path / name)
    arrays = load_peft_adapter(tmp_path / name, CONFIG).arrays
    engine.unload_adapter(name)
    return arrays


def worst(first, second):
    return max(relative(first[n][m], second[n][m]) for n in first for m in "AB")


def test_two_jobs_at_once_give_what_they_give_alone(engine, adapter_dirs, rng, tmp_path):
    sets = [draw_rows(rng, (20, 3, 9, 41, 7), is_masked=True)]
    sets.append(draw_rows(rng, (5, 16, 30, 8, 2, 11)))
    alone = []
    for index, rows in enumerate(sets):
        start(engine, f"j{index}", rows, adapter_dirs[index]).wait()
        alone.append(trained(engine, f"j{index}", tmp_path))
    jobs = [start(engine, f"j{i}", sets[i], adapter_dirs[i]) for i in range(2)]
    seen = set()
    while engine.step():
        seen.add(tuple(job.status.value for job in jobs))
        engine.check_integrity()
    assert ("running", "running") in seen
    for index, job in enumerate(jobs):
        assert job.status == "succeeded"
        gap = worst(trained(engine, f"j{index}", tmp_path), alone[index])
        print(f"two jobs at once, {index}: relative difference {gap:.2e}")
        assert gap <= 1e-4


def test_a_job_behind_max_jobs_waits(engine, adapter_dirs, rng):
    rows = draw_rows(rng, (9, 5, 7, 8))
    jobs = [start(engine, f"j{i}", rows, adapter_dirs[0]) for i in range(4)]
    assert [job.status.value for job in jobs] == ["running"] * 2 + ["queued"] * 2
    jobs[2].cancel()
    assert jobs[3].status == "queued"
    assert jobs[3].wait() == "succeeded"
    drain(engine)
    assert [job.status.value for job in jobs[:3]] == ["succeeded", "succeeded", "cancelled"]
    assert all("started" in job.events[1].message for job in (jobs[0], jobs[1], jobs[3]))


def test_pause_and_resume(engine, adapter_dirs, rng, tmp_path):
    rows = draw_rows(rng, (9, 5, 7, 8, 20, 31))
    start(engine, "j", rows, adapter_dirs[0], seed=4).wait()
    straight = trained(engine, "j", tmp_path)
    job = start(engine, "j", rows, adapter_dirs[0], seed=4)
    for _ in range(6):
        engine.step()
    job.pause()
    drain(engine)
    num_steps = len(job.metrics().steps)
    assert job.status == "paused" and 0 < num_steps < job.metrics().total_steps
    with pytest.raises(JobStateError, match="is paused; resume it before waiting"):
        job.wait()
    assert engine.generate([1, 2, 3], SamplingParams(max_tokens=3))
    assert len(job.metrics().steps) == num_steps
    job.resume()
    assert job.wait() == "succeeded"
    gap = worst(trained(engine, "j", tmp_path), straight)
    assert gap <= 1e-6


def test_cancel(engine, adapter_dirs, rng):
    job = start(engine, "j", draw_rows(rng, (9, 5, 7, 8)), adapter_dirs[0], epochs=50)
    for _ in range(9):
        engine.step()
    job.cancel()
    engine.check_integrity()
    assert job.status == "cancelled" and engine.adapters() == []
    assert job.wait(timeout=0) == "cancelled"
    for call in (job.cancel, job.pause):
        with pytest.raises(JobStateError, match="it has ended \\(cancelled\\)"):
            call()
    with pytest.raises(JobStateError, match="must be paused to be resumed; it is cancelled"):
        job.resume()


@pytest.mark.parametrize("steps", range(1, 12))
def test_cancel_at_any_step(engine, adapter_dirs, rng, steps):
    """Also while requests run, and while results of the job are still on the device."""
    job = start(engine, "j", draw_rows(rng, (9, 5, 27, 8)), adapter_dirs[0], publish_every=1)
    output = engine.add_request([3, 1, 4, 1, 5], SamplingParams(max_tokens=12, ignore_eos=True))
    for _ in range(steps):
        engine.step()
    job.cancel()
    drain(engine)
    assert output.result().finish_reason == "length"
    assert not any(info.is_training for info in engine.adapters())


def test_wait_gives_up_in_time(engine, adapter_dirs, rng):
    job = start(engine, "j", draw_rows(rng, (9, 5)), adapter_dirs[0], epochs=10_000)
    assert job.wait(timeout=0.05) == "running"
    with engine:
        assert job.wait(timeout=0.05) == "running"
    job.cancel()


@pytest.mark.parametrize("every", [0, 1, 2])
def test_evaluation_matches_the_dense_loss(engine, adapter_dirs, rng, every):
    rows = draw_rows(rng, (9, 5, 12, 8, 20))
    evals = draw_rows(rng, (31, 4, 17, 40, 2), is_masked=True)
    job = start(
        engine, "j", rows, adapter_dirs[1], learning_rate=0.0, batch_size=2,
        eval_dataset=[row.source for row in evals], eval_every=every,
    )  # fmt: skip
    job.wait()
    arrays = load_peft_adapter(adapter_dirs[1], CONFIG).arrays
    total, _ = whole_sequence_gradients(CONFIG, WEIGHTS, arrays, LORA.scale, evals)
    expected = total / sum(int((row.targets >= 0).sum()) for row in evals)
    records = job.metrics().evals
    due = {0: [3, 6], 1: [1, 2, 3, 4, 5, 6], 2: [2, 4, 6]}[every]
    assert [record.step for record in records] == due
    for record in records:
        assert abs(record.loss - expected) <= 1e-5 * expected


def test_evaluation_does_not_change_training(engine, adapter_dirs, rng, tmp_path):
    rows, evals = draw_rows(rng, (9, 25, 12, 8)), draw_rows(rng, (31, 4))
    start(engine, "j", rows, adapter_dirs[0]).wait()
    without = trained(engine, "j", tmp_path)
    options = {"eval_dataset": [row.source for row in evals], "eval_every": 1}
    start(engine, "j", rows, adapter_dirs[0], **options).wait()
    assert worst(trained(engine, "j", tmp_path), without) <= 1e-6


def test_metrics(engine, adapter_dirs, rng):
    rows = draw_rows(rng, (9, 25, 12, 8, 6), is_masked=True)
    job = start(engine, "j", rows, adapter_dirs[0], shuffle=False, epochs=1)
    job.wait()
    metrics = job.metrics()
    assert [record.step for record in metrics.steps] == [1, 2, 3] and metrics.total_steps == 3
    assert [record.tokens for record in metrics.steps] == [34, 20, 6]
    targets = [int((row.targets >= 0).sum()) for row in rows]
    expected = [sum(targets[:2]), sum(targets[2:4]), targets[4]]
    assert [record.target_tokens for record in metrics.steps] == expected
    arrays = load_peft_adapter(adapter_dirs[0], CONFIG).arrays
    total, grads = whole_sequence_gradients(CONFIG, WEIGHTS, arrays, LORA.scale, rows[:2])
    first = metrics.steps[0]
    assert abs(first.loss - total / expected[0]) <= 1e-5 * first.loss
    parts = [part / expected[0] for pair in grads.values() for part in pair.values()]
    norm = np.sqrt(sum((part**2).sum() for part in parts))
    assert abs(first.grad_norm - norm) <= 1e-5 * norm


def test_what_cannot_be_trained_is_refused(engine, adapter_dirs, rng):
    rows = draw_rows(rng, (9, 5))
    with pytest.raises(DatasetError, match="more than `max_seq_len`=96"):
        start(engine, "j", draw_rows(rng, (97,)), adapter_dirs[0])
    with pytest.raises(CapacityError, match="`max_seq_len` must be at most .* 96; got 97"):
        start(engine, "j", rows, adapter_dirs[0], max_seq_len=97)
    with pytest.raises(CapacityError, match="`window` must be at most .* 16; got 17"):
        start(engine, "j", rows, adapter_dirs[0], window=17)
    with pytest.raises(CapacityError, match="`r` must be at most"):
        start(engine, "j", rows, None, lora=LoraConfig(r=6))
    with pytest.raises(ValueError, match="`layers_to_transform` must be below 2"):
        start(engine, "j", rows, None, lora=LoraConfig(r=2, layers_to_transform=(2,)))
    assert not [job for job in engine.jobs() if job.status in ("queued", "running")]
