"""Predicts how long a step takes: fitted from measured steps, corrected while steps run.

Owns the online correction and the account of its own errors. The formula is `features`', the fit
and its files are `latency_profile`'s. Imports no jax.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence

import numpy as np

from flexjax.layout import Bucket
from flexjax.scheduler.features import (
    LEAST_MS,
    LatencyCoefficients,
    LatencySample,
    StepFeatures,
    kind_of,
)
from flexjax.scheduler.latency_fit import fit_coefficients
from flexjax.scheduler.latency_profile import LatencyProfile

# The account of errors.

_BIN = 0.005
_RECENT = 512


@dataclasses.dataclass(frozen=True)
class LatencyErrors:
    """How good predictions were that were made before the step was measured.

    Errors are measured / predicted - 1; they are counted in bins of half a percent.

    Attributes:
      count: Steps.
      median_abs: Median of the absolute error.
      p95_abs: 95th percentile of the absolute error.
      p95_under: 95th percentile of max(0, error): steps that took longer than predicted.
      bias: Mean error.
      within_high: Share of steps that took at most `predict_high`.
    """

    count: int
    median_abs: float
    p95_abs: float
    p95_under: float
    bias: float
    within_high: float


class _ErrorLog:
    def __init__(self) -> None:
        self._all: collections.Counter[tuple[int, bool]] = collections.Counter()
        self._recent: collections.deque[tuple[int, bool]] = collections.deque(maxlen=_RECENT)

    def add(self, log_ratio: float, is_within: bool) -> None:
        entry = (round(log_ratio / _BIN), is_within)
        self._all[entry] += 1
        self._recent.append(entry)

    def summary(self, is_recent: bool) -> LatencyErrors | None:
        entries = collections.Counter(self._recent) if is_recent else self._all
        if not entries:
            return None
        errors = np.expm1(np.asarray([_BIN * index for index, _ in entries]))
        counts = np.asarray(list(entries.values()))
        within = sum(n for (_, is_within), n in entries.items() if is_within)
        return LatencyErrors(
            count=int(counts.sum()),
            median_abs=_quantile(abs(errors), counts, 0.5),
            p95_abs=_quantile(abs(errors), counts, 0.95),
            p95_under=_quantile(np.maximum(errors, 0), counts, 0.95),
            bias=float((errors * counts).sum() / counts.sum()),
            within_high=float(within / counts.sum()),
        )


def _quantile(values: np.ndarray, counts: np.ndarray, share: float) -> float:
    order = np.argsort(values)
    passed = np.cumsum(counts[order]) / counts.sum()
    return float(values[order][np.searchsorted(passed, share - 1e-9)])


# Prediction and correction.

_LEVEL_RATE = 0.3
"""Share of a gap that the machine's level takes up in a step."""
_KIND_RATE = 0.05
"""Share that the kind's deviation takes up."""
_BUCKET_RATE = 0.05
"""Share that the bucket's bias takes up."""
_GAP_LIMIT = 0.15
"""A gap counts for at most this much (natural log) in a correction."""
_FAR_GAP, _FAR_STEPS = 0.5, 2
"""A gap beyond this counts only once that many steps of its kind in a row had such a one."""
_DRAIN = 0.01
"""Share of a kind's deviation that goes over to the machine's level in a step of its kind; and of
a bucket's bias that is given up in a step of its own, for the level to take."""
_FADE = 0.5 ** (1 / 500)
"""What is left of a correction after a step that does not confirm it: half after 500."""
_TAIL_QUANTILE = 0.99
_TAIL_STEPS = 500
_LEAST_NOISE = 0.01


class _Bucket:
    """A bucket's base, and its own bias (natural log)."""

    __slots__ = ("base_ms", "kind", "bias", "updated")

    def __init__(self, base_ms: float, kind: int):
        self.base_ms, self.kind = base_ms, kind
        self.bias, self.updated = 0.0, 0


class _Kind:
    """One kind's deviation from the machine's level (natural log)."""

    __slots__ = ("offset", "num_far", "updated")

    def __init__(self) -> None:
        self.offset = 0.0
        self.num_far = 0  # latest steps in a row that were far off
        self.updated = 0


class _HighQuantile:
    """A quantile of the remaining log ratio, by stochastic approximation."""

    def __init__(self, quantile: float, noise: float):
        self._quantile = quantile
        self._spread = max(noise, _LEAST_NOISE)
        self.value = self._spread * statistics.NormalDist().inv_cdf(quantile)
        self.factor = math.exp(self.value)

    def update(self, gap: float) -> None:
        size = min(abs(gap), 4 * self._spread)
        self._spread = max(self._spread + 0.05 * (size - self._spread), 0.2 * _LEAST_NOISE)
        self.value += 0.2 * self._spread * (self._quantile - (gap <= self.value))
        self.factor = math.exp(self.value)


class _Tail:
    """A far quantile of the remaining log ratio: of the last `_TAIL_STEPS` as they were."""

    def __init__(self, noise: float):
        self._recent: collections.deque[float] = collections.deque()
        self._sorted: list[float] = []
        self._prior = max(noise, _LEAST_NOISE) * statistics.NormalDist().inv_cdf(_TAIL_QUANTILE)

    def update(self, gap: float) -> None:
        self._recent.append(gap)
        bisect.insort(self._sorted, gap)
        if len(self._recent) > _TAIL_STEPS:
            del self._sorted[bisect.bisect_left(self._sorted, self._recent.popleft())]

    @property
    def value(self) -> float:
        count = len(self._sorted)
        if count * (1 - _TAIL_QUANTILE) < 1:  # too few to have met one of those
            return max([self._prior, *self._sorted[-1:]])
        return self._sorted[math.ceil(_TAIL_QUANTILE * count) - 1]


class LatencyModel:
    """Milliseconds of a step, from what it holds.

    Fitted by `fit` or `from_profile`; until then `is_ready` is false and predictions raise. From
    then on every bucket whose parts were measured in some size can be predicted: `missing` names
    those that cannot, to be checked once at start. The fitted base never falls when a bucket grows
    within its kind; what `observe` learns about single buckets may locally break that.

    A correction has a level of the machine, a deviation of each kind of step, and a bias of each
    bucket, all factors. Each takes up a share of what a step's logarithm was off by, of which no
    more than a limit counts, so that one or two outliers move nothing, and a lasting change is
    learnt in some fifteen steps. Kinds that did not run meanwhile follow with the
    machine's level. Deviations and biases that no step confirms any more fade, so that a mix that
    was once slow gets another chance.
    """

    def __init__(self, *, quantile: float = 0.9):
        """Makes a model that is not fitted yet.

        Args:
          quantile: Share of steps that `predict_high` is to cover, above 0 and below 1.

        Raises:
          ValueError: If `quantile` is outside.
        """
        if not 0 < quantile < 1:
            raise ValueError(f"`quantile` must be above 0 and below 1; got {quantile!r}.")
        self._quantile = quantile
        self._coefficients: LatencyCoefficients | None = None
        self._buckets: dict[Bucket, _Bucket] = {}
        self._asked: StepFeatures | None = None
        self._answer = 0.0
        self.reset_errors()

    @classmethod
    def from_profile(cls, profile: LatencyProfile, *, quantile: float = 0.9) -> LatencyModel:
        """A model with a profile's coefficients and no correction."""
        model = cls(quantile=quantile)
        model._start(profile.coefficients)
        return model

    def fit(self, samples: Sequence[LatencySample]) -> None:
        """Fits the model to measured steps; earlier fits and corrections are forgotten.

        Raises:
          ValueError: If there are no samples.
        """
        self._start(fit_coefficients(samples))

    def _start(self, coefficients: LatencyCoefficients) -> None:
        self._coefficients = coefficients
        self._extra = coefficients.extra_ms
        self._buckets = {}
        self._kinds = [_Kind() for _ in range(16)]
        self._level = 0.0
        self._step = 0
        self._high = [_HighQuantile(self._quantile, coefficients.noise) for _ in range(2)]
        self._tail = _Tail(coefficients.noise)
        self._asked = None

    def forget(self) -> None:
        """Goes back to the fit: corrections and errors are forgotten.

        Raises:
          RuntimeError: If the model has not been fitted.
        """
        self._start(self.coefficients)
        self.reset_errors()

    @property
    def is_ready(self) -> bool:
        """Whether the model has been fitted."""
        return self._coefficients is not None

    @property
    def coefficients(self) -> LatencyCoefficients:
        """The fitted coefficients, without corrections.

        Raises:
          RuntimeError: If the model has not been fitted.
        """
        if self._coefficients is None:
            raise RuntimeError("The latency model has no fit yet: measure buckets, or load one.")
        return self._coefficients

    def missing(self, buckets: Iterable[Bucket]) -> list[Bucket]:
        """Buckets that cannot be predicted, because nothing like one of their parts was measured.

        Raises:
          RuntimeError: If the model has not been fitted.
        """
        return [bucket for bucket in buckets if not self.coefficients.covers(bucket)]

    def base_ms(self, bucket: Bucket) -> float:
        """Fitted milliseconds of a bucket that reads no keys and values, without corrections.

        Raises:
          RuntimeError: If the model has not been fitted, or the bucket is `missing`.
        """
        return self._bucket(bucket).base_ms

    def _bucket(self, bucket: Bucket) -> _Bucket:
        found = self._buckets.get(bucket)
        if found is not None:
            return found
        if not self.coefficients.covers(bucket):
            raise RuntimeError(f"The latency model has no measured step like {bucket}.")
        base = max(self.coefficients.base_ms(bucket), LEAST_MS)
        self._buckets[bucket] = made = _Bucket(base, kind_of(bucket))
        return made

    def predict(self, features: StepFeatures) -> float:
        """Expected milliseconds, the median.

        Raises:
          RuntimeError: If the model has not been fitted, or the bucket is `missing`.
        """
        return self._expected_ms(features)

    def predict_high(self, features: StepFeatures) -> float:
        """Milliseconds that the given share of steps stays within, for budgets.

        Raises:
          RuntimeError: If the model has not been fitted, or the bucket is `missing`.
        """
        return self._expected_ms(features) * self._high[features.has_finetuning].factor

    def tail_factor(self) -> float:
        """Factor above `predict_high` within which 99 % of mixed steps stay; at least 1.

        Mixed steps hold decode rows and finetuning: those in which finetuning makes a gap longer.

        Raises:
          RuntimeError: If the model has not been fitted.
        """
        _ = self.coefficients  # raises without a fit
        return math.exp(max(0.0, self._tail.value - self._high[True].value))

    def _expected_ms(self, features: StepFeatures) -> float:
        if features is not self._asked:  # the median and the quantile are asked for in turns
            state = self._bucket(features.bucket)
            factor = math.exp(self._correction(features, state))
            self._answer = self._fitted_ms(features, state) * factor
            self._asked = features
        return self._answer

    def _fitted_ms(self, features: StepFeatures, state: _Bucket) -> float:
        decode, chunk, tile, sample_call, sample_row, loss_call, loss_row, optimizer = self._extra
        ms = state.base_ms + decode * features.decode_kv_tokens + chunk * features.chunk_kv_pairs
        ms += tile * features.tile_kv_pairs + optimizer * features.num_optimizer_steps
        if features.sample_rows:
            ms += sample_call + sample_row * features.sample_rows
        if features.num_losses:
            ms += loss_call * features.num_losses + loss_row * features.loss_rows
        return ms

    def _kind(self, features: StepFeatures, state: _Bucket) -> _Kind:
        return self._kinds[state.kind + 8 * (features.forward_rows > 0)]

    def _correction(self, features: StepFeatures, state: _Bucket) -> float:
        kind, step = self._kind(features, state), self._step
        offset = kind.offset * _FADE ** (step - kind.updated)
        return self._level + offset + state.bias * _FADE ** (step - state.updated)

    def observe(self, features: StepFeatures, ms: float) -> None:
        """Learns from a step that was measured.

        Args:
          features: What it held.
          ms: Milliseconds that it took.

        Raises:
          ValueError: If `ms` is not a finite number above 0.
          RuntimeError: If the model has not been fitted, or the bucket is `missing`.
        """
        if not (math.isfinite(ms) and ms > 0):
            raise ValueError(f"`ms` must be a finite number above 0; got {ms!r}.")
        self._asked = None
        state = self._bucket(features.bucket)
        log_ratio = math.log(ms / self._fitted_ms(features, state))
        gap = log_ratio - self._correction(features, state)
        high = self._high[features.has_finetuning]
        self._errors.add(gap, gap <= high.value)
        high.update(gap)
        if features.has_finetuning and features.decode_rows:
            self._tail.update(gap)
        kind = self._kind(features, state)
        kind.offset *= _FADE ** (self._step - kind.updated)
        state.bias *= (1 - _DRAIN) * _FADE ** (self._step - state.updated)
        gap = log_ratio - self._level - kind.offset - state.bias
        kind.num_far = kind.num_far + 1 if abs(gap) > _FAR_GAP else 0
        is_outlier = 0 < kind.num_far <= _FAR_STEPS
        self._correct(kind, state, 0.0 if is_outlier else gap)
        state.updated = kind.updated = self._step
        self._step += 1

    def _correct(self, kind: _Kind, state: _Bucket, gap: float) -> None:
        """Moves the machine's level, the kind's deviation and the bucket's bias by a gap."""
        drain = _DRAIN * kind.offset
        gap = max(-_GAP_LIMIT, min(gap, _GAP_LIMIT))
        self._level += _LEVEL_RATE * gap + drain
        kind.offset += _KIND_RATE * gap - drain
        state.bias += _BUCKET_RATE * gap

    def errors(self, *, is_recent: bool = False) -> LatencyErrors | None:
        """Errors of predictions since start or `reset_errors`, or of the last 512 steps.

        None before the first step.
        """
        return self._errors.summary(is_recent)

    def reset_errors(self) -> None:
        """Begins a new account of errors; what was learnt stays."""
        self._errors = _ErrorLog()
