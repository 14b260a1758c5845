"""Attention backward of a window in one Pallas-Triton launch, deterministic and without atomics.

The grid has two parts. A *dQ program* owns a block of queries of one KV head and walks the key
blocks that they see. A *dK/dV program* owns a block of keys of one KV head, walks the query blocks
that see them, and is the only one to touch its slots of the accumulators, which it reads and writes
once. Both recompute the probabilities from the log-sum-exp of the forward pass.

The rows of a query block are (window row, query head of the group) pairs, so that a group shares
the keys that it loads whatever its size. A dQ program walks the whole context, a dK/dV program only
the window: the long ones come first, so that the short ones fill the chip to the end. Windows of
few rows split the keys of a dQ program, and the parts are summed outside.

Method: FlashAttention-2 (Dao, arXiv 2307.08691), with dQ by programs of its own and paged operands.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import _platform
from pallas_kernels._platform import plgpu
from pallas_kernels._tiles import dot
from pallas_kernels.paged_attention.pallas_triton import Ref, check_supported
from pallas_kernels.paged_attention.types import PageList

_LOG2_E = math.log2(math.e)
_PROGRAMS_TO_FILL = 256  # about two for each multiprocessor of an H200 or an A100
_MAX_SPLITS = 8


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Block sizes: what is tuned.

    Attributes:
      dq_block_q: (row, head) pairs that a dQ program owns.
      dq_block_k: Keys that it loads at a time.
      dkv_block_q: (row, head) pairs that a dK/dV program loads at a time.
      dkv_block_k: Keys that it owns.
      num_splits: dQ programs among which the keys of one query block are split.
      num_warps: Warps of a program.
      num_stages: Depth of the software pipeline of loads.
    """

    dq_block_q: int
    dq_block_k: int
    dkv_block_q: int
    dkv_block_k: int
    num_splits: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class Shape:
    """Everything static that the programs need.

    Attributes:
      num_rows: Rows of the window, padding included.
      num_keys: Keys that the page list can hold.
      groups: Query heads per KV head.
    """

    num_rows: int
    num_keys: int
    page_size: int
    num_kv_heads: int
    groups: int
    head_dim: int
    sm_scale: float
    sliding_window: int | None
    tiling: Tiling

    @property
    def num_loaded_keys(self) -> int:
        """Keys of whole blocks, of either part of the grid."""
        block_k = max(self.tiling.dq_block_k, self.tiling.dkv_block_k)
        return pl.cdiv(self.num_keys, block_k) * block_k

    @property
    def num_dq_programs(self) -> int:
        """Programs that compute dQ."""
        q_blocks = pl.cdiv(self.num_rows * self.groups, self.tiling.dq_block_q)
        return q_blocks * self.tiling.num_splits * self.num_kv_heads

    @property
    def num_dkv_programs(self) -> int:
        """Programs that compute dK and dV."""
        return self.num_loaded_keys // self.tiling.dkv_block_k * self.num_kv_heads


class Metadata(NamedTuple):
    """Which keys there are, who sees them, and where the programs' loops begin and end; int32.

    Segments lie end to end on one line: a coordinate is a position plus the lengths of all segments
    before. A row sees a key if 0 <= row_coord - key_coord < key_reach, which says at once that both
    are of one segment, that the key is not later, and that it is in the sliding window.

    Attributes:
      key_slots: Token slot (page * Z + offset) of each key in its layer; -1 if no row sees it.
      key_coords: Coordinate of each key.
      key_reaches: How far behind the key the rows that see it end; 0 if there is none.
      acc_slots: Token slot of each key in the accumulators; -1 where nothing may be written.
      row_coords: Coordinate of each row; -1 padding.
      k_starts: First key block that each query block of a dQ program sees.
      k_stops: One past the last.
      q_starts: First query block that sees each key block of a dK/dV program.
      q_stops: One past the last.
    """

    key_slots: Ref  # [S]
    key_coords: Ref  # [S]
    key_reaches: Ref  # [S]
    acc_slots: Ref  # [S]
    row_coords: Ref  # [W]
    k_starts: Ref  # [query blocks of dQ]
    k_stops: Ref  # [query blocks of dQ]
    q_starts: Ref  # [key blocks of dK/dV]
    q_stops: Ref  # [key blocks of dK/dV]


class Inputs(NamedTuple):
    """Operands of the launch: arrays outside, refs inside."""

    q: Ref  # [W, N, H]
    d_out: Ref  # [W, N, H]
    lse: Ref  # [W, N]
    delta: Ref  # [W, N]: sum(out * d_out)
    k_pool: Ref  # [L, P, Z, K, H]
    v_pool: Ref  # [L, P, Z, K, H]
    layer: Ref  # [1]
    acc_layer: Ref  # [1]
    metadata: Metadata


class Outputs(NamedTuple):
    """Results of the launch; the accumulators are added to in place."""

    dq: Ref  # [splits, W, N, H]
    dk_acc: Ref  # [l, p, Z, K, H], float32
    dv_acc: Ref  # [l, p, Z, K, H], float32


def default_tiling(
    num_rows: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype
) -> Tiling:
    """Block sizes that fill the registers of the target, without spills up to a head dim of 128."""
    # wgmma takes its right operands from shared memory; before it, they fill registers, too.
    has_wgmma = (_platform.target().compute_capability or 90) >= 90
    if jnp.dtype(dtype) == jnp.float32:  # multiplied on CUDA cores
        blocks, num_warps, num_stages = (16, 16, 16, 16), 8, 1
    elif head_dim > 128:
        blocks = (64, 64, 32, 64) if has_wgmma else (64, 32, 32, 32)
        num_warps, num_stages = 8, 2
    else:
        groups = num_heads // num_kv_heads
        is_plain = all(size & (size - 1) == 0 for size in (head_dim, groups))
        blocks = (64, 64 if has_wgmma else 32, 64 if has_wgmma and is_plain else 32, 64)
        num_warps, num_stages = 4, 2
    programs = pl.cdiv(num_rows * (num_heads // num_kv_heads), blocks[0]) * num_kv_heads
    num_splits = max(1, min(_MAX_SPLITS, _PROGRAMS_TO_FILL // programs))
    return Tiling(*blocks, num_splits, num_warps, num_stages)


def _range(is_member: Bool[Array, "n m"]) -> tuple[Int[Array, "n"], Int[Array, "n"]]:
    """First True of each row and one past the last; 0 and 0 if there is none."""
    start = jnp.argmax(is_member, axis=1).astype(jnp.int32)
    after_last = jnp.argmax(is_member[:, ::-1], axis=1).astype(jnp.int32)
    stop = jnp.where(is_member.any(1), is_member.shape[1] - after_last, 0)
    return start, stop


def _lay_out(
    page_list: PageList,
    is_named: Bool[Array, "M"],
    row_segments: Int[Array, "W"],
    row_positions: Int[Array, "W"],
    page_size: int,
) -> tuple[Int[Array, "M"], Int[Array, "M"], Int[Array, "W"]]:
    """Lays segments end to end; where each page's segment begins and ends, and the rows' begins."""
    segments = page_list.segments
    is_same = (segments[:, None] == segments[None, :]) & is_named[None, :]  # [M, M]
    is_mine = segments[:, None] == row_segments[None, :]  # [M, W]
    ends = jnp.where(is_same, page_list.starts[None, :] + page_size, 0).max(1)
    lengths = jnp.maximum(ends, jnp.where(is_mine, row_positions[None, :] + 1, 0).max(1))
    is_first = is_named & (jnp.argmax(is_same, axis=1) == jnp.arange(segments.size))
    is_before = (segments[None, :] < segments[:, None]) & is_first[None, :]
    begins = jnp.where(is_before, lengths[None, :], 0).sum(1)
    row_begins = jnp.where(is_mine & is_named[:, None], begins[:, None], -1).max(0)
    return begins, begins + lengths, row_begins


def describe(
    shape: Shape,
    page_list: PageList,
    acc_pages: Int[Array, "M"],
    row_segments: Int[Array, "W"],
    row_positions: Int[Array, "W"],
) -> Metadata:
    """Flattens the page list to keys, and finds which blocks meet. The same for every layer."""
    tiling, page_size = shape.tiling, shape.page_size
    is_named = (page_list.pages >= 0) & (jnp.arange(page_list.pages.size) < page_list.num_pages)
    begins, ends, row_begins = _lay_out(page_list, is_named, row_segments, row_positions, page_size)
    row_coords = jnp.where((row_positions >= 0) & (row_begins >= 0), row_begins + row_positions, -1)

    def by_key(per_page: jax.Array, fill: int, step: int = 1) -> jax.Array:
        keys = per_page[:, None] + step * jnp.arange(page_size)[None, :]
        keys = jnp.where(is_named[:, None], keys, fill).reshape(-1)
        return jnp.pad(keys, (0, shape.num_loaded_keys - keys.size), constant_values=fill)

    coords = by_key(begins + page_list.starts, 0)
    reaches = by_key(ends - begins - page_list.starts, 0, step=-1)
    if shape.sliding_window is not None:
        reaches = jnp.minimum(reaches, shape.sliding_window)
    sees = is_seen(row_coords[:, None], coords[None, :], reaches[None, :])  # [W, S]
    is_read = sees.any(0)
    acc_slots = jnp.where(acc_pages >= 0, acc_pages * page_size, -page_size)

    def blocks_of_rows(block_q: int) -> jax.Array:
        pairs = jnp.arange(pl.cdiv(shape.num_rows * shape.groups, block_q) * block_q)
        return jnp.minimum(pairs // shape.groups, shape.num_rows - 1).reshape(-1, block_q)

    def meets(block_q: int, block_k: int) -> Bool[Array, "q_blocks k_blocks"]:
        row_sees = sees.reshape(shape.num_rows, -1, block_k).any(-1)
        return row_sees[blocks_of_rows(block_q)].any(1)

    return Metadata(
        jnp.where(is_read, by_key(page_list.pages * page_size, -1), -1),
        coords,
        jnp.where(is_read, reaches, 0),
        jnp.where(is_read, jnp.maximum(by_key(acc_slots, -1), -1), -1),
        row_coords,
        *_range(meets(tiling.dq_block_q, tiling.dq_block_k)),
        *_range(meets(tiling.dkv_block_q, tiling.dkv_block_k).T),
    )


def is_seen(row_coords: jax.Array, key_coords: jax.Array, key_reaches: jax.Array) -> jax.Array:
    """Whether rows see keys; see `Metadata`."""
    gap = row_coords - key_coords
    return (gap >= 0) & (gap < key_reaches)


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


def prepare(
    q: Float[Array, "W N H"],
    out: Float[Array, "W N H"],
    lse: Float[Array, "W N"],
    d_out: Float[Array, "W N H"],
    k_pool: Float[Array, "L P Z K H"],
    v_pool: Float[Array, "L P Z K H"],
    layer: Int[Array, ""],
    page_list: PageList,
    row_segments: Int[Array, "W"],
    row_positions: Int[Array, "W"],
    acc_layer: Int[Array, ""],
    acc_pages: Int[Array, "M"],
    *,
    sm_scale: float,
    sliding_window: int | None,
    tiling: Tiling | None,
) -> tuple[Shape, Inputs]:
    """Static shape and operands of the launch, accumulators aside."""
    num_rows, num_heads, head_dim = q.shape
    page_size, num_kv_heads = k_pool.shape[2:4]
    shape = Shape(
        num_rows=num_rows,
        num_keys=page_list.pages.size * page_size,
        page_size=page_size,
        num_kv_heads=num_kv_heads,
        groups=num_heads // num_kv_heads,
        head_dim=head_dim,
        sm_scale=sm_scale,
        sliding_window=sliding_window,
        tiling=tiling or default_tiling(num_rows, num_heads, num_kv_heads, head_dim, k_pool.dtype),
    )
    inputs = Inputs(
        q=q,
        d_out=d_out.astype(q.dtype),
        lse=lse,
        delta=(out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1),
        k_pool=k_pool,
        v_pool=v_pool,
        layer=layer.astype(jnp.int32).reshape(1),
        acc_layer=acc_layer.astype(jnp.int32).reshape(1),
        metadata=describe(shape, page_list, acc_pages, row_segments, row_positions),
    )
    return shape, inputs


def output_shapes(
    shape: Shape, q: Float[Array, "W N H"], dk_acc: Float[Array, "l p Z K H"]
) -> Outputs:
    """Shapes of the launch's results."""
    acc = jax.ShapeDtypeStruct(dk_acc.shape, jnp.float32)
    dq = jax.ShapeDtypeStruct((shape.tiling.num_splits, *q.shape), jnp.float32)
    return Outputs(dq, acc, acc)


def window_attention_backward(
    q: Float[Array, "W N H"],
    out: Float[Array, "W N H"],
    lse: Float[Array, "W N"],
    d_out: Float[Array, "W N H"],
    k_pool: Float[Array, "L P Z K H"],
    v_pool: Float[Array, "L P Z K H"],
    layer: Int[Array, ""],
    page_list: PageList,
    row_segments: Int[Array, "W"],
    row_positions: Int[Array, "W"],
    dk_acc: Float[Array, "l p Z K H"],
    dv_acc: Float[Array, "l p Z K H"],
    acc_layer: Int[Array, ""],
    acc_pages: Int[Array, "M"],
    *,
    sm_scale: float,
    sliding_window: int | None = None,
    tiling: Tiling | None = None,
) -> tuple[Float[Array, "W N H"], Float[Array, "l p Z K H"], Float[Array, "l p Z K H"]]:
    """Backward of `ragged_attention` for the rows of one window; see `api`.

    Block sizes are those of `tiling`, or of `default_tiling` if it is None.

    Raises:
      NotImplementedError: If the target runs no Triton kernel, or cannot take the operands; see
        `paged_attention.pallas_triton.check_supported`.
    """
    check_supported(q, k_pool, v_pool)
    shape, inputs = prepare(
        q, out, lse, d_out, k_pool, v_pool, layer, page_list, row_segments, row_positions,
        acc_layer, acc_pages, sm_scale=sm_scale, sliding_window=sliding_window, tiling=tiling,
    )  # fmt: skip
    leaves, structure = jax.tree.flatten(inputs)

    def window_attention_backward(*refs):
        inputs = jax.tree.unflatten(structure, refs[: len(leaves)])
        backward_program(shape, inputs, Outputs(*refs[-3:]), pl.program_id(0))

    dq, dk_acc, dv_acc = _platform.triton_call(
        window_attention_backward,
        tuple(output_shapes(shape, q, dk_acc)),
        grid=(shape.num_dq_programs + shape.num_dkv_programs,),
        name="window_attention_backward",
        num_warps=shape.tiling.num_warps,
        num_stages=shape.tiling.num_stages,
        input_output_aliases={len(leaves): 1, len(leaves) + 1: 2},
    )(*leaves, dk_acc, dv_acc)
    return dq.sum(0), dk_acc, dv_acc
