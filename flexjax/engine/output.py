"""From sampled tokens to what a caller sees: text, stop conditions, times."""

from __future__ import annotations

import dataclasses
import queue
import threading

from flexjax.io.tokenizer import Tokenizer
from flexjax.request import FinishReason, GenerationOutput, StreamPiece, TokenLogprobs, Usage
from flexjax.scheduler.sequence import Sequence


@dataclasses.dataclass(frozen=True)
class SampledToken:
    """One token as the host reads it."""

    token: int
    logprob: TokenLogprobs | None


class RequestOutput:
    """Collects one request's output; readable from any thread.

    Attributes:
      sequence: The scheduler's state of the request.
      pieces: What streams read; ends with a piece that has a finish reason, or with an exception.
      finished: Set when the request has ended.
    """

    def __init__(
        self,
        sequence: Sequence,
        tokenizer: Tokenizer | None,
        *,
        adapter: str | None,
        adapter_version: int,
        max_context_len: int,
    ):
        self.sequence = sequence
        self.pieces: queue.SimpleQueue[StreamPiece | BaseException] = queue.SimpleQueue()
        self.finished = threading.Event()
        self.error: BaseException | None = None
        self._adapter = adapter
        self._adapter_version = adapter_version
        self._max_context_len = max_context_len
        self._decoder = tokenizer.stream_decoder() if tokenizer is not None else None
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._times_s: list[float] = []
        self._text = ""
        self._emitted = 0
        self._was_cut = False
        self._finish_reason: FinishReason | None = None

    def push(self, sampled: SampledToken, now_s: float) -> FinishReason | None:
        """Takes in one token; returns why the request ends with it, or None.

        Args:
          sampled: The token.
          now_s: Clock when the host read it.
        """
        request = self.sequence.request
        self._token_ids.append(sampled.token)
        self._times_s.append(now_s)
        if sampled.logprob is not None:
            self._logprobs.append(sampled.logprob)
        reason = None
        is_end = sampled.token in request.eos_token_ids
        if is_end or sampled.token in request.params.stop_token_ids:
            reason = FinishReason.STOP
        elif self._decoder is not None:
            self._text += self._decoder.push(sampled.token)
        if reason is None and self._cut_at_stop():
            reason = FinishReason.STOP
        total = len(request.prompt_token_ids) + len(self._token_ids)
        is_full = len(self._token_ids) >= request.params.max_tokens
        if reason is None and (is_full or total >= self._max_context_len):
            reason = FinishReason.LENGTH
        if reason is not None and self._decoder is not None and not self._was_cut:
            self._text += self._decoder.flush()
            self._cut_at_stop()
        self._emit(sampled, reason)
        if reason is not None:
            self._finish(reason)
        return reason

    def abort(self) -> None:
        """Ends the request by the caller's wish."""
        self.pieces.put(StreamPiece("", (), self._none_or_empty(), FinishReason.ABORT.value))
        self._finish(FinishReason.ABORT)

    def fail(self, error: BaseException) -> None:
        """Ends the request because the engine did."""
        self.error = error
        self.pieces.put(error)
        self.finished.set()

    def _finish(self, reason: FinishReason) -> None:
        self._finish_reason = reason
        self.finished.set()

    def _cut_at_stop(self) -> bool:
        """Cuts the text before the first stop text, if there is one."""
        found = [self._text.find(stop) for stop in self.sequence.request.params.stop]
        starts = [start for start in found if start >= 0]
        if not starts:
            return False
        self._text = self._text[: min(starts)]
        self._was_cut = True
        return True

    def _emit(self, sampled: SampledToken, reason: FinishReason | None) -> None:
        end = len(self._text)
        if reason is None:
            end -= self._held_back()
        text = self._text[self._emitted : max(end, self._emitted)]
        self._emitted += len(text)
        logprobs = None if sampled.logprob is None else (sampled.logprob,)
        value = None if reason is None else reason.value
        self.pieces.put(StreamPiece(text, (sampled.token,), logprobs, value))

    def _held_back(self) -> int:
        """Characters at the end that may be the start of a stop text."""
        longest = 0
        for stop in self.sequence.request.params.stop:
            for size in range(min(len(stop) - 1, len(self._text)), longest, -1):
                if self._text.endswith(stop[:size]):
                    longest = size
                    break
        return longest

    def _none_or_empty(self) -> tuple[TokenLogprobs, ...] | None:
        return None if self.sequence.request.params.logprobs is None else ()

    def result(self) -> GenerationOutput:
        """The output so far; final once `finished` is set."""
        request = self.sequence.request
        times, arrival = self._times_s, request.arrival_s
        gaps = tuple(b - a for a, b in zip(times, times[1:], strict=False))
        return GenerationOutput(
            request_id=request.request_id,
            adapter=self._adapter,
            adapter_version=self._adapter_version,
            prompt_token_ids=request.prompt_token_ids,
            text=self._text,
            token_ids=tuple(self._token_ids),
            logprobs=None if request.params.logprobs is None else tuple(self._logprobs),
            finish_reason=None if self._finish_reason is None else self._finish_reason.value,
            usage=Usage(len(request.prompt_token_ids), len(self._token_ids)),
            ttft_s=times[0] - arrival if times else None,
            tpot_s=(times[-1] - times[0]) / len(gaps) if gaps else None,
            itl_s=gaps,
            e2e_s=times[-1] - arrival if times else None,
            num_preemptions=self.sequence.num_preemptions,
        )
