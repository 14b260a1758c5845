"""The whole step of large models compiles for GPUs that are not there, within limits."""

import dataclasses
import time

import pytest

from flexjax.builtin_models import builtin_model_config
from flexjax.engine.compile_gate import (
    abstract_arguments,
    compile_ladder,
    compile_step,
    device_config,
    tree_bytes,
)
from flexjax.engine.sizing import Sizing
from flexjax.engine.step_cost import program_cost, step_cost
from flexjax.layout import Bucket
from pallas_kernels import aot
from pallas_kernels.roofline import floor_s

LLAMA = builtin_model_config("llama-3.1-8b")
GIB = 2**30

needs_plugin = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))


def check(report, config, model, max_temp_bytes):
    assert report.fits
    assert report.temp_bytes <= max_temp_bytes
    # Neither the pool, nor the accumulators, nor weights; nor anything else over 1 MiB.
    assert report.copies == ()
    weights, _, state = abstract_arguments(model, config)
    assert report.argument_bytes >= tree_bytes((weights.layers, state.pool))
    assert report.kernels, "every op runs its reference"
    assert [kernel.name for kernel in report.kernels if kernel.spill_bytes] == []
    assert report.floor_s > 0


@needs_plugin
@pytest.mark.parametrize("rows", [(64, 0, 0), (64, 512, 512)], ids=str)
def test_step_of_llama_8b(rows):
    config = device_config(LLAMA, "h200")
    assert Sizing.derive(LLAMA, config, "gpu").max_context_len == 8192
    bucket = Bucket(*rows, LLAMA.num_layers if rows[2] else 0)
    report = compile_step(LLAMA, config, bucket, device="h200")
    check(report, config, LLAMA, 1.5 * GIB)
    names = {kernel.name.partition("__")[0] for kernel in report.kernels}
    assert any("attention" in name for name in names), names


@needs_plugin
@pytest.mark.parametrize("name", ["qwen2.5-14b", "qwen2.5-32b"])
def test_step_of_larger_models(name):
    model = builtin_model_config(name)
    config = device_config(model, "h200")
    bucket = Bucket(64, 512, 512, model.num_layers)
    check(compile_step(model, config, bucket, device="h200"), config, model, 2 * GIB)


@needs_plugin
@pytest.mark.gate
@pytest.mark.parametrize("device", ["h100", "a100"])
def test_step_for_other_devices(device):
    config = device_config(LLAMA, device)
    bucket = Bucket(64, 512, 512, LLAMA.num_layers)
    check(compile_step(LLAMA, config, bucket, device=device), config, LLAMA, 1.5 * GIB)


@needs_plugin
@pytest.mark.gate
def test_ladder_of_llama_8b():
    config = device_config(LLAMA, "h200")
    began_s = time.perf_counter()
    reports = compile_ladder(LLAMA, config, device="h200")
    assert time.perf_counter() - began_s < 360
    sizing = Sizing.derive(LLAMA, config, "gpu")
    assert [r.bucket for r in reports] == sizing.ladder.all_buckets(finetuning=True)
    for report in reports:
        check(report, config, LLAMA, 1.5 * GIB)


def test_device_config_fills_the_memory():
    small, large = (device_config(LLAMA, device) for device in ("h100", "h200"))
    assert small.num_pages < large.num_pages
    for device, config in (("h100", small), ("h200", large)):
        used = tree_bytes(abstract_arguments(LLAMA, config))
        assert 0.5 < used / aot.device(device).memory_bytes < 0.75
    given = device_config(LLAMA, "h100", num_pages=700, max_context_len=1024)
    assert (given.num_pages, given.max_context_len) == (700, 1024)
    with pytest.raises(ValueError, match="`model` must fit a100's 79 GiB"):
        device_config(builtin_model_config("qwen2.5-32b"), "a100", max_context_len=32768)


def test_cost_of_a_decode_step():
    # 6.98e9 parameters in the layers, 2 bytes each; a token's keys and values are 128 KiB.
    cost = step_cost(LLAMA, Bucket(64, 0, 0, 0), context_len=1000)
    weights, pages = 2 * 6_979_321_856, 64 * 1001 * 131072
    assert cost.num_bytes == weights + pages
    attention = 64 * 1000 * 4 * 4096 * 32
    assert cost.flops == 2 * 64 * 6_979_321_856 + attention
    assert 1e3 * floor_s(cost, "h200") == pytest.approx(5.2, abs=0.1)
    # Where rows only decode, the same program samples them: 128,256 x 4,096 weights more.
    program = program_cost(LLAMA, Bucket(64, 0, 0, 0), context_len=1000)
    assert program.num_bytes == cost.num_bytes + 2 * 525_336_576
    assert program.flops == cost.flops + 2 * 64 * 525_336_576
    mixed = Bucket(64, 512, 0, 0)
    assert program_cost(LLAMA, mixed, context_len=9) == step_cost(LLAMA, mixed, context_len=9)


def test_cost_of_a_backward_tile():
    bucket = Bucket(0, 0, 512, 32)
    kept = step_cost(LLAMA, bucket, context_len=512)
    repeated = step_cost(LLAMA, bucket, context_len=512, saved_activations="inputs")
    products = 2 * 512 * 6_979_321_856
    assert repeated.flops - kept.flops == products
    assert kept.num_bytes > repeated.num_bytes
    half = step_cost(LLAMA, dataclasses.replace(bucket, tile_layers=16), context_len=512)
    assert half.flops == kept.flops / 2
    both = step_cost(LLAMA, Bucket(64, 512, 512, 32), context_len=512)
    forward = step_cost(LLAMA, Bucket(64, 512, 0, 0), context_len=512)
    assert both == forward + kept
