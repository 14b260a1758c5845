"""Adapters of many rows in one product, against one product a row."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import can_run_llvm, grouped_lora

IN, OUT, RANK, SLOTS, LAYERS = 11, 7, 3, 5, 2


def draw(rng, rows):
    x = rng.standard_normal((rows, IN)).astype(np.float32)
    acc = rng.standard_normal((rows, OUT)).astype(np.float32)
    a = rng.standard_normal((SLOTS, LAYERS, IN, RANK)).astype(np.float32)
    b = rng.standard_normal((SLOTS, LAYERS, RANK, OUT)).astype(np.float32)
    return x, acc, a, b, rng.uniform(0.5, 2, SLOTS).astype(np.float32)


@pytest.fixture(params=["reference", "llvm"])
def implementation(request):
    """What runs on a CPU."""
    if request.param == "llvm" and not can_run_llvm():
        pytest.skip("needs llvmlite")
    return request.param


def run(arrays, slots, implementation, layer=1):
    used = np.unique(slots[slots >= 0])
    active = np.full(SLOTS, -1, np.int32)
    active[: len(used)] = used
    rows = (jnp.asarray(slots, jnp.int32), jnp.asarray(active), jnp.int32(len(used)))
    options = {"implementation": implementation}
    return np.asarray(grouped_lora(*map(jnp.asarray, arrays), jnp.int32(layer), *rows, **options))


@pytest.mark.parametrize("popularity", ["distinct", "uniform", "identical", "none"])
def test_each_row_gets_its_own_adapter(rng, popularity, implementation):
    rows = 9
    slots = {
        "distinct": np.arange(rows) % SLOTS,
        "uniform": rng.integers(-1, SLOTS, rows),
        "identical": np.full(rows, 3),
        "none": np.full(rows, -1),
    }[popularity]
    arrays = draw(rng, rows)
    x, acc, a, b, scale = arrays
    out = run(arrays, slots, implementation)
    for row, slot in enumerate(slots):
        if slot < 0:
            np.testing.assert_array_equal(out[row], acc[row])
        else:
            expected = acc[row] + scale[slot] * (x[row] @ a[slot, 1]) @ b[slot, 1]
            np.testing.assert_allclose(out[row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", ["A", "B", "scale", "rows"])
def test_foreign_nan_does_not_leak(rng, part, implementation):
    """Slot 2 (and its rows) are poisoned; rows of slots 0 and 4 and of the base must not see it."""
    slots = np.asarray([0, 2, -1, 4, 2, 0, 4, -1])
    arrays = draw(rng, len(slots))
    clean = run(arrays, slots, implementation)
    x, _, a, b, scale = arrays
    if part == "rows":
        x[slots == 2] = np.nan
    else:
        {"A": a, "B": b, "scale": scale}[part][2] = np.nan
    out = run(arrays, slots, implementation)
    np.testing.assert_array_equal(out[slots != 2], clean[slots != 2])
    assert np.isnan(out[slots == 2]).all()
