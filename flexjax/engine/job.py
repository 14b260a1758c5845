"""A finetuning job as its owner sees it."""

from __future__ import annotations

import dataclasses
import enum
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from flexjax.config import FinetuneConfig, LoraConfig
from flexjax.errors import JobStateError
from flexjax.scheduler.training import TrainingRun


@runtime_checkable
class JobHost(Protocol):
    """What a job needs of the engine that runs it."""

    def exclusive(self) -> AbstractContextManager[None]:
        """Holds the engine between two steps."""
        ...

    def wait_for(
        self, event: threading.Event, timeout: float | None, check: Callable[[], None]
    ) -> None:
        """Waits for `event`, driving the engine where no thread does."""
        ...

    def end_job(self, job: Job, status: JobStatus, message: str) -> None:
        """Stops a job and frees what it owned."""
        ...


class JobStatus(enum.StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})
"""States that a job never leaves."""


@dataclasses.dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job.

    Attributes:
      time_s: Unix time.
      level: "info", "warn" or "error".
      message: What happened.
    """

    time_s: float
    level: str
    message: str


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    Attributes:
      step: From 1.
      loss: Mean loss per target token of the batch, nats, before the step.
      tokens: Tokens of the batch.
      target_tokens: Tokens that bear loss.
      learning_rate: Of this step.
      grad_norm: Global norm before clipping.
      time_s: Clock (monotonic) when the host read it.
    """

    step: int
    loss: float
    tokens: int
    target_tokens: int
    learning_rate: float
    grad_norm: float
    time_s: float


@dataclasses.dataclass(frozen=True)
class EvalRecord:
    """One evaluation: optimizer steps taken before it, and mean loss per target token, nats."""

    step: int
    loss: float


@dataclasses.dataclass(frozen=True)
class JobMetrics:
    """Progress of a job.

    Attributes:
      steps: Optimizer steps so far.
      evals: Evaluations so far.
      total_steps: Steps of the whole job.
      tokens: Tokens trained on.
      target_tokens: Of those, tokens that bear loss.
      tokens_per_s: `tokens` over the seconds since the job began; None before the first step.
      eta_s: Expected seconds until the end; None before the first step.
    """

    steps: tuple[StepRecord, ...]
    evals: tuple[EvalRecord, ...]
    total_steps: int
    tokens: int
    target_tokens: int
    tokens_per_s: float | None
    eta_s: float | None

    @property
    def losses(self) -> list[float]:
        """Loss of each step."""
        return [record.loss for record in self.steps]


class Job:
    """A handle on one finetuning job; made by `Engine.finetune`.

    Attributes:
      job_id: Number, in order of creation.
      config: What was asked for.
      lora: Shape of the adapter (that of `init_adapter`, where one was given).
    """

    def __init__(self, host: JobHost, job_id: int, config: FinetuneConfig, lora: LoraConfig):
        self.job_id = job_id
        self.config = config
        self.lora = lora
        self._host = host
        self._status = JobStatus.QUEUED
        self._events: list[JobEvent] = []
        self._steps: list[StepRecord] = []
        self._evals: list[EvalRecord] = []
        self._started_s: float | None = None
        self._error: str | None = None
        self._ended = threading.Event()
        self._results_due = 0
        self._make_run: Callable[[int], TrainingRun] | None = None
        self._run: TrainingRun | None = None
        self._total_steps = 0

    @property
    def status(self) -> JobStatus:
        """Where the job is."""
        return self._status

    @property
    def events(self) -> tuple[JobEvent, ...]:
        """What has happened, oldest first."""
        return tuple(self._events)

    def metrics(self) -> JobMetrics:
        """Progress so far; cheap, may be called at any time from any thread."""
        steps = tuple(self._steps)
        tokens = sum(record.tokens for record in steps)
        rate = eta = None
        if steps and self._started_s is not None:
            elapsed = max(steps[-1].time_s - self._started_s, 1e-9)
            rate = tokens / elapsed
            eta = elapsed / len(steps) * (self._total_steps - len(steps))
        return JobMetrics(
            steps=steps,
            evals=tuple(self._evals),
            total_steps=self._total_steps,
            tokens=tokens,
            target_tokens=sum(record.target_tokens for record in steps),
            tokens_per_s=rate,
            eta_s=eta,
        )

    def wait(self, timeout: float | None = None) -> JobStatus:
        """Waits for the end of the job; drives the engine where no thread does.

        Args:
          timeout: Seconds at most; None for no limit.

        Returns:
          The status, which is not final if the time ran out.

        Raises:
          JobStateError: If the job failed, or is paused in an engine that nobody else drives.
        """
        self._host.wait_for(self._ended, timeout, self._can_progress)
        if self._status is JobStatus.FAILED:
            raise JobStateError(
                f"Job {self.job_id} ({self.config.adapter!r}) failed: {self._error}"
            )
        return self._status

    def _can_progress(self) -> None:
        if self._status is JobStatus.PAUSED:
            raise JobStateError(f"Job {self.job_id} is paused; resume it before waiting for it.")

    def pause(self) -> None:
        """Holds the job back after the batch that is under way.

        Raises:
          JobStateError: If the job has ended.
        """
        with self._host.exclusive():
            self._require_alive("pause")
            if self._run is not None:
                self._run.is_paused = True
            self._set_status(JobStatus.PAUSED, "paused")

    def resume(self) -> None:
        """Goes on with a paused job.

        Raises:
          JobStateError: If the job is not paused.
        """
        with self._host.exclusive():
            if self._status is not JobStatus.PAUSED:
                raise JobStateError(
                    f"Job {self.job_id} must be paused to be resumed; it is {self._status.value}."
                )
            if self._run is not None:
                self._run.is_paused = False
            status = JobStatus.RUNNING if self._run is not None else JobStatus.QUEUED
            self._set_status(status, "resumed")

    def cancel(self) -> None:
        """Ends the job; nothing further of it is published.

        Raises:
          JobStateError: If the job has ended.
        """
        with self._host.exclusive():
            self._require_alive("cancel")
            self._host.end_job(self, JobStatus.CANCELLED, "cancelled")

    def _require_alive(self, action: str) -> None:
        if self._status in ENDED:
            raise JobStateError(
                f"Job {self.job_id} cannot {action}; it has ended ({self._status.value})."
            )

    def _log(self, message: str, level: str = "info") -> None:
        self._events.append(JobEvent(time.time(), level, message))

    def _set_status(self, status: JobStatus, message: str, level: str = "info") -> None:
        self._status = status
        self._log(message, level)
        if status in ENDED:
            self._ended.set()
