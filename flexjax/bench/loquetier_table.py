"""What Loquetier's settings came to: a row a side, ratios, tables.

Both sides are judged by the same code, from the records of their runs. Requests count however they
ended: refused ones and those without an answer have missed every limit.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from flexjax.metrics import (
    RequestRecord,
    RunRecord,
    Tier,
    measured_window,
    meets,
    percentile,
    summarize_run,
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """A run and what it stands for.

    Attributes:
      adapters: Adapters served, and trained.
      setting: `INFERENCE`, `FINETUNING` or `UNIFIED`.
      load: Name of the load; "" without requests.
      side: `FLEXJAX`, `PEFT`, or `PEFT_DROPS`: PEFT refuses what has waited for too long.
      run: The record.
    """

    adapters: int
    setting: str
    load: str
    side: str
    run: RunRecord


FLEXJAX, PEFT, PEFT_DROPS = "FlexJAX", "PEFT", "PEFT, drops"
INFERENCE, FINETUNING, UNIFIED = "inference", "finetuning", "unified"
AT_ONCE = "all at once"


@dataclasses.dataclass(frozen=True)
class Row:
    """All runs of a side under a load. None where there is no such figure.

    Attributes:
      adapters: Adapters served, and trained.
      setting: See `Measured`.
      load: See `Measured`.
      side: See `Measured`.
      rate: Offered requests per second, the mean over a run.
      runs: Runs.
      num_requests: Requests of all runs.
      attainment: Share of them that met TTFT and TPOT; None where all come at once.
      admitted: Share that was admitted within the limit of the wait; None where all come at once.
      ttft_p50_s: Median TTFT of those that had a first token.
      ttft_p99_s: p99 of the same.
      tpot_p99_s: p99 of TPOT.
      output_tokens_per_s: Generated tokens per second, of each run.
      target_tokens_per_s: Loss-bearing tokens of finished backward work per second, of each run;
        no padding counts.
    """

    adapters: int
    setting: str
    load: str
    side: str
    rate: float | None
    runs: int
    num_requests: int
    attainment: float | None
    admitted: float | None
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_p99_s: float | None
    output_tokens_per_s: tuple[float, ...]
    target_tokens_per_s: tuple[float, ...]

    @property
    def output(self) -> float:
        """Median of `output_tokens_per_s`."""
        return statistics.median(self.output_tokens_per_s)

    @property
    def trained(self) -> float:
        """Median of `target_tokens_per_s`."""
        return statistics.median(self.target_tokens_per_s)

    @property
    def key(self) -> tuple[int, str, str]:
        """What the sides have in common."""
        return self.adapters, self.setting, self.load

    def record(self) -> dict[str, Any]:
        """A JSON record."""
        medians = {"median_output": self.output, "median_trained": self.trained}
        return {"kind": "row", **dataclasses.asdict(self), **medians}


def make_rows(found: Sequence[Measured], tier: Tier, admission_s: float) -> list[Row]:
    """One row a side and load, in the order in which they first ran; FlexJAX first.

    Args:
      found: Runs.
      tier: Latency targets.
      admission_s: Limit of the wait for admission.
    """
    groups: dict[tuple[int, str, str], dict[str, list[RunRecord]]] = {}
    for measured in found:
        key = (measured.adapters, measured.setting, measured.load)
        groups.setdefault(key, {}).setdefault(measured.side, []).append(measured.run)
    return [
        _row(key, side, runs, tier, admission_s)
        for key, sides in groups.items()
        for side, runs in sorted(sides.items())
    ]


def _row(
    key: tuple[int, str, str],
    side: str,
    runs: Sequence[RunRecord],
    tier: Tier,
    admission_s: float,
) -> Row:
    requests = [request for run in runs for request in _due(run)]
    ttft_s = [r.ttft_s for r in requests if r.ttft_s is not None]
    tpot_s = [r.tpot_s for r in requests if r.tpot_s is not None]
    is_judged = bool(requests) and key[2] != AT_ONCE
    waits_s = [r.admission_wait_s for r in requests]
    admitted = sum(wait_s is not None and wait_s <= admission_s for wait_s in waits_s)
    summaries = [summarize_run(run, (tier,)) for run in runs]
    rates = [run.rate for run in runs if run.rate is not None]
    return Row(
        *key,
        side=side,
        rate=statistics.median(rates) if rates else None,
        runs=len(runs),
        num_requests=len(requests),
        attainment=sum(meets(r, tier) for r in requests) / len(requests) if is_judged else None,
        admitted=admitted / len(requests) if is_judged else None,
        ttft_p50_s=percentile(ttft_s, 50) if ttft_s else None,
        ttft_p99_s=percentile(ttft_s, 99) if ttft_s else None,
        tpot_p99_s=percentile(tpot_s, 99) if tpot_s else None,
        output_tokens_per_s=tuple(found.output_tokens_per_s for found in summaries),
        target_tokens_per_s=tuple(
            found.finetuning.backward_target_tokens_per_s or 0.0 for found in summaries
        ),
    )


def _due(run: RunRecord) -> list[RequestRecord]:
    begin_s, end_s = measured_window(run)
    return [request for request in run.requests if begin_s <= request.due_s <= end_s]


@dataclasses.dataclass(frozen=True)
class Ratio:
    """FlexJAX over PEFT under one load. None where the peer's figure is 0, or there is none.

    Attributes:
      adapters: See `Measured`.
      setting: See `Measured`.
      load: See `Measured`.
      output: Of generated tokens per second.
      trained: Of loss-bearing tokens per second.
      attainment: Of the shares that met TTFT and TPOT; of the peer's two ways with late requests,
        the better one counts.
      admitted: Of the shares that were admitted in time, likewise.
    """

    adapters: int
    setting: str
    load: str
    output: float | None
    trained: float | None
    attainment: float | None
    admitted: float | None

    def record(self) -> dict[str, Any]:
        """A JSON record."""
        return {"kind": "ratio", **dataclasses.asdict(self)}


def make_ratios(rows: Sequence[Row]) -> list[Ratio]:
    """One ratio a load that both sides ran."""
    by_key: dict[tuple[int, str, str], dict[str, Row]] = {}
    for row in rows:
        by_key.setdefault(row.key, {})[row.side] = row
    ratios = []
    for key, sides in by_key.items():
        if FLEXJAX not in sides or PEFT not in sides:
            continue
        ours, peer = sides[FLEXJAX], sides[PEFT]
        peers = [row for side, row in sides.items() if side != FLEXJAX]
        ratios.append(
            Ratio(
                *key,
                output=_over(ours.output, peer.output),
                trained=_over(ours.trained, peer.trained),
                attainment=_over(ours.attainment, _best(row.attainment for row in peers)),
                admitted=_over(ours.admitted, _best(row.admitted for row in peers)),
            )
        )
    return ratios


def _best(values: Any) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _over(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def row_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """A heading, and the cells of each row."""
    heading = (
        *("adapters", "setting", "load", "requests/s", "side", "in time", "admitted in time"),
        *("TTFT p50 / p99, ms", "TPOT p99, ms", "output tok/s", "finetuning tok/s"),
    )
    cells = [heading]
    for row in rows:
        ttft = f"{_text(row.ttft_p50_s, '.0f', 1e3)} / {_text(row.ttft_p99_s, '.0f', 1e3)}"
        cells.append(
            (
                str(row.adapters),
                row.setting,
                row.load or "-",
                _text(row.rate, ".1f"),
                row.side,
                _text(row.attainment, ".1%"),
                _text(row.admitted, ".1%"),
                ttft if row.num_requests else "-",
                _text(row.tpot_p99_s, ".1f", 1e3),
                _text(row.output, ",.0f") if row.num_requests else "-",
                _text(row.trained, ",.0f") if row.setting != INFERENCE else "-",
            )
        )
    return cells


def ratio_cells(ratios: Sequence[Ratio]) -> list[tuple[str, ...]]:
    """A heading, and the cells of each ratio."""
    heading = ("adapters", "setting", "load", "output", "finetuning", "in time", "admitted in time")
    figures = ("output", "trained", "attainment", "admitted")
    return [heading] + [
        (
            str(ratio.adapters),
            ratio.setting,
            ratio.load or "-",
            *(_text(getattr(ratio, name), ".2f") for name in figures),
        )
        for ratio in ratios
    ]


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table; the first row is the heading."""
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    lines.insert(1, "|" + "---|" * len(cells[0]))
    return "\n".join(lines) + "\n"


def _text(value: float | None, form: str, factor: float = 1.0) -> str:
    return "-" if value is None else format(factor * value, form)
