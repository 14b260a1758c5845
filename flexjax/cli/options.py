"""Options of the commands, as dataclasses that typer turns into options.

Defaults come from the configuration that an option ends up in, so that they cannot drift. Imports
neither jax nor numpy: `flexjax --help` must be fast.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from pathlib import Path
from typing import Annotated, Any

import typer

from flexjax.config import EngineConfig, FinetuneConfig, LoraConfig, SamplingParams


def _option(group: str, text: str, *names: str, **extra: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=group, **extra)


_MODEL, _PROMPTS, _SAMPLING = "Model", "Prompts", "Sampling"
_DATA, _TRAINING, _ENGINE, _OUTPUT = "Data", "Finetuning", "Engine", "Output"
_ARRIVALS = "Arrivals"

_NO_LIMIT = "default: none"
_MODEL_CONTEXT = "default: the model's, at most 2048"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What every command has."""

    model: Annotated[
        str | None,
        _option(
            _MODEL,
            "Hugging Face directory, or name of a built-in architecture (random weights, no "
            "tokenizer) (default: the tiny model that comes with FlexJAX)",
        ),
    ] = None
    dtype: Annotated[
        str,
        _option(
            _MODEL,
            "Of weights and activations: auto, float32, bfloat16 or float16",
        ),
    ] = EngineConfig.dtype
    max_context_len: Annotated[
        int | None, _option(_MODEL, f"Longest sequence, tokens ({_MODEL_CONTEXT})")
    ] = EngineConfig.max_context_len
    json: Annotated[bool, _option(_OUTPUT, "Print JSON on standard output", "--json")] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Where prompts come from, and how they are written."""

    prompt: Annotated[
        list[str] | None, _option(_PROMPTS, "One or more prompts", show_default=False)
    ] = None
    prompt_file: Annotated[
        Path | None,
        _option(_PROMPTS, "File with one prompt a line (UTF-8; blank lines are skipped)"),
    ] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen; see `SamplingParams`."""

    temperature: Annotated[float, _option(_SAMPLING, "0 for greedy")] = SamplingParams.temperature
    top_k: Annotated[int, _option(_SAMPLING, "Keep the k likeliest tokens; 0 for all")] = (
        SamplingParams.top_k
    )
    top_p: Annotated[
        float, _option(_SAMPLING, "Keep the likeliest tokens up to this probability")
    ] = SamplingParams.top_p
    min_p: Annotated[
        float, _option(_SAMPLING, "Drop tokens less likely than this share of the likeliest")
    ] = SamplingParams.min_p


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """A finetuning job; see `FinetuneConfig` and `LoraConfig`."""

    init_adapter: Annotated[
        Path | None, _option(_TRAINING, "PEFT directory to go on from; its shape is kept")
    ] = None
    adapter_name: Annotated[str, _option(_TRAINING, "Name of the trained adapter")] = "adapter"
    max_steps: Annotated[
        int | None, _option(_TRAINING, "Optimizer steps; overrides --epochs (default: by epochs)")
    ] = FinetuneConfig.max_steps
    batch_size: Annotated[int, _option(_TRAINING, "Sequences per optimizer step")] = (
        FinetuneConfig.batch_size
    )
    learning_rate: Annotated[float, _option(_TRAINING, "Peak learning rate")] = (
        FinetuneConfig.learning_rate
    )
    schedule: Annotated[str, _option(_TRAINING, "constant, linear or cosine")] = (
        FinetuneConfig.schedule
    )
    warmup_ratio: Annotated[
        float, _option(_TRAINING, "Share of the steps in which the learning rate rises")
    ] = FinetuneConfig.warmup_ratio
    max_grad_norm: Annotated[
        float, _option(_TRAINING, "Global norm to clip gradients to; 0 for no clipping")
    ] = FinetuneConfig.max_grad_norm or 0.0
    weight_decay: Annotated[float, _option(_TRAINING, "AdamW's decoupled decay")] = (
        FinetuneConfig.weight_decay
    )
    shuffle: Annotated[bool, _option(_TRAINING, "Shuffle the rows anew each epoch")] = (
        FinetuneConfig.shuffle
    )
    drop_last: Annotated[
        bool, _option(_TRAINING, "Leave out an epoch's last, smaller batch", "--drop-last")
    ] = FinetuneConfig.drop_last
    window: Annotated[
        int | None, _option(_TRAINING, "Rows of a window (default: the engine's, 128)")
    ] = FinetuneConfig.window
    rank: Annotated[int, _option(_TRAINING, "Rank of the adapter", "--rank", "--r")] = LoraConfig.r
    alpha: Annotated[float, _option(_TRAINING, "Scale: alpha / r")] = LoraConfig.alpha
    target_modules: Annotated[
        list[str] | None,
        _option(
            _TRAINING,
            "Adapted linears: all-linear, or names (default: all-linear)",
            show_default=False,
        ),
    ] = None
    rslora: Annotated[
        bool, _option(_TRAINING, "Scale with alpha / sqrt(r) instead", "--rslora")
    ] = LoraConfig.use_rslora
    max_seq_len: Annotated[
        int | None, _option(_DATA, "Longest row, tokens (default: the engine's context)")
    ] = FinetuneConfig.max_seq_len
    overlong: Annotated[str, _option(_DATA, "Longer rows: error, truncate or drop")] = (
        FinetuneConfig.overlong
    )
    eval_data: Annotated[
        Path | None, _option(_DATA, "Rows whose loss is measured without training on them")
    ] = None
    eval_every: Annotated[
        int, _option(_DATA, "Optimizer steps between evaluations; 0 for each epoch's end")
    ] = FinetuneConfig.eval_every
    saved_activations: Annotated[
        str, _option(_ENGINE, "What the forward pass keeps for the backward pass: inputs or full")
    ] = EngineConfig.saved_activations
    tile_order: Annotated[
        str, _option(_ENGINE, "Order of backward tiles: window_major or layer_major")
    ] = EngineConfig.tile_order
    tile_layers: Annotated[
        int | None, _option(_ENGINE, "Layers of a backward tile (default: all)")
    ] = EngineConfig.tile_layers


_WRITE_OVER = Annotated[
    bool, _option(_OUTPUT, "Replace what stands in the output directory", "--overwrite")
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions(SamplingOptions, PromptOptions, ModelOptions):
    """Options of `flexjax generate`."""

    adapter: Annotated[Path | None, _option(_MODEL, "PEFT directory to answer with")] = None
    chat: Annotated[
        bool,
        _option(
            _PROMPTS,
            "Write prompts as a user's turn with the model's chat template, or take them as they "
            "are",
            "--chat/--raw",
        ),
    ] = False
    max_tokens: Annotated[int, _option(_SAMPLING, "Tokens to generate at most")] = (
        SamplingParams.max_tokens
    )
    repetition_penalty: Annotated[
        float, _option(_SAMPLING, "Divides logits of tokens that stand in the text; 1 for none")
    ] = SamplingParams.repetition_penalty
    presence_penalty: Annotated[
        float, _option(_SAMPLING, "Subtracted once from logits of generated tokens")
    ] = SamplingParams.presence_penalty
    frequency_penalty: Annotated[
        float, _option(_SAMPLING, "Subtracted from logits for each time a token was generated")
    ] = SamplingParams.frequency_penalty
    seed: Annotated[
        int | None, _option(_SAMPLING, "Seed of the draws (default: the request's number)")
    ] = SamplingParams.seed
    stop: Annotated[
        list[str] | None, _option(_SAMPLING, "Texts that end the answer", show_default=False)
    ] = None
    ignore_eos: Annotated[
        bool, _option(_SAMPLING, "Go on after the model's end tokens", "--ignore-eos")
    ] = SamplingParams.ignore_eos
    logprobs: Annotated[
        int | None, _option(_SAMPLING, f"Log probabilities of the k likeliest ({_NO_LIMIT})")
    ] = SamplingParams.logprobs


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneOptions(TrainingOptions, ModelOptions):
    """Options of `flexjax finetune`."""

    data: Annotated[Path, _option(_DATA, "JSON lines: messages, prompt/completion, text, ...")]
    output: Annotated[Path, _option(_OUTPUT, "PEFT directory to write")]
    overwrite: _WRITE_OVER = False
    epochs: Annotated[int, _option(_TRAINING, "Passes over the data")] = FinetuneConfig.epochs
    seed: Annotated[int, _option(_TRAINING, "Seed of shuffling and of A's first values")] = (
        FinetuneConfig.seed
    )


DEMO_EPOCHS = 8
COSERVE_MAX_TOKENS = 64
COSERVE_RATE = 8.0
COSERVE_REQUESTS = 200
COSERVE_OUTPUT = "coserve-out"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoserveOptions(TrainingOptions, SamplingOptions, PromptOptions, ModelOptions):
    """Options of `flexjax coserve`."""

    trace: Annotated[
        Path | None,
        _option(
            _ARRIVALS,
            "CSV file arrival_s,context_tokens,generated_tokens, or a file of arrival seconds  "
            "(default: Poisson arrivals)",
        ),
    ] = None
    num_requests: Annotated[int, _option(_ARRIVALS, "Requests (of a trace: at most)")] = (
        COSERVE_REQUESTS
    )
    rate: Annotated[float, _option(_ARRIVALS, "Poisson arrivals per second, without a trace")] = (
        COSERVE_RATE
    )
    time_scale: Annotated[
        float, _option(_ARRIVALS, "Multiplies a trace's times; 0.5 for twice as fast")
    ] = 1.0
    trace_prompt_tokens: Annotated[
        int | None,
        _option(
            _ARRIVALS,
            "Scale a trace's prompts so that the longest has this many tokens  "
            "(default: what the context leaves)",
        ),
    ] = None
    max_tokens: Annotated[
        int | None,
        _option(
            _SAMPLING,
            "Tokens to generate at most; with a CSV trace, outputs are scaled so that the longest "
            f"has this many (default: {COSERVE_MAX_TOKENS}; with a CSV trace a quarter of the "
            "context)",
        ),
    ] = None
    chat: Annotated[
        bool | None,
        _option(
            _PROMPTS,
            "Write --prompt with the model's chat template, or take it as it is "
            "(default: chat when the model has a template)",
            "--chat/--raw",
        ),
    ] = None
    data: Annotated[
        Path | None, _option(_DATA, "JSON lines to finetune on (default: the pirate demo)")
    ] = None
    output: Annotated[
        Path | None,
        _option(
            _OUTPUT,
            "Directory for adapter, figures and picture (default: ./coserve-out, where an earlier "
            "run is replaced)",
        ),
    ] = None
    overwrite: _WRITE_OVER = False
    epochs: Annotated[
        int | None,
        _option(
            _TRAINING,
            f"Passes over the data (default: {FinetuneConfig.epochs}; {DEMO_EPOCHS} over the demo)",
        ),
    ] = None
    seed: Annotated[int, _option(_TRAINING, "Seed of arrivals, draws and finetuning")] = 0
    max_running: Annotated[int, _option(_ENGINE, "Requests that run at once")] = (
        EngineConfig.max_running
    )
    finetune_token_budget: Annotated[
        int | None,
        _option(
            _ENGINE,
            "Finetuning rows per step while requests are alive (default: the largest bucket)",
        ),
    ] = EngineConfig.finetune_token_budget
    step_time_budget_ms: Annotated[
        float | None,
        _option(
            _ENGINE,
            "Take finetuning only as far as steps stay below this while requests are alive  "
            f"({_NO_LIMIT})",
        ),
    ] = EngineConfig.step_time_budget_ms
    slo: Annotated[
        str,
        _option(
            _ENGINE,
            "Latency targets of the requests: interactive (5 s to the first token, 75 ms a token) "
            "or batch (none)",
        ),
    ] = EngineConfig.slo_class
    policy: Annotated[
        str,
        _option(
            _ENGINE,
            "How requests and finetuning share the steps: co_serve, temporal:STEPS, "
            "dynamic_temporal or spatial:SHARE",
        ),
    ] = EngineConfig.policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """Options of `flexjax compile`."""

    model: Annotated[
        str | None,
        _option(
            _MODEL,
            "Name of a built-in architecture, or Hugging Face directory, of which only config.json "
            "is read (default: the tiny model that comes with FlexJAX)",
        ),
    ] = None
    device: Annotated[str, _option(_MODEL, "GPU to compile for: h200, h100 or a100")] = "h200"
    max_context_len: Annotated[
        int | None,
        _option(_ENGINE, "Longest sequence, tokens (default: the model's, at most 8192)"),
    ] = None
    max_running: Annotated[int | None, _option(_ENGINE, "Requests at once (default: 64)")] = None
    saved_activations: Annotated[
        str | None,
        _option(
            _ENGINE,
            "What the forward pass keeps for the backward pass: inputs or full "
            "(default: full where it fits)",
        ),
    ] = None
    tile_layers: Annotated[
        int | None, _option(_ENGINE, "Layers of a backward tile (default: all)")
    ] = EngineConfig.tile_layers
    kernels: Annotated[
        str | None,
        _option(_ENGINE, "reference, llvm, pallas_triton or fused (default: by the device)"),
    ] = None
    floor_context: Annotated[
        int, _option(_OUTPUT, "Tokens that each row sees, in the floor of the step's time")
    ] = 2048
    json: Annotated[bool, _option(_OUTPUT, "Print JSON on standard output", "--json")] = False


def as_signature(function: Any, options: type) -> Any:
    """Gives `function(**options)` the signature that typer reads: one parameter a field."""
    empty = inspect.Parameter.empty
    hints = typing.get_type_hints(options, include_extras=True)
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=empty if field.default is dataclasses.MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(options)
    ]
    function.__signature__ = inspect.Signature(parameters)
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return function
