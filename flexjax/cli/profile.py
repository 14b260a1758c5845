"""`flexjax profile`: measures every bucket, and saves what the latency model starts from."""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from flexjax.bench.harness import header
from flexjax.builtin_models import BUILTIN_MODELS
from flexjax.cli.bench_options import EngineSizeOptions, ProfileOptions
from flexjax.cli.common import device_name, make_console, print_json, running
from flexjax.cli.compile import bucket_name
from flexjax.config import EngineConfig
from flexjax.data import tiny_model_dir
from flexjax.engine.profiling import Profiler
from flexjax.engine.runner import Runner
from flexjax.engine.sizing import Sizing
from flexjax.errors import ModelNotFoundError
from flexjax.io.hf_weights import load_weights
from flexjax.io.tokenizer import Tokenizer
from flexjax.model_config import ModelConfig, load_model_config
from flexjax.models.weights import DecoderWeights, random_weights
from flexjax.scheduler.features import COUNTS, EMPTY_BUCKET, LatencySample
from flexjax.scheduler.latency_profile import LatencyProfile, profile_sizes

_CONTEXTS = (0.25, 0.5, 1.0)


@dataclasses.dataclass(frozen=True)
class Measured:
    """The model that is measured, before its weights are read.

    Attributes:
      name: For records.
      source: Directory, or None for random weights.
      model: Architecture.
    """

    name: str
    source: Path | None
    model: ModelConfig

    def weights(self, config: EngineConfig) -> DecoderWeights:
        """Weights in the configured dtype; random ones of the configured seed."""
        dtype = Sizing.derive(self.model, config, jax.default_backend()).dtype
        if self.source is None:
            return random_weights(self.model, dtype, config.seed)
        return load_weights(self.source, self.model, dtype)

    def tokenizer(self) -> Tokenizer:
        """The model's own; for random weights that of the embedded model, whose ids are low."""
        return Tokenizer.from_pretrained(self.source or tiny_model_dir())


def find_measured(model: str | None) -> Measured:
    """Finds the model that `--model` names.

    Raises:
      ModelNotFoundError: If there is none.
    """
    source = tiny_model_dir() if model is None else Path(model)
    if source.is_dir():
        name = "tiny" if model is None else source.resolve().name
        return Measured(name, source, load_model_config(source))
    if model not in BUILTIN_MODELS:
        names = ", ".join(BUILTIN_MODELS)
        raise ModelNotFoundError(
            f"`--model` must be a directory, or one of {names}; got {model!r}."
        )
    return Measured(str(model), None, BUILTIN_MODELS[str(model)])


def size_fields(options: EngineSizeOptions) -> dict[str, Any]:
    """The fields of `EngineConfig` that the options decide."""
    fields: dict[str, Any] = {"max_lora_rank": options.rank}
    for name in ("dtype", "max_context_len", "max_running", "tile_layers", "saved_activations"):
        fields[name] = getattr(options, name)
    for name in ("decode_buckets", "chunk_buckets", "window_buckets", "kernels"):
        if getattr(options, name) is not None:
            fields[name] = getattr(options, name)
    return fields


def sizes_of(config: EngineConfig, sizing: Sizing) -> dict[str, Any]:
    """What a profile must agree with an engine on."""
    return profile_sizes(
        sizing.ladder, page_size=config.page_size, kernels=config.kernels, dtype=sizing.dtype
    )


def read_profile(path: Path, measured: Measured, config: EngineConfig) -> LatencyProfile:
    """Reads a profile for an engine that is to run on this device.

    One that was measured with another jax is warned of: its programs were other ones.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If it is not a profile, or one of another device, model or engine.
    """
    profile = LatencyProfile.load(path)
    sizing = Sizing.derive(measured.model, config, jax.default_backend())
    device = jax.devices()[0].device_kind
    match = profile.matches(device=device, model=measured.name, sizes=sizes_of(config, sizing))
    if not match:
        raise ValueError(f"`--profile` must fit the engine: {' '.join(match.reasons)}")
    versions = header({}, 0)["versions"]
    compilers = {name: versions[name] for name in ("jax", "jaxlib") if name in versions}
    if others := profile.other_versions(compilers):
        warnings.warn(
            f"Measure `--profile` again: {' '.join(others)} Until steps have corrected them, "
            "predictions may be off.",
            stacklevel=2,
        )
    return profile


def run(options: ProfileOptions) -> None:
    """Measures, prints and saves.

    Raises:
      ModelNotFoundError: If there is no such model.
      ValueError: If an option is out of range.
    """
    contexts = tuple(options.contexts or _CONTEXTS)
    for share in contexts:
        if not 0 < share <= 1:
            raise ValueError(f"`--contexts` must be above 0 and at most 1; got {share}.")
    if options.repeats < 1:
        raise ValueError(f"`--repeats` must be at least 1; got {options.repeats}.")
    measured = find_measured(options.model)
    config = EngineConfig(max_jobs=options.max_jobs, **size_fields(options))
    sizing = Sizing.derive(measured.model, config, jax.default_backend())
    device = jax.devices()[0].device_kind
    path = options.output or Path(_file_name(measured.name, device))
    if not path.parent.is_dir():
        raise ValueError(f"`--output` must be in a directory that exists; got {str(path)!r}.")
    console = make_console(is_json=options.json)
    with running():
        with console.status("Compiling"):
            runner = Runner(measured.model, measured.weights(config), config, sizing)
        with console.status(f"Measuring {len(runner.buckets)} buckets"):
            samples = Profiler(runner, repeats=options.repeats).measure(contexts=contexts)
        profile = LatencyProfile.from_samples(
            samples,
            device=device,
            model=measured.name,
            versions=header({}, 0)["versions"],
            sizes=sizes_of(config, sizing),
        )
        profile.save(path)
    if options.json:
        print_json(_summary(profile, path))
    else:
        _print_table(profile, console)
        console.print(f"{device_name()}: {len(samples)} samples in {path}.", highlight=False)


def _file_name(model: str, device: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", f"profile-{model}-{device}").strip("-") + ".json"


def _rows(profile: LatencyProfile) -> list[dict[str, Any]]:
    """Each sample with what the fitted formula says of it."""
    rows = []
    for sample in profile.samples:
        features, fitted = sample.features, profile.coefficients
        counts = {name: n for name in COUNTS if (n := getattr(features, name))}
        rows.append(
            {
                "bucket": list(dataclasses.astuple(features.bucket)),
                "counts": counts,
                "ms": sample.ms,
                "fitted_ms": fitted.base_ms(features.bucket) + fitted.extras_ms(features),
            }
        )
    return rows


def _summary(profile: LatencyProfile, path: Path) -> dict[str, Any]:
    return {
        "output": str(path),
        "device": profile.device,
        "model": profile.model,
        "sizes": profile.sizes,
        "noise": profile.coefficients.noise,
        "samples": _rows(profile),
    }


def _print_table(profile: LatencyProfile, console: Console) -> None:
    table = Table(title=f"Steps of {profile.model} on {profile.device}")
    table.add_column("step")
    table.add_column("reads")
    for name in ("ms", "fitted ms"):
        table.add_column(name, justify="right")
    for sample, row in zip(profile.samples, _rows(profile), strict=True):
        counts = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in row["counts"].items())
        table.add_row(_step_name(sample), counts, f"{row['ms']:.3f}", f"{row['fitted_ms']:.3f}")
    console.print(table)


def _step_name(sample: LatencySample) -> str:
    bucket = sample.features.bucket
    return "without rows" if bucket == EMPTY_BUCKET else bucket_name(bucket)
