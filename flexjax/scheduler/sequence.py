"""A request on its way through the scheduler."""

from __future__ import annotations

import dataclasses
import enum
import math

from flexjax.request import GenerationRequest

RESERVE_START = 0.25
"""What is held back of a request's first time per token, for steps that take long."""
RESERVE_SHARE = 0.05
"""Share of each further one that is added to it."""
RESERVE_TOKENS = 2.0
"""What is held back at most, in times per token."""


class SequenceStatus(enum.Enum):
    """Where a request is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclasses.dataclass(eq=False)
class Tenant:
    """The requests of one adapter.

    Attributes:
      served: Tokens computed for them, output tokens twice; what adapters share by.
      num_alive: Of them that have not ended.
      heap: Those that wait, and some that did: (deadline, order, request).
    """

    served: float = 0.0
    num_alive: int = 0
    heap: list[tuple[float, int, Sequence]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class Sequence:
    """Host state of one request.

    Attributes:
      request: What was asked for.
      tokens: Prompt and the output tokens that the host has read.
      num_computed: Tokens whose keys and values are (or will be, by the step launched last) in
        the pool.
      in_flight: Sampled tokens that the host has not read yet.
      pages: KV pages, in order.
      slot: Slot of the sampling state, -1 while waiting.
      status: Where it is.
      num_preemptions: Times that it lost its pages.
      admitted_s: Clock when it first got pages, None before.
      first_token_s: Clock when the host read its first token, None before.
      last_token_s: The same for its newest token.
      tenant: Its adapter's requests.
      prompt_len: Tokens of the prompt.
      max_tokens: Tokens at most, prompt included: what was asked for, or the context's length.
      tpot_s: Its target, infinite without one.
      itl_s: Its longest gap between two tokens.
      has_itl: Whether that is a target of its own.
    """

    request: GenerationRequest
    tokens: list[int]
    num_computed: int = 0
    in_flight: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    slot: int = -1
    status: SequenceStatus = SequenceStatus.WAITING
    num_preemptions: int = 0
    admitted_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    tenant: Tenant = dataclasses.field(default_factory=Tenant)
    prompt_len: int = 0
    max_tokens: int = 0
    tpot_s: float = math.inf
    itl_s: float = math.inf
    has_itl: bool = False

    @classmethod
    def from_request(cls, request: GenerationRequest, max_context_len: int) -> Sequence:
        """A sequence that waits to be admitted."""
        length = len(request.prompt_token_ids)
        return cls(
            request,
            list(request.prompt_token_ids),
            prompt_len=length,
            max_tokens=min(length + request.params.max_tokens, max_context_len),
            tpot_s=request.slo.tpot_s,
            itl_s=request.slo.itl_s,
            has_itl=request.slo.itl_ms is not None,
        )

    @property
    def output(self) -> list[int]:
        """Output tokens that the host has read."""
        return self.tokens[self.prompt_len :]

    @property
    def num_tokens(self) -> int:
        """Tokens that exist, those that the host has not read included."""
        return len(self.tokens) + self.in_flight

    @property
    def num_sampled(self) -> int:
        """Output tokens that exist."""
        return self.num_tokens - self.prompt_len

    def due_and_reach_s(
        self, previous_s: float, pace_s: float, itl_share: float = 1.0
    ) -> tuple[float, float]:
        """When the next token of a request that has some is due, and what patience would give.

        Token j after the first is due j TPOTs after it, so that time saved on early tokens may be
        spent on later ones; less a reserve, so that a step which takes longer than was expected
        makes no request late. But never more than the longest gap (`SLO.itl_ms`) after the token
        before, so that what was saved is not spent on one long stall. What is late beyond catching
        up keeps the pace.

        Args:
          previous_s: Clock of the token before; an estimate if the host has not read it.
          pace_s: Seconds of a step without finetuning, by which it is told whether a late request
            can catch up.
          itl_share: Share of `SLO.itl_ms` that may be planned for, so that what takes longer than
            expected still keeps it; see `StepPredictor.tail_factor`.

        Returns:
          The clock at which it is due, and the most seconds that there will be for one of the
          tokens after it, if the steps until then hold no finetuning.
        """
        tpot_s, itl_s, first_s = self.tpot_s, self.itl_s, self.first_token_s
        if self.has_itl:
            itl_s *= itl_share
        if first_s is None:
            first_s = previous_s
        num_tokens = len(self.tokens) + self.in_flight
        number = num_tokens - self.prompt_len
        remaining = self.max_tokens - num_tokens
        reserve = RESERVE_START + RESERVE_SHARE * number
        if reserve > RESERVE_TOKENS:
            reserve = RESERVE_TOKENS
        free_s = first_s + (number - reserve) * tpot_s - previous_s
        if free_s < 0.0:
            is_lost = free_s + reserve * tpot_s + remaining * (tpot_s - pace_s) < 0.0
            return (previous_s + tpot_s, tpot_s) if is_lost else (previous_s, itl_s)
        reach_s = free_s
        if tpot_s > pace_s:
            reach_s += remaining * (tpot_s - pace_s)
        if itl_s < reach_s:
            reach_s = itl_s
        return previous_s + (free_s if free_s < reach_s else reach_s), reach_s
