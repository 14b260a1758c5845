"""An engine without a device: the real scheduler under a virtual clock.

Owns the loop: it plans and launches a step while the one before runs, and reads results where the
engine does. Every decision is the scheduler's; every duration comes from `DeviceTimes` and
`HostTimes`. There are no tokens, only their counts.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

from flexjax.config import SamplingParams
from flexjax.metrics.records import RequestRecord, TrainRecord
from flexjax.metrics.run import RunRecord
from flexjax.request import GenerationRequest
from flexjax.scheduler.features import features_of
from flexjax.scheduler.latency_model import LatencyModel
from flexjax.scheduler.latency_profile import LatencyProfile
from flexjax.scheduler.plan import StepPlan
from flexjax.scheduler.policy import SharingPolicy, make_policy
from flexjax.scheduler.sequence import SequenceStatus
from flexjax.scheduler.training import TrainingRun
from flexjax.simulator.recording import Flight, LiveRequest, Recording, tile_target_tokens
from flexjax.simulator.setup import (
    DeviceTimes,
    SimulatedEngine,
    SimulatedJob,
    SimulationOptions,
    require,
    require_number,
)
from flexjax.slo import SLO
from flexjax.workload.arrivals import Arrival


class Simulator:
    """One simulated engine.

    Attributes:
      engine: Its sizes.
      scheduler: The real one.
      latency: What the scheduler predicts with; corrected by each step, as in the engine.
      recording: What happened.
      now_s: The host's clock.
    """

    def __init__(
        self,
        profile: LatencyProfile,
        engine: SimulatedEngine,
        policy: SharingPolicy | str = "co_serve",
        jobs: Sequence[SimulatedJob] = (),
        options: SimulationOptions | None = None,
    ):
        """Starts an engine at time 0, with its jobs and without requests.

        Args:
          profile: Where the scheduler's latency model starts.
          engine: Sizes.
          policy: How requests and jobs share the steps, or its name.
          jobs: Finetuning jobs; at most `max_jobs` run at once, the others wait.
          options: None for the defaults.

        Raises:
          ValueError: If the policy is not known, a job does not fit the engine, or the profile
            does not cover the engine's buckets.
        """
        options = options or SimulationOptions()
        if isinstance(policy, str):
            policy = make_policy(policy, full_load=engine.max_running)
        require(not jobs or engine.max_jobs > 0, "max_jobs", "at least 1 to finetune", 0)
        self.engine = engine
        self.latency = LatencyModel.from_profile(profile, quantile=options.quantile)
        missing = self.latency.missing(engine.ladder.all_buckets(finetuning=engine.max_jobs > 0))
        rule = "of measured steps like all of the engine's"
        require(not missing, "profile", rule, f"none like {missing[:1]}")
        self.scheduler = engine.make_scheduler(policy, self.latency)
        self.recording = Recording(options.record_every, options.host.total_ms)
        self.now_s = 0.0
        self._options = options
        self._device = options.device or DeviceTimes(profile)
        self._device_free_s = 0.0
        self._last_done_s = 0.0
        self._last_arrival_s = 0.0
        self._in_flight: Flight | None = None
        self._upcoming: collections.deque[LiveRequest] = collections.deque()
        self._live: dict[int, LiveRequest] = {}
        self._slots: dict[str, int] = {}
        self._num_job_slots = min(engine.max_jobs, len(jobs))
        first = engine.sizes.num_slots - self._num_job_slots
        rule = f"at least {self._num_job_slots}, one a running job"
        require(first >= 0, "num_slots", rule, engine.sizes.num_slots)
        runs = [job.make_run(i, -1, engine) for i, job in enumerate(jobs)]
        self._queued: collections.deque[TrainingRun] = collections.deque(runs)
        self._free_job_slots = list(range(first, engine.sizes.num_slots))
        self._results_due: dict[TrainingRun, int] = {}
        self._start_jobs()

    # Requests and jobs.

    @property
    def num_alive(self) -> int:
        """Requests that have been submitted and have not ended."""
        return len(self._live) + len(self._upcoming)

    def submit(self, request_id: int, arrival: Arrival) -> None:
        """Sends a request; it is seen by the first iteration that begins after its arrival.

        A prompt that leaves no room for a token is refused, as the engine refuses it.

        Raises:
          ValueError: If a length is missing, the request arrives before one that was submitted,
            its class is unknown, or there are more adapters than slots.
        """
        lengths = (arrival.prompt_tokens, arrival.output_tokens)
        require(None not in lengths, "arrival", "of known lengths", arrival)
        prompt, output = lengths
        assert prompt is not None and output is not None
        rule = f"at least {self._last_arrival_s}, the last one's"
        require(arrival.arrival_s >= self._last_arrival_s, "arrival_s", rule, arrival.arrival_s)
        asked = self._options.max_output_tokens or output
        request = LiveRequest(request_id, arrival, self._slo_of(arrival), asked)
        self._slot_of(arrival.adapter)
        self._last_arrival_s = arrival.arrival_s
        request.stops_at = max(0, min(output, asked, self.engine.max_context_len - prompt))
        self._upcoming.append(request)

    def _slo_of(self, arrival: Arrival) -> SLO:
        name, classes = arrival.slo_class, self._options.slo_classes
        if name is None:
            return self._options.slo
        require(name in classes, "slo_class", f"one of {', '.join(classes)}", name)
        return classes[name]

    def _slot_of(self, adapter: str | None) -> int:
        if adapter is None:
            return -1
        if adapter not in self._slots:
            limit = self.engine.sizes.num_slots - self._num_job_slots
            rule = f"at most {limit} names, one a free slot"
            require(len(self._slots) < limit, "adapter", rule, (*self._slots, adapter))
            self._slots[adapter] = len(self._slots)
        return self._slots[adapter]

    def _take_arrivals(self) -> None:
        """Tells the scheduler of the requests that have arrived by now."""
        upcoming, now_s = self._upcoming, self.now_s
        while upcoming and upcoming[0].arrival.arrival_s <= now_s:
            live = upcoming.popleft()
            arrival = live.arrival
            assert arrival.prompt_tokens is not None
            if not live.stops_at:
                refused = live.record("refused", "the prompt leaves no room for a token")
                self.recording.requests.append(refused)
                continue
            request = GenerationRequest(
                request_id=live.request_id,
                prompt_token_ids=(0,) * arrival.prompt_tokens,
                params=SamplingParams(max_tokens=live.asked_tokens),
                adapter_slot=self._slot_of(arrival.adapter),
                arrival_s=arrival.arrival_s,
                eos_token_ids=frozenset(),
                seed=0,
                slo=live.slo,
            )
            live.sequence = self.scheduler.add(request)
            self._live[live.request_id] = live

    def _start_jobs(self) -> None:
        while self._queued and self._free_job_slots:
            run = self._queued.popleft()
            run.slot = self._free_job_slots.pop()
            self._results_due[run] = 0
            self.scheduler.add_run(run)

    # The clock.

    def run(self, measure_s: float | None = None, drain_s: float = math.inf) -> None:
        """Runs from now on.

        Args:
          measure_s: Time up to which work goes on whatever happens, and totals are counted; None
            to go on until requests and jobs have ended.
          drain_s: Seconds after `measure_s` in which requests that are left may end.

        Raises:
          ValueError: If a time is not a number of at least 0, or `measure_s` is 0.
        """
        if drain_s != math.inf:
            require_number("drain_s", drain_s)
        if measure_s is None:
            self.advance(math.inf)
            return
        require_number("measure_s", measure_s, is_positive=True)
        self.recording.totals.until_s = measure_s
        self.advance(measure_s)
        self.now_s = max(self.now_s, measure_s)
        while self.num_alive and self.now_s < measure_s + drain_s:
            if not self.step() and not self._skip_to_arrival(measure_s + drain_s):
                return

    def advance(self, until_s: float) -> None:
        """Runs every iteration that begins before a time, or until there is nothing to do."""
        while self.now_s < until_s:
            if not self.step() and not self._skip_to_arrival(until_s):
                return

    def _skip_to_arrival(self, until_s: float) -> bool:
        """Moves the clock to the next arrival, as an idle engine is woken by it."""
        if not self._upcoming:
            # Jobs may be left: some policies never let them run.
            assert not self.scheduler.has_requests, "the scheduler has requests and plans nothing"
            return False
        due_s = self._upcoming[0].arrival.arrival_s
        if due_s < until_s:
            self.now_s = max(self.now_s, due_s)
        return due_s < until_s

    # The iteration.

    def step(self) -> bool:
        """Runs one iteration: plans and launches a step, reads the one before it.

        Returns:
          Whether there was anything to do.
        """
        self._take_arrivals()
        previous = self._in_flight
        plan = self.scheduler.schedule(self.now_s, self._expected_end_s())
        self._in_flight = None if plan.is_empty else self._launch(plan)
        if previous is not None:
            self._read(previous)
        return self._in_flight is not None or previous is not None

    def _expected_end_s(self) -> float | None:
        flight = self._in_flight
        if flight is None:
            return None
        began_s = max(flight.launched_s, self._last_done_s)
        return began_s + self.latency.predict(flight.features) / 1e3

    def _launch(self, plan: StepPlan) -> Flight:
        host, ladder, tile = self._options.host, self.engine.ladder, plan.tile
        self.now_s += host.plan_ms / 1e3
        launched_s = self.now_s
        bucket, chunk_rows = None, plan.num_chunk_rows
        if plan.decode or chunk_rows or tile:
            rows, layers = (tile.length, tile.num_layers) if tile else (0, None)
            bucket = ladder.bucket(len(plan.decode), chunk_rows, rows, layers)
        features = features_of(plan, bucket, decode_kv_tokens=plan.decode_kv_tokens, ladder=ladder)
        for step in (*plan.optimizer_steps, *plan.eval_results):
            self._results_due[step.run] += 1
        self.now_s += host.launch_ms / 1e3
        begin_s = max(self.now_s, self._device_free_s)
        has_work = bucket is not None or plan.losses or plan.optimizer_steps
        ms = self._device.ms(features) if has_work else 0.0
        tail_ms = min(ms, self._device.tail_ms(features)) if bucket is not None else ms
        self._device_free_s = free_s = begin_s + ms / 1e3
        end_s = free_s - tail_ms / 1e3
        worth = tile_target_tokens(tile)
        return Flight(plan, bucket, features, launched_s, begin_s, end_s, free_s, worth)

    def _read(self, flight: Flight) -> None:
        """Waits for a step and takes in its results.

        As in the engine, a step ends for the host with its rows and tokens. Optimizer steps that
        follow it delay the next step, which is therefore seen to take longer; and the host waits
        for them where it reads their losses.
        """
        now_s = self.now_s = max(self.now_s, flight.end_s)
        begin_s, totals = max(flight.launched_s, self._last_done_s), self.recording.totals
        if flight.bucket is not None:
            if self.recording.is_due():
                predicted_ms = self.latency.predict(flight.features)
                self.recording.add_step(flight, begin_s, now_s, predicted_ms)
            self.latency.observe(flight.features, 1e3 * (now_s - begin_s))
            if now_s <= totals.until_s:
                totals.add(flight.features, flight.free_s - flight.begin_s, flight.target_tokens)
        self._last_done_s = now_s
        if flight.plan.samples:
            self._take_tokens(flight.plan, now_s)
        if flight.plan.optimizer_steps or flight.plan.eval_results:
            self.now_s = max(now_s, flight.free_s)
        self._take_results(flight.plan, now_s)
        self.now_s += self._options.host.read_ms / 1e3

    def _take_tokens(self, plan: StepPlan, now_s: float) -> None:
        record_token, live_requests = self.scheduler.record_token, self._live
        count = 0
        for sequence in plan.samples:
            if sequence.status is SequenceStatus.FINISHED:
                continue  # ended by the token before; this row was launched ahead of it
            record_token(sequence, 0, now_s)
            count += 1
            live = live_requests[sequence.request.request_id]
            live.times_s.append(now_s)
            if len(live.times_s) == live.stops_at:
                self.scheduler.finish(sequence)
                del live_requests[live.request_id]
                is_full = len(sequence.tokens) == sequence.max_tokens
                record = live.record("finished", "length" if is_full else "stop")
                self.recording.requests.append(record)
        if now_s <= self.recording.totals.until_s:
            self.recording.totals.output_tokens += count

    def _take_results(self, plan: StepPlan, now_s: float) -> None:
        """Takes in optimizer steps and evaluations, ends jobs that are done."""
        for step in plan.optimizer_steps:
            record = TrainRecord(
                time_s=now_s,
                job=step.run.config.adapter,
                step=step.step + 1,
                tokens=step.num_tokens,
                target_tokens=step.num_targets,
                loss=math.nan,
            )
            self.recording.training.append(record)
        for run in {result.run for result in (*plan.optimizer_steps, *plan.eval_results)}:
            results = (*plan.optimizer_steps, *plan.eval_results)
            self._results_due[run] -= sum(result.run is run for result in results)
            if run.is_exhausted and not self._results_due[run]:
                del self._results_due[run]
                self.scheduler.remove_run(run)
                self._free_job_slots.append(run.slot)
                self._start_jobs()

    # Records.

    def request_records(self) -> list[RequestRecord]:
        """All requests that were due by now, by number; those that have not ended included."""
        alive = (*self._live.values(), *self._upcoming)
        records = [*self.recording.requests, *(live.record("unfinished", None) for live in alive)]
        due = (record for record in records if record.due_s <= self.now_s)
        return sorted(due, key=lambda record: record.request_id)

    def run_record(self, header: Mapping[str, Any]) -> RunRecord:
        """The run so far, as `summarize_run` reads it.

        Args:
          header: See `RunRecord`.

        Raises:
          ValueError: If the clock has not moved, or the header lacks a key.
        """
        until_s = self.recording.totals.until_s
        return RunRecord(
            header=dict(header),
            begin_s=0.0,
            end_s=self.now_s,
            requests=tuple(self.request_records()),
            steps=tuple(self.recording.steps),
            training=tuple(self.recording.training),
            measured_until_s=None if until_s == math.inf else until_s,
        )
