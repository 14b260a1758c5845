"""Rates over time, in bins of equal width."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class RateCurve:
    """A rate over time.

    Attributes:
      edges_s: Edges of the bins, one more than rates; the last bin may be shorter.
      rates: Amount per second in each bin.
    """

    edges_s: tuple[float, ...]
    rates: tuple[float, ...]


def rate_of_events(times_s: Iterable[float], *, end_s: float, bin_s: float) -> RateCurve:
    """Events per second between 0 and `end_s`; each event counts 1.

    Raises:
      ValueError: If `end_s` or `bin_s` is not positive.
    """
    return rate_of_spans(((time_s, time_s, 1.0) for time_s in times_s), end_s=end_s, bin_s=bin_s)


def rate_of_spans(
    spans: Iterable[tuple[float, float, float]], *, end_s: float, bin_s: float
) -> RateCurve:
    """Amount per second between 0 and `end_s`, each amount spread evenly over its span.

    Args:
      spans: (begin, end, amount); what lies outside [0, end_s] counts in the nearest bin.
      end_s: End of the last bin.
      bin_s: Width of a bin.

    Raises:
      ValueError: If `end_s` or `bin_s` is not positive.
    """
    for name, value in (("end_s", end_s), ("bin_s", bin_s)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"`{name}` must be positive; got {value!r}.")
    count = max(1, math.ceil(end_s / bin_s - 1e-9))
    edges = [index * bin_s for index in range(count)] + [end_s]
    amounts = [0.0] * count
    for begin, end, amount in spans:
        first, last = (min(max(int(t / bin_s), 0), count - 1) for t in (begin, end))
        if first == last or end <= begin:
            amounts[last] += amount
            continue
        begin, end = max(begin, 0.0), min(end, end_s)
        for index in range(first, last + 1):
            shared = min(edges[index + 1], end) - max(edges[index], begin)
            amounts[index] += amount * max(shared, 0.0) / (end - begin)
    widths = [high - low for low, high in zip(edges, edges[1:], strict=False)]
    return RateCurve(tuple(edges), tuple(a / w for a, w in zip(amounts, widths, strict=True)))
