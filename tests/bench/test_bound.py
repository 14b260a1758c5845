import dataclasses

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from flexjax.bench.bound import Bound, Kernels, Pass, Passes, PassTime, _check_same, part_work
from flexjax.bench.harness import Cost
from flexjax.bench.model import MODELS
from flexjax.bench.side_by_side import Settings
from flexjax.config import EngineConfig

QUICK = MODELS["quick"]
SIZES = Settings(
    model="quick",
    engine=EngineConfig(),
    sample_len=100,
    batch_size=2,
    finetune_steps=3,
    prompt_len=5,
    output_len=7,
    group=4,
    coserve_requests=10,
    coserve_steps=1,
    num_threads=1,
    seed=0,
)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels(QUICK, seed=0)


@pytest.mark.parametrize("is_backward", (False, True))
def test_every_way_multiplies_all_kernels(kernels, is_backward):
    runs = kernels.runs(Pass(3, "layers", is_backward))
    assert {name.split(", ")[0] for name in runs} == {"jax", "torch"}
    assert sum(name.endswith("kernel first") for name in runs) >= 2
    dims = list(QUICK.projection_dims().values()) * QUICK.num_layers
    expected = [(3, num_in if is_backward else num_out) for num_in, num_out in dims]
    first = None
    for name, run in runs.items():
        outputs = [np.asarray(output) for output in run()]
        if name.endswith("kernel first"):
            outputs = [output.T for output in outputs]
        assert [output.shape for output in outputs] == expected, name
        first = first or outputs
        for output, other in zip(outputs, first, strict=True):
            np.testing.assert_allclose(output, other, rtol=1e-3, atol=1e-4)


def test_work_and_bytes_are_those_of_the_model(kernels):
    dims = QUICK.projection_dims().values()
    layers = QUICK.num_layers * sum(num_in * num_out for num_in, num_out in dims)
    head = QUICK.hidden_size * QUICK.vocab_size
    assert kernels.flop(Pass(5, "layers")) == 2 * 5 * layers
    assert kernels.flop(Pass(5, "head", True)) == 2 * 5 * head
    assert kernels.num_bytes == 4 * (layers + head)


def test_the_quicker_way_counts(kernels):
    passes = Passes(kernels, [Pass(2, "head")])
    for _ in range(3):
        passes.measure()
    time = passes.times()[Pass(2, "head")]
    for side in ("jax", "torch"):
        medians = [np.median(s) for name, s in time.samples.items() if name.startswith(side)]
        assert time.seconds[side] == min(medians)
    assert {len(samples) for samples in time.samples.values()} == {3}
    assert passes.read_s() > 0


def test_different_products_are_an_error():
    with pytest.raises(AssertionError, match="Products by b differ by 1.0"):
        _check_same({"a": np.ones((2, 2)), "b": np.full((2, 2), 2.0)})


def test_parts_count_their_passes():
    work = part_work(SIZES)
    forward, backward = Pass(100, "layers"), Pass(100, "layers", True)
    head, head_backward = Pass(100, "head"), Pass(100, "head", True)
    trained = {forward: 6, head: 6, backward: 6, head_backward: 6}
    assert work["finetune"].passes == trained and work["finetune"].reads == 12
    served = {Pass(4, "layers"): 6, Pass(20, "layers"): 1, Pass(4, "head"): 7}
    assert work["generate 8"].passes == served and work["generate 8"].reads == 7
    together = work["coserve"].passes
    assert together[forward] == pytest.approx(2 + 10 * 11 / 100)
    assert together[head] == pytest.approx(2 + 10 * 7 / 100)
    assert together[backward] == together[head_backward] == 2


def test_prompts_of_one_token_count_as_rows():
    work = part_work(dataclasses.replace(SIZES, prompt_len=1))
    assert work["generate 1"].passes == {Pass(1, "layers"): 7, Pass(1, "head"): 7}


def test_bound_divides_the_peer_by_the_products():
    times = {
        work: PassTime(work, 1e9, {"jax": seconds, "torch": 2 * seconds}, {}, {})
        for work, seconds in (
            (Pass(4, "layers"), 0.1),
            (Pass(20, "layers"), 0.4),
            (Pass(4, "head"), 0.2),
        )
    }
    work = part_work(SIZES)["generate 8"]
    products = {side: work.seconds(times, side) for side in ("jax", "torch")}
    assert products["jax"] == pytest.approx(6 * 0.1 + 0.4 + 7 * 0.2)
    assert products["torch"] == pytest.approx(2 * products["jax"])
    bound = Bound("generate 8", 2.5, [Cost(s, 0.0) for s in (9.0, 4.8, 1.0)], products, 1.2)
    assert bound.best_ratio == pytest.approx(4.8 / 2.4)
    assert bound.best_ratio_reading == pytest.approx(4.0)
