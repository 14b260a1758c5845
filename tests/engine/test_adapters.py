"""Adapters in a live engine: round trips, mixed batches, slots, versions."""

import dataclasses

import numpy as np
import pytest
from helpers import (
    check_greedy,
    drain,
    draw_lora,
    draw_rows,
    draw_tokens,
    logprob_gap,
    make_engine,
    merged_weights,
    tiny_config,
    tiny_weights,
    torch_model,
    write_adapter,
    write_model,
)

from flexjax.config import LORA_TARGETS, FinetuneConfig, LoraConfig, SamplingParams
from flexjax.errors import AdapterNotFoundError, CapacityError, JobStateError
from flexjax.io.peft_adapter import load_peft_adapter

LORAS = [
    LoraConfig(r=1, alpha=2.0),
    LoraConfig(r=5, alpha=10.0, target_modules=("q_proj", "v_proj")),
    LoraConfig(r=3, alpha=4.5, use_rslora=True),
    LoraConfig(r=2, alpha=3.0, target_modules=("down_proj",)),
    LoraConfig(r=4, alpha=1.0, target_modules=("gate_proj", "up_proj"), use_rslora=True),
    LoraConfig(r=5, alpha=6.0, layers_to_transform=(1,)),
    LoraConfig(r=2, alpha=8.0, target_modules=("k_proj", "o_proj"), layers_to_transform=(0, 2)),
    LoraConfig(r=3, alpha=0.5),
]
PARAMS = SamplingParams(max_tokens=20, ignore_eos=True, logprobs=0)


@dataclasses.dataclass
class World:
    """An engine with its model, and a PEFT directory for each of `LORAS`."""

    engine: object
    config: object
    weights: object
    arrays: list
    paths: list

    def merged(self, index):
        return merged_weights(self.config, self.weights, self.arrays[index], LORAS[index].scale)

    def reset(self):
        drain(self.engine)
        for info in self.engine.adapters():
            self.engine.unload_adapter(info.name)
        self.engine.check_integrity()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    config = tiny_config("qwen2")
    weights = tiny_weights(config, seed=6)
    rng = np.random.default_rng(1)
    arrays = [draw_lora(rng, config, lora) for lora in LORAS]
    path = tmp_path_factory.mktemp("adapters")
    paths = [
        write_adapter(path / str(i), config, lora, one)
        for i, (lora, one) in enumerate(zip(LORAS, arrays, strict=True))
    ]
    engine = make_engine(
        config, weights, max_adapters=8, max_running=9, decode_buckets=(9,), max_jobs=1
    )
    return World(engine, config, weights, arrays, paths)


@pytest.fixture
def world(shared):
    shared.reset()
    yield shared
    shared.reset()


@pytest.mark.parametrize("index", range(len(LORAS)))
def test_round_trip_is_exact(world, tmp_path, index):
    world.engine.load_adapter("a", world.paths[index])
    world.engine.save_adapter("a", tmp_path / "out")
    first = load_peft_adapter(world.paths[index], world.config)
    second = load_peft_adapter(tmp_path / "out", world.config)
    assert first.config == second.config and first.arrays.keys() == second.arrays.keys()
    for name, pair in first.arrays.items():
        for part, array in pair.items():
            np.testing.assert_array_equal(array, second.arrays[name][part])
            np.testing.assert_array_equal(array, world.arrays[index][name][part])


def test_eight_adapters_and_the_base_in_one_batch(world):
    engine = world.engine
    rng = np.random.default_rng(2)
    prompt = draw_tokens(rng, 11)
    names = [f"a{i}" for i in range(8)]
    for name, path in zip(names, world.paths, strict=True):
        engine.load_adapter(name, path)
    choices = [*names, None]
    single = [engine.generate(prompt, PARAMS, adapter=name)[0] for name in choices]
    order = rng.permutation(9)
    mixed = engine.generate([prompt] * 9, PARAMS, adapter=[choices[i] for i in order])
    for index, output in zip(order, mixed, strict=True):
        assert logprob_gap(output, single[index]) <= 2e-5
        weights = world.merged(index) if index < 8 else world.weights
        check_greedy(world.config, weights, output)
        assert output.adapter == choices[index]
    assert len({output.token_ids for output in mixed}) >= 8


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_match_peft(world, tmp_path):
    torch = pytest.importorskip("torch", reason="the oracle (PEFT) needs torch")
    peft = pytest.importorskip("peft", reason="PEFT is the oracle")
    base = write_model(tmp_path, world.config, world.weights)
    prompt = draw_tokens(np.random.default_rng(3), 7)
    for index in (0, 2, 5, 6):
        world.engine.load_adapter("a", world.paths[index])
        output = world.engine.generate(prompt, PARAMS, adapter="a")[0]
        model = peft.PeftModel.from_pretrained(torch_model(base), str(world.paths[index])).eval()
        tokens = torch.tensor([[*prompt, *output.token_ids]])
        with torch.no_grad():
            table = model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert table.argmax(-1).tolist() == list(output.token_ids)
        ours = np.asarray([entry.logprob for entry in output.logprobs])
        np.testing.assert_allclose(ours, table.max(-1).values.numpy(), atol=2e-5)


def test_a_slot_is_not_given_out_while_a_request_reads_it(world):
    engine = world.engine
    rng = np.random.default_rng(4)
    engine.load_adapter("old", world.paths[0])
    outputs = [engine.add_request(draw_tokens(rng, 9), PARAMS, adapter="old") for _ in range(3)]
    for _ in range(4):
        engine.step()
    engine.unload_adapter("old")
    with pytest.raises(AdapterNotFoundError, match="got 'old', loaded: none"):
        engine.add_request([1], PARAMS, adapter="old")
    for i in range(7):
        engine.load_adapter(f"new{i}", world.paths[1 + i % 7])
    with pytest.raises(CapacityError, match="slots are all in use; got 8"):
        engine.load_adapter("one too many", world.paths[1])
    engine.check_integrity()
    drain(engine)
    engine.load_adapter("one too many", world.paths[3])
    for output in outputs:
        check_greedy(world.config, world.merged(0), output.result())
    output = engine.generate(draw_tokens(rng, 5), PARAMS, adapter="one too many")[0]
    check_greedy(world.config, world.merged(3), output)


def test_a_replaced_name_keeps_the_old_weights_for_requests_in_flight(world):
    engine = world.engine
    prompt = draw_tokens(np.random.default_rng(5), 13)
    engine.load_adapter("a", world.paths[0])
    before = engine.add_request(prompt, PARAMS, adapter="a")
    for _ in range(5):
        engine.step()
    engine.load_adapter("a", world.paths[2])
    after = engine.add_request(prompt, PARAMS, adapter="a")
    drain(engine)
    check_greedy(world.config, world.merged(0), before.result())
    check_greedy(world.config, world.merged(2), after.result())
    assert before.result().token_ids != after.result().token_ids
    assert [info.name for info in engine.adapters()] == ["a"]


def test_what_cannot_be_used_is_refused(world, tmp_path):
    engine = world.engine
    large = LoraConfig(r=6, alpha=1.0, target_modules=LORA_TARGETS)
    arrays = draw_lora(np.random.default_rng(0), world.config, large)
    path = write_adapter(tmp_path / "large", world.config, large, arrays)
    with pytest.raises(CapacityError, match="`r` must be at most .*`max_lora_rank`, 5; got 6"):
        engine.load_adapter("large", path)
    with pytest.raises(ValueError, match="`name` must be a non-empty text"):
        engine.load_adapter(" ", world.paths[0])
    for call in (engine.unload_adapter, lambda name: engine.save_adapter(name, tmp_path / "x")):
        with pytest.raises(AdapterNotFoundError, match="'nobody'"):
            call("nobody")
    assert engine.adapters() == []


# Versions of an adapter in training.


def job_config(world, rows, **options):
    return FinetuneConfig(
        adapter="job",
        dataset=[row.source for row in rows],
        init_adapter=world.paths[2],
        schedule="constant",
        shuffle=False,
        **{"batch_size": 2, "learning_rate": 5e-2, **options},
    )


def test_versions_are_published_to_new_requests(world, tmp_path):
    engine, rng = world.engine, np.random.default_rng(6)
    rows = draw_rows(rng, (9, 14, 6, 12, 8, 10, 7, 11))
    prompt = draw_tokens(rng, 12)
    job = engine.finetune(job_config(world, rows, publish_every=1))
    with pytest.raises(AdapterNotFoundError):
        engine.add_request(prompt, PARAMS, adapter="job")
    outputs, weights = {}, {}
    while engine.step():
        infos = {info.name: info for info in engine.adapters()}
        if "job" in infos and infos["job"].version not in outputs:
            version = infos["job"].version
            outputs[version] = engine.add_request(prompt, PARAMS, adapter="job")
            engine.save_adapter("job", tmp_path / str(version))
            adapter = load_peft_adapter(tmp_path / str(version), world.config)
            weights[version] = adapter
            assert infos["job"].is_training == (version < 4)
    assert job.status == "succeeded" and set(outputs) >= {1, 2, 4}
    for version, output in outputs.items():
        adapter = weights[version]
        merged = merged_weights(world.config, world.weights, adapter.arrays, adapter.config.scale)
        assert output.result().adapter_version == version
        check_greedy(world.config, merged, output.result())
    assert len({output.result().token_ids for output in outputs.values()}) > 1
    assert not engine.adapters()[0].is_training


def test_an_adapter_in_training_is_not_replaced(world):
    engine = world.engine
    rows = draw_rows(np.random.default_rng(7), (9, 5))
    job = engine.finetune(job_config(world, rows))
    with pytest.raises(JobStateError, match="is being trained"):
        engine.load_adapter("job", world.paths[0])
    with pytest.raises(JobStateError, match="must not be in training"):
        engine.finetune(job_config(world, rows))
    drain(engine)
    assert job.status == "succeeded"
    engine.load_adapter("job", world.paths[0])


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("rate", [1e6, 1e20, 1e38])
def test_a_diverging_job_harms_nobody(world, rate):
    engine, rng = world.engine, np.random.default_rng(8)
    prompts = [draw_tokens(rng, n) for n in (15, 4, 22, 9)]
    engine.load_adapter("a", world.paths[0])
    names = ["a", None, None, "a"]
    rows = draw_rows(rng, (9, 14, 6, 12, 8, 10))
    config = job_config(world, rows, learning_rate=rate, max_grad_norm=None, epochs=20)
    job = engine.finetune(config)
    outputs = []
    for _ in range(3):
        for prompt, name in zip(prompts, names, strict=True):
            outputs.append(engine.add_request(prompt, PARAMS, adapter=name))
            engine.step()
    drain(engine)
    if rate == 1e6 and job.status == "succeeded":
        # The squares in a norm overflow and make zeros, where XLA's 1 / sqrt(inf) is not NaN.
        loss = f"{job.metrics().losses[1]:.4f}"
        assert [e.message for e in job.events if e.level == "warn"] == [
            f"the gradient of step 2 is exactly 0 though the loss is {loss}: its activations may "
            "have overflowed"
        ]
    else:
        assert job.status == "failed"
        event = job.events[-1]
        assert event.level == "error" and "not finite at step" in event.message
        with pytest.raises(JobStateError, match="failed: loss, gradient or new weights are not"):
            job.wait()
        assert [info.name for info in engine.adapters()] == ["a"]
    for index, output in enumerate(outputs):
        weights = world.merged(0) if names[index % 4] else world.weights
        check_greedy(world.config, weights, output.result())
