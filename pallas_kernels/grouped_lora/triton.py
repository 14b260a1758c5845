"""LoRA deltas of grouped rows, in Triton through jax-triton: launches of `triton_kernels`."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels._jax_triton import require_jax_triton, triton_kernel_call
from pallas_kernels.grouped_lora import _products
from pallas_kernels.grouped_lora.groups import RowGroups, Tiles, padded_rank

MAX_LINEARS = 3
"""Linears of one launch, for a Triton kernel has a fixed number of pointers: q, k and v."""


def grouped_lora_many(*args, **kwargs) -> tuple[Array, ...]:
    """See `api.grouped_lora_many`."""
    require_jax_triton("grouped_lora")
    return _products.forward(_TritonProducts(), *args, **kwargs)


def grouped_lora_backward(*args, **kwargs) -> tuple[Array, Array, Array]:
    """See `api.grouped_lora_backward`."""
    require_jax_triton("grouped_lora_backward")
    return _products.backward(_TritonProducts(), *args, **kwargs)


class _TritonProducts(_products.Products):
    """`_products.Products` in Triton."""

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
        from pallas_kernels.grouped_lora import triton_kernels

        _check_count(weights)
        columns, rank = rows.shape[1], weights[0].shape[2 if transposed else 3]
        num_blocks, block_rows = groups.rows.shape
        splits, padded = tiles.splits(columns), padded_rank(rank)
        shape = (len(weights), splits, num_blocks, block_rows, padded)
        some_ranks = layer if ranks is None else ranks
        inputs = (layer, groups.rows, groups.slots, some_ranks, rows, *_fill(weights, weights[0]))
        (out,) = triton_kernel_call(
            triton_kernels.grouped_lora_shrink,
            inputs,
            [jax.ShapeDtypeStruct(shape, jnp.float32)],
            grid=(num_blocks, splits),
            name="grouped_lora_shrink",
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            NUM_LINEARS=len(weights),
            LAYERS=weights[0].shape[1],
            COLUMNS=columns,
            RANK=rank,
            PADDED_RANK=padded,
            HAS_RANKS=ranks is not None,
            TRANSPOSED=transposed,
            BLOCK_ROWS=block_rows,
            BLOCK_K=tiles.block_k,
            STEPS=tiles.split_steps(columns),
        )
        return out

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
        from pallas_kernels.grouped_lora import triton_kernels

        _check_count(weights)
        widths = [acc.shape[1] for acc in accs]
        accs = _fill(accs, jnp.zeros((1,), jnp.float32))
        some_ranks = layer if ranks is None else ranks
        head = (layer, groups.rows, groups.slots, some_ranks, scale, partials)
        width0, width1, width2 = _fill(widths, 0)
        outs = triton_kernel_call(
            triton_kernels.grouped_lora_expand,
            (*head, *_fill(weights, weights[0]), *accs),
            [jax.ShapeDtypeStruct(acc.shape, jnp.float32) for acc in accs],
            grid=(sum(-(-width // tiles.block_o) for width in widths), groups.slots.shape[0]),
            name="grouped_lora_expand",
            num_warps=tiles.num_warps,
            num_stages=1,
            input_output_aliases={len(head) + MAX_LINEARS + i: i for i in range(len(widths))},
            WIDTH0=width0,
            WIDTH1=width1,
            WIDTH2=width2,
            LAYERS=weights[0].shape[1],
            RANK=weights[0].shape[3 if transposed else 2],
            PADDED_RANK=partials.shape[4],
            HAS_RANKS=ranks is not None,
            TRANSPOSED=transposed,
            SPLITS=partials.shape[1],
            BLOCK_ROWS=groups.rows.shape[1],
            BLOCK_O=tiles.block_o,
        )
        return tuple(outs[: len(widths)])

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
        from pallas_kernels.grouped_lora import triton_kernels

        num_active, columns = active_slots.shape[0], rows.shape[1]
        shape = (num_active, rank, columns) if transposed else (num_active, columns, rank)
        (out,) = triton_kernel_call(
            triton_kernels.grouped_lora_outer,
            (groups.rows, groups.starts, scale, active_slots, rows, partials, like),
            [jax.ShapeDtypeStruct(shape, jnp.float32)],
            grid=(-(-columns // tiles.block_outer), num_active),
            name="grouped_lora_outer",
            num_warps=tiles.num_warps,
            num_stages=3,
            COLUMNS=columns,
            RANK=rank,
            PADDED_RANK=partials.shape[4],
            TRANSPOSED=transposed,
            SPLITS=partials.shape[1],
            NUM_BLOCKS=groups.slots.shape[0],
            BLOCK_ROWS=groups.rows.shape[1],
            BLOCK_K=tiles.block_outer,
        )
        return out


def _check_count(weights: Sequence[Array]) -> None:
    if len(weights) > MAX_LINEARS:
        raise NotImplementedError(
            f"grouped_lora in Triton takes at most {MAX_LINEARS} linears at once; "
            f"got {len(weights)}."
        )


def _fill(values: Sequence, other) -> list:
    """`values` and then `other`, which a kernel does not read, in the places left."""
    return [*values, *[other] * (MAX_LINEARS - len(values))]
