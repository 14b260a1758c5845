"""Loads of any rate from one source, and what a machine can do of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flexjax.bench.serving import run_workload
from flexjax.engine.engine import Engine
from flexjax.metrics import percentile
from flexjax.metrics.checks import require
from flexjax.slo import NO_SLO
from flexjax.workload import (
    Arrival,
    ConstantLength,
    IndependentLengths,
    Popularity,
    RequestLengths,
    TraceLengths,
    Workload,
    burst_arrivals,
    gamma_arrivals,
    with_adapters,
    with_lengths,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadSource:
    """Makes workloads of any rate.

    Each holds exactly `round(rate * seconds)` requests, at least one, and the first arrives at 0:
    gaps are drawn, or taken from a random place of the trace, and stretched to fit.

    Attributes:
      name: Name of the workloads.
      lengths: What lengths are drawn from; None for those of the trace.
      trace: Requests in order of arrival; None for drawn gaps.
      burstiness: Shape of the gamma distribution of drawn gaps; 1 is a Poisson process.
      adapters: Adapters that answer; none for the base model.
      popularity: As in `with_adapters`; "zipf" has exponent 1.

    Raises:
      ValueError: If lengths are missing, or a trace comes without them where `lengths` is None.
    """

    name: str
    lengths: RequestLengths | None = None
    trace: Sequence[Arrival] | None = None
    burstiness: float = 1.0
    adapters: Sequence[str] = ()
    popularity: Popularity = "uniform"

    def __post_init__(self) -> None:
        has_own = self.trace is not None and all(
            a.prompt_tokens is not None and a.output_tokens is not None for a in self.trace
        )
        is_right = self.lengths is not None or has_own
        require(is_right, "lengths", "given where the trace has none", self.lengths)

    def workload(self, rate: float, seconds: float, seed: int) -> Workload:
        """Requests of `seconds` seconds at a rate.

        Raises:
          ValueError: If a number is not positive, or the trace holds too few requests, or only
            requests that arrive at once.
        """
        for name, value in (("rate", rate), ("seconds", seconds)):
            require(math.isfinite(value) and value > 0, name, "a number > 0", value)
        count = max(1, round(rate * seconds))
        if self.trace is None:
            arrivals = gamma_arrivals(rate, count + 1, seed, burstiness=self.burstiness)
        else:
            rule = f"at least {count + 1} requests long, for {rate:g} a second"
            require(len(self.trace) > count, "trace", rule, len(self.trace))
            start = int(np.random.default_rng(seed).integers(len(self.trace) - count))
            arrivals = list(self.trace[start : start + count + 1])
        first_s, span_s = arrivals[0].arrival_s, arrivals[-1].arrival_s - arrivals[0].arrival_s
        require(span_s > 0, "trace", "of requests at different times", span_s)
        scale = seconds / span_s
        fitted = [
            dataclasses.replace(a, arrival_s=(a.arrival_s - first_s) * scale)
            for a in arrivals[:count]
        ]
        return self._labelled(fitted, seed, {"rate": rate, "seconds": seconds})

    def burst(self, burst: Burst, seconds: float, seed: int) -> Workload:
        """Requests of a Poisson process with one burst, whatever the gaps of the source are."""
        arrivals = burst_arrivals(
            burst.base_rate,
            seconds,
            seed,
            burst_factor=burst.factor,
            burst_start_s=burst.start_s,
            burst_length_s=burst.length_s,
        )
        settings = {**dataclasses.asdict(burst), "seconds": seconds}
        return self._labelled(arrivals, seed, settings, suffix="-burst")

    def _labelled(
        self,
        arrivals: list[Arrival],
        seed: int,
        settings: Mapping[str, Any],
        suffix: str = "",
    ) -> Workload:
        lengths = self.lengths
        if lengths is None and suffix:  # drawn arrivals have none of their own
            lengths = TraceLengths.of(self.trace or ())
        if lengths is not None:
            arrivals = with_lengths(arrivals, lengths, seed)
        if self.adapters:
            alpha = 1.0 if self.popularity == "zipf" else None
            arrivals = with_adapters(arrivals, self.adapters, self.popularity, seed, alpha=alpha)
        return Workload(self.name + suffix, arrivals, seed, settings)


@dataclasses.dataclass(frozen=True)
class Burst:
    """A load that rises for a while.

    Attributes:
      base_rate: Requests per second before and after.
      factor: What the rate is multiplied by.
      start_s: When it rises.
      length_s: For how long.
    """

    base_rate: float
    factor: float
    start_s: float
    length_s: float


def measure_idle_itl_s(engine: Engine, *, prompt_tokens: int, output_tokens: int) -> float:
    """Seconds between two tokens of a request that has the engine to itself; the median gap.

    Raises:
      ValueError: If there are fewer than two output tokens; see also `run_workload`.
    """
    require(output_tokens >= 2, "output_tokens", "at least 2", output_tokens)
    request = Arrival(0.0, prompt_tokens, output_tokens)
    run = run_workload(engine, Workload("idle", [request]), policy="inference_only")
    return percentile(run.requests[0].itl_s, 50)


def measure_capacity(engine: Engine, source: LoadSource, *, num_requests: int, seed: int) -> float:
    """Requests per second that the engine answers without finetuning, when all come at once.

    Raises:
      ValueError: See `run_workload` and `LoadSource.workload`.
    """
    spread = source.workload(float(num_requests), 1.0, seed)
    arrivals = [dataclasses.replace(a, arrival_s=0.0) for a in spread.arrivals]
    workload = Workload("capacity", arrivals, seed)
    run = run_workload(engine, workload, policy="inference_only", targets=NO_SLO, seed=seed)
    last_s = max(request.token_times_s[-1] for request in run.requests)
    return len(run.requests) / (last_s - run.begin_s)


def constant_lengths(prompt_tokens: int, output_tokens: int) -> RequestLengths:
    """The same prompt and output length for every request."""
    return IndependentLengths(ConstantLength(prompt_tokens), ConstantLength(output_tokens))
