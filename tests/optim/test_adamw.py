"""One optimizer step: what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_config

from flexjax.lora.bank import init_bank, zero_lora
from flexjax.optim.adamw import Hyper, init_optimizer, optimizer_step
from flexjax.optim.sums import zero_sums

CONFIG = tiny_config("llama", num_layers=1)
RANK = 2


def step(weight, gradient, rate):
    """A step of an adapter whose weights all have one value, from gradients of one value."""
    master = jax.tree.map(lambda x: jnp.full_like(x, weight), zero_lora(CONFIG, RANK))
    sums = jax.tree.map(lambda x: jnp.full_like(x, gradient), zero_sums(CONFIG, RANK))
    hyper = Hyper(rate, 0.0, 0.9, 0.999, 1e-8, float("inf"), 1).packed()
    bank = init_bank(CONFIG, 1, RANK, "float32")
    return optimizer_step(init_optimizer(master), sums, bank, jnp.int32(0), jnp.asarray(hyper))


def test_a_step_moves_every_weight_by_the_rate():
    state, sums, bank, stats = step(1.0, 0.5, 0.25)
    assert bool(stats.is_finite)
    for leaf in jax.tree.leaves((state.master, bank.a, bank.b)):
        np.testing.assert_allclose(leaf, 0.75, rtol=1e-6)
    assert not any(leaf.any() for leaf in jax.tree.leaves(sums))


@pytest.mark.parametrize(
    ("weight", "gradient", "rate"),
    [(1.0, np.nan, 0.1), (1.0, np.inf, 0.1), (3e38, -1.0, 3e38)],
    ids=["gradient nan", "gradient inf", "weights overflow"],
)
def test_what_is_not_finite_changes_nothing(weight, gradient, rate):
    state, sums, bank, stats = step(weight, gradient, rate)
    assert not bool(stats.is_finite)
    assert int(state.adam.count) == 0
    for leaf in jax.tree.leaves(state.master):
        np.testing.assert_array_equal(leaf, np.float32(weight))
    for leaf in jax.tree.leaves((state.adam.mu, state.adam.nu, sums)):
        assert not leaf.any()
