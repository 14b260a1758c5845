"""What is simulated: an engine's sizes, its host's speed, a device's step times and jobs.

Plain data; `simulator` runs it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from flexjax.config import FinetuneConfig
from flexjax.layout import StepSizes
from flexjax.scheduler.buckets import BucketLadder
from flexjax.scheduler.budget import StepPredictor
from flexjax.scheduler.features import EXTRA_TERMS, StepFeatures
from flexjax.scheduler.latency_model import LatencyModel
from flexjax.scheduler.latency_profile import LatencyProfile
from flexjax.scheduler.page_allocator import PageAllocator
from flexjax.scheduler.policy import SharingPolicy
from flexjax.scheduler.scheduler import Scheduler
from flexjax.scheduler.training import TrainingRun, TrainSequence
from flexjax.slo import SLO, SLO_CLASSES

_NOISE_BLOCK = 4096
_OPTIMIZER = EXTRA_TERMS.index("num_optimizer_steps")


def require(is_right: bool, name: str, rule: str, value: object) -> None:
    """Refuses a value.

    Raises:
      ValueError: If `is_right` is false: "`name` must be `rule`; got `value`.".
    """
    if not is_right:
        raise ValueError(f"`{name}` must be {rule}; got {value!r}.")


def require_int(name: str, value: object, least: int) -> None:
    """Refuses what is not an integer of at least `least`.

    Raises:
      ValueError: If so.
    """
    is_int = isinstance(value, int) and not isinstance(value, bool)
    require(is_int and value >= least, name, f"an integer >= {least}", value)  # type: ignore[operator]


def require_number(name: str, value: object, *, is_positive: bool = False) -> None:
    """Refuses what is not a finite number of at least 0, or above 0 if `is_positive`.

    Raises:
      ValueError: If so.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_right = is_number and math.isfinite(value) and value >= 0  # type: ignore[operator,arg-type]
    is_right = is_right and (value > 0 or not is_positive)  # type: ignore[operator]
    require(bool(is_right), name, f"a finite number {'>' if is_positive else '>='} 0", value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulatedEngine:
    """Sizes of an engine, as far as its scheduler and its jobs depend on them.

    Attributes:
      ladder: Buckets.
      sizes: Sizes that all buckets share.
      num_pages: KV pages.
      arena_pages: Arena pages; 1 when the engine only serves.
      page_size: Tokens of a page.
      max_running: Requests that can run at once.
      max_context_len: Tokens of the longest request or finetuning sequence.
      num_layers: L of the model.
      max_jobs: Jobs that can run at once; 0 for an engine that only serves.
      tile_order: As in `EngineConfig`.
      is_deterministic: As `EngineConfig.deterministic_finetuning`.

    Raises:
      ValueError: If a count is below its least value, `num_pages` cannot hold one request of full
        length, or `tile_order` is unknown.
    """

    ladder: BucketLadder
    sizes: StepSizes
    num_pages: int
    arena_pages: int
    page_size: int
    max_running: int
    max_context_len: int
    num_layers: int
    max_jobs: int = 1
    tile_order: str = "window_major"
    is_deterministic: bool = False

    def __post_init__(self) -> None:
        names = ("num_pages", "arena_pages", "page_size", "max_running", "num_layers")
        for name in names:
            require_int(name, getattr(self, name), 1)
        require_int("max_context_len", self.max_context_len, 2)
        require_int("max_jobs", self.max_jobs, 0)
        least = -(-self.max_context_len // self.page_size)
        rule = f"at least {least}, for one request of `max_context_len`={self.max_context_len}"
        require(self.num_pages >= least, "num_pages", rule, self.num_pages)
        is_enough = self.max_jobs == 0 or self.arena_pages >= least
        rule = f"at least {least}, for one sequence of `max_context_len`={self.max_context_len}"
        require(is_enough, "arena_pages", rule, self.arena_pages)
        rule = f"at least `max_running`={self.max_running}"
        is_enough = self.ladder.max_decode >= self.max_running
        require(is_enough, "ladder.max_decode", rule, self.ladder.max_decode)
        orders = ("window_major", "layer_major")
        require(self.tile_order in orders, "tile_order", f"one of {orders}", self.tile_order)

    def make_scheduler(self, policy: SharingPolicy, latency: StepPredictor) -> Scheduler:
        """A scheduler with these sizes, all pages free."""
        return Scheduler(
            ladder=self.ladder,
            sizes=self.sizes,
            pages=PageAllocator(self.num_pages, self.page_size),
            arena=PageAllocator(self.arena_pages, self.page_size),
            policy=policy,
            latency=latency,
            max_running=self.max_running,
            max_context_len=self.max_context_len,
            num_layers=self.num_layers,
            tile_order=self.tile_order,
            is_deterministic=self.is_deterministic,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostTimes:
    """The host's work of one iteration; the device goes on meanwhile. The defaults are guesses.

    Attributes:
      plan_ms: Planning a step.
      launch_ms: Its arrays and its dispatch; the device can begin it afterwards.
      read_ms: Taking in the results of the step before.

    Raises:
      ValueError: If one is not a finite number of at least 0.
    """

    plan_ms: float = 0.4
    launch_ms: float = 0.4
    read_ms: float = 0.2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            require_number(field.name, getattr(self, field.name))

    @property
    def total_ms(self) -> float:
        """All of an iteration."""
        return self.plan_ms + self.launch_ms + self.read_ms


class DeviceTimes:
    """How long steps really take: a profile's formula, times noise.

    What the scheduler believes is another matter: its own latency model starts from a profile that
    need not be this one.
    """

    def __init__(
        self, profile: LatencyProfile, *, noise: float = 0.0, factor: float = 1.0, seed: int = 0
    ):
        """Makes a device.

        Args:
          profile: Its coefficients are the truth.
          noise: Standard deviation of the logarithm of the factor that each step is multiplied
            with; its median is 1.
          factor: Every step takes this many times what the profile says.
          seed: Seed of the noise.

        Raises:
          ValueError: If `noise` is negative, `factor` not above 0 or `seed` negative.
        """
        require_number("noise", noise)
        require_number("factor", factor, is_positive=True)
        require_int("seed", seed, 0)
        self._model = LatencyModel.from_profile(profile)  # never corrected: the bare formula
        self._noise = noise
        self._factor = factor
        self._draws = np.random.default_rng([seed, 0xD0])
        self._block: list[float] = []
        self._optimizer_ms = profile.coefficients.extra_ms[_OPTIMIZER]

    def tail_ms(self, features: StepFeatures) -> float:
        """Milliseconds that the device works on after the step's tokens are there.

        They are part of `ms`: optimizer steps, which the next step waits for but no token does.
        """
        return self._factor * self._optimizer_ms * features.num_optimizer_steps

    def ms(self, features: StepFeatures) -> float:
        """Milliseconds of the next step."""
        ms = self._factor * self._model.predict(features)
        if not self._noise:
            return ms
        if not self._block:
            drawn = self._draws.standard_normal(_NOISE_BLOCK)
            self._block = np.exp(self._noise * drawn).tolist()
        return ms * self._block.pop()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulationOptions:
    """How a simulation differs from the plain one.

    Attributes:
      slo: Targets of requests whose arrival names no class.
      slo_classes: Targets by class.
      max_output_tokens: What every request asks for at most; it stops by itself after the output
        length of its arrival, which the scheduler does not know. None: it asks for exactly that.
      device: How long steps really take; None for what the profile says, without noise.
      host: The host's times.
      quantile: As in `LatencyModel`.
      record_every: Each how manieth step becomes a `StepRecord`; 0 for none. Figures that add up
        step records are only right with 1; `Recording.totals` always are.

    Raises:
      ValueError: If a count is out of range.
    """

    slo: SLO = SLO_CLASSES["interactive"]
    slo_classes: Mapping[str, SLO] = dataclasses.field(default_factory=lambda: SLO_CLASSES)
    max_output_tokens: int | None = None
    device: DeviceTimes | None = None
    host: HostTimes = HostTimes()
    quantile: float = 0.9
    record_every: int = 1

    def __post_init__(self) -> None:
        require_int("record_every", self.record_every, 0)
        if self.max_output_tokens is not None:
            require_int("max_output_tokens", self.max_output_tokens, 1)


@dataclasses.dataclass(frozen=True)
class SimulatedJob:
    """A finetuning job without tokens: sequences by their lengths.

    Attributes:
      config: The job's configuration; its dataset is not read.
      lengths: Tokens of each training sequence, in order; kept as a tuple.
      target_counts: Loss-bearing tokens of each, its last ones; None for all but the first token,
        which nothing predicts.
      eval_lengths: Tokens of each evaluation sequence, all but the first bearing loss.

    Raises:
      ValueError: If there is no sequence, a length is below 2, there is not one count a sequence,
        or a count exceeds what a sequence can have.
    """

    config: FinetuneConfig
    lengths: Sequence[int]
    target_counts: Sequence[int] | None = None
    eval_lengths: Sequence[int] = ()

    def __post_init__(self) -> None:
        for name in ("lengths", "eval_lengths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            for length in getattr(self, name):
                require_int(name, length, 2)
        require(len(self.lengths) > 0, "lengths", "at least one length", self.lengths)
        if self.target_counts is None:
            return
        counts = tuple(self.target_counts)
        object.__setattr__(self, "target_counts", counts)
        rule = f"as many as `lengths`, {len(self.lengths)}"
        require(len(counts) == len(self.lengths), "target_counts", rule, len(counts))
        for count, length in zip(counts, self.lengths, strict=True):
            require_int("target_counts", count, 0)
            rule = f"below its sequence's length, {length}"
            require(count < length, "target_counts", rule, count)

    def make_run(self, run_id: int, slot: int, engine: SimulatedEngine) -> TrainingRun:
        """The job as the scheduler sees it, at its beginning.

        Raises:
          ValueError: If a sequence is longer than the context, or the window than the largest
            window bucket.
        """
        longest = max((*self.lengths, *self.eval_lengths))
        rule = f"at most `max_context_len`={engine.max_context_len}"
        require(longest <= engine.max_context_len, "lengths", rule, longest)
        window, widest = self.config.window, engine.ladder.max_window
        is_right = window is None or window <= widest
        require(is_right, "window", f"at most the largest window bucket, {widest}", window)
        rows = widest if window is None else window
        layers = self.config.lora.layers_to_transform
        counts = self.target_counts or [None] * len(self.lengths)
        return TrainingRun(
            run_id,
            self.config,
            [_sequence(n, count) for n, count in zip(self.lengths, counts, strict=True)],
            [_sequence(n, None) for n in self.eval_lengths],
            slot=slot,
            num_layers=engine.num_layers,
            bottom=0 if layers is None else min(layers),
            group_rows=rows,
            arena_tokens=min(engine.arena_pages, engine.num_pages) * engine.page_size,
            page_size=engine.page_size,
        )


def _sequence(length: int, num_targets: int | None) -> TrainSequence:
    num_targets = length - 1 if num_targets is None else num_targets
    targets = np.full(length, -1, np.int32)
    targets[length - 1 - num_targets : length - 1] = 0  # shifted: the last position predicts none
    return TrainSequence(np.zeros(length, np.int32), targets)
