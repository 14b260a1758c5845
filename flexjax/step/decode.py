"""A step that only decodes: the rows and the sampling of their next tokens, in one program.

Decoding is what an engine does most of its time, and its steps are short: the launch of a second
program, and the passing through of what only finetuning needs, would show.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int

from flexjax.autodiff.arena import Arena, KVGrads
from flexjax.cache.pages import KVPool
from flexjax.layout import Bucket, StepSizes, packed_size, step_fields
from flexjax.lora.bank import AdapterBank
from flexjax.model_config import ModelConfig
from flexjax.models.weights import DecoderWeights
from flexjax.step.co_serve import co_serve_step
from flexjax.step.sampling import SampleOutput, sample_step
from flexjax.step.state import EngineState, SampleState


def decode_step(
    config: ModelConfig,
    bucket: Bucket,
    sizes: StepSizes,
    weights: DecoderWeights,
    bank: AdapterBank,
    pool: KVPool,
    sample: SampleState,
    packed: Int[Array, "n"],
) -> tuple[KVPool, SampleState, SampleOutput]:
    """Runs `co_serve_step` on decode rows, then `sample_step` on the same rows.

    Args:
      config: Architecture; static.
      bucket: Row counts, decode rows alone; static.
      sizes: Sizes that all buckets share; static.
      weights: Frozen base.
      bank: Adapters.
      pool: Keys and values; donated.
      sample: Sampling state; donated.
      packed: The batch, as `layout.program_fields` describes it.

    Returns:
      The new pool and sampling state, and what the host reads.
    """
    end = packed_size(step_fields(bucket, sizes))
    state = EngineState(pool, _no_arena(), sample)
    state, _, _ = co_serve_step(config, bucket, sizes, weights, bank, state, None, packed[:end])
    sample, output = sample_step(
        config, weights, state.sample, packed[end:], implementation=sizes.implementation
    )
    return state.pool, sample, output


def _no_arena() -> Arena:
    """An arena for no token; decode rows have nothing in it."""
    none = jnp.zeros((0, 0, 0, 0, 0))
    return Arena({}, jnp.zeros((0, 0)), KVGrads(none, none))
