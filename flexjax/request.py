"""What goes into and comes out of one inference call. Imports no jax."""

from __future__ import annotations

import dataclasses
import enum

from flexjax.config import SamplingParams
from flexjax.slo import NO_SLO, SLO


class FinishReason(enum.StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    """An end token or a stop text."""
    LENGTH = "length"
    """`max_tokens` or the context length was reached."""
    ABORT = "abort"
    """The caller aborted the request."""


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities at one generated position.

    Attributes:
      token_id: The generated token.
      logprob: Its natural-log probability, before temperature and penalties.
      top: (token id, log probability) of the likeliest tokens, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Usage:
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclasses.dataclass(frozen=True)
class GenerationOutput:
    """The result of one request.

    Attributes:
      request_id: The engine's number of the request.
      adapter: Name of the adapter, or None for the base model.
      adapter_version: Optimizer step whose weights answered; 0 for a loaded adapter or the base.
      prompt_token_ids: Tokens of the prompt.
      text: Generated text, without the stop text.
      token_ids: Generated tokens, an end token included.
      logprobs: One entry a token when asked for, else None.
      finish_reason: Why it ended; None while it runs.
      usage: Token counts.
      ttft_s: Seconds from arrival to the first token, queueing included; None before it.
      tpot_s: Mean seconds per token after the first; None with fewer than two tokens.
      itl_s: Every gap between tokens, seconds.
      e2e_s: Seconds from arrival to the last token.
      num_preemptions: Times that the request was preempted and recomputed.
    """

    request_id: int
    adapter: str | None
    adapter_version: int
    prompt_token_ids: tuple[int, ...]
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: str | None
    usage: Usage
    ttft_s: float | None
    tpot_s: float | None
    itl_s: tuple[float, ...]
    e2e_s: float | None
    num_preemptions: int = 0


@dataclasses.dataclass(frozen=True)
class StreamPiece:
    """What one step added to a streamed generation.

    Attributes:
      text: New text; may be empty while a character is incomplete or a stop text may be starting.
      token_ids: New tokens.
      logprobs: One entry a new token when asked for, else None.
      finish_reason: Set on the last piece.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: str | None = None


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """A checked inference call, ready for the scheduler.

    Attributes:
      request_id: Number, in order of arrival.
      prompt_token_ids: At least one token.
      params: How to sample.
      adapter_slot: Slot in the bank, or -1 for the base model.
      arrival_s: Monotonic clock at arrival.
      eos_token_ids: Tokens that end this generation.
      seed: Seed of its draws.
      slo: Its latency targets.
    """

    request_id: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    adapter_slot: int
    arrival_s: float
    eos_token_ids: frozenset[int]
    seed: int
    slo: SLO = NO_SLO
