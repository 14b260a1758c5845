"""The loss of a window and its gradient at the last layer's output."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float, Int

from flexjax.autodiff.arena import INPUT, Arena, drop_padding, recall
from flexjax.model_config import ModelConfig
from flexjax.models.weights import DecoderWeights
from pallas_kernels import cpu_implementation, linear_cross_entropy, rms_norm


def loss_head(
    config: ModelConfig,
    weights: DecoderWeights,
    arena: Arena,
    slots: Int[Array, "W"],
    targets: Int[Array, "W"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, ""], Arena]:
    """Sums the token losses of a window and leaves their gradient in the arena.

    The loss is a sum, in nats, so that it adds up over windows and sequences; division by the
    number of targets happens once, at the optimizer step.

    Args:
      config: Architecture.
      weights: Its weights; only the final norm and the head are read.
      arena: Holds the last layer's output of these rows; may be donated.
      slots: Arena token slot of each row, -1 padding.
      targets: Token that each row must predict, -1 where none counts.
      implementation: Of `linear_cross_entropy`, and of what stands beside it.

    Returns:
      The summed loss, float32, and the arena with `d_hidden` of the rows set.
    """
    outputs = {INPUT: arena.kept[INPUT]}
    hidden = recall(outputs, config.num_layers, slots, implementation)[INPUT]

    def norm(x: Array) -> Array:
        options: dict[str, Any] = {"implementation": cpu_implementation(implementation)}
        return rms_norm(x, weights.final_norm, config.rms_norm_eps, **options)

    normalized, norm_vjp = jax.vjp(norm, hidden)
    head = weights.embed if weights.lm_head is None else weights.lm_head
    loss, d_normalized = linear_cross_entropy(
        normalized,
        head,
        targets,
        transposed_head=weights.lm_head is None,
        implementation=implementation,
    )
    (d_hidden,) = norm_vjp(d_normalized.astype(normalized.dtype))
    where = drop_padding(slots, arena.d_hidden.shape[0])
    stored = arena.d_hidden.at[where].set(d_hidden.astype(arena.d_hidden.dtype), mode="drop")
    return loss, arena._replace(d_hidden=stored)
