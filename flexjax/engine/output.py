"""From sampled tokens to what a caller sees: text, stop conditions, times.

The engine's loop only stores tokens; text is made where it is read. Requests with stop texts are
the exception, since their end depends on the text.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence as Items

from flexjax.io.tokenizer import Tokenizer
from flexjax.request import FinishReason, GenerationOutput, StreamPiece, TokenLogprobs, Usage
from flexjax.scheduler.sequence import Sequence


class TextStream:
    """Text of a growing list of tokens, up to the first stop text.

    Attributes:
      text: All text so far.
      was_cut: Whether a stop text was found; the text ends before it.
    """

    def __init__(self, tokenizer: Tokenizer | None, stops: Items[str]):
        self.text = ""
        self.was_cut = False
        self._decoder = tokenizer.stream_decoder() if tokenizer is not None else None
        self._stops = stops
        self._emitted = 0

    def push(self, token: int) -> None:
        """Adds the text of a token; not of one that ended the generation."""
        if self._decoder is not None:
            self.text += self._decoder.push(token)
            self._cut_at_stop()

    def flush(self) -> None:
        """Adds what waited for more tokens; there will be none."""
        if self._decoder is not None and not self.was_cut:
            self.text += self._decoder.flush()
            self._cut_at_stop()

    def take(self, *, is_last: bool) -> str:
        """New text since the last call, without what may be the start of a stop text."""
        end = len(self.text) - (0 if is_last else self._held_back())
        new = self.text[self._emitted : max(end, self._emitted)]
        self._emitted += len(new)
        return new

    def _cut_at_stop(self) -> None:
        starts = [start for stop in self._stops if (start := self.text.find(stop)) >= 0]
        if starts:
            self.text = self.text[: min(starts)]
            self.was_cut = True

    def _held_back(self) -> int:
        """Characters at the end that may be the start of a stop text."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self.text)), longest, -1):
                if self.text.endswith(stop[:size]):
                    longest = size
                    break
        return longest


class RequestOutput:
    """Collects one request's output; readable from any thread.

    Attributes:
      sequence: The scheduler's state of the request.
      finished: Set when the request has ended.
      error: What stopped the engine before the request's end, if something did.
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
        self.finished = threading.Event()
        self.error: BaseException | None = None
        request = sequence.request
        self._tokenizer = tokenizer
        self._stops = request.params.stop
        self._ends = request.eos_token_ids | frozenset(request.params.stop_token_ids)
        room = max_context_len - len(request.prompt_token_ids)
        self._max_tokens = min(request.params.max_tokens, room)
        self._adapter = adapter
        self._adapter_version = adapter_version
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._times_s: list[float] = []
        self._finish_reason: FinishReason | None = None
        # Read by the engine's loop where there are stop texts, else by whoever reads the pieces.
        self._stream = TextStream(tokenizer, self._stops)
        self._pieces: queue.SimpleQueue[tuple | BaseException] = queue.SimpleQueue()

    def push(self, token: int, logprob: TokenLogprobs | None, now_s: float) -> FinishReason | None:
        """Takes in one token; returns why the request ends with it, or None.

        Args:
          token: The token.
          logprob: Its log probabilities, if they were asked for.
          now_s: Clock when the host read it.
        """
        self._token_ids.append(token)
        self._times_s.append(now_s)
        if logprob is not None:
            self._logprobs.append(logprob)
        reason = None
        if token in self._ends:
            reason = FinishReason.STOP
        elif self._stops:
            self._stream.push(token)
            reason = FinishReason.STOP if self._stream.was_cut else None
        if reason is None and len(self._token_ids) >= self._max_tokens:
            reason = FinishReason.LENGTH
        text = None
        if self._stops:
            if reason is not None:
                self._stream.flush()
            text = self._stream.take(is_last=reason is not None)
        self._pieces.put((text, token, logprob, reason))
        if reason is not None:
            self._finish(reason)
        return reason

    def next_piece(self, timeout: float = 0.0) -> StreamPiece | BaseException:
        """The next piece of the stream, or what stopped the engine. For one reader.

        Args:
          timeout: Seconds to wait for one.

        Raises:
          queue.Empty: If there is none.
        """
        found = self._pieces.get(timeout > 0, timeout or None)
        if isinstance(found, BaseException):
            return found
        text, token, logprob, reason = found
        value = None if reason is None else reason.value
        if token is None:  # aborted
            is_silent = self.sequence.request.params.logprobs is None
            return StreamPiece("", (), None if is_silent else (), value)
        if text is None:
            if token not in self._ends:
                self._stream.push(token)
            if reason is not None:
                self._stream.flush()
            text = self._stream.take(is_last=reason is not None)
        return StreamPiece(text, (token,), None if logprob is None else (logprob,), value)

    def abort(self) -> None:
        """Ends the request by the caller's wish."""
        self._pieces.put((None, None, None, FinishReason.ABORT))
        self._finish(FinishReason.ABORT)

    def fail(self, error: BaseException) -> None:
        """Ends the request because the engine did."""
        self.error = error
        self._pieces.put(error)
        self.finished.set()

    def _finish(self, reason: FinishReason) -> None:
        self._finish_reason = reason
        self.finished.set()

    def _text(self, token_ids: list[int], reason: FinishReason | None) -> str:
        if self._stops:
            return self._stream.text
        stream = TextStream(self._tokenizer, ())
        for token in token_ids:
            if token not in self._ends:
                stream.push(token)
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            stream.flush()
        return stream.text

    def result(self) -> GenerationOutput:
        """The output so far; final once `finished` is set."""
        request, reason = self.sequence.request, self._finish_reason
        times, token_ids = list(self._times_s), list(self._token_ids)
        gaps = tuple(b - a for a, b in zip(times, times[1:], strict=False))
        arrival = request.arrival_s
        return GenerationOutput(
            request_id=request.request_id,
            adapter=self._adapter,
            adapter_version=self._adapter_version,
            prompt_token_ids=request.prompt_token_ids,
            text=self._text(token_ids, reason),
            token_ids=tuple(token_ids),
            logprobs=None if request.params.logprobs is None else tuple(self._logprobs),
            finish_reason=None if reason is None else reason.value,
            usage=Usage(len(request.prompt_token_ids), len(token_ids)),
            ttft_s=times[0] - arrival if times else None,
            tpot_s=(times[-1] - times[0]) / len(gaps) if gaps else None,
            itl_s=gaps,
            e2e_s=times[-1] - arrival if times else None,
            num_preemptions=self.sequence.num_preemptions,
        )
