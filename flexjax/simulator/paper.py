"""The FlexLLM paper's set-up at 8B (arXiv 2402.18789), simulated, beside what the paper reports.

Owns the load, the targets, the paper's figures and the table; the device is the caller's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from flexjax.config import FinetuneConfig
from flexjax.metrics.report import summarize_run
from flexjax.metrics.slo import Tier
from flexjax.scheduler.latency_profile import LatencyProfile
from flexjax.simulator.runs import make_header
from flexjax.simulator.setup import (
    DeviceTimes,
    HostTimes,
    SimulatedEngine,
    SimulatedJob,
    SimulationOptions,
    require,
    require_number,
)
from flexjax.simulator.simulator import Simulator
from flexjax.slo import SLO
from flexjax.workload.lengths import IndependentLengths, LognormalLength, draw_lengths
from flexjax.workload.loads import FLEXLLM_RATES, flexllm_load
from flexjax.workload.workload import Workload

PAPER_SLO = SLO(ttft_ms=5_000.0, tpot_ms=45.0)
"""The paper's targets for 8B."""

PAPER_TIER = Tier("paper", PAPER_SLO.ttft_s, PAPER_SLO.tpot_s)
"""The same, to judge by."""

PAPER_LENGTHS = IndependentLengths(
    LognormalLength(70.0, 1.5, 8000, 4), LognormalLength(170.0, 0.92, 4096, 2)
)
"""Prompts of about 210 tokens and outputs of about 260 on average, both with long tails. The mean
output is the paper's, from its throughput; the shapes are ours, for ShareGPT is not at hand."""

PAPER_SEQUENCES = LognormalLength(3500.0, 0.5, 8192, 64)
"""Finetuning sequences of about 3,700 tokens on average, up to 8,192; ours, in place of Sky-T1."""

PAPER_POLICIES = (
    "co_serve",
    "temporal:64",
    "temporal:128",
    "temporal:512",
    "dynamic_temporal",
    "spatial:0.5",
    "inference_only",
)


@dataclasses.dataclass(frozen=True)
class PaperFigures:
    """What the paper reports of one of its pipelines, an A100-80GB; None where it does not say.

    Attributes:
      forward_tokens_per_s: Finetuning tokens per second, forward passes counted.
      attainment: Share of requests within both targets.
      tpot_ms: Mean TPOT.
    """

    forward_tokens_per_s: float | None = None
    attainment: float | None = None
    tpot_ms: float | None = None


# Finetuning tokens per second of four pipelines at 1 to 5 requests a second each.
_FINETUNING = {
    "co_serve": (9408, 8915, 8373, 7751, 7195),
    "temporal:64": (9807, 9386, 8875, 8443, 7989),
    "temporal:128": (6375, 5818, 5568, 5239, 4750),
    "temporal:512": (2034, 1796, 1693, 1477, 1375),
    "dynamic_temporal": (7648, 7284, 6864, 6398, 5943),
    "spatial:0.5": (8443, 8171, 7716, 7171, 6784),
}
# Attainment, read off figures; None where curves overlap too much to read.
_ATTAINMENT: Mapping[str, tuple[float | None, ...]] = {
    "co_serve": (0.99, 0.99, 0.99, 0.98, 0.977),
    "temporal:64": (None, None, None, None, 0.98),
    "temporal:128": (None, None, None, None, 0.98),
    "temporal:512": (None, None, None, None, 0.99),
    "dynamic_temporal": (None, None, None, None, 0.98),
    "spatial:0.5": (0.973, 0.972, 0.969, 0.933, 0.924),
}
# Milliseconds; "inference_only" is vLLM alone on the same GPU.
_TPOT_MS: Mapping[str, tuple[float | None, ...]] = {
    "co_serve": (32.6, 33.6, 34.9, 36.1, 36.7),
    "inference_only": (None, 13.0, None, 15.5, None),
}


def paper_figures(policy: str, rate: float) -> PaperFigures:
    """What the paper reports of a policy at a rate; all None where it reports nothing."""
    if rate not in FLEXLLM_RATES:
        return PaperFigures()
    index = FLEXLLM_RATES.index(rate)
    total = _FINETUNING[policy][index] if policy in _FINETUNING else None
    return PaperFigures(
        None if total is None else total / 4,
        _ATTAINMENT.get(policy, (None,) * 5)[index],
        _TPOT_MS.get(policy, (None,) * 5)[index],
    )


@dataclasses.dataclass(frozen=True)
class PaperRow:
    """One policy at one rate, simulated, beside the paper.

    Attributes:
      policy: Name of the policy.
      rate: Requests per second.
      num_requests: Requests that were due in the measured time.
      target_tokens_per_s: Loss-bearing tokens of finished optimizer steps, per second.
      forward_tokens_per_s: Finetuning rows that went forward, per second: the paper's count.
      retention: `forward_tokens_per_s` over that of the same policy at the first rate; None
        without finetuning there.
      attainment: Share of requests within both targets; None without requests.
      tpot_ms: Mean TPOT; None without one.
      itl_p99_ms: 99th percentile of the gaps between tokens; None without one.
      itl_max_ms: Longest gap: turns of finetuning may be rarer than one gap of a hundred.
      ttft_p99_s: 99th percentile of TTFT; None without one.
      num_steps: Steps in the measured time.
      paper: The paper's figures.
    """

    policy: str
    rate: float
    num_requests: int
    target_tokens_per_s: float
    forward_tokens_per_s: float
    retention: float | None
    attainment: float | None
    tpot_ms: float | None
    itl_p99_ms: float | None
    itl_max_ms: float | None
    ttft_p99_s: float | None
    num_steps: int
    paper: PaperFigures


def paper_workload(rate: float, duration_s: float = 3600.0, seed: int = 42) -> Workload:
    """Poisson arrivals at a rate, all for one adapter, with `PAPER_LENGTHS`.

    Raises:
      ValueError: If a value is out of range.
    """
    return flexllm_load(rate, PAPER_LENGTHS, adapter="served", duration_s=duration_s, seed=seed)


def paper_job(num_sequences: int = 1000, seed: int = 42) -> SimulatedJob:
    """A job that outlasts every run: batches of 8, lengths from `PAPER_SEQUENCES`.

    Raises:
      ValueError: If a value is out of range.
    """
    config = FinetuneConfig(adapter="trained", dataset=(), batch_size=8, max_steps=10**9)
    return SimulatedJob(config, draw_lengths(PAPER_SEQUENCES, num_sequences, seed))


def paper_table(
    profile: LatencyProfile,
    engine: SimulatedEngine,
    *,
    rates: Sequence[float] = FLEXLLM_RATES,
    policies: Sequence[str] = PAPER_POLICIES,
    duration_s: float = 3600.0,
    drain_s: float = 200.0,
    noise: float = 0.05,
    host: HostTimes | None = None,
    seed: int = 42,
    on_row: Callable[[PaperRow], None] | None = None,
) -> tuple[PaperRow, ...]:
    """Simulates every policy at every rate.

    The paper's columns come from another GPU, other adapters (one linear instead of seven) and
    another optimizer: compare how figures change with rate and policy, not their size.

    Args:
      profile: Of the device; its formula is taken as the truth.
      engine: Sizes.
      rates: Requests per second.
      policies: Names.
      duration_s: Measured seconds of each run.
      drain_s: Seconds in which requests may end afterwards; those that do not have missed. The
        default is enough for the longest output at its target.
      noise: See `DeviceTimes`.
      host: None for the defaults.
      seed: Of arrivals, lengths and noise.
      on_row: Called with each row once it is there.

    Returns:
      One row a run, policy by policy.

    Raises:
      ValueError: If a value is out of range.
    """
    require_number("duration_s", duration_s, is_positive=True)
    require(len(rates) > 0, "rates", "at least one rate", rates)
    rows: list[PaperRow] = []
    for policy in policies:
        first = None
        for rate in rates:
            device = DeviceTimes(profile, noise=noise, seed=seed)
            options = SimulationOptions(
                slo=PAPER_SLO, device=device, host=host or HostTimes(), record_every=0
            )
            simulator = Simulator(profile, engine, policy, [paper_job(seed=seed)], options)
            workload = paper_workload(rate, duration_s, seed)
            for request_id, arrival in enumerate(workload.arrivals):
                simulator.submit(request_id, arrival)
            simulator.run(duration_s, drain_s)
            row = _row(simulator, workload, profile, policy, rate, first)
            first = first or row
            rows.append(row)
            if on_row is not None:
                on_row(row)
    return tuple(rows)


def _row(
    simulator: Simulator,
    workload: Workload,
    profile: LatencyProfile,
    policy: str,
    rate: float,
    first: PaperRow | None,
) -> PaperRow:
    record = simulator.run_record(make_header(workload, profile, simulator.engine, policy))
    summary, totals = summarize_run(record, [PAPER_TIER]), simulator.recording.totals
    requests = summary.requests
    forward = totals.forward_rows / summary.duration_s
    base = first.forward_tokens_per_s if first else forward
    return PaperRow(
        policy=policy,
        rate=rate,
        num_requests=requests.num_requests,
        target_tokens_per_s=summary.finetuning.target_tokens_per_s,
        forward_tokens_per_s=forward,
        retention=forward / base if base else None,
        attainment=requests.tiers[0].attainment,
        tpot_ms=requests.tpot_s and 1e3 * requests.tpot_s.mean,
        itl_p99_ms=requests.itl_s and 1e3 * requests.itl_s.p99,
        itl_max_ms=requests.itl_s and 1e3 * requests.itl_s.max,
        ttft_p99_s=requests.ttft_s and requests.ttft_s.p99,
        num_steps=totals.num_steps,
        paper=paper_figures(policy, rate),
    )


def paper_markdown(rows: Sequence[PaperRow]) -> str:
    """The rows as a Markdown table, the paper's figures in brackets; "-" where there is none."""
    columns = (
        "policy",
        "requests/s",
        "finetuning, tokens/s (paper)",
        "retention",
        "attainment (paper)",
        "mean TPOT, ms (paper)",
        "ITL p99 / max, ms",
    )
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        paper = row.paper
        cells = (
            row.policy,
            f"{row.rate:g}",
            _pair(row.forward_tokens_per_s, paper.forward_tokens_per_s, "{:,.0f}"),
            _text(row.retention, "{:.0%}"),
            _pair(row.attainment, paper.attainment, "{:.1%}"),
            _pair(row.tpot_ms, paper.tpot_ms, "{:.1f}"),
            f"{_text(row.itl_p99_ms, '{:.1f}')} / {_text(row.itl_max_ms, '{:.1f}')}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _pair(ours: float | None, theirs: float | None, form: str) -> str:
    return f"{_text(ours, form)} ({_text(theirs, form)})"
