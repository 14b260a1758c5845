"""Rows at slots of stacks of all layers: exact, in place, padding dropped."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import can_run_llvm, load_rows, store_rows, take_rows

LAYERS, PAGES, SIZE = 3, 40, 8
SLOTS = PAGES * SIZE
FEATURES = [(1,), (8,), (33,), (64,), (2, 24), (3, 5)]
IMPLEMENTATIONS = [
    pytest.param("llvm", marks=pytest.mark.skipif(not can_run_llvm(), reason="needs llvmlite")),
    "reference",
]


@pytest.fixture(params=[1, 7, 200], ids=lambda count: f"{count} rows")
def case(rng, request):
    """Stacks as numpy arrays [layers, slots, ...], rows for them, slots with some padding."""
    count = request.param
    slots = rng.permutation(SLOTS)[:count].astype(np.int32)
    slots[rng.random(count) < 0.2] = -1
    stacks = [rng.standard_normal((LAYERS, SLOTS, *shape)).astype(np.float32) for shape in FEATURES]
    rows = [rng.standard_normal((count, *shape)).astype(np.float32) for shape in FEATURES]
    return stacks, rows, slots


def on_device(stacks):
    """With two features axes, paged."""
    return [
        jnp.asarray(s if s.ndim == 3 else s.reshape(LAYERS, PAGES, SIZE, *s.shape[2:]))
        for s in stacks
    ]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(one).reshape(other.shape), other)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("is_read_soon", [True, False])
def test_store(case, implementation, is_read_soon):
    stacks, rows, slots = case
    options = {"is_read_soon": is_read_soon, "implementation": implementation}
    given = [jnp.asarray(some) for some in rows]
    found = store_rows(on_device(stacks), given, jnp.int32(1), jnp.asarray(slots), **options)
    valid = slots >= 0
    for stack, some in zip(stacks, rows, strict=True):
        stack[1, slots[valid]] = some[valid]
    assert_same(found, stacks)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_load_and_take(case, implementation):
    stacks, _, slots = case
    valid = slots >= 0
    expected = [s[2, slots] * valid.reshape(-1, *[1] * (s.ndim - 2)) for s in stacks]
    args = (on_device(stacks), jnp.int32(2), jnp.asarray(slots))
    assert_same(load_rows(*args, implementation=implementation), expected)
    found, left = take_rows(*args, implementation=implementation)
    assert_same(found, expected)
    for stack in stacks:
        stack[2, slots[valid]] = 0
    assert_same(left, stacks)


@pytest.mark.skipif(not can_run_llvm(), reason="needs llvmlite")
def test_loops_over_layers_copy_no_stack(case):
    stacks, rows, slots = case
    slots = jnp.asarray(slots)

    def step(stacks, rows):
        def one(stacks, layer):
            stacks = store_rows(stacks, rows, layer, slots, implementation="llvm")
            found, stacks = take_rows(stacks, layer, slots[::-1], implementation="llvm")
            return stacks, found

        return jax.lax.scan(one, stacks, jnp.arange(LAYERS, dtype=jnp.int32))

    given = [jnp.asarray(some) for some in rows]
    compiled = jax.jit(step, donate_argnums=0).lower(on_device(stacks), given).compile()
    copied = re.findall(rf"f32\[{LAYERS},(?:{SLOTS}|{PAGES},{SIZE}),[\d,]*\]\S* copy\(",
                        compiled.as_text())  # fmt: skip
    assert not copied


def test_rows_that_do_not_fit_are_refused(rng):
    stack, slots = jnp.zeros((2, 16, 8)), jnp.zeros((3,), jnp.int32)
    layer = jnp.int32(0)
    with pytest.raises(
        ValueError, match=r"`rows\[0\]` must be float32\[3, 8\]; got float32\[3, 7\]"
    ):
        store_rows([stack], [jnp.zeros((3, 7))], layer, slots)
    with pytest.raises(ValueError, match="`rows` must have 1 entries; got 0"):
        store_rows([stack], [], layer, slots)
    with pytest.raises(ValueError, match=r"must be float32\[3, 8\]; got bfloat16\[3, 8\]"):
        store_rows([stack], [jnp.zeros((3, 8), jnp.bfloat16)], layer, slots)


@pytest.mark.skipif(not can_run_llvm(), reason="needs llvmlite")
def test_what_runs_where():
    slots, layer = jnp.zeros((3,), jnp.int32), jnp.int32(0)
    run = lambda stack: load_rows([stack], layer, slots)  # noqa: E731
    assert "ffi_call" in str(jax.make_jaxpr(run)(jnp.zeros((2, 16, 8))))
    narrow = jnp.zeros((2, 16, 8), jnp.bfloat16)
    assert "ffi_call" not in str(jax.make_jaxpr(run)(narrow))
    with pytest.raises(NotImplementedError, match=r"float32 arrays; got `stacks\[0\]` of bfloat16"):
        load_rows([narrow], layer, slots, implementation="llvm")
