"""One launch for forward rows and the backward tile: against the three ops, and what it holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    co_serve_attention,
    decode_attention,
    ragged_attention,
    window_attention_backward,
)
from pallas_kernels._platform import interpreted
from pallas_kernels.co_serve_attention import pallas_triton
from pallas_kernels.co_serve_attention.cases import CASES

INTERPRETED = [case for case in CASES if "interpret" in case.tags]


def named(name):
    return next(case for case in CASES if case.name == name)


def on_device(case, rng):
    return jax.tree.map(jnp.asarray, case.arrays(rng))


def assert_near(found, expected, tolerance):
    for name, a, b in zip(found._fields, found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape and a.dtype == b.dtype
            a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
            b = np.where(b < -1e29, 0, b)  # log-sum-exp of padding rows: any very small number
            a = np.where(a < -1e29, 0, a)
            limit = tolerance * np.abs(b).max()
            np.testing.assert_allclose(a, b, rtol=0, atol=limit, err_msg=name)


def run(case, arguments, implementation="pallas_triton"):
    with interpreted():
        return jax.jit(case.function(implementation))(*arguments)


@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_kernel_matches_reference(case, rng):
    arguments = case.arrays(rng)
    found = run(case, arguments)
    assert_near(found, run(case, arguments, "reference"), case.tolerance)
    *_, window, accs = arguments
    if window is not None:  # only the named layer of the accumulators, and only named pages
        others = np.setdiff1d(np.arange(accs[0].shape[1]), window.acc_pages)
        for acc, before in zip((found.dk_acc, found.dv_acc), accs, strict=True):
            acc = np.asarray(acc)
            np.testing.assert_array_equal(acc[: case.num_layers - 1], before[:-1])
            np.testing.assert_array_equal(acc[-1, others], before[-1, others])


def test_parts_are_those_of_the_three_ops(rng):
    case = named("all_float32")
    k_pool, v_pool, layer, decode, chunk, window, accs = on_device(case, rng)
    found = run(case, (k_pool, v_pool, layer, decode, chunk, window, accs))
    options = {"sm_scale": case.head_dim**-0.5, "implementation": "reference"}
    out = decode_attention(
        decode.q, k_pool, v_pool, layer, decode.page_table, decode.positions, **options
    )
    rows = (chunk.page_list, chunk.segments, chunk.positions)
    chunk_out, lse = ragged_attention(chunk.q, k_pool, v_pool, layer, *rows, **options)
    window = window._replace(dk_acc=accs[0], dv_acc=accs[1])
    backward = window_attention_backward(*window[:4], k_pool, v_pool, *window[4:], **options)
    expected = type(found)(out, chunk_out, lse, *backward)
    assert_near(found, expected, case.tolerance)


def test_parts_do_not_change_each_other(rng):
    case = named("all_float32")
    arguments = case.arrays(rng)
    *head, decode, chunk, window, accs = arguments
    together = run(case, arguments)
    alone = [
        run(case, (*head, decode, None, None, None)).decode_out,
        run(case, (*head, None, chunk, None, None)).chunk_out,
        run(case, (*head, None, None, window, accs)).dq,
    ]
    for a, b in zip((together.decode_out, together.chunk_out, together.dq), alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())


@pytest.mark.parametrize("implementation", ["reference", "pallas_triton"])
def test_parts_without_rows_have_results_without_rows(rng, implementation):
    case = named("all_float32")
    k_pool, v_pool, layer, decode, chunk, window, accs = case.arrays(rng)
    decode = decode._replace(
        q=decode.q[:0], page_table=decode.page_table[:0], positions=decode.positions[:0]
    )
    chunk = chunk._replace(
        q=chunk.q[:0], segments=chunk.segments[:0], positions=chunk.positions[:0]
    )
    rows = {name: getattr(window, name)[:0] for name in ("q", "out", "lse", "d_out")}
    places = {"segments": window.segments[:0], "positions": window.positions[:0]}
    window = window._replace(**rows, **places)
    found = run(case, (k_pool, v_pool, layer, decode, chunk, window, accs), implementation)
    assert found.decode_out.shape == found.chunk_out.shape == (0, 4, 64)
    assert found.chunk_lse.shape == (0, 4) and found.dq.dtype == jnp.float32
    np.testing.assert_array_equal(found.dk_acc, accs[0])
    np.testing.assert_array_equal(found.dv_acc, accs[1])


def test_one_launch_holds_all_parts(rng):
    """And donated accumulators are updated in place."""
    case = named("all_float32")
    with interpreted():
        traced = jax.jit(case.function("pallas_triton")).trace(*case.arrays(rng))
    calls = [eqn for eqn in traced.jaxpr.eqns if eqn.primitive.name == "pallas_call"]
    names = [str(eqn.params["name"]) for eqn in calls]
    assert names.count("co_serve_attention") == 1
    assert set(names) <= {"co_serve_attention", "combine_splits"}
    [launch] = [eqn for eqn in calls if str(eqn.params["name"]) == "co_serve_attention"]
    aliases = launch.params["input_output_aliases"]
    outputs = len(launch.outvars)
    assert [output for _, output in aliases] == [outputs - 2, outputs - 1]


@pytest.mark.parametrize(("num_spread", "num_others"), [(0, 7), (7, 0), (3, 11), (11, 3), (5, 5)])
def test_interleaved_programs_each_run_once_and_spread_evenly(num_spread, num_others):
    total = num_spread + num_others
    is_spread, index = pallas_triton.interleave(jnp.arange(total), num_spread, num_others)
    is_spread, index = np.asarray(is_spread), np.asarray(index)
    np.testing.assert_array_equal(index[is_spread], np.arange(num_spread))
    np.testing.assert_array_equal(index[~is_spread], np.arange(num_others))
    so_far = np.cumsum(is_spread)
    assert np.abs(so_far - np.arange(1, total + 1) * num_spread / total).max() < 1


def test_no_part_is_an_error(rng):
    k_pool, v_pool, layer, *_ = on_device(named("decode_only"), rng)
    with pytest.raises(ValueError, match="must not be None"):
        co_serve_attention(k_pool, v_pool, layer, None, None, None, sm_scale=1.0)


def test_each_part_is_checked(rng):
    k_pool, v_pool, layer, decode, *_ = on_device(named("decode_only"), rng)
    decode = decode._replace(q=decode.q[..., :8])
    with pytest.raises(ValueError, match="head dim must be 16; got 8"):
        co_serve_attention(k_pool, v_pool, layer, decode, None, None, sm_scale=1.0)


def test_named_backend_does_not_fall_back(rng):
    k_pool, v_pool, layer, decode, *_ = on_device(named("decode_only"), rng)
    with pytest.raises(NotImplementedError, match="needs compute capability 8.0"):
        co_serve_attention(
            k_pool, v_pool, layer, decode, None, None, sm_scale=1.0, implementation="pallas_triton"
        )
