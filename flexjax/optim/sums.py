"""What backward tiles add up until a batch is complete."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from flexjax.lora.bank import LoraTree, zero_lora
from flexjax.model_config import ModelConfig


class GradSums(NamedTuple):
    """Sums over the rows of the tiles so far.

    Attributes:
      lora: Gradient of the summed loss, float32, padded to the bank's rank.
      loss: Summed token loss, nats.
    """

    lora: LoraTree
    loss: Float[Array, ""]


def zero_sums(config: ModelConfig, max_rank: int) -> GradSums:
    """Returns sums of nothing."""
    return GradSums(zero_lora(config, max_rank), jnp.zeros((), jnp.float32))
