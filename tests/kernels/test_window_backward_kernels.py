"""The kernel of window_attention_backward: against its reference, and against dense attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_cases import dense_attention

from pallas_kernels import window_attention_backward
from pallas_kernels._platform import compile_target, interpreted
from pallas_kernels.window_attention_backward import pallas_triton
from pallas_kernels.window_attention_backward.cases import CASES, WindowCase

INTERPRETED = [case for case in CASES if "interpret" in case.tags]
NAMES = ("dq", "dk", "dv")
DK_ACC, DV_ACC = 10, 11


def run(case, arguments, **options):
    with interpreted():
        return jax.jit(case.function("pallas_triton"))(*arguments, **options)


def assert_near(found, expected, tolerance, floor=0.0):
    for name, a, b in zip(NAMES, found, expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(
            a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), floor), err_msg=name
        )


def without_padding_garbage(case, arguments):
    """The reference multiplies padding rows by zero, so they must be finite for it."""
    return [np.where(np.isnan(x), 0, x) if index < 4 else x for index, x in enumerate(arguments)]


def seen_slots(case, arguments):
    """Accumulator slots that some row's keys have, a boolean [p, Z]."""
    page_list, segments, positions, acc_pages = (arguments[i] for i in (7, 8, 9, 13))
    seen = np.zeros(arguments[DK_ACC].shape[1:3], bool)
    for entry in range(page_list.num_pages):
        keys = page_list.starts[entry] + np.arange(case.page_size)
        gap = positions[segments == page_list.segments[entry]][:, None] - keys[None, :]
        limit = case.sliding_window or 2**30
        seen[acc_pages[entry]] |= ((gap >= 0) & (gap < limit)).any(0)
    return seen


@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_kernel_matches_reference(case, rng):
    arguments = case.arrays(rng)
    reference = case.function("reference")
    expected = jax.jit(reference)(*without_padding_garbage(case, arguments))
    found = run(case, arguments)
    assert_near(found, expected, case.tolerance)
    seen = seen_slots(case, arguments)
    for acc, before in zip(found[1:], arguments[DK_ACC : DV_ACC + 1], strict=True):
        acc = np.asarray(acc)
        assert (acc[: case.layer] == before[: case.layer]).all()
        assert (acc[case.layer][~seen] == before[case.layer][~seen]).all()


@pytest.mark.parametrize("name", ["packed_float32", "sliding_float32", "group_5_float32"])
def test_kernel_matches_the_vjp_of_dense_attention(name, rng):
    case = next(case for case in CASES if case.name == name)
    arguments = case.arrays(rng)
    q, d_out, page_list = (arguments[i] for i in (0, 3, 7))
    segments, positions, acc_pages = (arguments[i] for i in (8, 9, 13))
    dq, *accs = run(case, arguments)
    added = [
        np.asarray(acc) - before for acc, before in zip(accs, arguments[DK_ACC:], strict=False)
    ]
    keys, values = (case.dense(page_list, pool) for pool in arguments[4:6])
    by_acc_page = page_list._replace(pages=acc_pages)
    d_keys, d_values = (case.dense(by_acc_page, acc) for acc in added)
    for segment, (k, v) in enumerate(zip(keys, values, strict=True)):
        mine = np.flatnonzero(segments == segment)
        options = (case.sm_scale, case.sliding_window, positions[mine])
        _, vjp = jax.vjp(
            lambda q, k, v, options=options: dense_attention(q, k, v, *options)[0],
            *map(jnp.asarray, (q[mine], k, v)),
        )
        expected = vjp(jnp.asarray(d_out[mine]))
        found = (np.asarray(dq)[mine], d_keys[segment], d_values[segment])
        # The gradient of a row that sees one key is zero.
        assert_near(found, expected, 2e-6, floor=1.0)
    assert not np.asarray(dq)[segments < 0].any()


def split_case():
    return WindowCase(
        name="splits", segments=((90, 4), (33, 2)), dtype="float32", num_heads=2, num_kv_heads=1,
        head_dim=16, page_size=16,
    )  # fmt: skip


@pytest.mark.parametrize("splits", [1, 3, 8])
def test_splits_of_the_keys_add_up(splits, rng):
    case = split_case()
    arguments = case.arrays(rng)
    expected = jax.jit(case.function("reference"))(*arguments)
    tiling = pallas_triton.Tiling(16, 16, 16, 32, splits, 4, 1)
    with interpreted():
        found = jax.jit(
            lambda *args: pallas_triton.window_attention_backward(
                *args, sm_scale=case.sm_scale, tiling=tiling
            )
        )(*arguments)
    assert_near(found, expected, 1e-5)


def test_two_runs_and_any_order_of_pages_give_the_same_accumulators(rng):
    case = split_case()
    arguments = list(case.arrays(rng))
    first, again = run(case, arguments), run(case, arguments)
    for a, b in zip(first, again, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    used = case.used_pages
    order = np.arange(len(arguments[13]))
    order[:used] = rng.permutation(used)
    page_list = arguments[7]
    arguments[7] = page_list._replace(
        **{name: getattr(page_list, name)[order] for name in ("pages", "segments", "starts")}
    )
    arguments[13] = arguments[13][order]
    assert_near(run(case, arguments), first, 1e-6)


def test_pages_without_an_accumulator_add_nowhere(rng):
    case = split_case()
    arguments = list(case.arrays(rng))
    dropped = arguments[13][1]
    acc_pages = arguments[13].copy()
    acc_pages[1] = -1
    whole = run(case, arguments)
    arguments[13] = acc_pages
    dq, *accs = run(case, arguments)
    np.testing.assert_array_equal(dq, whole[0])
    for acc, full, before in zip(accs, whole[1:], arguments[DK_ACC:], strict=False):
        expected = np.array(full)
        expected[case.layer, dropped] = before[case.layer, dropped]
        np.testing.assert_array_equal(acc, expected)


def test_a_gradient_that_is_not_finite_reaches_no_other_query_and_no_slot_that_nobody_reads(rng):
    case = split_case()
    arguments = list(case.arrays(rng))
    whole = run(case, arguments)
    segments = arguments[8]
    arguments[3] = arguments[3].copy()
    arguments[3][segments == 1] = np.nan
    dq, *accs = run(case, arguments)
    assert np.isnan(dq[segments == 1]).all()
    np.testing.assert_array_equal(dq[segments == 0], whole[0][segments == 0])
    seen = seen_slots(case, arguments)
    for acc, before in zip(accs, arguments[DK_ACC:], strict=False):
        assert (np.asarray(acc)[case.layer][~seen] == before[case.layer][~seen]).all()


def test_few_rows_split_their_keys_and_many_do_not():
    with compile_target(90):
        few = pallas_triton.default_tiling(64, 32, 8, 128, jnp.bfloat16)
        many = pallas_triton.default_tiling(512, 32, 8, 128, jnp.bfloat16)
    assert few.num_splits == 8 and many.num_splits == 1


def test_named_backend_does_not_fall_back(rng):
    arguments = jax.tree.map(jnp.asarray, split_case().arrays(rng))
    with pytest.raises(NotImplementedError, match="needs compute capability 8.0"):
        window_attention_backward(*arguments, sm_scale=1.0, implementation="pallas_triton")
    mixed = [arguments[0].astype(jnp.bfloat16), *arguments[1:]]
    with interpreted(), pytest.raises(NotImplementedError, match="one dtype"):
        window_attention_backward(*mixed, sm_scale=1.0, implementation="pallas_triton")
