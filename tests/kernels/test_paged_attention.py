"""Paged attention against dense attention: shuffled pages, padding, and poisoned memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_cases import Paged, dense_attention, scale_of

from pallas_kernels import PageList, decode_attention, ragged_attention

TOLERANCE = 2e-6

# page size, query heads, KV heads, head dim, sliding window
SHAPES = [(4, 4, 2, 10, None), (8, 6, 6, 6, 5), (16, 3, 1, 16, None), (16, 8, 2, 4, 33)]


@pytest.mark.parametrize(("page", "heads", "kv_heads", "dim", "window"), SHAPES)
def test_decode(rng, page, heads, kv_heads, dim, window):
    lengths = [1, 7, 33, 150, 16]
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
    out = decode_attention(jnp.asarray(q), k, v, layer, jnp.asarray(table), jnp.asarray(positions),
                           **options)  # fmt: skip
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
def test_ragged(rng, page, heads, kv_heads, dim, window):
    lengths = [5, 1, 61, 140, 16]
    paged = Paged(rng, lengths, page_size=page, num_kv_heads=kv_heads, head_dim=dim)
    segments, positions = draw_rows(rng, lengths, padding=5)
    q = rng.standard_normal((len(segments), heads, dim)).astype(np.float32)
    k, v, layer = paged.pools
    options = {"sm_scale": scale_of(dim), "sliding_window": window}
    out, lse = jax.jit(ragged_attention, static_argnames=("sm_scale", "sliding_window"))(
        jnp.asarray(q), k, v, layer, paged.page_list(rng), jnp.asarray(segments),
        jnp.asarray(positions), **options,
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
def test_rows_do_not_feel_another_sequence_of_the_step(rng, poison, target):
    """A diverging finetuning sequence may stand in the same step as a request's prompt."""
    lengths, dim = [9, 12, 7], 6
    paged = Paged(rng, lengths, page_size=4, num_kv_heads=2, head_dim=dim)
    segments, positions = draw_rows(rng, lengths, padding=2)
    q = jnp.asarray(rng.standard_normal((len(segments), 4, dim)), jnp.float32)
    pages = paged.page_list(rng)
    rest = (jnp.int32(1), pages, jnp.asarray(segments), jnp.asarray(positions))
    k, v, _ = paged.pools
    options = {"sm_scale": scale_of(dim)}
    clean, clean_lse = ragged_attention(q, k, v, *rest, **options)
    pool = paged.k_pool if target == "keys" else paged.v_pool
    pool[1, paged.pages[1]] = poison
    k, v, _ = paged.pools
    out, lse = ragged_attention(q, k, v, *rest, **options)
    others = segments != 1
    np.testing.assert_array_equal(np.asarray(out)[others], np.asarray(clean)[others])
    np.testing.assert_array_equal(np.asarray(lse)[others], np.asarray(clean_lse)[others])


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
