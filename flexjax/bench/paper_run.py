"""The paper's table on the H200's roofline, with what it was made from: measured, joined, saved."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexjax.bench.harness import commit
from flexjax.bench.simulate import (
    PAPER_CONFIG,
    PAPER_MODEL,
    RooflineShares,
    h200_profile,
    simulated_engine,
)
from flexjax.simulator import paper


def measure_paper(
    policies: Sequence[str] = paper.PAPER_POLICIES,
    rates: Sequence[float] = paper.FLEXLLM_RATES,
    duration_s: float = 3600.0,
) -> dict[str, Any]:
    """The paper's table with what it was made from and how long each run took; JSON values.

    Args:
      policies: Names.
      rates: Requests per second.
      duration_s: Simulated seconds of each run.

    Raises:
      ValueError: If a value is out of range.
    """
    runs: list[dict[str, Any]] = []
    began = [time.perf_counter(), time.process_time()]

    def add(row: paper.PaperRow) -> None:
        now = [time.perf_counter(), time.process_time()]
        took = {"wall_s": now[0] - began[0], "cpu_s": now[1] - began[1]}
        runs.append({**dataclasses.asdict(row), **took})
        began[:] = now

    profile = h200_profile()
    engine = simulated_engine(PAPER_MODEL, PAPER_CONFIG)
    options = {"rates": rates, "policies": policies, "duration_s": duration_s}
    began = [time.perf_counter(), time.process_time()]
    paper.paper_table(profile, engine, on_row=add, **options)
    return {
        "profile": "counted from the shapes of the compiled step (roofline), not measured",
        "device": profile.device,
        "model": PAPER_MODEL,
        "shares": dataclasses.asdict(RooflineShares()),
        "config": dataclasses.asdict(PAPER_CONFIG),
        "duration_s": duration_s,
        "commit": commit(),
        "python": platform.python_version(),
        "rows": runs,
    }


def join_paper(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Puts tables together that `measure_paper` made of different policies.

    Raises:
      ValueError: If there are none, or they were not made from the same.
    """
    abouts = [{k: v for k, v in part.items() if k != "rows"} for part in parts]
    if not abouts:
        raise ValueError("`parts` must hold at least one table; got none.")
    different = sorted({k for about in abouts for k in about if about[k] != abouts[0].get(k)})
    if different:
        raise ValueError(f"`parts` must be made from the same; they differ in {different}.")
    return {**abouts[0], "rows": [row for part in parts for row in part["rows"]]}


def paper_report(found: Mapping[str, Any]) -> str:
    """What `measure_paper` gave, as Markdown."""
    rows = [
        paper.PaperRow(
            **{
                **{f.name: row[f.name] for f in dataclasses.fields(paper.PaperRow)},
                "paper": paper.PaperFigures(**row["paper"]),
            }
        )
        for row in found["rows"]
    ]
    shares = ", ".join(f"{name} {value:g}" for name, value in found["shares"].items())
    cpu_s = sorted(row["cpu_s"] for row in found["rows"])
    busiest = max(found["rows"], key=lambda row: row["cpu_s"])
    hours = found["duration_s"] / 3600
    return "\n".join(
        (
            f"# The FlexLLM paper's set-up, {found['model']}, simulated on one H200",
            "",
            "**No step time here was measured.** The device is a roofline: bytes and FLOPs of the",
            f"step, counted from its shapes, over stated shares of the H200's limits ({shares}).",
            "Beside it, in brackets, what the paper reports of one of its A100 pipelines: compare",
            "how figures change with rate and policy, not their size. Targets: 5 s to the first",
            "token, 45 ms a token.",
            "",
            paper.paper_markdown(rows),
            f"{len(rows)} runs of {hours:g} simulated hours each, on one core: median "
            f"{cpu_s[len(cpu_s) // 2]:.0f} s, longest {cpu_s[-1]:.0f} s of CPU time "
            f"({busiest['policy']}, {busiest['rate']:g} requests/s). Commit {found['commit']}.",
            "",
        )
    )


def save_paper(stem: Path, found: Mapping[str, Any], *, append: bool = False) -> None:
    """Writes the table as STEM.md, and all of it as STEM.json.

    Args:
      stem: Path without a suffix; its folder must be there.
      found: What `measure_paper` gave.
      append: Whether to keep the rows of other policies that STEM.json holds.

    Raises:
      ValueError: If those were made from something else.
    """
    file = stem.with_suffix(".json")
    if append and file.exists():
        policies = {row["policy"] for row in found["rows"]}
        earlier = json.loads(file.read_text(encoding="utf-8"))
        kept = [row for row in earlier["rows"] if row["policy"] not in policies]
        found = join_paper([{**earlier, "rows": kept}, json.loads(json.dumps(found))])
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(paper_report(found), encoding="utf-8")
