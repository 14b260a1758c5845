"""The op and its backward pass, composed of the three products that each GPU backend provides."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_lora.groups import MIN_DOT, RowGroups, Tiles, group_rows, tiles_for

MAX_RANK = 128
"""A tile holds a row's whole bottleneck."""


class Products(abc.ABC):
    """Products of grouped rows with the weights of their adapters.

    Between them stand the partial bottlenecks, float32 [linears, splits, blocks, block rows, padded
    rank]: grouped rows times weights, not yet summed over the splits nor scaled. Blocks without a
    slot, and padding rows of the others, are neither written nor read. Everything is added in an
    order that is fixed by the shapes.

    `ranks` [A], if given, bounds the columns of a bottleneck whose weights are read, in steps of
    16; then R is a multiple of 16. `layer` has shape [1].
    """

    @abc.abstractmethod
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
        """Partial bottlenecks of `rows` [T, K] with weights [A, L, K, R].

        With `transposed`, with weights [A, L, R, K].
        """

    @abc.abstractmethod
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
        """Adds scaled bottlenecks times weights [A, L, R, O] to `accs` [T, O], in place.

        With `transposed`, weights [A, L, O, R].
        """

    @abc.abstractmethod
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
        """For each active slot, the sum over its rows of row [K] times scaled bottleneck [R].

        Float32 [n, K, R], or [n, R, K] with `transposed`; the factors are rounded to the dtype of
        `like`.
        """


def forward(
    products: Products,
    x: Float[Array, "T I"],
    accs: Sequence[Array],
    lora_a: Sequence[Array],
    lora_b: Sequence[Array],
    scale: Float[Array, "A"],
    layer: Int[Array, ""],
    row_slots: Int[Array, "T"],
    active_slots: Int[Array, "n"],
    num_active: Int[Array, ""],
    *,
    groups: RowGroups | None = None,
    ranks: Int[Array, "A"] | None = None,
    tiles: Tiles | None = None,
) -> tuple[Array, ...]:
    """`api.grouped_lora_many` by `products`: two launches, whatever the number of linears."""
    del active_slots, num_active  # blocks without a slot leave at once
    groups, ranks, tiles = _prepare(x, accs, lora_a, row_slots, groups, ranks, tiles)
    layer = layer.reshape(1)
    partials = products.shrink(x, lora_a, layer, groups, ranks, tiles)
    return products.expand(partials, lora_b, accs, scale, layer, groups, ranks, tiles)


def backward(
    products: Products,
    x: Float[Array, "T I"],
    d_y: Float[Array, "T O"],
    d_x: Float[Array, "T I"],
    lora_a: Float[Array, "A L I R"],
    lora_b: Float[Array, "A L R O"],
    scale: Float[Array, "A"],
    layer: Int[Array, ""],
    row_slots: Int[Array, "T"],
    active_slots: Int[Array, "n"],
    num_active: Int[Array, ""],
    *,
    groups: RowGroups | None = None,
    ranks: Int[Array, "A"] | None = None,
    tiles: Tiles | None = None,
) -> tuple[Array, Array, Array]:
    """`api.grouped_lora_backward` by `products`: five launches, and the sums."""
    groups, ranks, tiles = _prepare(x, (d_y,), (lora_a,), row_slots, groups, ranks, tiles)
    layer, rank = layer.reshape(1), lora_a.shape[3]
    index = jnp.arange(active_slots.shape[0], dtype=jnp.int32)
    slots = jnp.where(index < num_active, active_slots, -1).astype(jnp.int32)
    shared = (layer, groups, ranks, tiles)
    h = products.shrink(x, (lora_a,), *shared)
    d_h = products.shrink(d_y, (lora_b,), *shared, transposed=True)
    # Hundreds of programs read them, so the splits are summed beforehand.
    h, d_h = (jnp.sum(partials, axis=1, keepdims=True) for partials in (h, d_h))
    (d_x,) = products.expand(d_h, (lora_a,), (d_x,), scale, *shared, transposed=True)
    sums = (scale, slots, groups, tiles)
    d_a = products.outer(x, d_h, *sums, rank=rank, like=x)
    d_b = products.outer(d_y, h, *sums, rank=rank, like=x, transposed=True)
    return d_x, d_a, d_b


def _prepare(x, outs, lora_a, row_slots, groups, ranks, tiles):
    """Groups and tiles where not given, and ranks where they spare a load."""
    if mixed := {a.dtype.name for a in lora_a} - {x.dtype.name}:
        raise NotImplementedError(
            f"grouped_lora multiplies rows and adapters of one dtype; got {x.dtype.name} rows and "
            f"{', '.join(sorted(mixed))} adapters."
        )
    num_slots, _, _, rank = lora_a[0].shape
    if rank > MAX_RANK:
        raise NotImplementedError(f"grouped_lora takes ranks up to {MAX_RANK}; got {rank}.")
    if any(rows.size >= 2**31 for rows in (x, *outs)):
        raise NotImplementedError("grouped_lora takes rows of less than 2^31 numbers in all.")
    if groups is None:
        groups = group_rows(row_slots, num_slots)
    if rank % MIN_DOT or rank == MIN_DOT:
        ranks = None
    if tiles is None:
        sizes = {"num_linears": len(lora_a), "itemsize": x.dtype.itemsize}
        tiles = tiles_for(groups.rows.shape[1], rank, **sizes)
    return groups, ranks, tiles
