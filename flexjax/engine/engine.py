"""The engine: requests and finetuning jobs in, tokens and adapters out.

What callers see, and what belongs to their requests and adapters; `pipeline` runs the steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from flexjax.builtin_models import BUILTIN_MODELS
from flexjax.config import EngineConfig, FinetuneConfig, SamplingParams
from flexjax.engine.job import Job, JobStatus
from flexjax.engine.jobs import JobManager, check_rank
from flexjax.engine.loop import EngineLoop
from flexjax.engine.output import RequestOutput
from flexjax.engine.pipeline import EngineStats, StepEvent, StepPipeline
from flexjax.engine.profiling import Profiler
from flexjax.engine.prompts import Prompt, encode_prompt, is_list, is_single
from flexjax.engine.runner import Runner
from flexjax.engine.sizing import Sizing
from flexjax.errors import (
    AdapterNotFoundError,
    CapacityError,
    EngineDeadError,
    JobStateError,
)
from flexjax.io.hf_weights import load_weights
from flexjax.io.peft_adapter import load_peft_adapter, save_peft_adapter
from flexjax.io.tokenizer import Tokenizer
from flexjax.model_config import ModelConfig, load_model_config
from flexjax.models.weights import DecoderWeights, random_weights
from flexjax.request import GenerationOutput, GenerationRequest, StreamPiece, TokenLogprobs
from flexjax.scheduler import sequence as scheduled
from flexjax.scheduler.adapter_slots import AdapterInfo, AdapterSlots
from flexjax.scheduler.latency_model import LatencyModel
from flexjax.scheduler.latency_profile import LatencyProfile
from flexjax.scheduler.page_allocator import PageAllocator
from flexjax.scheduler.policy import CoServe, SharingPolicy, make_policy
from flexjax.scheduler.scheduler import Scheduler
from flexjax.slo import SLO, resolve_slo


class Engine(EngineLoop):
    """Serves requests and finetunes adapters in the same steps.

    Used as a context manager, a thread runs the loop; otherwise `step` runs one iteration, and
    calls that wait (`generate`, `stream`, `Job.wait`) drive it themselves. Methods may be called
    from any thread.
    """

    def __init__(
        self,
        model: ModelConfig,
        weights: DecoderWeights,
        tokenizer: Tokenizer | None,
        config: EngineConfig | None = None,
        *,
        model_name: str | None = None,
        policy: SharingPolicy | None = None,
        profile: LatencyProfile | None = None,
        progress: Callable[[int, int], None] | None = None,
    ):
        """Starts an engine: sizes memory, compiles every program, measures every bucket.

        Args:
          model: Architecture.
          weights: Its weights, in the dtype that the configuration asks for.
          tokenizer: For text prompts and datasets; None where only token ids are used.
          config: Sizes and choices; None for the defaults.
          model_name: Name that saved adapters give for their base.
          policy: How requests and jobs share the steps; None for the configured one.
          profile: How long steps take, as `flexjax profile` measured it on such a device with such
            sizes; None to measure it now, more roughly.
          progress: Called with (done, total) while programs compile.

        Raises:
          ValueError: If `profile` lacks a bucket of this engine, or the policy is not known.
        """
        super().__init__()
        config = config or EngineConfig()
        policy = policy or _policy(config)
        sizing = Sizing.derive(model, config, jax.default_backend())
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.latency = _latency(profile, sizing)
        self._model_name = model_name
        self._runner = Runner(model, weights, config, sizing, progress=progress)
        self._scheduler = Scheduler(
            ladder=sizing.ladder,
            sizes=sizing.step,
            pages=PageAllocator(sizing.num_pages, config.page_size),
            arena=PageAllocator(sizing.arena_pages, config.page_size),
            policy=policy,
            latency=self.latency,
            max_running=config.max_running,
            max_context_len=sizing.max_context_len,
            num_layers=model.num_layers,
            tile_order=config.tile_order,
            is_deterministic=config.deterministic_finetuning,
        )
        self._slots = AdapterSlots(config.max_adapters)
        self._jobs = JobManager(self, self._runner, self._scheduler, self._slots, tokenizer, config)
        self._outputs: dict[int, RequestOutput] = {}
        self._next_id = 0
        self._pipeline = StepPipeline(
            self._scheduler, self._runner, self._jobs, self.latency, self._take_token
        )
        if profile is None:
            self.latency.fit(Profiler(self._runner).measure())

    @classmethod
    def from_pretrained(
        cls,
        model_dir: str | Path,
        config: EngineConfig | None = None,
        *,
        policy: SharingPolicy | None = None,
        profile: LatencyProfile | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Engine:
        """Starts an engine on a Hugging Face directory, or on a built-in architecture.

        Args:
          model_dir: Directory with config.json, *.safetensors and tokenizer.json; or one of
            `BUILTIN_MODELS`, which gets random weights and takes token ids only.
          config: Sizes and choices; None for the defaults.
          policy: See `Engine`.
          profile: See `Engine`.
          progress: Called with (done, total) while programs compile.

        Raises:
          ModelNotFoundError: If the directory or a file is missing.
          UnsupportedModelError: If the architecture is not supported.
          WeightFormatError: If the weights do not fit the configuration.
          ValueError: If the configuration does not fit the model.
        """
        config = config or EngineConfig()
        platform = jax.default_backend()
        if str(model_dir) in BUILTIN_MODELS and not Path(model_dir).is_dir():
            model = BUILTIN_MODELS[str(model_dir)]
            dtype = Sizing.derive(model, config, platform).dtype
            weights, tokenizer = random_weights(model, dtype, config.seed), None
        else:
            model = load_model_config(model_dir)
            dtype = Sizing.derive(model, config, platform).dtype
            tokenizer = Tokenizer.from_pretrained(model_dir)
            weights = load_weights(model_dir, model, dtype)
        name = str(model_dir)
        return cls(
            model,
            weights,
            tokenizer,
            config,
            model_name=name,
            policy=policy,
            profile=profile,
            progress=progress,
        )

    def set_policy(self, policy: SharingPolicy) -> None:
        """Changes how requests and jobs share the steps, from the next step on."""
        with self.exclusive():
            self._scheduler.policy = policy

    # Adapters.

    def load_adapter(self, name: str, peft_dir: str | Path) -> AdapterInfo:
        """Loads a PEFT directory under `name`; requests in flight keep what they began with.

        Raises:
          AdapterFormatError: If the directory cannot be used with this base.
          CapacityError: If the rank is too large or every slot is in use.
          JobStateError: If a job is training an adapter of that name.
        """
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"`name` must be a non-empty text; got {name!r}.")
        adapter = load_peft_adapter(peft_dir, self.model)
        check_rank(adapter.config, self.config)
        with self.exclusive():
            self._refuse_in_training(name)
            slot = self._slots.reserve()
            self._runner.write_adapter(slot, adapter.config, adapter.arrays)
            info = AdapterInfo(name, 0, adapter.config)
            self._slots.publish(slot, info)
            self._jobs.adapters[name] = adapter
        return info

    def unload_adapter(self, name: str) -> None:
        """Forgets an adapter; requests in flight end with it.

        Raises:
          AdapterNotFoundError: If there is none of that name.
          JobStateError: If a job is training it.
        """
        with self.exclusive():
            self._refuse_in_training(name)
            self._slots.unload(name)
            self._jobs.adapters.pop(name, None)

    def _refuse_in_training(self, name: str) -> None:
        for job in self._jobs.alive:
            if job.config.adapter == name:
                raise JobStateError(f"Adapter {name!r} is being trained by job {job.job_id}.")

    def adapters(self) -> list[AdapterInfo]:
        """The loaded adapters."""
        with self.exclusive():
            return [self._slots.info(name) for name in self._slots.names()]

    def save_adapter(self, name: str, out_dir: str | Path) -> None:
        """Saves an adapter as a PEFT directory, float32 if it was trained here.

        Raises:
          AdapterNotFoundError: If there is none of that name, in training ones included.
        """
        with self.exclusive():
            adapter = self._jobs.adapters.get(name) or self._jobs.trained_weights(name)
        if adapter is None:
            known = ", ".join(self._jobs.adapters) or "none"
            raise AdapterNotFoundError(f"`name` must be loaded or trained; got {name!r}: {known}.")
        save_peft_adapter(out_dir, adapter, self.model, self._model_name)

    # Requests.

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        slo: SLO | str | None = None,
    ) -> RequestOutput:
        """Queues a request.

        Args:
          prompt: Text, token ids or chat messages.
          params: How to sample; None for the defaults.
          adapter: Name of a loaded adapter, or None for the base model.
          slo: Latency targets, or the name of a class of them ("interactive", "batch"); None for
            the configured class.

        Returns:
          The request's output, which fills while the engine runs.

        Raises:
          ValueError: If the prompt is empty or holds an unknown token, or the class is not known.
          CapacityError: If the prompt leaves no room for a token.
          AdapterNotFoundError: If the adapter is not loaded.
        """
        arrival_s = time.perf_counter()
        params = params or SamplingParams()
        targets = resolve_slo(slo, self.config.slo_class)
        tokens = encode_prompt(prompt, self.tokenizer, self.model.vocab_size)
        limit = self._runner.sizing.max_context_len
        if len(tokens) >= limit:
            raise CapacityError(
                f"`prompt` must be shorter than the context, {limit} tokens; got {len(tokens)}."
            )
        with self.exclusive():
            self._check_alive()
            slot, version = -1, 0
            if adapter is not None:
                slot = self._slots.slot_of(adapter)
                version = self._slots.info(adapter).version
            request = self._make_request(tokens, params, slot, arrival_s, targets)
            self._slots.hold(slot)
            output = RequestOutput(
                self._scheduler.add(request),
                self.tokenizer,
                adapter=adapter,
                adapter_version=version,
                max_context_len=limit,
            )
            self._outputs[request.request_id] = output
        self._notify()
        return output

    def _make_request(
        self, tokens: list[int], params: SamplingParams, slot: int, arrival_s: float, slo: SLO
    ) -> GenerationRequest:
        request_id, self._next_id = self._next_id, self._next_id + 1
        eos = set(self.model.eos_token_ids)
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            eos.add(self.tokenizer.eos_token_id)
        return GenerationRequest(
            request_id=request_id,
            prompt_token_ids=tuple(tokens),
            params=params,
            adapter_slot=slot,
            arrival_s=arrival_s,
            eos_token_ids=frozenset() if params.ignore_eos else frozenset(eos),
            seed=request_id if params.seed is None else params.seed,
            slo=slo,
        )

    def abort(self, output: RequestOutput) -> None:
        """Ends a request now; one that has ended already stays as it is."""
        with self.exclusive():
            if not output.finished.is_set():
                self._end_request(output)
                output.abort()

    def _end_request(self, output: RequestOutput) -> None:
        request = output.sequence.request
        self._scheduler.finish(output.sequence)
        self._slots.drop(request.adapter_slot)
        self._outputs.pop(request.request_id, None)
        self._jobs.start_queued()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | None | Sequence[str | None] = None,
        slo: SLO | str | None = None,
    ) -> list[GenerationOutput]:
        """Answers prompts and waits for all of them.

        Args:
          prompts: One prompt or several.
          params: For all, or one each.
          adapter: Name of a loaded adapter for all, or one each; None for the base model.
          slo: Latency targets of all, as in `add_request`.

        Returns:
          One output a prompt, in order.

        Raises:
          ValueError, CapacityError, AdapterNotFoundError: See `add_request`; nothing is started
            if any prompt cannot be used.
        """
        listed = [prompts] if is_single(prompts) else list(prompts)
        count = len(listed)
        all_params = [params] * count if not is_list(params) else list(params)  # type: ignore[arg-type]
        names = [adapter] * count if not is_list(adapter) else list(adapter)  # type: ignore[arg-type]
        for name, values in (("params", all_params), ("adapter", names)):
            if len(values) != count:
                raise ValueError(
                    f"`{name}` must be one or {count}, one a prompt; got {len(values)}."
                )
        outputs: list[RequestOutput] = []
        try:
            for prompt, one_params, name in zip(listed, all_params, names, strict=True):
                outputs.append(self.add_request(prompt, one_params, adapter=name, slo=slo))  # type: ignore[arg-type]
            for output in outputs:
                self.wait_for(output.finished, None, lambda: None)
        except BaseException:
            for output in outputs:
                self.abort(output)
            raise
        for output in outputs:
            if output.error is not None:
                raise EngineDeadError(f"The engine stopped: {output.error}") from output.error
        return [output.result() for output in outputs]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        slo: SLO | str | None = None,
    ) -> Iterator[StreamPiece]:
        """Answers one prompt piece by piece; closing the iterator aborts the request.

        Raises:
          ValueError, CapacityError, AdapterNotFoundError: See `add_request`; raised by the call.
        """
        return self._pieces(self.add_request(prompt, params, adapter=adapter, slo=slo))

    def _pieces(self, output: RequestOutput) -> Iterator[StreamPiece]:
        try:
            while True:
                piece = self._next_piece(output)
                if isinstance(piece, BaseException):
                    raise EngineDeadError(f"The engine stopped: {piece}") from piece
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            self.abort(output)

    def _next_piece(self, output: RequestOutput) -> StreamPiece | BaseException:
        while True:
            with contextlib.suppress(queue.Empty):
                return output.next_piece(timeout=0.05 if self._thread is not None else 0.0)
            if self._thread is None:
                self.step()

    # Jobs.

    def finetune(self, config: FinetuneConfig) -> Job:
        """Starts a finetuning job, or queues it behind `max_jobs` others.

        Raises:
          ValueError, DatasetError, CapacityError, AdapterFormatError, JobStateError: See
            `JobManager.create`; nothing has been started then.
        """
        with self.exclusive():
            self._check_alive()
            job = self._jobs.create(config)
        self._notify()
        return job

    def jobs(self) -> list[Job]:
        """Every job so far, in order."""
        return list(self._jobs.jobs)

    def end_job(self, job: Job, status: JobStatus, message: str) -> None:
        """Stops a job and frees what it owned; `Job.cancel` is the public way."""
        self._jobs.end(job, status, message)

    # The iteration.

    def _step(self) -> bool:
        return self._pipeline.step()

    def _take_token(
        self, sequence: scheduled.Sequence, token: int, logprob: TokenLogprobs | None, now_s: float
    ) -> None:
        output = self._outputs[sequence.request.request_id]
        if output.push(token, logprob, now_s) is not None:
            self._end_request(output)

    @property
    def on_step(self) -> Callable[[StepEvent], None] | None:
        """Called, if set, with each step once its results have been read; for benchmarks."""
        return self._pipeline.on_step

    @on_step.setter
    def on_step(self, call: Callable[[StepEvent], None] | None) -> None:
        self._pipeline.on_step = call

    def stats(self) -> EngineStats:
        """A copy of the counters."""
        with self.exclusive():
            return dataclasses.replace(
                self._pipeline.stats,
                num_running=len(self._scheduler.running),
                num_waiting=len(self._scheduler.waiting),
            )

    @property
    def num_programs(self) -> int:
        """Programs that were compiled at start; none are compiled later."""
        return len(self._runner.programs)

    @property
    def compile_s(self) -> float:
        """Seconds that compilation at start took."""
        return self._runner.programs.compile_s

    def check_integrity(self) -> None:
        """Asserts that pages and slots balance; for tests."""
        with self.exclusive():
            self._scheduler.check_integrity()
            self._slots.check_integrity()

    def _tell_dead(self, error: BaseException) -> None:
        for output in list(self._outputs.values()):
            output.fail(error)


def _latency(profile: LatencyProfile | None, sizing: Sizing) -> LatencyModel:
    if profile is None:
        return LatencyModel()
    model = LatencyModel.from_profile(profile)
    missing = model.missing(sizing.ladder.all_buckets(finetuning=sizing.can_finetune))
    if missing:
        raise ValueError(f"`profile` must cover every bucket; it cannot predict {missing[0]}.")
    return model


def _policy(config: EngineConfig) -> SharingPolicy:
    if config.policy == "co_serve":
        return CoServe(config.finetune_token_budget, config.step_time_budget_ms)
    return make_policy(config.policy, full_load=config.max_running)
