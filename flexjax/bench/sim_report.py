"""What came of holding the simulator against the engine: figures, verdict and table."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexjax.metrics import RunSummary
from flexjax.simulator import HostTimes

MOST_POINTS = 2.0
"""Attainment may differ by this many points of a hundred."""
MOST_SHARE = 0.05
"""Finetuning throughput may differ by this share."""


@dataclasses.dataclass(frozen=True)
class Figures:
    """One side of a comparison, all runs of a policy at a rate together.

    Attributes:
      num_runs: Runs.
      num_requests: Requests of all of them.
      attainment: Share of them within both targets.
      tokens_per_s: Loss-bearing finetuning tokens of finished backward work, per second.
      forward_tokens_per_s: Finetuning tokens that went forward, per second.
      tpot_ms: Mean over runs of the mean TPOT; None without one.
      ttft_p99_ms: Median over runs of the 99th percentile of TTFT; None without one.
      step_ms: Mean over runs of the mean time of a step.
      num_steps: Mean over runs of the steps in the measured time.
    """

    num_runs: int
    num_requests: int
    attainment: float
    tokens_per_s: float
    forward_tokens_per_s: float
    tpot_ms: float | None
    ttft_p99_ms: float | None
    step_ms: float
    num_steps: float

    @classmethod
    def of(cls, summaries: Sequence[RunSummary]) -> Figures:
        """Pools runs: attainment over all requests, throughput over all seconds."""
        met = sum(s.requests.tiers[0].num_met for s in summaries)
        count = sum(s.requests.num_requests for s in summaries)
        tpots = [1e3 * s.requests.tpot_s.mean for s in summaries if s.requests.tpot_s]
        ttfts = [1e3 * s.requests.ttft_s.p99 for s in summaries if s.requests.ttft_s]
        devices = [s.device for s in summaries if s.device]
        finetuning = [s.finetuning for s in summaries]
        return cls(
            num_runs=len(summaries),
            num_requests=count,
            attainment=met / count if count else 1.0,
            tokens_per_s=_mean(f.backward_target_tokens_per_s or 0.0 for f in finetuning),
            forward_tokens_per_s=_mean(f.forward_tokens_per_s or 0.0 for f in finetuning),
            tpot_ms=_mean(tpots) if tpots else None,
            ttft_p99_ms=statistics.median(ttfts) if ttfts else None,
            step_ms=_mean(d.step_ms.mean for d in devices),
            num_steps=_mean(d.num_steps for d in devices),
        )


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed) if listed else 0.0


@dataclasses.dataclass(frozen=True)
class ComparedRow:
    """A policy at a rate: the engine beside the simulator.

    Attributes:
      policy: Name of the policy.
      rate: Requests per second.
      engine: What was measured.
      simulator: What was simulated.
      matched: Simulated once more on a device whose mean pace was made that of the very runs; a
        diagnosis, which leaves out what the machine's drift between runs does. None where runs
        were paced.
      levels: How many times as long the steps of each run took as in the runs of the other seeds;
        1 without drift.
      spread_points: Standard error of the measured attainment, from how its runs differ.
      spread_share: Standard error of the measured throughput over itself; None without finetuning.
    """

    policy: str
    rate: float
    engine: Figures
    simulator: Figures
    matched: Figures | None
    levels: tuple[float, ...]
    spread_points: float
    spread_share: float | None

    def points(self, simulated: Figures) -> float:
        """Simulated minus measured attainment, points of a hundred."""
        return 100 * (simulated.attainment - self.engine.attainment)

    def share(self, simulated: Figures) -> float | None:
        """Simulated over measured finetuning throughput, minus 1; None without finetuning."""
        measured = self.engine.tokens_per_s
        return simulated.tokens_per_s / measured - 1 if measured else None

    def is_near(self, simulated: Figures) -> bool:
        """Whether both differences are within what is claimed."""
        share = self.share(simulated) or 0.0
        return abs(share) <= MOST_SHARE and abs(self.points(simulated)) <= MOST_POINTS

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        found = dataclasses.asdict(self)
        for name in ("simulator", "matched"):
            simulated = getattr(self, name)
            if simulated is not None:
                found[name] |= {"points": self.points(simulated), "share": self.share(simulated)}
        return found


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The whole check.

    Attributes:
      rows: One a policy and rate.
      host: The host's times, from all runs.
      noise: Spread of the steps around the formula fitted to all of them, natural log.
      late_share: Share of steps that were computed too late for the paced device; None where runs
        were not paced.
      num_dropped: Paced runs that were dropped and repeated, because too many steps were late.
    """

    rows: tuple[ComparedRow, ...]
    host: HostTimes
    noise: float
    late_share: float | None = None
    num_dropped: int = 0

    @property
    def passed(self) -> bool:
        """Whether every row is within what is claimed."""
        return all(row.is_near(row.simulator) for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        host, rows = dataclasses.asdict(self.host), [row.as_dict() for row in self.rows]
        found = {"passed": self.passed, "host": host, "noise": self.noise}
        found |= {"late_share": self.late_share, "num_dropped": self.num_dropped}
        return {**found, "rows": rows}


def compare_row(
    policy: str,
    rate: float,
    measured: Sequence[RunSummary],
    simulated: Sequence[RunSummary],
    matched: Sequence[RunSummary] | None,
    levels: Sequence[float],
) -> ComparedRow:
    """Pools the runs of a policy at a rate; see `ComparedRow`."""
    engine = Figures.of(measured)
    attained = [Figures.of([summary]).attainment for summary in measured]
    trained = [Figures.of([summary]).tokens_per_s for summary in measured]
    total = engine.tokens_per_s
    return ComparedRow(
        policy=policy,
        rate=rate,
        engine=engine,
        simulator=Figures.of(simulated),
        matched=None if matched is None else Figures.of(matched),
        levels=tuple(levels),
        spread_points=100 * _error_of_mean(attained),
        spread_share=_error_of_mean(trained) / total if total else None,
    )


def _error_of_mean(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


_COLUMNS = (
    "policy",
    "requests/s",
    "requests",
    "attainment: engine",
    "simulator",
    "points",
    "finetuning, tokens/s: engine",
    "simulator",
    "difference",
    "mean TPOT, ms: engine",
    "simulator",
    "TTFT p99, ms: engine",
    "simulator",
    "level of each run",
)


def comparison_markdown(comparison: Comparison) -> str:
    """The rows as a Markdown table; "-" where there is no finetuning, `matched` in brackets."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    for row in comparison.rows:
        measured, simulated, matched = row.engine, row.simulator, row.matched
        points, share = f"{row.points(simulated):+.1f}", _text(row.share(simulated), "{:+.1%}")
        if matched is not None:
            points += f" ({row.points(matched):+.1f})"
            share += _text(row.share(matched), " ({:+.1%})", "")
        cells = (
            row.policy,
            f"{row.rate:.3g}",
            f"{measured.num_requests}",
            f"{measured.attainment:.1%} ± {row.spread_points:.1f}",
            f"{simulated.attainment:.1%}",
            points,
            _text(measured.tokens_per_s or None, "{:,.0f}")
            + _text(row.spread_share, " ± {:.1%}", ""),
            _text(simulated.tokens_per_s or None, "{:,.0f}"),
            share,
            _text(measured.tpot_ms, "{:.2f}"),
            _text(simulated.tpot_ms, "{:.2f}"),
            _text(measured.ttft_p99_ms, "{:.0f}"),
            _text(simulated.ttft_p99_ms, "{:.0f}"),
            " ".join(f"{level:.2f}" for level in row.levels),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _text(value: float | None, form: str, otherwise: str = "-") -> str:
    return otherwise if value is None else form.format(value)


def comparison_report(about: Mapping[str, Any], comparison: Comparison) -> str:
    """A comparison as Markdown.

    Args:
      about: A benchmark's header, with "workload", "is_paced", "idle_itl_s", "capacity" and the
        check's "settings".
      comparison: Its rows.
    """
    settings, device, host = about["settings"], about["device"], comparison.host
    targets = settings["targets"]
    if about["is_paced"]:
        way = (
            "The engine's steps were paced to a made-up device that is slower than this CPU, with "
            f"a noise of {settings['noise']:g}; the simulator was given the same device. "
            f"{comparison.late_share or 0:.2%} of the steps were computed too late for it; "
            f"{comparison.num_dropped} runs with more than 5 % of such steps were repeated."
        )
    else:
        way = (
            "The engine's steps took what they took. Each seed was simulated on the device and "
            "the host that the runs of the other seeds recorded; in brackets, on that device made "
            "as slow on average as it was in the very run. The level of a run says how many times "
            "as long its steps took as in the runs of the other seeds."
        )
    verdict = "yes" if comparison.passed else "NO"
    return "\n".join(
        (
            f"## {about['workload']}, {'paced' if about['is_paced'] else 'unpaced'}",
            "",
            way,
            "",
            f"{settings['repeats']} seeds of {settings['window_s']:g} s each; a lone request gets "
            f"a token every {1e3 * about['idle_itl_s']:.2f} ms, the engine answers "
            f"{about['capacity']:.1f} requests/s at most. Targets: TTFT {targets['ttft_ms']:g} ms, "
            f"TPOT {targets['tpot_ms']:.2f} ms. Host, medians: {host.plan_ms:.2f} ms planning, "
            f"{host.launch_ms:.2f} ms launching, {host.read_ms:.2f} ms reading. `±` is the "
            "standard error of the engine's own figure, from how its runs differ.",
            "",
            comparison_markdown(comparison),
            f"Every row within {MOST_POINTS:g} points and {MOST_SHARE:.0%}: {verdict}.",
            "",
            f"{device['cpu']}, {device['cores']} cores; jax {about['versions']['jax']}, Python "
            f"{about['versions']['python']}; commit {about['commit']}; `{about['command']}`.",
            "",
        )
    )


def save_comparisons(
    stem: Path, results: Sequence[tuple[Mapping[str, Any], Comparison]], *, append: bool = False
) -> None:
    """Writes reports to STEM.md and everything to STEM.json.

    Args:
      stem: Path without a suffix; its folder must be there.
      results: Headers and comparisons.
      append: Whether to add to what the files hold.
    """
    json_file, text_file = stem.with_suffix(".json"), stem.with_suffix(".md")
    is_kept = append and json_file.exists()
    rows = json.loads(json_file.read_text(encoding="utf-8")) if is_kept else []
    text = text_file.read_text(encoding="utf-8") if is_kept else "# Simulator against engine\n"
    for about, comparison in results:
        rows.append({**about, **comparison.as_dict()})
        text += "\n" + comparison_report(about, comparison)
    json_file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    text_file.write_text(text, encoding="utf-8")
