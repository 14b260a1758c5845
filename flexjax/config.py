"""Configuration that users write: engine, sampling, LoRA and finetuning.

Frozen dataclasses, checked when they are made: a value that cannot be used is refused with its
name, the rule and the value, and nothing is clamped. Imports no jax.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexjax.slo import resolve_slo

LORA_TARGETS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
"""The linears that a LoRA can adapt, by Hugging Face name, in the order of the layer."""


KERNELS = ("reference", "llvm", "pallas_triton", "fused")
"""Values of `EngineConfig.kernels`, beside None."""


def _require(condition: bool, name: str, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"`{name}` must be {rule}; got {value!r}.")


def _require_int(name: str, value: object, minimum: int) -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    _require(is_int and value >= minimum, name, f"an integer >= {minimum}", value)  # type: ignore[operator]


def _require_number(name: str, value: object, low: float, high: float = math.inf) -> None:
    rule = f"a number >= {low}" if high == math.inf else f"a number in [{low}, {high}]"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    is_inside = is_number and math.isfinite(value) and low <= value <= high  # type: ignore[arg-type,operator]
    _require(bool(is_inside), name, rule, value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    Attributes:
      max_tokens: Tokens to generate at most.
      temperature: 0 for greedy; otherwise logits are divided by it.
      top_k: Keep the `top_k` most likely tokens; 0 keeps all.
      top_p: Keep the smallest set of tokens whose probability reaches `top_p`.
      min_p: Drop tokens less likely than `min_p` times the likeliest.
      seed: Seed of this request's draws; None takes the request's number. With a seed, the draws do
        not depend on what else is in the batch.
      repetition_penalty: Divides positive (multiplies negative) logits of tokens that stand in the
        prompt or the output; 1 for none.
      presence_penalty: Subtracted once from the logits of tokens that stand in the output.
      frequency_penalty: Subtracted from the logits for each occurrence in the output.
      stop: Text that ends the generation; not part of the returned text.
      stop_token_ids: Tokens that end the generation, besides the model's own end tokens.
      ignore_eos: Whether to go on after the model's end tokens.
      logprobs: None for none; k for the chosen token's log probability and the k likeliest beside
        it (at most `MAX_LOGPROBS`). Taken before temperature and penalties.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    MAX_LOGPROBS = 20
    MAX_TEMPERATURE = 100.0

    def __post_init__(self) -> None:
        _require_int("max_tokens", self.max_tokens, 1)
        _require_number("temperature", self.temperature, 0.0, self.MAX_TEMPERATURE)
        _require_int("top_k", self.top_k, 0)
        _require_number("top_p", self.top_p, 0.0, 1.0)
        _require(self.top_p > 0, "top_p", "in (0, 1]", self.top_p)
        _require_number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _require_int("seed", self.seed, 0)
            _require(self.seed < 2**31, "seed", "below 2**31", self.seed)
        _require_number("repetition_penalty", self.repetition_penalty, 0.0)
        _require(self.repetition_penalty > 0, "repetition_penalty", "> 0", self.repetition_penalty)
        _require_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.logprobs is not None:
            _require_int("logprobs", self.logprobs, 0)
            limit = self.MAX_LOGPROBS
            _require(self.logprobs <= limit, "logprobs", f"at most {limit}", self.logprobs)
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        for text in stop:
            _require(isinstance(text, str) and text != "", "stop", "non-empty text", text)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for token in self.stop_token_ids:
            _require_int("stop_token_ids", token, 0)

    @property
    def has_penalties(self) -> bool:
        """Whether any penalty changes the logits."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Shape and scale of a LoRA (names as in PEFT, `alpha` being its `lora_alpha`).

    Attributes:
      r: Rank.
      alpha: Numerator of the scale: alpha / r, or alpha / sqrt(r) with `use_rslora`.
      target_modules: "all-linear", or names out of `LORA_TARGETS`.
      use_rslora: Whether the scale is alpha / sqrt(r).
      layers_to_transform: Layers that get an adapter; None for all.
    """

    r: int = 16
    alpha: float = 32.0
    target_modules: str | Sequence[str] = "all-linear"
    use_rslora: bool = False
    layers_to_transform: Sequence[int] | None = None

    def __post_init__(self) -> None:
        _require_int("r", self.r, 1)
        _require_number("alpha", self.alpha, 0.0)
        if isinstance(self.target_modules, str):
            _require(
                self.target_modules == "all-linear",
                "target_modules",
                f"'all-linear' or a list out of {', '.join(LORA_TARGETS)}",
                self.target_modules,
            )
        else:
            names = tuple(self.target_modules)
            _require(len(names) > 0, "target_modules", "non-empty", names)
            for name in names:
                rule = f"out of {', '.join(LORA_TARGETS)}"
                _require(name in LORA_TARGETS, "target_modules", rule, name)
            ordered = tuple(name for name in LORA_TARGETS if name in names)
            object.__setattr__(self, "target_modules", ordered)
        if self.layers_to_transform is not None:
            layers = tuple(sorted(set(self.layers_to_transform)))
            _require(len(layers) > 0, "layers_to_transform", "non-empty or None", layers)
            for layer in layers:
                _require_int("layers_to_transform", layer, 0)
            object.__setattr__(self, "layers_to_transform", layers)

    @property
    def targets(self) -> tuple[str, ...]:
        """The adapted linears, by name, in the order of the layer."""
        return LORA_TARGETS if isinstance(self.target_modules, str) else tuple(self.target_modules)

    @property
    def scale(self) -> float:
        """What multiplies x A B."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes and choices that are fixed when an engine starts.

    Attributes:
      dtype: Dtype of weights, KV pages and activations: "auto" (the model's own on a GPU, float32
        on a CPU), "float32", "bfloat16" or "float16".
      max_context_len: Longest request or finetuning sequence, tokens; None takes the model's, at
        most 2,048.
      max_running: Requests that can run at once.
      page_size: Tokens per KV page; a power of two.
      num_pages: KV pages; None for enough that `max_running` requests and the finetuning arena
        can be at full length at once.
      max_adapters: Slots of the adapter bank.
      max_lora_rank: R, the largest rank that fits a slot.
      max_jobs: Finetuning jobs that can run at once; the others wait their turn. 0 for an engine
        that only serves: it compiles less and has no arena.
      finetune_tokens: Tokens whose activations are held for backward at once (the arena); None for
        the larger of four windows and `max_context_len`.
      decode_buckets: Numbers of decode rows that steps are compiled for; None for a ladder up to
        `max_running`.
      chunk_buckets: Numbers of prefill and finetuning-forward rows that steps are compiled for.
      window_buckets: Numbers of backward rows that steps are compiled for.
      tile_layers: Layers of one backward tile; None for all.
      tile_order: "window_major" (a window through all layers, then the window before it) or
        "layer_major" (all windows of one range of layers, then the layers below).
      saved_activations: What the forward pass keeps for the backward pass, beside keys and values:
        "inputs" (layer inputs; the rest is recomputed), or "full" (whatever the backward pass
        reads; no matrix product is repeated).
      policy: How requests and jobs share the steps: "co_serve" (finetuning takes what the tightest
        latency target leaves free), or, for comparison, "temporal:STEPS", "dynamic_temporal",
        "spatial:SHARE", "inference_only" or "finetune_only"; see `flexjax.scheduler.policy`.
      slo_class: Latency targets of requests that bring none: "interactive" (5 s to the first
        token, 75 ms a token) or "batch" (none).
      finetune_token_budget: Finetuning rows per step, forward and backward together, while
        requests are alive; None for the largest bucket. With `policy`="co_serve" only.
      step_time_budget_ms: While requests are alive, finetuning is taken only as far as steps are
        expected to stay below this; None for no limit but the requests' own. With
        `policy`="co_serve" only.
      kernels: "reference" (plain jnp), "llvm" (kernels for the CPU, float32 only; needs llvmlite),
        "pallas_triton" (one Triton kernel per op), or "fused" (the attention of forward rows and of
        the backward tile in one launch, and so their matrix products where they meet); None for
        whatever can run on the device. A named one never falls back: Triton kernels need an NVIDIA
        GPU.
      deterministic_finetuning: Whether finetuning forward rows run in steps without other forward
        rows, so that the trained bits do not depend on the inference load. Such steps are as large
        as they would be without requests, whatever latency targets leave free.
      compile_cache_dir: Where compiled programs are kept between runs; None for
        `$FLEXJAX_CACHE_DIR` or `~/.cache/flexjax`. "" turns the cache off.
      seed: Seed of random weights (built-in architectures).
    """

    dtype: str = "auto"
    max_context_len: int | None = None
    max_running: int = 16
    page_size: int = 16
    num_pages: int | None = None
    max_adapters: int = 8
    max_lora_rank: int = 16
    max_jobs: int = 2
    finetune_tokens: int | None = None
    decode_buckets: Sequence[int] | None = None
    chunk_buckets: Sequence[int] = (32, 128)
    window_buckets: Sequence[int] = (128,)
    tile_layers: int | None = None
    tile_order: str = "window_major"
    saved_activations: str = "full"
    policy: str = "co_serve"
    slo_class: str = "interactive"
    finetune_token_budget: int | None = None
    step_time_budget_ms: float | None = None
    kernels: str | None = None
    deterministic_finetuning: bool = False
    compile_cache_dir: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        dtypes = ("auto", "float32", "bfloat16", "float16")
        _require(self.dtype in dtypes, "dtype", f"one of {', '.join(dtypes)}", self.dtype)
        for name in ("max_running", "max_adapters", "max_lora_rank"):
            _require_int(name, getattr(self, name), 1)
        _require_int("max_jobs", self.max_jobs, 0)
        _require_int("page_size", self.page_size, 1)
        is_power = self.page_size & (self.page_size - 1) == 0
        _require(is_power, "page_size", "a power of two", self.page_size)
        for name in ("max_context_len", "num_pages", "finetune_tokens", "finetune_token_budget"):
            if getattr(self, name) is not None:
                _require_int(name, getattr(self, name), 1)
        if self.tile_layers is not None:
            _require_int("tile_layers", self.tile_layers, 1)
        if self.step_time_budget_ms is not None:
            _require_number("step_time_budget_ms", self.step_time_budget_ms, 0.0)
        for name in ("finetune_token_budget", "step_time_budget_ms"):
            is_co_serve = self.policy == "co_serve" or getattr(self, name) is None
            _require(is_co_serve, name, "None unless `policy` is 'co_serve'", getattr(self, name))
        resolve_slo(None, self.slo_class)
        for name in ("decode_buckets", "chunk_buckets", "window_buckets"):
            self._check_buckets(name)
        orders = ("window_major", "layer_major")
        _require(self.tile_order in orders, "tile_order", f"one of {orders}", self.tile_order)
        is_known = self.kernels is None or self.kernels in KERNELS
        _require(is_known, "kernels", f"None or one of {', '.join(KERNELS)}", self.kernels)
        policies = ("inputs", "full")
        _require(
            self.saved_activations in policies,
            "saved_activations",
            f"one of {policies}",
            self.saved_activations,
        )
        is_kept = self.kernels != "fused" or self.saved_activations == "full"
        rule = "'full' with `kernels`='fused'"
        _require(is_kept, "saved_activations", rule, self.saved_activations)

    def _check_buckets(self, name: str) -> None:
        value = getattr(self, name)
        if value is None and name == "decode_buckets":
            return
        buckets = tuple(value or ())
        _require(len(buckets) > 0, name, "non-empty", buckets)
        for size in buckets:
            _require_int(name, size, 1)
        _require(sorted(set(buckets)) == list(buckets), name, "strictly increasing", buckets)
        object.__setattr__(self, name, buckets)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """One finetuning job.

    Attributes:
      adapter: Name under which the trained adapter is served and saved.
      dataset: Path of a JSONL file, or rows (dicts), as `flexjax.io.dataset` reads them.
      lora: Shape of the adapter; ignored when `init_adapter` is given.
      init_adapter: PEFT directory to go on from.
      epochs: Passes over the dataset.
      max_steps: Optimizer steps; overrides `epochs`, going round the dataset as often as needed.
      batch_size: Sequences per optimizer step.
      learning_rate: Peak learning rate.
      schedule: "constant", "linear" or "cosine" (both to zero), after the warm-up.
      warmup_ratio: Share of the steps in which the learning rate rises linearly from zero.
      max_grad_norm: Global norm that gradients are clipped to; None for no clipping.
      weight_decay: AdamW's decoupled decay.
      beta1: Decay of AdamW's first moment.
      beta2: Decay of AdamW's second moment.
      eps: Added to the root of the second moment.
      max_seq_len: Longest sequence, tokens; None for the engine's context.
      overlong: What to do with longer rows: "error", "truncate" (cut at the end) or "drop"; the
        last two are reported as job events.
      window: Rows of a window at most; None for the engine's largest window bucket.
      shuffle: Whether rows are shuffled anew each epoch.
      drop_last: Whether an epoch's last, smaller batch is left out.
      seed: Seed of the shuffling and of A's initial values.
      eval_dataset: Rows whose loss is measured, without training on them.
      eval_every: Optimizer steps between evaluations; 0 for each epoch's end.
      publish_every: Optimizer steps between publications to live requests; 0 for the end only.
      weight: Share of this job among running jobs.
    """

    adapter: str
    dataset: str | Path | Sequence[Mapping[str, Any]]
    lora: LoraConfig = LoraConfig()
    init_adapter: str | Path | None = None
    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 8
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup_ratio: float = 0.03
    max_grad_norm: float | None = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_seq_len: int | None = None
    overlong: str = "error"
    window: int | None = None
    shuffle: bool = True
    drop_last: bool = False
    seed: int = 0
    eval_dataset: str | Path | Sequence[Mapping[str, Any]] | None = None
    eval_every: int = 0
    publish_every: int = 0
    weight: float = 1.0

    def __post_init__(self) -> None:
        is_name = isinstance(self.adapter, str) and self.adapter.strip() != ""
        _require(is_name, "adapter", "a non-empty name", self.adapter)
        for name in ("epochs", "batch_size"):
            _require_int(name, getattr(self, name), 1)
        for name in ("max_steps", "window"):
            if getattr(self, name) is not None:
                _require_int(name, getattr(self, name), 1)
        if self.max_seq_len is not None:
            _require_int("max_seq_len", self.max_seq_len, 2)
        _require_number("learning_rate", self.learning_rate, 0.0)
        kinds = ("constant", "linear", "cosine")
        _require(self.schedule in kinds, "schedule", f"one of {', '.join(kinds)}", self.schedule)
        _require_number("warmup_ratio", self.warmup_ratio, 0.0, 1.0)
        if self.max_grad_norm is not None:
            _require_number("max_grad_norm", self.max_grad_norm, 0.0)
            _require(self.max_grad_norm > 0, "max_grad_norm", "> 0 or None", self.max_grad_norm)
        _require_number("weight_decay", self.weight_decay, 0.0)
        for name in ("beta1", "beta2"):
            _require_number(name, getattr(self, name), 0.0, 1.0)
            _require(getattr(self, name) < 1, name, "in [0, 1)", getattr(self, name))
        _require_number("eps", self.eps, 0.0)
        choices = ("error", "truncate", "drop")
        _require(self.overlong in choices, "overlong", f"one of {choices}", self.overlong)
        _require_int("seed", self.seed, 0)
        _require_int("eval_every", self.eval_every, 0)
        _require_int("publish_every", self.publish_every, 0)
        _require_number("weight", self.weight, 0.0)
        _require(self.weight > 0, "weight", "> 0", self.weight)
