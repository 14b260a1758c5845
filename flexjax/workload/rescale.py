"""Traces brought to another rate, and parts of traces."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from flexjax.workload._checks import generator, require_number
from flexjax.workload.arrivals import Arrival


def mean_rate(arrivals: Sequence[Arrival]) -> float:
    """Requests per second: one over the mean gap between requests.

    Args:
      arrivals: Requests in order of arrival.

    Raises:
      ValueError: If there are fewer than two requests, all arrive at once, or they are not in
        order.
    """
    _require_order(arrivals)
    span_s = arrivals[-1].arrival_s - arrivals[0].arrival_s if arrivals else 0.0
    if span_s <= 0:
        raise ValueError(
            "`arrivals` must hold two requests that arrive at different times; got "
            f"{len(arrivals)} in {span_s} s."
        )
    return (len(arrivals) - 1) / span_s


def rescale_rate(arrivals: Sequence[Arrival], rate: float) -> list[Arrival]:
    """Stretches or shrinks all gaps by one factor, so that `mean_rate` becomes `rate`.

    Every request stays, and the shape of bursts does; their length in seconds does not. The first
    request keeps its time.

    Args:
      arrivals: Requests in order of arrival.
      rate: Requests per second afterwards.

    Raises:
      ValueError: If `rate` is not positive or `arrivals` have no rate (see `mean_rate`).
    """
    require_number("rate", rate, positive=True)
    factor = mean_rate(arrivals) / rate
    first_s = arrivals[0].arrival_s
    return [
        dataclasses.replace(arrival, arrival_s=first_s + (arrival.arrival_s - first_s) * factor)
        for arrival in arrivals
    ]


def resample_rate(
    arrivals: Sequence[Arrival], rate: float, length_s: float, seed: int, *, jitter_s: float = 1.0
) -> list[Arrival]:
    """Leaves requests out or repeats them, so that `round(rate * length_s)` are left.

    Bursts keep their place and length. Below the trace's rate, requests are drawn without
    replacement. Above it, all stay, each is repeated equally often, and the rest is drawn; a copy
    arrives at a random time at most `jitter_s` from its original, within [0, length_s). Repeated
    requests have the lengths of their originals: draw lengths afterwards where that matters.

    Args:
      arrivals: Requests in order of arrival, all within [0, length_s); `slice_time` makes them.
      rate: Requests per second afterwards, on average over `length_s`.
      length_s: Seconds that the trace stands for; it may begin or end without a request.
      seed: Seed of the draws.
      jitter_s: Longest time between a copy and its original, in seconds.

    Raises:
      ValueError: If there is no request, one lies outside [0, length_s), they are not in order, a
        number is out of range, or not one request would be left.
    """
    require_number("rate", rate, positive=True)
    require_number("length_s", length_s, positive=True)
    require_number("jitter_s", jitter_s)
    _require_order(arrivals)
    if not arrivals:
        raise ValueError("`arrivals` must hold at least one request; got none.")
    if arrivals[-1].arrival_s >= length_s:
        raise ValueError(
            f"`length_s` must be more than the last arrival, {arrivals[-1].arrival_s}; got "
            f"{length_s!r}."
        )
    num_requests = round(rate * length_s)
    if num_requests < 1:
        raise ValueError(f"`rate` * `length_s` must be at least 1; got {rate} * {length_s}.")
    draws = generator(seed, "resample")
    num_rounds, num_drawn = divmod(num_requests, len(arrivals))
    drawn = draws.choice(len(arrivals), num_drawn, replace=False).tolist()
    if num_rounds == 0:
        return [arrivals[index] for index in sorted(drawn)]
    resampled = list(arrivals)
    for index in [*range(len(arrivals))] * (num_rounds - 1) + drawn:
        time_s = arrivals[index].arrival_s
        first_s, last_s = max(0.0, time_s - jitter_s), min(length_s, time_s + jitter_s)
        time_s = time_s if jitter_s == 0 else float(draws.uniform(first_s, last_s))
        resampled.append(dataclasses.replace(arrivals[index], arrival_s=time_s))
    return sorted(resampled, key=lambda arrival: arrival.arrival_s)


def slice_time(arrivals: Sequence[Arrival], start_s: float, length_s: float) -> list[Arrival]:
    """The requests of [start_s, start_s + length_s), with `start_s` as the new 0.

    Args:
      arrivals: Requests.
      start_s: First second that is taken.
      length_s: Seconds that are taken.

    Returns:
      The requests; none where nothing arrives in that time.

    Raises:
      ValueError: If `start_s` is negative or `length_s` not positive.
    """
    require_number("start_s", start_s)
    require_number("length_s", length_s, positive=True)
    return [
        dataclasses.replace(arrival, arrival_s=arrival.arrival_s - start_s)
        for arrival in arrivals
        if arrival.arrival_s >= start_s and arrival.arrival_s - start_s < length_s
    ]


def random_slice(arrivals: Sequence[Arrival], length_s: float, seed: int) -> list[Arrival]:
    """`slice_time` from a random start, such that the slice lies inside the trace.

    Args:
      arrivals: Requests in order of arrival.
      length_s: Seconds that are taken.
      seed: Seed of the start.

    Raises:
      ValueError: If `length_s` is not positive or longer than the trace, or requests are not in
        order.
    """
    require_number("length_s", length_s, positive=True)
    _require_order(arrivals)
    span_s = arrivals[-1].arrival_s - arrivals[0].arrival_s if arrivals else 0.0
    if length_s > span_s:
        raise ValueError(f"`length_s` must be at most the trace's {span_s} s; got {length_s!r}.")
    start_s = arrivals[0].arrival_s + generator(seed, "slice").random() * (span_s - length_s)
    return slice_time(arrivals, start_s, length_s)


def _require_order(arrivals: Sequence[Arrival]) -> None:
    for index in range(1, len(arrivals)):
        if arrivals[index].arrival_s < arrivals[index - 1].arrival_s:
            raise ValueError(
                "`arrivals` must be in order of arrival; got "
                f"{arrivals[index].arrival_s} after {arrivals[index - 1].arrival_s}."
            )
