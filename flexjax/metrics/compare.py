"""Runs beside one another: policies over rates, with finetuning and without."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from flexjax.metrics.report import RunSummary
from flexjax.metrics.run import RunRecord
from flexjax.metrics.summary import Distribution


def interference_ratio(with_training: RunSummary, without: RunSummary) -> float:
    """p99 of the gaps between tokens with finetuning over the same without; 1 is no interference.

    Raises:
      ValueError: If the offered loads differ, or a run has no gap between tokens or only gaps of 0.
    """
    if with_training.rate != without.rate:
        raise ValueError(
            "`without` must have the rate of `with_training`, "
            f"{with_training.rate!r}; got {without.rate!r}."
        )
    return _itl_p99_s("with_training", with_training) / _itl_p99_s("without", without)


def _itl_p99_s(name: str, run: RunSummary) -> float:
    found = run.requests.itl_s
    if found is None or found.p99 == 0:
        raise ValueError(f"`{name}` must have gaps between tokens above 0 s; got {found!r}.")
    return found.p99


def all_gaps_s(runs: Iterable[RunRecord]) -> list[float]:
    """Every gap between two tokens of a request, in all runs together; seconds."""
    return [gap for run in runs for request in run.requests for gap in request.itl_s]


def retention(runs: Sequence[RunSummary]) -> float:
    """Finetuning throughput at the highest load over that at the lowest.

    Runs of the same rate, say of several seeds, are averaged.

    Args:
      runs: Runs of one policy at two rates or more.

    Raises:
      ValueError: If policies are mixed, a run has no rate, all rates are equal, or nothing was
        trained at the lowest.
    """
    policies = sorted({run.policy for run in runs})
    rates = {run.rate for run in runs if run.rate is not None}
    if len(policies) != 1:
        raise ValueError(f"`runs` must be of one policy; got {', '.join(policies) or 'none'}.")
    if len(rates) < 2 or any(run.rate is None for run in runs):
        raise ValueError(f"`runs` must have a rate each, two or more; got {sorted(rates)}.")
    low, high = (_trained_at(runs, rate) for rate in (min(rates), max(rates)))
    if low == 0:
        raise ValueError(f"`runs` must train at the lowest rate, {min(rates):g}; got 0 tokens/s.")
    return high / low


def _trained_at(runs: Sequence[RunSummary], rate: float) -> float:
    found = [run.finetuning.throughput for run in runs if run.rate == rate]
    return math.fsum(found) / len(found)


@dataclasses.dataclass(frozen=True)
class CompareRow:
    """One run as a row of a table; None where a run has no such figure.

    Attributes:
      policy: Name of the policy.
      rate: Offered load, requests per second.
      num_requests: Requests that counted.
      attainment: Share that met the tier.
      goodput: Requests per second that met the tier.
      ttft_p50_s: Median TTFT.
      ttft_p99_s: p99 of TTFT.
      tpot_p99_s: p99 of TPOT.
      itl_p50_s: Median gap between tokens.
      itl_p99_s: p99 of the gaps.
      itl_max_s: Longest gap.
      output_tokens_per_s: Generated tokens per second.
      target_tokens_per_s: Loss-bearing finetuning tokens per second, as
        `FinetuningSummary.throughput` counts them.
      peak_share: The same over that of the baseline that only finetunes.
      interference: p99 of the gaps over that of the baseline that only infers, at the same rate.
      idle_share: Share of the time in which no step ran.
    """

    policy: str
    rate: float | None
    num_requests: int
    attainment: float | None
    goodput: float
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_p99_s: float | None
    itl_p50_s: float | None
    itl_p99_s: float | None
    itl_max_s: float | None
    output_tokens_per_s: float
    target_tokens_per_s: float
    peak_share: float | None
    interference: float | None
    idle_share: float | None


def compare_table(
    runs: Sequence[RunSummary],
    tier: str,
    *,
    inference_only: str = "inference_only",
    finetune_only: str = "finetune_only",
) -> tuple[CompareRow, ...]:
    """One row a run, by policy, then by rate; those without a rate last.

    Args:
      runs: Runs under the same workload, judged by the same tiers.
      tier: Name of the tier for attainment and goodput.
      inference_only: Policy that `interference` compares with, the mean of its runs at a rate.
      finetune_only: Policy that `peak_share` compares with, the mean of its runs.

    Raises:
      ValueError: If a run was not judged by `tier`.
    """
    peaks = [r.finetuning.throughput for r in runs if r.policy == finetune_only]
    peak = math.fsum(peaks) / len(peaks) if peaks else None
    alone = [r for r in runs if r.policy == inference_only]
    ordered = sorted(runs, key=lambda r: (r.policy, math.inf if r.rate is None else r.rate))
    return tuple(_row(run, tier, alone, peak) for run in ordered)


def _row(run: RunSummary, tier: str, alone: Sequence[RunSummary], peak: float | None) -> CompareRow:
    found = [summary for summary in run.requests.tiers if summary.name == tier]
    if not found:
        names = [summary.name for summary in run.requests.tiers]
        raise ValueError(f"`tier` must be one of {', '.join(names)}; got {tier!r}.")
    ttft, tpot, itl = run.requests.ttft_s, run.requests.tpot_s, run.requests.itl_s
    trained = run.finetuning.throughput
    return CompareRow(
        policy=run.policy,
        rate=run.rate,
        num_requests=run.requests.num_requests,
        attainment=found[0].attainment,
        goodput=found[0].goodput,
        ttft_p50_s=ttft and ttft.p50,
        ttft_p99_s=ttft and ttft.p99,
        tpot_p99_s=tpot and tpot.p99,
        itl_p50_s=itl and itl.p50,
        itl_p99_s=itl and itl.p99,
        itl_max_s=itl and itl.max,
        output_tokens_per_s=run.output_tokens_per_s,
        target_tokens_per_s=trained,
        peak_share=trained / peak if peak else None,
        interference=_interference(itl, [r.requests.itl_s for r in alone if r.rate == run.rate]),
        idle_share=run.device and run.device.idle_share,
    )


def _interference(itl: Distribution | None, alone: Sequence[Distribution | None]) -> float | None:
    baseline = [found.p99 for found in alone if found is not None]
    total = math.fsum(baseline)
    return itl.p99 * len(baseline) / total if itl and total else None


def markdown_table(rows: Sequence[CompareRow]) -> str:
    """The rows as a Markdown table with units; "-" where there is no figure."""
    columns = {
        "policy": lambda r: r.policy,
        "requests/s": lambda r: _text(r.rate, "{:g}"),
        "attainment": lambda r: _text(r.attainment, "{:.1%}"),
        "goodput, requests/s": lambda r: _text(r.goodput, "{:.2f}"),
        "TTFT p50 / p99, s": lambda r: _pair(r.ttft_p50_s, r.ttft_p99_s, "{:.2f}"),
        "TPOT p99, ms": lambda r: _text(r.tpot_p99_s, "{:.1f}", 1e3),
        "ITL p50 / p99, ms": lambda r: _pair(r.itl_p50_s, r.itl_p99_s, "{:.1f}", 1e3),
        "interference": lambda r: _text(r.interference, "{:.2f}"),
        "output, tokens/s": lambda r: _text(r.output_tokens_per_s, "{:,.0f}"),
        "finetuning, tokens/s": lambda r: _text(r.target_tokens_per_s, "{:,.0f}"),
        "of finetuning alone": lambda r: _text(r.peak_share, "{:.0%}"),
        "idle": lambda r: _text(r.idle_share, "{:.0%}"),
    }
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row) for cell in columns.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _text(value: float | None, form: str, factor: float = 1.0) -> str:
    return "-" if value is None else form.format(factor * value)


def _pair(low: float | None, high: float | None, form: str, factor: float = 1.0) -> str:
    return f"{_text(low, form, factor)} / {_text(high, form, factor)}"
