"""What was measured of a device: samples, the formula fitted to them, and the file for both.

Owns the JSON format, and profiles made up from given costs. Imports no jax.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexjax.layout import Bucket
from flexjax.scheduler.buckets import BucketLadder
from flexjax.scheduler.features import (
    COUNTS,
    LatencyCoefficients,
    LatencySample,
    RooflineCosts,
    StepFeatures,
)
from flexjax.scheduler.kv_reads import causal_pairs
from flexjax.scheduler.latency_fit import fit_coefficients

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

    def other_versions(self, versions: Mapping[str, str]) -> tuple[str, ...]:
        """Libraries that the profile was measured with in another version; one sentence each.

        Another compiler makes other programs: predictions are off at first, until the steps that
        run have corrected them.

        Args:
          versions: By name, of this process; names that only one side has are left out.
        """
        return tuple(
            f"`versions.{name}` is {mine!r} in the profile and {versions[name]!r} here."
            for name, mine in self.versions.items()
            if versions.get(name, mine) != mine
        )

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
