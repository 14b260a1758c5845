"""A request on its way through the scheduler."""

from __future__ import annotations

import dataclasses
import enum
import math

from flexjax.request import GenerationRequest


class SequenceStatus(enum.Enum):
    """Where a request is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclasses.dataclass(eq=False, slots=True)
class Tenant:
    """The requests of one adapter.

    Attributes:
      number: Tenants that came before.
      served: Tokens computed for them, output tokens twice; what adapters share by.
      num_alive: Of them that have not ended.
      heap: Those that wait, and some that did: (deadline, order, request).
    """

    number: int = 0
    served: float = 0.0
    num_alive: int = 0
    heap: list[tuple[float, int, Sequence]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False, slots=True)
class Sequence:
    """Host state of one request.

    Attributes:
      request: What was asked for.
      tokens: Prompt and the output tokens that the host has read.
      num_tokens: Tokens that exist, those that the host has not read included.
      num_computed: Tokens whose keys and values are (or will be, by the step launched last) in
        the pool.
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
    num_tokens: int = 0
    num_computed: int = 0
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
            num_tokens=length,
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
    def in_flight(self) -> int:
        """Sampled tokens that the host has not read yet."""
        return self.num_tokens - len(self.tokens)

    @property
    def num_sampled(self) -> int:
        """Output tokens that exist."""
        return self.num_tokens - self.prompt_len
