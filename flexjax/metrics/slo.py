"""How requests did: their latencies, and whether they met targets.

Every request counts, however it ended: one that failed, was refused or did not finish has missed
every target.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence

from flexjax.metrics.checks import require
from flexjax.metrics.records import RequestRecord
from flexjax.metrics.summary import Distribution, percentile

ADMISSION_LIMIT_S = 6.0
"""Longest wait for admission in Loquetier's metric."""
OWN_TARGETS = "own targets"
"""Name of the tier in which each request has the targets that it came with."""


@dataclasses.dataclass(frozen=True)
class Tier:
    """Latency targets, at most; a request meets the tier if it meets all of them.

    Attributes:
      name: For tables and figures.
      ttft_s: Seconds to the first token.
      tpot_s: Mean seconds per token after the first.
      itl_p99_s: 99th percentile of the request's own gaps, seconds; None for no such target.

    Raises:
      ValueError: If a target is not above 0.
    """

    name: str
    ttft_s: float
    tpot_s: float
    itl_p99_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s", "itl_p99_s"):
            value = getattr(self, name)
            require(value is None or value > 0, name, "> 0", value)


DEFAULT_TIERS = (Tier("tight", 1.0, 0.050), Tier("relaxed", 5.0, 0.075))


@dataclasses.dataclass(frozen=True)
class TierSummary:
    """How a set of requests did against targets.

    Attributes:
      name: Of the tier.
      num_requests: Requests that counted.
      num_met: Those that met every target.
      goodput: Requests per second that met every target.
    """

    name: str
    num_requests: int
    num_met: int
    goodput: float

    @property
    def attainment(self) -> float | None:
        """Share that met; None without requests."""
        return self.num_met / self.num_requests if self.num_requests else None


@dataclasses.dataclass(frozen=True)
class RequestsSummary:
    """Figures of a set of requests.

    The distributions hold what was measured; `ttft_s.count` beside `num_requests` shows how many
    never had a first token, which the tiers count as missed.

    Attributes:
      num_requests: Requests, however they ended.
      statuses: Requests by status.
      num_preemptions: Times that one was preempted.
      prompt_tokens: Tokens of all prompts.
      output_tokens: Tokens generated for them, whenever.
      ttft_s: Seconds to the first token.
      tpot_s: Mean seconds per later token of each request.
      itl_s: Every gap of every request.
      e2e_s: Seconds to the last token, of finished requests.
      admission_wait_s: Seconds to admission.
      admission_attainment: Share admitted within `ADMISSION_LIMIT_S` of being due (Loquetier's
        metric; later ones and those never admitted missed, but are served and counted elsewhere).
        None where admissions were not recorded.
      tiers: One a tier, in the order given.
      own_targets: Against the targets of their own, of the requests that have any; else None.
    """

    num_requests: int
    statuses: dict[str, int]
    num_preemptions: int
    prompt_tokens: int
    output_tokens: int
    ttft_s: Distribution | None
    tpot_s: Distribution | None
    itl_s: Distribution | None
    e2e_s: Distribution | None
    admission_wait_s: Distribution | None
    admission_attainment: float | None
    tiers: tuple[TierSummary, ...]
    own_targets: TierSummary | None


def meets(request: RequestRecord, tier: Tier) -> bool:
    """Whether a request got every token, and in time.

    Targets are inclusive. A request of a single token has no TPOT and no gap to miss.
    """
    ttft_s, tpot_s = request.ttft_s, request.tpot_s
    if not request.is_complete or ttft_s is None or ttft_s > tier.ttft_s:
        return False
    if tpot_s is not None and tpot_s > tier.tpot_s:
        return False
    if tpot_s is None or tier.itl_p99_s is None:
        return True
    return percentile(request.itl_s, 99) <= tier.itl_p99_s


def summarize_requests(
    requests: Sequence[RequestRecord], tiers: Sequence[Tier], duration_s: float
) -> RequestsSummary:
    """Computes the figures of a set of requests.

    Args:
      requests: Each counts.
      tiers: Targets to judge by.
      duration_s: Seconds that goodput is averaged over.
    """
    owners = [r for r in requests if r.ttft_target_ms or r.tpot_target_ms]
    own = sum(meets(r, _own_tier(r)) for r in owners)
    judged = []
    for tier in tiers:
        met = sum(meets(r, tier) for r in requests)
        judged.append(TierSummary(tier.name, len(requests), met, met / duration_s))
    return RequestsSummary(
        num_requests=len(requests),
        statuses=dict(sorted(collections.Counter(r.status for r in requests).items())),
        num_preemptions=sum(r.num_preemptions for r in requests),
        prompt_tokens=sum(r.prompt_tokens for r in requests),
        output_tokens=sum(len(r.token_times_s) for r in requests),
        ttft_s=_known(r.ttft_s for r in requests),
        tpot_s=_known(r.tpot_s for r in requests),
        itl_s=Distribution.of(gap for r in requests for gap in r.itl_s),
        e2e_s=_known(r.e2e_s for r in requests),
        admission_wait_s=_known(r.admission_wait_s for r in requests),
        admission_attainment=_admission_attainment(requests),
        tiers=tuple(judged),
        own_targets=TierSummary(OWN_TARGETS, len(owners), own, own / duration_s)
        if owners
        else None,
    )


def _known(values: Iterable[float | None]) -> Distribution | None:
    return Distribution.of(value for value in values if value is not None)


def _own_tier(request: RequestRecord) -> Tier:
    ttft_ms, tpot_ms = request.ttft_target_ms or math.inf, request.tpot_target_ms or math.inf
    return Tier(OWN_TARGETS, ttft_ms / 1e3, tpot_ms / 1e3)


def _admission_attainment(requests: Sequence[RequestRecord]) -> float | None:
    # A token without an admission: nobody wrote admissions down.
    is_recorded = all(r.admitted_s is not None or not r.token_times_s for r in requests)
    if not requests or not is_recorded:
        return None
    waits_s = [r.admission_wait_s for r in requests]
    return sum(w is not None and w <= ADMISSION_LIMIT_S for w in waits_s) / len(requests)
