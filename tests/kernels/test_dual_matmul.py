"""Products with stacked weights: the reference against numpy, the kernel against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dual_matmul, stacked_matmul, stacked_matmul_transposed
from pallas_kernels._platform import compile_target, interpreted
from pallas_kernels._tiles import Tile, candidate_tiles, warps_and_stages
from pallas_kernels.dual_matmul import pallas_triton
from pallas_kernels.dual_matmul.cases import CASES

INTERPRETED = [case for case in CASES if "interpret" in case.tags]


def assert_near(found, expected, tolerance):
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    assert len(found) == len(expected)
    for result, wanted in zip(found, expected, strict=True):
        assert result.shape == wanted.shape and result.dtype == wanted.dtype
        result, wanted = np.asarray(result, np.float32), np.asarray(wanted, np.float32)
        np.testing.assert_allclose(result, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def small(rng, dtype=np.float32):
    """x, kernels, layer, d_ys, d_kernels, d_layer of odd sizes."""

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    kernels = (draw(3, 20, 7), draw(3, 20, 18))
    d_kernels = (draw(2, 9, 30), draw(2, 9, 5))
    return draw(4, 20), kernels, jnp.int32(2), (draw(6, 30), draw(6, 5)), d_kernels, jnp.int32(1)


@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_kernel_matches_reference(case, rng):
    arguments = case.arrays(rng)
    expected = jax.jit(case.function("reference"))(*arguments)
    with interpreted():
        found = jax.jit(case.function("pallas_triton"))(*arguments)
    assert_near(found, expected, case.tolerance)


def test_reference_matches_numpy(rng):
    arguments = small(rng)
    x, kernels, layer, d_ys, d_kernels, d_layer = jax.tree.map(np.asarray, arguments)
    accs = (None, jnp.asarray(rng.standard_normal((4, 18)), jnp.float32))
    d_acc = jnp.asarray(rng.standard_normal((6, 9)), jnp.float32)
    ys, dx = dual_matmul(*arguments, accs=accs, d_acc=d_acc, implementation="reference")
    expected = (x @ kernels[0][layer], accs[1] + x @ kernels[1][layer])
    d_expected = d_acc + sum(d_y @ u[d_layer].T for d_y, u in zip(d_ys, d_kernels, strict=True))
    assert_near((ys, dx), (expected, d_expected), 1e-6)


def test_backward_side_is_the_gradient_of_the_forward_side(rng):
    x, kernels, layer, *_ = small(rng)
    ys, pull = jax.vjp(lambda x: stacked_matmul(x, kernels, layer, implementation="reference"), x)
    d_ys = tuple(jnp.asarray(rng.standard_normal(y.shape), jnp.float32) for y in ys)
    with interpreted():
        dx = stacked_matmul_transposed(d_ys, kernels, layer, implementation="pallas_triton")
    assert_near(dx, pull(d_ys)[0], 1e-5)


@pytest.mark.parametrize("splits", [1, 2, 8])
def test_splits_of_k_add_up(rng, splits):
    arguments = small(rng)
    tiles = Tile(16, 16, 16, splits), Tile(16, 16, 16, splits)
    config = pallas_triton.Config(*tiles, num_warps=4, num_stages=2)
    accs = (None, jnp.ones((4, 18)))
    options = {"accs": accs, "d_acc": jnp.ones((6, 9)), "out_dtype": jnp.dtype(jnp.float32)}
    with interpreted():
        found = pallas_triton.dual_matmul(*arguments, **options, config=config)
    assert_near(found, dual_matmul(*arguments, **options, implementation="reference"), 1e-5)


def test_result_dtype(rng):
    arguments = small(rng, jnp.bfloat16)
    with interpreted():
        options = {"accs": (None, jnp.ones((4, 18))), "out_dtype": jnp.bfloat16}
        found = dual_matmul(*arguments, **options, implementation="pallas_triton")
    expected = dual_matmul(*arguments, **options, implementation="reference")
    assert all(result.dtype == jnp.bfloat16 for result in jax.tree.leaves(found))
    assert_near(found, expected, 1e-2)


@pytest.mark.parametrize(
    "counts", [(0, 5), (5, 0), (1, 1), (1, 9), (4, 7), (7, 4), (6, 6), (3, 100)]
)
def test_programs_of_both_sides_are_mixed_and_none_is_left_out(counts):
    programs = jnp.arange(sum(counts), dtype=jnp.int32)
    is_forward, index = jax.vmap(lambda p: pallas_triton._side_of_program(p, *counts))(programs)
    is_forward = np.broadcast_to(np.asarray(is_forward), programs.shape)
    for side, count in ((is_forward, counts[0]), (~is_forward, counts[1])):
        np.testing.assert_array_equal(np.asarray(index)[side], np.arange(count))
    fewer = is_forward if counts[0] <= counts[1] else ~is_forward
    gaps = np.diff(np.flatnonzero(fewer))
    if gaps.size:
        assert gaps.min() == gaps.max() == sum(counts) // min(counts)


def test_few_rows_fill_the_chip():
    tile = candidate_tiles(16, [4096], 4096, jnp.bfloat16)[0]
    assert tile.block_m == 16
    assert tile.num_programs(16, 4096) >= 132
    assert candidate_tiles(512, [14336, 14336], 4096, jnp.bfloat16)[0].splits == 1


def test_every_candidate_of_the_tuner_multiplies_blocks_that_a_kernel_can_hold():
    for rows in (1, 16, 64, 65, 512):
        for tile in candidate_tiles(rows, [4096], 14336, jnp.bfloat16):
            warps, stages = warps_and_stages(tile)
            assert tile.block_m * tile.block_n <= warps * 32 * 128
            assert stages * (tile.block_m + tile.block_n) * tile.block_k * 2 <= 227 * 1024


def test_a_record_of_the_table_is_a_config(rng):
    config = pallas_triton.choose_config(*[small(rng)[i] for i in (0, 1, 3, 4)])
    record = pallas_triton.record_of_config(config)
    assert pallas_triton.config_of_record(record) == config


def test_a_tuned_record_is_taken(rng, monkeypatch):
    x, kernels, _, d_ys, d_kernels, _ = small(rng)
    config = pallas_triton.Config(Tile(32, 16, 16, 2), Tile(16, 32, 16), 8, 5)
    key = f"dual_matmul {pallas_triton.signature(x, kernels, d_ys, d_kernels)}"
    assert key == "dual_matmul float32 4:20>7,18 T6:30,5>9"
    table = {"sm_90": {key: pallas_triton.record_of_config(config)}}
    monkeypatch.setattr("pallas_kernels._tiles._tuned", lambda: table)
    with compile_target(90):
        assert pallas_triton.choose_config(x, kernels, d_ys, d_kernels) == config
    with compile_target(80):
        assert pallas_triton.choose_config(x, kernels, d_ys, d_kernels) != config


def test_bad_input(rng):
    x, kernels, layer, d_ys, d_kernels, d_layer = small(rng)
    with pytest.raises(ValueError, match="`kernels` and `d_kernels` must not both be empty"):
        dual_matmul(None, (), None, (), (), None)
    with pytest.raises(ValueError, match="`x` must be given with `kernels`, and only then"):
        dual_matmul(x, (), None, d_ys, d_kernels, d_layer)
    with pytest.raises(ValueError, match="`layer` must be given with `kernels`"):
        dual_matmul(x, kernels, None, (), (), None)
    with pytest.raises(ValueError, match="`d_layer` must be given with `d_kernels`"):
        dual_matmul(None, (), None, d_ys, d_kernels, None)
    with pytest.raises(ValueError, match="`d_ys` must have 2 entries; got 1"):
        dual_matmul(None, (), None, d_ys[:1], d_kernels, d_layer)
    with pytest.raises(ValueError, match=r"`accs` must have shape \(4, 7\); got \(4, 18\)"):
        stacked_matmul(x, kernels, layer, accs=(jnp.ones((4, 18)), None))
    with pytest.raises(ValueError, match="`d_acc` must be float32; got bfloat16"):
        acc = jnp.ones((6, 9), jnp.bfloat16)
        stacked_matmul_transposed(d_ys, d_kernels, d_layer, acc=acc)
    with pytest.raises(ValueError, match="`implementation` of dual_matmul must be"):
        stacked_matmul(x, kernels, layer, implementation="cudnn")


def test_a_named_kernel_does_not_fall_back(rng):
    x, kernels, layer, *_ = small(rng)
    with pytest.raises(NotImplementedError, match="needs compute capability 8.0"):
        stacked_matmul(x, kernels, layer, implementation="pallas_triton")
    with (
        interpreted(),
        pytest.raises(NotImplementedError, match="one float dtype; got bfloat16, f"),
    ):
        x = x.astype(jnp.bfloat16)
        stacked_matmul(x, kernels, layer, implementation="pallas_triton")
