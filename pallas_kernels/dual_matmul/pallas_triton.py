"""Products with stacked weights in Pallas for Triton, both directions in one launch.

Every result is a sum of terms, each a product with a kernel of a stack, taken as it is or
transposed: a forward result has one term, the input gradient one per linear. A program computes a
block of one result: it walks the K axis of its terms and keeps one float32 sum in registers.

**Order.** The forward side of a mixed step has few rows and is bound by reading weights; the
backward side is bound by arithmetic. Programs of the two are spread evenly over the launch, so that
at any time every multiprocessor has some of both (the idea of POD-Attention, arXiv 2410.18038, for
matrix products). Within a result, row blocks that share a block of the weights run side by side.

**Few rows.** A result of 64 rows or fewer has too few blocks to fill the chip and keep enough reads
under way. Its K axis is split among programs; the partial sums are results of the launch and are
added outside in a fixed order, where the compiler fuses the addition into what comes next.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels._platform import require_triton, triton_call
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

Aval = Array | jax.ShapeDtypeStruct
"""Something with a shape and a dtype."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What is fixed when a launch is compiled.

    Attributes:
      forward: Tile of the forward results; None without them.
      backward: Tile of the backward result; None without it.
      num_warps: Warps of a program.
      num_stages: Loop iterations whose loads are in flight.
    """

    forward: Tile | None
    backward: Tile | None
    num_warps: int
    num_stages: int


class _Term(NamedTuple):
    """A product that is added to a result.

    Attributes:
      rows: Left operand, [M, K].
      kernels: Stack of right operands: [L, K, N], or [L, N, K] if `transposed`.
      transposed: Whether the kernel is multiplied transposed.
    """

    rows: Any
    kernels: Any
    transposed: bool


class _Result(NamedTuple):
    """A result, [M, N]: its terms and what it starts from."""

    terms: tuple[_Term, ...]
    acc: Any
    shape: tuple[int, int]


def dual_matmul(
    x: Array | None,
    kernels: tuple[Array, ...],
    layer: Array | None,
    d_ys: tuple[Array, ...],
    d_kernels: tuple[Array, ...],
    d_layer: Array | None,
    *,
    accs: tuple[Array | None, ...],
    d_acc: Array | None,
    out_dtype: Any,
    config: Config | None = None,
) -> tuple[tuple[Array, ...], Array | None]:
    """See `api.dual_matmul`; `config` None takes the tuned one, or a predicted one."""
    require_triton("dual_matmul")
    _require_one_dtype(x, *kernels, *d_ys, *d_kernels)
    if config is None:
        adds = (any(acc is not None for acc in accs), d_acc is not None)
        config = choose_config(x, kernels, d_ys, d_kernels, adds)
    forward = [
        _Result((_Term(x, kernel, False),), acc, (x.shape[0], kernel.shape[2]))
        for kernel, acc in zip(kernels, accs, strict=True)
        if x is not None
    ]
    backward = []
    if d_kernels:
        terms = tuple(_Term(*pair, True) for pair in zip(d_ys, d_kernels, strict=True))
        shape = (d_ys[0].shape[0], d_kernels[0].shape[1])
        backward = [_Result(terms, d_acc, shape)]
    layers = [at.astype(jnp.int32).reshape(1) for at in (layer, d_layer) if at is not None]
    outs = _launch(forward, backward, layers, config, out_dtype)
    return tuple(outs[: len(kernels)]), outs[-1] if d_kernels else None


def choose_config(
    x: Aval | None,
    kernels: Sequence[Aval],
    d_ys: Sequence[Aval],
    d_kernels: Sequence[Aval],
    adds: tuple[bool, bool] = (False, False),
) -> Config:
    """Config for these shapes: measured if `tuned.json` has them, else predicted.

    Args:
      x: As in `dual_matmul`, like all but the last.
      kernels: Forward kernels.
      d_ys: Gradients.
      d_kernels: Backward kernels.
      adds: Whether the forward side, and the backward side, start from something.
    """
    record = tuned("dual_matmul", signature(x, kernels, d_ys, d_kernels, adds))
    if record is not None:
        return config_of_record(record)
    return candidate_configs(x, kernels, d_ys, d_kernels, adds)[0]


def candidate_configs(
    x: Aval | None,
    kernels: Sequence[Aval],
    d_ys: Sequence[Aval],
    d_kernels: Sequence[Aval],
    adds: tuple[bool, bool] = (False, False),
) -> list[Config]:
    """Configs worth measuring, the one predicted to be fastest first; see `choose_config`."""
    forward: list[Tile | None] = [None]
    backward: list[Tile | None] = [None]
    if x is not None:
        widths = [kernel.shape[2] for kernel in kernels]
        forward = [*candidate_tiles(x.shape[0], widths, x.shape[1], x.dtype)]
    if d_ys:
        depth = sum(d_y.shape[1] for d_y in d_ys)
        widths = [d_kernels[0].shape[1]]
        backward = [*candidate_tiles(d_ys[0].shape[0], widths, depth, d_ys[0].dtype)]
    if x is not None and d_ys:
        forward = _without_largest(forward) if adds[0] else forward
        backward = _without_largest(backward) if adds[1] else backward
    configs = []
    # The sum of both ranks orders the pairs: the predicted pair first, near misses next.
    pairs = itertools.product(enumerate(forward), enumerate(backward))
    for (_, first), (_, second) in sorted(pairs, key=lambda pair: pair[0][0] + pair[1][0]):
        tiles = [tile for tile in (first, second) if tile is not None]
        warps, stages = warps_and_stages(*tiles)
        configs.append(Config(first, second, warps, stages))
    return configs


def _without_largest(tiles: list[Tile | None]) -> list[Tile | None]:
    """Tiles whose sum leaves registers for what it starts from, in a launch that holds both sides.

    With the largest, such a launch spills about 180 bytes on sm_90a.
    """
    fitting = [tile for tile in tiles if tile and tile.block_m * tile.block_n <= 128 * 128]
    return [*fitting] or tiles


def signature(
    x: Aval | None,
    kernels: Sequence[Aval],
    d_ys: Sequence[Aval],
    d_kernels: Sequence[Aval],
    adds: tuple[bool, bool] = (False, False),
) -> str:
    """Spelling of static shapes and dtype, the key of `tuned.json`: rows:depths>widths.

    A side that starts from something has a "+".
    """

    def side(rows, depths, widths) -> str:
        return f"{rows}:{','.join(map(str, depths))}>{','.join(map(str, widths))}"

    parts = []
    if x is not None:
        widths = [kernel.shape[2] for kernel in kernels]
        parts.append("+" * adds[0] + side(x.shape[0], [x.shape[1]], widths))
    if d_ys:
        depths = [d_y.shape[1] for d_y in d_ys]
        widths = [d_kernels[0].shape[1]]
        parts.append("+" * adds[1] + "T" + side(d_ys[0].shape[0], depths, widths))
    dtype = (d_ys[0] if x is None else x).dtype
    return f"{dtype} {' '.join(parts)}"


def config_of_record(record: dict[str, Any]) -> Config:
    """Config from its JSON form, see `record_of_config`."""
    forward, backward = (
        None if record[side] is None else Tile(*record[side]) for side in ("forward", "backward")
    )
    return Config(forward, backward, record["num_warps"], record["num_stages"])


def record_of_config(config: Config) -> dict[str, Any]:
    """JSON form of a config: tiles as [block_m, block_n, block_k, splits]."""
    record = dataclasses.asdict(config)
    for side in ("forward", "backward"):
        record[side] = None if record[side] is None else list(record[side].values())
    return record


def _require_one_dtype(*arrays: Array | None) -> None:
    dtypes = sorted({str(array.dtype) for array in arrays if array is not None})
    if len(dtypes) > 1 or dtypes[0] not in ("bfloat16", "float16", "float32"):
        raise NotImplementedError(
            f"dual_matmul in Triton needs operands of one float dtype; got {', '.join(dtypes)}."
        )


def _launch(
    forward: list[_Result],
    backward: list[_Result],
    layers: Sequence[Array],
    config: Config,
    out_dtype: jnp.dtype,
) -> list[Array]:
    """Runs all results in one launch; layers: [1], of each side that has results."""
    results = forward + backward
    tiles = [config.forward] * len(forward) + [config.backward] * len(backward)
    operands: list[Array] = list(layers)
    aliases: dict[int, int] = {}
    outs, refs = [], []
    for result, tile in zip(results, tiles, strict=True):
        assert tile is not None
        terms = []
        for term in result.terms:
            terms.append(_Term(len(operands), len(operands) + 1, term.transposed))
            operands += [term.rows, term.kernels]
        acc = None
        if result.acc is not None and tile.splits == 1:
            acc = len(operands)
            operands.append(result.acc)
            if out_dtype == jnp.float32:
                aliases[acc] = len(outs)
        refs.append(_Result(tuple(terms), acc, result.shape))
        is_split = tile.splits > 1
        shape = (tile.splits, *result.shape) if is_split else result.shape
        outs.append(jax.ShapeDtypeStruct(shape, jnp.float32 if is_split else out_dtype))
    kernel = functools.partial(
        _kernel,
        sides=(refs[: len(forward)], refs[len(forward) :]),
        tiles=(config.forward, config.backward),
        num_operands=len(operands),
    )
    call = triton_call(
        kernel,
        outs,
        grid=(_num_programs(forward, config.forward) + _num_programs(backward, config.backward),),
        name=_name(forward, backward),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        input_output_aliases=aliases,
    )
    finished = []
    for result, tile, out in zip(results, tiles, call(*operands), strict=True):
        if tile is not None and tile.splits > 1:
            out = out.sum(0)
            out = (out if result.acc is None else result.acc + out).astype(out_dtype)
        finished.append(out)
    return finished


def _name(forward: list[_Result], backward: list[_Result]) -> str:
    if not backward:
        return "stacked_matmul"
    return "dual_matmul" if forward else "stacked_matmul_transposed"


def _num_programs(results: Sequence[_Result], tile: Tile | None) -> int:
    return 0 if tile is None else sum(tile.num_programs(*result.shape) for result in results)


def _kernel(
    *refs: Ref,
    sides: tuple[Sequence[_Result], Sequence[_Result]],
    tiles: tuple[Tile | None, Tile | None],
    num_operands: int,
):
    # layer_refs: [1] int32, the first operands, one per side that has results
    # the other operands are found by their indices in `sides`, see `_Term` and `_Result`
    # out_refs: [M, N], or [splits, M, N] partial sums, in the order of the results
    layer_refs, out_refs = iter(refs), refs[num_operands:]
    counts = [_num_programs(side, tile) for side, tile in zip(sides, tiles, strict=True)]
    is_forward, index = _side_of_program(pl.program_id(0), *counts)
    number = 0
    for results, tile, mine in zip(sides, tiles, (is_forward, ~is_forward), strict=True):
        if tile is None:
            continue
        layer_ref, first = next(layer_refs), 0
        for result in results:
            count = tile.num_programs(*result.shape)

            @pl.when(mine & (index >= first) & (index < first + count))
            def _(result=result, tile=tile, layer_ref=layer_ref, first=first, number=number):
                terms = tuple(
                    _Term(refs[t.rows], refs[t.kernels], t.transposed) for t in result.terms
                )
                acc_ref = None if result.acc is None else refs[result.acc]
                of_refs = _Result(terms, acc_ref, result.shape)
                _block(of_refs, out_refs[number], layer_ref[0], tile, index - first)

            first += count
            number += 1


def _side_of_program(program: Any, num_forward: int, num_backward: int) -> tuple[Any, Any]:
    """Whether a program is of the forward side, and its index there: the two evenly mixed."""
    fewer, more = sorted((num_forward, num_backward))
    if fewer == 0:
        return program < num_forward, program
    period = (fewer + more) // fewer
    turn = lax.div(program, period)
    is_fewer = (lax.rem(program, period) == 0) & (program < fewer * period)
    others = program - jnp.minimum(turn + 1, fewer)
    index = jnp.where(is_fewer, turn, others)
    return is_fewer if num_forward <= num_backward else ~is_fewer, index


def _block(result: _Result, out_ref: Ref, layer: Any, tile: Tile, program: Any) -> None:
    """Computes one block of a result, or of one of its partial sums."""
    rows, columns = result.shape
    num_m, num_n = pl.cdiv(rows, tile.block_m), pl.cdiv(columns, tile.block_n)
    split = lax.div(program, num_m * num_n)
    m, n = block_of_program(lax.rem(program, num_m * num_n), num_m, num_n)
    row, column = m * tile.block_m, n * tile.block_n
    total = jnp.zeros((tile.block_m, tile.block_n), jnp.float32)
    for term in result.terms:
        total = _add_term(term, total, layer, tile, split, row, column, result.shape)
    if result.acc is not None:
        total += load_tile(
            result.acc, (), (row, column), (tile.block_m, tile.block_n), result.shape
        )
    store_tile(out_ref, (split,) * (tile.splits > 1), (row, column), result.shape, total)


def _add_term(
    term: _Term,
    total: Array,
    layer: Any,
    tile: Tile,
    split: Any,
    row: Any,
    column: Any,
    shape: tuple[int, int],
) -> Array:
    """Adds this split's part of a term to a block at (row, column) of a result."""
    rows, columns = shape
    depth = term.rows.shape[1]
    steps = pl.cdiv(depth, tile.block_k)
    first, last = 0, steps
    if tile.splits > 1:
        first = lax.div(split * steps, tile.splits)
        last = lax.div((split + 1) * steps, tile.splits)

    def body(step, total):
        k = step * tile.block_k
        a = load_tile(term.rows, (), (row, k), (tile.block_m, tile.block_k), (rows, depth))
        if term.transposed:
            start, block, limits = (column, k), (tile.block_n, tile.block_k), (columns, depth)
        else:
            start, block, limits = (k, column), (tile.block_k, tile.block_n), (depth, columns)
        b = load_tile(term.kernels, (layer,), start, block, limits)
        return total + dot(a, b, transposed=term.transposed)

    return lax.fori_loop(first, last, body, total)
