"""Programs of the backward launch: one owns queries, the other keys; see `pallas_triton`."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _platform
from pallas_kernels._platform import plgpu
from pallas_kernels._tiles import dot
from pallas_kernels.paged_attention.types import Ref
from pallas_kernels.window_attention_backward.operands import Inputs, Outputs, Shape, is_seen

_LOG2_E = math.log2(math.e)


def _divide(count: jax.Array, divisor: int) -> jax.Array:
    """Quotient of a count, which is not negative; `//` would look at signs."""
    return lax.div(count, jnp.full_like(count, divisor))


def _dims(shape: Shape) -> tuple[jax.Array, jax.Array | bool]:
    """Indices of the head dim, [1, h], and which of them exist: a load is a power of two."""
    padded = max(16, _platform.next_power_of_two(shape.head_dim))
    dims = jnp.arange(padded)[None, :]
    return dims, (True if padded == shape.head_dim else dims < shape.head_dim)


class _Rows(NamedTuple):
    """(row, head) pairs of a query block, each [block_q]; out of range past the last row."""

    rows: jax.Array
    heads: jax.Array
    coords: jax.Array  # -1 padding


def _locate_rows(
    shape: Shape, inputs: Inputs, q_block: jax.Array, block_q: int, kv_head: jax.Array
) -> _Rows:
    pairs = q_block * block_q + jnp.arange(block_q)
    rows = _divide(pairs, shape.groups)
    heads = kv_head * shape.groups + (pairs - rows * shape.groups)
    # Queries of the last block that are not there read as padding.
    coords = plgpu.load(inputs.metadata.row_coords.at[rows], mask=rows < shape.num_rows, other=-1)
    return _Rows(rows, heads, coords)


def _load_rows(shape: Shape, ref: Ref, at: _Rows) -> jax.Array:
    """Loads queries or gradients, [block_q, h]; padding rows may hold anything and read as 0."""
    dims, is_dim = _dims(shape)
    mask = (at.coords >= 0)[:, None] & is_dim
    return plgpu.load(ref.at[at.rows[:, None], at.heads[:, None], dims], mask=mask, other=0.0)


def _load_row_scalars(ref: Ref, at: _Rows) -> jax.Array:
    """Loads one number for each (row, head) pair, [block_q]."""
    return plgpu.load(ref.at[at.rows, at.heads], mask=at.coords >= 0, other=0.0)


def _load_keys(
    shape: Shape, ref: Ref, layer: jax.Array, slots: jax.Array, kv_head: jax.Array
) -> jax.Array:
    """Loads tokens of one KV head, [block_k, h]; slots of -1 read as 0."""
    at, mask = _key_index(shape, layer, jnp.maximum(slots, 0), slots >= 0, kv_head)
    return plgpu.load(ref.at[at], mask=mask, other=0.0)


def _key_index(
    shape: Shape, layer: jax.Array, slots: jax.Array, is_slot: jax.Array, kv_head: jax.Array
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Index of tokens in paged arrays [L, P, Z, K, H], and the mask that goes with it."""
    dims, is_dim = _dims(shape)
    pages = _divide(slots, shape.page_size)
    offsets = slots & (shape.page_size - 1)
    return (layer, pages[:, None], offsets[:, None], kv_head, dims), is_slot[:, None] & is_dim


def dq_program(shape: Shape, inputs: Inputs, outputs: Outputs, index: jax.Array) -> None:
    """Computes dQ of one query block over one split of the keys.

    The KV head runs fastest: neighbours read neighbouring bytes of the pool.
    """
    tiling, metadata = shape.tiling, inputs.metadata
    rest = _divide(index, shape.num_kv_heads)
    kv_head = index - rest * shape.num_kv_heads
    q_block = _divide(rest, tiling.num_splits)
    split = rest - q_block * tiling.num_splits
    layer = inputs.layer[0]
    at = _locate_rows(shape, inputs, q_block, tiling.dq_block_q, kv_head)
    q, d_out = (_load_rows(shape, ref, at) for ref in (inputs.q, inputs.d_out))
    lse = _load_row_scalars(inputs.lse, at) * _LOG2_E
    delta = _load_row_scalars(inputs.delta, at)
    start, stop = metadata.k_starts[q_block], metadata.k_stops[q_block]
    per_split = _divide(stop - start + (tiling.num_splits - 1), tiling.num_splits)
    start = start + split * per_split
    stop = jnp.minimum(stop, start + per_split)

    def body(k_block: jax.Array, dq: jax.Array) -> jax.Array:
        keys = k_block * tiling.dq_block_k + jnp.arange(tiling.dq_block_k)
        slots = metadata.key_slots[keys]
        k, v = (
            _load_keys(shape, pool, layer, slots, kv_head)
            for pool in (inputs.k_pool, inputs.v_pool)
        )
        mask = is_seen(
            at.coords[:, None], metadata.key_coords[keys][None, :],
            metadata.key_reaches[keys][None, :],
        )  # fmt: skip
        products = dot(q, k, transposed=True)
        probs = _platform.exp2_scaled(products, shape.sm_scale * _LOG2_E, -lse[:, None])
        d_probs = dot(d_out, v, transposed=True)
        d_scores = jnp.where(mask, probs * (d_probs - delta[:, None]), 0.0)
        return dq + dot(d_scores.astype(k.dtype), k, transposed=False)

    dims, is_dim = _dims(shape)
    dq = lax.fori_loop(start, stop, body, jnp.zeros((tiling.dq_block_q, dims.size), jnp.float32))
    plgpu.store(
        outputs.dq.at[split, at.rows[:, None], at.heads[:, None], dims],
        dq * shape.sm_scale,
        mask=(at.rows < shape.num_rows)[:, None] & is_dim,
    )


def dkv_program(shape: Shape, inputs: Inputs, outputs: Outputs, index: jax.Array) -> None:
    """Adds dK and dV of one key block to its slots of the accumulators.

    Works on transposed scores, [keys, queries]: probabilities are then the left operand of the
    products that follow, and never leave the registers. The sums begin with what the accumulators
    hold: to load it at the end would need registers that the sums still fill.
    """
    tiling, metadata = shape.tiling, inputs.metadata
    k_block = _divide(index, shape.num_kv_heads)
    kv_head = index - k_block * shape.num_kv_heads
    keys = k_block * tiling.dkv_block_k + jnp.arange(tiling.dkv_block_k)
    start, stop = metadata.q_starts[k_block], metadata.q_stops[k_block]

    @pl.when(start < stop)
    def _():
        layer, slots = inputs.layer[0], metadata.key_slots[keys]
        k, v = (
            _load_keys(shape, pool, layer, slots, kv_head)
            for pool in (inputs.k_pool, inputs.v_pool)
        )
        key_coords, key_reaches = metadata.key_coords[keys], metadata.key_reaches[keys]
        acc_layer, acc_slots = inputs.acc_layer[0], metadata.acc_slots[keys]

        def body(q_block: jax.Array, carry: tuple[jax.Array, jax.Array]):
            dk, dv = carry
            at = _locate_rows(shape, inputs, q_block, tiling.dkv_block_q, kv_head)
            q, d_out = (_load_rows(shape, ref, at) for ref in (inputs.q, inputs.d_out))
            products = dot(k, q, transposed=True)
            mask = is_seen(at.coords[None, :], key_coords[:, None], key_reaches[:, None])
            lse = _load_row_scalars(inputs.lse, at) * _LOG2_E
            probs = _platform.exp2_scaled(products, shape.sm_scale * _LOG2_E, -lse[None, :])
            probs = jnp.where(mask, probs, 0.0)
            dv += dot(probs.astype(v.dtype), d_out, transposed=False)
            d_probs = dot(v, d_out, transposed=True) * shape.sm_scale
            delta = _load_row_scalars(inputs.delta, at) * shape.sm_scale
            d_scores = probs * (d_probs - delta[None, :])
            dk += dot(d_scores.astype(k.dtype), q, transposed=False)
            return dk, dv

        init = tuple(
            _load_keys(shape, acc, acc_layer, acc_slots, kv_head)
            for acc in (outputs.dk_acc, outputs.dv_acc)
        )
        dk, dv = lax.fori_loop(start, stop, body, init)
        # Masked slots point past the end: the interpreter of masked stores takes no index twice.
        past_end = outputs.dk_acc.shape[1] * shape.page_size
        at, mask = _key_index(
            shape,
            acc_layer,
            jnp.where(acc_slots >= 0, acc_slots, past_end),
            acc_slots >= 0,
            kv_head,
        )
        plgpu.store(outputs.dk_acc.at[at], dk, mask=mask)
        plgpu.store(outputs.dv_acc.at[at], dv, mask=mask)


def backward_program(shape: Shape, inputs: Inputs, outputs: Outputs, index: jax.Array) -> None:
    """Program `index` of `shape.num_dq_programs + shape.num_dkv_programs`, long ones first."""
    is_dq = index < shape.num_dq_programs

    @pl.when(is_dq)
    def _():
        dq_program(shape, inputs, outputs, index)

    @pl.when(~is_dq)
    def _():
        dkv_program(shape, inputs, outputs, index - shape.num_dq_programs)
