"""Compares sharing policies on this CPU with the embedded model, under drawn and traced arrivals.

    python scripts/bench_policies.py --output DIR [--trace FILE] [--repeats 2] [--seconds 6]
        [--quick] [--json]

Five rates around what the machine can answer, eight policies: about ten minutes on two cores with
drawn arrivals, and as much again with a trace, whose lengths are scaled to the model's context.
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
    *("--max-context-len", "256", "--max-running", "16", "--batch-size", "4"),
    *("--decode-buckets", "4", "16", "--chunk-buckets", "16", "64"),
    *("--window-buckets", "16", "64", "--adapters", "4", "--rank", "8"),
    *("--ttft-ms", "1000", "--tpot-factor", "3", "--drain-seconds", "2"),
)
QUICK = (
    *("--max-context-len", "64", "--max-running", "4", "--batch-size", "2"),
    *("--decode-buckets", "4", "--chunk-buckets", "16", "--window-buckets", "16"),
    *("--adapters", "1", "--rank", "2", "--ttft-ms", "1000", "--tpot-ms", "1000"),
    *("--policies", "co_serve", "inference_only", "finetune_only", "--rates", "2", "4"),
    *("--drain-seconds", "2", "--max-seq-len", "64"),
)
DRAWN = ("--prompt-tokens", "48", "--output-tokens", "32")
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
    parser.add_argument("--trace", type=Path, help="CSV file of arrivals and lengths")
    parser.add_argument("--repeats", type=int, help="times that everything is run (default: 2)")
    parser.add_argument("--seconds", type=float, help="seconds of a run (default: 6)")
    parser.add_argument("--seed", type=int, default=0, help="seed of arrivals and prompts")
    parser.add_argument("--quick", action="store_true", help="very short runs; takes seconds")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else FULL
    seconds, repeats = (0.5, 1) if options.quick else (6.0, 2)
    seconds = seconds if options.seconds is None else options.seconds
    repeats = repeats if options.repeats is None else options.repeats
    common = [*settings, "--seconds", str(seconds), "--repeats", str(repeats)]
    common += ["--seed", str(options.seed), "--overwrite", *(["--json"] if options.json else [])]
    kinds = {"drawn": QUICK_DRAWN if options.quick else DRAWN}
    if options.trace is not None:
        kinds["trace"] = ("--trace", str(options.trace))
    for kind, loads in kinds.items():
        status = flexjax(["bench", *common, *loads, "--output", str(options.output / kind)])
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
