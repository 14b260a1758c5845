"""The engine with kernels, a GPU's interpreted: the same outputs and the same exact gradients."""

import pytest
from helpers import (
    GRADIENT_TOLERANCE,
    LOGPROB_TOLERANCE,
    Recorder,
    drain,
    draw_lora,
    draw_rows,
    draw_tokens,
    logprob_gap,
    make_engine,
    tiny_config,
    tiny_weights,
    whole_sequence_gradients,
    worst_gradient_error,
    write_adapter,
)

from flexjax.config import EngineConfig, FinetuneConfig, LoraConfig, SamplingParams
from flexjax.engine.sizing import has_llvm
from pallas_kernels import can_run_llvm

# family, engine options, kernels; interpreted kernels take long to compile
CASES = {
    "llama": ("llama", {"page_size": 16}, "fused"),
    "qwen3, half the layers": (
        "qwen3",
        {"page_size": 16, "tile_layers": 1, "tile_order": "layer_major"},
        "fused",
    ),
    "qwen2": ("qwen2", {"page_size": 16}, "pallas_triton"),
}


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setenv("PALLAS_KERNELS_INTERPRET", "1")


def run(config, weights, adapter_dir, prompts, rows, **options):
    """Requests with and without an adapter beside a job.

    Returns the outputs, what was recorded, and whether steps run the CPU's kernels: a set.
    """
    engine = make_engine(config, weights, max_context_len=48, **options)
    engine.load_adapter("other", adapter_dir)
    params = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=0)
    with Recorder(engine) as recorder:
        job = engine.finetune(
            FinetuneConfig(
                adapter="job",
                dataset=[row.source for row in rows],
                init_adapter=adapter_dir,
                batch_size=len(rows),
                learning_rate=0.0,
                schedule="constant",
                shuffle=False,
            )
        )
        names = ["other", None] * len(prompts)
        outputs = [
            engine.add_request(prompt, params, adapter=name)
            for prompt, name in zip(prompts, names, strict=False)
        ]
        drain(engine)
    assert job.status == "succeeded"
    programs = engine._runner.programs._compiled.items()
    steps = [program.as_text() for key, program in programs if key[0] == "step"]
    is_ours = {"pallas_kernels_stacked_matmul" in text for text in steps}
    return [output.result() for output in outputs], recorder, is_ours


# One family in every run; the others, minutes each, with -m gate.
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow if case == "llama" else pytest.mark.gate)
        for case in CASES
    ],
)
def test_kernels_change_nothing(case, interpreted, rng, tmp_path):
    check(rng, tmp_path, *CASES[case])


# By default, a CPU runs its kernels.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options", "kernels"),
    [
        ("qwen2", {"page_size": 4, "saved_activations": "inputs"}, None),
        ("qwen3", {"page_size": 8, "tile_layers": 1, "tile_order": "layer_major"}, "llvm"),
        ("mistral", {"page_size": 16}, "llvm"),
    ],
)
def test_the_kernels_of_a_cpu_change_nothing(family, options, kernels, rng, tmp_path, monkeypatch):
    monkeypatch.delenv("PALLAS_KERNELS_LLVM_LEVEL", raising=False)
    if not can_run_llvm():
        pytest.skip("needs llvmlite")
    assert check(rng, tmp_path, family, options, kernels) == {True}


def check(rng, tmp_path, family, options, kernels):
    """Runs the same work by the reference and by kernels, and compares both with `jax.grad`.

    Returns whether the steps with kernels run those of a CPU.
    """
    config = tiny_config(family, num_layers=2)
    weights = tiny_weights(config, seed=9)
    lora = LoraConfig(r=4, alpha=6.0)
    arrays = draw_lora(rng, config, lora)
    adapter_dir = write_adapter(tmp_path / "adapter", config, lora, arrays)
    prompts = [draw_tokens(rng, n) for n in (19, 5, 11)]
    rows = draw_rows(rng, (21, 4, 9), is_masked=True)
    work = (config, weights, adapter_dir, prompts, rows)
    plain, reference, is_ours = run(*work, kernels="reference", **options)
    assert is_ours == {False}
    expected_loss, expected = whole_sequence_gradients(config, weights, arrays, lora.scale, rows)
    outputs, recorder, is_ours = run(*work, kernels=kernels, **options)
    ((_, grads, loss),) = recorder.gradients
    error = worst_gradient_error(grads, expected)
    assert worst_gradient_error(reference.gradients[0][1], expected) <= GRADIENT_TOLERANCE
    gap = max(logprob_gap(a, b) for a, b in zip(outputs, plain, strict=True))
    print(f"{family}, {kernels}: gradients {error:.2e}, logprobs {gap:.2e}")
    assert any(step.backward and (step.decode or step.prefill) for step in recorder.steps)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]
    assert gap <= LOGPROB_TOLERANCE
    assert abs(loss - expected_loss) <= 1e-5 * expected_loss
    assert error <= GRADIENT_TOLERANCE
    return is_ours


def test_triton_kernels_need_a_gpu():
    config = tiny_config("llama", num_layers=1)
    for kernels in ("pallas_triton", "fused"):
        with pytest.raises(NotImplementedError, match="compute capability 8.0; found no NVIDIA"):
            make_engine(config, tiny_weights(config), kernels=kernels)


def test_the_kernels_of_a_cpu_take_float32():
    config = tiny_config("llama", num_layers=1)
    with pytest.raises(ValueError, match="`dtype` must be float32 with `kernels`='llvm'; got bf"):
        make_engine(config, tiny_weights(config), kernels="llvm", dtype="bfloat16")


def test_host_and_kernels_agree_on_what_a_cpu_runs():
    assert has_llvm() == can_run_llvm()


def test_unknown_kernels():
    with pytest.raises(ValueError, match="`kernels` must be None or one of .*; got 'cuda'"):
        EngineConfig(kernels="cuda")
    with pytest.raises(ValueError, match="`saved_activations` must be 'full' with `kernels`"):
        EngineConfig(kernels="fused", saved_activations="inputs")
