"""Paged attention against dense attention: shuffled pages, padding, and poisoned memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_cases import Paged, dense_attention, scale_of

from pallas_kernels import PageList, decode_attention, ragged_attention
from pallas_kernels._llvm import can_run_llvm

TOLERANCE = 2e-6

# page size, query heads, KV heads, head dim, sliding window
SHAPES = [(4, 4, 2, 10, None), (8, 6, 6, 6, 5), (16, 3, 1, 16, None), (16, 8, 2, 4, 33),
          (64, 3, 3, 80, 50)]  # fmt: skip
STATIC = ("sm_scale", "sliding_window", "implementation")

needs_llvm = pytest.mark.skipif(not can_run_llvm(), reason="needs llvmlite, and a CPU")


@pytest.fixture(params=["reference", pytest.param("llvm", marks=needs_llvm)])
def implementation(request):
    return request.param


@pytest.mark.parametrize(("page", "heads", "kv_heads", "dim", "window"), SHAPES)
def test_decode(rng, implementation, page, heads, kv_heads, dim, window):
    lengths = [1, 7, 33, 150, 16, 300]
    paged = Paged(rng, lengths, page_size=page, num_kv_heads=kv_heads, head_dim=dim)
    rows = len(lengths) + 2
    table = np.full((rows, max(map(len, paged.pages)) + 2), -1, np.int32)
    positions = np.full(rows, -1, np.int32)
    for row, pages in enumerate(paged.pages):
        table[row, : len(pages)] = pages
        positions[row] = lengths[row] - 1
    q = rng.standard_normal((rows, heads, dim)).astype(np.float32)
    k, v, layer = paged.pools
    options = {"sm_scale": scale_of(dim), "sliding_window": window}
    out = jax.jit(decode_attention, static_argnames=STATIC)(
        jnp.asarray(q), k, v, layer, jnp.asarray(table), jnp.asarray(positions),
        implementation=implementation, **options,
    )  # fmt: skip
    for row, length in enumerate(lengths):
        expected, _ = dense_attention(
            jnp.asarray(q[row : row + 1]), paged.keys[row], paged.values[row],
            positions=[length - 1], **options,
        )  # fmt: skip
        np.testing.assert_allclose(out[row], expected[0], atol=TOLERANCE, rtol=0)
    assert not np.asarray(out[len(lengths) :]).any()


def draw_rows(rng, lengths, padding):
    """Rows of random positions of every sequence, shuffled, with padding rows between them."""
    chosen = [(s, int(p)) for s, n in enumerate(lengths) for p in rng.permutation(n)[: n // 2 + 1]]
    chosen += [(-1, -1)] * padding
    rng.shuffle(chosen)
    segments, positions = (np.asarray(column, np.int32) for column in zip(*chosen, strict=True))
    return segments, positions


@pytest.mark.parametrize(("page", "heads", "kv_heads", "dim", "window"), SHAPES)
def test_ragged(rng, implementation, page, heads, kv_heads, dim, window):
    lengths = [5, 1, 61, 140, 16]
    check_ragged(rng, implementation, lengths, page, heads, kv_heads, dim, window)


def check_ragged(rng, implementation, lengths, page, heads, kv_heads, dim, window, rows=None):
    paged = Paged(rng, lengths, page_size=page, num_kv_heads=kv_heads, head_dim=dim)
    segments, positions = draw_rows(rng, lengths, padding=5) if rows is None else rows
    q = rng.standard_normal((len(segments), heads, dim)).astype(np.float32)
    k, v, layer = paged.pools
    options = {"sm_scale": scale_of(dim), "sliding_window": window}
    out, lse = jax.jit(ragged_attention, static_argnames=STATIC)(
        jnp.asarray(q), k, v, layer, paged.page_list(rng), jnp.asarray(segments),
        jnp.asarray(positions), implementation=implementation, **options,
    )  # fmt: skip
    for segment in range(len(lengths)):
        mine = segments == segment
        expected, expected_lse = dense_attention(
            jnp.asarray(q[mine]), paged.keys[segment], paged.values[segment],
            positions=positions[mine], **options,
        )  # fmt: skip
        np.testing.assert_allclose(np.asarray(out)[mine], expected, atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(np.asarray(lse)[mine], expected_lse, atol=1e-5, rtol=0)
    assert not np.asarray(out)[segments < 0].any()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("target", ["keys", "values"])
def test_rows_do_not_feel_another_sequence_of_the_step(rng, implementation, poison, target):
    """A diverging finetuning sequence may stand in the same step as a request's prompt."""
    lengths, dim = [9, 12, 7], 6
    paged = Paged(rng, lengths, page_size=4, num_kv_heads=2, head_dim=dim)
    segments, positions = draw_rows(rng, lengths, padding=2)
    q = jnp.asarray(rng.standard_normal((len(segments), 4, dim)), jnp.float32)
    pages = paged.page_list(rng)
    rest = (jnp.int32(1), pages, jnp.asarray(segments), jnp.asarray(positions))
    k, v, _ = paged.pools
    options = {"sm_scale": scale_of(dim), "implementation": implementation}
    clean, clean_lse = ragged_attention(q, k, v, *rest, **options)
    pool = paged.k_pool if target == "keys" else paged.v_pool
    pool[1, paged.pages[1]] = poison
    k, v, _ = paged.pools
    out, lse = ragged_attention(q, k, v, *rest, **options)
    others = segments != 1
    np.testing.assert_array_equal(np.asarray(out)[others], np.asarray(clean)[others])
    np.testing.assert_array_equal(np.asarray(lse)[others], np.asarray(clean_lse)[others])


def window_rows(windows):
    """Rows in order: (segment, first position, position behind the last) of each window."""
    rows = [(s, p) for s, start, stop in windows for p in range(start, stop)]
    rows += [(-1, -1)] * 7
    return tuple(np.asarray(column, np.int32) for column in zip(*rows, strict=True))


@pytest.mark.parametrize(
    ("page", "heads", "kv_heads", "dim", "window"),
    [(16, 2, 2, 64, None), (8, 3, 1, 10, None), (32, 4, 1, 6, 100), (16, 4, 2, 80, 40)],
)
def test_rows_and_keys_of_many_tiles(rng, implementation, page, heads, kv_heads, dim, window):
    """Windows of long sequences, one not at the start, and short ones packed between them."""
    lengths = [650, 30, 30, 30, 210]
    windows = [(0, 450, 650), (1, 0, 30), (2, 0, 30), (3, 5, 30), (4, 0, 210)]
    rows = window_rows(windows)
    check_ragged(rng, implementation, lengths, page, heads, kv_heads, dim, window, rows)


@pytest.mark.parametrize("target", ["keys", "values"])
def test_what_is_not_finite_shows_in_the_rows_that_see_it(rng, implementation, target):
    lengths, dim, bad = [40, 30], 6, 17
    paged = Paged(rng, lengths, page_size=8, num_kv_heads=2, head_dim=dim)
    segments, positions = draw_rows(rng, lengths, padding=2)
    q = jnp.asarray(rng.standard_normal((len(segments), 4, dim)), jnp.float32)
    rest = (paged.page_list(rng), jnp.asarray(segments), jnp.asarray(positions))
    options = {"sm_scale": scale_of(dim), "implementation": implementation}
    clean, _ = ragged_attention(q, *paged.pools, *rest, **options)
    pool = paged.k_pool if target == "keys" else paged.v_pool
    pool[1, paged.pages[0][bad // 8], bad % 8, :, 3] = np.nan
    out, _ = ragged_attention(q, *paged.pools, *rest, **options)
    sees = (segments == 0) & (positions >= bad)
    assert sees.any() and np.isnan(np.asarray(out)[sees]).all()
    np.testing.assert_array_equal(np.asarray(out)[~sees], np.asarray(clean)[~sees])


def long_case(rng, implementation, padding=3):
    """Arguments and options of `ragged_attention`, of several tasks."""
    lengths = [300, 40]
    paged = Paged(rng, lengths, page_size=16, num_kv_heads=2, head_dim=10)
    segments, positions = window_rows([(0, 100, 300), (1, 0, 40)])
    q = jnp.asarray(rng.standard_normal((len(segments), 4, 10)), jnp.float32)
    places = (jnp.asarray(segments), jnp.asarray(positions))
    args = (q, *paged.pools, paged.page_list(rng, padding), *places)
    return args, {"sm_scale": scale_of(10), "implementation": implementation}


@needs_llvm
def test_results_do_not_depend_on_the_number_of_threads(rng, monkeypatch):
    from pallas_kernels._llvm import compile as llvm_compile

    (*args, page_list, segments, positions), options = long_case(rng, "llvm")
    q, k, v, layer = args
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(llvm_compile, "num_threads", lambda threads=threads: threads)
        # One more entry is another program, so it is compiled anew.
        page_list = PageList(*(jnp.append(x, -1) for x in page_list[:3]), page_list.num_pages)
        table = jnp.stack([page_list.pages[:3]] * 5)
        table = jnp.pad(table, ((0, 0), (0, threads)), constant_values=-1)
        at = jnp.asarray([5, 20, -1, 47, 31], jnp.int32)
        decoded = decode_attention(q[:5], k, v, layer, table, at, **options)
        found.append((decoded, *ragged_attention(*args, page_list, segments, positions, **options)))
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            np.testing.assert_array_equal(a, b)


@needs_llvm
@pytest.mark.parametrize(
    ("rows", "kv_heads", "threads", "heads"),
    [(8, 8, 2, 8), (1, 8, 2, 2), (3, 6, 2, 3), (1, 1, 4, 1), (2, 8, 64, 1), (64, 4, 1, 4)],
)
def test_heads_of_a_decode_task(rows, kv_heads, threads, heads):
    from pallas_kernels.paged_attention import llvm_code

    spec = llvm_code.Attention(
        num_tokens=rows, num_heads=kv_heads, num_kv_heads=kv_heads, head_dim=8, page_size=4,
        pool_pages=1, list_len=1, sm_scale=1.0, sliding_window=None,
    )  # fmt: skip
    assert llvm_code.decode_heads(spec, threads) == heads


@needs_llvm
def test_the_pool_is_not_copied(rng):
    args, options = long_case(rng, "llvm")

    def layers(q, k, v, _, *rest):
        def one(k, layer):
            k = k.at[layer, 0, 0].set(q[0, :2])
            return k, ragged_attention(q, k, v, layer, *rest, **options)[0]

        return jax.lax.scan(one, k, jnp.arange(2))

    hlo = jax.jit(layers, donate_argnums=1).lower(*args).compile().as_text()
    shape = "f32[{}]".format(",".join(map(str, args[1].shape)))
    assert shape in hlo
    assert not [line for line in hlo.splitlines() if f"{shape}{{4,3,2,1,0}} copy(" in line]


@needs_llvm
def test_other_dtypes_are_left_to_others(rng):
    args, options = long_case(rng, "llvm")
    args = [args[0].astype(jnp.bfloat16), *args[1:]]
    with pytest.raises(NotImplementedError, match="takes float32 arrays; got `q` of bfloat16"):
        ragged_attention(*args, **options)
    out, _ = ragged_attention(*args, sm_scale=1.0)
    assert out.dtype == jnp.bfloat16


def test_bad_shapes_are_refused(rng):
    paged = Paged(rng, [4], page_size=4, num_kv_heads=2, head_dim=6)
    k, v, layer = paged.pools
    table, at = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1,), jnp.int32)
    with pytest.raises(ValueError, match="heads must be a multiple of 2; got 3"):
        decode_attention(jnp.zeros((1, 3, 6)), k, v, layer, table, at, sm_scale=1.0)
    odd = jnp.zeros((2, 4, 3, 2, 6))
    with pytest.raises(ValueError, match="`page_size` must be a power of two; got 3"):
        decode_attention(jnp.zeros((1, 4, 6)), odd, odd, layer, table, at, sm_scale=1.0)
    with pytest.raises(ValueError, match="must be None or one of .*; got 'cuda'"):
        decode_attention(
            jnp.zeros((1, 4, 6)), k, v, layer, table, at, sm_scale=1.0, implementation="cuda"
        )
    assert PageList._fields == ("pages", "segments", "starts", "num_pages")
