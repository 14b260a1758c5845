"""The attention backward on the CPU, by LLVM: the call of what `llvm_code` writes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._llvm import require_llvm
from pallas_kernels.paged_attention.types import PageList

_DK_ACC, _DV_ACC = 15, 16  # arguments


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
) -> tuple[Float[Array, "W N H"], Float[Array, "l p Z K H"], Float[Array, "l p Z K H"]]:
    """Backward of `ragged_attention` for the rows of one window; see `api`.

    A number that is not finite shows in what sees it, and in nothing else.
    """
    floats = {"q": q, "out": out, "lse": lse, "d_out": d_out, "k_pool": k_pool, "v_pool": v_pool}
    require_llvm("window_attention_backward", **floats, dk_acc=dk_acc, dv_acc=dv_acc)
    from pallas_kernels._llvm.compile import call
    from pallas_kernels.paged_attention.llvm_shapes import Attention
    from pallas_kernels.window_attention_backward import llvm_code

    spec = Attention.of(q, k_pool, page_list.pages.shape[0], sm_scale, sliding_window)
    splits = llvm_code.num_splits(spec)
    places = (layer, page_list.num_pages, *page_list[:3], row_segments, row_positions)
    ints = [array.astype(jnp.int32) for array in (*places, acc_layer, acc_pages)]
    dq, dk_acc, dv_acc = call(
        "window_attention_backward",
        (spec,),
        llvm_code.window_attention_backward(spec, dk_acc.shape[1]),
        [
            jax.ShapeDtypeStruct((splits, *q.shape), jnp.float32),
            jax.ShapeDtypeStruct(dk_acc.shape, jnp.float32),
            jax.ShapeDtypeStruct(dv_acc.shape, jnp.float32),
        ],
        (*floats.values(), *ints, dk_acc, dv_acc),
        num_tasks=splits * spec.num_kv_heads,
        aliases={_DK_ACC: 1, _DV_ACC: 2},
    )
    return dq[0] if splits == 1 else dq.sum(0), dk_acc, dv_acc
