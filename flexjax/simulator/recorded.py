"""A device and a host as an engine was seen to run on them, from the steps that it recorded.

What is fitted is the formula of the latency model; what the formula leaves is drawn again from
what was recorded, so that tails and slow spells are those of the machine.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from flexjax.scheduler.features import LEAST_MS, LatencySample, StepFeatures, kind_of
from flexjax.scheduler.latency_model import LatencyModel
from flexjax.scheduler.latency_profile import LatencyProfile
from flexjax.simulator.setup import DeviceTimes, HostTimes, require

_SPELL = 32
"""Steps of a kind whose remainders are drawn together, as they followed one another."""
_LEAST_STEPS = 64
"""Steps that a kind must have been recorded with for remainders of its own."""


@dataclasses.dataclass(frozen=True, slots=True)
class RecordedStep:
    """A step of an engine.

    Attributes:
      features: What it held.
      ms: Milliseconds from the end of the step before, or from its launch where that is later, to
        its tokens.
      plan_ms: The host's milliseconds of planning it.
      host_ms: All of the host's milliseconds of the iteration, without waiting.
      read_ms: Milliseconds from the end of the last step that had been read until it was planned:
        what the host did with the results, and any idleness. None for the first steps of a run.
    """

    features: StepFeatures
    ms: float
    plan_ms: float
    host_ms: float
    read_ms: float | None = None


def device_samples(steps: Iterable[RecordedStep]) -> list[LatencySample]:
    """Steps of one run as samples of what the device did in their time.

    An optimizer step runs after its own step's tokens are there, in the time of the next step; it
    is therefore counted with that one.

    Args:
      steps: In order, of one run.
    """
    samples, carried = [], 0
    for step in steps:
        features = dataclasses.replace(step.features, num_optimizer_steps=carried)
        carried = step.features.num_optimizer_steps
        samples.append(LatencySample(features, step.ms))
    return samples


def recorded_profile(runs: Sequence[Sequence[RecordedStep]], **about: Any) -> LatencyProfile:
    """Fits the formula to the steps of runs.

    Args:
      runs: Steps of each run, in order.
      **about: Fields of the profile beside samples and coefficients; see `LatencyProfile`.

    Raises:
      ValueError: If there are no steps.
    """
    samples = [sample for run in runs for sample in device_samples(run)]
    require(len(samples) > 0, "runs", "of at least one step", len(samples))
    return LatencyProfile.from_samples(samples, **about)


def recorded_host(runs: Sequence[Sequence[RecordedStep]]) -> HostTimes:
    """Medians of the host's times; without idleness as long as most steps follow one another.

    Raises:
      ValueError: If there are no steps.
    """
    steps = [step for run in runs for step in run]
    require(len(steps) > 0, "runs", "of at least one step", len(steps))
    plan_ms = statistics.median(step.plan_ms for step in steps)
    rest_ms = statistics.median(max(0.0, step.host_ms - step.plan_ms) for step in steps)
    reads_ms = [step.read_ms for step in steps if step.read_ms is not None]
    read_ms = min(statistics.median(reads_ms), rest_ms) if reads_ms else 0.0
    return HostTimes(plan_ms=plan_ms, launch_ms=rest_ms - read_ms, read_ms=read_ms)


class RecordedDevice(DeviceTimes):
    """Step times of a profile's formula, times remainders of its samples.

    A remainder is measured / formula. Each kind of step (which of decode rows, chunk rows and a
    backward tile it has) draws its own, in spells of steps that followed one another.
    """

    def __init__(self, profile: LatencyProfile, *, factor: float = 1.0, seed: int = 0):
        """Makes a device.

        Args:
          profile: Its samples are recorded steps, in order.
          factor: Every step takes this many times as long.
          seed: Of the draws.

        Raises:
          ValueError: If the profile has no samples, `factor` is not above 0, or `seed` is negative.
        """
        require(len(profile.samples) > 0, "profile", "of at least one sample", 0)
        super().__init__(profile, factor=factor, seed=seed)
        self._kinds = _remainders(profile)
        self._all = np.concatenate(list(self._kinds.values()))
        self._random = np.random.default_rng([seed, 0xD1])
        self._spells: dict[int, list[float]] = collections.defaultdict(list)

    def ms(self, features: StepFeatures) -> float:
        """Milliseconds of the next step."""
        return super().ms(features) * self._remainder(kind_of(features.bucket))

    def level(self, steps: Iterable[RecordedStep]) -> float:
        """How many times as long the steps of one run took as this device would have on average.

        Raises:
          ValueError: If there are no steps.
        """
        samples = device_samples(steps)
        require(len(samples) > 0, "steps", "at least one step", 0)
        means = {kind: float(self._found(kind).mean()) for kind in range(8)}
        expected_ms = [
            super(RecordedDevice, self).ms(s.features) * means[kind_of(s.features.bucket)]
            for s in samples
        ]
        return math.fsum(s.ms for s in samples) / math.fsum(expected_ms)

    def _found(self, kind: int) -> np.ndarray:
        found = self._kinds.get(kind, self._all)
        return found if len(found) >= _LEAST_STEPS else self._all

    def _remainder(self, kind: int) -> float:
        spell = self._spells[kind]
        if not spell:
            found = self._found(kind)
            begin = int(self._random.integers(len(found)))
            numbers = np.arange(begin + _SPELL - 1, begin - 1, -1)  # popped from the end
            spell.extend(found.take(numbers, mode="wrap").tolist())
        return spell.pop()


def _remainders(profile: LatencyProfile) -> Mapping[int, np.ndarray]:
    """Measured over formula, by kind of step, in order."""
    model = LatencyModel.from_profile(profile)  # never corrected: the bare formula
    found: dict[int, list[float]] = collections.defaultdict(list)
    for sample in profile.samples:
        expected_ms = max(model.predict(sample.features), LEAST_MS)
        found[kind_of(sample.features.bucket)].append(sample.ms / expected_ms)
    return {kind: np.asarray(values) for kind, values in found.items()}
