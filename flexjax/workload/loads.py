"""Loads of the papers that FlexJAX is compared with, ready-made.

Loquetier (arXiv 2511.00101) sends requests at fixed intervals; FlexLLM (arXiv 2402.18789) takes ten
minutes of a public trace at 1 to 5 requests a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flexjax.workload._checks import require_count, require_name, require_names, require_number
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


def _loquetier(
    name: str,
    arrivals: list[Arrival],
    lengths: RequestLengths | None,
    seed: int,
    time_scale: float,
) -> Workload:
    if lengths is not None:
        arrivals = with_lengths(arrivals, lengths, seed)
    settings = {"time_scale": time_scale}
    used_seed = None if lengths is None else seed
    return Workload(f"loquetier-{name}", arrivals, used_seed, settings)
