"""The iteration: steps are planned and launched one ahead of what has been read.

The only place that sees both the scheduler and the device. A step is planned, launched, and only
then are the results of the step before it read, so that the host works while the device does.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import numpy as np

from flexjax.engine.jobs import JobManager
from flexjax.engine.runner import Handle, Runner
from flexjax.request import TokenLogprobs
from flexjax.scheduler.features import StepFeatures
from flexjax.scheduler.latency_model import LatencyModel
from flexjax.scheduler.plan import StepPlan
from flexjax.scheduler.scheduler import Scheduler
from flexjax.scheduler.sequence import Sequence, SequenceStatus

TakeToken = Callable[[Sequence, int, TokenLogprobs | None, float], None]
"""Called with a sequence, its new token, what was asked of its probability, and the clock."""


@dataclasses.dataclass
class EngineStats:
    """Counters since the engine started, and what is alive now.

    Attributes:
      steps: Launched steps.
      mixed_steps: Of those, steps that held both inference and finetuning rows.
      prompt_tokens: Prompt tokens computed, recomputation included.
      generated_tokens: Tokens sampled and kept.
      finetune_forward_tokens: Finetuning rows taken through the forward pass.
      finetune_backward_tokens: Finetuning rows taken through the backward pass.
      trained_tokens: Tokens of batches whose optimizer step has been read.
      trained_target_tokens: Of those, tokens that bear loss.
      num_running: Requests running now.
      num_waiting: Requests waiting now.
    """

    steps: int = 0
    mixed_steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finetune_forward_tokens: int = 0
    finetune_backward_tokens: int = 0
    trained_tokens: int = 0
    trained_target_tokens: int = 0
    num_running: int = 0
    num_waiting: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class StepEvent:
    """One step as the host saw it.

    Attributes:
      plan: What it held.
      features: What its time depends on.
      planned_s: Clock when planning began.
      begin_s: Clock when the device could begin: launched, and the step before done.
      end_s: Clock when the host saw that it was done.
      predicted_ms: Expected milliseconds, before the step was measured.
      budget_ms: The same as a high quantile, which is held against latency targets.
      schedule_ms: Milliseconds that planning took.
      host_ms: Milliseconds of the host's work in the iteration that launched the step: planning,
        batch building, dispatch, and taking in the results of the step before, without waiting.
      idle_ms: Milliseconds that the device may have waited for the host: 0 if the step before was
        still running when this one was launched, else the time since the host began to plan it.
    """

    plan: StepPlan
    features: StepFeatures
    planned_s: float
    begin_s: float
    end_s: float
    predicted_ms: float
    budget_ms: float
    schedule_ms: float
    host_ms: float
    idle_ms: float


class StepPipeline:
    """Runs steps: `step` plans and launches one, and reads the one before it.

    Attributes:
      stats: Counters; those of what is alive stay 0.
      on_step: Called, if set, with each step once its results have been read.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        jobs: JobManager,
        latency: LatencyModel,
        take_token: TakeToken,
    ):
        self.stats = EngineStats()
        self.on_step: Callable[[StepEvent], None] | None = None
        self._scheduler = scheduler
        self._runner = runner
        self._jobs = jobs
        self._latency = latency
        self._take_token = take_token
        self._in_flight: Handle | None = None
        self._last_done_s = 0.0

    def step(self) -> bool:
        """Runs one iteration; returns whether there was anything to do."""
        previous = self._in_flight
        now_s = time.perf_counter()
        plan = self._scheduler.schedule(now_s, self._expected_end_s())
        planned_s = time.perf_counter()
        handle = None
        if not plan.is_empty:
            was_done = previous is not None and previous.is_done
            handle = self._runner.launch(plan)
            launched_s = time.perf_counter()
            handle.planned_s = now_s
            handle.schedule_ms = 1e3 * (planned_s - now_s)
            if previous is not None and previous.is_done:
                handle.idle_ms = 1e3 * (launched_s - (now_s if was_done else planned_s))
            self._jobs.note_launch(handle)
            self._count(handle)
            handle.host_ms = 1e3 * (time.perf_counter() - now_s)
        self._in_flight = handle
        if previous is not None:
            took_ms = self._process(previous)
            if handle is not None:
                handle.host_ms += took_ms
        return handle is not None or previous is not None

    def _expected_end_s(self) -> float | None:
        """When the step on the device is expected to be done."""
        handle = self._in_flight
        if handle is None:
            return None
        began_s = max(handle.launched_s, self._last_done_s)
        return began_s + self._latency.predict(handle.features) / 1e3

    def _count(self, handle: Handle) -> None:
        stats, plan = self.stats, handle.plan
        stats.steps += 1
        has_inference = bool(plan.decode or plan.prefill)
        stats.mixed_steps += has_inference and plan.num_finetune_rows > 0
        stats.prompt_tokens += sum(chunk.length for chunk in plan.prefill)
        stats.finetune_forward_tokens += sum(piece.length for piece in plan.forward)
        stats.finetune_backward_tokens += plan.tile.length if plan.tile else 0

    def _process(self, handle: Handle) -> float:
        """Reads a step's results; blocks until the device has them.

        Returns:
          Milliseconds of work, without the waiting.
        """
        handle.wait()
        now_s = time.perf_counter()
        begin_s = max(handle.launched_s, self._last_done_s)
        if handle.bucket is not None:
            if self.on_step is not None:
                self._tell(handle, begin_s, now_s)
            self._latency.observe(handle.features, 1e3 * (now_s - begin_s))
        self._last_done_s = now_s
        if handle.sampled is not None:
            self._take_tokens(handle, now_s)
        for step, _ in handle.optimizer_stats:
            self.stats.trained_tokens += step.num_tokens
            self.stats.trained_target_tokens += step.num_targets
        self._jobs.take_results(handle, now_s)
        return 1e3 * (time.perf_counter() - now_s)

    def _tell(self, handle: Handle, begin_s: float, end_s: float) -> None:
        assert self.on_step is not None
        event = StepEvent(
            plan=handle.plan,
            features=handle.features,
            planned_s=handle.planned_s,
            begin_s=begin_s,
            end_s=end_s,
            predicted_ms=self._latency.predict(handle.features),
            budget_ms=self._latency.predict_high(handle.features),
            schedule_ms=handle.schedule_ms,
            host_ms=handle.host_ms,
            idle_ms=handle.idle_ms,
        )
        self.on_step(event)

    def _take_tokens(self, handle: Handle, now_s: float) -> None:
        assert handle.sampled is not None
        tokens = np.asarray(handle.sampled.tokens).tolist()
        samples, record_token = handle.plan.samples, self._scheduler.record_token
        logprobs, count = None, 0
        for row, (sequence, token) in enumerate(zip(samples, tokens, strict=False)):
            if sequence.status is SequenceStatus.FINISHED:
                continue  # ended by the token before; this row was launched ahead of it
            record_token(sequence, token, now_s)
            count += 1
            wanted, logprob = sequence.request.params.logprobs, None
            if wanted is not None:
                logprobs = logprobs or _read_logprobs(handle, tokens)
                logprob = logprobs(row, wanted)
            self._take_token(sequence, token, logprob, now_s)
        self.stats.generated_tokens += count


def _read_logprobs(handle: Handle, tokens: list[int]) -> Callable[[int, int], TokenLogprobs]:
    """Reads a step's log probabilities; returns a lookup by row and number of alternatives."""
    assert handle.sampled is not None
    chosen, ids, values = (np.asarray(array) for array in handle.sampled[1:])

    def lookup(row: int, count: int) -> TokenLogprobs:
        pairs = zip(ids[row, :count], values[row, :count], strict=True)
        top = tuple((int(i), float(v)) for i, v in pairs if i >= 0)
        return TokenLogprobs(tokens[row], float(chosen[row]), top)

    return lookup
