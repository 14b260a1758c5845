"""Timings and records of benchmarks: a header, one record per run, medians; JSON lines."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

_PACKAGES = ("jax", "jaxlib", "torch", "transformers", "peft", "numpy")


def header(config: Mapping[str, Any], seed: int, command: Sequence[str] | None = None) -> dict:
    """Describes a run: what it takes to repeat it.

    Args:
      config: Sizes and choices of the benchmark.
      seed: Seed of weights and data.
      command: Command line; None for this process's own.
    """
    device = jax.devices()[0]
    return {
        "kind": "header",
        "commit": commit(),
        "command": " ".join(sys.argv if command is None else command),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "load_average": os.getloadavg()[0],
        },
        "versions": {"python": platform.python_version(), **_versions()},
        "config": dict(config),
        "seed": seed,
    }


def commit() -> str:
    """The checkout's commit, with "+changes" if files differ from it; "unknown" outside of git."""
    root = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        name = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+changes" if changed else "")


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


@dataclasses.dataclass(frozen=True)
class Timing:
    """Repeated measurements of one thing.

    Attributes:
      name: What was timed.
      unit: Unit of the samples.
      samples: Every measurement, in order.
    """

    name: str
    unit: str
    samples: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError(f"`samples` of {self.name!r} must not be empty.")

    @property
    def median(self) -> float:
        """Median of the samples."""
        return statistics.median(self.samples)

    @property
    def p99(self) -> float:
        """99th percentile (nearest rank)."""
        rank = max(0, -(-99 * len(self.samples) // 100) - 1)
        return sorted(self.samples)[rank]

    def record(self, **more: Any) -> dict:
        """A JSON record, with every sample."""
        return {
            "kind": "timing",
            "name": self.name,
            "unit": self.unit,
            "median": self.median,
            "p99": self.p99,
            "runs": len(self.samples),
            "samples": list(self.samples),
            **more,
        }


class Cost(NamedTuple):
    """What a run took.

    Attributes:
      wall_s: Wall-clock seconds.
      cpu_s: Seconds that this process spent on all cores; hardly depends on what else runs on the
        machine, but counts threads that spin while they wait.
    """

    wall_s: float
    cpu_s: float

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.wall_s - other.wall_s, self.cpu_s - other.cpu_s)


def now() -> Cost:
    """Both clocks; the difference of two readings is a cost."""
    return Cost(time.perf_counter(), time.process_time())


def measure(run: Callable[[], Any]) -> Cost:
    """What one call takes."""
    started = now()
    run()
    return now() - started


def alternate(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[Cost]]:
    """Measures several things in turns (A B A B ...), so that drift of the machine hits all alike.

    Args:
      runs: What to call, by name. Whatever must not be timed (warm-up, compilation) has been done.
      repeats: Measurements of each.

    Returns:
      Costs, by name.
    """
    costs: dict[str, list[Cost]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            costs[name].append(measure(run))
    return costs


def timings(name: str, costs: Sequence[Cost]) -> tuple[Timing, Timing]:
    """Wall-clock and CPU seconds of the same runs."""
    return (
        Timing(name, "s", tuple(cost.wall_s for cost in costs)),
        Timing(name, "cpu s", tuple(cost.cpu_s for cost in costs)),
    )


def ratio_of_medians(slower: Timing, faster: Timing) -> float:
    """How many times faster `faster` is: the ratio of the medians."""
    return slower.median / faster.median


def write_jsonl(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line; the first is the header."""
    lines = [json.dumps(record, allow_nan=False) for record in records]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Formats rows of equal length as aligned text; the first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for index, row in enumerate(rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
        if index == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)
