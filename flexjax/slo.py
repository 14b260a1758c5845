"""Latency targets of requests, and when each of their tokens is due. Imports no jax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

PATIENCE_S = 60.0
"""A request without a TTFT target stands in the queue as if it were due after this long."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SLO:
    """Latency targets of one request; finetuning takes only what they leave free.

    Attributes:
      ttft_ms: Milliseconds from arrival to the first token, queueing included; None for no target.
      tpot_ms: Mean milliseconds per token after the first; None for no target.
      itl_ms: Milliseconds between two tokens that finetuning may stretch a gap to, where earlier
        tokens came early enough for the mean. Above `tpot_ms`, finetuning gets more done in the
        same time; below it, less. Steps are sized so that it holds for 99 gaps of a hundred. None
        for `tpot_ms`, to which steps are sized as for the mean: nine of ten.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    itl_ms: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft_ms", "tpot_ms", "itl_ms"):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (is_number and math.isfinite(value) and value > 0):
                raise ValueError(f"`{name}` must be a number > 0 or None; got {value!r}.")
        if self.itl_ms is not None and self.tpot_ms is None:
            raise ValueError(f"`itl_ms` needs `tpot_ms`; got {self.itl_ms!r} without.")

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token; infinite without a target."""
        return math.inf if self.ttft_ms is None else self.ttft_ms / 1e3

    @property
    def tpot_s(self) -> float:
        """Seconds per token after the first; infinite without a target."""
        return math.inf if self.tpot_ms is None else self.tpot_ms / 1e3

    @property
    def itl_s(self) -> float:
        """Seconds between two tokens at most; infinite without a target."""
        return self.tpot_s if self.itl_ms is None else self.itl_ms / 1e3

    def queue_deadline_s(self, arrival_s: float) -> float:
        """When a request is due that waits: finite, so that nothing waits for ever."""
        return arrival_s + min(self.ttft_s, PATIENCE_S)


NO_SLO = SLO()
"""No targets: finetuning takes what it can."""

SLO_CLASSES: Mapping[str, SLO] = {
    "interactive": SLO(ttft_ms=5_000.0, tpot_ms=75.0),
    "batch": NO_SLO,
}
"""Targets by class: a reader at a screen, and work that nobody waits for."""


def resolve_slo(slo: SLO | str | None, default: str) -> SLO:
    """The targets of a class, of an explicit `SLO`, or of the default class.

    Raises:
      ValueError: If the class is not known.
    """
    if isinstance(slo, SLO):
        return slo
    name = default if slo is None else slo
    if name not in SLO_CLASSES:
        known = ", ".join(SLO_CLASSES)
        raise ValueError(f"`slo` must be an SLO or one of {known}; got {name!r}.")
    return SLO_CLASSES[name]
