"""The paged pool of keys and values on the device.

One pool holds the tokens of every request and every finetuning sequence, all layers in one array,
so that a donated pool is updated in place and never copied. Which page belongs to whom is the
host's business (`flexjax.scheduler.page_allocator`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flexjax import axes
from flexjax.model_config import ModelConfig
from pallas_kernels import cpu_implementation, store_rows

KV_AXES = (axes.LAYERS, axes.PAGES, axes.PAGE, axes.KV_HEADS, axes.HEAD_DIM)


class KVPool(NamedTuple):
    """Keys and values of all pages.

    Attributes:
      k: Keys, after the rotary embedding.
      v: Values.
    """

    k: Float[Array, "L P Z K H"]
    v: Float[Array, "L P Z K H"]


def pool_shape(config: ModelConfig, num_pages: int, page_size: int) -> tuple[int, ...]:
    """Shape of each half of the pool."""
    return (config.num_layers, num_pages, page_size, config.num_kv_heads, config.head_dim)


def init_pool(config: ModelConfig, num_pages: int, page_size: int, dtype: str) -> KVPool:
    """Returns an empty pool."""
    shape = pool_shape(config, num_pages, page_size)
    return KVPool(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def write_tokens(
    pool: KVPool,
    layer: Int[Array, ""],
    slots: Int[Array, "T"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    implementation: str | None = "reference",
) -> KVPool:
    """Stores rows at token slots (page * page size + offset) of one layer; -1 is dropped."""
    rows = [half.astype(pool.k.dtype) for half in (k, v)]
    implementation = cpu_implementation(implementation)
    return KVPool(*store_rows(pool, rows, layer, slots, implementation=implementation))


def pool_bytes(config: ModelConfig, num_pages: int, page_size: int, dtype: str) -> int:
    """Bytes of both halves."""
    shape = pool_shape(config, num_pages, page_size)
    size = jax.numpy.dtype(dtype).itemsize
    for dim in shape:
        size *= dim
    return 2 * size
