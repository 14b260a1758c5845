"""Loquetier's settings (arXiv 2511.00101): FlexJAX beside PEFT and transformers on this CPU.

    python scripts/bench_loquetier.py [--output FILE.json] [--markdown FILE.md] [--data FILE.jsonl]
        [--burst FILE] [--adapters 1 4] [--repeats 2] [--seconds 3] [--seed 0] [--quick]

Inference only, finetuning only and both, with the embedded model, in one process, the sides in
turns. Needs the `oracle` extra; about six minutes. `--quick` takes well under a minute and shows
that the script works; its figures mean nothing. Rates and limits are set by what both sides are
found to be able to do, and are printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from flexjax.bench.harness import header, table, write_jsonl
from flexjax.bench.loquetier import Bench, Settings
from flexjax.bench.loquetier_sides import Sides, SideSizes
from flexjax.bench.loquetier_table import (
    Measured,
    Row,
    make_ratios,
    make_rows,
    markdown,
    ratio_cells,
    row_cells,
)
from flexjax.bench.policies import tier_of
from flexjax.config import EngineConfig
from flexjax.metrics import Tier

FULL = EngineConfig(
    max_context_len=256,
    max_running=16,
    max_adapters=9,
    max_lora_rank=8,
    max_jobs=4,
    decode_buckets=(4, 16),
    chunk_buckets=(32, 128),
    window_buckets=(32, 128),
)
QUICK = dataclasses.replace(
    FULL, max_context_len=64, decode_buckets=(16,), chunk_buckets=(64,), window_buckets=(64,)
)
QUICK_SIZES: dict[str, Any] = {
    "prompt_tokens": (4, 8),
    "output_tokens": (2, 6),
    "max_seq_len": 64,
    "num_samples": 16,
    "batch_size": 4,
}


def run(sizes: SideSizes, settings: Settings, options: argparse.Namespace) -> None:
    """Runs everything, prints the tables and writes the files."""
    values = {"sizes": _plain(sizes), "settings": _plain(settings)}
    head = header(values, settings.seed, _command())
    with tempfile.TemporaryDirectory() as work_dir:
        sides = Sides(sizes, work_dir)
        print(f"engine started in {sides.start_s:.1f} s; checking that both sides agree")
        sides.check()
        bench = Bench(sides, settings, head)
        print(_describe(bench), flush=True)
        tier, admission_s = tier_of(bench.limits.targets), bench.limits.admission_s
        start = {
            "kind": "start",
            "start_s": sides.start_s,
            "choice": dataclasses.asdict(bench.choice),
            "limits": dataclasses.asdict(bench.limits),
            "targets": dataclasses.asdict(bench.limits.targets),
            "admission_s": admission_s,
            "capacity": bench.capacity,
        }
        found: list[Measured] = []

        def take(measured: Measured) -> None:
            """Shows a run, and writes what there is so far."""
            found.append(measured)
            _show(measured, tier, admission_s)
            _write(options, [head, start], make_rows(found, tier, admission_s))

        bench.run(take)
    rows = make_rows(found, tier, admission_s)
    ratios = make_ratios(rows)
    print(f"\n{table(row_cells(rows))}\n\nFlexJAX over PEFT\n{table(ratio_cells(ratios))}")


def _write(
    options: argparse.Namespace, records: Sequence[dict[str, Any]], rows: Sequence[Row]
) -> None:
    ratios = make_ratios(rows)
    if options.output is not None:
        figures = [*(row.record() for row in rows), *(ratio.record() for ratio in ratios)]
        write_jsonl(options.output, [*records, *figures])
    if options.markdown is not None:
        parts = (markdown(row_cells(rows)), markdown(ratio_cells(ratios)))
        options.markdown.write_text("\n".join(parts), encoding="utf-8")


def _show(measured: Measured, tier: Tier, admission_s: float) -> None:
    """Prints a run as soon as it is there."""
    cells = row_cells(make_rows([measured], tier, admission_s))[1]
    print("  ".join(cell.ljust(10) for cell in cells), flush=True)


def _describe(bench: Bench) -> str:
    """What was found before the runs."""
    limits, choice = bench.limits, bench.choice
    gaps = ", ".join(f"{side} {1e3 * gap:.2f} ms" for side, gap in limits.idle_gap_s.items())
    forms = ", ".join(f"{form} with {count} adapters" for count, form in choice.forms.items())
    return (
        f"a token of a lone request: {gaps}; limits: TTFT {limits.targets.ttft_ms:.0f} ms, TPOT "
        f"{limits.targets.tpot_ms:.2f} ms, admission {1e3 * limits.admission_s:.0f} ms\n"
        f"the peer's best form: {forms}; {choice.generate_threads} threads to generate, "
        f"{choice.train_threads} to train, {choice.micro_batch} samples a pass"
    )


def _command() -> list[str]:
    """This command, with files by name: where they lie says nothing."""
    return ["scripts/bench_loquetier.py", *(Path(word).name for word in sys.argv[1:])]


def _plain(values: Any) -> dict[str, Any]:
    """As JSON values; a list of arrivals as its length, a path as its name."""
    fields = dataclasses.asdict(values)
    if fields.get("burst") is not None:
        fields["burst"] = f"{len(fields['burst'])} arrivals"
    return {name: v.name if isinstance(v, Path) else v for name, v in fields.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the arguments and runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON lines with every figure")
    parser.add_argument("--markdown", type=Path, help="the tables, as Markdown")
    parser.add_argument("--data", type=Path, help="JSON lines to train on (default: the package's)")
    parser.add_argument("--burst", type=Path, help="arrivals of the burst load, one second a line")
    parser.add_argument("--adapters", type=int, nargs="+", help="out of 1 and 4 (default: both)")
    parser.add_argument("--repeats", type=int, help="times that everything is run (default: 2)")
    parser.add_argument("--seconds", type=float, help="seconds of a run (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of adapters, loads and prompts")
    parser.add_argument(
        "--quick", action="store_true", help="very short runs; figures mean nothing"
    )
    options = parser.parse_args(arguments)
    fields: dict[str, Any] = (
        {"window_s": 0.3, "drain_s": 0.2, "repeats": 1} if options.quick else {}
    )
    for name, value in (("repeats", options.repeats), ("window_s", options.seconds)):
        if value is not None:
            fields[name] = value
    if options.adapters is not None:
        fields["adapters"] = tuple(options.adapters)
    try:
        if options.burst is not None:
            fields["burst"] = [float(line) for line in options.burst.read_text().split()]
        cores = len(os.sched_getaffinity(0))
        settings = Settings(seed=options.seed, num_threads=cores, **fields)
        sizes = SideSizes(
            engine=QUICK if options.quick else FULL,
            num_adapters=max(settings.adapters),
            data=options.data,
            seed=options.seed,
            **(QUICK_SIZES if options.quick else {}),
        )
        run(sizes, settings, options)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
