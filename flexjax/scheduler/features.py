"""What decides how long a step takes, and the formula from there to milliseconds.

Owns the features of a step, measured samples and the coefficients of the formula; where the
coefficients come from, and how they are corrected while steps run, is `latency_model`'s. Imports
no jax.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Iterable

from flexjax.layout import Bucket
from flexjax.scheduler.buckets import BucketLadder
from flexjax.scheduler.kv_reads import decode_kv, seen_pairs, tiled_pairs
from flexjax.scheduler.plan import StepPlan

LEAST_MS = 1e-3
"""No step is predicted to take less."""

EMPTY_BUCKET = Bucket(0, 0, 0, 0)
"""Bucket of a step without rows: loss heads or optimizer steps alone."""


@dataclasses.dataclass(slots=True, unsafe_hash=True)
class StepFeatures:
    """What a step holds, as far as its time depends on it; not to be changed.

    The scheduler makes one of these for each mix that it weighs: nothing is checked here, and
    `frozen` is left out, with which making one takes three times as long.

    Attributes:
      bucket: Shape that the step runs in; `EMPTY_BUCKET` without rows.
      decode_rows: Decode rows that are not padding.
      prefill_rows: Prefill rows that are not padding.
      forward_rows: Finetuning forward rows that are not padding.
      backward_rows: Rows of the backward tile that are not padding.
      decode_kv_tokens: Context tokens that decode rows read, summed over rows; this and the next
        two with padding, where attention computes it (`BucketLadder.reads`).
      chunk_kv_pairs: Tokens attended, summed over prefill and finetuning forward rows.
      tile_kv_pairs: Tokens attended, summed over the tile's rows and over its layers.
      sample_rows: Rows of the sampling head.
      num_losses: Loss windows; each runs the loss head once.
      loss_rows: Rows of all loss windows.
      num_optimizer_steps: Optimizer steps.
    """

    bucket: Bucket
    decode_rows: int = 0
    prefill_rows: int = 0
    forward_rows: int = 0
    backward_rows: int = 0
    decode_kv_tokens: int = 0
    chunk_kv_pairs: int = 0
    tile_kv_pairs: int = 0
    sample_rows: int = 0
    num_losses: int = 0
    loss_rows: int = 0
    num_optimizer_steps: int = 0

    @property
    def has_finetuning(self) -> bool:
        """Whether the step holds finetuning work of any sort."""
        rows = self.forward_rows or self.backward_rows
        return bool(rows or self.num_losses or self.num_optimizer_steps)


COUNTS = tuple(f.name for f in dataclasses.fields(StepFeatures) if f.name != "bucket")
"""Fields of `StepFeatures` that are counts."""


def features_of(
    plan: StepPlan,
    bucket: Bucket | None,
    *,
    decode_kv_tokens: int | None = None,
    ladder: BucketLadder | None = None,
) -> StepFeatures:
    """Reads the features off a plan.

    Args:
      plan: The step.
      bucket: Shape that it runs in; None for a step without rows.
      decode_kv_tokens: Sum of the decode rows' context lengths, from a caller that keeps it; None
        to add it up here.
      ladder: Sizes that the sampling head and the loss head are padded to; None leaves their rows
        as they are. Use one way for all samples of a profile and all predictions from it.

    Raises:
      ValueError: If the bucket is too small for the plan's rows.
    """
    bucket = EMPTY_BUCKET if bucket is None else bucket
    decode_rows, tile = len(plan.decode), plan.tile
    prefill_rows = sum(chunk.length for chunk in plan.prefill)
    forward_rows = sum(piece.length for piece in plan.forward)
    backward_rows, chunk_rows = tile.length if tile else 0, prefill_rows + forward_rows
    if decode_rows > bucket.decode or chunk_rows > bucket.chunk or backward_rows > bucket.window:
        rows = (decode_rows, chunk_rows, backward_rows)
        raise ValueError(f"`bucket` must hold the plan's {rows} rows; got {bucket}.")
    reads = ladder.reads if ladder else None
    if reads:
        chunk_pairs, tile_pairs = tiled_pairs(plan, bucket, reads)
    else:
        chunk_pairs, tile_pairs = seen_pairs(plan)
    if decode_kv_tokens is None:
        decode_kv_tokens = decode_kv(plan.decode.positions, bucket.decode, reads)
    return StepFeatures(
        bucket=bucket,
        decode_rows=decode_rows,
        prefill_rows=prefill_rows,
        forward_rows=forward_rows,
        backward_rows=backward_rows,
        decode_kv_tokens=decode_kv_tokens,
        chunk_kv_pairs=chunk_pairs,
        tile_kv_pairs=tile_pairs,
        sample_rows=_padded(len(plan.samples), ladder.decode if ladder else None),
        num_losses=len(plan.losses),
        loss_rows=sum(_padded(w.length, ladder.window if ladder else None) for w in plan.losses),
        num_optimizer_steps=len(plan.optimizer_steps),
    )


def _padded(rows: int, sizes: tuple[int, ...] | None) -> int:
    return sizes[bisect.bisect_left(sizes, rows)] if sizes and rows else rows


@dataclasses.dataclass(frozen=True, slots=True)
class LatencySample:
    """A step that was measured.

    Attributes:
      features: What it held.
      ms: Milliseconds, the median of the repeats.
      repeats: Runs behind it; weighs the sample.

    Raises:
      ValueError: If `ms` is not a positive number, `repeats` is not positive, a feature is not a
        count, or the rows do not fit the bucket.
    """

    features: StepFeatures
    ms: float
    repeats: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ms) and self.ms > 0):
            raise ValueError(f"`ms` must be a finite number above 0; got {self.ms!r}.")
        if self.repeats < 1:
            raise ValueError(f"`repeats` must be at least 1; got {self.repeats!r}.")
        features, bucket = self.features, self.features.bucket
        counts = {name: getattr(features, name) for name in COUNTS}
        counts |= {f"bucket.{name}": size for name, size in dataclasses.asdict(bucket).items()}
        for name, value in counts.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"`{name}` must be an integer of at least 0; got {value!r}.")
        chunk_rows = features.prefill_rows + features.forward_rows
        rows = (features.decode_rows, chunk_rows, features.backward_rows)
        sizes = (bucket.decode, bucket.chunk, bucket.window)
        if any(n > size for n, size in zip(rows, sizes, strict=True)):
            raise ValueError(f"`bucket` must hold the step's {rows} rows; got {bucket}.")


def kind_of(bucket: Bucket) -> int:
    """Which parts a bucket has: 1 for decode, 2 for chunk, 4 for window, added up."""
    return (bucket.decode > 0) + 2 * (bucket.chunk > 0) + 4 * (bucket.window > 0)


def forward_terms(bucket: Bucket, knots: tuple[int, ...]) -> list[float]:
    """Regressors of the forward rows; none falls when the bucket grows within its kind."""
    has_decode, has_chunk = float(bucket.decode > 0), float(bucket.chunk > 0)
    some = float(bucket.forward > 0)
    sizes = [some, has_decode, has_chunk, float(bucket.decode), float(bucket.chunk)]
    return sizes + _ramps(bucket.forward, knots)


def backward_terms(bucket: Bucket, knots: tuple[int, ...]) -> list[float]:
    """Regressors of the backward tile; none falls when the bucket grows within its kind."""
    some = float(bucket.window > 0)
    sizes = [some, some * bucket.tile_layers, float(bucket.window)]
    return sizes + _ramps(bucket.window * bucket.tile_layers, knots)


def _ramps(size: int, knots: tuple[int, ...]) -> list[float]:
    """Splits `size` at the knots: weights >= 0 on the parts make any rising piecewise line."""
    starts = (0, *knots)
    ends = (*knots, math.inf)
    return [float(max(0, min(size, end) - start)) for start, end in zip(starts, ends, strict=True)]


EXTRA_TERMS = (
    "decode_kv_tokens",
    "chunk_kv_pairs",
    "tile_kv_pairs",
    "has_samples",
    "sample_rows",
    "num_losses",
    "loss_rows",
    "num_optimizer_steps",
)
"""Regressors beside the bucket's: attention by tokens read, heads by calls and rows."""


def extra_terms(features: StepFeatures) -> tuple[float, ...]:
    """Values of `EXTRA_TERMS`."""
    return (
        float(features.decode_kv_tokens),
        float(features.chunk_kv_pairs),
        float(features.tile_kv_pairs),
        float(features.sample_rows > 0),
        float(features.sample_rows),
        float(features.num_losses),
        float(features.loss_rows),
        float(features.num_optimizer_steps),
    )


def is_within(small: Bucket, large: Bucket) -> bool:
    """Whether two buckets are of one kind and no size of the first exceeds the second's."""
    return (
        small.decode <= large.decode
        and small.chunk <= large.chunk
        and small.window <= large.window
        and small.tile_layers <= large.tile_layers
        and kind_of(small) == kind_of(large)
    )


def _dot(coefficients: Iterable[float], terms: Iterable[float]) -> float:
    return math.fsum(c * t for c, t in zip(coefficients, terms, strict=True))


@dataclasses.dataclass(frozen=True)
class LatencyCoefficients:
    """The formula's coefficients, none below 0.

    With F and G the dot products of forward and backward coefficients with the bucket's terms:

      regression(bucket) = fixed + F + G - overlap * min(F, G)
      base(bucket)       = regression, moved between what was measured for smaller and for larger
                           buckets of its kind (for a measured bucket: what was measured)
      ms(features)       = base(bucket) + extra coefficients . extra terms

    Attributes:
      fixed_ms: Cost of any step.
      forward_knots: Forward rows where the cost per row may change.
      forward_ms: Per forward term.
      backward_knots: Backward rows x layers where the cost may change.
      backward_ms: Per backward term.
      overlap: Share of the smaller of F and G that hides behind the larger, 0 to 1.
      extra_ms: Per term of `EXTRA_TERMS`.
      measured_ms: Base of each measured bucket; never falls when a bucket grows within its kind.
      noise: Standard deviation of log(measured / formula), robust.
    """

    fixed_ms: float
    forward_knots: tuple[int, ...]
    forward_ms: tuple[float, ...]
    backward_knots: tuple[int, ...]
    backward_ms: tuple[float, ...]
    overlap: float
    extra_ms: tuple[float, ...]
    measured_ms: tuple[tuple[Bucket, float], ...]
    noise: float

    def __post_init__(self) -> None:
        terms = {
            "forward_ms": len(forward_terms(EMPTY_BUCKET, self.forward_knots)),
            "backward_ms": len(backward_terms(EMPTY_BUCKET, self.backward_knots)),
            "extra_ms": len(EXTRA_TERMS),
        }
        for name, count in terms.items():
            if len(getattr(self, name)) != count:
                raise ValueError(f"`{name}` must have {count} values; got {getattr(self, name)}.")
        costs = {"forward_ms": self.forward_ms, "backward_ms": self.backward_ms}
        costs |= {"extra_ms": self.extra_ms, "measured_ms": [ms for _, ms in self.measured_ms]}
        costs |= {"fixed_ms": [self.fixed_ms], "noise": [self.noise], "overlap": [self.overlap]}
        for name, values in costs.items():
            if not all(math.isfinite(v) and v >= 0 for v in values):
                raise ValueError(f"`{name}` must be finite and at least 0; got {values}.")
        if self.overlap > 1:
            raise ValueError(f"`overlap` must be at most 1; got {self.overlap}.")
        if not self.measured_ms:
            raise ValueError("`measured_ms` must have at least one bucket; got none.")

    def covers(self, bucket: Bucket) -> bool:
        """Whether something like each part of the bucket was measured.

        Decode and chunk rows stand in for one another, because they share the matrix products;
        the backward tile must have been measured in some size.
        """
        has_forward = any(measured.forward for measured, _ in self.measured_ms)
        has_window = any(measured.window for measured, _ in self.measured_ms)
        return (has_forward or not bucket.forward) and (has_window or not bucket.window)

    def regression_ms(self, bucket: Bucket) -> float:
        """Milliseconds of a bucket by its sizes alone."""
        forward = _dot(self.forward_ms, forward_terms(bucket, self.forward_knots))
        backward = _dot(self.backward_ms, backward_terms(bucket, self.backward_knots))
        return self.fixed_ms + forward + backward - self.overlap * min(forward, backward)

    def base_ms(self, bucket: Bucket) -> float:
        """Milliseconds of a bucket without the extra terms; rises with it within its kind."""
        below = [ms for measured, ms in self.measured_ms if is_within(measured, bucket)]
        above = [ms for measured, ms in self.measured_ms if is_within(bucket, measured)]
        base = max(below, default=0.0)
        return min(max(self.regression_ms(bucket), base), min(above, default=math.inf))

    def extras_ms(self, features: StepFeatures) -> float:
        """Milliseconds of attention by tokens read, of the heads and of optimizer steps."""
        return _dot(self.extra_ms, extra_terms(features))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RooflineCosts:
    """Costs of a made-up device, for tests and the simulator; milliseconds.

    Attributes:
      fixed: Of any step.
      forward_floor: Reading the weights once for the forward rows.
      forward_row: Per forward row of the bucket, once the floor is reached.
      backward_floor: Reading the weights for the tile, per layer.
      backward_row: Per row and layer of the tile, once the floor is reached.
      decode_kv: Per context token that a decode row reads.
      chunk_kv: Per token attended by a chunk row.
      tile_kv: Per token attended by a row of the tile, and layer.
      head_floor: Reading the vocabulary's weights, per run of a head.
      head_row: Per row of a head.
      optimizer: Per optimizer step.
      overlap: Share of the cheaper side, forward or backward, that hides behind the other.

    Raises:
      ValueError: If a cost is negative or not finite, `overlap` exceeds 1, or `fixed` is 0.
    """

    fixed: float = 0.5
    forward_floor: float = 4.0
    forward_row: float = 0.02
    backward_floor: float = 0.13
    backward_row: float = 0.0012
    decode_kv: float = 3e-5
    chunk_kv: float = 1e-6
    tile_kv: float = 1e-7
    head_floor: float = 0.25
    head_row: float = 0.001
    optimizer: float = 1.0
    overlap: float = 0.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"`{name}` must be finite and at least 0; got {value!r}.")
        if self.overlap > 1:
            raise ValueError(f"`overlap` must be at most 1; got {self.overlap!r}.")
        if self.fixed == 0:
            raise ValueError("`fixed` must be above 0; got 0.")

    def ms(self, features: StepFeatures) -> float:
        """Milliseconds that the device takes for a step."""
        bucket = features.bucket
        forward = backward = 0.0
        if bucket.forward:
            forward = max(self.forward_floor, self.forward_row * bucket.forward)
        if bucket.window:
            row_cost = max(self.backward_floor, self.backward_row * bucket.window)
            backward = bucket.tile_layers * row_cost
        heads = (features.sample_rows > 0) + features.num_losses
        return (
            self.fixed
            + forward
            + backward
            - self.overlap * min(forward, backward)
            + self.decode_kv * features.decode_kv_tokens
            + self.chunk_kv * features.chunk_kv_pairs
            + self.tile_kv * features.tile_kv_pairs
            + self.head_floor * heads
            + self.head_row * (features.sample_rows + features.loss_rows)
            + self.optimizer * features.num_optimizer_steps
        )
