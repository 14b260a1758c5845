"""Summaries of finished requests.

TTFT counts from the arrival and includes queueing. TPOT is one mean per request. ITL pools every
gap between two tokens of all requests, so that each token weighs the same: a stall shows in it that
the mean of a request hides.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from flexjax.request import GenerationOutput


def percentile(values: Sequence[float], q: float) -> float:
    """Percentile with linear interpolation between the two nearest values.

    Args:
      values: At least one, in any order.
      q: From 0 (least) to 100 (greatest).

    Raises:
      ValueError: If there are no values, or `q` is outside [0, 100].
    """
    if not values:
        raise ValueError("`values` must hold at least one value; got none.")
    if not 0 <= q <= 100:
        raise ValueError(f"`q` must be in [0, 100]; got {q!r}.")
    return _percentile_of(sorted(values), q)


def _percentile_of(ordered: Sequence[float] | np.ndarray, q: float) -> float:
    place = q / 100 * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (place - low) * (ordered[high] - ordered[low]))


@dataclasses.dataclass(frozen=True)
class Distribution:
    """What a set of measured values looks like; in their own unit."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Distribution | None:
        """Summarizes values; None when there are none."""
        ordered = np.sort(np.fromiter(values, np.float64))  # there may be millions of gaps
        if not len(ordered):
            return None
        p50, p90, p99 = (_percentile_of(ordered, q) for q in (50, 90, 99))
        return cls(len(ordered), float(ordered.mean()), p50, p90, p99, float(ordered[-1]))


@dataclasses.dataclass(frozen=True)
class ServingSummary:
    """Figures of a set of requests.

    Attributes:
      num_requests: Requests.
      num_preemptions: Times that one of them was preempted and recomputed.
      prompt_tokens: Tokens of all prompts.
      output_tokens: Tokens generated for all of them.
      finish_reasons: Requests by the reason that they ended for.
      ttft_s: Seconds to the first token, from the time that the request was due.
      tpot_s: Seconds per token after the first, one mean a request.
      itl_s: Seconds between two tokens, every gap of every request.
      e2e_s: Seconds to the last token.
    """

    num_requests: int
    num_preemptions: int
    prompt_tokens: int
    output_tokens: int
    finish_reasons: dict[str, int]
    ttft_s: Distribution | None
    tpot_s: Distribution | None
    itl_s: Distribution | None
    e2e_s: Distribution | None


def summarize(
    outputs: Sequence[GenerationOutput], delays_s: Sequence[float] | None = None
) -> ServingSummary:
    """Summarizes requests that have ended.

    Args:
      outputs: Their outputs.
      delays_s: Seconds between the time that each was due and its arrival at the engine, which a
        load generator must not leave out of TTFT; None for no delay.

    Raises:
      ValueError: If `delays_s` has another length than `outputs`.
    """
    delays = _delays(outputs, delays_s)
    pairs = list(zip(outputs, delays, strict=True))
    reasons = collections.Counter(str(output.finish_reason) for output in outputs)
    return ServingSummary(
        num_requests=len(outputs),
        num_preemptions=sum(output.num_preemptions for output in outputs),
        prompt_tokens=sum(output.usage.prompt_tokens for output in outputs),
        output_tokens=sum(output.usage.completion_tokens for output in outputs),
        finish_reasons=dict(sorted(reasons.items())),
        ttft_s=Distribution.of(o.ttft_s + d for o, d in pairs if o.ttft_s is not None),
        tpot_s=Distribution.of(o.tpot_s for o in outputs if o.tpot_s is not None),
        itl_s=Distribution.of(gap for o in outputs for gap in o.itl_s),
        e2e_s=Distribution.of(o.e2e_s + d for o, d in pairs if o.e2e_s is not None),
    )


def slo_attainment(
    outputs: Sequence[GenerationOutput],
    *,
    ttft_s: float,
    tpot_s: float,
    delays_s: Sequence[float] | None = None,
) -> float:
    """Share of requests that met both targets; times requests per second it is the goodput.

    A request without a first token missed; one of a single token has no TPOT to miss.

    Args:
      outputs: Requests that have ended.
      ttft_s: Seconds to the first token at most.
      tpot_s: Mean seconds per token after the first at most.
      delays_s: As in `summarize`.

    Raises:
      ValueError: If there are no outputs, or `delays_s` has another length.
    """
    if not outputs:
        raise ValueError("`outputs` must hold at least one request; got none.")
    met = 0
    for output, delay in zip(outputs, _delays(outputs, delays_s), strict=True):
        is_early = output.ttft_s is not None and output.ttft_s + delay <= ttft_s
        met += is_early and (output.tpot_s is None or output.tpot_s <= tpot_s)
    return met / len(outputs)


def _delays(
    outputs: Sequence[GenerationOutput], delays_s: Sequence[float] | None
) -> Sequence[float]:
    if delays_s is None:
        return [0.0] * len(outputs)
    if len(delays_s) != len(outputs):
        raise ValueError(
            f"`delays_s` must have one value a request, {len(outputs)}; got {len(delays_s)}."
        )
    return delays_s
