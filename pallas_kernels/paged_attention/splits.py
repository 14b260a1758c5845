"""Programs that share the keys of a tile: what they write, and how it is joined."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels._platform import (
    next_power_of_two,
    plgpu,
    triton_call,
)
from pallas_kernels.paged_attention.reference import MASKED
from pallas_kernels.paged_attention.types import Ref

_COMBINED_ELEMENTS = 4096
"""Partial outputs that one program of `combine_splits` holds in registers."""


def split_shapes(num_splits: int, shape: tuple[int, ...], dtype: Any) -> list[jax.ShapeDtypeStruct]:
    """Outputs of a kernel with splits: partial outputs stay in float32."""
    return [
        jax.ShapeDtypeStruct((num_splits, *shape), dtype if num_splits == 1 else jnp.float32),
        jax.ShapeDtypeStruct((num_splits, *shape[:-1]), jnp.float32),
    ]


def _combine_block(
    outs_ref: Ref, lses_ref: Ref, out_ref: Ref, lse_ref: Ref, block: Array, block_rows: int
) -> None:
    """Weighs the splits of `block_rows` rows of X, a token's query head each.

    Args:
      outs_ref: [splits, X, H] float32.
      lses_ref: [splits, X] float32.
      out_ref: [X, H].
      lse_ref: [X] float32.
      block: Block of the X axis.
      block_rows: Size of a block, a power of two.
    """
    num_splits, num_rows, head_dim = outs_ref.shape
    splits = jnp.arange(next_power_of_two(num_splits))[:, None]
    rows = block * block_rows + jnp.arange(block_rows)
    is_row = rows < num_rows
    is_split = (splits < num_splits) & is_row[None, :]
    lses = plgpu.load(lses_ref.at[splits, rows[None, :]], mask=is_split, other=MASKED)
    maximum = jnp.max(lses, axis=0)
    # A split without a key has written no output. NaN compares false, and is kept.
    weights = jnp.where(lses < MASKED / 2, 0.0, jnp.exp(lses - maximum[None, :]))
    total = jnp.sum(weights, axis=0)
    total = jnp.where(total == 0, 1.0, total)
    dims = jnp.arange(next_power_of_two(head_dim))
    outs = plgpu.load(
        outs_ref.at[splits[:, :, None], rows[None, :, None], dims[None, None, :]],
        mask=(weights != 0)[:, :, None] & (dims < head_dim)[None, None, :],
        other=0.0,
    )
    out = jnp.sum(outs * weights[:, :, None], axis=0) / total[:, None]
    plgpu.store(
        out_ref.at[rows[:, None], dims[None, :]],
        out.astype(out_ref.dtype),
        mask=is_row[:, None] & (dims < head_dim)[None, :],
    )
    plgpu.store(lse_ref.at[rows], maximum + jnp.log(total), mask=is_row)


def combine_splits(
    outs: Float[Array, "splits T N H"], lses: Float[Array, "splits T N"], dtype: Any
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """Joins what the splits of each row wrote.

    Args:
      outs: Normalized outputs, float32; not read where a split has no key.
      lses: Their log-sum-exps, float32; -1e30 where a split has no key.
      dtype: Of the result.

    Returns:
      Attention outputs, and log-sum-exps in float32.
    """
    num_splits, num_tokens, num_heads, head_dim = outs.shape
    if num_splits == 1:
        return outs[0].astype(dtype), lses[0]
    rows = num_tokens * num_heads
    elements = next_power_of_two(num_splits) * next_power_of_two(head_dim)
    block_rows = max(1, _COMBINED_ELEMENTS // elements)

    def combine_splits(outs_ref, lses_ref, out_ref, lse_ref):
        _combine_block(outs_ref, lses_ref, out_ref, lse_ref, pl.program_id(0), block_rows)

    out, lse = triton_call(
        combine_splits,
        [
            jax.ShapeDtypeStruct((rows, head_dim), dtype),
            jax.ShapeDtypeStruct((rows,), jnp.float32),
        ],
        grid=(pl.cdiv(rows, block_rows),),
        name="combine_splits",
        num_warps=4,
        num_stages=1,
    )(outs.reshape(num_splits, rows, head_dim), lses.reshape(num_splits, rows))
    return out.reshape(outs.shape[1:]), lse.reshape(lses.shape[1:])
