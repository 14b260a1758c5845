"""Everything that a step reads and writes on the device, besides weights and adapters."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flexjax.autodiff.arena import Arena
from flexjax.cache.pages import KVPool
from flexjax.model_config import ModelConfig


class SampleState(NamedTuple):
    """Per running sequence, by sequence slot.

    Attributes:
      hidden: Last layer's output of the row to sample from.
      next_tokens: Token sampled last; the next step reads it here, so that the host need not.
      output_counts: How often each token stands in the output.
      prompt_seen: Whether each token stands in the prompt.
    """

    hidden: Float[Array, "B D"]
    next_tokens: Int[Array, "B"]
    output_counts: Int[Array, "B V"]
    prompt_seen: Bool[Array, "B V"]


class EngineState(NamedTuple):
    """The donated state of `co_serve_step`.

    Attributes:
      pool: Keys and values.
      arena: Finetuning memory.
      sample: Sampling state of running sequences.
    """

    pool: KVPool
    arena: Arena
    sample: SampleState


def init_sample_state(config: ModelConfig, num_seqs: int, dtype: str) -> SampleState:
    """Returns the sampling state of `num_seqs` idle slots."""
    return SampleState(
        hidden=jnp.zeros((num_seqs, config.hidden_size), dtype),
        next_tokens=jnp.zeros((num_seqs,), jnp.int32),
        output_counts=jnp.zeros((num_seqs, config.vocab_size), jnp.int32),
        prompt_seen=jnp.zeros((num_seqs, config.vocab_size), jnp.bool_),
    )
