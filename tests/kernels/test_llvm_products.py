"""Products with stacked weights and adapters by the CPU's kernels, against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

llvm_compile = pytest.importorskip("pallas_kernels._llvm.compile", reason="needs llvmlite")

from pallas_kernels import (  # noqa: E402
    dual_matmul,
    grouped_lora_backward,
    grouped_lora_many,
    stacked_matmul,
    stacked_matmul_transposed,
)
from pallas_kernels.dual_matmul import llvm_code as matmul_code  # noqa: E402
from pallas_kernels.grouped_lora import llvm_code as lora_code  # noqa: E402

TOLERANCE = 3e-6  # relative to the largest number of a result

# rows, in, outs, layers
SHAPES = [
    (1, 20, (7, 18), 3),
    (2, 7, (70, 1), 2),
    (5, 33, (40, 16, 70), 2),
    (8, 300, (256, 33), 2),
    (48, 129, (64,), 2),
    (49, 129, (64, 31), 2),
    (131, 260, (129, 16), 1),
]


def draw(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def assert_near(found, expected):
    assert len(found) == len(expected)
    for result, wanted in zip(found, expected, strict=True):
        error = np.abs(np.asarray(result, np.float64) - wanted).max()
        assert error <= TOLERANCE * max(np.abs(wanted).max(), 1e-3), error


@pytest.mark.parametrize(("rows", "width", "outs", "layers"), SHAPES)
@pytest.mark.parametrize("has_accs", [False, True])
def test_products_of_both_sides(rng, rows, width, outs, layers, has_accs):
    x, layer = draw(rng, rows, width), layers - 1
    kernels = [draw(rng, layers, width, out) for out in outs]
    accs = [draw(rng, rows, out) if has_accs and n != 1 else None for n, out in enumerate(outs)]
    d_ys, d_acc = [draw(rng, rows, out) for out in outs], draw(rng, rows, width)

    @jax.jit
    def run(x, kernels, layer, accs, d_ys, d_acc):
        options = {"accs": accs, "d_acc": d_acc if has_accs else None, "implementation": "llvm"}
        return dual_matmul(x, kernels, layer, d_ys, kernels, layer, **options)

    ys, dx = run(x, kernels, jnp.int32(layer), accs, d_ys, d_acc)
    wide = [kernel[layer].astype(np.float64) for kernel in kernels]
    zero = np.float64(0)
    pairs = zip(wide, accs, strict=True)
    assert_near(ys, [(zero if acc is None else acc) + x @ kernel for kernel, acc in pairs])
    expected = sum(d_y @ kernel.T for d_y, kernel in zip(d_ys, wide, strict=True))
    assert_near([dx], [expected + (d_acc if has_accs else 0)])


def test_what_is_not_finite_shows(rng):
    x, kernel = draw(rng, 9, 40), draw(rng, 1, 40, 33)
    kernel[0, 3, 5], x[2, 7] = np.nan, np.inf
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    y = np.asarray(stacked_matmul(x, (kernel,), jnp.int32(0), implementation="llvm")[0])
    assert np.isnan(y[:, 5]).all() and not np.isfinite(y[2]).any()
    rest = np.delete(np.delete(y, 2, 0), 5, 1)
    assert np.isfinite(rest).all()


@pytest.mark.parametrize("rows", [8, 100])
def test_the_number_of_threads_changes_no_bit(rng, rows, monkeypatch):
    shapes = (rows, 90), (2, 90, 300), (rows, 300)
    x, kernel, d_y = (jnp.asarray(draw(rng, *shape)) for shape in shapes)
    found = []
    for threads in (1, 2, 5):
        for module in (matmul_code, llvm_compile):
            monkeypatch.setattr(module, "num_threads", lambda threads=threads: threads)
        layer, options = jnp.int32(1), {"implementation": "llvm"}
        y = stacked_matmul(x, (kernel,), layer, **options)[0]
        found.append((y, stacked_matmul_transposed((d_y,), (kernel,), layer, **options)))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


def test_only_float32_is_taken(rng):
    x, kernel = jnp.ones((2, 8), jnp.bfloat16), jnp.ones((1, 8, 4), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="takes float32 arrays; got `x` of bfloat16"):
        stacked_matmul(x, (kernel,), jnp.int32(0), implementation="llvm")
    assert stacked_matmul(x, (kernel,), jnp.int32(0))[0].dtype == jnp.float32
    wide = (jnp.ones((1, 8, 4)),)
    with pytest.raises(NotImplementedError, match="gives float32; got bfloat16"):
        options = {"out_dtype": jnp.bfloat16, "implementation": "llvm"}
        stacked_matmul(jnp.ones((2, 8)), wide, jnp.int32(0), **options)


class Adapters:
    """Rows of several adapters, and the formula of each row."""

    def __init__(self, rng, rows, width, outs, rank, popularity, slots=4, layers=2):
        self.x, self.scale = draw(rng, rows, width), rng.uniform(0.5, 2, slots).astype(np.float32)
        self.a = [draw(rng, slots, layers, width, rank) for _ in outs]
        self.b = [draw(rng, slots, layers, rank, out) for out in outs]
        self.ys, self.dx = [draw(rng, rows, out) for out in outs], draw(rng, rows, width)
        self.slots = {
            "mixed": rng.integers(-1, slots, rows),
            "runs": np.sort(rng.integers(-1, slots, rows)),
            "one": np.full(rows, slots - 1),
            "none": np.full(rows, -1),
        }[popularity].astype(np.int32)
        used = np.unique(self.slots[self.slots >= 0])
        self.active = np.full(slots, -1, np.int32)
        self.active[: len(used)], self.num_active, self.layer = used, len(used), layers - 1

    @property
    def rows(self):
        return (
            self.scale, jnp.int32(self.layer), self.slots, self.active, jnp.int32(self.num_active),
        )  # fmt: skip

    def forward(self):
        run = jax.jit(lambda *args: grouped_lora_many(*args, implementation="llvm"))
        return run(self.x, self.ys, self.a, self.b, *self.rows)

    def backward(self, n):
        run = jax.jit(lambda *args: grouped_lora_backward(*args, implementation="llvm"))
        return run(self.x, self.ys[n], self.dx, self.a[n], self.b[n], *self.rows)

    def of(self, n, slot):
        """A and B of a linear, scaled into B."""
        a, b = (stack[n][slot, self.layer].astype(np.float64) for stack in (self.a, self.b))
        return a, b * self.scale[slot]

    def expected(self, n):
        y = self.ys[n].astype(np.float64)
        for slot in self.active[: self.num_active]:
            mine, (a, b) = self.slots == slot, self.of(n, slot)
            y[mine] += self.x[mine] @ a @ b
        return y

    def expected_backward(self, n):
        dx, dy = self.dx.astype(np.float64), self.ys[n]
        da = np.zeros((len(self.active), *self.a[n].shape[2:]))
        db = np.zeros((len(self.active), *self.b[n].shape[2:]))
        for place, slot in enumerate(self.active[: self.num_active]):
            mine, (a, b) = self.slots == slot, self.of(n, slot)
            dx[mine] += dy[mine] @ b.T @ a.T
            da[place] = self.x[mine].T @ (dy[mine] @ b.T)
            db[place] = (self.x[mine] @ a).T @ dy[mine] * self.scale[slot]
        return dx, da, db


@pytest.mark.parametrize("popularity", ["mixed", "runs", "one", "none"])
@pytest.mark.parametrize(
    ("rows", "width", "outs", "rank"),
    [(1, 20, (7, 18), 4), (16, 129, (64,), 8), (17, 33, (40, 16, 70), 16), (300, 40, (48,), 33)],
)
def test_adapters_of_rows_and_their_gradients(rng, rows, width, outs, rank, popularity):
    case = Adapters(rng, rows, width, outs, rank, popularity)
    assert_near(case.forward(), [case.expected(n) for n in range(len(outs))])
    for n in range(len(outs)):
        found = case.backward(n)
        assert_near(found, case.expected_backward(n))
        np.testing.assert_array_equal(found[0][case.slots < 0], case.dx[case.slots < 0])


@pytest.mark.parametrize("rows", [16, 200])
def test_what_is_not_finite_stays_with_its_adapter(rng, rows):
    case = Adapters(rng, rows, 30, (20,), 8, "mixed")
    clean = case.forward(), case.backward(0)
    mine = case.slots == 2
    case.x[mine], case.ys[0][mine] = np.nan, np.inf
    for stack in (case.a[0], case.b[0], case.scale):
        stack[2] = np.nan
    found = case.forward(), case.backward(0)
    np.testing.assert_array_equal(found[0][0][~mine], clean[0][0][~mine])
    np.testing.assert_array_equal(found[1][0][~mine], clean[1][0][~mine])
    others = np.flatnonzero(case.active[: case.num_active] != 2)
    for one, two in zip(found[1][1:], clean[1][1:], strict=True):
        np.testing.assert_array_equal(one[others], two[others])


def test_threads_change_no_bit_of_adapters(rng, monkeypatch):
    case, found = Adapters(rng, 150, 64, (80,), 16, "runs"), []
    for threads in (1, 2, 5):
        for module in (lora_code, llvm_compile):
            monkeypatch.setattr(module, "num_threads", lambda threads=threads: threads)
        found.append((*case.forward(), *case.backward(0)))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, two)
