"""Every kernel case compiles for real GPUs, none of which need be there."""

import importlib
import importlib.metadata
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _platform, aot, roofline
from pallas_kernels._cases import OPS
from pallas_kernels._hlo import loop_copies

DEVICES = ("h200", "a100")

needs_plugin = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))


def cases_of(op):
    return importlib.import_module(f"pallas_kernels.{op}.cases").CASES


def has_cases(op):
    try:
        return importlib.util.find_spec(f"pallas_kernels.{op}.cases") is not None
    except ModuleNotFoundError:
        return False


# An op without cases fails `test_cases_are_named_once_and_hot_ones_exist`.
ALL_CASES = [case for op in OPS if has_cases(op) for case in cases_of(op)]
COMPILATIONS = [
    pytest.param(
        case,
        implementation,
        device,
        id=f"{case}-{implementation}-{device}",
        # The shapes that serve are compiled in every run; the others by `pytest -m gate`.
        marks=()
        if "hot" in case.tags and (implementation, device) == ("pallas_triton", "h200")
        else pytest.mark.gate,
    )
    for case in ALL_CASES
    for implementation in case.implementations
    for device in DEVICES
]


@needs_plugin
@pytest.mark.parametrize(("case", "implementation", "device"), COMPILATIONS)
def test_case_compiles(case, implementation, device):
    if implementation == "triton" and importlib.util.find_spec("jax_triton") is None:
        pytest.skip("jax-triton is not installed")
    function = case.function(implementation)
    if implementation in case.unsupported:
        with pytest.raises(NotImplementedError):
            aot.compile_for(function, case.avals(), device=device)
        return
    compiled = aot.compile_for(
        function, case.avals(), device=device, donate_argnums=case.donate_argnums
    )
    assert compiled.kernels, "the program has no generated kernel"
    limit = aot.device(device).shared_memory_bytes
    assert all(kernel.shared_bytes <= limit for kernel in compiled.kernels)
    if "hot" in case.tags:
        spilling = [kernel for kernel in compiled.kernels if kernel.spill_bytes]
        assert not spilling
    if "wgmma" in case.tags and device == "h200":
        assert any(kernel.uses_wgmma for kernel in compiled.kernels)
    donated = [jax.tree.leaves(case.avals()[i]) for i in case.donate_argnums]
    donated_bytes = sum(x.size * x.dtype.itemsize for leaves in donated for x in leaves)
    assert compiled.alias_bytes >= donated_bytes


@pytest.mark.parametrize("op", OPS)
def test_cases_are_named_once_and_hot_ones_exist(op):
    names = [case.name for case in cases_of(op)]
    assert len(set(names)) == len(names)
    assert any("hot" in case.tags for case in cases_of(op))
    assert any("interpret" in case.tags for case in cases_of(op))


@pytest.mark.parametrize("case", [case for case in ALL_CASES if "interpret" in case.tags], ids=str)
def test_arrays_have_the_declared_shapes(case):
    def described(tree):
        return jax.tree.map(lambda x: (np.shape(x), jnp.asarray(x).dtype), tree)

    arrays, avals = case.arrays(np.random.default_rng(0)), case.avals()
    declared = jax.tree.map(lambda x: (x.shape, x.dtype), avals)
    assert described(arrays) == declared
    # Cases in which no row has work to do are the only ones that count no operations.
    is_idle = case.name == "ragged_padding_only" or case.name.startswith("none_")
    assert (case.flops() == 0) == is_idle
    assert case.bytes() > 0 or is_idle


def copying_loop(x, out):
    """Copies a layer of `x` out in every turn, as a kernel that took `x[layer]` would make XLA."""

    def body(layer, out):
        part = jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
        (doubled,) = _double(part)
        return jax.lax.dynamic_update_index_in_dim(out, doubled, layer, 0)

    return jax.lax.fori_loop(0, x.shape[0], body, out)


def _double(part):
    def kernel(x_ref, out_ref):
        rows = _platform.pl.program_id(0) * 16
        at = (_platform.pl.ds(rows, 16), _platform.pl.ds(0, part.shape[1]))
        out_ref[at] = x_ref[at] * 2

    return _platform.triton_call(
        kernel,
        [jax.ShapeDtypeStruct(part.shape, part.dtype)],
        grid=(part.shape[0] // 16,),
        name="double",
        num_warps=4,
        num_stages=1,
    )(part)


@needs_plugin
def test_report_of_a_known_program():
    x = jax.ShapeDtypeStruct((4, 1024, 512), jnp.float32)
    compiled = aot.compile_for(copying_loop, (x, x), device="h200", donate_argnums=1)
    num_bytes = 4 * 1024 * 512 * 4
    assert compiled.argument_bytes == 2 * num_bytes
    assert compiled.alias_bytes == compiled.output_bytes == num_bytes
    kernel = compiled.kernel("double")
    assert kernel.grid[0] == 64
    assert kernel.num_warps == 4
    assert 0 < kernel.registers <= 255
    assert not kernel.uses_tensor_cores
    with pytest.raises(KeyError, match="double"):
        compiled.kernel("triple")
    (copy,) = loop_copies(compiled.hlo)
    assert (copy.num_bytes, copy.shape, copy.count) == (2 << 20, "f32[1,1024,512]", 1)
    assert loop_copies(compiled.hlo, min_bytes=3 << 20) == ()


@needs_plugin
def test_loop_without_copies():
    def in_place(x):
        return jax.lax.fori_loop(0, 4, lambda i, x: x.at[i].multiply(2.0), x)

    x = jax.ShapeDtypeStruct((4, 1024, 512), jnp.float32)
    compiled = aot.compile_for(in_place, (x,), device="h200", donate_argnums=0)
    assert loop_copies(compiled.hlo) == ()
    assert compiled.kernels == ()


def test_described_devices():
    assert aot.device_names() == ["a100", "h100", "h200"]
    assert [aot.device(name).architecture for name in aot.device_names()] == [
        "sm_80",
        "sm_90a",
        "sm_90a",
    ]
    assert aot.device("a100").num_cores == 108
    assert aot.device("h200").memory_bytes > aot.device("h100").memory_bytes
    with pytest.raises(ValueError, match="`device` must be one of a100, h100, h200; got 'v100'"):
        aot.device("v100")


def test_missing_plugin_is_named(monkeypatch):
    def nothing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nothing)
    assert "pip install 'flexjax[aot]'" in (aot.missing() or "")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1")
    assert "must have jaxlib's version" in (aot.missing() or "")
    aot.topology.cache_clear()
    with pytest.raises(ImportError, match="jaxlib's version"):
        aot.compile_for(lambda x: x, (jnp.zeros(3),), device="h200")


def test_floor():
    cost = roofline.Cost(flops=790e12, num_bytes=4.3e12)
    assert roofline.floor_s(cost, "h200") == pytest.approx(1.0)
    assert roofline.floor_s(cost + cost * 2, "h200") == pytest.approx(3.0)
    assert roofline.is_memory_bound(roofline.Cost(1.0, 1e9), "a100")
    assert not roofline.is_memory_bound(roofline.Cost(1e15, 1.0), "a100")
    with pytest.raises(ValueError, match="got 'v100'"):
        roofline.floor_s(cost, "v100")
