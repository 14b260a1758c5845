"""Runs finetuning jobs inside an engine: start, results, publication, end."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import numpy as np

from flexjax.config import EngineConfig, FinetuneConfig, LoraConfig
from flexjax.engine.job import ENDED, EvalRecord, Job, JobHost, JobStatus, StepRecord
from flexjax.engine.runner import Handle, Runner
from flexjax.errors import CapacityError, DatasetError, JobStateError
from flexjax.io.dataset import Dataset, load_dataset
from flexjax.io.peft_adapter import LoraAdapter, load_peft_adapter
from flexjax.io.tokenizer import Tokenizer
from flexjax.lora.bank import init_lora
from flexjax.scheduler.adapter_slots import AdapterInfo, AdapterSlots
from flexjax.scheduler.scheduler import Scheduler
from flexjax.scheduler.training import TrainingRun, TrainSequence


class JobManager:
    """Jobs by name and number, and the published weights of trained adapters.

    Attributes:
      jobs: Every job ever made, in order.
      adapters: Weights behind each loaded adapter, as loaded or as trained (float32).
    """

    def __init__(
        self,
        host: JobHost,
        runner: Runner,
        scheduler: Scheduler,
        slots: AdapterSlots,
        tokenizer: Tokenizer | None,
        config: EngineConfig,
    ):
        self.jobs: list[Job] = []
        self.adapters: dict[str, LoraAdapter] = {}
        self._host = host
        self._runner = runner
        self._scheduler = scheduler
        self._slots = slots
        self._tokenizer = tokenizer
        self._config = config
        self._pending: dict[int, tuple[Mapping, list[TrainSequence], list[TrainSequence]]] = {}

    @property
    def alive(self) -> list[Job]:
        """Jobs that have not ended."""
        return [job for job in self.jobs if job.status not in ENDED]

    def create(self, config: FinetuneConfig) -> Job:
        """Checks everything that a job needs, and queues it.

        Raises:
          CapacityError: If the engine was started without finetuning, or the rank is too large.
          DatasetError: If a row cannot be used.
          AdapterFormatError: If `init_adapter` cannot be used.
          ValueError: If options do not fit together.
          JobStateError: If another job is training the same adapter.
        """
        if self._config.max_jobs == 0:
            raise CapacityError("`max_jobs` must be at least 1 to finetune; got 0.")
        for job in self.alive:
            if job.config.adapter == config.adapter:
                raise JobStateError(
                    f"`adapter` must not be in training; job {job.job_id} trains "
                    f"{config.adapter!r}."
                )
        lora, arrays = self._initial(config)
        rows = self._load(config, config.dataset)
        evals = self._load(config, config.eval_dataset) if config.eval_dataset is not None else None
        if config.drop_last and config.batch_size > len(rows.rows):
            raise DatasetError(
                f"`batch_size` must be at most the number of rows, {len(rows.rows)}, with "
                f"`drop_last`; got {config.batch_size}."
            )
        window = self._runner.sizing.ladder.max_window
        if config.window is not None and config.window > window:
            raise CapacityError(
                f"`window` must be at most the largest window bucket, {window}; "
                f"got {config.window}."
            )
        job = Job(self._host, len(self.jobs), config, lora)
        job._log(
            f"created: {len(rows.rows)} rows, {rows.num_tokens} tokens, {rows.num_targets} of them "
            "bear loss"
        )
        for note in (*rows.notes, *(evals.notes if evals else ())):
            job._log(note, "warn")
        self.jobs.append(job)
        self._pending[job.job_id] = (
            arrays,
            _sequences(rows),
            _sequences(evals) if evals is not None else [],
        )
        self.start_queued()
        return job

    def _initial(self, config: FinetuneConfig) -> tuple[LoraConfig, Mapping]:
        model = self._runner.model
        if config.init_adapter is None:
            lora, arrays = config.lora, init_lora(model, config.lora, config.seed)
        else:
            adapter = load_peft_adapter(config.init_adapter, model)
            lora, arrays = adapter.config, adapter.arrays
        check_rank(lora, self._config)
        return lora, arrays

    def _load(self, config: FinetuneConfig, source) -> Dataset:
        if self._tokenizer is None:
            raise ValueError("`dataset` needs a tokenizer, and this model has none.")
        context = self._runner.sizing.max_context_len
        max_seq_len = config.max_seq_len or context
        if max_seq_len > context:
            raise CapacityError(
                f"`max_seq_len` must be at most the engine's `max_context_len`, {context}; "
                f"got {max_seq_len}."
            )
        return load_dataset(
            source,
            self._tokenizer,
            max_seq_len=max_seq_len,
            overlong=config.overlong,
            vocab_size=self._runner.model.vocab_size,
        )

    def start_queued(self) -> None:
        """Starts queued jobs while there is room and a slot for them."""
        for job in self.alive:
            running = sum(other._run is not None for other in self.alive)
            if job._run is not None or running >= self._config.max_jobs:
                continue
            slot = self._slots.try_reserve()
            if slot is None:
                return
            self._start(job, slot)

    def _start(self, job: Job, slot: int) -> None:
        arrays, rows, evals = self._pending.pop(job.job_id)
        sizing = self._runner.sizing
        layers = job.lora.layers_to_transform
        run = TrainingRun(
            job.job_id,
            job.config,
            rows,
            evals,
            slot=slot,
            num_layers=self._runner.model.num_layers,
            bottom=0 if layers is None else min(layers),
            group_rows=min(sizing.group_rows, job.config.window or sizing.group_rows),
            arena_tokens=sizing.arena_tokens,
            page_size=sizing.page_size,
        )
        run.is_paused = job.status is JobStatus.PAUSED
        self._runner.start_job(job.job_id, slot, job.lora, arrays)
        self._scheduler.add_run(run)
        job._run, job._total_steps, job._started_s = run, run.total_steps, time.perf_counter()
        if not run.is_paused:
            job._set_status(JobStatus.RUNNING, f"started: {run.total_steps} steps, slot {slot}")

    # Results.

    def note_launch(self, handle: Handle) -> None:
        """Counts the results that a launched step will bring."""
        for step, _ in handle.optimizer_stats:
            self.jobs[step.run.run_id]._results_due += 1
        for result, _ in handle.eval_losses:
            self.jobs[result.run.run_id]._results_due += 1

    def take_results(self, handle: Handle, now_s: float) -> None:
        """Reads a step's losses, publishes what is due, ends jobs that are done."""
        touched = set()
        for step, stats in handle.optimizer_stats:
            job = self.jobs[step.run.run_id]
            job._results_due -= 1
            if job.status in ENDED:
                continue
            touched.add(job)
            loss = float(stats.loss)
            if not bool(stats.is_finite):
                what = "loss, gradient or new weights are not finite"
                message = f"{what} at step {step.step + 1} (loss {loss})"
                self.end(job, JobStatus.FAILED, message)
                continue
            norm = float(stats.grad_norm)
            if norm == 0.0 < loss and not (job._steps and job._steps[-1].grad_norm == 0.0):
                # A norm of values whose squares overflow is zero, and so is all behind it.
                job._log(
                    f"the gradient of step {step.step + 1} is exactly 0 though the loss is "
                    f"{loss:.4f}: its activations may have overflowed",
                    "warn",
                )
            job._steps.append(
                StepRecord(
                    step=step.step + 1,
                    loss=loss,
                    tokens=step.num_tokens,
                    target_tokens=step.num_targets,
                    learning_rate=step.learning_rate,
                    grad_norm=norm,
                    time_s=now_s,
                )
            )
            every = job.config.publish_every
            if every and len(job._steps) % every == 0 and len(job._steps) < job._total_steps:
                self._publish_copy(job)
        for result, loss in handle.eval_losses:
            job = self.jobs[result.run.run_id]
            job._results_due -= 1
            if job.status in ENDED:
                continue
            touched.add(job)
            record = EvalRecord(result.step, float(loss) / max(1, result.num_targets))
            job._evals.append(record)
            job._log(f"evaluation after step {record.step}: loss {record.loss:.4f}")
        for job in touched:
            is_done = job._run is not None and job._run.is_exhausted and job._results_due == 0
            if is_done and job.status not in ENDED:
                self._succeed(job)

    def _publish_copy(self, job: Job) -> None:
        """Publishes the working weights under the job's name, if a slot is free."""
        assert job._run is not None
        version = job._run.step  # what the device holds: every step that has been launched
        slot = self._slots.try_reserve()
        if slot is None:
            job._log(f"version {version} was not published: every adapter slot is in use", "warn")
            return
        self._runner.copy_adapter(job._run.slot, slot)
        self._publish(job, slot, version, is_training=True)

    def _publish(self, job: Job, slot: int, version: int, *, is_training: bool) -> None:
        name = job.config.adapter
        arrays = self._runner.master_weights(job.job_id, job.lora)
        self.adapters[name] = LoraAdapter(job.lora, arrays)
        self._slots.publish(slot, AdapterInfo(name, version, job.lora, is_training))
        job._log(f"published version {version}")

    def _succeed(self, job: Job) -> None:
        run = job._run
        assert run is not None
        self._publish(job, run.slot, run.step, is_training=False)
        self._scheduler.remove_run(run)
        self._runner.end_job(job.job_id)
        job._run = None
        tokens = sum(record.tokens for record in job._steps)
        job._set_status(JobStatus.SUCCEEDED, f"succeeded after {run.step} steps, {tokens} tokens")
        self.start_queued()

    def end(self, job: Job, status: JobStatus, message: str) -> None:
        """Ends a job before its time and frees what it owned."""
        run = job._run
        if run is not None:
            self._scheduler.remove_run(run)
            self._slots.release(run.slot)
            self._runner.end_job(job.job_id)
            job._run = None
        self._pending.pop(job.job_id, None)
        name = job.config.adapter
        if name in self._slots.names() and self._slots.info(name).is_training:
            info = self._slots.info(name)
            self._slots.update_info(AdapterInfo(name, info.version, info.lora, False))
        if status is JobStatus.FAILED:
            job._error = message
        level = "error" if status is JobStatus.FAILED else "info"
        job._set_status(status, message, level)
        self.start_queued()

    def trained_weights(self, name: str) -> LoraAdapter | None:
        """Weights of an adapter that is in training and has not been published yet."""
        for job in self.alive:
            if job.config.adapter == name and job._run is not None:
                arrays = self._runner.master_weights(job.job_id, job.lora)
                return LoraAdapter(job.lora, arrays)
        return None


def _sequences(dataset: Dataset) -> list[TrainSequence]:
    return [TrainSequence(row.tokens, row.targets) for row in dataset.rows]


def check_rank(lora: LoraConfig, config: EngineConfig) -> None:
    """Checks that an adapter fits the bank.

    Raises:
      CapacityError: If its rank is above the bank's.
    """
    if lora.r > config.max_lora_rank:
        raise CapacityError(
            f"`r` must be at most the engine's `max_lora_rank`, {config.max_lora_rank}; "
            f"got {lora.r}."
        )
    if not math.isfinite(lora.scale):
        raise ValueError(f"`alpha` must give a finite scale; got {lora.alpha}.")


def check_finite(adapter: LoraAdapter, name: str) -> None:
    """Checks an adapter's values.

    Raises:
      ValueError: If a value is not finite.
    """
    for target, pair in adapter.arrays.items():
        for part, array in pair.items():
            if not np.isfinite(np.asarray(array, np.float32)).all():
                raise ValueError(f"Adapter {name!r} must be finite; {target} {part} is not.")
