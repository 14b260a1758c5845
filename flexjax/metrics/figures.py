"""Draws measured runs: throughput and attainment over load, a run over time, latencies.

Every function takes records or summaries and returns a figure that nobody else holds. Colours are
those of Okabe and Ito, which stay apart for colour-blind readers; markers and lines differ too.
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from flexjax.metrics.rates import RateCurve, rate_of_events, rate_of_spans
from flexjax.metrics.records import RequestRecord
from flexjax.metrics.report import RunSummary, measured_window
from flexjax.metrics.run import RunRecord
from flexjax.metrics.slo import Tier

_COLORS = {
    "co_serve": "#0072B2",
    "temporal": "#E69F00",
    "dynamic_temporal": "#009E73",
    "spatial": "#D55E00",
    "inference_only": "#555555",
    "finetune_only": "#CC79A7",
}
_MORE_COLORS = ("#56B4E9", "#000000", "#B8A100", "#8C564B")
_MARKERS = {
    "co_serve": "o",
    "temporal": "s",
    "dynamic_temporal": "D",
    "spatial": "^",
    "inference_only": "v",
    "finetune_only": "P",
}
_LINES = ("-", "--", ":", "-.")
_ARRIVALS, _OUTPUT, _FINETUNING = "#555555", "#0072B2", "#D55E00"
_BINS_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
_MAX_BINS = 120
_MAX_CDF_POINTS = 2000
_MAX_TICKS = 8
_LEGEND_ENTRY_INCHES = 2.0
_TITLE_LETTERS_PER_INCH = 11
_TEXT_SIZE = 9


@dataclasses.dataclass(frozen=True)
class PolicyStyle:
    """How a policy looks in every figure."""

    label: str
    color: str
    marker: str
    linestyle: str
    linewidth: float


def policy_styles(policies: Sequence[str]) -> dict[str, PolicyStyle]:
    """One look a policy: a colour by kind, another line for each variant such as `temporal(64)`."""
    styles: dict[str, PolicyStyle] = {}
    variants: dict[str, int] = {}
    others: list[str] = []
    for policy in sorted(set(policies), key=lambda name: (name != "co_serve", _natural(name))):
        found = re.match(r"[a-z_]*[a-z]", policy)
        kind = found.group() if found and found.group() in _COLORS else policy
        if kind not in _COLORS and kind not in others:
            others.append(kind)
        variant = variants.get(kind, 0)
        variants[kind] = variant + 1
        more = _MORE_COLORS[others.index(kind) % len(_MORE_COLORS)] if kind in others else ""
        styles[policy] = PolicyStyle(
            label=policy.replace("_", "-"),
            color=_COLORS.get(kind, more),
            marker=_MARKERS.get(kind, "X"),
            linestyle=_LINES[variant % len(_LINES)],
            linewidth=2.4 if policy == "co_serve" else 1.5,
        )
    return styles


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts numbers in names by size."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def title_of(run: RunRecord) -> str:
    """Model, device and workload of a run, for the title of its figure."""
    return f"{run.header['model']} on {run.device_name}, {run.header['workload']}"


def describe_tier(tier: Tier) -> str:
    """The targets of a tier in words."""
    text = f"TTFT ≤ {tier.ttft_s:g} s, TPOT ≤ {1e3 * tier.tpot_s:g} ms"
    return text + (f", ITL p99 ≤ {1e3 * tier.itl_p99_s:g} ms" if tier.itl_p99_s else "")


def plot_load(runs: Sequence[RunSummary], tiers: Sequence[Tier], *, title: str) -> Figure:
    """Attainment, finetuning and output throughput over the offered load, a line a policy.

    A point is the mean of the runs of a policy at a rate; bars reach from the least to the
    greatest. Finetuning without a rate is a level line. Policies that trained nothing at any rate
    have no line among the finetuning throughputs.

    Args:
      runs: Runs under one workload, each judged by all `tiers`.
      tiers: Targets, one panel each.
      title: Title of the figure.

    Raises:
      ValueError: If no run has a rate.
    """
    loaded = [run for run in runs if run.rate is not None]
    if not loaded:
        raise ValueError("`runs` must hold a run with a rate; got none.")
    columns = len(tiers) + 2 if len(tiers) < 2 else 2
    lines = -(-(len(tiers) + 2) // columns)
    size = (4.6 * columns, 3.3 * lines + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    panels = [figure.add_subplot(lines, columns, index + 1) for index in range(len(tiers) + 2)]
    styles = policy_styles([run.policy for run in runs])
    for index, (axes, tier) in enumerate(zip(panels, tiers, strict=False)):
        _over_load(axes, loaded, styles, lambda run, i=index: _percent(run, i))
        axes.set_title(describe_tier(tier), fontsize=_TEXT_SIZE)
        axes.set(ylabel=f"SLO attainment, {tier.name} [%]", ylim=(-2, 104))
    finetuning, output = panels[-2:]
    trainers = {run.policy for run in runs if run.finetuning.throughput}
    trained = [run for run in runs if run.policy in trainers]
    _over_load(finetuning, trained, styles, lambda run: run.finetuning.throughput)
    finetuning.set_title("loss-bearing tokens of backward work", fontsize=_TEXT_SIZE)
    finetuning.set_ylabel("finetuning [tokens/s]")
    _over_load(output, loaded, styles, lambda run: run.output_tokens_per_s)
    output.set_title("generated tokens", fontsize=_TEXT_SIZE)
    output.set_ylabel("inference [tokens/s]")
    for axes in panels:
        _load_axis(axes, [run.rate for run in loaded if run.rate is not None])
    for axes in (finetuning, output):
        axes.set_ylim(bottom=0)
    _legend(figure, panels)
    _head(figure, title)
    return figure


def _load_axis(axes: Axes, rates: Sequence[float]) -> None:
    axes.set_xlabel("offered load [requests/s]")
    margin = 0.05 * (max(rates) - min(rates)) or 0.1 * max(rates)
    axes.set_xlim(min(rates) - margin, max(rates) + margin)
    if len(set(rates)) <= _MAX_TICKS:
        axes.set_xticks(sorted(set(rates)), [f"{rate:g}" for rate in sorted(set(rates))])
    _style(axes)


def _percent(run: RunSummary, tier: int) -> float | None:
    attainment = run.requests.tiers[tier].attainment
    return None if attainment is None else 100 * attainment


def _over_load(
    axes: Axes,
    runs: Sequence[RunSummary],
    styles: dict[str, PolicyStyle],
    figure_of: Callable[[RunSummary], float | None],
) -> None:
    """Draws one figure of the runs over their rates."""
    for policy, style in styles.items():
        by_rate: dict[float, list[float]] = {}
        level = []
        for run in runs:
            value = figure_of(run) if run.policy == policy else None
            if value is not None and run.rate is not None:
                by_rate.setdefault(run.rate, []).append(value)
            elif value is not None:
                level.append(value)
        # The project's own policy lies on top, and white edges part markers that overlap.
        look = {
            "color": style.color,
            "label": style.label,
            "linewidth": style.linewidth,
            "zorder": 3 if policy == "co_serve" else 2,
        }
        if by_rate:
            rates = sorted(by_rate)
            means = [float(np.mean(by_rate[rate])) for rate in rates]
            spans = [(rate, min(by_rate[rate]), max(by_rate[rate])) for rate in rates]
            for rate, low, high in spans:
                axes.plot((rate, rate), (low, high), color=style.color, linewidth=1)
            look |= {"marker": style.marker, "linestyle": style.linestyle}
            axes.plot(rates, means, markersize=6.5, markeredgecolor="white", **look)
        elif level:
            axes.axhline(float(np.mean(level)), linestyle=(0, (6, 3)), **look)


def plot_timeline(run: RunRecord, *, title: str, bin_s: float | None = None) -> Figure:
    """Arrivals, output and finetuning throughput of one run over time.

    Finetuning is the loss-bearing tokens of backward work as steps finish it; of a run without
    step records, those of optimizer steps, each spread over the time since the one before.

    Args:
      run: The run.
      title: Title of the figure.
      bin_s: Width of a bin, seconds; None for one that gives a readable number of bins.

    Raises:
      ValueError: If `bin_s` is not above 0.
    """
    length_s = run.end_s - run.begin_s
    if bin_s is None:
        bin_s = next((b for b in _BINS_S if length_s / b <= _MAX_BINS), length_s / _MAX_BINS)
    due_s = [request.due_s - run.begin_s for request in run.requests]
    tokens_s = [t - run.begin_s for request in run.requests for t in request.token_times_s]
    spans, source = _finetuning_spans(run)
    curves = (
        (rate_of_events(due_s, end_s=length_s, bin_s=bin_s), "arrivals\n[requests/s]", _ARRIVALS),
        (rate_of_events(tokens_s, end_s=length_s, bin_s=bin_s), "inference\n[tokens/s]", _OUTPUT),
        (
            rate_of_spans(spans, end_s=length_s, bin_s=bin_s),
            "finetuning\n[tokens/s]",
            _FINETUNING,
        ),
    )
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    panels = list(figure.subplots(3, 1, sharex=True, height_ratios=(1, 1.4, 1.4)))
    end_s = measured_window(run)[1] - run.begin_s
    for axes, (curve, label, color) in zip(panels, curves, strict=True):
        _stairs(axes, curve, color)
        axes.set_ylabel(label)
        if end_s < 0.995 * length_s:
            axes.axvline(end_s, color="black", linestyle=":", linewidth=1)
    if end_s < 0.995 * length_s:
        note = {"xytext": (3, -2), "textcoords": "offset points", "va": "top"}
        place = (end_s, panels[0].get_ylim()[1])
        panels[0].annotate("end of measurement", place, fontsize=_TEXT_SIZE - 1, **note)
    panels[-1].set_xlabel(f"time [s], bins of {bin_s:g} s")
    panels[-1].set_xlim(0, length_s)
    panels[1].set_title("generated tokens", fontsize=_TEXT_SIZE, loc="left")
    panels[2].set_title(source, fontsize=_TEXT_SIZE, loc="left")
    figure.align_ylabels(panels)
    _head(figure, title)
    return figure


def _finetuning_spans(run: RunRecord) -> tuple[list[tuple[float, float, float]], str]:
    """(begin, end, loss-bearing tokens) from the start of the run, and where it is from."""
    begin_s = run.begin_s
    if any(step.backward_target_tokens for step in run.steps) or not run.training:
        spans = [
            (step.begin_s - begin_s, step.end_s - begin_s, step.backward_target_tokens)
            for step in run.steps
        ]
        return spans, "loss-bearing tokens of finished backward work"
    last_s: dict[str, float] = {}
    spans = []
    for record in run.training:
        from_s, to_s = last_s.get(record.job, 0.0), record.time_s - begin_s
        spans.append((from_s, to_s, float(record.target_tokens)))
        last_s[record.job] = to_s
    return spans, "loss-bearing tokens of optimizer steps, over the time since the step before"


def _stairs(axes: Axes, curve: RateCurve, color: str) -> None:
    axes.stairs(curve.rates, curve.edges_s, fill=True, color=color, alpha=0.3)
    axes.stairs(curve.rates, curve.edges_s, color=color, linewidth=1.2, baseline=None)
    axes.set_ylim(0, 1.08 * max([*curve.rates, 1e-9]))
    _style(axes)


def plot_latency(runs: Sequence[RunRecord], tiers: Sequence[Tier], *, title: str) -> Figure:
    """Shares of requests and of gaps within a TTFT, TPOT and ITL, a line a policy.

    TTFT and TPOT are shares of all requests: a line that ends below 100 % has requests that never
    got so far. Targets are dotted lines.

    Args:
      runs: Runs under the same load.
      tiers: Targets to mark.
      title: Title of the figure.

    Raises:
      ValueError: If no run has a token.
    """
    if not any(request.token_times_s for run in runs for request in run.requests):
        raise ValueError("`runs` must hold a generated token; got none.")
    figure = Figure(figsize=(12.5, 4.1), layout="constrained")
    panels = list(figure.subplots(1, 3, sharey=True))
    styles = policy_styles([run.policy for run in runs])
    for policy, style in styles.items():
        requests = [request for run in runs if run.policy == policy for request in run.requests]
        ttft_s = [r.ttft_s for r in requests if r.ttft_s is not None]
        tpot_s = [r.tpot_s for r in requests if r.tpot_s is not None]
        gaps_s = [gap for r in requests for gap in r.itl_s]
        _cdf(panels[0], ttft_s, len(requests), 1.0, style)
        _cdf(panels[1], tpot_s, sum(_owes_tpot(r) for r in requests), 1e3, style)
        _cdf(panels[2], gaps_s, len(gaps_s), 1e3, style)
    labels = (
        ("TTFT, queueing included [s]", "share of requests [%]"),
        ("TPOT, mean of a request [ms]", "share of requests [%]"),
        ("ITL, every gap [ms]", "share of gaps [%]"),
    )
    for axes, (x_label, y_label) in zip(panels, labels, strict=True):
        axes.set(xlabel=x_label, ylabel=y_label, ylim=(0, 101))
        axes.set_xscale("log", nonpositive="clip")
        low, high = axes.get_xlim()
        subs = (1, 2, 5) if high < 200 * low else (1, 3) if high < 5000 * low else (1,)
        axes.xaxis.set_major_locator(LogLocator(subs=subs))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params(labelleft=True)
        axes.axhline(99, color="black", linewidth=0.6, alpha=0.6)
        _style(axes)
    note = {"textcoords": "offset points", "ha": "right", "va": "top", "fontsize": _TEXT_SIZE - 1}
    panels[2].annotate("p99", (1, 99), xycoords=("axes fraction", "data"), xytext=(0, -2), **note)
    for tier in tiers:
        _mark(panels[0], tier.ttft_s, tier.name)
        _mark(panels[1], 1e3 * tier.tpot_s, tier.name)
        if tier.itl_p99_s:
            _mark(panels[2], 1e3 * tier.itl_p99_s, f"{tier.name}, p99")
    _legend(figure, panels)
    _head(figure, title)
    return figure


def _owes_tpot(request: RequestRecord) -> bool:
    """Whether a request has a TPOT, or has none because tokens are missing."""
    return request.tpot_s is not None or (request.output_tokens > 1 and not request.is_complete)


def _cdf(
    axes: Axes, values: Sequence[float], count: int, factor: float, style: PolicyStyle
) -> None:
    """Draws the share of `count` values that are at most x; those not given never are."""
    if not values:
        return
    ordered = factor * np.sort(np.asarray(values))
    shares = 100 * np.arange(1, len(ordered) + 1) / count
    # All of the tail, where the tokens are that stall, and enough of the rest.
    head = np.linspace(0, len(ordered) - 1, min(len(ordered), _MAX_CDF_POINTS)).astype(int)
    chosen = np.unique(np.append(head, np.arange(max(0, len(ordered) - 500), len(ordered))))
    axes.plot(
        ordered[chosen],
        shares[chosen],
        drawstyle="steps-post",
        color=style.color,
        linestyle=style.linestyle,
        linewidth=style.linewidth,
        label=style.label,
    )


def _mark(axes: Axes, target: float, name: str) -> None:
    axes.axvline(target, color="black", linestyle=":", linewidth=1.1)
    look = {"rotation": 90, "va": "bottom", "ha": "right", "fontsize": _TEXT_SIZE - 1}
    axes.annotate(
        name, (target, 3), xytext=(-2, 0), textcoords="offset points", color="#333333", **look
    )


def _head(figure: Figure, title: str) -> None:
    width = int(figure.get_figwidth() * _TITLE_LETTERS_PER_INCH)
    figure.suptitle(textwrap.fill(title, width), fontsize=11)


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend below all panels."""
    entries = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=max(1, min(len(entries), int(figure.get_figwidth() / _LEGEND_ENTRY_INCHES))),
        frameon=False,
    )


def _style(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
