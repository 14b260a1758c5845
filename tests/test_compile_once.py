"""After warm-up nothing is compiled: 200 mixed requests and a job."""

import contextlib

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    draw_lora,
    draw_rows,
    draw_tokens,
    make_engine,
    tiny_config,
    tiny_weights,
    write_adapter,
)

from flexjax.config import FinetuneConfig, LoraConfig, SamplingParams

_counts: list[str] = []
_is_listening = [False]


def _listen(event: str, duration: float, **kwargs) -> None:
    if _is_listening[0] and ("backend_compile" in event or "jaxpr_trace" in event):
        _counts.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen)


@contextlib.contextmanager
def compilations():
    """Traces and compilations while it is open."""
    _counts.clear()
    _is_listening[0] = True
    try:
        yield _counts
    finally:
        _is_listening[0] = False


def test_the_counter_counts():
    function = jax.jit(lambda x: x * 3 + 1)
    array = jnp.zeros(7)
    with compilations() as seen:
        function(array).block_until_ready()
    assert any("backend_compile" in event for event in seen)
    with compilations() as seen:
        function(array).block_until_ready()
    assert not seen


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    config = tiny_config("llama", num_layers=2)
    rng = np.random.default_rng(12)
    path = tmp_path_factory.mktemp("adapters")
    dirs = []
    for index, rank in enumerate((1, 3, 5)):
        lora = LoraConfig(r=rank, alpha=2.0 * rank)
        dirs.append(write_adapter(path / str(index), config, lora, draw_lora(rng, config, lora)))
    engine = make_engine(
        config, tiny_weights(config), chunk_buckets=(8, 24), num_pages=24, max_adapters=16
    )
    return engine, dirs


def draw_params(rng):
    return SamplingParams(
        max_tokens=int(rng.integers(1, 24)),
        temperature=float(rng.choice([0.0, 0.7, 1.5])),
        top_k=int(rng.choice([0, 5])),
        top_p=float(rng.choice([1.0, 0.8])),
        min_p=float(rng.choice([0.0, 0.1])),
        seed=int(rng.integers(1000)),
        repetition_penalty=float(rng.choice([1.0, 1.3])),
        presence_penalty=float(rng.choice([0.0, 0.5])),
        logprobs=None if rng.random() < 0.5 else int(rng.integers(0, 6)),
        stop="t1 t2" if rng.random() < 0.2 else (),
        ignore_eos=bool(rng.random() < 0.5),
    )


def run(engine, dirs, rng, num_requests):
    """Requests and a job that is evaluated and published; adapters come and go."""
    rows, evals = draw_rows(rng, rng.integers(2, 60, 12)), draw_rows(rng, (5, 30))
    config = FinetuneConfig(
        adapter="job", dataset=[row.source for row in rows], lora=LoraConfig(r=4), batch_size=4,
        epochs=2, publish_every=1, eval_dataset=[row.source for row in evals], eval_every=2,
    )  # fmt: skip
    job = engine.finetune(config)
    outputs = []
    for index in range(num_requests):
        if index % 40 == 0:
            for number, path in enumerate(dirs):
                engine.load_adapter(f"a{number}", path)
        names = [None, *(info.name for info in engine.adapters())]
        prompt = draw_tokens(rng, int(rng.integers(1, 60)))
        name = names[int(rng.integers(len(names)))]
        outputs.append(engine.add_request(prompt, draw_params(rng), adapter=name))
        for _ in range(int(rng.integers(0, 4))):
            engine.step()
        if index % 17 == 5:
            engine.abort(outputs[int(rng.integers(len(outputs)))])
    while engine.step():
        pass
    assert job.status == "succeeded"
    assert all(output.finished.is_set() for output in outputs)
    for info in engine.adapters():
        engine.unload_adapter(info.name)
    return outputs


def test_a_mixed_run_compiles_nothing(world, rng):
    engine, dirs = world
    run(engine, dirs, rng, 3)
    num_programs = engine.num_programs
    with compilations() as seen:
        outputs = run(engine, dirs, rng, 200)
    print(f"{len(outputs)} requests, {engine.stats().steps} steps, {len(seen)} compilations")
    assert seen == []
    assert engine.num_programs == num_programs
    assert sum(output.result().num_preemptions for output in outputs) > 0


def test_the_first_run_compiles_nothing_either(world):
    """All programs are compiled when the engine starts: also the first request compiles nothing."""
    config = tiny_config("llama", num_layers=2)
    engine = make_engine(config, tiny_weights(config), max_jobs=0)
    with compilations() as seen:
        engine.generate([[1, 2, 3]], SamplingParams(max_tokens=5, temperature=0.5, logprobs=2))
    assert not [event for event in seen if "backend_compile" in event]
