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

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import _platform
from pallas_kernels.paged_attention.pallas_triton import check_supported
from pallas_kernels.paged_attention.types import PageList
from pallas_kernels.window_attention_backward.operands import Inputs as Inputs
from pallas_kernels.window_attention_backward.operands import Outputs as Outputs
from pallas_kernels.window_attention_backward.operands import Shape as Shape
from pallas_kernels.window_attention_backward.operands import Tiling as Tiling
from pallas_kernels.window_attention_backward.operands import default_tiling as default_tiling
from pallas_kernels.window_attention_backward.operands import describe
from pallas_kernels.window_attention_backward.triton_programs import backward_program
from pallas_kernels.window_attention_backward.triton_programs import dkv_program as dkv_program
from pallas_kernels.window_attention_backward.triton_programs import dq_program as dq_program


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
