"""Norms and the gate, with their gradients, against float64 and the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import add_rms_norm, can_run_llvm, rms_norm, swiglu

pytestmark = pytest.mark.skipif(not can_run_llvm(), reason="needs a CPU and llvmlite")

EPS = 1e-5
SHAPES = [(1, 8), (5, 19), (7, 3), (64, 130), (300, 96)]
IMPLEMENTATIONS = ["llvm", "reference"]


def rows(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def norm64(x, scale):
    x, scale = np.asarray(x, np.float64), np.asarray(scale)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * scale


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [*SHAPES, (6, 4, 16)])
def test_norm(rng, shape, implementation):
    x, y, scale = rows(rng, *shape), rows(rng, *shape), rows(rng, shape[-1])
    close(rms_norm(x, scale, EPS, implementation=implementation), norm64(x, scale))
    total, normed = add_rms_norm(x, y, scale, EPS, implementation=implementation)
    np.testing.assert_array_equal(total, x + y)
    close(normed, norm64(x + y, scale))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_norms(rng, shape):
    x, y, d_total, d_normed = (rows(rng, *shape) for _ in range(4))
    scale = rows(rng, shape[-1])

    def alone(implementation):
        _, vjp = jax.vjp(lambda *a: rms_norm(*a, EPS, implementation=implementation), x, scale)
        return vjp(d_normed)

    def added(implementation):
        function = lambda *a: add_rms_norm(*a, EPS, implementation=implementation)  # noqa: E731
        return jax.vjp(function, x, y, scale)[1]((d_total, d_normed))

    for gradients in (alone, added):
        for found, expected in zip(gradients("llvm"), gradients("reference"), strict=True):
            np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_gate(rng, shape):
    gate, up, d_gated = rows(rng, *shape) * 4, rows(rng, *shape), rows(rng, *shape)
    wide = np.asarray(gate, np.float64)
    expected = wide / (1 + np.exp(-wide)) * np.asarray(up)
    found, vjp = jax.vjp(lambda *a: swiglu(*a, implementation="llvm"), gate, up)
    close(found, expected)
    _, plain = jax.vjp(lambda *a: swiglu(*a, implementation="reference"), gate, up)
    for gradient, other in zip(vjp(d_gated), plain(d_gated), strict=True):
        close(gradient, other)


def test_a_gate_of_any_size_is_finite_and_nan_stays_where_it_is():
    gate = jnp.array([[-1e4, -100.0, -90.0, 0.0, 90.0, 100.0, 1e4, np.nan, 1.0]])
    up = jnp.ones_like(gate)
    found, vjp = jax.vjp(lambda *a: swiglu(*a, implementation="llvm"), gate, up)
    expected = np.array([[0.0, 0.0, 0.0, 0.0, 90.0, 100.0, 1e4, np.nan, 0.7310586]])
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-30)
    for gradient in vjp(up):
        assert np.isnan(gradient[0, 7]) and np.isfinite(np.delete(gradient, 7)).all()


def test_rows_are_normed_alone(rng):
    x, scale = rows(rng, 300, 96), rows(rng, 96)
    some = rms_norm(x[17:19], scale, EPS, implementation="llvm")
    every = np.asarray(rms_norm(x.at[3].set(np.nan), scale, EPS, implementation="llvm"))
    np.testing.assert_array_equal(every[17:19], some)
    assert np.isfinite(np.delete(every, 3, axis=0)).all()


def test_what_runs_where(rng):
    x, scale = rows(rng, 4, 8), rows(rng, 8)
    assert "ffi_call" in str(jax.make_jaxpr(lambda *a: rms_norm(*a, EPS))(x, scale))
    narrow = x.astype(jnp.bfloat16)
    assert "ffi_call" not in str(jax.make_jaxpr(lambda a: swiglu(a, a))(narrow))
    with pytest.raises(NotImplementedError, match="float32 arrays; got `gate` of bfloat16"):
        swiglu(narrow, narrow, implementation="llvm")
    with pytest.raises(ValueError, match="must be None or one of llvm, reference; got 'cuda'"):
        rms_norm(x, scale, EPS, implementation="cuda")
