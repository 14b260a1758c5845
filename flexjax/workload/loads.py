"""Loads of the papers that FlexJAX is compared with, ready-made.

Loquetier (arXiv 2511.00101) sends requests at fixed intervals, or as two days of a public trace had
them; FlexLLM (arXiv 2402.18789) takes ten minutes of that trace at 1 to 5 requests a second.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from flexjax.workload._checks import (
    generator,
    require_count,
    require_name,
    require_names,
    require_number,
)
from flexjax.workload.arrivals import Arrival
from flexjax.workload.labels import with_adapters
from flexjax.workload.lengths import RequestLengths, with_lengths
from flexjax.workload.processes import Phase, merge_arrivals, phased_arrivals, uniform_arrivals
from flexjax.workload.rescale import random_slice, resample_rate
from flexjax.workload.workload import Workload

FLEXLLM_RATES = (1.0, 2.0, 3.0, 4.0, 5.0)
"""Requests per second that FlexLLM was measured at, for one of its pipelines."""

LOQUETIER_CHANGING_PHASES = (
    Phase(1 / 1.0, num_requests=120, start_s=0.0),
    Phase(1 / 0.4, num_requests=150, start_s=120.0),
    Phase(1 / 0.5, num_requests=240, start_s=180.0),
    Phase(1 / 1.0, num_requests=120, start_s=300.0),
)
"""Loquetier's changing load: the rate rises, falls a little, and falls back."""

LOQUETIER_BURST_MINUTES = (120, 24, 80, 423, 11_325)
"""Loquetier's burst load, days 29 and 33 of BurstGPT: its minutes (7,196 s are just under 120), the
requests of the quietest, the median and the busiest minute, and of all minutes together."""


def loquetier_one_adapter(
    adapter: str, lengths: RequestLengths | None = None, *, seed: int = 0, time_scale: float = 1.0
) -> Workload:
    """800 requests to one adapter, one a second.

    Args:
      adapter: Name of the adapter.
      lengths: What prompt and output lengths are drawn from; None for none.
      seed: Seed of the lengths.
      time_scale: All times are multiplied by this.

    Raises:
      ValueError: If `time_scale` is not positive, `adapter` empty or `seed` negative.
    """
    require_name("adapter", adapter)
    require_number("time_scale", time_scale, positive=True)
    arrivals = with_adapters(uniform_arrivals(time_scale, 800), [adapter], "identical")
    return _loquetier("one-adapter", arrivals, lengths, seed, time_scale)


def loquetier_four_adapters(
    adapters: Sequence[str],
    lengths: RequestLengths | None = None,
    *,
    seed: int = 0,
    time_scale: float = 1.0,
) -> Workload:
    """200 requests to each of four adapters, one every 4 s, staggered by 1 s.

    Args:
      adapters: Names of the four adapters.
      lengths: What prompt and output lengths are drawn from; None for none.
      seed: Seed of the lengths.
      time_scale: All times are multiplied by this.

    Raises:
      ValueError: If there are not four adapters, a name is repeated or empty, `time_scale` is not
        positive or `seed` negative.
    """
    require_number("time_scale", time_scale, positive=True)
    require_names("adapters", adapters)
    if len(adapters) != 4 or len(set(adapters)) != 4:
        raise ValueError(f"`adapters` must be four different names; got {list(adapters)}.")
    streams = []
    for index, adapter in enumerate(adapters):
        stream = uniform_arrivals(4 * time_scale, 200, offset_s=index * time_scale)
        streams.append(with_adapters(stream, [adapter], "identical"))
    return _loquetier("four-adapters", merge_arrivals(*streams), lengths, seed, time_scale)


def loquetier_changing_load(
    adapter: str, lengths: RequestLengths | None = None, *, seed: int = 0, time_scale: float = 1.0
) -> Workload:
    """630 requests to one adapter at the intervals of `LOQUETIER_CHANGING_PHASES`.

    Args:
      adapter: Name of the adapter.
      lengths: What prompt and output lengths are drawn from; None for none.
      seed: Seed of the lengths.
      time_scale: All times are multiplied by this.

    Raises:
      ValueError: If `time_scale` is not positive, `adapter` empty or `seed` negative.
    """
    require_name("adapter", adapter)
    require_number("time_scale", time_scale, positive=True)
    phases = [
        Phase(
            phase.rate / time_scale,
            num_requests=phase.num_requests,
            start_s=(phase.start_s or 0.0) * time_scale,
        )
        for phase in LOQUETIER_CHANGING_PHASES
    ]
    arrivals = with_adapters(phased_arrivals(phases, spacing="fixed"), [adapter], "identical")
    return _loquetier("changing-load", arrivals, lengths, seed, time_scale)


def loquetier_burst_load(
    adapters: Sequence[str],
    lengths: RequestLengths | None = None,
    *,
    trace: Sequence[Arrival] | None = None,
    seed: int = 0,
    time_scale: float = 1.0,
) -> Workload:
    """Requests of two hours that come in bursts, to each adapter in turn.

    Without a trace, minutes are drawn that have what is published of it (see
    `LOQUETIER_BURST_MINUTES`): their quietest, median and busiest number of requests and, within
    one in a hundred, their total; which minute follows which is drawn, and so is the place of
    requests in their minute.

    Args:
      adapters: Names of the adapters.
      lengths: What prompt and output lengths are drawn from; None for none.
      trace: Arrivals to take instead, all of them, such as BurstGPT's own; lengths and adapters
        that they have are replaced.
      seed: Seed of the minutes and the lengths.
      time_scale: All times are multiplied by this.

    Raises:
      ValueError: If there is no adapter, a name is repeated or empty, `time_scale` is not positive,
        `seed` negative or the trace empty.
    """
    require_number("time_scale", time_scale, positive=True)
    if trace is None:
        arrivals = _burst_arrivals(seed)
    elif trace:
        arrivals = [Arrival(arrival.arrival_s) for arrival in trace]
    else:
        raise ValueError("`trace` must hold at least one request; got none.")
    scaled = [Arrival(arrival.arrival_s * time_scale) for arrival in arrivals]
    labelled = with_adapters(scaled, adapters, "distinct")
    return _loquetier("burst", labelled, lengths, seed, time_scale, is_drawn=trace is None)


def fit_load(workload: Workload, rate: float, seconds: float) -> Workload:
    """Brings a load to a mean rate and a length that suit the machine at hand.

    The shape stays: arrivals are read off the load's own course, whatever fraction of its requests
    that takes, and all times shrink by one factor. The first arrives at 0; request i has the
    lengths of the one at its place in the load, and the adapter of the load's request i, so that
    adapters keep their turns.

    Args:
      workload: At least two requests, not all at once.
      rate: Mean requests per second afterwards.
      seconds: How long the load takes afterwards, the gap behind its last request included.

    Raises:
      ValueError: If a number is not positive, no request would be left, or the load has no length.
    """
    require_number("rate", rate, positive=True)
    require_number("seconds", seconds, positive=True)
    old = workload.arrivals
    count, first_s = round(rate * seconds), old[0].arrival_s
    if count < 1:
        raise ValueError(f"`rate` * `seconds` must be at least 1; got {rate:g} * {seconds:g}.")
    span_s = old[-1].arrival_s - first_s
    if span_s <= 0:
        raise ValueError(f"`workload` must take more than 0 s; got {span_s!r}.")
    end_s = span_s * len(old) / (len(old) - 1)
    places = np.arange(count) * len(old) / count
    course = [*(arrival.arrival_s - first_s for arrival in old), end_s]
    times = np.interp(places, np.arange(len(course)), course) * (seconds / end_s)
    arrivals = [
        dataclasses.replace(
            old[int(place)], arrival_s=time_s, adapter=old[index % len(old)].adapter
        )
        for index, (place, time_s) in enumerate(zip(places, times.tolist(), strict=True))
    ]
    settings = {**workload.settings, "rate": rate, "seconds": seconds}
    return Workload(workload.name, arrivals, workload.seed, settings)


def flexllm_load(
    rate: float,
    lengths: RequestLengths,
    *,
    trace: Sequence[Arrival] | None = None,
    adapter: str | None = None,
    duration_s: float = 600.0,
    max_total_tokens: int = 8192,
    jitter_s: float = 1.0,
    seed: int = 42,
) -> Workload:
    """FlexLLM's inference load: a random stretch of a trace, brought to a rate by resampling.

    The paper's trace is BurstGPT, its rates are `FLEXLLM_RATES`; lengths come from elsewhere
    (ShareGPT in the paper), so those of the trace are replaced.

    Args:
      rate: Requests per second.
      lengths: What prompt and output lengths are drawn from.
      trace: Where arrivals are taken from; None for a Poisson process.
      adapter: Name of the adapter that answers; None for the base model.
      duration_s: Seconds of the load.
      max_total_tokens: Longest prompt and output together; longer pairs are drawn again.
      jitter_s: Longest time between a repeated request and its original, in seconds.
      seed: Seed of the stretch, the resampling and the lengths.

    Raises:
      ValueError: If a value is out of range, the trace is shorter than `duration_s`, or no request
        is left.
    """
    require_number("rate", rate, positive=True)
    require_number("duration_s", duration_s, positive=True)
    require_count("max_total_tokens", max_total_tokens, at_least=2)
    require_number("jitter_s", jitter_s)
    if adapter is not None:
        require_name("adapter", adapter)
    if trace is None:
        arrivals = phased_arrivals([Phase(rate, duration_s=duration_s)], seed)
    else:
        arrivals = random_slice(trace, duration_s, seed)
        arrivals = resample_rate(arrivals, rate, duration_s, seed, jitter_s=jitter_s)
    arrivals = with_lengths(arrivals, lengths, seed, max_total_tokens=max_total_tokens)
    if adapter is not None:
        arrivals = with_adapters(arrivals, [adapter], "identical")
    settings: dict[str, Any] = {
        "rate": rate,
        "duration_s": duration_s,
        "max_total_tokens": max_total_tokens,
        "arrivals": "poisson" if trace is None else "trace",
    }
    if trace is not None:
        settings["jitter_s"] = jitter_s
    return Workload(f"flexllm-{rate:g}", arrivals, seed, settings)


def _burst_arrivals(seed: int) -> list[Arrival]:
    """Requests at drawn times of minutes in drawn order.

    Quantile u of the minutes is linear up to the median m, and m + (max - m) v**k above it, with
    v = 2 u - 1 and the k that comes closest to the total.
    """
    num_minutes, least, median, most, total = LOQUETIER_BURST_MINUTES
    u = np.linspace(0, 1, num_minutes)
    lower, v = least + 2 * u * (median - least), np.maximum(2 * u - 1, 0)
    powers = np.linspace(1, 20, 500)[:, None]
    counts = np.rint(np.where(u < 0.5, lower, median + (most - median) * v**powers)).astype(int)
    closest = counts[np.abs(counts.sum(axis=1) - total).argmin()]
    draws = generator(seed, "burst minutes")
    times = [
        60 * (minute + np.sort(draws.random(count)))
        for minute, count in enumerate(draws.permutation(closest))
    ]
    return [Arrival(time_s) for time_s in np.concatenate(times).tolist()]


def _loquetier(
    name: str,
    arrivals: list[Arrival],
    lengths: RequestLengths | None,
    seed: int,
    time_scale: float,
    *,
    is_drawn: bool = False,
) -> Workload:
    if lengths is not None:
        arrivals = with_lengths(arrivals, lengths, seed)
    settings = {"time_scale": time_scale}
    used_seed = seed if is_drawn or lengths is not None else None
    return Workload(f"loquetier-{name}", arrivals, used_seed, settings)
