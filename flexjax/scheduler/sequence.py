"""A request on its way through the scheduler."""

from __future__ import annotations

import dataclasses
import enum

from flexjax.request import GenerationRequest


class SequenceStatus(enum.Enum):
    """Where a request is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


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

    @classmethod
    def from_request(cls, request: GenerationRequest) -> Sequence:
        """A sequence that waits to be admitted."""
        return cls(request, list(request.prompt_token_ids))

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

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

    @property
    def is_prefilling(self) -> bool:
        """Whether more than the newest token is still to be computed."""
        return self.num_computed < self.num_tokens - 1 or (
            self.num_sampled == 0 and self.num_computed < self.num_tokens
        )

    def may_sample(self, max_context_len: int) -> bool:
        """Whether `max_tokens` and the context leave room for another token."""
        has_quota = self.num_sampled < self.request.params.max_tokens
        return has_quota and self.num_tokens < max_context_len
