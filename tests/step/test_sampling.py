"""The sampling head against a numpy oracle of the filtered distribution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import VOCAB, tiny_config, tiny_weights

from flexjax.layout import (
    SAMPLE_FLOATS,
    WANTS_LOGPROBS,
    WANTS_PENALTIES,
    new_batch,
    sample_fields,
)
from flexjax.step.sampling import _argmax, _keep_top, reset_sequence, sample_step
from flexjax.step.state import init_sample_state

CONFIG = tiny_config("qwen3")
WEIGHTS = tiny_weights(CONFIG, seed=2)
SAMPLE = jax.jit(sample_step, static_argnums=0)
SLOTS = 3


@dataclasses.dataclass(frozen=True)
class Options:
    """One row of the head."""

    slot: int = 0
    seed: int = 0
    output_index: int = 0
    top_k: int = 0
    wants: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


@pytest.fixture(scope="module")
def state():
    rng = np.random.default_rng(4)
    hidden = rng.standard_normal((SLOTS, CONFIG.hidden_size)).astype(np.float32)
    return init_sample_state(CONFIG, SLOTS, "float32")._replace(hidden=jnp.asarray(hidden))


def run(state, rows):
    packed, fields = new_batch(sample_fields(len(rows)))
    floats = fields["floats"].view(np.float32)
    floats[:] = 0.0
    floats[1] = 1.0
    for index, row in enumerate(rows):
        if row is None:
            continue
        fields["slots"][index] = row.slot
        fields["seeds"][index] = row.seed
        for name in ("top_k", "output_index", "wants"):
            fields[name][index] = getattr(row, name)
        floats[:, index] = [getattr(row, name) for name in SAMPLE_FLOATS]
    return SAMPLE(CONFIG, WEIGHTS, state, jnp.asarray(packed))


def logits_of(state, slot=0):
    """Final norm and head, in float64."""
    x = np.float64(state.hidden[slot])
    x = x / np.sqrt((x * x).mean() + CONFIG.rms_norm_eps) * np.float64(WEIGHTS.final_norm)
    head = WEIGHTS.embed.T if WEIGHTS.lm_head is None else WEIGHTS.lm_head
    return x @ np.float64(head)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def filtered(logits, row):
    """The distribution that a row draws from, step by step as the parameters are documented."""
    scaled = logits / row.temperature
    keep = np.ones(VOCAB, bool)
    order = np.argsort(-scaled)
    if row.top_k:
        keep[order[row.top_k :]] = False
    probs = softmax(np.where(keep, scaled, -np.inf))
    total = 0.0
    for token in order:
        if total >= row.top_p:
            keep[token] = False
        total += probs[token]
    keep &= softmax(scaled) >= row.min_p * softmax(scaled).max() * (1 - 1e-9)
    return softmax(np.where(keep, scaled, -np.inf))


CASES = {
    "plain": Options(temperature=1.0),
    "cold": Options(temperature=0.3),
    "hot": Options(temperature=4.0),
    "top-k": Options(temperature=1.5, top_k=7),
    "top-k above V": Options(temperature=1.0, top_k=10_000),
    "top-p": Options(temperature=1.7, top_p=0.8),
    "tiny top-p": Options(temperature=1.0, top_p=1e-6),
    "min-p": Options(temperature=1.5, min_p=0.2),
    "all": Options(temperature=2.0, top_k=20, top_p=0.9, min_p=0.05),
}


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_filtered_distribution(state, name):
    count = 4_000
    case = CASES[name]
    rows = [dataclasses.replace(case, seed=seed, output_index=3) for seed in range(count)]
    tokens = np.asarray(run(state, rows)[1].tokens)
    probs = filtered(logits_of(state), case)
    assert set(tokens.tolist()) <= set(np.flatnonzero(probs).tolist())
    observed = np.bincount(tokens, minlength=VOCAB)
    is_common = probs * count >= 5
    expected = np.append(probs[is_common], probs[~is_common].sum()) * count
    got = np.append(observed[is_common], observed[~is_common].sum())
    has_mass = expected > 0
    chi = ((got - expected)[has_mass] ** 2 / expected[has_mass]).sum()
    freedom = max(1, has_mass.sum() - 1)
    assert chi <= freedom + 5 * np.sqrt(2 * freedom), (chi, freedom)


def test_indices_of_one_seed_draw_independently(state):
    rows = [Options(temperature=3.0, seed=7, output_index=i) for i in range(2_000)]
    tokens = np.asarray(run(state, rows)[1].tokens)
    probs = filtered(logits_of(state), rows[0])
    gap = np.abs(np.bincount(tokens, minlength=VOCAB) / 2_000 - probs).max()
    assert gap <= 4 * np.sqrt(probs.max() / 2_000)
    assert (tokens[1:] == tokens[:-1]).mean() <= 2 * (probs**2).sum() + 0.05


@pytest.mark.parametrize("limit", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_one_token_left_is_greedy(state, limit):
    rows = [Options(slot=s, temperature=5.0, seed=s * 11, **limit) for s in range(SLOTS)]
    tokens = np.asarray(run(state, rows)[1].tokens)
    assert tokens.tolist() == [int(logits_of(state, s).argmax()) for s in range(SLOTS)]


def test_a_draw_does_not_depend_on_its_neighbours(state):
    mine = [Options(slot=1, temperature=2.0, seed=s, output_index=5) for s in range(50)]
    alone = [int(run(state, [row])[1].tokens[0]) for row in mine[:10]]
    others = list(CASES.values())
    together = np.asarray(run(state, [*mine, None, *others])[1].tokens)[:50]
    quiet = np.asarray(run(state, mine)[1].tokens)
    assert together.tolist() == quiet.tolist() and alone == quiet[:10].tolist()


def test_rows_without_filters_are_not_filtered():
    """Rounding of the cumulative sum must not drop the tail of a row that asks for all tokens."""
    scaled = jnp.asarray([[20.0] + [0.0] * 9, [1.0] + [0.0] * 9])
    kept = _keep_top(scaled, jnp.asarray([0, 2]), jnp.asarray([1.0, 1.0]))
    np.testing.assert_array_equal(kept[0], scaled[0])


@pytest.mark.parametrize(
    "penalty",
    [
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.6},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.9},
        {"repetition_penalty": 1.3, "presence_penalty": -0.5, "frequency_penalty": 0.4},
    ],
)
def test_penalties(state, rng, penalty):
    prompt, output = rng.integers(0, VOCAB, 12), rng.integers(0, VOCAB, 9)
    padded = [np.append(x, np.full(5, -1)).astype(np.int32) for x in (prompt, output)]
    size = max(map(len, padded))
    padded = [jnp.asarray(np.append(x, np.full(size - len(x), -1)), jnp.int32) for x in padded]
    state = reset_sequence(state, jnp.int32(1), *padded)
    logits = logits_of(state, 1)
    counts = np.bincount(output, minlength=VOCAB)
    seen = np.isin(np.arange(VOCAB), prompt) | (counts > 0)
    factor = penalty.get("repetition_penalty", 1.0)
    expected = np.where(seen, np.where(logits > 0, logits / factor, logits * factor), logits)
    expected -= penalty.get("frequency_penalty", 0.0) * counts
    expected -= penalty.get("presence_penalty", 0.0) * (counts > 0)
    row = Options(slot=1, wants=WANTS_PENALTIES | WANTS_LOGPROBS, **penalty)
    after, out = run(state, [row, Options(slot=0), None])
    token = int(out.tokens[0])
    assert token == expected.argmax()
    assert int(out.tokens[1]) == logits_of(state, 0).argmax()
    table = np.log(softmax(logits))  # log probabilities are taken before penalties
    assert abs(float(out.logprobs[0]) - table[token]) <= 1e-5
    counts[token] += 1
    np.testing.assert_array_equal(after.output_counts[1], counts)
    draws = [dataclasses.replace(row, temperature=1.0, seed=s, wants=WANTS_PENALTIES)
             for s in range(3_000)]  # fmt: skip
    tokens = np.asarray(run(state, draws)[1].tokens)
    gap = np.abs(np.bincount(tokens, minlength=VOCAB) / 3_000 - softmax(expected)).max()
    assert gap <= 0.05


def test_logprobs(state):
    rows = [Options(slot=s, wants=WANTS_LOGPROBS, temperature=t, seed=3)
            for s in range(SLOTS) for t in (0.0, 2.5)]  # fmt: skip
    _, out = run(state, rows)
    for index, row in enumerate(rows):
        table = np.log(softmax(logits_of(state, row.slot)))
        order = np.argsort(-table)[:20]
        assert out.top_tokens[index].tolist() == order.tolist()
        np.testing.assert_allclose(out.top_logprobs[index], table[order], atol=1e-5)
        token = int(out.tokens[index])
        assert abs(float(out.logprobs[index]) - table[token]) <= 1e-5


def test_padding_rows_change_nothing(state):
    after, _ = run(state, [None, Options(slot=2, temperature=1.0), None])
    assert after.next_tokens[:2].tolist() == state.next_tokens[:2].tolist()
    assert int(after.output_counts.sum()) == 1


@pytest.mark.parametrize("vocab", [1, 7, 96, 127, 128, 130, 144, 1000, 4096])
def test_the_first_maximum_is_the_token(rng, vocab):
    values = rng.integers(0, 9, (40, vocab)).astype(np.float32)
    values[0] = -np.inf
    values[1, vocab // 2] = np.inf
    np.testing.assert_array_equal(_argmax(jnp.asarray(values)), values.argmax(-1))
    values[2] = np.nan
    assert int(_argmax(jnp.asarray(values))[2]) == vocab - 1
