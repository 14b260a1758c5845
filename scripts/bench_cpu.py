"""Compares FlexJAX with transformers and PEFT on this CPU, side by side in one process.

    python scripts/bench_cpu.py [--repeats 5] [--output FILE.json]
        [--parts finetune,generate,coserve,bound] [--quick] [--cores 2]

Needs the `oracle` extra. `--parts bound` measures the peer and, of our side, only the products that
a step cannot do without, and prints the best ratio that there is if all else were free. `--quick`
takes seconds and a model too small for its ratios to mean anything; it shows that the script works.
Beside wall-clock times it reports the CPU seconds of the process, which say more on a machine that
others use too.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from flexjax.bench.bound import Bound, PassTime
from flexjax.bench.harness import header, table, write_jsonl
from flexjax.bench.side_by_side import TARGETS, Comparison, Settings, SideBySide
from flexjax.config import EngineConfig

PARTS = ("finetune", "generate", "coserve")
BOUND = "bound"

FULL = Settings(
    model="60m",
    engine=EngineConfig(
        max_context_len=512,
        max_running=8,
        page_size=16,
        max_adapters=4,
        max_jobs=1,
        decode_buckets=(1, 8),
        chunk_buckets=(64, 512),
        window_buckets=(512,),
        saved_activations="full",
    ),
    sample_len=512,
    batch_size=4,
    finetune_steps=2,
    prompt_len=64,
    output_len=64,
    group=8,
    coserve_requests=32,
    coserve_steps=4,
    num_threads=2,
    seed=0,
)

QUICK = Settings(
    model="quick",
    engine=EngineConfig(
        max_context_len=64,
        max_running=8,
        max_adapters=4,
        max_jobs=1,
        decode_buckets=(8,),
        chunk_buckets=(64,),
        window_buckets=(64,),
    ),
    sample_len=64,
    batch_size=2,
    finetune_steps=1,
    prompt_len=8,
    output_len=6,
    group=8,
    coserve_requests=9,
    coserve_steps=2,
    num_threads=2,
    seed=0,
)


def run(settings: Settings, parts: Sequence[str], repeats: int, output: Path | None) -> None:
    """Runs the parts, prints the table and writes every sample."""
    with tempfile.TemporaryDirectory() as work_dir:
        sides = SideBySide(settings, work_dir)
        records = [header(dataclasses.asdict(settings), settings.seed)]
        compared = [part for part in parts if part != BOUND]
        if compared:
            records.append(
                {
                    "kind": "start",
                    "compile_s": sides.engine.compile_s,
                    "start_s": sides.start_s,
                    "programs": sides.engine.num_programs,
                    "max_logit_error": sides.max_logit_error,
                }
            )
            compile_s = sides.engine.compile_s
            print(f"engine started in {sides.start_s:.1f} s, compiled in {compile_s:.1f}")
        found: list[Comparison] = []
        for part in compared:
            for comparison in getattr(sides, part)(repeats):
                found.append(comparison)
                records += comparison.records()
                if output is not None:
                    write_jsonl(output, records)
                print(_table([comparison]), flush=True)
        if found:
            print(f"\nmedians of {repeats}, measured in turns\n{_table(found)}")
        if BOUND in parts:
            times, read_s, bounds = sides.bound(repeats)
            records += [item.record() for item in (*times, *bounds)]
            records.append({"kind": "read", "s": read_s})
            if output is not None:
                write_jsonl(output, records)
            print(f"\nproducts alone, medians of {repeats}, measured in turns\n{_products(times)}")
            print(f"reading all kernels once: {read_s * 1e3:.1f} ms\n\n{_bounds(bounds)}")


def _table(comparisons: Sequence[Comparison]) -> str:
    rows = [
        (
            "part",
            "peer s",
            "FlexJAX s",
            "peer tok/s",
            "FlexJAX tok/s",
            "ratio",
            "target",
            "CPU ratio",
            "",
        )
    ]
    for item in comparisons:
        notes = ", ".join(
            f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}"
            for name, value in item.notes.items()
            if not isinstance(value, list)
        )
        peer, flexjax = item.wall
        rows.append(
            (
                item.name,
                f"{peer.median:.3f}",
                f"{flexjax.median:.3f}",
                f"{item.work / peer.median:.1f}",
                f"{item.work / flexjax.median:.1f}",
                f"{item.ratio:.2f}",
                f">= {TARGETS[item.name]}",
                f"{item.cpu_ratio:.2f}",
                notes,
            )
        )
    return table(rows)


def _products(times: Sequence[PassTime]) -> str:
    rows: list[Sequence[str]]
    rows = [("products", "GFLOP", "JAX ms", "GFLOP/s", "how", "torch ms", "GFLOP/s", "how")]
    for item in times:
        cells = [item.work.name, f"{item.flop / 1e9:.2f}"]
        for side in ("jax", "torch"):
            seconds = item.seconds[side]
            cells += [f"{seconds * 1e3:.1f}", f"{item.flop / 1e9 / seconds:.0f}", item.choice[side]]
        rows.append(tuple(cells))
    return table(rows)


def _bounds(bounds: Sequence[Bound]) -> str:
    heading = ("part", "peer s", "JAX products s", "torch products s", "reading s")
    rows: list[Sequence[str]]
    rows = [(*heading, "best ratio", "if only read", "target", "")]
    for item in bounds:
        products = [f"{item.products_s[side]:.3f}" for side in ("jax", "torch")]
        is_in_reach = item.best_ratio >= item.target
        rows.append(
            (
                item.name,
                f"{item.peer_s:.3f}",
                *products,
                f"{item.read_s:.3f}",
                f"{item.best_ratio:.2f}",
                f"{item.best_ratio_reading:.2f}",
                f">= {item.target}",
                "" if is_in_reach else "out of reach of these products",
            )
        )
    return table(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the arguments and runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each side")
    parser.add_argument("--output", type=Path, help="JSON lines with every sample")
    parser.add_argument("--parts", default=",".join(PARTS), help="which parts, comma-separated")
    parser.add_argument("--quick", action="store_true", help="a very small model; takes seconds")
    parser.add_argument("--cores", type=int, default=2, help="cores that both sides may use")
    args = parser.parse_args(argv)
    parts = args.parts.split(",")
    known = (*PARTS, BOUND)
    unknown = [part for part in parts if part not in known]
    if unknown:
        parser.error(f"--parts must be out of {', '.join(known)}; got {', '.join(unknown)}")
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1; got {args.repeats}")
    available = sorted(os.sched_getaffinity(0))
    if not 1 <= args.cores <= len(available):
        parser.error(f"--cores must be between 1 and {len(available)}; got {args.cores}")
    # XLA and torch make their threads at first use, and see only these cores.
    os.sched_setaffinity(0, available[: args.cores])
    settings = dataclasses.replace(QUICK if args.quick else FULL, num_threads=args.cores)
    run(settings, parts, args.repeats, args.output)


if __name__ == "__main__":
    main()
