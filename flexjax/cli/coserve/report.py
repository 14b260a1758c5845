"""What a co-serving run leaves: a summary, tables, and files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

import flexjax
from flexjax.cli.common import Base, device_name, shorten
from flexjax.cli.coserve.loop import CoserveLoop, Submitted
from flexjax.cli.coserve.workload import Workload
from flexjax.metrics import summarize

REQUESTS_FILE = "requests.jsonl"
STEPS_FILE = "steps.jsonl"
SUMMARY_FILE = "summary.json"
PICTURE_FILE = "coserve.png"
ADAPTER_DIR = "adapter"

_CELL_CHARACTERS = 100


def summary_of(
    loop: CoserveLoop,
    workload: Workload,
    base: Base,
    answers: list[dict[str, str]],
    *,
    output: Path,
    start_s: float,
) -> dict[str, Any]:
    """Every figure of a run.

    Args:
      loop: The run, done.
      workload: What was planned.
      base: The model.
      answers: `prompt`, `before` and `after`, for the compared prompts.
      output: Where the files are.
      start_s: Seconds that the start of the engine took.
    """
    outputs = loop.results()
    serving = summarize(outputs, [request.delay_s for request in loop.submitted])
    ends = [_times_s(request, loop.begin_s)[-1] for request in loop.submitted]
    metrics = loop.job.metrics()
    train_s = metrics.steps[-1].time_s - loop.begin_s
    figures = dataclasses.asdict(serving)
    return {
        "model": base.source,
        "device": device_name(),
        "jax_version": jax.__version__,
        "flexjax_version": flexjax.__version__,
        "start_s": start_s,
        "compile_s": loop.engine.compile_s,
        "wall_s": max([*ends, train_s]),
        "notes": list(workload.notes),
        "serving": {
            **figures,
            "num_planned": len(workload.requests),
            "duration_s": max(ends),
            "output_tokens_per_s": serving.output_tokens / max(ends),
        },
        "finetuning": {
            "adapter": loop.job.config.adapter,
            "status": loop.job.status.value,
            "steps": len(metrics.steps),
            "tokens": metrics.tokens,
            "target_tokens": metrics.target_tokens,
            "duration_s": train_s,
            "tokens_per_s": metrics.tokens / train_s,
            "target_tokens_per_s": metrics.target_tokens / train_s,
            "first_loss": metrics.losses[0],
            "last_loss": metrics.losses[-1],
            "evals": [dataclasses.asdict(record) for record in metrics.evals],
        },
        "engine_steps": dataclasses.asdict(loop.counts),
        "answers": answers,
        "output": str(output),
    }


def _times_s(request: Submitted, begin_s: float) -> list[float]:
    """When each token of a request was there, in seconds since the start of the run."""
    result = request.output.result()
    assert result.ttft_s is not None
    times_s = [request.output.sequence.request.arrival_s - begin_s + result.ttft_s]
    for gap_s in result.itl_s:
        times_s.append(times_s[-1] + gap_s)
    return times_s


def token_times_s(loop: CoserveLoop) -> list[float]:
    """When each generated token was there, in seconds since the start of the run."""
    return [time_s for r in loop.submitted for time_s in _times_s(r, loop.begin_s)]


def write_files(loop: CoserveLoop, summary: dict[str, Any], output: Path) -> None:
    """Writes requests, optimizer steps, the adapter and the summary."""
    output.mkdir(parents=True, exist_ok=True)
    requests = []
    for request in loop.submitted:
        result = dataclasses.asdict(request.output.result())
        planned = {"due_s": request.planned.arrival_s, "delay_s": request.delay_s}
        requests.append({"prompt": request.planned.prompt.text, **planned, **result})
    _write_lines(output / REQUESTS_FILE, requests)
    steps = [dataclasses.asdict(record) for record in loop.job.metrics().steps]
    _write_lines(output / STEPS_FILE, [{**s, "time_s": s["time_s"] - loop.begin_s} for s in steps])
    loop.engine.save_adapter(loop.job.config.adapter, output / ADAPTER_DIR)
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    (output / SUMMARY_FILE).write_text(text, encoding="utf-8")


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def print_tables(summary: dict[str, Any], console: Console) -> None:
    """Prints the figures and the answers before and after."""
    serving, finetuning = summary["serving"], summary["finetuning"]
    times = Table(title="Requests", title_justify="left")
    for name in ("", "p50", "p90", "p99", "max"):
        times.add_column(name, justify="left" if not name else "right")
    for name, key in (
        ("TTFT, queueing included", "ttft_s"),
        ("TPOT, per request", "tpot_s"),
        ("ITL, every gap", "itl_s"),
    ):
        times.add_row(name, *_milliseconds(serving[key]))
    console.print(times)
    figures = Table.grid(padding=(0, 2))
    for name, value in _figures(summary, serving, finetuning):
        figures.add_row(Text(name, style="bold"), Text(value))
    console.print(figures)
    answers = Table(
        title="The same questions, base model and finetuned adapter, greedy", title_justify="left"
    )
    for name in ("question", "before", "after"):
        answers.add_column(name, ratio=1, overflow="fold")
    for row in summary["answers"]:
        cells = (row["prompt"], row["before"], row["after"])
        answers.add_row(*(Text(shorten(cell, _CELL_CHARACTERS)) for cell in cells))
    console.print(answers)
    output = Path(summary["output"])
    console.print(
        f"Adapter {output / ADAPTER_DIR}, picture {output / PICTURE_FILE}, "
        f"summary {output / SUMMARY_FILE}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _figures(
    summary: dict[str, Any], serving: dict[str, Any], finetuning: dict[str, Any]
) -> list[tuple[str, str]]:
    steps = summary["engine_steps"]
    total = max(1, sum(steps.values()))
    return [
        ("answered", f"{serving['num_requests']} of {serving['num_planned']} requests"),
        (
            "output",
            f"{serving['output_tokens_per_s']:,.1f} tokens/s "
            f"({serving['output_tokens']:,} in {serving['duration_s']:.1f} s)",
        ),
        (
            "finetuning",
            f"{finetuning['tokens_per_s']:,.0f} tokens/s, of them bear loss "
            f"{finetuning['target_tokens_per_s']:,.0f} ({finetuning['steps']} optimizer steps in "
            f"{finetuning['duration_s']:.1f} s)",
        ),
        ("loss", f"{finetuning['first_loss']:.3f} -> {finetuning['last_loss']:.3f}"),
        (
            "engine steps",
            f"{steps['both']:,} with inference and finetuning rows ({steps['both'] / total:.0%}), "
            f"{steps['inference']:,} with inference alone, {steps['finetuning']:,} with "
            "finetuning alone",
        ),
    ]


def _milliseconds(found: dict[str, float] | None) -> list[str]:
    if found is None:
        return ["-"] * 4
    return [f"{1e3 * found[name]:,.1f} ms" for name in ("p50", "p90", "p99", "max")]
