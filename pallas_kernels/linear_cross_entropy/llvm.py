"""lm_head and summed token loss on the CPU, in one pass over the head: calls of `llvm_code`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._llvm import require_llvm

_BLOCK_ROWS = 512
"""Rows of a pass over the head: a panel of it, once packed, is multiplied with all of them."""


def linear_cross_entropy(
    hidden: Float[Array, "W D"],
    lm_head: Float[Array, "_ _"],
    targets: Int[Array, "W"],
    *,
    transposed_head: bool = False,
) -> tuple[Float[Array, ""], Float[Array, "W D"]]:
    """Summed loss and its gradient at the hidden rows; see `api.linear_cross_entropy`."""
    require_llvm("linear_cross_entropy", hidden=hidden, lm_head=lm_head)
    num_rows = hidden.shape[0]
    num_blocks = max(-(-num_rows // _BLOCK_ROWS), 1)
    block_rows = -(-num_rows // num_blocks)
    targets = targets.astype(jnp.int32)
    if num_blocks == 1:
        return _block(hidden, lm_head, targets, transposed_head)
    padding = num_blocks * block_rows - num_rows
    rows = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(num_blocks, block_rows, -1)
    wanted = jnp.pad(targets, (0, padding), constant_values=-1).reshape(num_blocks, block_rows)
    losses, d_hidden = jax.lax.map(
        lambda args: _block(args[0], lm_head, args[1], transposed_head), (rows, wanted)
    )
    return losses.sum(), d_hidden.reshape(-1, hidden.shape[1])[:num_rows]


def _block(
    hidden: Array, lm_head: Array, targets: Array, transposed_head: bool
) -> tuple[Array, Array]:
    from pallas_kernels._llvm.compile import call
    from pallas_kernels.linear_cross_entropy import llvm_code

    num_rows, dim = hidden.shape
    vocab = lm_head.shape[0 if transposed_head else 1]
    sizes = llvm_code.Sizes(num_rows, dim, vocab, transposed_head)

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    rows, splits = sizes.padded_rows, sizes.num_splits
    packed, order, wanted, count = call(
        "linear_cross_entropy_rows",
        (sizes,),
        llvm_code.gather_rows(sizes),
        [array(rows * dim), integers(num_rows), integers(rows), integers(1)],
        [hidden, targets],
        num_tasks=sizes.num_panels,
    )
    maxima, sums, picked, d_rows, target_columns, _ = call(
        "linear_cross_entropy_vocabulary",
        (sizes,),
        llvm_code.sweep_vocabulary(sizes),
        [
            array(splits, rows),
            array(splits, rows),
            array(rows),
            array(splits, rows * sizes.padded_dim),
            array(rows, sizes.padded_dim),
            array(splits, sizes.packed_size),
        ],
        [packed, wanted, count, lm_head],
        num_tasks=splits,
    )
    d_hidden, totals, shifts = call(
        "linear_cross_entropy_total",
        (sizes,),
        llvm_code.combine(sizes),
        [array(num_rows, dim), array(num_rows), array(num_rows)],
        [order, wanted, count, maxima, sums, picked, d_rows, target_columns],
        num_tasks=sizes.num_panels,
    )
    return (jnp.log(totals) + shifts).sum(), d_hidden
