"""Paged attention on the CPU, by LLVM: calls of what `llvm_code` writes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._llvm import require_llvm
from pallas_kernels.paged_attention.types import PageList


def decode_attention(
    q: Float[Array, "B N H"],
    k_pool: Float[Array, "L P Z K H"],
    v_pool: Float[Array, "L P Z K H"],
    layer: Int[Array, ""],
    page_table: Int[Array, "B M"],
    positions: Int[Array, "B"],
    *,
    sm_scale: float,
    sliding_window: int | None = None,
) -> Float[Array, "B N H"]:
    """Attention of one query row per sequence; see `api.decode_attention`."""
    require_llvm("decode_attention", q=q, k_pool=k_pool, v_pool=v_pool)
    from pallas_kernels._llvm.compile import call, num_threads
    from pallas_kernels.paged_attention import llvm_code

    spec = llvm_code.Attention.of(q, k_pool, page_table.shape[1], sm_scale, sliding_window)
    heads = llvm_code.decode_heads(spec, num_threads())
    places = (layer, page_table, positions)
    (out,) = call(
        "decode_attention",
        (spec, heads),
        llvm_code.decode_attention(spec, heads),
        [jax.ShapeDtypeStruct(q.shape, jnp.float32)],
        (q, k_pool, v_pool, *(place.astype(jnp.int32) for place in places)),
        num_tasks=spec.num_tokens * (spec.num_kv_heads // heads),
    )
    return out


def ragged_attention(
    q: Float[Array, "T N H"],
    k_pool: Float[Array, "L P Z K H"],
    v_pool: Float[Array, "L P Z K H"],
    layer: Int[Array, ""],
    page_list: PageList,
    row_segments: Int[Array, "T"],
    row_positions: Int[Array, "T"],
    *,
    sm_scale: float,
    sliding_window: int | None = None,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """Attention of rows of several sequences; see `api.ragged_attention`.

    A value that is not finite shows in the heads that see it only.
    """
    require_llvm("ragged_attention", q=q, k_pool=k_pool, v_pool=v_pool)
    from pallas_kernels._llvm.compile import call
    from pallas_kernels.paged_attention import llvm_code

    spec = llvm_code.Attention.of(q, k_pool, page_list.pages.shape[0], sm_scale, sliding_window)
    places = (layer, page_list.num_pages, *page_list[:3], row_segments, row_positions)
    out, lse = call(
        "ragged_attention",
        (spec,),
        llvm_code.ragged_attention(spec),
        [
            jax.ShapeDtypeStruct(q.shape, jnp.float32),
            jax.ShapeDtypeStruct(q.shape[:2], jnp.float32),
        ],
        (q, k_pool, v_pool, *(place.astype(jnp.int32) for place in places)),
        num_tasks=llvm_code.forward_tile(spec)[1] * spec.num_kv_heads,
    )
    return out, lse
