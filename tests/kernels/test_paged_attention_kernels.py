"""Paged attention kernels against the reference, in Pallas's interpreter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PageList, _platform, decode_attention, ragged_attention
from pallas_kernels.paged_attention import pallas_triton
from pallas_kernels.paged_attention.cases import CASES, RaggedCase
from pallas_kernels.paged_attention.reference import MASKED

CASE = {case.name: case for case in CASES}
TILE_BOUNDS = jax.jit(pallas_triton.tile_bounds, static_argnums=3)
INTERPRETED = [case for case in CASES if "interpret" in case.tags]


def run(case, args, implementation="pallas_triton"):
    args = jax.tree.map(jnp.asarray, args)
    if implementation == "reference":
        return jax.tree.leaves(jax.jit(case.function("reference"))(*args))
    with _platform.interpreted():
        return jax.tree.leaves(case.function(implementation)(*args))


def assert_same(case, actual, expected):
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    assert np.isfinite(expected).all()
    scale = max(np.abs(expected[np.abs(expected) < -MASKED]).max(initial=0), 1e-30)
    np.testing.assert_allclose(actual, expected, atol=case.tolerance * scale, rtol=0)


@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_kernel_equals_reference(rng, case):
    args = case.arrays(rng)
    for actual, expected in zip(run(case, args), run(case, args, "reference"), strict=True):
        assert actual.dtype == expected.dtype
        assert_same(case, actual, expected)


def test_padding_rows_are_zero(rng):
    for name in ("decode_odd_float32", "ragged_packed_shuffled_float32"):
        args = CASE[name].arrays(rng)
        out, *lse = run(CASE[name], args)
        padding = args[-1] < 0
        assert padding.any()
        assert not np.asarray(out)[padding].any()
        if lse:
            np.testing.assert_array_equal(np.asarray(lse[0])[padding], np.float32(MASKED))


def test_cases_take_every_path():
    """The small cases cover splits, none, blocks without a mask, and tiles that cut a token."""

    def tilings(kind):
        for case in INTERPRETED:
            if isinstance(case, RaggedCase) == (kind == "ragged"):
                avals = case.avals()
                tiling = getattr(pallas_triton, f"{kind}_tiling")
                pages = jax.tree.leaves(avals[4])[0].shape[-1]
                options = {k: v for k, v in case.options(None).items() if k != "implementation"}
                yield case, tiling(case.row_shape, case.pool_shape, pages, avals[0].dtype,
                                   **options)  # fmt: skip

    for kind in ("decode", "ragged"):
        splits = [tiling.num_splits for _, tiling in tilings(kind)]
        assert min(splits) == 1
        assert max(splits) > 1
    assert any(tiling.block_rows % tiling.group for _, tiling in tilings("ragged"))
    num_whole = 0
    for case, tiling in tilings("ragged"):
        args = case.arrays(np.random.default_rng(0))
        page_list = PageList(*map(jnp.asarray, args[4]))
        bounds = TILE_BOUNDS(page_list, *map(jnp.asarray, args[5:]), tiling)
        num_whole += int(bounds[:, 3].sum())
    assert num_whole > 20


def bounds_of(case, rng, **changes):
    args = case.arrays(rng)
    tiling = dataclasses.replace(
        pallas_triton.ragged_tiling(case.row_shape, case.pool_shape, case.list_length,
                                    jnp.dtype(case.dtype), sm_scale=1.0,
                                    sliding_window=case.sliding_window),
        **changes,
    )  # fmt: skip
    page_list = PageList(*map(jnp.asarray, args[4]))
    rows = [jnp.asarray(x) for x in args[5:]]
    return np.asarray(TILE_BOUNDS(page_list, *rows, tiling)), tiling


def test_bounds_of_a_causal_prompt(rng):
    """A tile of rows t0.. sees the keys before t0 whole and masks one block: half of the square."""
    case = RaggedCase(name="prompt", segments=((256, 256),), num_heads=2, num_kv_heads=1,
                      head_dim=16)  # fmt: skip
    bounds, _ = bounds_of(case, rng, block_rows=64, block_keys=32)
    tokens = np.arange(8) * 32
    expected = [np.zeros(8), tokens // 32 + 1, np.zeros(8), tokens // 32]
    expected[2][0] = bounds[0, 2]  # without a whole block its place means nothing
    np.testing.assert_array_equal(bounds, np.stack(expected, axis=1))


def test_bounds_of_packed_sequences(rng):
    """Tiles pay for the sequences of their own rows only."""
    case = RaggedCase(name="packed", segments=((96, 32), (64, 32), (160, 32)), padding=32,
                      num_heads=1, num_kv_heads=1, head_dim=16)  # fmt: skip
    bounds, _ = bounds_of(case, rng, block_rows=32, block_keys=32)
    np.testing.assert_array_equal(bounds[:, 0], [0, 96, 160, bounds[3, 0]])
    np.testing.assert_array_equal(bounds[:, 1], [3, 2, 5, 0])
    np.testing.assert_array_equal(bounds[:, 3], [2, 1, 4, 0])


def test_bounds_of_a_sliding_window(rng):
    case = RaggedCase(name="sliding", segments=((512, 32),), num_heads=1, num_kv_heads=1,
                      head_dim=16, sliding_window=128)  # fmt: skip
    bounds, _ = bounds_of(case, rng, block_rows=32, block_keys=16)
    # Row 480 sees 353..480 and row 511 sees 384..511: all of 384..480 in common.
    np.testing.assert_array_equal(bounds, [[352, 10, 2, 6]])


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("target", [1, 2])
def test_rows_do_not_feel_another_sequence_of_the_tile(rng, poison, target):
    """A diverging finetuning sequence may stand in the same step as a request's prompt."""
    case = CASE["ragged_packed_shuffled_float32"]
    args = case.arrays(rng)
    clean = run(case, args)
    page_list = args[4]
    args[target][-1, page_list.pages[page_list.segments == 0]] = poison
    others = args[5] != 0
    for actual, expected in zip(run(case, args), clean, strict=True):
        np.testing.assert_array_equal(np.asarray(actual)[others], np.asarray(expected)[others])


def test_a_bad_value_reaches_the_rows_that_see_it(rng):
    case = CASE["ragged_packed_float32"]
    args = case.arrays(rng)
    page_list, positions = args[4], args[6]
    first = page_list.pages[(page_list.segments == 0) & (page_list.starts == 0)][0]
    args[2][-1, first, 3] = np.nan
    out, _ = run(case, args)
    sees = (args[5] == 0) & (positions >= 3)
    assert sees.any()
    np.testing.assert_array_equal(np.isnan(np.asarray(out)).any((1, 2)), sees)


def test_what_triton_does_not_take(rng):
    case = CASE["decode_odd_float32"]
    q, k, v, *rest = map(jnp.asarray, case.arrays(rng))
    options = case.options("pallas_triton")
    with pytest.raises(NotImplementedError, match="decode_attention in Triton needs compute"):
        decode_attention(q, k, v, *rest, **options)
    with _platform.interpreted():
        with pytest.raises(NotImplementedError, match="one dtype.*'bfloat16', 'float32'"):
            decode_attention(q.astype(jnp.bfloat16), k, v, *rest, **options)
        wide = [jnp.concatenate([x] * 5, axis=-1) for x in (q, k, v)]
        with pytest.raises(NotImplementedError, match="head dim of at most 256; got 320"):
            decode_attention(*wide, *rest, **options)
        # The dispatcher goes on to the reference.
        out = decode_attention(*wide, *rest, **{**options, "implementation": None})
    assert np.isfinite(np.asarray(out)).all()


def test_ragged_attention_is_chosen_where_it_runs(rng):
    case = CASE["ragged_one_row"]
    args = jax.tree.map(jnp.asarray, case.arrays(rng))

    def kernels():
        options = case.options(None)
        return str(jax.make_jaxpr(lambda *args: ragged_attention(*args, **options))(*args))

    assert "pallas_call" not in kernels()
    with _platform.interpreted():
        assert "pallas_call" in kernels()
