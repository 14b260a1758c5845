"""The loss of a linear head against jax's own, value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import linear_cross_entropy


def dense_loss(hidden, head, targets):
    table = jax.nn.log_softmax(hidden @ head, axis=-1)
    picked = jnp.take_along_axis(table, jnp.maximum(targets, 0)[:, None], axis=-1)[:, 0]
    return -jnp.where(targets >= 0, picked, 0.0).sum()


@pytest.mark.parametrize(("rows", "dim", "vocab"), [(1, 5, 13), (37, 12, 61), (300, 8, 33)])
@pytest.mark.parametrize("size", [0.3, 60.0])
def test_matches_jax(rng, rows, dim, vocab, size):
    hidden = jnp.asarray(size * rng.standard_normal((rows, dim)), jnp.float32)
    head = jnp.asarray(rng.standard_normal((dim, vocab)), jnp.float32)
    targets = rng.integers(0, vocab, rows)
    targets[rng.random(rows) < 0.3] = -1
    targets = jnp.asarray(targets, jnp.int32)
    loss, d_hidden = linear_cross_entropy(hidden, head, targets)
    expected, d_expected = jax.value_and_grad(dense_loss)(hidden, head, targets)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
    norm = np.linalg.norm(d_expected)
    assert np.linalg.norm(d_hidden - d_expected) <= 1e-5 * norm + 1e-6
    assert not np.asarray(d_hidden)[np.asarray(targets) < 0].any()


def test_no_target_is_zero(rng):
    hidden = jnp.asarray(rng.standard_normal((4, 6)), jnp.float32)
    head = jnp.asarray(rng.standard_normal((6, 9)), jnp.float32)
    loss, d_hidden = linear_cross_entropy(hidden, head, jnp.full((4,), -1, jnp.int32))
    assert float(loss) == 0.0 and not np.asarray(d_hidden).any()
