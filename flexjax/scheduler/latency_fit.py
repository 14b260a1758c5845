"""Fits the latency formula to measured steps. Imports no jax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from flexjax.layout import Bucket
from flexjax.scheduler.features import (
    LEAST_MS,
    LatencyCoefficients,
    LatencySample,
    backward_terms,
    extra_terms,
    forward_terms,
    is_within,
)

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
