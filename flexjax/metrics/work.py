"""What finetuning got and what the device did, from the steps of a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from flexjax.metrics.records import StepRecord
from flexjax.metrics.run import RunRecord
from flexjax.metrics.summary import Distribution, percentile


@dataclasses.dataclass(frozen=True)
class FinetuningSummary:
    """What finetuning got, per second of the measured window. Padding counts nowhere.

    Attributes:
      num_steps: Optimizer steps done in the window.
      target_tokens_per_s: Loss-bearing tokens of those steps. A step counts where it ends; work on
        a step that is not done counts nothing.
      tokens_per_s: All tokens of those steps.
      backward_target_tokens_per_s: Loss-bearing tokens of finished backward work, for windows that
        hold few optimizer steps. None without step records.
      forward_tokens_per_s: Rows of the forward pass, the count of the FlexLLM paper. None without
        step records.
      padding_share: Padding over all finetuning rows of steps, forward and backward. None where
        there were none.
    """

    num_steps: int
    target_tokens_per_s: float
    tokens_per_s: float
    backward_target_tokens_per_s: float | None
    forward_tokens_per_s: float | None
    padding_share: float | None

    @property
    def throughput(self) -> float:
        """Loss-bearing tokens per second, the figure to compare by.

        Of finished backward work, since a window holds whole optimizer steps only by chance; of
        finished optimizer steps where that was not recorded.
        """
        return self.backward_target_tokens_per_s or self.target_tokens_per_s


@dataclasses.dataclass(frozen=True)
class ModelError:
    """How well the latency model foresaw steps; error = measured / predicted - 1.

    Attributes:
      count: Steps that had a prediction.
      median_abs: Median of the error's absolute value.
      p95_under: 95th percentile of max(0, error): by how much steps took longer than foreseen.
      bias: Median error; above 0 where steps take longer than foreseen.
    """

    count: int
    median_abs: float
    p95_under: float
    bias: float


@dataclasses.dataclass(frozen=True)
class DeviceSummary:
    """What the device and the host did in the measured window.

    Attributes:
      num_steps: Steps that ended in the window.
      num_mixed: Those with rows of requests and of finetuning.
      idle_share: Share of the window in which no step ran.
      padding_share: Padding over all rows of those steps; None where there were none.
      step_ms: Milliseconds of a step.
      host_ms: The host's milliseconds for a step.
      model_error: Of the latency model, or None without predictions.
    """

    num_steps: int
    num_mixed: int
    idle_share: float
    padding_share: float | None
    step_ms: Distribution
    host_ms: Distribution
    model_error: ModelError | None


def summarize_finetuning(run: RunRecord, begin_s: float, end_s: float) -> FinetuningSummary:
    """Computes what finetuning got between two times of a run's clock."""
    training = [record for record in run.training if begin_s <= record.time_s <= end_s]
    steps = _ended(run.steps, begin_s, end_s)
    duration_s = end_s - begin_s
    padding = math.fsum(s.finetuning_padding_rows for s in steps)
    rows = sum(s.forward_rows + s.backward_rows for s in steps)
    worth = math.fsum(s.backward_target_tokens for s in steps) / duration_s
    forward = sum(s.forward_rows for s in steps) / duration_s
    return FinetuningSummary(
        num_steps=len(training),
        target_tokens_per_s=sum(r.target_tokens for r in training) / duration_s,
        tokens_per_s=sum(r.tokens for r in training) / duration_s,
        backward_target_tokens_per_s=worth if run.steps else None,
        forward_tokens_per_s=forward if run.steps else None,
        padding_share=padding / (padding + rows) if padding + rows else None,
    )


def _ended(steps: Sequence[StepRecord], begin_s: float, end_s: float) -> list[StepRecord]:
    return [step for step in steps if begin_s <= step.end_s <= end_s]


def summarize_device(
    all_steps: Sequence[StepRecord], begin_s: float, end_s: float
) -> DeviceSummary | None:
    """Computes what the device did between two times; None where no step ended."""
    steps = _ended(all_steps, begin_s, end_s)
    step_ms = Distribution.of(s.measured_ms for s in steps)
    host_ms = Distribution.of(s.host_ms for s in steps)
    if step_ms is None or host_ms is None:
        return None
    padding, rows = sum(s.padding_rows for s in steps), sum(s.rows for s in steps)
    mixed = [
        s for s in steps if s.decode_rows + s.prefill_rows and s.forward_rows + s.backward_rows
    ]
    busy_s = _covered_s(all_steps, begin_s, end_s)
    return DeviceSummary(
        num_steps=len(steps),
        num_mixed=len(mixed),
        idle_share=1 - busy_s / (end_s - begin_s),
        padding_share=padding / (padding + rows) if padding + rows else None,
        step_ms=step_ms,
        host_ms=host_ms,
        model_error=_model_error(steps),
    )


def _covered_s(steps: Sequence[StepRecord], begin_s: float, end_s: float) -> float:
    """Seconds of the window in which at least one step ran."""
    covered, reached = [], begin_s
    for step in sorted(steps, key=lambda s: s.begin_s):
        covered.append(max(0.0, min(step.end_s, end_s) - max(step.begin_s, reached)))
        reached = max(reached, step.end_s)
    return math.fsum(covered)


def _model_error(steps: Sequence[StepRecord]) -> ModelError | None:
    errors = [s.measured_ms / s.predicted_ms - 1 for s in steps if s.predicted_ms]
    if not errors:
        return None
    return ModelError(
        count=len(errors),
        median_abs=percentile([abs(error) for error in errors], 50),
        p95_under=percentile([max(0.0, error) for error in errors], 95),
        bias=percentile(errors, 50),
    )
