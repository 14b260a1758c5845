"""The loss of a linear head against jax's own, value and gradient."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import linear_cross_entropy

_needs_llvmlite = pytest.mark.skipif(
    importlib.util.find_spec("llvmlite") is None, reason="needs llvmlite"
)
every_implementation = pytest.mark.parametrize(
    "implementation", ["reference", pytest.param("llvm", marks=_needs_llvmlite)]
)
either_head = pytest.mark.parametrize("transposed_head", [False, True])


def dense_loss(hidden, head, targets):
    table = jax.nn.log_softmax(hidden @ head, axis=-1)
    picked = jnp.take_along_axis(table, jnp.maximum(targets, 0)[:, None], axis=-1)[:, 0]
    return -jnp.where(targets >= 0, picked, 0.0).sum()


def exact(hidden, head, targets):
    """Loss and gradient in float64."""
    logits = hidden.astype(np.float64) @ head.astype(np.float64)
    exps = np.exp(logits - logits.max(-1, keepdims=True))
    total, counted = exps.sum(-1), targets >= 0
    picked = logits[np.arange(len(targets)), np.maximum(targets, 0)]
    losses = logits.max(-1) + np.log(total) - picked
    d_logits = exps / total[:, None]
    d_logits[counted, targets[counted]] -= 1
    d_logits[~counted] = 0
    return losses[counted].sum(), d_logits @ head.T.astype(np.float64)


def make_case(rng, rows, dim, vocab, size=1.0, ignored=0.3):
    hidden = (size * rng.standard_normal((rows, dim))).astype(np.float32)
    head = rng.standard_normal((dim, vocab)).astype(np.float32)
    targets = rng.integers(0, vocab, rows).astype(np.int32)
    targets[rng.random(rows) < ignored] = -1
    return hidden, head, targets


def run(implementation, hidden, head, targets, transposed_head=False):
    head = jnp.asarray(head.T if transposed_head else head)
    options = {"transposed_head": transposed_head, "implementation": implementation}
    function = jax.jit(functools.partial(linear_cross_entropy, **options))
    return jax.device_get(function(jnp.asarray(hidden), head, jnp.asarray(targets)))


@pytest.mark.parametrize(
    ("rows", "dim", "vocab"),
    [(1, 5, 13), (7, 12, 61), (37, 12, 61), (65, 100, 1000), (300, 8, 33), (513, 12, 33)],
)
@pytest.mark.parametrize("size", [0.3, 60.0])
@either_head
@every_implementation
def test_matches_jax(rng, rows, dim, vocab, size, transposed_head, implementation):
    hidden, head, targets = make_case(rng, rows, dim, vocab, size)
    loss, d_hidden = run(implementation, hidden, head, targets, transposed_head)
    expected, d_expected = jax.value_and_grad(dense_loss)(hidden, head, targets)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
    norm = np.linalg.norm(d_expected)
    assert np.linalg.norm(d_hidden - d_expected) <= 1e-5 * norm + 1e-6
    assert not np.asarray(d_hidden)[np.asarray(targets) < 0].any()


@pytest.mark.parametrize(("rows", "dim", "vocab"), [(33, 600, 4001), (18, 5, 2), (5, 1, 700)])
@either_head
@every_implementation
def test_matches_float64(rng, rows, dim, vocab, transposed_head, implementation):
    hidden, head, targets = make_case(rng, rows, dim, vocab, dim**-0.5, ignored=0.0)
    loss, d_hidden = run(implementation, hidden, head, targets, transposed_head)
    expected, d_expected = exact(hidden, head, targets)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert np.linalg.norm(d_hidden - d_expected) <= 2e-6 * np.linalg.norm(d_expected)


@every_implementation
def test_large_logits(rng, implementation):
    hidden, head, targets = make_case(rng, 40, 12, 61, 3e3)
    loss, d_hidden = run(implementation, hidden, head, targets)
    expected, d_expected = exact(hidden, head, targets)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    # Logits of 1e4 are rounded to 1e-3, which is the relative error of an exponential.
    assert np.linalg.norm(d_hidden - d_expected) <= 1e-3 * np.linalg.norm(d_expected)


@every_implementation
def test_nearly_certain_targets(rng, implementation):
    """The gradient is what is left of the other tokens' probabilities."""
    hidden, head, _ = make_case(rng, 20, 12, 61)
    targets = (hidden @ head).argmax(-1).astype(np.int32)
    loss, d_hidden = run(implementation, 8 * hidden, head, targets)
    expected, d_expected = exact(8 * hidden, head, targets)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-5)
    assert np.linalg.norm(d_hidden - d_expected) <= 1e-5 * np.linalg.norm(d_expected) + 1e-6


@pytest.mark.parametrize("rows", [1, 4, 600])
@either_head
@every_implementation
def test_no_target_is_zero(rng, rows, transposed_head, implementation):
    hidden, head, targets = make_case(rng, rows, 6, 9, ignored=1.1)
    loss, d_hidden = run(implementation, hidden, head, targets, transposed_head)
    assert float(loss) == 0.0 and not np.asarray(d_hidden).any()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@every_implementation
def test_rows_without_target_may_hold_anything(rng, poison, implementation):
    hidden, head, targets = make_case(rng, 65, 12, 61)
    loss, d_hidden = run(implementation, hidden, head, targets)
    hidden[targets < 0] = poison
    poisoned_loss, d_poisoned = run(implementation, hidden, head, targets)
    assert poisoned_loss == loss
    np.testing.assert_array_equal(d_poisoned, d_hidden)


@every_implementation
def test_nan_in_a_counted_row_shows(rng, implementation):
    hidden, head, targets = make_case(rng, 20, 12, 61)
    _, d_clean = run(implementation, hidden, head, targets)
    row = np.flatnonzero(targets >= 0)[3]
    hidden[row, 5] = np.nan
    loss, d_hidden = run(implementation, hidden, head, targets)
    assert np.isnan(loss) and np.isnan(d_hidden[row]).all()
    others = np.arange(20) != row
    np.testing.assert_array_equal(d_hidden[others], d_clean[others])


@_needs_llvmlite
@pytest.mark.parametrize(("rows", "vocab"), [(70, 3000), (1030, 40)])
def test_threads_do_not_matter(rng, monkeypatch, rows, vocab):
    from pallas_kernels._llvm import compile as llvm_compile

    case = make_case(rng, rows, 20, vocab)
    register, found = llvm_compile._register, []
    for count in (1, 2, 5):
        monkeypatch.setattr(llvm_compile, "num_threads", lambda count=count: count)
        monkeypatch.setattr(
            llvm_compile,
            "_register",
            lambda name, key, body, count=count: register(name, ((count, key[0]), *key[1:]), body),
        )
        found.append(run("llvm", *case))
    for loss, d_hidden in found[1:]:
        assert loss == found[0][0]
        np.testing.assert_array_equal(d_hidden, found[0][1])


@_needs_llvmlite
def test_llvm_takes_float32_only(rng):
    hidden, head, targets = make_case(rng, 4, 6, 9)
    hidden = jnp.asarray(hidden, jnp.bfloat16)
    head, targets = jnp.asarray(head, jnp.bfloat16), jnp.asarray(targets)
    with pytest.raises(NotImplementedError, match="float32"):
        linear_cross_entropy(hidden, head, targets, implementation="llvm")
    loss, _ = linear_cross_entropy(hidden, head, targets)
    assert np.isfinite(loss)
