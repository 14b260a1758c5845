"""Compares sharing policies on this CPU with the embedded model, under drawn and traced arrivals.

    python scripts/bench_policies.py --output DIR [--trace FILE ...] [--rates R ...] [--repeats 1]
        [--seconds 10] [--tail 0] [--quick] [--json]

Targets of 5 s (TTFT) and 45 ms (TPOT), as FlexLLM's evaluation has them for a replica with an 8B
model (arXiv 2402.18789), five times its rates of one to five requests a second, since at these the
embedded model is idle for nine tenths of the time, and eight policies: about ten minutes on two
cores for each trace, whose lengths are scaled to the model's context; drawn arrivals without any.
At 45 ms finetuning has next to nothing to give way to here, so that the burst has a TPOT of 10 ms.
Each kind of arrivals gets a folder of its own. `--quick` takes seconds and shows that the script
works; its figures mean nothing. Exit status as `flexjax bench`, which does the work.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from flexjax.cli.main import main as flexjax

FULL = (
    *("--max-context-len", "512", "--max-running", "64", "--batch-size", "64"),
    *("--decode-buckets", "8", "16", "32", "64", "--chunk-buckets", "32", "128", "256"),
    *("--window-buckets", "32", "128", "256", "--adapters", "4", "--rank", "8"),
    *("--ttft-ms", "5000", "--tpot-ms", "45", "--drain-seconds", "6", "--burst-tpot-ms", "10"),
)
QUICK = (
    *("--max-context-len", "64", "--max-running", "4", "--batch-size", "2"),
    *("--decode-buckets", "4", "--chunk-buckets", "16", "--window-buckets", "16"),
    *("--adapters", "1", "--rank", "2", "--ttft-ms", "1000", "--tpot-ms", "1000"),
    *("--policies", "co_serve", "inference_only", "finetune_only"),
    *("--drain-seconds", "2", "--max-seq-len", "64", "--burst-seconds", "1", "--least-gaps", "1"),
)
RATES, QUICK_RATES = ("5", "10", "15", "20", "25"), ("2", "4")
DRAWN = ("--prompt-tokens", "64", "--output-tokens", "48")
QUICK_DRAWN = ("--prompt-tokens", "8", "--output-tokens", "4")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
      The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="bench_policies.py", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--trace", type=Path, nargs="+", help="CSV files of arrivals and lengths")
    parser.add_argument("--rates", nargs="+", help="requests a second (default: 5 10 15 20 25)")
    parser.add_argument("--repeats", type=int, help="times that everything is run (default: 1)")
    parser.add_argument("--seconds", type=float, help="seconds of a run (default: 10)")
    parser.add_argument("--tail", type=float, default=0.0, help="seconds of it without arrivals")
    parser.add_argument("--seed", type=int, default=0, help="seed of arrivals and prompts")
    parser.add_argument("--quick", action="store_true", help="very short runs; takes seconds")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else FULL
    rates = options.rates or (QUICK_RATES if options.quick else RATES)
    seconds = 0.5 if options.quick else 10.0
    seconds = seconds if options.seconds is None else options.seconds
    repeats = 1 if options.repeats is None else options.repeats
    common = [*settings, "--rates", *rates, "--seconds", str(seconds), "--repeats", str(repeats)]
    common += ["--tail-seconds", str(options.tail), "--seed", str(options.seed), "--overwrite"]
    common += ["--json"] * options.json
    kinds = {trace.stem: ("--trace", str(trace)) for trace in options.trace or ()}
    kinds = kinds or {"drawn": QUICK_DRAWN if options.quick else DRAWN}
    worst = 0
    for kind, loads in kinds.items():  # all of them, even if a check of one fails
        status = flexjax(["bench", *common, *loads, "--output", str(options.output / kind)])
        worst = max(worst, status)
    return worst


if __name__ == "__main__":
    sys.exit(main())
