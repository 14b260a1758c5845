"""The picture of a co-serving run: both throughputs and the loss over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flexjax.cli.coserve.loop import CoserveLoop
from flexjax.cli.coserve.report import token_times_s
from flexjax.metrics import RateCurve, rate_of_events, rate_of_spans

_BINS_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
_MAX_BINS = 80
_SERVING, _FINETUNING, _LOSS = "#1f6fb4", "#d1652b", "#3a3a3a"


def draw(loop: CoserveLoop, summary: dict[str, Any], path: Path) -> None:
    """Draws a run that is done.

    Args:
      loop: The run.
      summary: Its figures.
      path: PNG file to write.
    """
    end_s = summary["wall_s"]
    bin_s = next((bin_s for bin_s in _BINS_S if end_s / bin_s <= _MAX_BINS), end_s / _MAX_BINS)
    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    serving, finetuning, loss = figure.subplots(3, 1, sharex=True)
    output = rate_of_events(token_times_s(loop), end_s=end_s, bin_s=bin_s)
    _rate(serving, output, _SERVING, "output\n[tokens/s]")
    trained = rate_of_spans(_trained(loop), end_s=end_s, bin_s=bin_s)
    _rate(finetuning, trained, _FINETUNING, "finetuning\n[tokens/s]")
    _losses(loss, loop)
    loss.set_xlabel(f"time [s]; rates in bins of {bin_s:g} s")
    loss.set_xlim(0, end_s)
    count = summary["serving"]["num_requests"]
    figure.suptitle(
        f"{count} requests answered and {summary['finetuning']['steps']} finetuning steps at the "
        f"same time\n{Path(summary['model']).name} on {summary['device']}, "
        f"{_share(summary['engine_steps']):.0%} of the engine's steps hold both"
    )
    figure.savefig(path, dpi=130)


def _share(steps: dict[str, int]) -> float:
    return steps["both"] / max(1, sum(steps.values()))


def _trained(loop: CoserveLoop) -> list[tuple[float, float, float]]:
    """Tokens of each optimizer step, over the time since the step before."""
    spans, begin_s = [], 0.0
    for record in loop.job.metrics().steps:
        end_s = record.time_s - loop.begin_s
        spans.append((begin_s, end_s, float(record.tokens)))
        begin_s = end_s
    return spans


def _rate(axes: Axes, curve: RateCurve, color: str, label: str) -> None:
    axes.stairs(curve.rates, curve.edges_s, fill=True, color=color, alpha=0.85)
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    _style(axes)


def _losses(axes: Axes, loop: CoserveLoop) -> None:
    metrics = loop.job.metrics()
    times_s = [record.time_s - loop.begin_s for record in metrics.steps]
    axes.plot(times_s, metrics.losses, color=_LOSS, linewidth=1.2, marker=".", markersize=3)
    axes.set_ylabel("loss\n[nats per target token]")
    axes.set_ylim(bottom=0)
    _style(axes)


def _style(axes: Axes) -> None:
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
