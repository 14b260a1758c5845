"""One request of a workload, the Poisson process, and lengths fitted to a model's context."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

from flexjax.workload._checks import require_count, require_name, require_number


@dataclasses.dataclass(frozen=True)
class Arrival:
    """One request of a workload.

    Attributes:
      arrival_s: Seconds since the start.
      prompt_tokens: Tokens of the prompt; None where the workload does not say.
      output_tokens: Tokens to generate; None where the workload does not say.
      adapter: Name of the adapter that answers; None for the base model.
      slo_class: Name of the request's latency class, such as "interactive" or "batch"; None where
        the workload does not say.

    Raises:
      ValueError: If the time is not a number >= 0, a length is below 1, or a name is empty.
    """

    arrival_s: float
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    adapter: str | None = None
    slo_class: str | None = None

    def __post_init__(self) -> None:
        require_arrival(
            self.arrival_s, self.prompt_tokens, self.output_tokens, self.adapter, self.slo_class
        )


@dataclasses.dataclass(frozen=True)
class LengthScale:
    """What `scale_lengths` multiplied by.

    Attributes:
      prompt: Factor of the prompts' lengths; 1 where they fitted.
      output: Factor of the outputs' lengths; 1 where they fitted.
    """

    prompt: float
    output: float


def poisson_arrivals(rate: float, n: int, seed: int) -> list[Arrival]:
    """Arrivals of a Poisson process; the same for the same seed.

    Args:
      rate: Mean requests per second.
      n: Number of arrivals.
      seed: Seed of the draws.

    Raises:
      ValueError: If `rate` is not positive and finite, or `n` is below 1.
    """
    require_number("rate", rate, positive=True)
    require_count("n", n)
    draws = random.Random(seed)
    time_s, arrivals = 0.0, []
    for _ in range(n):
        time_s += draws.expovariate(rate)
        arrivals.append(Arrival(time_s))
    return arrivals


def rebase(arrivals: Sequence[Arrival], time_scale: float = 1.0) -> list[Arrival]:
    """Lets the first request arrive at 0 and multiplies the times by `time_scale`.

    Raises:
      ValueError: If `time_scale` is not a number >= 0.
    """
    require_number("time_scale", time_scale)
    if not arrivals:
        return []
    first_s = arrivals[0].arrival_s
    return [
        dataclasses.replace(arrival, arrival_s=(arrival.arrival_s - first_s) * time_scale)
        for arrival in arrivals
    ]


def scale_lengths(
    arrivals: Sequence[Arrival], *, max_prompt_tokens: int, max_output_tokens: int
) -> tuple[list[Arrival], LengthScale]:
    """Scales lengths so that the longest fits; the proportions between requests stay.

    Nothing is cut: every prompt is multiplied by one factor and every output by another, each the
    limit over the longest, or 1 when the longest fits. Lengths are rounded, to 1 at least.

    Args:
      arrivals: Requests; lengths that are None stay so.
      max_prompt_tokens: Longest prompt afterwards, at most.
      max_output_tokens: Longest output afterwards, at most.

    Raises:
      ValueError: If a limit is below 1.
    """
    require_count("max_prompt_tokens", max_prompt_tokens)
    require_count("max_output_tokens", max_output_tokens)
    longest_prompt = max((a.prompt_tokens for a in arrivals if a.prompt_tokens), default=1)
    longest_output = max((a.output_tokens for a in arrivals if a.output_tokens), default=1)
    scale = LengthScale(
        min(1.0, max_prompt_tokens / longest_prompt), min(1.0, max_output_tokens / longest_output)
    )
    scaled = [
        dataclasses.replace(
            arrival,
            prompt_tokens=_scaled(arrival.prompt_tokens, scale.prompt),
            output_tokens=_scaled(arrival.output_tokens, scale.output),
        )
        for arrival in arrivals
    ]
    return scaled, scale


def require_arrival(
    arrival_s: Any,
    prompt_tokens: Any = None,
    output_tokens: Any = None,
    adapter: Any = None,
    slo_class: Any = None,
) -> None:
    """Raises unless an `Arrival` can hold these values, whatever file they come from.

    Raises:
      ValueError: As `Arrival`.
    """
    require_number("arrival_s", arrival_s)
    for name, length in (("prompt_tokens", prompt_tokens), ("output_tokens", output_tokens)):
        if length is not None:
            require_count(name, length)
    for name, text in (("adapter", adapter), ("slo_class", slo_class)):
        if text is not None:
            require_name(name, text)


def _scaled(length: int | None, factor: float) -> int | None:
    return None if length is None else max(1, round(length * factor))
