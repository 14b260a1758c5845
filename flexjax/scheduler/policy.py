"""Who gets the next step: ways to share a GPU between inference and finetuning. Imports no jax.

All run in the same engine, so that a comparison compares the policies and nothing else. `CoServe`
is FlexJAX's own; the others are those that FlexLLM compares itself with (arXiv 2402.18789).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol, runtime_checkable


@dataclasses.dataclass(slots=True)
class StepView:
    """What is known before a step is planned.

    Attributes:
      slack_ms: Milliseconds from the step's expected begin to the earliest token that it owes a
        running request; infinite where none has a target.
      reach_ms: What that could grow to, were finetuning to wait.
      mean_ms: What steps may take on average; infinite where no request has a target.
      is_urgent: Whether a first token would come late if finetuning took its share.
      num_running: Requests with pages.
      num_waiting: Requests without.
      has_finetuning: Whether some job has something to plan.
      finished_groups: Groups of finetuning sequences that have been through both passes, ever.
    """

    slack_ms: float = math.inf
    reach_ms: float = math.inf
    mean_ms: float = math.inf
    is_urgent: bool = False
    num_running: int = 0
    num_waiting: int = 0
    has_finetuning: bool = False
    finished_groups: int = 0

    @property
    def has_requests(self) -> bool:
        """Whether any request is alive."""
        return self.num_running + self.num_waiting > 0


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """What a step may hold.

    Attributes:
      inference: Whether it holds inference rows.
      finetuning: Whether it holds finetuning rows.
      max_ms: Expected milliseconds at most, for all that can wait: prefill chunks and finetuning.
        Decode rows are never held back.
      reach_ms: What a later step may have as `max_ms`: finetuning waits for it where it would get
        much more done in its time. None never to wait.
      mean_ms: What steps may take on average: mixes that take less cost no later step anything.
      max_rows: Finetuning rows at most, forward and backward together; None for no limit.
      chunk_share: Share of the largest chunk and window buckets that finetuning may take; the rest
        is kept for prefill even if there is none. None for no such split.
    """

    inference: bool = True
    finetuning: bool = True
    max_ms: float = math.inf
    reach_ms: float | None = None
    mean_ms: float = math.inf
    max_rows: int | None = None
    chunk_share: float | None = None


@runtime_checkable
class SharingPolicy(Protocol):
    """Decides, once an iteration, what the next step may hold."""

    def turn(self, view: StepView) -> Turn:
        """Returns what the step may hold; may remember what it gave."""
        ...


def _require(condition: bool, name: str, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"`{name}` must be {rule}; got {value!r}.")


@dataclasses.dataclass(frozen=True)
class CoServe:
    """Steps hold both: finetuning takes what the tightest latency target leaves free.

    Where a large mix gets more done in its time than small ones, steps without finetuning save the
    time for it.

    Attributes:
      max_rows: Finetuning rows a step while requests are alive; None for no limit but time.
      max_ms: Expected milliseconds of a step while requests are alive; None for the targets alone.
    """

    max_rows: int | None = None
    max_ms: float | None = None

    def __post_init__(self) -> None:
        is_valid = self.max_rows is None or self.max_rows >= 1
        _require(is_valid, "max_rows", "an integer >= 1 or None", self.max_rows)
        is_valid = self.max_ms is None or (math.isfinite(self.max_ms) and self.max_ms >= 0)
        _require(is_valid, "max_ms", "a number >= 0 or None", self.max_ms)

    def turn(self, view: StepView) -> Turn:
        """See `SharingPolicy.turn`."""
        if not view.has_requests:
            return Turn()
        max_ms, reach_ms = view.slack_ms, view.reach_ms
        if self.max_ms is not None:
            max_ms, reach_ms = min(self.max_ms, max_ms), min(self.max_ms, reach_ms)
        return Turn(
            finetuning=not view.is_urgent,
            max_ms=max_ms,
            reach_ms=reach_ms,
            mean_ms=view.mean_ms,
            max_rows=self.max_rows,
        )


@dataclasses.dataclass(frozen=True)
class InferenceOnly:
    """Finetuning waits, for ever: what the requests see without it."""

    def turn(self, view: StepView) -> Turn:
        """See `SharingPolicy.turn`."""
        return Turn(finetuning=False, max_ms=view.slack_ms)


@dataclasses.dataclass(frozen=True)
class FinetuneOnly:
    """Requests wait while there is finetuning: what a job gets without them."""

    def turn(self, view: StepView) -> Turn:
        """See `SharingPolicy.turn`."""
        return Turn(inference=not view.has_finetuning)


@dataclasses.dataclass
class Temporal:
    """Takes turns: after `interval` inference steps, one group of sequences forward and backward.

    Attributes:
      interval: Inference steps between two turns of finetuning.
    """

    interval: int = 64

    def __post_init__(self) -> None:
        _require(self.interval >= 1, "interval", "an integer >= 1", self.interval)
        self._inference_steps = 0
        self._finish_at: int | None = None

    def turn(self, view: StepView) -> Turn:
        """See `SharingPolicy.turn`."""
        if not view.has_requests:
            self._finish_at, self._inference_steps = None, 0
            return Turn()
        if self._finish_at is not None:
            if view.finished_groups < self._finish_at and view.has_finetuning:
                return Turn(inference=False)
            self._finish_at, self._inference_steps = None, 0
        if self._inference_steps >= self._next_interval(view) and view.has_finetuning:
            self._finish_at = view.finished_groups + 1
            return Turn(inference=False)
        self._inference_steps += 1
        return Turn(finetuning=False, max_ms=view.slack_ms)

    def _next_interval(self, view: StepView) -> int:
        del view
        return self.interval


@dataclasses.dataclass
class DynamicTemporal(Temporal):
    """Takes turns at an interval that follows the load: short when idle, long when requests queue.

    The interval goes from `interval` with one running request to `max_interval` with `full_load`
    of them, counting each that waits as `queue_weight`, on a geometric scale.

    Attributes:
      interval: Inference steps between turns at the least load.
      max_interval: The same at full load and above.
      full_load: Requests that make full load.
      queue_weight: What a waiting request counts beside a running one.
    """

    interval: int = 16
    max_interval: int = 512
    full_load: int = 16
    queue_weight: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = f"an integer >= `interval`, {self.interval}"
        _require(self.max_interval >= self.interval, "max_interval", rule, self.max_interval)
        _require(self.full_load >= 2, "full_load", "an integer >= 2", self.full_load)
        _require(self.queue_weight >= 0, "queue_weight", "a number >= 0", self.queue_weight)

    def _next_interval(self, view: StepView) -> int:
        load = view.num_running + self.queue_weight * view.num_waiting - 1
        share = min(max(load / (self.full_load - 1), 0.0), 1.0)
        return round(self.interval * (self.max_interval / self.interval) ** share)


@dataclasses.dataclass(frozen=True)
class Spatial:
    """Splits every step at a fixed share, whatever the targets: a GPU cut in two.

    Attributes:
      share: Finetuning's share of the chunk and window rows.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        _require(0 < self.share < 1, "share", "in (0, 1)", self.share)

    def turn(self, view: StepView) -> Turn:
        """See `SharingPolicy.turn`."""
        return Turn(chunk_share=self.share if view.has_requests else None)


POLICIES = (
    "co_serve",
    "temporal",
    "dynamic_temporal",
    "spatial",
    "inference_only",
    "finetune_only",
)
"""Names that `make_policy` knows; `temporal:N` and `spatial:SHARE` give the parameter."""


def make_policy(name: str, *, full_load: int = 16) -> SharingPolicy:
    """Makes a policy from its name.

    Args:
      name: One of `POLICIES`; "temporal:128" gives the interval, "spatial:0.25" the share.
      full_load: Requests that make full load, for `dynamic_temporal`.

    Raises:
      ValueError: If there is none of that name, or its parameter cannot be used.
    """
    kind, _, parameter = name.partition(":")
    makers = {
        "co_serve": CoServe,
        "temporal": Temporal,
        "dynamic_temporal": lambda: DynamicTemporal(full_load=max(2, full_load)),
        "spatial": Spatial,
        "inference_only": InferenceOnly,
        "finetune_only": FinetuneOnly,
    }
    takes = {"temporal": int, "spatial": float}
    if kind not in makers or (parameter and kind not in takes):
        raise ValueError(f"`policy` must be one of {', '.join(POLICIES)}; got {name!r}.")
    if not parameter:
        return makers[kind]()
    try:
        value = takes[kind](parameter)
    except ValueError as error:
        rule = "temporal:STEPS or spatial:SHARE"
        raise ValueError(f"`policy` must be {rule}; got {name!r}.") from error
    return Temporal(value) if kind == "temporal" else Spatial(value)
