"""One optimizer step of one adapter: exact means over targets, clipping, AdamW, new weights.

Gradients arrive as sums over tokens; they are divided once, here, by the number of target tokens,
so that accumulation over windows, sequences and micro-batches is exact. Master weights and moments
are float32 and belong to the job; the bank's slot gets a copy in the bank's dtype. Every
hyper-parameter is an array, so that jobs share one compiled program.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from flexjax.lora.bank import AdapterBank, LoraTree, write_slot
from flexjax.optim.sums import GradSums


class Hyper(NamedTuple):
    """Hyper-parameters of one step, on the host.

    Attributes:
      learning_rate: Of this step, after the schedule.
      weight_decay: Decoupled.
      beta1: Decay of the first moment.
      beta2: Decay of the second moment.
      eps: Added to the root of the second moment.
      max_grad_norm: Global norm to clip to; infinity for none.
      num_targets: Target tokens that the sums run over.
    """

    learning_rate: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    max_grad_norm: float
    num_targets: int

    def packed(self) -> np.ndarray:
        """The values in order, float32, as `optimizer_step` takes them."""
        return np.asarray(self, np.float32)


class OptimizerState(NamedTuple):
    """What a job trains.

    Attributes:
      master: Weights, float32, padded to the bank's rank.
      adam: Moments and step count.
    """

    master: LoraTree
    adam: optax.ScaleByAdamState


class StepStats(NamedTuple):
    """What the host reads of one optimizer step.

    Attributes:
      loss: Mean loss per target token, nats.
      grad_norm: Global norm of the mean gradient, before clipping.
      is_finite: Whether the step was taken; otherwise nothing changed.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    is_finite: Bool[Array, ""]


def init_optimizer(master: LoraTree) -> OptimizerState:
    """Returns the state before the first step."""
    state = optax.scale_by_adam().init(master)
    assert isinstance(state, optax.ScaleByAdamState)
    return OptimizerState(master, state)


def add_sums(total: GradSums, part: GradSums) -> tuple[GradSums, GradSums]:
    """Adds one micro-batch's sums to the batch's; returns both, the part set to zero."""
    added = jax.tree.map(jnp.add, total, part)
    return added, jax.tree.map(jnp.zeros_like, part)


def optimizer_step(
    state: OptimizerState,
    total: GradSums,
    bank: AdapterBank,
    slot: Int[Array, ""],
    hyper: Float[Array, "7"],
) -> tuple[OptimizerState, GradSums, AdapterBank, StepStats]:
    """Takes one AdamW step and writes the new weights to the job's slot.

    p -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay p), with gradients
    divided by the number of targets and clipped to the global norm.

    Args:
      state: Master weights and moments; donated.
      total: Summed gradients and loss of the batch; donated.
      bank: Adapters; donated.
      slot: The job's working slot.
      hyper: `Hyper.packed()`.

    Returns:
      The new state, zero sums, the bank, and what the host reads. If the loss, a gradient or a new
      weight is not finite, state and bank are returned unchanged, so that a diverging job never
      reaches the weights that rows of the step read.
    """
    rate, weight_decay, beta1, beta2, eps, max_norm, num_targets = hyper
    grads = jax.tree.map(lambda g: g / num_targets, total.lora)
    loss = total.loss / num_targets
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
    factor = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    grads = jax.tree.map(lambda g: g * factor, grads)
    adam = optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps)  # type: ignore[arg-type]
    updates, moments = adam.update(grads, state.adam)  # type: ignore[arg-type]

    def apply(p: Array, u: Array) -> Array:
        return p - rate * (u + weight_decay * p)

    master = jax.tree.map(apply, state.master, updates)
    is_finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    for weight in jax.tree.leaves(master):
        is_finite &= jnp.isfinite(weight).all()

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(is_finite, new, old)

    taken = jax.tree.map(choose, OptimizerState(master, moments), state)  # type: ignore[arg-type]
    bank = write_slot(bank, slot, taken.master, bank.scale[slot])
    stats = StepStats(loss, norm, is_finite)
    return taken, jax.tree.map(jnp.zeros_like, total), bank, stats
