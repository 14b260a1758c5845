"""Paged attention in Pallas for Triton: decode rows and ragged rows over one pool.

Both kernels are FlashAttention-2 (Dao 2023, arXiv 2307.08691): one program holds a tile of query
rows, walks the keys once, and keeps a running maximum, sum and output in float32. Keys and values
are gathered through page indices (PagedAttention, Kwon et al. 2023, arXiv 2309.06180): a page's
index is read per key, one block ahead of use, and the head dim is contiguous, so that every warp
reads whole 128-byte lines. Query heads that share a KV head share a tile, and so every key and
value is read once per tile: the rows of a tile are *folded*, row r being query head r % G of token
r // G.

**Splitting the keys** (Flash-Decoding, Dao, Haziza, Massa, Sizov 2023). A grid of rows and KV
heads alone does not fill the chip when there are few rows, so it has a third axis of `num_splits`,
chosen from shapes alone (`tiling.py`): enough programs for every multiprocessor, and no split
shorter than a few blocks of the longest possible context. Each row's own live blocks are divided
evenly among its splits, whatever its length, so that short contexts fill the chip as well; splits
without a block end at once. A split writes its normalized output and its log-sum-exp, and a small
kernel weighs the splits of each row by exp(lse - lse of all). With one split there is no second
kernel.

**Skipping.** What a tile of ragged rows can see is worked out before the launch (`tile_bounds`): a
range of the page list, and within it the blocks that every row of the tile sees whole. The latter
need no mask, and are most of a long prompt's blocks; only blocks on the diagonal, at the edge of a
sliding window or between two sequences pay for the mask.

To put these programs into a launch of another kernel: `decode_block` and `ragged_block` are plain
functions of refs, program indices and a static `Tiling`. Choose a `Tiling` with `decode_tiling` or
`ragged_tiling`, pass whole arrays without BlockSpecs, and give as many programs as
`Tiling.num_tiles(rows)` x KV heads x `num_splits` to the function; then, when `num_splits` is above
one, call `combine_splits`.
"""

from __future__ import annotations

from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels._platform import (
    triton_call,
)
from pallas_kernels.paged_attention.bounds import tile_bounds as tile_bounds
from pallas_kernels.paged_attention.splits import combine_splits as combine_splits
from pallas_kernels.paged_attention.splits import split_shapes
from pallas_kernels.paged_attention.tiling import Tiling as Tiling
from pallas_kernels.paged_attention.tiling import decode_tiling as decode_tiling
from pallas_kernels.paged_attention.tiling import ragged_tiling as ragged_tiling
from pallas_kernels.paged_attention.triton_programs import DecodeInputs as DecodeInputs
from pallas_kernels.paged_attention.triton_programs import Pool as Pool
from pallas_kernels.paged_attention.triton_programs import RaggedInputs as RaggedInputs
from pallas_kernels.paged_attention.triton_programs import decode_block as decode_block
from pallas_kernels.paged_attention.triton_programs import ragged_block as ragged_block
from pallas_kernels.paged_attention.types import PageList

_MAX_HEAD_DIM = 256


def check_supported(q: Array, k_pool: Array, v_pool: Array) -> None:
    """Checks that these kernels can run on the operands.

    Raises:
      NotImplementedError: If dtypes differ or are not floats of 16 or 32 bits, or the head dim is
        above 256.
    """
    dtypes = {q.dtype.name, k_pool.dtype.name, v_pool.dtype.name}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16", "float32"}:
        raise NotImplementedError(
            "Paged attention in Triton needs queries, keys and values of one dtype, bfloat16, "
            f"float16 or float32; got {sorted(dtypes)}."
        )
    if q.shape[-1] > _MAX_HEAD_DIM:
        raise NotImplementedError(
            f"Paged attention in Triton needs a head dim of at most {_MAX_HEAD_DIM}; "
            f"got {q.shape[-1]}."
        )


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
    check_supported(q, k_pool, v_pool)
    tiling = decode_tiling(q.shape, k_pool.shape, page_table.shape[1], q.dtype,
                           sm_scale=sm_scale, sliding_window=sliding_window)  # fmt: skip

    def decode_attention(q, k, v, layer, page_table, positions, out, lse):
        inputs = DecodeInputs(q, Pool(k, v, layer), page_table, positions)
        # Heads of one token lie side by side in memory, and so do their programs in time.
        head, split, row = (pl.program_id(axis) for axis in range(3))
        decode_block(inputs, out, lse, row, head, split, tiling)

    outs, lses = triton_call(
        decode_attention,
        split_shapes(tiling.num_splits, q.shape, q.dtype),
        grid=(k_pool.shape[3], tiling.num_splits, q.shape[0]),
        name="decode_attention",
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )(q, k_pool, v_pool, layer.reshape(1), page_table, positions)
    return combine_splits(outs, lses, q.dtype)[0]


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
    """Attention of rows of several sequences; see `api.ragged_attention`."""
    check_supported(q, k_pool, v_pool)
    tiling = ragged_tiling(q.shape, k_pool.shape, page_list.pages.shape[0], q.dtype,
                           sm_scale=sm_scale, sliding_window=sliding_window)  # fmt: skip
    num_tiles = tiling.num_tiles(q.shape[0])

    def ragged_attention(q, k, v, layer, pages, segments, starts, row_segments, row_positions,
                         bounds, out, lse):  # fmt: skip
        inputs = RaggedInputs(q, Pool(k, v, layer), pages, segments, starts, row_segments,
                              row_positions, bounds)  # fmt: skip
        head, split, index = (pl.program_id(axis) for axis in range(3))
        # The last rows see most: what takes longest begins first.
        ragged_block(inputs, out, lse, num_tiles - 1 - index, head, split, tiling)

    outs, lses = triton_call(
        ragged_attention,
        split_shapes(tiling.num_splits, q.shape, q.dtype),
        grid=(k_pool.shape[3], tiling.num_splits, num_tiles),
        name="ragged_attention",
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )(
        q,
        k_pool,
        v_pool,
        layer.reshape(1),
        page_list.pages,
        page_list.segments,
        page_list.starts,
        row_segments,
        row_positions,
        tile_bounds(page_list, row_segments, row_positions, tiling),
    )
    return combine_splits(outs, lses, q.dtype)
