"""Gradients as the engine sums them, beside live requests, against jax.grad and PEFT."""

import dataclasses

import numpy as np
import pytest
from helpers import (
    GRADIENT_TOLERANCE,
    TORCH_GRADIENT_TOLERANCE,
    Recorder,
    drain,
    draw_lora,
    draw_rows,
    draw_tokens,
    make_engine,
    peft_gradients,
    tiny_config,
    tiny_weights,
    torch_model,
    torch_sum_loss,
    whole_sequence_gradients,
    worst_gradient_error,
    write_adapter,
    write_model,
)

from flexjax.config import FinetuneConfig, LoraConfig, SamplingParams

QKV = ("q_proj", "k_proj", "v_proj")

# name: family, model changes, engine options, adapter, lengths of the rows, rows a batch
CASES = {
    "packed": (
        "llama",
        {},
        {"tile_order": "window_major", "saved_activations": "full", "page_size": 8},
        LoraConfig(r=4, alpha=6.0),
        (2, 5, 3, 9, 4, 7, 2, 11, 6, 3),
        10,
    ),
    "cut": (
        "qwen2",
        {},
        {
            "tile_order": "layer_major",
            "saved_activations": "inputs",
            "page_size": 4,
            "window_buckets": (8,),
            "tile_layers": 2,  # of 3
        },
        LoraConfig(r=3, alpha=5.0, use_rslora=True),
        (37, 5, 61, 3, 2, 44),
        3,
    ),
    "upper-layers": (
        "mistral",
        {},
        {
            "tile_order": "window_major",
            "saved_activations": "inputs",
            "page_size": 16,
            "tile_layers": 1,
        },
        LoraConfig(
            r=5, alpha=7.0, target_modules=("k_proj", "up_proj"), layers_to_transform=(1, 2)
        ),
        (25, 13, 40, 6),
        2,
    ),
    "dividing": (
        "qwen3",
        {"num_layers": 4},
        {
            "tile_order": "layer_major",
            "saved_activations": "full",
            "page_size": 8,
            "window_buckets": (7, 19),
            "tile_layers": 2,  # of 4
        },
        LoraConfig(r=2, alpha=3.0, target_modules=(*QKV, "o_proj", "down_proj")),
        (30, 3, 8, 21, 50, 2),
        6,
    ),
}
_seen: dict[str, float] = {}


@pytest.fixture(scope="module", autouse=True)
def report(request):
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        for name, error in _seen.items():
            print(f"\nengine gradients, {name}: max relative error {error:.2e}", end="")


@dataclasses.dataclass
class Finished:
    """A job that ran beside requests, and what was recorded of it."""

    name: str
    config: object
    weights: object
    lora: LoraConfig
    arrays: dict
    adapter_dir: object
    batches: list
    recorder: Recorder
    job: object
    alone: list
    beside: list


def finetune_config(rows, batch_size, adapter_dir, name="job", **options):
    """A job that changes nothing (rate 0), so that every batch sees the initial adapter."""
    defaults = {"learning_rate": 0.0, "schedule": "constant", "shuffle": False}
    return FinetuneConfig(
        adapter=name,
        dataset=[row.source for row in rows],
        init_adapter=adapter_dir,
        batch_size=batch_size,
        **{**defaults, **options},
    )


@pytest.fixture(scope="module", params=CASES)
def finished(request, tmp_path_factory):
    family, changes, options, lora, lengths, batch_size = CASES[request.param]
    rng = np.random.default_rng(len(request.param))
    path = tmp_path_factory.mktemp(request.param)
    config = tiny_config(family, **changes)
    weights = tiny_weights(config, seed=3)
    arrays = draw_lora(rng, config, lora)
    adapter_dir = write_adapter(path / "adapter", config, lora, arrays)
    other = LoraConfig(r=1, alpha=4.0, target_modules=("o_proj", "gate_proj"))
    other_dir = write_adapter(path / "other", config, other, draw_lora(rng, config, other))
    rows = draw_rows(rng, lengths, is_masked=True)
    engine = make_engine(config, weights, **options)
    engine.load_adapter("other", other_dir)
    prompts = [draw_tokens(rng, n) for n in (21, 3, 38, 9, 17, 6)]
    params = SamplingParams(max_tokens=25, ignore_eos=True, logprobs=0)
    names = ["other", None] * 3
    alone = engine.generate(prompts, params, adapter=names)
    with Recorder(engine) as recorder:
        job = engine.finetune(finetune_config(rows, batch_size, adapter_dir))
        outputs = [
            engine.add_request(prompt, params, adapter=name)
            for prompt, name in zip(prompts, names, strict=True)
        ]
        drain(engine)
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    beside = [output.result() for output in outputs]
    return Finished(
        request.param, config, weights, lora, arrays, adapter_dir, batches, recorder, job, alone,
        beside,
    )  # fmt: skip


def test_engine_gradients_match_jax_grad(finished):
    recorder = finished.recorder
    assert finished.job.status == "succeeded"
    assert sum(step.is_mixed for step in recorder.steps) >= 3
    assert sum(bool(s.decode and s.backward) for s in recorder.steps) >= 1
    assert len(recorder.gradients) == len(finished.batches)
    for batch, (_, grads, loss) in zip(finished.batches, recorder.gradients, strict=True):
        expected_loss, expected = whole_sequence_gradients(
            finished.config, finished.weights, finished.arrays, finished.lora.scale, batch
        )
        error = worst_gradient_error(grads, mask_layers(finished.lora, expected))
        _seen[finished.name] = max(error, _seen.get(finished.name, 0.0))
        assert abs(loss - expected_loss) <= 1e-5 * expected_loss
        assert error <= GRADIENT_TOLERANCE


def mask_layers(lora, grads):
    """Without the layers that have no adapter (their arrays are zero, so are the gradients)."""
    for pair in grads.values():
        for grad in pair.values():
            chosen = lora.layers_to_transform or range(len(grad))
            assert not np.delete(grad, chosen, axis=0).any()
    return grads


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_engine_gradients_match_peft(finished, tmp_path):
    pytest.importorskip("torch", reason="the oracle (PEFT) needs torch")
    peft = pytest.importorskip("peft", reason="PEFT is the oracle")
    base = torch_model(write_model(tmp_path, finished.config, finished.weights))
    model = peft.PeftModel.from_pretrained(base, str(finished.adapter_dir), is_trainable=True)
    batch, (_, grads, loss) = finished.batches[0], finished.recorder.gradients[0]
    total = sum(torch_sum_loss(model.eval(), row.tokens, row.targets) for row in batch)
    total.backward()
    chosen = list(finished.lora.layers_to_transform or range(finished.config.num_layers))
    ours = {n: {m: grad[chosen] for m, grad in pair.items()} for n, pair in grads.items()}
    error = worst_gradient_error(ours, peft_gradients(model))
    _seen[f"{finished.name} (PEFT)"] = error
    assert abs(loss - total.item()) <= 1e-5 * total.item()
    assert error <= TORCH_GRADIENT_TOLERANCE


def test_requests_do_not_feel_the_job(finished):
    for alone, beside in zip(finished.alone, finished.beside, strict=True):
        assert beside.token_ids == alone.token_ids
        pairs = zip(beside.logprobs, alone.logprobs, strict=True)
        assert max(abs(a.logprob - b.logprob) for a, b in pairs) <= 2e-5


# Groups that lose their pages, and jobs that end before their time.


@pytest.fixture(scope="module", params=["window_major", "layer_major"])
def crowded(request, tmp_path_factory):
    """An engine whose pages hold two groups of the job, or a request."""
    config = tiny_config("llama", num_layers=2)
    weights = tiny_weights(config, seed=5)
    rng = np.random.default_rng(11)
    lora = LoraConfig(r=3, alpha=4.0, target_modules=("q_proj", "v_proj", "down_proj"))
    arrays = draw_lora(rng, config, lora)
    path = write_adapter(tmp_path_factory.mktemp("a") / "adapter", config, lora, arrays)
    engine = make_engine(
        config,
        weights,
        max_context_len=48,
        page_size=4,
        num_pages=16,
        window_buckets=(8,),
        chunk_buckets=(20,),
        tile_order=request.param,
        tile_layers=1,
    )
    return engine, config, weights, lora, arrays, path


def check_batches(crowded, recorder, rows, batch_size, label):
    _, config, weights, lora, arrays, _ = crowded
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    assert len(recorder.gradients) == len(batches)
    for batch, (_, grads, loss) in zip(batches, recorder.gradients, strict=True):
        args = (config, weights, arrays, lora.scale, batch)
        expected_loss, expected = whole_sequence_gradients(*args)
        error = worst_gradient_error(grads, expected)
        _seen[label] = max(error, _seen.get(label, 0.0))
        assert abs(loss - expected_loss) <= 1e-5 * expected_loss, (loss, expected_loss)
        assert error <= GRADIENT_TOLERANCE


@pytest.mark.parametrize("every", [2, 3, 5, 7, 8, 11])
def test_evicted_groups_are_recomputed(crowded, rng, every):
    """Requests take pages at many different points of the batch."""
    engine, path = crowded[0], crowded[-1]
    rows = draw_rows(rng, (20, 20, 18, 17, 19, 3, 20, 16), is_masked=True)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    with Recorder(engine) as recorder:
        job = engine.finetune(finetune_config(rows, 4, path, name=f"evicted-{every}"))
        for index in range(3_000):
            if index % every == every - 1 and index < 60 and not engine.stats().num_running:
                engine.add_request(draw_tokens(rng, int(rng.integers(24, 46))), params)
            if not engine.step():
                break
            engine.check_integrity()
    assert job.status == "succeeded"
    assert recorder.num_discarded > 0
    engine.unload_adapter(f"evicted-{every}")
    check_batches(crowded, recorder, rows, 4, "evicted")


@pytest.mark.parametrize("steps", [4, 6, 8, 10])
def test_a_cancelled_job_leaves_nothing_behind(crowded, rng, steps):
    engine, path = crowded[0], crowded[-1]
    rows = draw_rows(rng, (20, 19, 17, 20))
    job = engine.finetune(finetune_config(rows, 4, path, name="cancelled"))
    for _ in range(steps):
        engine.step()
    job.cancel()
    rows = draw_rows(rng, (18, 11, 20))
    with Recorder(engine) as recorder:
        job = engine.finetune(finetune_config(rows, 3, path, name="next"))
        drain(engine)
    assert job.status == "succeeded"
    engine.unload_adapter("next")
    check_batches(crowded, recorder, rows, 3, "after a cancelled job")


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_a_diverged_job_leaves_nothing_behind(crowded, rng):
    """NaN in the accumulators or in pages must not reach the next job."""
    engine, path = crowded[0], crowded[-1]
    prompt = draw_tokens(rng, 13)
    params = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=0)
    alone = engine.generate([prompt], params)[0]
    rows = draw_rows(rng, (19, 18, 17, 5, 20, 13))
    options = {"learning_rate": 1e30, "max_grad_norm": None, "epochs": 3}
    job = engine.finetune(finetune_config(rows, 2, path, name="diverged", **options))
    outputs = [engine.add_request(prompt, params) for _ in range(4)]
    drain(engine)
    assert job.status == "failed"
    assert any("not finite" in e.message and e.level == "error" for e in job.events)
    for output in outputs:
        assert output.result().token_ids == alone.token_ids
        assert all(np.isfinite(t.logprob) for t in output.result().logprobs)
    rows = draw_rows(rng, (20, 20, 20, 20))
    with Recorder(engine) as recorder:
        job = engine.finetune(finetune_config(rows, 4, path, name="next"))
        drain(engine)
    assert job.status == "succeeded"
    engine.unload_adapter("next")
    check_batches(crowded, recorder, rows, 4, "after a diverged job")
