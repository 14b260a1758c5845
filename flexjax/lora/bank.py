"""The adapter bank: every resident LoRA in stacked arrays, one slot each.

Rows of a step carry a slot index, so changing adapters never recompiles anything. Ranks are mixed
by zero padding to the maximum of the bank, targets and layers without an adapter are zero; each
slot has a scale of its own. The base weights are never touched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flexjax import axes
from flexjax.config import LORA_TARGETS, LoraConfig
from flexjax.model_config import ModelConfig
from flexjax.models.weights import WeightSpec, projection_axes


class AdapterBank(NamedTuple):
    """Stacked adapters.

    Attributes:
      a: By linear, [A, L, in, R].
      b: By linear, [A, L, R, out].
      scale: alpha / r (or alpha / sqrt(r)) of each slot, float32.
    """

    a: dict[str, Float[Array, "A L _in R"]]
    b: dict[str, Float[Array, "A L R _out"]]
    scale: Float[Array, "A"]


class LoraTree(NamedTuple):
    """One adapter, padded to the bank's rank, for all seven linears.

    Attributes:
      a: By linear, [L, in, R].
      b: By linear, [L, R, out].
    """

    a: dict[str, Array]
    b: dict[str, Array]


def bank_specs(config: ModelConfig, num_slots: int, max_rank: int) -> AdapterBank:
    """Returns an `AdapterBank` whose leaves are `WeightSpec`s."""
    a, b = {}, {}
    for name, (num_in, num_out) in config.projection_dims().items():
        in_axis, out_axis = projection_axes(name)
        lead = (num_slots, config.num_layers)
        lead_axes = (axes.ADAPTERS, axes.LAYERS)
        a[name] = WeightSpec((*lead, num_in, max_rank), (*lead_axes, in_axis, axes.RANK), "zeros")
        b[name] = WeightSpec((*lead, max_rank, num_out), (*lead_axes, axes.RANK, out_axis), "zeros")
    scale = WeightSpec((num_slots,), (axes.ADAPTERS,), "zeros")
    return AdapterBank(a, b, scale)  # type: ignore[arg-type]


def init_bank(config: ModelConfig, num_slots: int, max_rank: int, dtype: str) -> AdapterBank:
    """Returns a bank of zero adapters, in the dtype of the weights."""
    specs = bank_specs(config, num_slots, max_rank)
    bank = jax.tree.map(lambda spec: jnp.zeros(spec.shape, dtype), specs)
    return bank._replace(scale=jnp.zeros((num_slots,), jnp.float32))


def zero_lora(config: ModelConfig, max_rank: int) -> LoraTree:
    """Returns a float32 tree of zeros: gradients, moments, masters."""
    dims, num_layers = config.projection_dims(), config.num_layers
    return LoraTree(
        a={n: jnp.zeros((num_layers, dims[n][0], max_rank), jnp.float32) for n in LORA_TARGETS},
        b={n: jnp.zeros((num_layers, max_rank, dims[n][1]), jnp.float32) for n in LORA_TARGETS},
    )


def init_lora(config: ModelConfig, lora: LoraConfig, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Draws a new adapter as PEFT does: A uniform in +-1/sqrt(in), B zero.

    Args:
      config: Architecture of the base.
      lora: Rank, targets and layers.
      seed: Seed of A.

    Returns:
      {"q_proj": {"A": [L, in, r], "B": [L, r, out]}, ...}, float32; layers that are not adapted
      are zero.

    Raises:
      ValueError: If `layers_to_transform` names a layer that the model does not have.
    """
    layers = lora.layers_to_transform
    chosen = range(config.num_layers) if layers is None else layers
    if max(chosen) >= config.num_layers:
        raise ValueError(
            f"`layers_to_transform` must be below {config.num_layers}, the model's number of "
            f"layers; got {max(chosen)}."
        )
    arrays = {}
    dims = config.projection_dims()
    for index, name in enumerate(LORA_TARGETS):
        if name not in lora.targets:
            continue
        num_in, num_out = dims[name]
        bound = 1.0 / math.sqrt(num_in)
        a = np.zeros((config.num_layers, num_in, lora.r), np.float32)
        draws = np.random.default_rng([seed, index]).uniform(-bound, bound, a.shape)
        for layer in chosen:
            a[layer] = draws[layer]
        b = np.zeros((config.num_layers, lora.r, num_out), np.float32)
        arrays[name] = {"A": a, "B": b}
    return arrays


def pad_lora(
    config: ModelConfig, arrays: Mapping[str, Mapping[str, np.ndarray]], max_rank: int
) -> LoraTree:
    """Pads one adapter's arrays to the bank's rank and to all seven linears, float32 (numpy)."""
    dims, num_layers = config.projection_dims(), config.num_layers
    a, b = {}, {}
    for name in LORA_TARGETS:
        a[name] = np.zeros((num_layers, dims[name][0], max_rank), np.float32)
        b[name] = np.zeros((num_layers, max_rank, dims[name][1]), np.float32)
        if name in arrays:
            rank = arrays[name]["A"].shape[-1]
            a[name][:, :, :rank] = arrays[name]["A"]
            b[name][:, :rank, :] = arrays[name]["B"]
    return LoraTree(a, b)


def write_slot(
    bank: AdapterBank, slot: Int[Array, ""], tree: LoraTree, scale: Float[Array, ""]
) -> AdapterBank:
    """Stores one adapter in a slot; `bank` may be donated."""

    def put(stack: Array, value: Array) -> Array:
        return stack.at[slot].set(value.astype(stack.dtype))

    return AdapterBank(
        a={name: put(bank.a[name], tree.a[name]) for name in bank.a},
        b={name: put(bank.b[name], tree.b[name]) for name in bank.b},
        scale=bank.scale.at[slot].set(scale),
    )


def copy_slot(bank: AdapterBank, source: Int[Array, ""], target: Int[Array, ""]) -> AdapterBank:
    """Copies one slot to another on the device; `bank` may be donated."""
    return jax.tree.map(lambda stack: stack.at[target].set(stack[source]), bank)


def read_slot_layer(bank: AdapterBank, slot: Int[Array, ""], layer: Int[Array, ""]) -> LoraTree:
    """One layer of one slot, widened to float32: a [in, R], b [R, out]."""

    def take(stack: Array) -> Array:
        start = (slot, layer, 0, 0)
        sizes = (1, 1, *stack.shape[2:])
        return jax.lax.dynamic_slice(stack, start, sizes)[0, 0].astype(jnp.float32)

    return LoraTree(
        a={name: take(bank.a[name]) for name in bank.a},
        b={name: take(bank.b[name]) for name in bank.b},
    )
