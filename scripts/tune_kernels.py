"""Measures the tiles of kernels on this GPU and writes the fastest into the kernels' table.

    python scripts/tune_kernels.py [--cases llama-3.1-8b] [--limit 12] [--table FILE.json]
    python scripts/tune_kernels.py --dry-run [--compile h200]

Takes the cases of `dual_matmul` and `linear_cross_entropy`, and of each the configs that a cost
model ranks first. A config counts only if its result is within the case's tolerance of the
reference. Prints one JSON object per config. The table is `pallas_kernels/tuned.json` (data of the
package, by compute capability and shapes); records of other shapes in it stay.

`--dry-run` needs no GPU: it prints what would be measured. With `--compile`, it also compiles each
config for that device and prints registers and spilled bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import aot
from pallas_kernels._cases import Case
from pallas_kernels._platform import compile_target, target
from pallas_kernels.dual_matmul import pallas_triton as dual_matmul
from pallas_kernels.dual_matmul.cases import CASES as DUAL_MATMUL_CASES
from pallas_kernels.dual_matmul.cases import DualMatmulCase
from pallas_kernels.linear_cross_entropy import pallas_triton as cross_entropy
from pallas_kernels.linear_cross_entropy.cases import CASES as CROSS_ENTROPY_CASES
from pallas_kernels.linear_cross_entropy.cases import LinearCrossEntropyCase

TABLE = Path(cross_entropy.__file__).parents[1] / "tuned.json"
_MOST_VALUES_PER_THREAD = 128

Call = Callable[..., Any]
"""Takes a count and the case's arguments; what it computes differs with the count."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """A case with one config.

    Attributes:
      case: Shapes.
      key: Key of the shapes in the table.
      record: The config as the table spells it.
      call: The op with this config.
    """

    case: Case
    key: str
    record: dict[str, Any]
    call: Call


def dual_matmul_trials(case: DualMatmulCase) -> Iterator[Trial]:
    """Configs of a case, also with another number of warps or stages, likeliest first."""
    x, kernels, _, d_ys, d_kernels, *_ = case.avals()
    key = f"dual_matmul {dual_matmul.signature(x, kernels, d_ys, d_kernels)}"
    predicted = dual_matmul.candidate_configs(x, kernels, d_ys, d_kernels)
    variants = []
    for rank, config in enumerate(predicted):
        variants.append((rank, config))
        deeper = dataclasses.replace(config, num_stages=config.num_stages + 1)
        variants.append((rank + 2, deeper))
        other = dataclasses.replace(config, num_warps=12 - config.num_warps)
        tiles = [tile for tile in (config.forward, config.backward) if tile is not None]
        largest = max(tile.block_m * tile.block_n for tile in tiles)
        if largest <= other.num_warps * 32 * _MOST_VALUES_PER_THREAD:
            variants.append((rank + 3, other))
    for _, config in sorted(variants, key=lambda variant: variant[0]):
        record = dual_matmul.record_of_config(config)
        yield Trial(case, key, record, _dual_matmul_call(case, config))


def _dual_matmul_call(case: DualMatmulCase, config: dual_matmul.Config) -> Call:
    def call(count, x, kernels, layer, d_ys, d_kernels, d_layer, accs, d_acc):
        # Another layer each time: weights come from memory, as in a step, and not from L2.
        layer = None if layer is None else lax.rem(layer + count, case.layers)
        d_layer = None if d_layer is None else lax.rem(d_layer + count, case.layers)
        options = {"accs": accs, "d_acc": d_acc, "out_dtype": jnp.dtype(jnp.float32)}
        sides = (x, kernels, layer, d_ys, d_kernels, d_layer)
        return dual_matmul.dual_matmul(*sides, **options, config=config)

    return call


def cross_entropy_trials(case: LinearCrossEntropyCase) -> Iterator[Trial]:
    """Configs of a case, with shorter and longer chunks, likeliest first."""
    shapes = (case.rows, case.dim, case.vocab, case.dtype)
    key = f"linear_cross_entropy {cross_entropy.signature(*shapes)}"
    predicted = cross_entropy.candidate_configs(*shapes)
    for config, halvings in itertools.product(predicted, (0, 1)):
        block = config.logits.block_n
        chunk = max(1, (config.chunk // block) >> halvings) * block
        config = dataclasses.replace(config, chunk=chunk)
        record = cross_entropy.record_of_config(config)
        yield Trial(case, key, record, _cross_entropy_call(case, config))


def _cross_entropy_call(case: LinearCrossEntropyCase, config: cross_entropy.Config) -> Call:
    def call(count, hidden, lm_head, targets):
        # Other targets each time, so that the compiler cannot take the work out of the loop.
        targets = jnp.where(targets < 0, -1, lax.rem(targets + count, case.vocab))
        options = {"transposed_head": case.transposed_head, "config": config}
        return cross_entropy.linear_cross_entropy(hidden, lm_head, targets, **options)

    return call


def trials(case: Case, limit: int) -> list[Trial]:
    """The first `limit` distinct trials of a case."""
    if isinstance(case, DualMatmulCase):
        found = dual_matmul_trials(case)
    else:
        assert isinstance(case, LinearCrossEntropyCase)
        found = cross_entropy_trials(case)
    distinct = {json.dumps(trial.record): trial for trial in found}
    return list(distinct.values())[:limit]


def measured_ms(call: Call, arguments: tuple[Any, ...], calls: int, runs: int = 5) -> float:
    """Milliseconds per call: median over runs of a compiled loop of calls."""

    @jax.jit
    def loop(arguments: tuple[Any, ...]) -> Any:
        shapes = jax.eval_shape(call, jnp.int32(0), *arguments)
        zeros = jax.tree.map(lambda aval: jnp.zeros(aval.shape, aval.dtype), shapes)
        return lax.fori_loop(0, calls, lambda count, _: call(count, *arguments), zeros)

    jax.block_until_ready(loop(arguments))
    elapsed = []
    for _ in range(runs):
        started = time.perf_counter()
        jax.block_until_ready(loop(arguments))
        elapsed.append(time.perf_counter() - started)
    return 1e3 * statistics.median(elapsed) / calls


def largest_error(found: Any, expected: Any) -> float:
    """Largest difference, relative to the largest value of the array that it is in."""
    errors = []
    for result, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        largest = jnp.maximum(jnp.abs(wanted).max(), jnp.finfo(jnp.float32).tiny)
        errors.append(float(jnp.abs(result - wanted).max() / largest))
    # A NaN anywhere counts as an error, whatever the order.
    return float(np.max(errors))


def tune_case(case: Case, limit: int, calls: int) -> tuple[str, dict[str, Any]] | None:
    """Measures the trials of a case; returns the table's key and the fastest record, if any."""
    arguments = jax.tree.map(jnp.asarray, case.arrays(np.random.default_rng(0)))
    expected = jax.jit(case.function("reference"))(*arguments)
    best: tuple[str, dict[str, Any]] | None = None
    for trial in trials(case, limit):
        line = {"case": str(case), "key": trial.key, **trial.record}
        try:
            found = jax.jit(trial.call)(jnp.int32(0), *arguments)
            line["error"] = largest_error(found, expected)
            if not line["error"] <= case.tolerance:
                print(json.dumps(line | {"rejected": f"error above {case.tolerance}"}), flush=True)
                continue
            line["ms"] = measured_ms(trial.call, arguments, calls)
        except jax.errors.JaxRuntimeError as error:
            # Too many registers or too much shared memory: the compiler says so.
            print(json.dumps(line | {"rejected": str(error).splitlines()[0]}), flush=True)
            continue
        print(json.dumps(line), flush=True)
        if best is None or line["ms"] < best[1]["ms"]:
            best = trial.key, trial.record | {"ms": line["ms"]}
    return best


def write_record(table: Path, key: str, record: dict[str, Any]) -> None:
    """Puts a record into the table, under the GPU's compute capability."""
    content = json.loads(table.read_text()) if table.exists() else {}
    content.setdefault(f"sm_{target().compute_capability}", {})[key] = record
    table.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def dry_run(case: Case, limit: int, device: str | None) -> None:
    """Prints a case's trials; compiled for `device` if that is given."""
    compute_capability = 90 if device is None else aot.device(device).compute_capability
    with compile_target(compute_capability):
        planned = trials(case, limit)
    for trial in planned:
        line = {"case": str(case), "key": trial.key, **trial.record, "dry_run": True}
        if device is not None:
            avals = (jax.ShapeDtypeStruct((), jnp.int32), *case.avals())
            try:
                compiled = aot.compile_for(trial.call, avals, device=device)
            except jax.errors.JaxRuntimeError as error:
                line["rejected"] = str(error).splitlines()[0]
            else:
                line["registers"] = max(kernel.registers for kernel in compiled.kernels)
                line["spill_bytes"] = max(kernel.spill_bytes for kernel in compiled.kernels)
        print(json.dumps(line), flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default="", help="only cases whose name holds this")
    parser.add_argument("--tag", default="hot", help="only cases with this tag; '' for all")
    parser.add_argument("--limit", type=int, default=12, help="configs per case")
    parser.add_argument("--calls", type=int, default=32, help="calls per timed run")
    parser.add_argument("--table", type=Path, default=TABLE, help="table to write")
    parser.add_argument("--dry-run", action="store_true", help="measure nothing; needs no GPU")
    parser.add_argument("--compile", metavar="DEVICE", choices=aot.device_names())
    arguments = parser.parse_args()
    everything: tuple[Case, ...] = (*DUAL_MATMUL_CASES, *CROSS_ENTROPY_CASES)
    cases = [
        case
        for case in everything
        if arguments.cases in str(case) and (not arguments.tag or arguments.tag in case.tags)
    ]
    if not cases:
        parser.error("no case has such a name and tag")
    if arguments.compile and not arguments.dry_run:
        parser.error("--compile goes with --dry-run")
    if not arguments.dry_run and not target().runs_triton:
        parser.error("there is no GPU that runs Triton kernels; use --dry-run")
    for case in cases:
        if arguments.dry_run:
            dry_run(case, arguments.limit, arguments.compile)
        elif best := tune_case(case, arguments.limit, arguments.calls):
            write_record(arguments.table, *best)


if __name__ == "__main__":
    main()
