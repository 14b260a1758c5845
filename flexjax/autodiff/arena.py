"""What token-level finetuning holds on the device between forward and backward.

The arena is sized once, at start. Finetuning tokens have slots in it, in pages like those of the KV
pool but of their own: a sequence needs KV pages as every request does, and arena pages beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flexjax.autodiff.kept import kept_names
from flexjax.model_config import ModelConfig
from pallas_kernels import cpu_implementation, load_rows, store_rows

INPUT = "x"
"""Name of a layer's input among the kept arrays; entry L is the last layer's output."""


class KVGrads(NamedTuple):
    """Gradients of keys and values, summed over the windows that have been backpropagated.

    Attributes:
      k: Float32, paged by arena page; zero unless a sequence's backward is under way.
      v: The same for values.
    """

    k: Float[Array, "l p Z K H"]
    v: Float[Array, "l p Z K H"]


class Arena(NamedTuple):
    """Device memory of finetuning tokens.

    Attributes:
      kept: What the forward pass keeps, by name: [L, S, dim] (`INPUT`: [L + 1, S, D]; log-sum-exp
        float32, the rest in the activations' dtype), S being all token slots.
      d_hidden: Gradient at the input of the layer that a window's backward has come down to.
      kv_grads: Accumulators of the attention backward.
    """

    kept: dict[str, Float[Array, "_l S _dim"]]
    d_hidden: Float[Array, "S D"]
    kv_grads: KVGrads


def kept_dim(config: ModelConfig, name: str) -> int:
    """Features of one kept value of one token."""
    if name == INPUT:
        return config.hidden_size
    if name == "lse":
        return config.num_heads
    if name == "attn":
        return config.num_heads * config.head_dim
    return config.projection_dims()[name][1]


def init_arena(
    config: ModelConfig,
    *,
    num_pages: int,
    page_size: int,
    dtype: str,
    policy: str,
    acc_layers: int,
) -> Arena:
    """Returns an arena of zeros.

    Args:
      config: Architecture.
      num_pages: Arena pages.
      page_size: Tokens a page.
      dtype: Dtype of activations.
      policy: "inputs" or "full"; see `flexjax.autodiff.kept`.
      acc_layers: Layers whose key and value gradients are held at once: all of them for
        window-major tiles, those of one tile for layer-major ones.
    """
    num_slots = num_pages * page_size
    kept = {}
    for name in (INPUT, *kept_names(config, policy)):
        layers = config.num_layers + (name == INPUT)
        kind = jnp.float32 if name == "lse" else dtype
        kept[name] = jnp.zeros((layers, num_slots, kept_dim(config, name)), kind)
    shape = (acc_layers, num_pages, page_size, config.num_kv_heads, config.head_dim)
    return Arena(
        kept=kept,
        d_hidden=jnp.zeros((num_slots, config.hidden_size), jnp.float32),
        kv_grads=KVGrads(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32)),
    )


def drop_padding(slots: Int[Array, "T"], size: int) -> Int[Array, "T"]:
    """Sends -1 out of range, so that `mode="drop"` drops it instead of wrapping around."""
    return jnp.where(slots >= 0, slots, size)


def keep(
    kept: dict[str, Array],
    layer: Int[Array, ""] | int,
    slots: Int[Array, "T"],
    values: Mapping[str, Array],
    implementation: str | None = "reference",
) -> dict[str, Array]:
    """Stores rows of one layer at token slots; -1 is dropped, names that are not kept ignored."""
    names = [name for name in kept if name in values]
    stacks = [kept[name] for name in names]
    rows = [
        values[name].reshape(slots.shape[0], -1).astype(stack.dtype)
        for name, stack in zip(names, stacks, strict=True)
    ]
    layer = jnp.asarray(layer, jnp.int32)
    implementation = cpu_implementation(implementation)
    options: dict[str, Any] = {"is_read_soon": False, "implementation": implementation}
    return kept | dict(zip(names, store_rows(stacks, rows, layer, slots, **options), strict=True))


def recall(
    kept: Mapping[str, Array],
    layer: Int[Array, ""] | int,
    slots: Int[Array, "T"],
    implementation: str | None = "reference",
) -> dict[str, Array]:
    """Reads rows of one layer at token slots; padding rows (-1) are zero."""
    layer = jnp.asarray(layer, jnp.int32)
    implementation = cpu_implementation(implementation)
    rows = load_rows(list(kept.values()), layer, slots, implementation=implementation)
    return dict(zip(kept, rows, strict=True))
