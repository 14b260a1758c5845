"""Drives an engine through a workload and a finetuning job, and counts what its steps held."""

from __future__ import annotations

import collections
import dataclasses
import time

from flexjax.cli.coserve.workload import PlannedRequest
from flexjax.engine.engine import Engine
from flexjax.engine.job import ENDED, Job
from flexjax.engine.output import RequestOutput
from flexjax.engine.pipeline import EngineStats
from flexjax.request import GenerationOutput

_MAX_SLEEP_S = 0.005
_MAX_IDLE_S = 30.0


@dataclasses.dataclass(frozen=True)
class Submitted:
    """A request that has arrived.

    Attributes:
      planned: What was planned.
      delay_s: Seconds between the time that it was due and its arrival at the engine; part of its
        TTFT, or a busy generator would flatter it.
      output: What the engine fills.
    """

    planned: PlannedRequest
    delay_s: float
    output: RequestOutput


@dataclasses.dataclass
class StepCounts:
    """Steps by what they held.

    Attributes:
      both: Inference rows and finetuning rows.
      inference: Inference rows alone.
      finetuning: Finetuning rows alone.
    """

    both: int = 0
    inference: int = 0
    finetuning: int = 0


class CoserveLoop:
    """Submits requests when they are due and steps the engine until all is done.

    Attributes:
      engine: What is driven.
      job: The finetuning job.
      waiting: Requests that are not due yet.
      submitted: Requests that have arrived, in order.
      finished: Of those, the ones that have been answered, in order of their ends.
      begin_s: Clock at the start.
      counts: Steps so far, by what they held.
    """

    def __init__(self, engine: Engine, job: Job, requests: tuple[PlannedRequest, ...]):
        self.engine = engine
        self.job = job
        self.waiting = collections.deque(requests)
        self.submitted: list[Submitted] = []
        self.finished: list[Submitted] = []
        self.begin_s = time.perf_counter()
        self.counts = StepCounts()
        self.stats = engine.stats()
        self._alive: list[Submitted] = []
        self._launched_prompt = False
        self._launched_finetuning = False
        self._idle_since_s: float | None = None

    @property
    def is_done(self) -> bool:
        """Whether every request has been answered and the job has ended."""
        return not self.waiting and not self._alive and self.job.status in ENDED

    def advance(self) -> None:
        """Submits what is due and runs one step of the engine.

        Raises:
          JobStateError: If the job failed.
          RuntimeError: If the engine has nothing to do although work is left.
        """
        self._submit_due()
        has_work = self.engine.step()
        self._count(self.engine.stats())
        self._collect()
        if self.job.status in ENDED:
            self.job.wait()  # raises if it failed
        if has_work:
            self._idle_since_s = None
        elif not self.is_done:
            self._rest()

    def _submit_due(self) -> None:
        while self.waiting:
            due_s = self.begin_s + self.waiting[0].arrival_s
            if time.perf_counter() < due_s:
                return
            planned = self.waiting.popleft()
            output = self.engine.add_request(planned.prompt.token_ids, planned.params)
            delay_s = max(0.0, output.sequence.request.arrival_s - due_s)
            submitted = Submitted(planned, delay_s, output)
            self.submitted.append(submitted)
            self._alive.append(submitted)

    def _count(self, stats: EngineStats) -> None:
        """Classifies the step before: its prompt rows show at launch, its decode rows now."""
        last, self.stats = self.stats, stats
        has_tokens = self._launched_prompt or stats.generated_tokens > last.generated_tokens
        if self._launched_finetuning:
            self.counts.both += has_tokens
            self.counts.finetuning += not has_tokens
        else:
            self.counts.inference += has_tokens
        self._launched_prompt = stats.prompt_tokens > last.prompt_tokens
        self._launched_finetuning = (
            stats.finetune_forward_tokens > last.finetune_forward_tokens
            or stats.finetune_backward_tokens > last.finetune_backward_tokens
        )

    def _collect(self) -> None:
        ended = [request for request in self._alive if request.output.finished.is_set()]
        if ended:
            self.finished += ended
            self._alive = [r for r in self._alive if not r.output.finished.is_set()]

    def _rest(self) -> None:
        now_s = time.perf_counter()
        if self.waiting:
            self._idle_since_s = None
            due_s = self.begin_s + self.waiting[0].arrival_s
            time.sleep(min(max(due_s - now_s, 0.0), _MAX_SLEEP_S))
            return
        self._idle_since_s = self._idle_since_s or now_s
        if now_s - self._idle_since_s > _MAX_IDLE_S:
            raise RuntimeError(
                f"the engine has been idle for {_MAX_IDLE_S:.0f} s with {len(self._alive)} "
                f"requests unanswered and the job {self.job.status.value}"
            )
        time.sleep(0.001)

    def results(self) -> list[GenerationOutput]:
        """Outputs of all requests that have arrived, in order of arrival."""
        return [request.output.result() for request in self.submitted]
