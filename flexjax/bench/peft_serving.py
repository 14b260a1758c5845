"""A server and trainer of LoRA adapters as a competent user of PEFT and transformers writes it.

Requests queue; the next batch of those that wait begins when the last is answered. PEFT does one
thing at a time, so with jobs a generated batch and a training pass take turns, and jobs take turns
among themselves. Runs are recorded as FlexJAX's are, one step record a forward (or forward and
backward) pass, and judged by the same code. Needs torch, as `peft_model` does.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from flexjax.bench.peft_model import DecodePass, PeftJob, PeftModel
from flexjax.metrics import RequestRecord, RunRecord, StepRecord
from flexjax.slo import SLO
from flexjax.workload import Arrival

_MAX_SLEEP_S = 0.002


@dataclasses.dataclass(frozen=True)
class PeftRequest:
    """A request before it is due; `prompt` is token ids."""

    arrival: Arrival
    prompt: Sequence[int]


@dataclasses.dataclass(eq=False)
class _Served:
    """A request that was due."""

    request: PeftRequest
    due_s: float
    admitted_s: float | None = None
    is_refused: bool = False
    times_s: list[float] = dataclasses.field(default_factory=list)

    @property
    def is_answered(self) -> bool:
        return len(self.times_s) == self.request.arrival.output_tokens


def serve(
    model: PeftModel,
    requests: Sequence[PeftRequest],
    *,
    form: str,
    max_batch: int,
    header: Mapping[str, Any],
    jobs: Sequence[PeftJob] = (),
    targets: SLO,
    horizon_s: float | None = None,
    drain_s: float = 10.0,
    patience_s: float = math.inf,
) -> RunRecord:
    """Answers requests when they are due and runs jobs, as `serving.run_workload` does.

    Args:
      model: Holds the adapters of requests and jobs.
      requests: In order of arrival, with lengths and adapters.
      form: One of `FORMS`.
      max_batch: Requests of a batch at most.
      header: Of the record.
      jobs: Trained from before the first request to the end.
      targets: Latency targets, for the record: the server knows none.
      horizon_s: Seconds in which requests are sent, and over which rates are averaged; None to
        send all, and measure until all are answered.
      drain_s: With a horizon: seconds that answers may take after it.
      patience_s: Requests that have waited for longer are refused, as Loquetier does.

    Raises:
      ValueError: If a request lacks a length or an adapter, or there is neither a request nor a
        horizon.
    """
    for index, request in enumerate(requests):
        arrival = request.arrival
        if arrival.output_tokens is None or arrival.adapter is None:
            raise ValueError(
                f"`requests` must have output lengths and adapters; request {index} is {arrival}."
            )
    if not requests and horizon_s is None:
        raise ValueError("`horizon_s` must be given where there are no requests; got None.")
    sent = [r for r in requests if horizon_s is None or r.arrival.arrival_s < horizon_s]
    server = _Server(model, sent, form, max_batch, jobs, horizon_s, drain_s, patience_s)
    return server.record(header, targets)


class _Server:
    """One run under way."""

    def __init__(
        self,
        model: PeftModel,
        requests: Sequence[PeftRequest],
        form: str,
        max_batch: int,
        jobs: Sequence[PeftJob],
        horizon_s: float | None,
        drain_s: float,
        patience_s: float,
    ):
        self._model = model
        self._form = form
        self._max_batch = max_batch
        self._jobs = collections.deque(jobs)
        self._horizon_s = horizon_s
        self._stop_s = math.inf if horizon_s is None else horizon_s + drain_s
        self._patience_s = patience_s
        self._steps: list[StepRecord] = []
        self._begin_s = time.perf_counter()
        self._all = [_Served(r, self._begin_s + r.arrival.arrival_s) for r in requests]
        self._future = collections.deque(self._all)
        self._waiting: list[_Served] = []

    def record(self, header: Mapping[str, Any], targets: SLO) -> RunRecord:
        self._drive()
        end_s, horizon_s = time.perf_counter(), self._horizon_s
        training = [record for job in self._jobs for record in job.records]
        return RunRecord(
            header=dict(header),
            begin_s=self._begin_s,
            end_s=end_s,
            requests=tuple(_record(i, served, targets) for i, served in enumerate(self._all)),
            steps=tuple(self._steps),
            training=tuple(sorted(training, key=lambda record: record.time_s)),
            measured_until_s=None if horizon_s is None else self._begin_s + horizon_s,
        )

    def _now_s(self) -> float:
        return time.perf_counter() - self._begin_s

    def _drive(self) -> None:
        is_turn_of_job = False
        while not self._is_over():
            if self._waiting and not (is_turn_of_job and self._jobs):
                self._answer_batch()
                is_turn_of_job = True
            elif self._jobs:
                self._steps.append(self._jobs[0].run_pass())
                self._jobs.rotate(-1)
                is_turn_of_job = False
            else:
                is_turn_of_job = False
                next_s = self._future[0].due_s if self._future else math.inf
                time.sleep(max(0.0, min(_MAX_SLEEP_S, next_s - time.perf_counter())))

    def _is_over(self) -> bool:
        """Takes in what is due first, and refuses what has waited too long."""
        now_s = self._now_s()
        while self._future and self._future[0].due_s - self._begin_s <= now_s:
            self._waiting.append(self._future.popleft())
        oldest_s = self._begin_s + now_s - self._patience_s
        for served in self._waiting:
            served.is_refused = served.due_s < oldest_s
        self._waiting = [served for served in self._waiting if not served.is_refused]
        is_answered = not self._future and not self._waiting
        if self._horizon_s is None:
            return is_answered
        return now_s >= self._horizon_s and (is_answered or now_s >= self._stop_s)

    def _answer_batch(self) -> None:
        """Answers those that wait longest, of one adapter where the form holds one."""
        first = self._waiting[0].request.arrival.adapter
        batch = [
            served
            for served in self._waiting
            if self._form == "mixed" or served.request.arrival.adapter == first
        ][: self._max_batch]
        self._waiting = [served for served in self._waiting if served not in batch]
        begin_s = time.perf_counter()
        for served in batch:
            served.admitted_s = begin_s
        prompts = [served.request.prompt for served in batch]
        passes = self._model.generate(
            prompts,
            [served.request.arrival.output_tokens or 0 for served in batch],
            [served.request.arrival.adapter or "" for served in batch],
            self._form,
        )
        for index, found in enumerate(passes):
            end_s = time.perf_counter()
            for row in found.rows:
                batch[row].times_s.append(end_s)
            self._steps.append(_step_record(begin_s, end_s, prompts if index == 0 else None, found))
            begin_s = end_s
            if end_s - self._begin_s >= self._stop_s:
                return


def _step_record(
    begin_s: float, end_s: float, prompts: Sequence[Sequence[int]] | None, found: DecodePass
) -> StepRecord:
    """A prefill pass, with prompts, or a decode pass."""
    num_rows = len(found.rows)
    return StepRecord(
        begin_s=begin_s,
        end_s=end_s,
        decode_rows=0 if prompts else num_rows,
        prefill_rows=sum(map(len, prompts)) if prompts else 0,
        forward_rows=0,
        backward_rows=0,
        decode_bucket=0 if prompts else num_rows,
        chunk_bucket=num_rows * max(map(len, prompts)) if prompts else 0,
        window_bucket=0,
        measured_ms=1e3 * (end_s - begin_s),
        host_ms=0.0,
    )


def _record(number: int, served: _Served, targets: SLO) -> RequestRecord:
    arrival = served.request.arrival
    status, reason = "unfinished", None
    if served.is_answered:
        status, reason = "finished", "length"
    elif served.is_refused:
        status, reason = "refused", "waited too long"
    return RequestRecord(
        request_id=number,
        adapter=arrival.adapter,
        slo_class=arrival.slo_class,
        due_s=served.due_s,
        prompt_tokens=len(served.request.prompt),
        output_tokens=arrival.output_tokens or 0,
        token_times_s=tuple(served.times_s),
        status=status,
        finish_reason=reason,
        admitted_s=served.admitted_s,
        ttft_target_ms=targets.ttft_ms,
        tpot_target_ms=targets.tpot_ms,
    )
