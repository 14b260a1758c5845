"""The sampling head: logits of the rows to sample, and their next tokens, on the device.

Every option is an array, so no choice of options compiles anything. Work that no row asks for
(sorting for top-k and top-p, random draws, log probabilities, penalties) is skipped at run time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from flexjax.layout import (
    SAMPLE_FLOATS,
    WANTS_LOGPROBS,
    WANTS_PENALTIES,
    packed_size,
    sample_fields,
    unpack,
)
from flexjax.model_config import ModelConfig
from flexjax.models.layers import logits as head_logits
from flexjax.models.weights import DecoderWeights
from flexjax.step.state import SampleState

MAX_LOGPROBS = 20
"""Alternatives that a step returns for each row."""

_DROPPED = -jnp.inf
_BLOCK, _MIN_BLOCK = 128, 16  # of a row of logits, where its maximum is looked for


class SampleOutput(NamedTuple):
    """What the host reads of one step's sampling, by row of the head.

    Attributes:
      tokens: Sampled tokens.
      logprobs: Their log probabilities, before temperature and penalties; zero if not asked for.
      top_tokens: The likeliest tokens, best first.
      top_logprobs: Their log probabilities.
    """

    tokens: Int[Array, "B"]
    logprobs: Float[Array, "B"]
    top_tokens: Int[Array, "B 20"]
    top_logprobs: Float[Array, "B 20"]


def sample_step(
    config: ModelConfig,
    weights: DecoderWeights,
    state: SampleState,
    packed: Int[Array, "n"],
    *,
    implementation: str | None = "reference",
) -> tuple[SampleState, SampleOutput]:
    """Samples one token for each row.

    Args:
      config: Architecture; static.
      weights: Final norm and head are read.
      state: Hidden rows that the step left; donated.
      packed: The rows, as `layout.sample_fields` describes them. `slots` is -1 for padding.
      implementation: Of the head's product.

    Returns:
      The state with `next_tokens` and `output_counts` advanced, and what the host reads.
    """
    rows = unpack(packed, sample_fields(packed.shape[0] // packed_size(sample_fields(1))))
    floats = lax.bitcast_convert_type(rows["floats"], jnp.float32)
    options: dict[str, Array] = dict(zip(SAMPLE_FLOATS, floats, strict=True))
    slots = jnp.maximum(rows["slots"], 0)
    wants = jnp.where(rows["slots"] >= 0, rows["wants"], 0)
    raw = head_logits(config, weights, state.hidden[slots], implementation)
    is_penalized = (wants & WANTS_PENALTIES) != 0
    is_random = (options["temperature"] > 0) & (rows["slots"] >= 0)

    def choose(logits: Array) -> Array:
        adjusted = lax.cond(
            is_penalized.any(),
            lambda x: _penalize(x, state, slots, is_penalized, options),
            lambda x: x,
            logits,
        )
        greedy = _argmax(adjusted)
        return lax.cond(
            is_random.any(),
            lambda x: jnp.where(is_random, _draw(x, rows, options, is_random), greedy),
            lambda x: greedy,
            adjusted,
        )

    # Greedy rows only is the common case, and a branch that returns its input copies it.
    tokens = lax.cond((is_penalized | is_random).any(), choose, _argmax, raw)
    logprobs, top_tokens, top_logprobs = lax.cond(
        ((wants & WANTS_LOGPROBS) != 0).any(), _logprobs, _no_logprobs, raw, tokens
    )
    where = jnp.where(rows["slots"] >= 0, rows["slots"], state.next_tokens.shape[0])
    state = state._replace(
        next_tokens=state.next_tokens.at[where].set(tokens, mode="drop"),
        output_counts=state.output_counts.at[where, tokens].add(1, mode="drop"),
    )
    return state, SampleOutput(tokens, logprobs, top_tokens, top_logprobs)


def _argmax(values: Float[Array, "B V"]) -> Int[Array, "B"]:
    """First index of each row's maximum; plain reductions, which vectorize on a CPU.

    All values are read once, for the maximum of each block; then only blocks' maxima, and the block
    that the first of the highest belongs to. A row without any number (all NaN) gives the last
    index, not one out of range.
    """
    size = math.gcd(values.shape[1], _BLOCK)
    if size < _MIN_BLOCK:
        return _find(values, values.max(-1))
    blocks = values.reshape(values.shape[0], -1, size)
    highest = blocks.max(-1)
    target = highest.max(-1)
    place = _find(highest, target)
    block = jnp.take_along_axis(blocks, place[:, None, None], axis=1)[:, 0]
    # Where all is NaN, a maximum may be NaN or minus infinity, which XLA leaves open.
    is_found = (block == target[:, None]).any(-1)
    return jnp.where(is_found, place * size + _find(block, target), values.shape[1] - 1)


def _find(values: Float[Array, "B n"], targets: Float[Array, "B"]) -> Int[Array, "B"]:
    """First index of a value in each row; the last index where there is none."""
    last = values.shape[1] - 1
    index = jnp.where(values == targets[:, None], jnp.arange(last + 1)[None, :], last)
    return index.min(-1).astype(jnp.int32)


def _penalize(
    logits: Float[Array, "B V"],
    state: SampleState,
    slots: Int[Array, "B"],
    is_penalized: Bool[Array, "B"],
    options: dict[str, Array],
) -> Float[Array, "B V"]:
    """Repetition (over prompt and output), presence and frequency (over the output) penalties."""
    counts = state.output_counts[slots]
    seen = state.prompt_seen[slots] | (counts > 0)
    repetition = options["repetition_penalty"][:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    penalized = jnp.where(seen, repeated, logits)
    penalized -= options["frequency_penalty"][:, None] * counts
    penalized -= options["presence_penalty"][:, None] * (counts > 0)
    return jnp.where(is_penalized[:, None], penalized, logits)


def _draw(
    logits: Float[Array, "B V"],
    rows: dict[str, Array],
    options: dict[str, Array],
    is_random: Bool[Array, "B"],
) -> Int[Array, "B"]:
    """Draws from the filtered distribution by the Gumbel trick.

    The key of a draw is the request's seed and the index of the token in its output, so that a
    draw does not depend on the batch, on chunking or on preemption.
    """
    temperature = jnp.where(is_random, options["temperature"], 1.0)
    scaled = logits / temperature[:, None]
    needs_sort = is_random & ((rows["top_k"] > 0) | (options["top_p"] < 1.0))
    scaled = lax.cond(
        needs_sort.any(),
        lambda x: _keep_top(x, rows["top_k"], options["top_p"]),
        lambda x: x,
        scaled,
    )
    floor = scaled.max(-1, keepdims=True) + jnp.log(options["min_p"])[:, None]
    scaled = jnp.where(scaled < floor, _DROPPED, scaled)

    def gumbel(seed: Array, index: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed), index)
        return jax.random.gumbel(key, (logits.shape[1],))

    noise = jax.vmap(gumbel)(rows["seeds"], rows["output_index"])
    return _argmax(scaled + noise)


def _keep_top(
    scaled: Float[Array, "B V"], top_k: Int[Array, "B"], top_p: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Drops what top-k leaves out, then what top-p leaves out of the rest."""
    vocab = scaled.shape[1]
    ordered = -jnp.sort(-scaled, axis=-1)
    kept = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)
    in_top_k = jnp.arange(vocab)[None, :] < kept[:, None]
    probs = jax.nn.softmax(jnp.where(in_top_k, ordered, _DROPPED), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    in_top_p = in_top_k & (before < top_p[:, None])
    smallest = jnp.where(in_top_p, ordered, jnp.inf).min(-1, keepdims=True)
    # Rows that ask for neither keep all: the sum's rounding could cost them their tail.
    is_filtered = (top_k > 0) | (top_p < 1.0)
    return jnp.where(is_filtered[:, None] & (scaled < smallest), _DROPPED, scaled)


def _logprobs(
    logits: Float[Array, "B V"], tokens: Int[Array, "B"]
) -> tuple[Float[Array, "B"], Int[Array, "B 20"], Float[Array, "B 20"]]:
    table = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(table, tokens[:, None], axis=-1)[:, 0]
    count = min(MAX_LOGPROBS, logits.shape[1])
    values, indices = lax.top_k(table, count)
    widths = ((0, 0), (0, MAX_LOGPROBS - count))
    padded = jnp.pad(indices.astype(jnp.int32), widths, constant_values=-1)
    return chosen, padded, jnp.pad(values, widths)


def _no_logprobs(
    logits: Float[Array, "B V"], tokens: Int[Array, "B"]
) -> tuple[Float[Array, "B"], Int[Array, "B 20"], Float[Array, "B 20"]]:
    shape = (tokens.shape[0], MAX_LOGPROBS)
    return jnp.zeros(shape[:1]), jnp.full(shape, -1, jnp.int32), jnp.zeros(shape)


def reset_sequence(
    state: SampleState,
    slot: Int[Array, ""],
    prompt: Int[Array, "S"],
    output: Int[Array, "S"],
) -> SampleState:
    """Prepares a slot's token counts for a sequence that uses penalties.

    Args:
      state: Sampling state; donated.
      slot: Sequence slot.
      prompt: Prompt tokens, -1 padding.
      output: Tokens generated before a preemption, -1 padding.
    """
    vocab = state.prompt_seen.shape[1]
    out_of_range = jnp.where(prompt >= 0, prompt, vocab)
    seen = jnp.zeros((vocab,), jnp.bool_).at[out_of_range].set(True, mode="drop")
    generated = jnp.where(output >= 0, output, vocab)
    counts = jnp.zeros((vocab,), jnp.int32).at[generated].add(1, mode="drop")
    return state._replace(
        prompt_seen=state.prompt_seen.at[slot].set(seen),
        output_counts=state.output_counts.at[slot].set(counts),
    )
