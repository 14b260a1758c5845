"""Draws the figures of measured runs.

    python scripts/plot_results.py RESULTS... [--output-dir figures] [--tier NAME=TTFT_S,TPOT_MS]

Reads files of JSON lines that `RunRecord.save` wrote, or all `*.jsonl` of a folder, and writes for
each model, device and workload among them: attainment and throughput over the offered load, a run
over time, the distributions of latencies, and prints a table. Exit status 2 with the reason where
the arguments or files cannot be used.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from flexjax.metrics import (
    DEFAULT_TIERS,
    RunRecord,
    RunSummary,
    Tier,
    compare_table,
    load_runs,
    markdown_table,
    summarize_run,
)
from flexjax.metrics.figures import plot_latency, plot_load, plot_timeline, title_of

_DPI = 150


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
      The exit status.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        tiers = tuple(options.tier or DEFAULT_TIERS)
        groups = _groups(_read(options.results))
        summaries = {
            title: [summarize_run(run, tiers, options.drop_head) for run in runs]
            for title, runs in groups.items()
        }
        figures: dict[str, Figure] = {}
        for number, (title, runs) in enumerate(groups.items(), start=1):
            prefix = f"{number}_" if len(groups) > 1 else ""
            drawn = _figures(title, runs, summaries[title], tiers, options)
            figures |= {prefix + name: figure for name, figure in drawn.items()}
        if not figures:
            raise ValueError("no run has a rate, a request or finetuning to draw.")
        options.output_dir.mkdir(parents=True, exist_ok=True)
        for title, rows in summaries.items():
            print(f"{title}; tier {tiers[0].name}\n")
            print(markdown_table(compare_table(rows, tiers[0].name)))
        for name, figure in figures.items():
            path = options.output_dir / f"{name}.png"
            figure.savefig(path, dpi=_DPI)
            print(path)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="plot_results.py", description="Draws the figures of measured runs."
    )
    parser.add_argument(
        "results", nargs="+", type=Path, help="files of JSON lines, or folders of *.jsonl"
    )
    parser.add_argument(
        "--output-dir", type=Path, default=Path("figures"), help="where the PNG files go"
    )
    default = ", ".join(f"{t.name}={t.ttft_s:g},{1e3 * t.tpot_s:g}" for t in DEFAULT_TIERS)
    parser.add_argument(
        "--tier",
        action="append",
        type=_tier,
        metavar="NAME=TTFT_S,TPOT_MS[,ITL_P99_MS]",
        help=f"latency targets; repeat for several (default: {default})",
    )
    parser.add_argument(
        "--drop-head",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="seconds at the start of each run that are left out of the figures over load",
    )
    parser.add_argument(
        "--rate",
        type=float,
        help="offered load of the figures over time and of latencies (default: the highest)",
    )
    parser.add_argument(
        "--timeline",
        action="append",
        metavar="POLICY",
        help="policy to draw over time; repeat for several (default: co_serve, else all)",
    )
    parser.add_argument("--bin", type=float, metavar="SECONDS", help="width of a bin over time")
    return parser


def _tier(text: str) -> Tier:
    name, _, values = text.partition("=")
    try:
        ttft_s, tpot_ms, *more = (float(value) for value in values.split(","))
        if not name or len(more) > 1:
            raise ValueError
        return Tier(name, ttft_s, tpot_ms / 1e3, more[0] / 1e3 if more else None)
    except ValueError as error:
        reason = f" ({error})" if str(error).startswith("`") else ""
        raise argparse.ArgumentTypeError(
            f"must be NAME=TTFT_S,TPOT_MS[,ITL_P99_MS] with numbers > 0{reason}; got {text!r}"
        ) from None


def _read(places: Sequence[Path]) -> list[RunRecord]:
    """The runs of files and folders."""
    paths: list[Path] = []
    for place in places:
        if place.is_dir():
            found = sorted(place.glob("*.jsonl"))
            if not found:
                raise ValueError(f"{place} holds no *.jsonl file.")
            paths += found
        else:
            paths.append(place)
    return [run for path in paths for run in load_runs(path)]


def _groups(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs that may be compared, by their title."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(title_of(run), []).append(run)
    return groups


def _figures(
    title: str,
    runs: Sequence[RunRecord],
    summaries: Sequence[RunSummary],
    tiers: Sequence[Tier],
    options: argparse.Namespace,
) -> dict[str, Figure]:
    """Figures of one group by file name."""
    figures = {}
    rates = [run.rate for run in runs if run.rate is not None]
    if rates:
        figures["load"] = plot_load(summaries, tiers, title=title)
    rate = options.rate if options.rate is not None else max(rates, default=None)
    chosen = [run for run in runs if run.requests and run.rate in (rate, None)]
    if options.rate is not None and not any(run.rate == rate for run in chosen):
        known = ", ".join(f"{known:g}" for known in sorted(set(rates))) or "none"
        raise ValueError(f"`--rate` must be one of {known}; got {rate:g}.")
    load = "" if rate is None else f", {rate:g} requests/s"
    if any(request.token_times_s for run in chosen for request in run.requests):
        figures["latency"] = plot_latency(chosen, tiers, title=title + load)
    timed = _timed(chosen, options.timeline)
    for policy in {run.policy: None for run in timed}:
        same = [run for run in timed if run.policy == policy]
        for number, run in enumerate(same, start=1):
            name = "timeline_" + re.sub(r"[^A-Za-z0-9]+", "_", policy).strip("_")
            name += f"_{number}" if len(same) > 1 else ""
            words = f"{policy.replace('_', '-')}: {title}{load if run.rate is not None else ''}"
            figures[name] = plot_timeline(run, title=words, bin_s=options.bin)
    return figures


def _timed(runs: Sequence[RunRecord], wanted: Sequence[str] | None) -> list[RunRecord]:
    """Runs to draw over time."""
    policies = sorted({run.policy for run in runs})
    unknown = [policy for policy in wanted or () if policy not in policies]
    if unknown:
        raise ValueError(f"`--timeline` must be one of {', '.join(policies)}; got {unknown[0]!r}.")
    if wanted is None:
        wanted = ["co_serve"] if "co_serve" in policies else policies
    return [run for run in runs if run.policy in wanted]


if __name__ == "__main__":
    sys.exit(main())
