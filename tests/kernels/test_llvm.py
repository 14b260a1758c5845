"""The toolkit of CPU kernels: calls, products, transposition, exponentials."""

import concurrent.futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

llvm_compile = pytest.importorskip("pallas_kernels._llvm.compile", reason="needs llvmlite")
gemm = pytest.importorskip("pallas_kernels._llvm.gemm", reason="needs llvmlite")
packing = pytest.importorskip("pallas_kernels._llvm.packing", reason="needs llvmlite")
vector = pytest.importorskip("pallas_kernels._llvm.vector", reason="needs llvmlite")


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def multiply(x, w, acc=None, *, turned_x=False, turned_w=False, rows=None, num_tasks=1):
    """Some rows of x @ w, or of acc + x @ w, by `gemm.product`."""
    (k, t) = x.shape if turned_x else x.shape[::-1]
    o = w.shape[0] if turned_w else w.shape[1]
    first, count = rows or (0, t)
    panels = -(-o // packing.panel_columns())
    per_task = -(-panels // num_tasks)

    def body(b, task, x, w, *output):
        left = packing.Rows(x, 1, t) if turned_x else packing.Rows(x, k)
        right = packing.Columns(w, 1, k) if turned_w else packing.Columns(w, o)
        start = task * per_task
        columns = start, b.minimum(start + per_task, b.integer(panels))
        place = packing.Output(output[-1], o, is_added=acc is not None)
        gemm.product(b, left, (first, count), right, columns, o, k, place)

    statics = (turned_x, turned_w, first, count, per_task, acc is not None)
    args = [x, w] if acc is None else [x, w, acc]
    aliases = None if acc is None else {2: 0}
    (y,) = llvm_compile.call(
        "test_product",
        statics,
        body,
        [floats(t, o)],
        args,
        num_tasks=-(-panels // per_task),
        aliases=aliases,
    )
    return y


@pytest.mark.parametrize(
    ("t", "k", "o"),
    [(1, 1, 1), (6, 16, 16), (7, 19, 33), (5, 300, 15), (65, 600, 70), (13, 1100, 100)],
)
@pytest.mark.parametrize("turned_w", [False, True])
@pytest.mark.parametrize("turned_x", [False, True])
def test_product(rng, t, k, o, turned_x, turned_w):
    x = rng.standard_normal((t, k)).astype(np.float32)
    w = rng.standard_normal((k, o)).astype(np.float32)
    given = [jnp.asarray(x.T if turned_x else x), jnp.asarray(w.T if turned_w else w)]
    y = multiply(*given, turned_x=turned_x, turned_w=turned_w, num_tasks=3)
    expected = x.astype(np.float64) @ w
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6 * np.sqrt(k) * 4)


def test_product_is_added(rng):
    x, w, acc = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((20, 300), (300, 45), (20, 45))
    )
    y = jax.jit(multiply)(x, w, acc)
    np.testing.assert_allclose(y, acc + x.astype(np.float64) @ w, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [(0, 3), (4, 12), (19, 1)])
def test_product_of_some_rows(rng, rows):
    x = rng.standard_normal((20, 40)).astype(np.float32)
    w = rng.standard_normal((40, 50)).astype(np.float32)
    some = slice(rows[0], sum(rows))
    acc = np.zeros((20, 50), np.float32)
    y = multiply(jnp.asarray(x), jnp.asarray(w), jnp.asarray(acc), rows=rows)
    acc[some] = (x.astype(np.float64) @ w)[some]
    np.testing.assert_allclose(y, acc, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("num_rows", "depth"), [(12, 16), (29, 37), (3, 5), (24, 1)])
@pytest.mark.parametrize("is_turned", [False, True])
def test_pack_rows(rng, num_rows, depth, is_turned):
    tile = packing.tile_rows()
    tiles, stride = -(-num_rows // tile), packing.tile_stride(depth)

    def body(b, task, source, target):
        rows = packing.Rows(source, 1, num_rows) if is_turned else packing.Rows(source, depth)
        packing.pack_rows(b, rows, num_rows, num_rows % tile, depth, target, stride)

    x = rng.standard_normal((num_rows, depth)).astype(np.float32)
    given = jnp.asarray(x.T if is_turned else x)
    statics = (num_rows, depth, is_turned)
    (packed,) = llvm_compile.call(
        "test_pack", statics, body, [floats(tiles, stride)], [given], num_tasks=1
    )
    found = np.asarray(packed)[:, : depth * tile].reshape(tiles, depth, tile)
    expected = np.zeros((tiles * tile, depth), np.float32)
    expected[:num_rows] = x
    np.testing.assert_array_equal(found.swapaxes(1, 2).reshape(tiles * tile, depth), expected)


def test_transpose():
    lanes = llvm_compile.vector_lanes()

    def body(b, task, x, y):
        rows = [x.vector(n * lanes, lanes) for n in range(lanes)]
        for n, row in enumerate(packing.transpose(b, rows)):
            y.store(n * lanes, row)

    x = jnp.arange(lanes * lanes, dtype=jnp.float32).reshape(lanes, lanes)
    (y,) = llvm_compile.call("test_turn", (), body, [floats(lanes, lanes)], [x], num_tasks=1)
    np.testing.assert_array_equal(y, x.T)


def exponentials(x):
    size = x.shape[0]

    def body(b, task, x, y):
        with b.loop(0, size, b.lanes) as n:
            y.store(n, vector.exp(b, x.vector(n, b.lanes)))

    (y,) = llvm_compile.call("test_exp", (), body, [floats(size)], [x], num_tasks=1)
    return np.asarray(y)


@pytest.mark.parametrize(("low", "high"), [(-87.2, 88.3), (-1.0, 1.0), (-1e-3, 1e-3)])
def test_exp_is_within_three_ulps(low, high):
    x = np.linspace(low, high, 1 << 16).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    ulps = np.abs(exponentials(jnp.asarray(x)) - exact) / np.spacing(exact.astype(np.float32))
    assert ulps.max() <= 3


def test_exp_of_what_is_not_in_range():
    rest = np.zeros(2 * llvm_compile.vector_lanes() - 6, np.float32)
    x = np.asarray([np.nan, -np.inf, -1e30, -100.0, np.inf, 100.0, *rest], np.float32)
    y = exponentials(jnp.asarray(x))
    assert np.isnan(y[0])
    assert (y[1:4] >= 0).all() and (y[1:4] <= 2e-38).all()
    assert (y[4:6] >= 2e38).all()
    np.testing.assert_array_equal(y[6:], 1.0)


def scale(x, factor, num_tasks=7):
    """x * factor in tasks of uneven size, the factor an int32."""
    size = x.shape[0]
    per_task = -(-size // num_tasks)

    def body(b, task, x, factor, y):
        with b.loop(task * per_task, b.minimum((task + 1) * per_task, b.integer(size))) as n:
            y[n] = x[n] * b.to_float(factor[0])

    (y,) = llvm_compile.call(
        "test_scale", (), body, [floats(size)], [x, factor], num_tasks=num_tasks
    )
    return y


@pytest.mark.parametrize("num_tasks", [1, 2, 50])
def test_call_runs_every_task_once(num_tasks):
    (counts,) = llvm_compile.call(
        "test_count",
        (),
        lambda b, task, zeros, counts: counts.__setitem__(task, counts[task] + 1),
        [jax.ShapeDtypeStruct((num_tasks,), jnp.int32)],
        [jnp.zeros(num_tasks, jnp.int32)],
        num_tasks=num_tasks,
        aliases={0: 0},
    )
    np.testing.assert_array_equal(counts, 1)


def test_call_reads_integers():
    x = jnp.arange(100.0)
    np.testing.assert_array_equal(scale(x, jnp.asarray([-3])), -3 * x)


def test_call_does_not_overwrite_an_argument_that_is_used_again():
    @jax.jit
    def both(x):
        (y,) = llvm_compile.call(
            "test_alias",
            (),
            lambda b, task, x, y: y.__setitem__(task, y[task] + 1.0),
            [floats(4)],
            [x],
            num_tasks=4,
            aliases={0: 0},
        )
        return x, y

    x, y = both(jnp.arange(4.0))
    np.testing.assert_array_equal(x, np.arange(4.0))
    np.testing.assert_array_equal(y, np.arange(4.0) + 1)


def test_calls_from_many_threads():
    function = jax.jit(scale)
    x = jnp.arange(1000.0)

    def many(seed):
        return all(
            np.array_equal(function(x, jnp.asarray([seed + n])), np.arange(1000.0) * (seed + n))
            for n in range(50)
        )

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(many, range(8)))


def test_calls_in_scan_and_cond():
    @jax.jit
    def function(x, factors):
        def one(x, factor):
            x = lax.cond(factor[0] > 0, lambda x: scale(x, factor), lambda x: x + 1.0, x)
            return x, x.sum()

        return lax.scan(one, x, factors)

    x, sums = function(jnp.ones(30), jnp.asarray([[2], [-1], [3]]))
    np.testing.assert_array_equal(x, 9.0)
    np.testing.assert_array_equal(sums, [60.0, 90.0, 270.0])


def test_independent_calls_in_one_program():
    @jax.jit
    def function(x):
        return sum(scale(x + n, jnp.asarray([n])) for n in range(10))

    x = np.arange(50.0, dtype=np.float32)
    np.testing.assert_array_equal(function(x), sum((x + n) * n for n in range(10)))
