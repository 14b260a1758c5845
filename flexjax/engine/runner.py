"""Everything on the device, and the only code that touches it: plans in, handles out.

A launch returns at once; what the host must know of a step is read later from its handle, so that
the next step can be planned while this one runs.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexjax.autodiff.arena import init_arena
from flexjax.cache.pages import init_pool
from flexjax.config import EngineConfig, FinetuneConfig, LoraConfig
from flexjax.engine.batch import SampleTable, build_loss, build_step
from flexjax.engine.programs import Programs, scalar, set_compile_cache
from flexjax.engine.sizing import Sizing
from flexjax.layout import Bucket
from flexjax.lora.bank import init_bank, pad_lora
from flexjax.model_config import ModelConfig
from flexjax.models.weights import DecoderWeights, split_kernels
from flexjax.optim.adamw import Hyper, OptimizerState, StepStats, init_optimizer
from flexjax.optim.sums import GradSums, zero_sums
from flexjax.scheduler.features import StepFeatures, features_of
from flexjax.scheduler.plan import Discard, EvalResult, LossWindow, OptimizerStep, StepPlan
from flexjax.scheduler.sequence import Sequence
from flexjax.step.sampling import SampleOutput
from flexjax.step.state import EngineState, init_sample_state
from pallas_kernels import prefers_llvm


@dataclasses.dataclass
class JobArrays:
    """Device arrays of one job.

    Attributes:
      optimizer: Master weights and moments.
      total: Sums of the current batch's finished groups.
      part: Sums of the group that is in its backward pass.
      eval_loss: Summed loss of the evaluation under way.
    """

    optimizer: OptimizerState
    total: GradSums
    part: GradSums
    eval_loss: jax.Array


class StepResult(NamedTuple):
    """What one bucket's program leaves beside the engine's state.

    Attributes:
      done: Device array that is ready when the step is.
      sums: Gradient sums of the tile's job, None without a tile.
      sampled: Tokens of the rows, where the bucket only decodes.
    """

    done: jax.Array
    sums: GradSums | None = None
    sampled: SampleOutput | None = None


@dataclasses.dataclass
class Handle:
    """A launched step.

    Attributes:
      plan: What it holds.
      bucket: Shape it ran in; None if it had no rows.
      features: What its time depends on.
      done: Device array that is ready when the step is; None if it had no rows.
      sampled: Device arrays of the sampled tokens, None without samples.
      optimizer_stats: Device statistics of each optimizer step of the plan.
      eval_losses: Device loss sums of each evaluation that ended.
      launched_s: Clock at launch.
      planned_s: Clock when planning began.
      schedule_ms: Milliseconds that planning took.
      host_ms: Milliseconds of all the host's work in the iteration, without waiting.
      idle_ms: Milliseconds that the device may have waited for this step.
    """

    plan: StepPlan
    bucket: Bucket | None
    features: StepFeatures
    done: jax.Array | None
    sampled: SampleOutput | None
    optimizer_stats: list[tuple[OptimizerStep, StepStats]]
    eval_losses: list[tuple[EvalResult, jax.Array]]
    launched_s: float
    planned_s: float = 0.0
    schedule_ms: float = 0.0
    host_ms: float = 0.0
    idle_ms: float = 0.0

    @property
    def is_done(self) -> bool:
        """Whether the device has finished the step."""
        return all(array.is_ready() for array in self._arrays())  # type: ignore[attr-defined]

    def wait(self) -> None:
        """Blocks until the device has finished the step."""
        for array in self._arrays():
            array.block_until_ready()

    def _arrays(self) -> list[jax.Array]:
        """Arrays that are ready once the step is; all outputs of a program are ready at once."""
        sampled = None if self.sampled is None else self.sampled.tokens
        return [array for array in (sampled, self.done) if array is not None]


class Runner:
    """Owns weights, adapters, state and programs."""

    def __init__(
        self,
        model: ModelConfig,
        weights: DecoderWeights,
        config: EngineConfig,
        sizing: Sizing,
        *,
        progress: Callable[[int, int], None] | None = None,
    ):
        set_compile_cache(config.compile_cache_dir)
        self.model = model
        self.sizing = sizing
        # For XLA's products; the CPU's kernels read a layer in its stack.
        has_kernels = sizing.step.is_fused or prefers_llvm(sizing.step.implementation, sizing.dtype)
        can_split = jax.default_backend() == "cpu" and not has_kernels
        self.weights = split_kernels(weights) if can_split else weights
        self.bank = init_bank(model, config.max_adapters, config.max_lora_rank, sizing.dtype)
        self.state = EngineState(
            init_pool(model, sizing.num_pages, config.page_size, sizing.dtype),
            init_arena(
                model,
                num_pages=sizing.arena_pages,
                page_size=config.page_size,
                dtype=sizing.dtype,
                policy=config.saved_activations,
                acc_layers=sizing.acc_layers,
            ),
            init_sample_state(model, config.max_running, sizing.dtype),
        )
        self.max_rank = config.max_lora_rank
        self._page_size = config.page_size
        self._sampling = SampleTable(config.max_running)
        self._jobs: dict[int, JobArrays] = {}
        self.programs = Programs(
            model, sizing.step, self.weights, self.bank, self.state, sizing.max_context_len
        )
        self.buckets = sizing.ladder.all_buckets(finetuning=sizing.can_finetune)
        windows = sizing.ladder.window if sizing.can_finetune else ()
        self.programs.compile_all(self.buckets, sizing.ladder.decode, windows, progress=progress)

    # Adapters and jobs.

    def write_adapter(
        self, slot: int, lora: LoraConfig, arrays: Mapping[str, Mapping[str, np.ndarray]]
    ) -> None:
        """Stores an adapter in a slot."""
        tree = pad_lora(self.model, arrays, self.max_rank)
        write = self.programs["write_slot",]
        self.bank = write(self.bank, scalar(slot), tree, np.float32(lora.scale))

    def copy_adapter(self, source: int, target: int) -> None:
        """Copies a slot on the device."""
        self.bank = self.programs["copy_slot",](self.bank, scalar(source), scalar(target))

    def read_adapter(self, slot: int, lora: LoraConfig) -> dict[str, dict[str, np.ndarray]]:
        """Reads an adapter as it is served, in the bank's dtype, without padding."""
        return {
            name: {
                "A": np.asarray(self.bank.a[name][slot])[:, :, : lora.r],
                "B": np.asarray(self.bank.b[name][slot])[:, : lora.r, :],
            }
            for name in lora.targets
        }

    def start_job(
        self,
        run_id: int,
        slot: int,
        lora: LoraConfig,
        arrays: Mapping[str, Mapping[str, np.ndarray]],
    ) -> None:
        """Gives a job its master weights, moments and sums, and fills its working slot."""
        self.write_adapter(slot, lora, arrays)
        master = jax.tree.map(jnp.asarray, pad_lora(self.model, arrays, self.max_rank))
        self._jobs[run_id] = JobArrays(
            optimizer=init_optimizer(master),
            total=zero_sums(self.model, self.max_rank),
            part=zero_sums(self.model, self.max_rank),
            eval_loss=jnp.zeros((), jnp.float32),
        )

    def master_weights(self, run_id: int, lora: LoraConfig) -> dict[str, dict[str, np.ndarray]]:
        """Reads a job's float32 master weights, without padding."""
        master = self._jobs[run_id].optimizer.master
        return {
            name: {
                "A": np.asarray(master.a[name])[:, :, : lora.r],
                "B": np.asarray(master.b[name])[:, : lora.r, :],
            }
            for name in lora.targets
        }

    def end_job(self, run_id: int) -> None:
        """Forgets a job's arrays."""
        del self._jobs[run_id]

    # Steps.

    def launch(self, plan: StepPlan) -> Handle:
        """Starts a step on the device and returns at once."""
        launched_s = time.perf_counter()
        for discard in plan.discarded:
            self._discard(discard)
        for sequence in plan.resets:
            self._reset(sequence)
        for window in plan.losses:
            self._run_loss(window)
        bucket, result = self._run_plan(plan)
        sampled = None if result is None else result.sampled
        if plan.samples and sampled is None:
            sampled = self._run_samples(plan.samples)
        for group in plan.finished_groups:
            job = self._jobs[group.run.run_id]
            job.total, job.part = self.programs["add_sums",](job.total, job.part)
        stats = [(step, self._run_optimizer(step)) for step in plan.optimizer_steps]
        evals = [(result, self._take_eval_loss(result)) for result in plan.eval_results]
        features = features_of(
            plan, bucket, decode_kv_tokens=plan.decode_kv_tokens, ladder=self.sizing.ladder
        )
        done = None if result is None else result.done
        return Handle(plan, bucket, features, done, sampled, stats, evals, launched_s)

    def run_step(self, bucket: Bucket, packed: np.ndarray, sums: GradSums | None) -> StepResult:
        """Runs a bucket's program.

        Args:
          bucket: Row counts.
          packed: The batch, as `layout.program_fields` describes it; not to be changed any more.
          sums: Gradient sums of the tile's job; donated. None without a tile.
        """
        step, state = self.programs["step", bucket], self.state
        if bucket.only_decodes:
            pool, sample, sampled = step(self.weights, self.bank, state.pool, state.sample, packed)
            self.state = state._replace(pool=pool, sample=sample)
            return StepResult(sampled.tokens, sampled=sampled)
        self.state, sums, done = step(self.weights, self.bank, state, sums, packed)
        return StepResult(done, sums)

    def run_sampling(self, packed: np.ndarray, rows: int) -> SampleOutput:
        """Runs the sampling head on a batch, as `layout.sample_fields` describes it."""
        sample = self.programs["sample", rows]
        state, output = sample(self.weights, self.state.sample, packed)
        self.state = self.state._replace(sample=state)
        return output

    def _run_plan(self, plan: StepPlan) -> tuple[Bucket | None, StepResult | None]:
        tile = plan.tile
        if not plan.decode and not plan.num_chunk_rows and tile is None:
            return None, None
        bucket = self.sizing.ladder.bucket(
            len(plan.decode),
            plan.num_chunk_rows,
            tile.length if tile else 0,
            tile.num_layers if tile else None,
        )
        packed = build_step(plan, bucket, self.sizing.step, self._page_size)
        if bucket.only_decodes:  # each of whose rows samples, in the same order
            packed = np.concatenate([packed, self._sampling.build(plan.samples, bucket.decode)])
        job = self._jobs[tile.group.run.run_id] if tile else None
        result = self.run_step(bucket, packed, job.part if job else None)
        if job is not None:
            assert result.sums is not None
            job.part = result.sums
        return bucket, result

    def _run_samples(self, sequences: list[Sequence]) -> SampleOutput:
        rows = next(n for n in self.sizing.ladder.decode if n >= len(sequences))
        return self.run_sampling(self._sampling.build(sequences, rows), rows)

    def _run_loss(self, window: LossWindow) -> None:
        rows = next(n for n in self.sizing.ladder.window if n >= window.length)
        job = self._jobs[window.group.run.run_id]
        packed = build_loss(window, rows)
        program = self.programs["loss", rows]
        is_eval = window.group.is_eval
        loss = job.eval_loss if is_eval else job.part.loss
        loss, arena = program(self.weights, self.state.arena, loss, packed)
        self.state = self.state._replace(arena=arena)
        if is_eval:
            job.eval_loss = loss
        else:
            job.part = job.part._replace(loss=loss)

    def _run_optimizer(self, step: OptimizerStep) -> StepStats:
        job = self._jobs[step.run.run_id]
        config: FinetuneConfig = step.run.config
        limit = math.inf if config.max_grad_norm is None else config.max_grad_norm
        hyper = Hyper(
            learning_rate=step.learning_rate,
            weight_decay=config.weight_decay,
            beta1=config.beta1,
            beta2=config.beta2,
            eps=config.eps,
            max_grad_norm=limit,
            num_targets=step.num_targets,
        )
        program = self.programs["optimizer_step",]
        job.optimizer, job.total, self.bank, stats = program(
            job.optimizer, job.total, self.bank, scalar(step.run.slot), hyper.packed()
        )
        return stats

    def _take_eval_loss(self, result: EvalResult) -> jax.Array:
        job = self._jobs[result.run.run_id]
        loss, job.eval_loss = job.eval_loss, jax.device_put(np.zeros((), np.float32))
        return loss

    def _reset(self, sequence: Sequence) -> None:
        size = self.sizing.max_context_len
        prompt, output = np.full((2, size), -1, np.int32)
        prompt[: sequence.prompt_len] = sequence.request.prompt_token_ids
        output[: len(sequence.output)] = sequence.output
        reset = self.programs["reset_sequence",]
        sample = reset(self.state.sample, scalar(sequence.slot), prompt, output)
        self.state = self.state._replace(sample=sample)

    def _discard(self, discard: Discard) -> None:
        """Clears what a group left behind; its pages even if its job has ended."""
        pages = np.full((self.sizing.step.tile_pages,), -1, np.int32)
        pages[: len(discard.arena_pages)] = discard.arena_pages
        arena = self.programs["discard",](self.state.arena, pages)
        self.state = self.state._replace(arena=arena)
        job = self._jobs.get(discard.group.run.run_id)
        if job is not None and discard.had_sums:
            job.part = self.programs["clear_sums",](job.part)
