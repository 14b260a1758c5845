"""LoRA deltas of grouped rows, in Pallas for Triton.

Shrink and expand follow Punica's SGMV (arXiv 2310.18547) and S-LoRA (arXiv 2311.03285): programs
read the rows of one adapter through a table, and the long side of a shrink is split among programs
(split-K), whose parts the reader adds in a fixed order.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels._platform import plgpu, triton_call
from pallas_kernels.grouped_lora import _products
from pallas_kernels.grouped_lora.groups import MIN_DOT, RowGroups, Tiles, padded_rank


def grouped_lora_many(*args, **kwargs) -> tuple[Array, ...]:
    """See `api.grouped_lora_many`."""
    return _products.forward(_PallasProducts(), *args, **kwargs)


def grouped_lora_backward(*args, **kwargs) -> tuple[Array, Array, Array]:
    """See `api.grouped_lora_backward`."""
    return _products.backward(_PallasProducts(), *args, **kwargs)


def _load(ref, *index, mask):
    return plgpu.load(ref.at[index], mask=mask, other=0)


def _dot(x, y, x_axis: int, y_axis: int):
    """Contracts two tiles, in float32: on CUDA cores if they are float32 (no TF32)."""
    dims = (((x_axis,), (y_axis,)), ((), ()))
    return lax.dot_general(
        x, y, dims, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _rank_bound(ranks_refs, slot, rank: int):
    """Columns of a bottleneck to read: in steps of 16, so that loads stay wide."""
    if not ranks_refs:
        return rank
    return lax.div(ranks_refs[0][slot] + (MIN_DOT - 1), MIN_DOT) * MIN_DOT


def _load_weights(ref, slot, layer, ks, limit: int, cols, bound, transposed: bool):
    """Tile [K, R] of weights [A, L, K, R], or tile [R, K] of weights [A, L, R, K]."""
    if transposed:
        ks, cols = ks[None, :], cols[:, None]
        return _load(ref, slot, layer, cols, ks, mask=(cols < bound) & (ks < limit))
    ks, cols = ks[:, None], cols[None, :]
    return _load(ref, slot, layer, ks, cols, mask=(cols < bound) & (ks < limit))


def _shrink_kernel(*refs, num_linears, columns, rank, block_k, steps, transposed):
    # layer_ref: [1] int32; rows_ref: [blocks, B] int32; slots_ref: [blocks] int32
    # ranks_ref: [A] int32, or absent; x_ref: [T, K]
    # weight_refs: [A, L, K, R], or [A, L, R, K] if transposed; out_ref: [n, splits, blocks, B, R']
    layer_ref, rows_ref, slots_ref, x_ref, *refs = refs
    weight_refs, (*ranks_refs, out_ref) = refs[:num_linears], refs[num_linears:]
    block, split = pl.program_id(0), pl.program_id(1)
    block_rows, padded = out_ref.shape[3:]
    slot = slots_ref[block]

    @pl.when(slot >= 0)
    def _():
        layer = layer_ref[0]
        rows = rows_ref[block, :][:, None]
        cols = jnp.arange(padded, dtype=jnp.int32)
        bound = _rank_bound(ranks_refs, slot, rank)

        def body(step, sums):
            ks = (split * steps + step) * block_k + jnp.arange(block_k, dtype=jnp.int32)
            tile_mask = (rows >= 0) & (ks < columns)[None, :]
            x = _load(x_ref, rows, ks[None, :], mask=tile_mask)
            added = []
            for ref, total in zip(weight_refs, sums, strict=True):
                w = _load_weights(ref, slot, layer, ks, columns, cols, bound, transposed)
                added.append(total + _dot(x.astype(w.dtype), w, 1, 1 if transposed else 0))
            return tuple(added)

        zeros = jnp.zeros((block_rows, padded), jnp.float32)
        sums = lax.fori_loop(0, steps, body, (zeros,) * num_linears)
        mask = jnp.broadcast_to(rows >= 0, zeros.shape)
        for index, total in enumerate(sums):
            at = (jnp.int32(index), split, block, slice(None), slice(None))
            plgpu.store(out_ref.at[at], total, mask=mask)


def _bottleneck(partials_ref, index: int, block, rows, scale, dtype):
    """Bottleneck [B, R'] of a block: its parts added in order, scaled, rounded; 0 for padding."""
    mask = jnp.broadcast_to(rows >= 0, partials_ref.shape[3:])
    total = jnp.zeros(mask.shape, jnp.float32)
    for split in range(partials_ref.shape[1]):
        at = (jnp.int32(index), jnp.int32(split), block, slice(None), slice(None))
        total += _load(partials_ref, *at, mask=mask)
    return (total * scale).astype(dtype)


def _expand_kernel(*refs, widths, rank, block_o, transposed):
    # layer_ref: [1] int32; rows_ref: [blocks, B] int32; slots_ref: [blocks] int32
    # scale_ref: [A]; partials_ref: [n, splits, blocks, B, R']
    # weight_refs: [A, L, R, O], or [A, L, O, R] if transposed; acc_refs, out_refs: [T, O], aliased
    # ranks_ref: [A] int32, or absent
    num_linears = len(widths)
    layer_ref, rows_ref, slots_ref, scale_ref, partials_ref, *refs = refs
    weight_refs, acc_refs = refs[:num_linears], refs[num_linears : 2 * num_linears]
    ranks_refs, out_refs = refs[2 * num_linears : -num_linears], refs[-num_linears:]
    tile, block = pl.program_id(0), pl.program_id(1)
    slot = slots_ref[block]
    tiles = [pl.cdiv(width, block_o) for width in widths]
    for index, width in enumerate(widths):
        first = sum(tiles[:index])

        @pl.when((slot >= 0) & (tile >= first) & (tile < first + tiles[index]))
        def _(index=index, first=first, width=width):
            layer = layer_ref[0]
            rows = rows_ref[block, :][:, None]
            cols = jnp.arange(partials_ref.shape[4], dtype=jnp.int32)
            bound = _rank_bound(ranks_refs, slot, rank)
            outs = (tile - first) * block_o + jnp.arange(block_o, dtype=jnp.int32)
            ref = weight_refs[index]
            w = _load_weights(ref, slot, layer, outs, width, cols, bound, not transposed)
            h = _bottleneck(partials_ref, index, block, rows, scale_ref[slot], w.dtype)
            delta = _dot(h, w, 1, 1 if transposed else 0)
            mask = (rows >= 0) & (outs < width)[None, :]
            # Past the end: the interpreter writes masked places back unless they are out of range.
            rows = jnp.where(rows >= 0, rows, acc_refs[index].shape[0])
            acc = _load(acc_refs[index], rows, outs[None, :], mask=mask)
            plgpu.store(out_refs[index].at[rows, outs[None, :]], acc + delta, mask=mask)


def _outer_kernel(*refs, rank, block_k, dtype, transposed):
    # rows_ref: [blocks, B] int32; starts_ref: [A + 1] int32; scale_ref: [A]
    # active_ref: [n] int32; x_ref: [T, K]; partials_ref: [1, splits, blocks, B, R']
    # out_ref: [n, K, R], or [n, R, K] if transposed
    rows_ref, starts_ref, scale_ref, active_ref, x_ref, partials_ref, out_ref = refs
    tile, index = pl.program_id(0), pl.program_id(1)
    columns, padded = x_ref.shape[1], partials_ref.shape[4]
    slot = active_ref[index]
    first = starts_ref[jnp.maximum(slot, 0)]
    last = jnp.where(slot >= 0, starts_ref[jnp.maximum(slot, 0) + 1], first)
    scale = scale_ref[jnp.maximum(slot, 0)]
    ks = tile * block_k + jnp.arange(block_k, dtype=jnp.int32)

    def body(block, total):
        rows = rows_ref[block, :][:, None]
        x = _load(x_ref, rows, ks[None, :], mask=(rows >= 0) & (ks < columns)[None, :])
        h = _bottleneck(partials_ref, 0, block, rows, scale, dtype)
        return total + _dot(x.astype(dtype), h, 0, 0)

    total = lax.fori_loop(first, last, body, jnp.zeros((block_k, padded), jnp.float32))
    cols = jnp.arange(padded, dtype=jnp.int32)[None, :]
    ks = ks[:, None]
    at = (index, cols, ks) if transposed else (index, ks, cols)
    plgpu.store(out_ref.at[at], total, mask=(ks < columns) & (cols < rank))


class _PallasProducts(_products.Products):
    """`_products.Products` in Pallas; whole arrays in, indexed by the kernels."""

    def shrink(
        self,
        rows: Array,
        weights: Sequence[Array],
        layer: Array,
        groups: RowGroups,
        ranks: Array | None,
        tiles: Tiles,
        *,
        transposed: bool = False,
    ) -> Array:
        columns = rows.shape[1]
        rank = weights[0].shape[2 if transposed else 3]
        num_blocks, block_rows = groups.rows.shape
        splits = tiles.splits(columns)
        shape = (len(weights), splits, num_blocks, block_rows, padded_rank(rank))
        kernel = functools.partial(
            _shrink_kernel,
            num_linears=len(weights),
            columns=columns,
            rank=rank,
            block_k=tiles.block_k,
            steps=tiles.split_steps(columns),
            transposed=transposed,
        )
        call = triton_call(
            kernel,
            jax.ShapeDtypeStruct(shape, jnp.float32),
            grid=(num_blocks, splits),
            name="grouped_lora_shrink",
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        optional = () if ranks is None else (ranks,)
        return call(layer, groups.rows, groups.slots, rows, *weights, *optional)

    def expand(
        self,
        partials: Array,
        weights: Sequence[Array],
        accs: Sequence[Array],
        scale: Array,
        layer: Array,
        groups: RowGroups,
        ranks: Array | None,
        tiles: Tiles,
        *,
        transposed: bool = False,
    ) -> tuple[Array, ...]:
        widths = tuple(acc.shape[1] for acc in accs)
        kernel = functools.partial(
            _expand_kernel,
            widths=widths,
            rank=weights[0].shape[3 if transposed else 2],
            block_o=tiles.block_o,
            transposed=transposed,
        )
        num_tiles = sum(pl.cdiv(width, tiles.block_o) for width in widths)
        before_accs = 5 + len(weights)
        call = triton_call(
            kernel,
            [jax.ShapeDtypeStruct(acc.shape, jnp.float32) for acc in accs],
            grid=(num_tiles, groups.slots.shape[0]),
            name="grouped_lora_expand",
            num_warps=tiles.num_warps,
            num_stages=1,
            input_output_aliases={before_accs + i: i for i in range(len(accs))},
        )
        optional = () if ranks is None else (ranks,)
        arrays = (layer, groups.rows, groups.slots, scale, partials)
        return tuple(call(*arrays, *weights, *accs, *optional))

    def outer(
        self,
        rows: Array,
        partials: Array,
        scale: Array,
        active_slots: Array,
        groups: RowGroups,
        tiles: Tiles,
        *,
        rank: int,
        like: Array,
        transposed: bool = False,
    ) -> Array:
        num_active, columns = active_slots.shape[0], rows.shape[1]
        shape = (num_active, rank, columns) if transposed else (num_active, columns, rank)
        kernel = functools.partial(
            _outer_kernel,
            rank=rank,
            block_k=tiles.block_outer,
            dtype=like.dtype,
            transposed=transposed,
        )
        call = triton_call(
            kernel,
            jax.ShapeDtypeStruct(shape, jnp.float32),
            grid=(pl.cdiv(columns, tiles.block_outer), num_active),
            name="grouped_lora_outer",
            num_warps=tiles.num_warps,
            num_stages=3,
        )
        return call(groups.rows, groups.starts, scale, active_slots, rows, partials)
