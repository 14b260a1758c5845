"""What a measured run records: its requests, its steps and its optimizer steps.

Facts only, on one clock whose origin is free (a monotonic clock will do); `report` turns them into
figures.
"""

from __future__ import annotations

import dataclasses
import math

from flexjax.metrics.checks import require

STATUSES = ("finished", "failed", "refused", "unfinished")
"""How a request can have ended; "unfinished": it had not when the run did."""


def _require_counts(record: object, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        require(value >= 0, name, ">= 0", value)


@dataclasses.dataclass(frozen=True)
class RequestRecord:
    """One request, from the time that it was due.

    Attributes:
      request_id: Number of the request in its run.
      adapter: Name of the adapter, or None for the base model.
      slo_class: Name of its latency class, or None.
      due_s: When the workload wanted it sent. A generator that sends it late adds to its TTFT.
      prompt_tokens: Tokens of the prompt.
      output_tokens: Tokens that were asked for.
      token_times_s: When each generated token was there, in order.
      status: One of `STATUSES`.
      finish_reason: As in `GenerationOutput`, or the reason of a failure or refusal.
      num_preemptions: Times that it was preempted and recomputed.
      admitted_s: When it first got a place in a step, or None if never or not recorded.
      ttft_target_ms: Target of its own for TTFT, or None.
      tpot_target_ms: Target of its own for TPOT, or None.

    Raises:
      ValueError: If a field contradicts its meaning or another field.
    """

    request_id: int
    adapter: str | None
    slo_class: str | None
    due_s: float
    prompt_tokens: int
    output_tokens: int
    token_times_s: tuple[float, ...]
    status: str
    finish_reason: str | None = None
    num_preemptions: int = 0
    admitted_s: float | None = None
    ttft_target_ms: float | None = None
    tpot_target_ms: float | None = None

    def __post_init__(self) -> None:
        require(math.isfinite(self.due_s), "due_s", "finite", self.due_s)
        _require_counts(self, "prompt_tokens", "num_preemptions")
        require(self.output_tokens >= 1, "output_tokens", ">= 1", self.output_tokens)
        require(self.status in STATUSES, "status", f"one of {', '.join(STATUSES)}", self.status)
        times_s = (self.due_s, *self.token_times_s)
        has_order = all(b >= a for a, b in zip(times_s, times_s[1:], strict=False))
        rule = "finite, in order and not before `due_s`"
        require(has_order and times_s[-1] < math.inf, "token_times_s", rule, self.token_times_s)
        count = len(self.token_times_s)
        rule = f"at most `output_tokens`={self.output_tokens} times"
        require(count <= self.output_tokens, "token_times_s", rule, count)
        if self.status == "refused":
            require(count == 0, "token_times_s", "empty for a refused request", count)
        if self.admitted_s is not None:
            is_right = self.due_s <= self.admitted_s < math.inf
            require(is_right, "admitted_s", f">= `due_s`={self.due_s!r}", self.admitted_s)
        for name in ("ttft_target_ms", "tpot_target_ms"):
            value = getattr(self, name)
            require(value is None or value > 0, name, "> 0 or None", value)

    @property
    def is_complete(self) -> bool:
        """Whether it finished with every token: those asked for, or fewer where it stopped."""
        count = len(self.token_times_s)
        has_all = count == self.output_tokens or (count > 0 and self.finish_reason == "stop")
        return self.status == "finished" and has_all

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first token; queueing and the generator's delay included."""
        return self.token_times_s[0] - self.due_s if self.token_times_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per token after the first; None with fewer than two tokens."""
        times_s = self.token_times_s
        return (times_s[-1] - times_s[0]) / (len(times_s) - 1) if len(times_s) > 1 else None

    @property
    def itl_s(self) -> tuple[float, ...]:
        """Every gap between two tokens, seconds."""
        times_s = self.token_times_s
        return tuple(b - a for a, b in zip(times_s, times_s[1:], strict=False))

    @property
    def e2e_s(self) -> float | None:
        """Seconds from the time it was due to the last token; None if it is not finished."""
        if self.status != "finished" or not self.token_times_s:
            return None
        return self.token_times_s[-1] - self.due_s

    @property
    def admission_wait_s(self) -> float | None:
        """Seconds to its admission; None if never or not recorded."""
        return None if self.admitted_s is None else self.admitted_s - self.due_s


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One iteration of the engine.

    Attributes:
      begin_s: When the device could begin: the later of the step's dispatch and the end of the
        step before.
      end_s: When its results were there.
      decode_rows: Rows of running requests.
      prefill_rows: Rows of prompts.
      forward_rows: Finetuning rows of the forward pass.
      backward_rows: Rows of the backward tile.
      decode_bucket: Decode rows that the step was compiled for.
      chunk_bucket: Rows that it was compiled for and prefill and finetuning forward share.
      window_bucket: Rows of the backward tile that it was compiled for.
      measured_ms: Milliseconds that the step took, as the latency model learns it.
      host_ms: Milliseconds that the host worked for it: planning, arrays, dispatch, results.
      predicted_ms: What the latency model expected before the step, or None.
      backward_target_tokens: Loss-bearing tokens that the backward tile is worth: its rows that
        bear loss times the share of the backward pass's layers that it goes through.
      budget_ms: What the step was planned to stay within, or None: the prediction that is held
        against latency targets, a high quantile.
      planned_s: When it was decided what the step holds; None where nobody noted it.

    Raises:
      ValueError: If a count is negative, more rows are used than compiled, or a time runs back.
    """

    begin_s: float
    end_s: float
    decode_rows: int
    prefill_rows: int
    forward_rows: int
    backward_rows: int
    decode_bucket: int
    chunk_bucket: int
    window_bucket: int
    measured_ms: float
    host_ms: float
    predicted_ms: float | None = None
    backward_target_tokens: float = 0.0
    budget_ms: float | None = None
    planned_s: float | None = None

    def __post_init__(self) -> None:
        is_right = -math.inf < self.begin_s <= self.end_s < math.inf
        require(is_right, "end_s", f"finite and >= `begin_s`={self.begin_s!r}", self.end_s)
        _require_counts(self, "decode_rows", "prefill_rows", "forward_rows", "backward_rows")
        for bucket, rows in (
            ("decode_bucket", self.decode_rows),
            ("chunk_bucket", self.prefill_rows + self.forward_rows),
            ("window_bucket", self.backward_rows),
        ):
            value = getattr(self, bucket)
            require(value >= rows, bucket, f"at least the rows in use, {rows}", value)
        for name in ("measured_ms", "host_ms", "backward_target_tokens"):
            value = getattr(self, name)
            require(0 <= value < math.inf, name, "finite and >= 0", value)
        predicted = self.predicted_ms
        is_right = predicted is None or 0 < predicted < math.inf
        require(is_right, "predicted_ms", "finite and > 0, or None", predicted)
        rule = f"at most `backward_rows`={self.backward_rows}"
        value = self.backward_target_tokens
        require(value <= self.backward_rows, "backward_target_tokens", rule, value)

    @property
    def rows(self) -> int:
        """Rows in use."""
        return self.decode_rows + self.prefill_rows + self.forward_rows + self.backward_rows

    @property
    def padding_rows(self) -> int:
        """Rows that were compiled and hold nothing."""
        return self.decode_bucket + self.chunk_bucket + self.window_bucket - self.rows

    @property
    def finetuning_padding_rows(self) -> float:
        """Padding that finetuning answers for.

        All of the backward tile's; of the rows that prefill and finetuning forward share, the part
        that their use gives: finetuning rows over rows in use.
        """
        used = self.prefill_rows + self.forward_rows
        share = self.forward_rows / used if used else 0.0
        return self.window_bucket - self.backward_rows + share * (self.chunk_bucket - used)


@dataclasses.dataclass(frozen=True)
class TrainRecord:
    """One optimizer step of a finetuning job.

    Attributes:
      time_s: When it was done.
      job: Name of the job.
      step: From 1.
      tokens: Tokens of the batch, padding left out.
      target_tokens: Those of them that bear loss.
      loss: Mean loss per target token, nats; NaN or infinite where training diverged.

    Raises:
      ValueError: If a field is outside its range.
    """

    time_s: float
    job: str
    step: int
    tokens: int
    target_tokens: int
    loss: float

    def __post_init__(self) -> None:
        require(math.isfinite(self.time_s), "time_s", "finite", self.time_s)
        require(self.step >= 1, "step", ">= 1", self.step)
        is_right = 0 <= self.target_tokens <= self.tokens
        rule = f"in [0, `tokens`={self.tokens}]"
        require(is_right, "target_tokens", rule, self.target_tokens)
