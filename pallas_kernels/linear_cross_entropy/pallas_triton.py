"""Loss of a linear head and its gradient at the hidden rows, in Pallas for Triton.

With logits l = h W, the gradient of -log p_t at h is sum_v p_v w_v - w_t: softmax attention of the
row h over the columns of W as keys *and* values, minus one column. So, as in FlashAttention (Dao et
al. 2022, arXiv 2205.14135), the sum over v is kept unnormalized beside a running maximum and sum of
exponentials, and the logits need not be computed twice. That makes two products, 2 x 2 W D V
FLOPs; normalizing first (as Liger, arXiv 2410.10989, or Cut Cross-Entropy, arXiv 2411.09009, do)
needs a third, or the logits in memory.

The "head dim" of this attention is D, too wide for one program. So the vocabulary is taken in
chunks of columns, with two launches each:

1. *logits*: exp(l - m) of the chunk, rounded to the head's dtype, where m is each row's maximum
   within a block of columns; m and the sum of exponentials per block; the target's logit.
2. *gradient*: G := G exp(old maximum - new maximum) + sum over blocks of
   exp(m - new maximum) (exp(l - m) W^T), a product whose left operand is scaled as it is read.

Between them the maxima of the blocks are combined, in a fixed order. A chunk's exponentials are
W x C values in the head's dtype, sized to stay in L2 (the only temporary that grows with W x C);
bytes from memory are the head twice, and G in float32 twice per chunk.

The target's column is left out of both sums. With s the sum over the *other* columns and
z = log s - l_t, the loss is softplus(z) and the gradient is sigmoid(z) (G / s - w_t): both keep
their relative precision for a token that is predicted well, where p_t - 1 would cancel.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels._platform import plgpu, require_triton, triton_call
from pallas_kernels._tiles import (
    Ref,
    Tile,
    block_of_program,
    candidate_tiles,
    dot,
    load_tile,
    store_tile,
    tuned,
    warps_and_stages,
)

_CHUNK_VALUES = 8 * 2**20
_MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class Config:
    """What is fixed when the launches are compiled.

    Attributes:
      chunk: Columns of the vocabulary that are taken together; a multiple of `logits.block_n`.
      logits: Tile of the first product; not split.
      gradient: Tile of the second; its `block_k` divides `logits.block_n`.
    """

    chunk: int
    logits: Tile
    gradient: Tile

    def __post_init__(self) -> None:
        assert self.chunk % self.logits.block_n == 0 and self.logits.splits == 1
        assert self.logits.block_n % self.gradient.block_k == 0


def choose_config(num_rows: int, dim: int, num_columns: int, dtype: Any) -> Config:
    """Config for these shapes: measured if `tuned.json` has them, else predicted."""
    record = tuned("linear_cross_entropy", signature(num_rows, dim, num_columns, dtype))
    if record is not None:
        return config_of_record(record)
    return candidate_configs(num_rows, dim, num_columns, dtype)[0]


def candidate_configs(num_rows: int, dim: int, num_columns: int, dtype: Any) -> list[Config]:
    """Configs worth measuring, the one predicted to be fastest first."""
    is_aligned = dim % 8 == 0 and num_columns % 8 == 0
    options = {"is_aligned": is_aligned, "max_splits": 1}
    configs = []
    for logits in candidate_tiles(num_rows, [num_columns], dim, dtype, **options):
        chunk = chunk_columns(num_rows, num_columns, logits.block_n)
        for gradient in candidate_tiles(num_rows, [dim], chunk, dtype, is_aligned=is_aligned):
            block_k = min(gradient.block_k, logits.block_n)
            configs.append(Config(chunk, logits, dataclasses.replace(gradient, block_k=block_k)))
    return configs


def chunk_columns(num_rows: int, num_columns: int, block: int) -> int:
    """Columns per chunk: near `_CHUNK_VALUES` exponentials, chunks of about equal size."""
    num_blocks = pl.cdiv(num_columns, block)
    most = max(1, _CHUNK_VALUES // (num_rows * block))
    return pl.cdiv(num_blocks, pl.cdiv(num_blocks, most)) * block


def signature(num_rows: int, dim: int, num_columns: int, dtype: Any) -> str:
    """Spelling of static shapes and dtype, the key of `tuned.json`."""
    return f"{jnp.dtype(dtype)} {num_rows}:{dim}>{num_columns}"


def config_of_record(record: dict[str, Any]) -> Config:
    """Config from its JSON form, see `record_of_config`."""
    return Config(record["chunk"], Tile(*record["logits"]), Tile(*record["gradient"]))


def record_of_config(config: Config) -> dict[str, Any]:
    """JSON form of a config: tiles as [block_m, block_n, block_k, splits]."""
    tiles = {"logits": config.logits, "gradient": config.gradient}
    lists = {name: list(dataclasses.astuple(tile)) for name, tile in tiles.items()}
    return {"chunk": config.chunk, **lists}


@dataclasses.dataclass(frozen=True)
class _Shapes:
    """Static sizes of a chunk's launches.

    Attributes:
      num_rows: W.
      dim: D.
      columns: Columns of this chunk, a multiple of the logits' block.
      limit: V if the chunk may reach beyond it, else None.
      transposed_head: Whether the head is [V, D].
    """

    num_rows: int
    dim: int
    columns: int
    limit: int | None
    transposed_head: bool


def linear_cross_entropy(
    hidden: Float[Array, "W D"],
    lm_head: Float[Array, "_ _"],
    targets: Int[Array, "W"],
    *,
    transposed_head: bool = False,
    config: Config | None = None,
) -> tuple[Float[Array, ""], Float[Array, "W D"]]:
    """See `api.linear_cross_entropy`; `config` None takes the tuned one, or a predicted one."""
    require_triton("linear_cross_entropy")
    if hidden.dtype != lm_head.dtype:
        raise NotImplementedError(
            "linear_cross_entropy in Triton needs operands of one dtype; got "
            f"{hidden.dtype}, {lm_head.dtype}."
        )
    (num_rows, dim), num_columns = hidden.shape, lm_head.shape[0 if transposed_head else 1]
    if config is None:
        config = choose_config(num_rows, dim, num_columns, hidden.dtype)
    block = config.logits.block_n
    num_chunks, rest = divmod(num_columns, config.chunk)
    targets = targets.astype(jnp.int32)

    def chunk(index, carry, columns=config.chunk, limit=None):
        shapes = _Shapes(num_rows, dim, columns, limit, transposed_head)
        first = jnp.asarray(index, jnp.int32).reshape(1)
        return _chunk(shapes, config, first, hidden, lm_head, targets, carry)

    zeros = jnp.zeros((num_rows,), jnp.float32)
    gradient = jnp.zeros((config.gradient.splits, num_rows, dim), jnp.float32)
    carry = (jnp.full_like(zeros, _MASKED), zeros, zeros, gradient)
    if num_chunks:
        carry = lax.fori_loop(0, num_chunks, chunk, carry) if num_chunks > 1 else chunk(0, carry)
    if rest:
        carry = chunk(num_chunks, carry, pl.cdiv(rest, block) * block, num_columns)
    maximum, total, target_logit, gradient = carry

    counts = targets >= 0
    # Zero only if the vocabulary is the target alone: then the loss is 0, not NaN.
    total = jnp.where(total > 0, total, jnp.finfo(jnp.float32).tiny)
    z = maximum + jnp.log(total) - target_logit
    loss = jnp.where(counts, jax.nn.softplus(z), 0.0).sum()
    at = jnp.maximum(targets, 0)
    wanted = lm_head[at] if transposed_head else lm_head[:, at].T
    mean = gradient.sum(0) / total[:, None]
    d_hidden = jax.nn.sigmoid(z)[:, None] * (mean - wanted.astype(jnp.float32))
    return loss, jnp.where(counts[:, None], d_hidden, 0.0)


def _chunk(
    shapes: _Shapes,
    config: Config,
    index: Array,
    hidden: Array,
    lm_head: Array,
    targets: Array,
    carry: tuple[Array, Array, Array, Array],
) -> tuple[Array, Array, Array, Array]:
    """Adds a chunk of columns to (maximum, sum, target's logit, gradient) of the rows.

    index: [1], chunks of `config.chunk` columns that come before.
    """
    maximum, total, target_logit, gradient = carry
    exps, stats = _logits_call(shapes, config, hidden.dtype)(index, hidden, lm_head, targets)
    maxima, sums, picked = stats
    new_maximum = jnp.maximum(maximum, maxima.max(0))
    decay = jnp.exp(maximum - new_maximum)
    scales = jnp.exp(maxima - new_maximum[None, :])
    total = total * decay + (sums * scales).sum(0)
    gradient = _gradient_call(shapes, config)(index, exps, scales, decay, lm_head, gradient)
    return new_maximum, total, target_logit + picked.sum(0), gradient


def _logits_call(shapes: _Shapes, config: Config, dtype: Any):
    tile = config.logits
    num_blocks = shapes.columns // tile.block_n
    num_warps, num_stages = warps_and_stages(tile)
    return triton_call(
        functools.partial(_logits_kernel, shapes=shapes, tile=tile, chunk=config.chunk),
        [
            jax.ShapeDtypeStruct((shapes.num_rows, shapes.columns), dtype),
            jax.ShapeDtypeStruct((3, num_blocks, shapes.num_rows), jnp.float32),
        ],
        grid=(tile.num_programs(shapes.num_rows, shapes.columns),),
        name="linear_cross_entropy_logits",
        num_warps=num_warps,
        num_stages=num_stages,
    )


def _gradient_call(shapes: _Shapes, config: Config):
    tile = config.gradient
    num_warps, num_stages = warps_and_stages(tile)
    return triton_call(
        functools.partial(_gradient_kernel, shapes=shapes, config=config),
        jax.ShapeDtypeStruct((tile.splits, shapes.num_rows, shapes.dim), jnp.float32),
        grid=(tile.num_programs(shapes.num_rows, shapes.dim),),
        name="linear_cross_entropy_gradient",
        num_warps=num_warps,
        num_stages=num_stages,
        input_output_aliases={5: 0},
    )


def _load_head(
    lm_head_ref: Ref, shapes: _Shapes, d: Any, v: Any, block_d: int, block_v: int
) -> Array:
    """Loads a tile of the head as it lies: [d, v], or [v, d] if transposed."""
    if shapes.transposed_head:
        limits = (shapes.limit, shapes.dim)
        return load_tile(lm_head_ref, (), (v, d), (block_v, block_d), limits)
    return load_tile(lm_head_ref, (), (d, v), (block_d, block_v), (shapes.dim, shapes.limit))


def _load_row_values(ref: Ref, index: tuple[Any, ...], row: Any, block: int, num_rows: int, other):
    """Loads one value per row: the last axis of `ref`, from `row` on."""
    if num_rows % block == 0:
        return plgpu.load(ref.at[(*index, pl.ds(row, block))])
    rows = row + jnp.arange(block, dtype=jnp.int32)
    return plgpu.load(ref.at[(*index, rows)], mask=rows < num_rows, other=other)


def _logits_kernel(
    index_ref,
    hidden_ref,
    lm_head_ref,
    targets_ref,
    exps_ref,
    stats_ref,
    *,
    shapes: _Shapes,
    tile: Tile,
    chunk: int,
):
    # index_ref: [1] int32; hidden_ref: [W, D]; lm_head_ref: [D, V] or [V, D]; targets_ref: [W]
    # exps_ref: [W, C]; stats_ref: [3, C / block_n, W] float32
    num_rows, columns = shapes.num_rows, shapes.columns
    num_m, num_n = pl.cdiv(num_rows, tile.block_m), columns // tile.block_n
    m, n = block_of_program(pl.program_id(0), num_m, num_n)
    row, column = m * tile.block_m, n * tile.block_n
    first = index_ref[0] * chunk + column

    def body(step, logits):
        k = step * tile.block_k
        block = (tile.block_m, tile.block_k)
        hidden = load_tile(hidden_ref, (), (row, k), block, (num_rows, shapes.dim))
        head = _load_head(lm_head_ref, shapes, k, first, tile.block_k, tile.block_n)
        return logits + dot(hidden, head, transposed=shapes.transposed_head)

    zeros = jnp.zeros((tile.block_m, tile.block_n), jnp.float32)
    logits = lax.fori_loop(0, pl.cdiv(shapes.dim, tile.block_k), body, zeros)

    targets = _load_row_values(targets_ref, (), row, tile.block_m, num_rows, -1)
    tokens = first + jnp.arange(tile.block_n, dtype=jnp.int32)
    is_target = tokens[None, :] == targets[:, None]
    picked = jnp.sum(jnp.where(is_target, logits, 0.0), axis=1)
    is_other = jnp.logical_not(is_target)
    if shapes.limit is not None and shapes.limit % tile.block_n:
        is_other &= tokens[None, :] < shapes.limit
    others = jnp.where(is_other, logits, _MASKED)
    # Above what masks: a block without other columns has exponentials of zero, not of one.
    maximum = jnp.maximum(jnp.max(others, axis=1), 0.5 * _MASKED)
    exps = jnp.exp(others - maximum[:, None])
    store_tile(exps_ref, (), (row, column), (num_rows, None), exps)
    rows = row + jnp.arange(tile.block_m, dtype=jnp.int32)
    mask = rows < num_rows if num_rows % tile.block_m else None
    for index, values in enumerate((maximum, jnp.sum(exps, axis=1), picked)):
        plgpu.store(stats_ref.at[index, n, rows], values, mask=mask)


def _gradient_kernel(
    index_ref,
    exps_ref,
    scales_ref,
    decay_ref,
    lm_head_ref,
    acc_ref,
    out_ref,
    *,
    shapes: _Shapes,
    config: Config,
):
    # index_ref: [1] int32; exps_ref: [W, C]; scales_ref: [C / block_n, W] float32
    # decay_ref: [W] float32; lm_head_ref: [D, V] or [V, D]
    # acc_ref, out_ref: [splits, W, D] float32, aliased
    tile, num_rows = config.gradient, shapes.num_rows
    num_m, num_n = pl.cdiv(num_rows, tile.block_m), pl.cdiv(shapes.dim, tile.block_n)
    split = lax.div(pl.program_id(0), num_m * num_n)
    m, n = block_of_program(lax.rem(pl.program_id(0), num_m * num_n), num_m, num_n)
    row, d = m * tile.block_m, n * tile.block_n
    first = index_ref[0] * config.chunk
    steps = shapes.columns // tile.block_k
    steps_per_scale = config.logits.block_n // tile.block_k

    def body(step, total):
        v = step * tile.block_k
        block = (tile.block_m, tile.block_k)
        exps = load_tile(exps_ref, (), (row, v), block, (num_rows, None))
        at = (lax.div(step, steps_per_scale),)
        scale = _load_row_values(scales_ref, at, row, tile.block_m, num_rows, 0.0)
        exps = (exps.astype(jnp.float32) * scale[:, None]).astype(exps.dtype)
        head = _load_head(lm_head_ref, shapes, d, first + v, tile.block_n, tile.block_k)
        return total + dot(exps, head, transposed=not shapes.transposed_head)

    decay = _load_row_values(decay_ref, (), row, tile.block_m, num_rows, 0.0)
    block, limits = (tile.block_m, tile.block_n), (num_rows, shapes.dim)
    total = load_tile(acc_ref, (split,), (row, d), block, limits) * decay[:, None]
    start, stop = lax.div(split * steps, tile.splits), lax.div((split + 1) * steps, tile.splits)
    total = lax.fori_loop(start, stop, body, total)
    store_tile(out_ref, (split,), (row, d), limits, total)
