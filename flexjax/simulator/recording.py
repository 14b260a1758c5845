"""What a simulated engine writes down: the records of a run, and totals that need no records."""

from __future__ import annotations

import dataclasses
import math

from flexjax.layout import Bucket
from flexjax.metrics.records import RequestRecord, StepRecord, TrainRecord
from flexjax.scheduler.features import StepFeatures
from flexjax.scheduler.plan import BackwardTile, StepPlan
from flexjax.scheduler.sequence import Sequence
from flexjax.simulator.setup import require_int
from flexjax.slo import SLO
from flexjax.workload.arrivals import Arrival


@dataclasses.dataclass(slots=True)
class Totals:
    """Work of the steps that ended up to a time, whether or not steps are recorded.

    Attributes:
      until_s: The time.
      num_steps: Steps.
      num_mixed: Of those, steps with rows of requests and of finetuning.
      busy_s: Seconds that the device worked.
      decode_rows: Rows of running requests, rows of requests that had ended included.
      prefill_rows: Rows of prompts, recomputed ones included.
      forward_rows: Finetuning rows of the forward pass.
      backward_rows: Rows of backward tiles.
      output_tokens: Tokens that requests got.
      backward_target_tokens: Loss-bearing tokens that the tiles are worth, as in `StepRecord`.
    """

    until_s: float = math.inf
    num_steps: int = 0
    num_mixed: int = 0
    busy_s: float = 0.0
    decode_rows: int = 0
    prefill_rows: int = 0
    forward_rows: int = 0
    backward_rows: int = 0
    output_tokens: int = 0
    backward_target_tokens: float = 0.0

    def add(self, features: StepFeatures, busy_s: float, target_tokens: float) -> None:
        """Counts a step."""
        self.num_steps += 1
        self.busy_s += busy_s
        self.decode_rows += features.decode_rows
        self.prefill_rows += features.prefill_rows
        self.forward_rows += features.forward_rows
        self.backward_rows += features.backward_rows
        self.backward_target_tokens += target_tokens
        has_requests = features.decode_rows or features.prefill_rows
        has_finetuning = features.forward_rows or features.backward_rows
        self.num_mixed += bool(has_requests and has_finetuning)


@dataclasses.dataclass(slots=True, eq=False)
class Flight:
    """A step between its launch and the reading of its results.

    Attributes:
      plan: What it holds.
      bucket: Shape that it runs in; None without rows.
      features: What its time depends on.
      launched_s: Clock when the host began to launch it.
      begin_s: Clock when the device began.
      end_s: Clock when its tokens were there.
      free_s: Clock when the device was done with it, optimizer steps included.
      target_tokens: Loss-bearing tokens that its tile is worth.
    """

    plan: StepPlan
    bucket: Bucket | None
    features: StepFeatures
    launched_s: float
    begin_s: float
    end_s: float
    free_s: float
    target_tokens: float


@dataclasses.dataclass(slots=True, eq=False)
class LiveRequest:
    """A request from its submission to its end.

    Attributes:
      request_id: Number of the request.
      arrival: When it is due, and its lengths.
      slo: Its targets.
      asked_tokens: Output tokens that it asks for.
      stops_at: Output tokens after which it ends.
      sequence: Its state in the scheduler; None until the host has seen it.
      times_s: When each token was there.
    """

    request_id: int
    arrival: Arrival
    slo: SLO
    asked_tokens: int
    stops_at: int = 0
    sequence: Sequence | None = None
    times_s: list[float] = dataclasses.field(default_factory=list)

    def record(self, status: str, finish_reason: str | None) -> RequestRecord:
        """The request as a run keeps it."""
        arrival, sequence = self.arrival, self.sequence
        assert arrival.prompt_tokens is not None
        return RequestRecord(
            request_id=self.request_id,
            adapter=arrival.adapter,
            slo_class=arrival.slo_class,
            due_s=arrival.arrival_s,
            prompt_tokens=arrival.prompt_tokens,
            output_tokens=self.asked_tokens,
            token_times_s=tuple(self.times_s),
            status=status,
            finish_reason=finish_reason,
            num_preemptions=sequence.num_preemptions if sequence else 0,
            admitted_s=sequence.admitted_s if sequence else None,
            ttft_target_ms=self.slo.ttft_ms,
            tpot_target_ms=self.slo.tpot_ms,
        )


class Recording:
    """The records of one simulated engine.

    Attributes:
      requests: Requests that have ended, in that order.
      steps: Every `every`-th step.
      training: Optimizer steps.
      totals: Of all steps.
    """

    def __init__(self, every: int, host_ms: float):
        """Starts without records.

        Args:
          every: Each how manieth step is recorded; 0 for none.
          host_ms: The host's milliseconds for a step.

        Raises:
          ValueError: If `every` is not an integer of at least 0.
        """
        require_int("record_every", every, 0)
        self.requests: list[RequestRecord] = []
        self.steps: list[StepRecord] = []
        self.training: list[TrainRecord] = []
        self.totals = Totals()
        self._every = every
        self._host_ms = host_ms
        self._num_steps = 0

    def is_due(self) -> bool:
        """Counts a step with rows; returns whether it is one of those that are recorded."""
        self._num_steps += 1
        return self._every > 0 and (self._num_steps - 1) % self._every == 0

    def add_step(self, flight: Flight, begin_s: float, end_s: float, predicted_ms: float) -> None:
        """Records a step as the host saw it."""
        features, bucket = flight.features, flight.features.bucket
        self.steps.append(
            StepRecord(
                begin_s=begin_s,
                end_s=end_s,
                decode_rows=features.decode_rows,
                prefill_rows=features.prefill_rows,
                forward_rows=features.forward_rows,
                backward_rows=features.backward_rows,
                decode_bucket=bucket.decode,
                chunk_bucket=bucket.chunk,
                window_bucket=bucket.window,
                measured_ms=1e3 * (end_s - begin_s),
                host_ms=self._host_ms,
                predicted_ms=predicted_ms,
                backward_target_tokens=flight.target_tokens,
            )
        )


def tile_target_tokens(tile: BackwardTile | None) -> float:
    """Loss-bearing tokens of a tile times its share of the layers that backward goes through."""
    if tile is None:
        return 0.0
    run = tile.group.run
    num_targets = tile.group.num_targets(tile.start, tile.length)
    layers = tile.top - max(tile.top - tile.num_layers, run.bottom)
    return num_targets * layers / (run.num_layers - run.bottom)
