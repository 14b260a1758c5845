"""Attention backward of windows against jax.vjp of dense attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_cases import Paged, dense_attention, scale_of

from pallas_kernels import PageList, ragged_attention, window_attention_backward
from pallas_kernels._llvm import can_run_llvm

TOLERANCE = 1e-5
FORWARD, BACKWARD = (
    jax.jit(function, static_argnames=("sm_scale", "sliding_window", "implementation"))
    for function in (ragged_attention, window_attention_backward)
)
SHAPES = [(4, 4, 2, 10, None), (8, 6, 6, 6, 5), (16, 3, 1, 16, None), (16, 8, 2, 4, 21)]

needs_llvm = pytest.mark.skipif(not can_run_llvm(), reason="needs llvmlite, and a CPU")


@pytest.fixture(params=["reference", pytest.param("llvm", marks=needs_llvm)])
def implementation(request):
    return request.param


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

    def arguments(self, start, stop, padding):
        """Rows of the window, and what the backward takes but for `out` and `lse`."""
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
        q, d_out = (jnp.asarray(x[np.maximum(rows, 0)]) for x in (self.q, self.d_out))
        at = (jnp.asarray(pad(self.segments)), jnp.asarray(pad(self.positions)))
        out, lse = FORWARD(q, k, v, layer, pages, *at, **self.options)
        accs = (self.dk, self.dv, jnp.int32(2), acc_pages)
        return rows, (q, out, lse, d_out, k, v, layer, pages, *at, *accs)

    def run(self, start, stop, padding):
        rows, arguments = self.arguments(start, stop, padding)
        dq, self.dk, self.dv = BACKWARD(*arguments, **self.options)
        assert not np.asarray(dq)[rows < 0].any()
        self.dq[rows[rows >= 0]] = np.asarray(dq)[rows >= 0]


@pytest.mark.parametrize(("page", "heads", "kv_heads", "dim", "window"), SHAPES)
def test_windows_match_the_vjp_of_dense_attention(
    rng, implementation, page, heads, kv_heads, dim, window
):
    paged = Paged(rng, [6, 1, 45, 19], page_size=page, num_kv_heads=kv_heads, head_dim=dim)
    check_windows(rng, implementation, paged, heads, window)


@pytest.mark.parametrize(
    ("page", "heads", "kv_heads", "dim", "window"),
    [(16, 5, 5, 64, None), (8, 3, 1, 10, None), (32, 4, 1, 6, 60), (16, 4, 2, 80, 40)],
)
def test_rows_and_keys_of_many_tiles(rng, implementation, page, heads, kv_heads, dim, window):
    lengths = [330, 30, 30, 30, 140]
    paged = Paged(rng, lengths, page_size=page, num_kv_heads=kv_heads, head_dim=dim)
    check_windows(rng, implementation, paged, heads, window, num_cuts=2)


def check_windows(rng, implementation, paged, heads, window, num_cuts=4):
    kv_heads, dim = paged.k_pool.shape[-2:]
    options = {"sm_scale": scale_of(dim), "sliding_window": window}
    windows = Windows(rng, paged, heads, {**options, "implementation": implementation})
    total = len(windows.segments)
    cuts = sorted(rng.choice(np.arange(1, total), num_cuts, replace=False).tolist())
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
def test_a_gradient_that_is_not_finite_stays_in_rows_that_are_read(rng, implementation, poison):
    """Slots behind a sequence's end, which nobody reads and clears, must stay zero."""
    paged = Paged(rng, [6, 9], page_size=4, num_kv_heads=2, head_dim=6)
    windows = Windows(rng, paged, 4, {"sm_scale": scale_of(6), "implementation": implementation})
    windows.d_out[windows.segments == 1] = poison
    windows.run(0, 15, padding=1)
    for acc in (windows.dk, windows.dv):
        acc = np.array(acc)[2]
        for pages, length in zip(windows.acc_pages, paged.lengths, strict=True):
            assert not acc[pages].reshape(-1, 2, 6)[length:].any()
            acc[pages] = 0.0
        assert not acc.any()


def some_windows(rng, lengths=(60, 50), heads=4, kv_heads=2, dim=6):
    paged = Paged(rng, lengths, page_size=8, num_kv_heads=kv_heads, head_dim=dim)
    return Windows(rng, paged, heads, {"sm_scale": scale_of(dim), "implementation": "llvm"})


@needs_llvm
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("target", ["q", "d_out", "keys", "values"])
def test_sequences_do_not_feel_each_other(rng, target, poison):
    """In one tile of rows and one block of keys: what diverges in one is NaN in that one only."""
    windows, bad = some_windows(rng), 33
    rows, arguments = windows.arguments(0, 110, padding=3)
    clean = BACKWARD(*arguments, **windows.options)
    place = (1, windows.paged.pages[1][bad // 8], bad % 8)
    row = np.flatnonzero(rows == 60 + bad)[0]
    index = {"q": 0, "d_out": 3, "keys": 4, "values": 5}[target]
    where = place if target in ("keys", "values") else row
    arguments = list(arguments)
    arguments[index] = arguments[index].at[where].set(poison)
    found = BACKWARD(*arguments, **windows.options)
    sees = rows >= 60 + bad if target in ("keys", "values") else rows == 60 + bad
    for seen in np.flatnonzero(sees):
        assert not np.isfinite(np.asarray(found[0])[seen]).any()
    np.testing.assert_array_equal(np.asarray(found[0])[~sees], np.asarray(clean[0])[~sees])
    mine = windows.acc_pages[1][: bad // 8 + 1 if target in ("q", "d_out") else None]
    others = np.setdiff1d(np.arange(found[1].shape[1]), mine)
    for acc, before in zip(found[1:], clean[1:], strict=True):
        np.testing.assert_array_equal(np.asarray(acc)[:, others], np.asarray(before)[:, others])
    if target == "q" or target == "d_out":  # every key that the row sees
        for acc in found[1:]:
            assert not np.isfinite(np.asarray(acc)[2, mine[0]]).any()
    else:
        d_key = np.asarray(found[1])[2, mine[bad // 8], bad % 8]
        assert not np.isfinite(d_key).any()


@needs_llvm
def test_padding_rows_may_hold_anything(rng):
    windows = some_windows(rng)
    rows, arguments = windows.arguments(10, 110, padding=9)
    clean = BACKWARD(*arguments, **windows.options)
    arguments = [
        x.at[np.flatnonzero(rows < 0)].set(np.nan) if index < 4 else x
        for index, x in enumerate(arguments)
    ]
    for a, b in zip(BACKWARD(*arguments, **windows.options), clean, strict=True):
        np.testing.assert_array_equal(a, b)


@needs_llvm
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_results_do_not_depend_on_the_number_of_threads(rng, monkeypatch, kv_heads):
    from pallas_kernels._llvm import compile as llvm_compile

    windows = some_windows(rng, lengths=(250, 40), kv_heads=kv_heads, dim=10)
    _, arguments = windows.arguments(60, 290, padding=3)
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(llvm_compile, "num_threads", lambda threads=threads: threads)
        # One more entry is another program, so it is compiled anew.
        page_list, acc_pages = arguments[7], jnp.append(arguments[-1], -1)
        page_list = PageList(*(jnp.append(x, -1) for x in page_list[:3]), page_list.num_pages)
        arguments = (*arguments[:7], page_list, *arguments[8:-1], acc_pages)
        found.append(BACKWARD(*arguments, **windows.options))
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            np.testing.assert_array_equal(a, b)


@needs_llvm
@pytest.mark.parametrize("loop", ["scan", "fori_loop", None])
def test_pool_and_accumulators_are_not_copied(rng, loop):
    windows = some_windows(rng)
    _, arguments = windows.arguments(0, 110, padding=3)

    def layers(dk, dv, *rest):
        *before, acc_layer, acc_pages = rest

        def one(accs, layer):
            end = (*accs, layer, acc_pages)
            dq, dk, dv = window_attention_backward(*before, *end, **windows.options)
            return (dk, dv), dq

        if loop is None:
            return one((dk, dv), acc_layer)
        if loop == "scan":
            return jax.lax.scan(one, (dk, dv), jnp.arange(3))
        return jax.lax.fori_loop(0, 3, lambda i, accs: one(accs, i)[0], (dk, dv))

    dk, dv = jnp.array(windows.dk), jnp.array(windows.dv)
    arguments = (dk, dv, *arguments[:10], *arguments[12:])
    hlo = jax.jit(layers, donate_argnums=(0, 1)).lower(*arguments).compile().as_text()
    for array in (dk, windows.paged.k_pool):
        shape = "f32[{}]".format(",".join(map(str, array.shape)))
        assert shape in hlo
        assert not [line for line in hlo.splitlines() if f"{shape}{{4,3,2,1,0}} copy(" in line]


@needs_llvm
def test_pages_that_are_not_named_get_nothing(rng):
    windows = some_windows(rng)
    _, arguments = windows.arguments(0, 110, padding=3)
    _, *every = BACKWARD(*arguments, **windows.options)
    skipped = np.asarray(arguments[-1])[[1, 4]]
    acc_pages = arguments[-1].at[jnp.asarray([1, 4])].set(-1)
    _, *some = BACKWARD(*arguments[:-1], acc_pages, **windows.options)
    for acc, full, before in zip(some, every, arguments[10:12], strict=True):
        expected = np.array(full)
        expected[2, skipped] = np.asarray(before)[2, skipped]
        np.testing.assert_array_equal(acc, expected)
