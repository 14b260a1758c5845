"""The grouped LoRA kernels, interpreted on the CPU, against the reference and jax.grad."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _platform, group_rows, grouped_lora_backward, grouped_lora_many
from pallas_kernels.grouped_lora.cases import CASES, BackwardCase

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("jax_triton") is None, reason="jax-triton is not installed"
)
BACKENDS = ["pallas_triton", pytest.param("triton", marks=needs_triton)]
SMALL = [case for case in CASES if "interpret" in case.tags]
FLOAT32 = [case for case in SMALL if case.dtype == "float32"]
ODD, BACKWARD_ODD = (
    next(case for case in FLOAT32 if case.name == f"{name}_float32")
    for name in ("odd", "backward_odd")
)
A, B, SCALE, LAYER, ROW_SLOTS, ACTIVE, NUM_ACTIVE = range(-8, -1)
"""Where a case's arguments stand, from the end; in forward cases A and B are tuples."""


def run(case, backend, args):
    args = jax.tree.map(jnp.asarray, tuple(args))
    if backend == "reference":
        return jax.tree.map(np.asarray, jax.jit(case.function(backend))(*args))
    with _platform.interpreted():
        return jax.tree.map(np.asarray, jax.jit(case.function(backend))(*args))


def assert_near(got, expected, tolerance):
    assert got.shape == expected.shape and got.dtype == expected.dtype == np.float32
    assert np.isfinite(got).all() and expected.any()
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_like_the_reference(rng, case, backend):
    """In every case all slots, layers and rows that must not be read are NaN."""
    args = case.arrays(rng)
    got, expected = run(case, backend, args), run(case, "reference", args)
    for ours, theirs in zip(got, expected, strict=True):
        assert_near(ours, theirs, case.tolerance)
    without = args[ROW_SLOTS] < 0
    if isinstance(case, BackwardCase):
        np.testing.assert_array_equal(got[0][without], args[2][without])
        for gradient in got[1:]:
            assert not gradient[len(case.used_slots()) :].any()
    else:
        for ours, acc in zip(got, args[1], strict=True):
            np.testing.assert_array_equal(ours[without], acc[without])


@pytest.mark.parametrize("case", FLOAT32, ids=str)
def test_the_reference_is_the_formula_of_each_row(rng, case):
    args = case.arrays(rng)
    got = run(case, "reference", args)
    has, used, layer = args[ROW_SLOTS] >= 0, case.used_slots(), int(args[LAYER])
    slots, x = args[ROW_SLOTS][has], jnp.asarray(args[0][has])
    scale = jnp.asarray(args[SCALE][slots])[:, None]

    def delta(x, a, b):
        return jnp.einsum("tr,tro->to", jnp.einsum("ti,tir->tr", x, a[slots]) * scale, b[slots])

    def of_layer(weights):
        return jnp.nan_to_num(jnp.asarray(weights[:, layer]))

    if isinstance(case, BackwardCase):
        _, vjp = jax.vjp(delta, x, of_layer(args[A]), of_layer(args[B]))
        dx, da, db = map(np.asarray, vjp(jnp.asarray(args[1][has])))
        expected = args[2].copy()
        expected[has] += dx
        assert_near(got[0], expected, 1e-5)
        assert_near(got[1][: len(used)], da[used], 1e-5)
        assert_near(got[2][: len(used)], db[used], 1e-5)
        return
    for ours, acc, a, b in zip(got, args[1], args[A], args[B], strict=True):
        expected = acc.copy()
        expected[has] += np.asarray(delta(x, of_layer(a), of_layer(b)))
        assert_near(ours, expected, 1e-5)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("part", ["rows", "adapter"])
@pytest.mark.parametrize("case", [ODD, BACKWARD_ODD], ids=str)
def test_a_diverged_adapter_stays_with_its_rows(rng, case, part, backend):
    args = case.arrays(rng)
    clean = run(case, backend, args)
    is_bad = args[ROW_SLOTS] == 2
    if part == "rows":
        args[0][is_bad] = np.nan
    else:
        for array in jax.tree.leaves((args[A], args[B], args[SCALE])):
            array[2] = np.nan
    got = run(case, backend, args)
    np.testing.assert_array_equal(got[0][~is_bad], clean[0][~is_bad])
    # x itself is no factor of the gradient at x.
    assert np.isfinite(got[0][is_bad]).all() == (part == "rows" and case is BACKWARD_ODD)
    others = args[ACTIVE][: args[NUM_ACTIVE]] != 2
    for gradient, before in zip(got[1:], clean[1:], strict=True):
        gradient, before = gradient[: len(others)], before[: len(others)]
        np.testing.assert_array_equal(gradient[others], before[others])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [ODD, BACKWARD_ODD], ids=str)
def test_blocks_of_any_size_and_shared_groups(rng, case, backend):
    args = case.arrays(rng)
    expected = run(case, "reference", args)
    groups = group_rows(jnp.asarray(args[ROW_SLOTS]), case.slots, block_rows=32)
    op = grouped_lora_backward if isinstance(case, BackwardCase) else grouped_lora_many
    with _platform.interpreted():
        arrays = jax.tree.map(jnp.asarray, args[:-1])
        got = op(*arrays, groups=groups, implementation=backend)
    for ours, theirs in zip(got, expected, strict=True):
        assert_near(np.asarray(ours), theirs, case.tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backward_pass_gives_the_same_bits_twice(rng, backend):
    args = BACKWARD_ODD.arrays(rng)
    first, second = (run(BACKWARD_ODD, backend, args) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("popularity", ["uniform", "none", "one", "distinct"])
@pytest.mark.parametrize(("rows", "slots", "block_rows"), [(1, 5, 16), (130, 3, 16), (200, 33, 64)])
def test_groups_hold_every_row_once(rng, rows, slots, block_rows, popularity):
    row_slots = {
        "uniform": rng.integers(-1, slots, rows),
        "none": np.full(rows, -1),
        "one": np.full(rows, slots - 1),
        "distinct": np.arange(rows) % slots,
    }[popularity].astype(np.int32)
    groups = group_rows(jnp.asarray(row_slots), slots, block_rows=block_rows)
    table, owners, starts = map(np.asarray, groups)
    used = starts[-1]
    assert (table[used:] == -1).all() and (owners[used:] == -1).all()
    np.testing.assert_array_equal(np.sort(table[table >= 0]), np.flatnonzero(row_slots >= 0))
    for slot in range(slots):
        mine = table[starts[slot] : starts[slot + 1]]
        assert (owners[starts[slot] : starts[slot + 1]] == slot).all()
        np.testing.assert_array_equal(mine[mine >= 0], np.flatnonzero(row_slots == slot))
        assert len(mine) == -(-(row_slots == slot).sum() // block_rows)


def call(*, implementation=None, **changes):
    arrays = {
        "x": jnp.zeros((3, 4)), "accs": (jnp.zeros((3, 5)),),
        "lora_a": (jnp.zeros((2, 1, 4, 2)),), "lora_b": (jnp.zeros((2, 1, 2, 5)),),
        "scale": jnp.ones((2,)), "layer": jnp.int32(0), "row_slots": jnp.zeros((3,), jnp.int32),
        "active_slots": jnp.zeros((1,), jnp.int32), "num_active": jnp.int32(1),
    }  # fmt: skip
    return grouped_lora_many(**{**arrays, **changes}, implementation=implementation)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_b": (jnp.zeros((2, 1, 3, 5)),)}, "`lora_b` must have rank 2; got 3"),
        ({"accs": (jnp.zeros((3, 6)),)}, "`acc` must be float32 of shape .3, 5.; got float32 of"),
        ({"accs": (jnp.zeros((3, 5), jnp.bfloat16),)}, "`acc` must be float32 .*; got bfloat16"),
        ({"lora_b": (jnp.zeros((2, 3, 2, 5)),)}, "must have the same slots and layers"),
        ({"lora_a": (jnp.zeros((2, 1, 6, 2)),)}, "`lora_a` must take 4 features; got 6"),
        ({"accs": ()}, "one array for each linear; got 0, 1 and 1"),
        ({"implementation": "cuda"}, "must be None or one of .*; got 'cuda'"),
    ],
)
def test_bad_input_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_blocks_are_as_large_as_a_product():
    with pytest.raises(ValueError, match="`block_rows` must be a power of two .*; got 24"):
        group_rows(jnp.zeros((3,), jnp.int32), 2, block_rows=24)


@pytest.mark.parametrize("backend", ["pallas_triton", "triton"])
def test_what_a_backend_cannot_run_it_says(backend):
    with pytest.raises(NotImplementedError, match="needs compute capability 8.0; found no NVIDIA"):
        call(implementation=backend)
    with _platform.compile_target(75):
        with pytest.raises(NotImplementedError, match="found compute capability 7.5"):
            call(implementation=backend)
    np.testing.assert_array_equal(call()[0], np.zeros((3, 5)))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with _platform.interpreted():
        with pytest.raises(NotImplementedError, match="grouped_lora in Triton needs triton, which"):
            call(implementation="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_and_adapters_of_two_types_are_left_to_the_reference(backend):
    with _platform.interpreted():
        with pytest.raises(NotImplementedError, match="got bfloat16 rows and float32 adapters"):
            call(x=jnp.zeros((3, 4), jnp.bfloat16), implementation=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_beyond_a_tile_are_left_to_the_reference(backend):
    wide = {"lora_a": (jnp.zeros((2, 1, 4, 130)),), "lora_b": (jnp.zeros((2, 1, 130, 5)),)}
    with _platform.interpreted():
        with pytest.raises(NotImplementedError, match="takes ranks up to 128; got 130"):
            call(**wide, implementation=backend)
    assert call(**wide)[0].shape == (3, 5)
