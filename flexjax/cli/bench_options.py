"""Options of the commands that measure: `bench` and `profile`. Imports neither jax nor numpy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from flexjax.cli.options import _WRITE_OVER, ModelOptions, _option
from flexjax.config import EngineConfig, FinetuneConfig, LoraConfig

_ARRIVALS, _DATA, _ENGINE, _OUTPUT = "Arrivals", "Data", "Engine", "Output"
_RUNS, _TARGETS = "Runs", "Targets"
_GENERATED_PROMPT, _GENERATED_OUTPUT = 64, 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSizeOptions(ModelOptions):
    """What a step can hold; see `EngineConfig`."""

    max_running: Annotated[int, _option(_ENGINE, "Requests that run at once")] = (
        EngineConfig.max_running
    )
    decode_buckets: Annotated[
        list[int] | None,
        _option(_ENGINE, "Decode rows that steps are compiled for (default: a ladder)"),
    ] = None
    chunk_buckets: Annotated[
        list[int] | None,
        _option(_ENGINE, "Prefill and finetuning-forward rows (default: the engine's)"),
    ] = None
    window_buckets: Annotated[
        list[int] | None, _option(_ENGINE, "Backward rows (default: the engine's)")
    ] = None
    tile_layers: Annotated[
        int | None, _option(_ENGINE, "Layers of a backward tile (default: all)")
    ] = EngineConfig.tile_layers
    saved_activations: Annotated[
        str, _option(_ENGINE, "What the forward pass keeps for the backward pass: inputs or full")
    ] = EngineConfig.saved_activations
    kernels: Annotated[
        str | None,
        _option(_ENGINE, "reference, llvm, pallas_triton or fused (default: by the device)"),
    ] = None
    rank: Annotated[int, _option(_ENGINE, "Largest rank of an adapter", "--rank", "--r")] = (
        LoraConfig.r
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchOptions(EngineSizeOptions):
    """Options of `flexjax bench`."""

    trace: Annotated[
        Path | None,
        _option(
            _ARRIVALS,
            "File with arrivals and perhaps lengths, in a format of `flexjax.workload.read_trace`; "
            "stretched to each rate (default: drawn arrivals)",
        ),
    ] = None
    burstiness: Annotated[
        float,
        _option(_ARRIVALS, "Drawn arrivals: shape of the gamma distribution of gaps; 1: Poisson"),
    ] = 1.0
    rates: Annotated[
        list[float] | None,
        _option(
            _ARRIVALS,
            "Requests per second (default: 10, 30, 50, 70 and 90 % of what the engine can answer, "
            "which is measured first)",
        ),
    ] = None
    prompt_tokens: Annotated[
        int | None,
        _option(
            _ARRIVALS,
            "Mean length of prompts, which goes from a half of it to one and a half; with a trace "
            "that has lengths, they are scaled so that the longest has this many  (default: "
            f"{_GENERATED_PROMPT}; with such a trace three quarters of the context)",
        ),
    ] = None
    output_tokens: Annotated[
        int | None,
        _option(
            _ARRIVALS,
            f"The same of outputs  (default: {_GENERATED_OUTPUT}; with such a trace a quarter of "
            "the context)",
        ),
    ] = None
    adapters: Annotated[
        int, _option(_ARRIVALS, "Random adapters that answer; 0 for the base model")
    ] = 0
    popularity: Annotated[
        str, _option(_ARRIVALS, "How requests are shared among them: distinct, uniform or zipf")
    ] = "uniform"
    data: Annotated[
        Path | None, _option(_DATA, "JSON lines to finetune on (default: the pirate demo)")
    ] = None
    batch_size: Annotated[int, _option(_DATA, "Sequences per optimizer step")] = (
        FinetuneConfig.batch_size
    )
    max_seq_len: Annotated[
        int | None, _option(_DATA, "Longest row, tokens (default: the engine's context)")
    ] = FinetuneConfig.max_seq_len
    overlong: Annotated[str, _option(_DATA, "Longer rows: error, truncate or drop")] = (
        FinetuneConfig.overlong
    )
    ttft_ms: Annotated[float, _option(_TARGETS, "Milliseconds to the first token")] = 1000.0
    tpot_ms: Annotated[
        float | None, _option(_TARGETS, "Milliseconds per token after it (default: by the factor)")
    ] = None
    tpot_factor: Annotated[
        float,
        _option(_TARGETS, "The same, over the time per token of a request that is alone"),
    ] = 3.0
    itl_factor: Annotated[
        float,
        _option(
            _TARGETS,
            "Longest gap between two tokens that co-serving may make of time it saved, over the "
            "TPOT target; 1 caps every gap at it",
        ),
    ] = 4.0
    policies: Annotated[list[str] | None, _option(_RUNS, "Policies to compare (default: all)")] = (
        None
    )
    seconds: Annotated[float, _option(_RUNS, "Seconds of a run")] = 8.0
    tail_seconds: Annotated[
        float,
        _option(_RUNS, "Seconds of them, at the end, in which no request arrives any more"),
    ] = 0.0
    drain_seconds: Annotated[
        float, _option(_RUNS, "Seconds that answers may take after the run")
    ] = 3.0
    repeats: Annotated[int, _option(_RUNS, "Times that everything is run")] = 1
    least_gaps: Annotated[
        int, _option(_RUNS, "Gaps between tokens at each rate that --gaps compares, at least")
    ] = 1000
    burst: Annotated[
        bool,
        _option(
            _RUNS,
            "Also co-serve through ten times a load, up to the highest that is in time",
            "--burst/--no-burst",
        ),
    ] = True
    burst_seconds: Annotated[float, _option(_RUNS, "Seconds of that burst")] = 20.0
    burst_tpot_ms: Annotated[
        float | None,
        _option(
            _TARGETS,
            "Milliseconds per token in the run with the burst, so few that finetuning has to yield "
            "(default: as in the others)",
        ),
    ] = None
    gaps: Annotated[
        bool,
        _option(
            _RUNS, "Also compare gaps between tokens where they are capped", "--gaps/--no-gaps"
        ),
    ] = True
    seed: Annotated[int, _option(_RUNS, "Seed of arrivals, lengths and prompts")] = 0
    profile: Annotated[
        Path | None,
        _option(
            _ENGINE, "What `flexjax profile` wrote (default: the engine measures at its start)"
        ),
    ] = None
    output: Annotated[Path, _option(_OUTPUT, "Directory for records, figures and table")] = Path(
        "bench-out"
    )
    overwrite: _WRITE_OVER = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileOptions(EngineSizeOptions):
    """Options of `flexjax profile`."""

    contexts: Annotated[
        list[float] | None,
        _option(
            _RUNS,
            "Shares of the longest context at which reading it is measured  (default: 0.25 0.5 1)",
        ),
    ] = None
    repeats: Annotated[int, _option(_RUNS, "Runs of each program, of which the median counts")] = 5
    max_jobs: Annotated[int, _option(_ENGINE, "Finetuning jobs at once; 0 to serve only")] = 1
    output: Annotated[
        Path | None, _option(_OUTPUT, "File to write (default: profile-MODEL-DEVICE.json)")
    ] = None
