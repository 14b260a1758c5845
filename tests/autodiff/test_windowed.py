"""The windowed backward pass against jax.grad of whole sequences, for random splits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    FAMILIES,
    GRADIENT_TOLERANCE,
    VOCAB,
    Row,
    tiny_config,
    tiny_weights,
    whole_sequence_gradients,
    worst_gradient_error,
)

from flexjax.autodiff import windowed_value_and_grad
from flexjax.config import LORA_TARGETS, LoraConfig
from flexjax.models.decoder import Decoder

ORDERS = ("window_major", "layer_major")
POLICIES = ("inputs", "full")
_seen: list[float] = []

# Each window is compiled by itself: most of the time of these tests is LLVM's.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module", autouse=True)
def report(request):
    yield
    if _seen:
        capture = request.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print(f"\nwindowed: max relative gradient error {max(_seen):.2e} of {len(_seen)}")


def draw_mixed_lora(rng, config, names):
    """An adapter whose rank differs between linears."""
    dims, arrays = config.projection_dims(), {}
    for name in names:
        rank = int(rng.integers(1, 6))
        num_in, num_out = dims[name]
        arrays[name] = {
            "A": 0.2
            * jnp.asarray(rng.standard_normal((config.num_layers, num_in, rank)), "float32"),
            "B": 0.2
            * jnp.asarray(rng.standard_normal((config.num_layers, rank, num_out)), "float32"),
        }
    return arrays


def draw_split(rng, total):
    sizes = []
    while sum(sizes) < total:
        sizes.append(int(min(rng.choice([5, 11, 19, 31]), total - sum(sizes))))
    return tuple(sizes)


def draw_batch(rng, num_seqs, length):
    tokens = rng.integers(0, VOCAB, (num_seqs, length))
    targets = np.full_like(tokens, -1)
    targets[:, :-1] = np.where(rng.random((num_seqs, length - 1)) < 0.8, tokens[:, 1:], -1)
    return tokens, targets


def check(config, weights, lora, scale, tokens, targets, **options):
    run = functools.partial(windowed_value_and_grad, (config, weights), **options)
    step = fast_jit(lambda lora, t, y: run(lora, t, y, lora_scale=scale))
    loss, grads = step(lora, jnp.asarray(tokens), jnp.asarray(targets))
    rows = [Row({}, t, y) for t, y in zip(*map(np.atleast_2d, (tokens, targets)), strict=True)]
    expected_loss, expected = whole_sequence_gradients(config, weights, lora, scale, rows)
    error = worst_gradient_error(grads, expected)
    _seen.append(error)
    assert abs(float(loss) - expected_loss) <= 1e-5 * abs(expected_loss)
    assert error <= GRADIENT_TOLERANCE, error
    return grads


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_match_jax_grad(rng, family, order):
    is_even = FAMILIES.index(family) % 2 == ORDERS.index(order)  # each family, both policies
    policy = POLICIES[is_even]
    config = tiny_config(family)
    weights = tiny_weights(config, seed=int(rng.integers(100)))
    count = int(rng.integers(1, 8))
    names = [str(n) for n in rng.choice(LORA_TARGETS, count, replace=False)]
    num_seqs, length = int(rng.integers(2, 4)), int(rng.integers(17, 26))
    tokens, targets = draw_batch(rng, num_seqs, length)
    split = draw_split(rng, num_seqs * length)
    lora = draw_mixed_lora(rng, config, names)
    options = {"window": split, "tile_order": order, "saved_activations": policy}
    check(config, weights, lora, float(rng.uniform(0.5, 3)), tokens, targets, **options)


@pytest.mark.parametrize(("split", "length"), [(1, 4), (1000, 48), ((7, 1, 33, 7), 48)])
def test_any_split_of_one_sequence(rng, split, length):
    config = tiny_config("qwen3", num_layers=2)
    tokens, targets = draw_batch(rng, 1, length)
    lora = draw_mixed_lora(rng, config, LORA_TARGETS)
    check(config, tiny_weights(config), lora, 2.0, tokens[0], targets[0], window=split)


@pytest.mark.parametrize("order", ORDERS)
def test_mean_and_module_and_zero_b(rng, order):
    """A fresh adapter (B zero) gets gradients at B only, divided by the targets."""
    config = tiny_config("mistral")
    weights = tiny_weights(config)
    lora = draw_mixed_lora(rng, config, ("q_proj", "down_proj"))
    lora = {name: {"A": pair["A"], "B": 0 * pair["B"]} for name, pair in lora.items()}
    tokens, targets = draw_batch(rng, 2, 19)
    summed = check(config, weights, lora, 1.5, tokens, targets, window=23, tile_order=order)
    assert not any(np.asarray(pair["A"]).any() for pair in summed.values())
    args = (lora, jnp.asarray(tokens), jnp.asarray(targets))
    options = {"window": 23, "lora_scale": 1.5, "tile_order": order, "reduction": "mean"}
    decoder = Decoder(config, weights)
    run = fast_jit(lambda *args: windowed_value_and_grad(decoder, *args, **options))
    _, mean = run(*args)
    count = int((targets >= 0).sum())
    scaled = {n: {m: np.asarray(g) * count for m, g in pair.items()} for n, pair in mean.items()}
    assert worst_gradient_error(scaled, summed) <= 1e-6


def test_no_target_gives_zero(rng):
    config = tiny_config()
    lora = draw_mixed_lora(rng, config, ("v_proj",))
    tokens = jnp.asarray(draw_batch(rng, 2, 9)[0])
    targets = jnp.full_like(tokens, -1)
    model = (config, tiny_weights(config))
    options = {"window": 10, "reduction": "mean"}
    run = fast_jit(lambda *args: windowed_value_and_grad(model, *args, **options))
    loss, grads = run(lora, tokens, targets)
    assert float(loss) == 0 and not any(np.asarray(g).any() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "`window` must be positive; got 0"),
        ({"window": -3}, "`window` must be positive"),
        ({"window": (5, 5)}, "must be positive and add up to 18; got"),
        ({"window": (18, 0)}, "must be positive and add up to 18"),
        ({"window": ()}, "must be positive and add up to 18"),
        ({"window": (20, -2)}, "must be positive and add up to 18"),
        ({"window": 4, "tile_order": "sideways"}, "`tile_order` must be"),
        ({"window": 4, "saved_activations": "none"}, "must be 'inputs' or 'full'"),
        ({"window": 4, "reduction": "max"}, "`reduction` must be"),
    ],
)
def test_bad_options_are_refused(rng, options, message):
    config = tiny_config()
    lora = draw_mixed_lora(rng, config, ("q_proj",))
    tokens = jnp.zeros((2, 9), jnp.int32)
    with pytest.raises(ValueError, match=message):
        windowed_value_and_grad((config, tiny_weights(config)), lora, tokens, tokens, **options)


def test_bad_arrays_are_refused(rng):
    config = tiny_config()
    model = (config, tiny_weights(config))
    tokens = jnp.zeros((2, 9), jnp.int32)
    lora = draw_mixed_lora(rng, config, ("q_proj",))
    with pytest.raises(ValueError, match=r"`targets` must have shape \(2, 9\); got \(2, 8\)"):
        run = getattr(windowed_value_and_grad, "__wrapped__", windowed_value_and_grad)
        run(model, lora, tokens, tokens[:, :8], window=4)
    with pytest.raises(ValueError, match="`lora` must name linears"):
        windowed_value_and_grad(model, {"lm_head": lora["q_proj"]}, tokens, tokens, window=4)


def test_single_config_lora_is_padded_like_the_bank():
    """A guard for the helpers: LoraConfig's targets and draw order agree."""
    assert LoraConfig(target_modules="all-linear").targets == LORA_TARGETS
