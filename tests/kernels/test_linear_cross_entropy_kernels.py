"""The kernels of the loss of a linear head against the reference, and against exact gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import linear_cross_entropy
from pallas_kernels._platform import interpreted
from pallas_kernels._tiles import Tile
from pallas_kernels.linear_cross_entropy import pallas_triton
from pallas_kernels.linear_cross_entropy.cases import CASES

INTERPRETED = [case for case in CASES if "interpret" in case.tags]


def assert_near(found, expected, tolerance):
    for result, wanted in zip(found, expected, strict=True):
        assert result.shape == wanted.shape and result.dtype == wanted.dtype == jnp.float32
        result, wanted = np.asarray(result), np.asarray(wanted)
        np.testing.assert_allclose(result, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def kernels(config=None, transposed_head=False):
    def call(*arguments):
        options = {"config": config, "transposed_head": transposed_head}
        with interpreted():
            return pallas_triton.linear_cross_entropy(*arguments, **options)

    return jax.jit(call)


def draw(rng, rows, dim, vocab, dtype=jnp.float32):
    hidden = jnp.asarray(rng.standard_normal((rows, dim)), dtype)
    head = jnp.asarray(rng.standard_normal((dim, vocab)), dtype)
    targets = rng.integers(0, vocab, rows)
    targets[::4] = -1
    return hidden, head, jnp.asarray(targets, jnp.int32)


@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_kernels_match_reference(case, rng):
    arguments = case.arrays(rng)
    expected = jax.jit(case.function("reference"))(*arguments)
    with interpreted():
        found = jax.jit(case.function("pallas_triton"))(*arguments)
    assert_near(found, expected, case.tolerance)
    assert not np.asarray(found[1])[arguments[2] < 0].any()


@pytest.mark.parametrize("transposed_head", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(pallas_triton.Config(64, Tile(16, 32, 16), Tile(16, 16, 16)), id="4-and-rest"),
        pytest.param(pallas_triton.Config(96, Tile(16, 32, 16), Tile(16, 16, 32, 2)), id="splits"),
        pytest.param(pallas_triton.Config(64, Tile(16, 64, 16), Tile(16, 16, 16, 8)), id="empty"),
    ],
)
def test_chunks_and_splits_of_the_vocabulary(rng, config, transposed_head):
    hidden, head, targets = draw(rng, 21, 24, 288 if config.chunk == 96 else 290)
    expected = linear_cross_entropy(hidden, head, targets, implementation="reference")
    head = head.T if transposed_head else head
    assert_near(kernels(config, transposed_head)(hidden, head, targets), expected, 1e-5)


def test_reference_of_a_transposed_head(rng):
    hidden, head, targets = draw(rng, 21, 24, 290)
    options = {"implementation": "reference"}
    expected = linear_cross_entropy(hidden, head, targets, **options)
    found = linear_cross_entropy(hidden, head.T, targets, transposed_head=True, **options)
    assert_near(found, expected, 1e-6)


def test_largest_logits_in_the_last_chunk_or_the_first(rng):
    """The running maximum rises by hundreds, or is there from the beginning."""
    config = pallas_triton.Config(32, Tile(16, 16, 16), Tile(16, 16, 16))
    hidden, head, targets = draw(rng, 16, 16, 160)
    ramp = jnp.linspace(0.0, 60.0, 160)[None, :]
    for factor in (ramp, ramp[:, ::-1]):
        expected = linear_cross_entropy(hidden, head * factor, targets, implementation="reference")
        assert_near(kernels(config)(hidden, head * factor, targets), expected, 1e-5)


def test_a_token_that_is_predicted_well_keeps_its_gradient(rng):
    """1 - p is 1e-5: the gradient is right relative to itself, although the operands are bf16."""
    hidden, head, _ = draw(rng, 4, 32, 64, jnp.bfloat16)
    exact_logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    targets = exact_logits.argmax(1)
    best = np.asarray(head, np.float64)[:, targets].T
    hidden = jnp.asarray(np.asarray(hidden, np.float64) + 0.4 * best, jnp.bfloat16)
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    missing = 1 - probs[np.arange(4), targets]
    assert (logits.argmax(1) == targets).all() and (missing < 0.05).all() and missing.min() < 1e-4
    d_logits = probs.copy()
    d_logits[np.arange(4), targets] = 0.0
    d_logits[np.arange(4), targets] = -d_logits.sum(1)
    expected = d_logits @ np.asarray(head, np.float64).T
    _, found = kernels()(hidden, head, jnp.asarray(targets, jnp.int32))
    error = np.linalg.norm(np.asarray(found) - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() < 1e-2


def test_a_vocabulary_of_one_token(rng):
    hidden, head, _ = draw(rng, 3, 8, 1)
    loss, d_hidden = kernels()(hidden, head, jnp.zeros((3,), jnp.int32))
    assert float(loss) == 0.0 and not np.asarray(d_hidden).any()


@pytest.mark.parametrize("rows", [1, 64, 512, 2048])
@pytest.mark.parametrize("vocab", [13, 32000, 50257, 128256, 151936, 152064])
def test_chunks_cover_the_vocabulary_and_stay_small(rows, vocab):
    config = pallas_triton.choose_config(rows, 4096, vocab, jnp.bfloat16)
    assert rows * config.chunk <= 8 * 2**20 + rows * config.logits.block_n
    num_chunks = -(-vocab // config.chunk)
    assert num_chunks * config.chunk < vocab + num_chunks * config.logits.block_n


def test_a_record_of_the_table_is_a_config():
    config = pallas_triton.choose_config(512, 4096, 128256, jnp.bfloat16)
    assert pallas_triton.config_of_record(pallas_triton.record_of_config(config)) == config


def test_bad_input(rng):
    hidden, head, targets = draw(rng, 4, 6, 9)
    with pytest.raises(ValueError, match=r"`lm_head` must be \[D, V\] with D = 6; got D = 9"):
        linear_cross_entropy(hidden, head.T, targets)
    with pytest.raises(ValueError, match=r"`lm_head` must be \[V, D\] with D = 6; got D = 9"):
        linear_cross_entropy(hidden, head, targets, transposed_head=True)
    with pytest.raises(NotImplementedError, match="needs compute capability 8.0"):
        linear_cross_entropy(hidden, head, targets, implementation="pallas_triton")
    with interpreted(), pytest.raises(NotImplementedError, match="got bfloat16, float32"):
        hidden = hidden.astype(jnp.bfloat16)
        linear_cross_entropy(hidden, head, targets, implementation="pallas_triton")
