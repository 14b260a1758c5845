"""Attention backward of windows against jax.vjp of dense attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_cases import Paged, dense_attention, scale_of

from pallas_kernels import PageList, ragged_attention, window_attention_backward

TOLERANCE = 1e-5
FORWARD, BACKWARD = (
    jax.jit(function, static_argnames=("sm_scale", "sliding_window"))
    for function in (ragged_attention, window_attention_backward)
)
SHAPES = [(4, 4, 2, 10, None), (8, 6, 6, 6, 5), (16, 3, 1, 16, None), (16, 8, 2, 4, 21)]


class Windows:
    """Runs the backward of a stream of sequences window by window, last window first."""

    def __init__(self, rng, paged, heads, window_options):
        self.rng, self.paged, self.options = rng, paged, window_options
        lengths = paged.lengths
        self.segments = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
        self.positions = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)
        dim = paged.k_pool.shape[-1]
        shape = (len(self.segments), heads, dim)
        self.q, self.d_out = rng.standard_normal((2, *shape)).astype(np.float32)
        counts = [len(pages) for pages in paged.pages]
        acc = [int(page) for page in rng.permutation(sum(counts) + 2)]
        self.acc_pages = [[acc.pop() for _ in range(count)] for count in counts]
        acc_shape = (3, sum(counts) + 2, *paged.k_pool.shape[2:])
        self.dk = jnp.asarray(np.full(acc_shape, 7.0, np.float32)).at[2].set(0.0)
        self.dv = self.dk
        self.dq = np.zeros(shape, np.float32)

    def run(self, start, stop, padding):
        segments, positions = self.segments[start:stop], self.positions[start:stop]
        order = self.rng.permutation(stop - start + padding)
        rows = np.concatenate([np.arange(start, stop), np.full(padding, -1)])[order]

        def pad(values):
            return np.where(rows >= 0, values[np.maximum(rows, 0)], -1)

        entries = []
        for segment in np.unique(segments):
            end = positions[segments == segment].max()
            for index in range(end // self.paged.page_size + 1):
                page = self.paged.pages[segment][index]
                acc = self.acc_pages[segment][index]
                entries.append((page, segment, index * self.paged.page_size, acc))
        used = len(entries)
        entries += [(-1, -1, -1, -1)] * (self.dk.shape[1] + 3 - used)
        columns = [jnp.asarray(column, jnp.int32) for column in zip(*entries, strict=True)]
        pages, acc_pages = PageList(*columns[:3], jnp.int32(used)), columns[3]
        k, v, layer = self.paged.pools
        q = jnp.asarray(self.q[np.maximum(rows, 0)])
        at = (jnp.asarray(pad(self.segments)), jnp.asarray(pad(self.positions)))
        out, lse = FORWARD(q, k, v, layer, pages, *at, **self.options)
        dq, self.dk, self.dv = BACKWARD(
            q, out, lse, jnp.asarray(self.d_out[np.maximum(rows, 0)]), k, v, layer, pages, *at,
            self.dk, self.dv, jnp.int32(2), acc_pages, **self.options,
        )  # fmt: skip
        assert not np.asarray(dq)[rows < 0].any()
        self.dq[rows[rows >= 0]] = np.asarray(dq)[rows >= 0]


@pytest.mark.parametrize(("page", "heads", "kv_heads", "dim", "window"), SHAPES)
def test_windows_match_the_vjp_of_dense_attention(rng, page, heads, kv_heads, dim, window):
    paged = Paged(rng, [6, 1, 45, 19], page_size=page, num_kv_heads=kv_heads, head_dim=dim)
    options = {"sm_scale": scale_of(dim), "sliding_window": window}
    windows = Windows(rng, paged, heads, options)
    total = len(windows.segments)
    cuts = sorted(rng.choice(np.arange(1, total), 4, replace=False).tolist())
    borders = [0, *cuts, total]
    for start, stop in reversed(list(zip(borders, borders[1:], strict=False))):
        windows.run(start, stop, padding=total + 1 - (stop - start))  # one shape for all
    for segment, length in enumerate(paged.lengths):
        mine = windows.segments == segment

        def attend(q, k, v, length=length):
            return dense_attention(q, k, v, positions=np.arange(length), **options)[0]

        arrays = (windows.q[mine], paged.keys[segment], paged.values[segment])
        _, vjp = jax.vjp(attend, *map(jnp.asarray, arrays))
        expected = vjp(jnp.asarray(windows.d_out[mine]))
        slots = np.asarray(windows.acc_pages[segment])
        accs = (np.asarray(windows.dk), np.asarray(windows.dv))
        ours = [acc[2, slots].reshape(-1, kv_heads, dim) for acc in accs]
        got = (windows.dq[mine], ours[0][:length], ours[1][:length])
        for a, b in zip(got, expected, strict=True):
            assert np.linalg.norm(a - b) <= TOLERANCE * np.linalg.norm(b) + 2e-6
        for acc in ours:  # tails of last pages stay zero, though the pool's are NaN
            assert not acc[length:].any()
    for acc in (windows.dk, windows.dv):  # other layers, and pages of nobody
        assert (np.asarray(acc)[:2] == 7.0).all()
        nobody = np.setdiff1d(np.arange(acc.shape[1]), sum(windows.acc_pages, []))
        assert not np.asarray(acc)[2, nobody].any()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_stays_in_rows_that_are_read(rng, poison):
    """Slots behind a sequence's end, which nobody reads and clears, must stay zero."""
    paged = Paged(rng, [6, 9], page_size=4, num_kv_heads=2, head_dim=6)
    windows = Windows(rng, paged, 4, {"sm_scale": scale_of(6)})
    windows.d_out[windows.segments == 1] = poison
    windows.run(0, 15, padding=1)
    for acc in (windows.dk, windows.dv):
        acc = np.array(acc)[2]
        for pages, length in zip(windows.acc_pages, paged.lengths, strict=True):
            assert not acc[pages].reshape(-1, 2, 6)[length:].any()
            acc[pages] = 0.0
        assert not acc.any()
