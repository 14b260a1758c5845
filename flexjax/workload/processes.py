"""Arrival processes beside the Poisson process of `arrivals`.

All are reproducible from their seed with one version of numpy, whose streams may change between
versions; a workload written with `Workload.to_jsonl` does not.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flexjax.workload._checks import generator, require_count, require_number
from flexjax.workload.arrivals import Arrival

Spacing = Literal["poisson", "fixed"]


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of constant rate; exactly one of `num_requests` and `duration_s` says how long.

    Attributes:
      rate: Requests per second; 0, a pause, only with a duration.
      num_requests: Requests of the phase.
      duration_s: Seconds of the phase; its requests arrive before they are over.
      start_s: When it starts, in seconds, whatever the other phases do; None for the end of the
        phase before it. A phase given by its requests ends one interval after its last request
        where intervals are fixed, and at its last request otherwise.

    Raises:
      ValueError: If a value is out of range.
    """

    rate: float
    num_requests: int | None = None
    duration_s: float | None = None
    start_s: float | None = None

    def __post_init__(self) -> None:
        if (self.num_requests is None) == (self.duration_s is None):
            raise ValueError(
                "exactly one of `num_requests` and `duration_s` must be given; got "
                f"{self.num_requests!r} and {self.duration_s!r}."
            )
        require_number("rate", self.rate, positive=self.duration_s is None)
        if self.num_requests is not None:
            require_count("num_requests", self.num_requests)
        if self.duration_s is not None:
            require_number("duration_s", self.duration_s, positive=True)
        if self.start_s is not None:
            require_number("start_s", self.start_s)


def uniform_arrivals(interval_s: float, n: int, *, offset_s: float = 0.0) -> list[Arrival]:
    """Arrivals at `offset_s`, `offset_s + interval_s`, and so on.

    Args:
      interval_s: Seconds between two requests.
      n: Number of arrivals.
      offset_s: When the first request arrives, in seconds.

    Raises:
      ValueError: If `interval_s` is not positive, `n` below 1 or `offset_s` negative.
    """
    require_number("interval_s", interval_s, positive=True)
    require_count("n", n)
    require_number("offset_s", offset_s)
    return [Arrival(offset_s + index * interval_s) for index in range(n)]


def gamma_arrivals(rate: float, n: int, seed: int, *, burstiness: float = 1.0) -> list[Arrival]:
    """Arrivals whose gaps follow a gamma distribution of mean `1 / rate`.

    The shape is `burstiness`, so that the gaps' coefficient of variation is `burstiness ** -0.5`:
    1 is a Poisson process, less is burstier, more is closer to a fixed interval.

    Args:
      rate: Mean requests per second.
      n: Number of arrivals.
      seed: Seed of the draws.
      burstiness: Shape of the distribution of gaps.

    Raises:
      ValueError: If `rate` or `burstiness` is not positive, `n` below 1 or `seed` negative.
    """
    require_number("rate", rate, positive=True)
    require_count("n", n)
    require_number("burstiness", burstiness, positive=True)
    gaps = generator(seed, "arrivals").gamma(burstiness, 1 / (rate * burstiness), n)
    return _at(np.cumsum(gaps))


def phased_arrivals(
    phases: Sequence[Phase], seed: int = 0, *, spacing: Spacing = "poisson"
) -> list[Arrival]:
    """Arrivals of piecewise constant rate; phases may overlap, their requests are then merged.

    Args:
      phases: Stretches of constant rate.
      seed: Seed of the draws; fixed spacing draws nothing.
      spacing: "poisson" for a Poisson process in each phase, "fixed" for one request at a phase's
        start and one every `1 / rate` seconds after it.

    Returns:
      The requests in order of arrival; none is possible where phases are given by durations.

    Raises:
      ValueError: If there is no phase, `spacing` is unknown or `seed` negative.
    """
    if not phases:
        raise ValueError("`phases` must hold at least one phase; got none.")
    if spacing not in ("poisson", "fixed"):
        raise ValueError(f"`spacing` must be 'poisson' or 'fixed'; got {spacing!r}.")
    draws = generator(seed, "arrivals")
    end_s = 0.0
    parts: list[list[Arrival]] = []
    for phase in phases:
        start_s = end_s if phase.start_s is None else phase.start_s
        if spacing == "fixed":
            times = start_s + _fixed_times(phase)
        else:
            times = start_s + _poisson_times(phase, draws)
        if phase.duration_s is not None:
            end_s = start_s + phase.duration_s
        elif spacing == "fixed":
            end_s = start_s + len(times) / phase.rate
        else:
            end_s = float(times[-1])
        parts.append(_at(times))
    return merge_arrivals(*parts)


def ramp_arrivals(
    start_rate: float, end_rate: float, duration_s: float, seed: int
) -> list[Arrival]:
    """A Poisson process whose rate goes from `start_rate` to `end_rate` in a straight line.

    The number of requests is drawn too; its mean is `duration_s * (start_rate + end_rate) / 2`.

    Args:
      start_rate: Requests per second at 0.
      end_rate: Requests per second at `duration_s`.
      duration_s: Seconds of the ramp.
      seed: Seed of the draws.

    Returns:
      The requests in order of arrival; none is possible where few are expected.

    Raises:
      ValueError: If a rate is negative, both are 0, `duration_s` is not positive or `seed`
        negative.
    """
    require_number("start_rate", start_rate)
    require_number("end_rate", end_rate)
    require_number("duration_s", duration_s, positive=True)
    if start_rate == 0 == end_rate:
        raise ValueError("`start_rate` and `end_rate` must not both be 0; got 0 and 0.")
    draws = generator(seed, "arrivals")
    expected = duration_s * (start_rate + end_rate) / 2
    # Given their number, the requests before t are uniform in expected(t), which is inverted in
    # the form that has no cancellation where the ramp is flat.
    before = expected * (1 - np.sort(draws.random(draws.poisson(expected)))[::-1])
    slope = (end_rate - start_rate) / duration_s
    root = np.sqrt(np.maximum(start_rate**2 + 2 * slope * before, 0.0))  # -1e-17 where it ends at 0
    return _at(2 * before / (start_rate + root))


def burst_arrivals(
    base_rate: float,
    duration_s: float,
    seed: int = 0,
    *,
    burst_factor: float,
    burst_start_s: float,
    burst_length_s: float,
    spacing: Spacing = "poisson",
) -> list[Arrival]:
    """A constant rate, multiplied by `burst_factor` during one burst.

    Args:
      base_rate: Requests per second outside the burst.
      duration_s: Seconds of the whole.
      seed: Seed of the draws.
      burst_factor: Rate inside the burst over the rate outside.
      burst_start_s: When the burst starts, in seconds.
      burst_length_s: Seconds of the burst, which must end by `duration_s`.
      spacing: As in `phased_arrivals`.

    Raises:
      ValueError: If a value is out of range or the burst does not end by `duration_s`.
    """
    require_number("base_rate", base_rate, positive=True)
    require_number("duration_s", duration_s, positive=True)
    require_number("burst_factor", burst_factor)
    require_number("burst_start_s", burst_start_s)
    require_number("burst_length_s", burst_length_s, positive=True)
    end_s = burst_start_s + burst_length_s
    if end_s > duration_s:
        raise ValueError(
            f"`burst_start_s` + `burst_length_s` must be at most `duration_s`, {duration_s}; got "
            f"{burst_start_s} + {burst_length_s}."
        )
    rates = (base_rate, base_rate * burst_factor, base_rate)
    bounds = (0.0, burst_start_s, end_s, duration_s)
    phases = [
        Phase(rate, duration_s=stop_s - start_s, start_s=start_s)
        for rate, start_s, stop_s in zip(rates, bounds, bounds[1:], strict=False)
        if stop_s > start_s
    ]
    return phased_arrivals(phases, seed, spacing=spacing)


def merge_arrivals(*parts: Iterable[Arrival]) -> list[Arrival]:
    """Joins workloads that run side by side, in order of arrival.

    Of requests that arrive at the same time, those of an earlier argument come first.

    Args:
      *parts: Requests, each part in order of arrival.
    """
    return list(heapq.merge(*parts, key=lambda arrival: arrival.arrival_s))


def _fixed_times(phase: Phase) -> NDArray[np.float64]:
    """Seconds after the phase's start."""
    if phase.num_requests is not None:
        return np.arange(phase.num_requests) / phase.rate
    duration_s = phase.duration_s or 0.0
    if phase.rate == 0:
        return np.zeros(0)
    times = np.arange(math.ceil(duration_s * phase.rate) + 1) / phase.rate
    return times[times < duration_s]


def _poisson_times(phase: Phase, draws: np.random.Generator) -> NDArray[np.float64]:
    """Seconds after the phase's start."""
    if phase.num_requests is not None:
        return np.cumsum(draws.exponential(1 / phase.rate, phase.num_requests))
    duration_s = phase.duration_s or 0.0
    num_requests = draws.poisson(phase.rate * duration_s)
    return np.sort(draws.random(num_requests)) * duration_s


def _at(times: NDArray[np.float64]) -> list[Arrival]:
    return [Arrival(time_s) for time_s in times.tolist()]
