"""Runs a workload and finetuning jobs on an engine, and records all that happened.

One engine serves many runs, so that programs compile once and policies differ in nothing else. How
runs are arranged and judged is `policies`'.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flexjax.axes import PADDING
from flexjax.bench.harness import header as harness_header
from flexjax.config import FinetuneConfig, SamplingParams
from flexjax.engine.engine import Engine
from flexjax.engine.heap import settled_heap
from flexjax.engine.job import ENDED, Job
from flexjax.engine.output import RequestOutput
from flexjax.engine.pipeline import StepEvent
from flexjax.engine.sizing import Sizing
from flexjax.errors import CapacityError
from flexjax.metrics import RequestRecord, RunRecord, StepRecord, TrainRecord
from flexjax.scheduler.plan import BackwardTile
from flexjax.scheduler.policy import make_policy
from flexjax.slo import NO_SLO, SLO, resolve_slo
from flexjax.workload import Arrival, Workload

_FOREVER = 10**9
"""Optimizer steps of a job that is to outlive its run."""
_MAX_SLEEP_S = 0.002
_MAX_IDLE_S = 30.0


@dataclasses.dataclass(frozen=True)
class _Planned:
    """A request before it is due; `prompt` and `params` as `Engine.add_request` takes them."""

    arrival: Arrival
    prompt: list[int]
    params: SamplingParams
    slo: SLO


@dataclasses.dataclass(frozen=True)
class _Sent:
    """A request that was due; `output` is None if the engine refused it, for `reason`."""

    planned: _Planned
    due_s: float
    output: RequestOutput | None
    reason: str | None = None


def run_workload(
    engine: Engine,
    workload: Workload | None,
    *,
    policy: str,
    jobs: Sequence[FinetuneConfig] = (),
    targets: SLO = NO_SLO,
    rate: float | None = None,
    horizon_s: float | None = None,
    drain_s: float = 10.0,
    seed: int = 0,
    forget: bool = False,
    header: Mapping[str, Any] | None = None,
    on_step: Callable[[StepEvent], None] | None = None,
) -> RunRecord:
    """Runs a workload under a policy, in the calling thread, and leaves the engine idle.

    Every request is sent when it is due, with random tokens of its length, and generates exactly
    its output, end tokens or not. Jobs run from before the first request to the end: whatever
    their configurations say, they have no last step and a constant learning rate. Then they are
    cancelled, and nothing of them is published.

    Args:
      engine: Idle, and not driven by a thread.
      workload: Requests with lengths, in order; None for none, which needs a horizon.
      policy: As `make_policy` takes it.
      jobs: Finetuning jobs.
      targets: Latency targets of requests whose arrival names no class.
      rate: Offered requests per second, for the record; None where there is no one rate.
      horizon_s: Seconds in which requests are sent, and over which rates are averaged; later
        arrivals are left out. None to send all, and measure until all are answered.
      drain_s: With a horizon: seconds that answers may take after it. What is still unanswered
        then is "unfinished". Finetuning goes on meanwhile, but does not count.
      seed: Seed of the prompts.
      forget: Whether the latency model forgets first what it learnt since its fit.
      header: Fields of the record's header, as `harness.header` gives them and "model"; None for
        those of this process.
      on_step: Called with each step, as `Engine.on_step`.

    Returns:
      The record: requests, steps that inferred or trained, and optimizer steps.

    Raises:
      ValueError: If an argument breaks its rule, a request lacks a length, cannot fit the context
        or names an unknown adapter or class, or the engine is not idle; nothing has run then.
      JobStateError: If a job cannot start, or fails.
    """
    _check_times(workload, horizon_s, drain_s)
    _check_idle(engine)
    made = make_policy(policy, full_load=engine.config.max_running)
    planned = _plan(engine, workload, targets, horizon_s, seed)
    if header is None:
        header = {**harness_header(dataclasses.asdict(engine.config), seed), "model": "unnamed"}
    fields = {**header, "policy": policy, "rate": rate, "seed": seed}
    fields |= {
        "workload": workload.name if workload else "none",
        "workload_settings": dict(workload.settings) if workload else {},
        "targets": dataclasses.asdict(targets),
        "drain_s": drain_s,
    }
    engine.set_policy(made)
    if forget:
        latency = engine.latency
        latency.forget()
    run = _Run(engine, planned, horizon_s, drain_s, on_step)
    return run.record(fields, [_endless(config) for config in jobs])


def _check_times(workload: Workload | None, horizon_s: float | None, drain_s: float) -> None:
    if horizon_s is None and workload is None:
        raise ValueError("`horizon_s` must be a number > 0 without a workload; got None.")
    if horizon_s is not None and not (math.isfinite(horizon_s) and horizon_s > 0):
        raise ValueError(f"`horizon_s` must be a number > 0 or None; got {horizon_s!r}.")
    if not (math.isfinite(drain_s) and drain_s >= 0):
        raise ValueError(f"`drain_s` must be a number >= 0; got {drain_s!r}.")


def _check_idle(engine: Engine) -> None:
    stats = engine.stats()
    alive = sum(job.status not in ENDED for job in engine.jobs())
    if stats.num_running or stats.num_waiting or alive:
        raise ValueError(
            "`engine` must be idle; got "
            f"{stats.num_running + stats.num_waiting} requests and {alive} jobs."
        )


def _plan(
    engine: Engine,
    workload: Workload | None,
    targets: SLO,
    horizon_s: float | None,
    seed: int,
) -> list[_Planned]:
    """Checks and draws all requests, so that nothing of it costs time while they run."""
    sizing = Sizing.derive(engine.model, engine.config, jax.default_backend())
    known = {info.name for info in engine.adapters()}
    planned = []
    for index, arrival in enumerate(workload.arrivals if workload else ()):
        if horizon_s is not None and arrival.arrival_s >= horizon_s:
            break
        prompt_len, output_len = arrival.prompt_tokens, arrival.output_tokens
        if prompt_len is None or output_len is None:
            raise ValueError(f"`workload` must have lengths; request {index} is {arrival}.")
        if prompt_len + output_len > sizing.max_context_len:
            raise ValueError(
                f"`workload` must fit the context, {sizing.max_context_len} tokens; request "
                f"{index} has {prompt_len} + {output_len}."
            )
        if arrival.adapter is not None and arrival.adapter not in known:
            raise ValueError(
                f"`workload` must name loaded adapters, {sorted(known)}; request {index} names "
                f"{arrival.adapter!r}."
            )
        is_classed = arrival.slo_class is not None
        slo = resolve_slo(arrival.slo_class, arrival.slo_class or "") if is_classed else targets
        draws = np.random.default_rng([seed, index])
        prompt = draws.integers(0, engine.model.vocab_size, prompt_len).tolist()
        params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True, seed=index)
        planned.append(_Planned(arrival, prompt, params, slo))
    return planned


def _endless(config: FinetuneConfig) -> FinetuneConfig:
    return dataclasses.replace(
        config, max_steps=_FOREVER, schedule="constant", warmup_ratio=0.0, publish_every=0
    )


class _Run:
    """One run under way."""

    def __init__(
        self,
        engine: Engine,
        planned: Sequence[_Planned],
        horizon_s: float | None,
        drain_s: float,
        on_step: Callable[[StepEvent], None] | None,
    ):
        self._engine = engine
        self._on_step = on_step
        self._waiting = collections.deque(planned)
        self._horizon_s = horizon_s
        self._drain_s = drain_s
        self._sent: list[_Sent] = []
        self._alive: list[RequestOutput] = []
        self._steps: list[StepRecord] = []
        self._jobs: list[Job] = []
        self._begin_s = 0.0

    def record(self, header: Mapping[str, Any], jobs: Sequence[FinetuneConfig]) -> RunRecord:
        """Runs to the end, cleans up whatever happens, and returns the record."""
        try:
            for config in jobs:
                self._jobs.append(self._engine.finetune(config))
            with settled_heap():
                self._engine.on_step = self._take
                self._begin_s = time.perf_counter()
                self._drive()
                end_s = time.perf_counter()
        finally:
            self._clean_up()
        horizon_s = self._horizon_s
        return RunRecord(
            header=dict(header),
            begin_s=self._begin_s,
            end_s=end_s,
            requests=tuple(_request_record(i, sent) for i, sent in enumerate(self._sent)),
            steps=tuple(step for step in self._steps if step.end_s <= end_s),
            training=tuple(self._training(end_s)),
            measured_until_s=None if horizon_s is None else self._begin_s + horizon_s,
        )

    def _take(self, event: StepEvent) -> None:
        self._steps.append(_step_record(event))
        if self._on_step is not None:
            self._on_step(event)

    def _drive(self) -> None:
        """Sends requests and steps the engine until the run is over."""
        idle_since_s = None
        while True:
            now_s = time.perf_counter() - self._begin_s
            self._send_due(now_s)
            self._alive = [output for output in self._alive if not output.finished.is_set()]
            is_answered = not self._waiting and not self._alive
            if self._horizon_s is None and is_answered:
                return
            if self._horizon_s is not None and now_s >= self._horizon_s:
                if is_answered or now_s >= self._horizon_s + self._drain_s:
                    return
            for job in self._jobs:
                if job.status in ENDED:
                    job.wait()  # raises, for it can only have failed
            if self._engine.step():
                idle_since_s = None
                continue
            idle_since_s = self._rest(now_s, idle_since_s)

    def _send_due(self, now_s: float) -> None:
        while self._waiting and self._waiting[0].arrival.arrival_s <= now_s:
            planned = self._waiting.popleft()
            due_s = self._begin_s + planned.arrival.arrival_s
            try:
                output = self._engine.add_request(
                    planned.prompt,
                    planned.params,
                    adapter=planned.arrival.adapter,
                    slo=planned.slo,
                )
            except CapacityError as error:
                self._sent.append(_Sent(planned, due_s, None, str(error)))
                continue
            self._sent.append(_Sent(planned, due_s, output))
            self._alive.append(output)

    def _rest(self, now_s: float, idle_since_s: float | None) -> float | None:
        """Sleeps while the engine has nothing to do; never past what comes next."""
        nexts = [_MAX_SLEEP_S]
        if self._waiting:
            nexts.append(self._waiting[0].arrival.arrival_s - now_s)
        elif self._alive:
            idle_since_s = now_s if idle_since_s is None else idle_since_s
            if now_s - idle_since_s > _MAX_IDLE_S:
                raise RuntimeError(
                    f"the engine has been idle for {_MAX_IDLE_S:.0f} s with {len(self._alive)} "
                    "requests unanswered"
                )
        time.sleep(max(0.0, min(nexts)))
        return idle_since_s

    def _clean_up(self) -> None:
        """Ends what is left, so that the next run finds the engine idle."""
        engine = self._engine
        engine.on_step = None
        for job in self._jobs:
            if job.status not in ENDED:
                job.cancel()
        for output in self._alive:
            engine.abort(output)
        while engine.step():
            pass

    def _training(self, end_s: float) -> list[TrainRecord]:
        found = [
            TrainRecord(s.time_s, job.config.adapter, s.step, s.tokens, s.target_tokens, s.loss)
            for job in self._jobs
            for s in job.metrics().steps
            if s.time_s <= end_s
        ]
        return sorted(found, key=lambda record: record.time_s)


def _step_record(event: StepEvent) -> StepRecord:
    features, bucket = event.features, event.features.bucket
    return StepRecord(
        begin_s=event.begin_s,
        end_s=event.end_s,
        decode_rows=features.decode_rows,
        prefill_rows=features.prefill_rows,
        forward_rows=features.forward_rows,
        backward_rows=features.backward_rows,
        decode_bucket=bucket.decode,
        chunk_bucket=bucket.chunk,
        window_bucket=bucket.window,
        measured_ms=1e3 * (event.end_s - event.begin_s),
        host_ms=event.host_ms,
        predicted_ms=event.predicted_ms,
        backward_target_tokens=_worth(event.plan.tile) if event.plan.tile else 0.0,
        budget_ms=event.budget_ms,
        planned_s=event.planned_s,
    )


def _worth(tile: BackwardTile) -> float:
    """Loss-bearing tokens that a tile is worth, by the share of the backward pass's layers."""
    run = tile.group.run
    targets = tile.group.targets[tile.start : tile.start + tile.length]
    num_layers = min(tile.num_layers, tile.top - run.bottom)  # the lowest may reach further down
    return int((targets != PADDING).sum()) * num_layers / (run.num_layers - run.bottom)


def _request_record(number: int, sent: _Sent) -> RequestRecord:
    planned, output = sent.planned, sent.output
    status, reason, times_s = "refused", sent.reason, ()
    admitted_s, num_preemptions = None, 0
    if output is not None:
        found = output.result()
        if found.ttft_s is not None:
            first_s = output.sequence.request.arrival_s + found.ttft_s
            times_s = tuple(itertools.accumulate(found.itl_s, initial=first_s))
        status = "unfinished" if found.finish_reason in (None, "abort") else "finished"
        reason = None if status == "unfinished" else found.finish_reason
        admitted_s, num_preemptions = output.sequence.admitted_s, found.num_preemptions
    return RequestRecord(
        request_id=number,
        adapter=planned.arrival.adapter,
        slo_class=planned.arrival.slo_class,
        due_s=sent.due_s,
        prompt_tokens=len(planned.prompt),
        output_tokens=planned.params.max_tokens,
        token_times_s=times_s,
        status=status,
        finish_reason=reason,
        num_preemptions=num_preemptions,
        admitted_s=admitted_s,
        ttft_target_ms=planned.slo.ttft_ms,
        tpot_target_ms=planned.slo.tpot_ms,
    )
