"""What was measured of a device: samples, the formula fitted to them, and the file for both.

Owns the fit, the JSON format, and profiles made up from given costs. Imports no jax.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexjax.layout import Bucket
from flexjax.scheduler.buckets import BucketLadder
from flexjax.scheduler.features import (
    COUNTS,
    LEAST_MS,
    LatencyCoefficients,
    LatencySample,
    RooflineCosts,
    StepFeatures,
    backward_terms,
    causal_pairs,
    extra_terms,
    forward_terms,
    is_within,
)

# The fit.

_MAX_KNOTS = 6
_PASSES = 6
"""Reweighted least-squares passes for each overlap that is tried."""
_OVERLAPS = tuple(i / 8 for i in range(9))
_BUCKET_VARIANCE = 10.0
"""Variance of buckets around the regression, over that of samples around their bucket."""
_RIDGE = 1e-6
_CONTRADICTION = 1.1
"""A smaller bucket measured this much slower than a larger one: one of them is wrong."""


def fit_coefficients(samples: Iterable[LatencySample]) -> LatencyCoefficients:
    """Fits the formula to measured steps.

    Least squares of the relative error with coefficients >= 0, reweighted so that outliers count
    little (Huber). Buckets have a random effect of their own: the cost of keys and values read is
    learnt from steps of the same bucket where there are several, from all buckets otherwise. The
    bases are medians; one that contradicts its neighbours in size is left to the regression.

    Args:
      samples: Measured steps; any number of any bucket.

    Raises:
      ValueError: If there are no samples.
    """
    table = _Table(list(samples))
    is_mixed = any(s.features.bucket.forward and s.features.bucket.window for s in table.samples)
    fits = [table.solve(overlap) for overlap in (_OVERLAPS if is_mixed else (0.0,))]
    best = min(fits, key=lambda fit: fit.misfit)
    num_forward, num_backward = table.forward.shape[1], table.backward.shape[1]
    split = np.split(best.solution, np.cumsum([1, num_forward, num_backward]))
    fixed, forward, backward, extra = (tuple(part.tolist()) for part in split)
    extras_ms = table.extra @ split[3]
    coefficients = LatencyCoefficients(
        fixed_ms=fixed[0],
        forward_knots=table.forward_knots,
        forward_ms=forward,
        backward_knots=table.backward_knots,
        backward_ms=backward,
        overlap=best.overlap,
        extra_ms=extra,
        measured_ms=_rising(table.bases(extras_ms, best.expected_ms)),
        noise=0.0,
    )
    bases = np.asarray([coefficients.base_ms(bucket) for bucket in table.buckets])
    logs = np.log(table.ms / np.maximum(bases[table.bucket_of] + extras_ms, LEAST_MS))
    # A median takes part of the noise of the samples that it is the median of.
    freedom = len(logs) / max(1, len(logs) - len(table.buckets))
    return dataclasses.replace(coefficients, noise=math.sqrt(freedom) * _spread(logs))


@dataclasses.dataclass(frozen=True)
class _Fit:
    overlap: float
    solution: np.ndarray
    expected_ms: np.ndarray
    misfit: float


class _Table:
    """Samples as arrays: one row a sample, one column a coefficient."""

    def __init__(self, samples: list[LatencySample]):
        if not samples:
            raise ValueError("`samples` must hold at least one measured step; got none.")
        self.samples = samples
        self.buckets = sorted({s.features.bucket for s in samples})
        index = {bucket: i for i, bucket in enumerate(self.buckets)}
        self.bucket_of = np.asarray([index[s.features.bucket] for s in samples])
        self.ms = np.asarray([s.ms for s in samples], np.float64)
        repeats = np.asarray([s.repeats for s in samples], np.float64)
        self.weight = repeats / np.median(repeats)
        self.forward_knots = _knots(b.forward for b in self.buckets)
        self.backward_knots = _knots(b.window * b.tile_layers for b in self.buckets)
        rows = [forward_terms(b, self.forward_knots) for b in self.buckets]
        self.forward = np.asarray(rows)[self.bucket_of]
        rows = [backward_terms(b, self.backward_knots) for b in self.buckets]
        self.backward = np.asarray(rows)[self.bucket_of]
        self.extra = np.asarray([extra_terms(s.features) for s in samples])
        self._members = [np.flatnonzero(self.bucket_of == i) for i in range(len(self.buckets))]
        self._one_hot = np.eye(len(self.buckets))[self.bucket_of]

    def _medians(self, values: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Weighted median of each bucket's samples."""
        found = []
        for rows in self._members:
            order = rows[np.argsort(values[rows])]
            passed = np.cumsum(weight[order]) / weight[order].sum()
            low, high = np.searchsorted(passed, (0.5 - 1e-9, 0.5 + 1e-9))
            found.append((values[order[low]] + values[order[high]]) / 2)
        return np.asarray(found)

    def bases(self, extras_ms: np.ndarray, expected_ms: np.ndarray) -> dict[Bucket, float]:
        """Median of what the extra terms leave of each bucket; buckets with none are left out.

        If that were all of them, the extra terms cost everything, and all bases are least.
        Noise grows with the time, so quicker samples of a bucket say more of its base.
        """
        left = self._medians(self.ms - extras_ms, self.weight / expected_ms)
        found = {b: float(ms) for b, ms in zip(self.buckets, left, strict=True) if ms > 0}
        return found or dict.fromkeys(self.buckets, LEAST_MS)

    def solve(self, overlap: float) -> _Fit:
        """Fits every coefficient but `overlap`, which is given."""
        middle = self._medians(self.ms, self.weight)[self.bucket_of]
        scale = middle
        weight = self.weight * np.minimum(1, 0.3 / np.maximum(abs(self.ms / middle - 1), 1e-12))
        share_forward = share_backward = np.ones(len(self.ms))
        solution, effect = np.zeros(0), np.zeros(0)
        for _ in range(_PASSES):
            parts = (
                np.ones((len(self.ms), 1)),
                self.forward * share_forward[:, None],
                self.backward * share_backward[:, None],
                self.extra,
            )
            matrix = np.concatenate(parts, axis=1)
            rows = np.sqrt(weight) / scale
            solution = self._least_squares(matrix, rows, middle)
            expected = matrix @ solution
            effect = self._medians((self.ms - expected) / middle, self.weight / scale)
            level = np.maximum(expected + effect[self.bucket_of] * middle, LEAST_MS)
            error = self.ms / level - 1
            limit = 2 * max(_spread(error), 1e-4)
            weight = self.weight * np.minimum(1, limit / np.maximum(abs(error), 1e-12))
            scale = level
            forward, backward = self._sides(solution)
            share_forward = np.where(forward < backward, 1 - overlap, 1.0)
            share_backward = np.where(forward < backward, 1.0, 1 - overlap)
        return _Fit(overlap, solution, scale, float(np.mean(abs(effect))))

    def _sides(self, solution: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        end = 1 + self.forward.shape[1]
        backward = solution[end : end + self.backward.shape[1]]
        return self.forward @ solution[1:end], self.backward @ backward

    def _least_squares(self, matrix: np.ndarray, rows: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Weighted least squares with a random effect for each bucket, coefficients >= 0.

        With z a bucket's column, the covariance I + r z z' is whitened by taking a share of the
        projection on z away from both sides.
        """
        effect = rows * size
        energy = self._one_hot.T @ effect**2
        share = (1 - 1 / np.sqrt(1 + _BUCKET_VARIANCE * energy)) / energy
        data = np.concatenate([matrix, self.ms[:, None]], axis=1) * rows[:, None]
        along = share[:, None] * (self._one_hot.T @ (effect[:, None] * data))
        data = data - effect[:, None] * along[self.bucket_of]
        norms = np.linalg.norm(data[:, :-1], axis=0)
        used = norms > 1e-12
        columns = data[:, :-1][:, used] / norms[used]
        gram = columns.T @ columns + _RIDGE * np.eye(columns.shape[1])
        solution = np.zeros(matrix.shape[1])
        solution[used] = _nonnegative(gram, columns.T @ data[:, -1]) / norms[used]
        return solution


def _nonnegative(gram: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Minimizes x'Gx / 2 - t'x over x >= 0 by active sets (Lawson and Hanson)."""
    solution, free = np.zeros(len(target)), np.zeros(len(target), bool)
    for _ in range(3 * len(target)):
        gradient = np.where(free, -np.inf, target - gram @ solution)
        if gradient.max(initial=-np.inf) <= 1e-10 * abs(target).max(initial=0):
            break
        free[gradient.argmax()] = True
        while True:
            trial = np.zeros(len(target))
            trial[free] = np.linalg.solve(gram[np.ix_(free, free)], target[free])
            blocked = free & (trial <= 0)
            if not blocked.any():
                solution = trial
                break
            step = (solution[blocked] / (solution[blocked] - trial[blocked])).min()
            solution = solution + step * (trial - solution)
            free &= ~(blocked & (solution <= 1e-15))
            solution[~free] = 0
    return solution


def _knots(sizes: Iterable[int]) -> tuple[int, ...]:
    """Sizes where the cost per row may change: those measured, thinned out evenly in rank."""
    found = sorted(set(sizes) - {0})[:-1]
    if len(found) > _MAX_KNOTS:
        found = [found[round(i)] for i in np.linspace(0, len(found) - 1, _MAX_KNOTS)]
    return tuple(found)


def _spread(values: np.ndarray) -> float:
    """Standard deviation by the median of absolute values."""
    return float(1.4826 * np.median(abs(values)))


def _rising(bases: dict[Bucket, float]) -> tuple[tuple[Bucket, float], ...]:
    """Makes bases rise with the bucket within its kind.

    While some smaller bucket is clearly slower than a larger one, the bucket that contradicts the
    most others goes. The rest are moved, as little as possible, until they rise.
    """
    kept = sorted(bases)
    logs = np.log([bases[b] for b in kept])
    below = np.asarray([[is_within(small, large) for large in kept] for small in kept])
    while True:
        wrong = below & (logs[:, None] > math.log(_CONTRADICTION) + logs[None, :])
        if not wrong.any():
            break
        worst = int((wrong.sum(0) + wrong.sum(1)).argmax())
        del kept[worst]
        logs = np.delete(logs, worst)
        below = np.delete(np.delete(below, worst, 0), worst, 1)
    ms = np.exp(_isotonic(logs, below))
    # Both means rise exactly, where the solution rises up to rounding.
    least = np.where(below, ms[None, :], np.inf).min(1)
    greatest = np.where(below, ms[:, None], -np.inf).max(0)
    rising = ((least + greatest) / 2).tolist()
    return tuple(zip(kept, rising, strict=True))


def _isotonic(values: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Nearest values that rise along a partial order, by the dual of the least-squares problem."""
    strict = below & ~np.eye(len(values), dtype=bool)
    between = (strict.astype(np.float64) @ strict.astype(np.float64)) > 0
    small, large = np.nonzero(strict & ~between)
    rises = np.zeros((len(small), len(values)))
    rises[np.arange(len(small)), small] = -1
    rises[np.arange(len(small)), large] = 1
    gram = rises @ rises.T + _RIDGE * np.eye(len(small))
    return values + rises.T @ _nonnegative(gram, -rises @ values)


# Profiles.

FORMAT_VERSION = 1
SOURCES = ("measured", "roofline", "synthetic")


@dataclasses.dataclass(frozen=True)
class ProfileMatch:
    """Whether a profile fits an engine; true if it does.

    Attributes:
      reasons: What differs, one sentence each.
    """

    reasons: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.reasons


def profile_sizes(
    ladder: BucketLadder, *, page_size: int, kernels: str | None, dtype: str
) -> dict[str, Any]:
    """Engine sizes and choices that a profile depends on."""
    rest = {"page_size": page_size, "kernels": kernels, "dtype": dtype}
    return {"ladder": dataclasses.asdict(ladder), **rest}


@dataclasses.dataclass(frozen=True)
class LatencyProfile:
    """Measured steps of one model on one device, and the formula fitted to them.

    Attributes:
      device: The device's name.
      model: The model's name.
      versions: Library versions by name.
      sizes: Engine sizes and choices that matter, as `profile_sizes` gives; JSON values.
      source: Where the samples come from, one of `SOURCES`.
      date: When they were taken, ISO 8601.
      samples: The steps.
      coefficients: The formula.

    Raises:
      ValueError: If a field breaks its rule.
    """

    device: str
    model: str
    versions: Mapping[str, str]
    sizes: Mapping[str, Any]
    source: str
    date: str
    samples: tuple[LatencySample, ...]
    coefficients: LatencyCoefficients

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"`source` must be one of {SOURCES}; got {self.source!r}.")
        try:
            datetime.datetime.fromisoformat(self.date)
        except ValueError:
            raise ValueError(f"`date` must be ISO 8601; got {self.date!r}.") from None
        for name in ("versions", "sizes"):
            # As the file will have them: tuples are lists there.
            object.__setattr__(self, name, json.loads(json.dumps(getattr(self, name))))

    @classmethod
    def from_samples(
        cls,
        samples: Sequence[LatencySample],
        *,
        device: str,
        model: str,
        versions: Mapping[str, str],
        sizes: Mapping[str, Any],
        source: str = "measured",
        date: str | None = None,
    ) -> LatencyProfile:
        """Fits samples and keeps them; `date` None is now.

        Raises:
          ValueError: If there are no samples, or a field breaks its rule.
        """
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        date, fitted = date or now, fit_coefficients(samples)
        return cls(device, model, versions, sizes, source, date, tuple(samples), fitted)

    def matches(self, *, device: str, model: str, sizes: Mapping[str, Any]) -> ProfileMatch:
        """Compares the profile with an engine; where false, `reasons` says what differs."""
        asked = {"device": device, "model": model}
        have: dict[str, Any] = {"device": self.device, "model": self.model}
        asked |= {f"sizes.{key}": value for key, value in json.loads(json.dumps(sizes)).items()}
        have |= {f"sizes.{key}": value for key, value in self.sizes.items()}
        reasons = []
        for key in [*asked, *(key for key in have if key not in asked)]:
            ours, theirs = have.get(key), asked.get(key)
            if ours != theirs:
                reasons.append(f"`{key}` is {ours!r} in the profile and {theirs!r} in the engine.")
        return ProfileMatch(tuple(reasons))

    def save(self, path: str | Path) -> None:
        """Writes the profile as JSON; numbers keep every bit."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["samples"] = [_sample_to_json(sample) for sample in self.samples]
        fitted = dataclasses.asdict(self.coefficients)
        pairs = self.coefficients.measured_ms
        fitted["measured_ms"] = [[dataclasses.astuple(bucket), ms] for bucket, ms in pairs]
        fields["coefficients"] = fitted
        content = {"format_version": FORMAT_VERSION, **fields}
        Path(path).write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> LatencyProfile:
        """Reads what `save` wrote.

        Raises:
          FileNotFoundError: If there is no such file.
          ValueError: If it is not a profile, has another format version, lacks a key, or holds a
            value that cannot be; the message names the file and the key.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            version = content.get("format_version") if isinstance(content, dict) else None
            if version != FORMAT_VERSION:
                raise ValueError(f"`format_version` must be {FORMAT_VERSION}; got {version!r}.")
            values = _fields_of(cls, content, "")
            values["samples"] = tuple(_sample_from_json(entry) for entry in values["samples"])
            values["coefficients"] = _coefficients_from_json(values["coefficients"])
            return cls(**values)
        except (ValueError, TypeError, AttributeError) as error:
            message = f"`path` must be a latency profile; got {str(path)!r}: {error}"
            raise ValueError(message) from error


def _fields_of(cls: type, entry: dict[str, Any], where: str) -> dict[str, Any]:
    """A dataclass's fields from a JSON object, all of them; other keys are not ours."""
    names = [field.name for field in dataclasses.fields(cls)]
    missing = [f"`{where}{name}`" for name in names if name not in entry]
    if missing:
        raise ValueError(f"Missing keys: {', '.join(missing)}.")
    return {name: entry[name] for name in names}


def _sample_to_json(sample: LatencySample) -> dict[str, Any]:
    counts = {name: getattr(sample.features, name) for name in COUNTS}
    bucket = dataclasses.astuple(sample.features.bucket)
    return {"bucket": bucket, **counts, "ms": sample.ms, "repeats": sample.repeats}


def _sample_from_json(entry: dict[str, Any]) -> LatencySample:
    values = _fields_of(StepFeatures, entry, "samples.")
    features = StepFeatures(**{**values, "bucket": Bucket(*values["bucket"])})
    own = {"features": features, **entry}
    return LatencySample(**_fields_of(LatencySample, own, "samples."))


def _coefficients_from_json(entry: dict[str, Any]) -> LatencyCoefficients:
    values = _fields_of(LatencyCoefficients, entry, "coefficients.")
    for name in ("forward_knots", "forward_ms", "backward_knots", "backward_ms", "extra_ms"):
        values[name] = tuple(values[name])
    values["measured_ms"] = tuple((Bucket(*bucket), ms) for bucket, ms in values["measured_ms"])
    return LatencyCoefficients(**values)


# Made-up profiles.


def synthetic_samples(
    buckets: Iterable[Bucket], costs: RooflineCosts, *, context_len: int
) -> list[LatencySample]:
    """Steps of a made-up device: each bucket idle, with half its context, and with all of it.

    Args:
      buckets: Shapes.
      costs: Of the device.
      context_len: Tokens of a full context.

    Raises:
      ValueError: If `context_len` is not positive.
    """
    if context_len < 1:
        raise ValueError(f"`context_len` must be at least 1; got {context_len}.")
    samples = []
    for bucket in buckets:
        for context in (0, -(-context_len // 2), context_len):
            features = _full_step(bucket, context, has_optimizer=context == context_len)
            samples.append(LatencySample(features, costs.ms(features)))
    return samples


def _full_step(bucket: Bucket, context: int, *, has_optimizer: bool) -> StepFeatures:
    """All rows of a bucket behind `context` tokens each; padding only, if that is 0."""
    if context == 0:
        return StepFeatures(bucket)
    return StepFeatures(
        bucket,
        decode_rows=bucket.decode,
        prefill_rows=bucket.chunk,
        backward_rows=bucket.window,
        decode_kv_tokens=bucket.decode * context,
        chunk_kv_pairs=causal_pairs(context, bucket.chunk),
        tile_kv_pairs=bucket.tile_layers * causal_pairs(context, bucket.window),
        sample_rows=bucket.decode,
        num_losses=int(bucket.window > 0),
        loss_rows=bucket.window,
        num_optimizer_steps=int(has_optimizer and bucket.window > 0),
    )


def synthetic_profile(
    ladder: BucketLadder,
    costs: RooflineCosts | None = None,
    *,
    finetuning: bool = True,
    context_len: int = 4096,
    page_size: int = 16,
    kernels: str | None = None,
    dtype: str = "bfloat16",
) -> LatencyProfile:
    """A profile of a made-up device, the same at each call, for tests and the simulator.

    Args:
      ladder: Whose buckets.
      costs: Of the device; None for `RooflineCosts()`.
      finetuning: Whether steps with a backward tile are among the samples.
      context_len: Tokens of the longest context among the samples.
      page_size: Recorded in the profile's sizes, as are the next two.
      kernels: As `EngineConfig.kernels`.
      dtype: Of weights and pages.

    Raises:
      ValueError: If `context_len` is not positive.
    """
    buckets = ladder.all_buckets(finetuning=finetuning)
    return LatencyProfile.from_samples(
        synthetic_samples(buckets, costs or RooflineCosts(), context_len=context_len),
        device="synthetic",
        model="synthetic",
        versions={},
        sizes=profile_sizes(ladder, page_size=page_size, kernels=kernels, dtype=dtype),
        source="synthetic",
        date="2000-01-01T00:00:00+00:00",
    )
