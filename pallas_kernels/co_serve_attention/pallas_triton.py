"""Decode, ragged attention and attention backward of a window in one Pallas-Triton launch.

The bodies are those of `paged_attention` and `window_attention_backward`; this file gives each
program of one grid its body. Blocks start in the order of their program ids, so the order decides
what runs beside what, and when the launch ends:

- Products (dQ, ragged rows, dK/dV) are bound by arithmetic, decode by memory. Decode programs are
  spread evenly among the others, so that at any time both kinds run on the same multiprocessor and
  neither the tensor cores nor the memory wait for a phase of the launch to end.
- Among the products, long programs come first: dQ and ragged programs walk a whole context, with
  three and two products a block; dK/dV programs walk the rows of the window alone. What is still
  running when the last program has started is then short, and the tail with it.

All bodies share the number of warps, and each holds the registers and the shared memory of the
largest. That is the price of fusing: decode alone would let more programs into a multiprocessor.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import _platform
from pallas_kernels.co_serve_attention.types import ChunkRows, CoServed, DecodeRows, WindowRows
from pallas_kernels.paged_attention import pallas_triton as forward
from pallas_kernels.window_attention_backward import pallas_triton as backward


class Tilings(NamedTuple):
    """Block sizes of the parts, None for those that are absent; one number of warps for all."""

    decode: Any  # forward.Tiling
    chunk: Any  # forward.Tiling
    window: Any  # backward.Tiling

    @property
    def num_warps(self) -> int:
        """Warps of every program."""
        return max(tiling.num_warps for tiling in self if tiling is not None)

    @property
    def num_stages(self) -> int:
        """Loop iterations whose loads are in flight, in every program."""
        return min(tiling.num_stages for tiling in self if tiling is not None)


class Inputs(NamedTuple):
    """Operands of the parts, None for those that are absent; arrays outside, refs inside."""

    decode: Any  # forward.DecodeInputs
    chunk: Any  # forward.RaggedInputs
    window: Any  # backward.Inputs


class Outputs(NamedTuple):
    """Results of the parts; shapes outside, refs inside. A pair is outputs and log-sum-exps."""

    decode: Any  # [splits, B, N, H], [splits, B, N]
    chunk: Any  # [splits, T, N, H], [splits, T, N]
    window: Any  # backward.Outputs


@dataclasses.dataclass(frozen=True)
class Grid:
    """How many programs each part has, in the order of `run_program`.

    Attributes:
      num_kv_heads: K.
      decode_rows: B; 0 for an absent part, here and below.
      chunk_tiles: Tiles of chunk rows.
      window: Static shape of the window.
      tilings: Block sizes.
    """

    num_kv_heads: int
    decode_rows: int
    chunk_tiles: int
    window: Any  # backward.Shape
    tilings: Tilings

    @property
    def num_decode(self) -> int:
        """Decode programs."""
        return self._count(self.decode_rows, self.tilings.decode)

    @property
    def num_chunk(self) -> int:
        """Programs of chunk rows."""
        return self._count(self.chunk_tiles, self.tilings.chunk)

    @property
    def num_dq(self) -> int:
        """Programs that compute dQ."""
        return 0 if self.window is None else self.window.num_dq_programs

    @property
    def num_dkv(self) -> int:
        """Programs that compute dK and dV."""
        return 0 if self.window is None else self.window.num_dkv_programs

    @property
    def num_products(self) -> int:
        """All that are not decode."""
        return self.num_dq + self.num_chunk + self.num_dkv

    def place(
        self, index: jax.Array, num_tiles: int, tiling: forward.Tiling
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Tile, KV head and split of a forward program: heads fastest, last tiles first."""
        rest, head = lax.div(index, self.num_kv_heads), lax.rem(index, self.num_kv_heads)
        tile, split = lax.div(rest, tiling.num_splits), lax.rem(rest, tiling.num_splits)
        return num_tiles - 1 - tile, head, split

    def _count(self, tiles: int, tiling: forward.Tiling | None) -> int:
        return 0 if tiling is None else tiles * self.num_kv_heads * tiling.num_splits


def default_tilings(
    k_pool: Float[Array, "L P Z K H"],
    decode: DecodeRows | None,
    chunk: ChunkRows | None,
    window: WindowRows | None,
    *,
    sm_scale: float,
    sliding_window: int | None,
) -> Tilings:
    """Block sizes under which no part needs more registers than the window's."""
    dtype, num_kv_heads = k_pool.dtype, k_pool.shape[3]
    options = {"sm_scale": sm_scale, "sliding_window": sliding_window}
    decode_tiling = chunk_tiling = window_tiling = None
    if decode is not None:
        pages = decode.page_table.shape[1]
        decode_tiling = forward.decode_tiling(decode.q.shape, k_pool.shape, pages, dtype, **options)
    if chunk is not None:
        pages = chunk.page_list.pages.size
        chunk_tiling = forward.ragged_tiling(chunk.q.shape, k_pool.shape, pages, dtype, **options)
        if window is not None or decode is not None:
            # Four warps are what the other parts take, and shared memory for two programs on a
            # multiprocessor is what the window leaves.
            chunk_tiling = dataclasses.replace(
                chunk_tiling,
                block_rows=min(chunk_tiling.block_rows, 64),
                block_keys=min(chunk_tiling.block_keys, 64),
                num_warps=min(chunk_tiling.num_warps, 4),
            )
    if window is not None:
        window_tiling = backward.default_tiling(
            window.q.shape[0], window.q.shape[1], num_kv_heads, window.q.shape[2], dtype
        )
    return Tilings(decode_tiling, chunk_tiling, window_tiling)


def interleave(program: jax.Array, num_spread: int, num_others: int) -> tuple[jax.Array, jax.Array]:
    """Spreads one kind of programs evenly among the others, both in order.

    Returns:
      Whether the program is of the kind that is spread, and its index within its kind.
    """
    total = num_spread + num_others
    before = lax.div(program * num_spread, total)
    is_spread = lax.div((program + 1) * num_spread, total) > before
    return is_spread, jnp.where(is_spread, before, program - before)


def run_program(grid: Grid, inputs: Inputs, outputs: Outputs, program: jax.Array) -> None:
    """Runs the body that a program of the grid has; see the module's docstring for the order."""
    is_decode, index = interleave(program, grid.num_decode, grid.num_products)
    begin_chunk, begin_dkv = grid.num_dq, grid.num_dq + grid.num_chunk
    shape, window = grid.window, (inputs.window, outputs.window)

    if inputs.decode is not None:

        @pl.when(is_decode)
        def _():
            tiling = grid.tilings.decode
            place = grid.place(index, grid.decode_rows, tiling)
            outs, lses = outputs.decode
            forward.decode_block(inputs.decode, outs, lses, *place, tiling)

    if inputs.window is not None:

        @pl.when(~is_decode & (index < begin_chunk))
        def _():
            backward.dq_program(shape, *window, index)

    if inputs.chunk is not None:

        @pl.when(~is_decode & (index >= begin_chunk) & (index < begin_dkv))
        def _():
            tiling = grid.tilings.chunk
            place = grid.place(index - begin_chunk, grid.chunk_tiles, tiling)
            outs, lses = outputs.chunk
            forward.ragged_block(inputs.chunk, outs, lses, *place, tiling)

    if inputs.window is not None:

        @pl.when(~is_decode & (index >= begin_dkv))
        def _():
            backward.dkv_program(shape, *window, index - begin_dkv)


def co_serve_attention(
    k_pool: Float[Array, "L P Z K H"],
    v_pool: Float[Array, "L P Z K H"],
    layer: Int[Array, ""],
    decode: DecodeRows | None,
    chunk: ChunkRows | None,
    window: WindowRows | None,
    *,
    sm_scale: float,
    sliding_window: int | None = None,
    tilings: Tilings | None = None,
) -> CoServed:
    """Attention of forward rows and attention backward of a window; see `api`.

    Block sizes are those of `tilings`, or of `default_tilings` if it is None.

    Raises:
      NotImplementedError: If the target runs no Triton kernel, the bodies cannot take the operands
        (see `paged_attention.pallas_triton.check_supported`), or there are too many programs.
    """
    for part in (decode, chunk, window):
        if part is not None:
            forward.check_supported(part.q, k_pool, v_pool)
    options = {"sm_scale": sm_scale, "sliding_window": sliding_window}
    if tilings is None:
        tilings = default_tilings(k_pool, decode, chunk, window, **options)
    pool = forward.Pool(k_pool, v_pool, layer.astype(jnp.int32).reshape(1))
    inputs, outputs = Inputs(None, None, None), Outputs(None, None, None)
    chunk_tiles, shape = 0, None
    if decode is not None:
        operands = forward.DecodeInputs(decode.q, pool, decode.page_table, decode.positions)
        inputs = inputs._replace(decode=operands)
        outputs = outputs._replace(decode=_split_shapes(tilings.decode, decode.q))
    if chunk is not None:
        bounds = forward.tile_bounds(
            chunk.page_list, chunk.segments, chunk.positions, tilings.chunk
        )
        chunk_tiles = tilings.chunk.num_tiles(chunk.q.shape[0])
        operands = forward.RaggedInputs(
            chunk.q, pool, *chunk.page_list[:3], chunk.segments, chunk.positions, bounds
        )
        inputs = inputs._replace(chunk=operands)
        outputs = outputs._replace(chunk=_split_shapes(tilings.chunk, chunk.q))
    if window is not None:
        shape, operands = backward.prepare(
            *window[:4], k_pool, v_pool, *window[4:8], *window[10:],
            **options, tiling=tilings.window,
        )  # fmt: skip
        inputs = inputs._replace(window=operands)
        shapes = backward.output_shapes(shape, window.q, window.dk_acc)
        outputs = outputs._replace(window=shapes)
    num_rows = 0 if decode is None else decode.q.shape[0]
    grid = Grid(k_pool.shape[3], num_rows, chunk_tiles, shape, tilings)
    accs = () if window is None else (window.dk_acc, window.dv_acc)
    results = _launch(grid, inputs, outputs, accs)

    served = CoServed(None, None, None, None, None, None)
    if decode is not None:
        outs, lses = results.decode
        out, _ = forward.combine_splits(outs, lses, decode.q.dtype)
        served = served._replace(decode_out=out)
    if chunk is not None:
        outs, lses = results.chunk
        out, lse = forward.combine_splits(outs, lses, chunk.q.dtype)
        served = served._replace(chunk_out=out, chunk_lse=lse)
    if window is not None:
        dq, dk_acc, dv_acc = results.window
        served = served._replace(dq=dq.sum(0), dk_acc=dk_acc, dv_acc=dv_acc)
    return served


def _split_shapes(
    tiling: forward.Tiling, q: jax.Array
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """What the splits of a forward part write; partial outputs stay in float32."""
    dtype = q.dtype if tiling.num_splits == 1 else jnp.float32
    return (
        jax.ShapeDtypeStruct((tiling.num_splits, *q.shape), dtype),
        jax.ShapeDtypeStruct((tiling.num_splits, *q.shape[:2]), jnp.float32),
    )


def _launch(grid: Grid, inputs: Inputs, outputs: Outputs, accs: tuple[jax.Array, ...]) -> Outputs:
    """Runs all programs; `accs` are the buffers of the last outputs."""
    num_programs = grid.num_decode + grid.num_products
    if num_programs * grid.num_decode >= 2**31:
        raise NotImplementedError(
            f"co_serve_attention in Triton counts programs in 32 bits; {grid.num_decode} of decode "
            f"and {grid.num_products} others are too many."
        )
    leaves, in_structure = jax.tree.flatten(inputs)
    shapes, out_structure = jax.tree.flatten(outputs)
    # The parts share the pool, which is passed once.
    operands = list({id(leaf): leaf for leaf in leaves}.values())
    where = {id(operand): index for index, operand in enumerate(operands)}
    at = [where[id(leaf)] for leaf in leaves]

    def co_serve_attention(*refs):
        inputs = jax.tree.unflatten(in_structure, [refs[index] for index in at])
        outputs = jax.tree.unflatten(out_structure, refs[len(operands) + len(accs) :])
        run_program(grid, inputs, outputs, pl.program_id(0))

    results = _platform.triton_call(
        co_serve_attention,
        shapes,
        grid=(num_programs,),
        name="co_serve_attention",
        num_warps=grid.tilings.num_warps,
        num_stages=grid.tilings.num_stages,
        input_output_aliases={
            len(operands) + index: len(shapes) - len(accs) + index for index in range(len(accs))
        },
    )(*operands, *accs)
    return jax.tree.unflatten(out_structure, results)
