"""Simulated runs of the FlexLLM paper's set-up: the engine's sizes, a roofline profile, the table.

No figure of this file was measured. The H200's step times are counted from shapes and stated
shares of its limits; they show what the scheduler makes of such a device.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flexjax.builtin_models import builtin_model_config
from flexjax.config import EngineConfig
from flexjax.engine.sizing import Sizing
from flexjax.engine.step_cost import head_cost, step_cost
from flexjax.layout import Bucket
from flexjax.model_config import ModelConfig
from flexjax.scheduler.features import LatencySample, StepFeatures
from flexjax.scheduler.kv_reads import causal_pairs
from flexjax.scheduler.latency_profile import LatencyProfile, profile_sizes
from flexjax.simulator import paper
from flexjax.simulator.setup import SimulatedEngine, require_number
from pallas_kernels.roofline import LIMITS, Cost

PAPER_MODEL = "llama-3.1-8b"

PAPER_CONFIG = EngineConfig(
    dtype="bfloat16",
    max_context_len=8192,
    max_running=256,
    page_size=16,
    num_pages=28_672,
    max_adapters=4,
    max_lora_rank=16,
    max_jobs=1,
    finetune_tokens=8192,
    chunk_buckets=(128, 256, 512, 1024),
    window_buckets=(128, 256, 512, 1024),
    kernels="pallas_triton",
)
"""Serving an 8B model on an H200: 56 GiB of KV pages (458,752 tokens), 15 GiB of weights, and an
arena of 16,384 tokens, about 45 GiB with what the backward pass reads; rank-16 adapters."""


def simulated_engine(
    model: ModelConfig | str, config: EngineConfig, platform: str = "gpu"
) -> SimulatedEngine:
    """The sizes that `Engine` would have.

    Args:
      model: Architecture, or the name of a built-in one.
      config: As for `Engine`.
      platform: As in `Sizing.derive`; decides nothing but a dtype.

    Raises:
      ModelNotFoundError: If there is no such model.
      ValueError: If the configuration does not fit the model.
    """
    model = builtin_model_config(model) if isinstance(model, str) else model
    sizing = Sizing.derive(model, config, platform)
    return SimulatedEngine(
        ladder=sizing.ladder,
        sizes=sizing.step,
        num_pages=sizing.num_pages,
        arena_pages=sizing.arena_pages,
        page_size=sizing.page_size,
        max_running=config.max_running,
        max_context_len=sizing.max_context_len,
        num_layers=model.num_layers,
        max_jobs=config.max_jobs,
        tile_order=config.tile_order,
        is_deterministic=config.deterministic_finetuning,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RooflineShares:
    """How much of a device's limits a step is taken to reach. Assumptions, not measurements.

    Attributes:
      bandwidth: Share of the memory bandwidth of a large copy.
      flops: Share of the rate of a large bfloat16 product.
      overhead_ms: Of every step, whatever it holds.
      overlap: Share of the cheaper of forward rows and backward tile that hides behind the other.

    Raises:
      ValueError: If a share of the limits is not in (0, 1], or another value out of range.
    """

    bandwidth: float = 0.75
    flops: float = 0.65
    overhead_ms: float = 1.0
    overlap: float = 0.0

    def __post_init__(self) -> None:
        for name in ("bandwidth", "flops", "overhead_ms"):
            require_number(name, getattr(self, name), is_positive=True)
        require_number("overlap", self.overlap)
        for name in ("bandwidth", "flops", "overlap"):
            if getattr(self, name) > 1:
                raise ValueError(f"`{name}` must be at most 1; got {getattr(self, name)!r}.")


class RooflineDevice:
    """Step times counted from shapes: bytes and FLOPs over shares of a device's limits.

    Rows cost their products and the weights once a pass; keys and values cost by tokens read;
    heads and optimizer steps are counted here, because `step_cost` leaves them out.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        device: str = "h200",
        *,
        shares: RooflineShares | None = None,
    ):
        """Makes a device.

        Args:
          model: Architecture.
          config: Says what is kept for backward, and the adapters' rank.
          device: A key of `LIMITS`.
          shares: None for the defaults.

        Raises:
          ValueError: If nothing is known of the device.
        """
        if device not in LIMITS:
            known = ", ".join(sorted(LIMITS))
            raise ValueError(f"`device` must be one of {known}; got {device!r}.")
        self._model = model
        self._config = config
        self._shares = shares or RooflineShares()
        self._bytes_per_ms = LIMITS[device].bytes_per_s * self._shares.bandwidth / 1e3
        self._flops_per_ms = LIMITS[device].flops_per_s * self._shares.flops / 1e3
        rows, context = 1024, 4096
        decode = self._context_ms(Bucket(1, 0, 0, 0), context)
        chunk = self._context_ms(Bucket(0, rows, 0, 0), context)
        tile = self._context_ms(Bucket(0, 0, rows, 1), context)
        self._kv_ms = (decode / context, chunk / rows / context, tile / rows / context)

    def _time_ms(self, cost: Cost) -> float:
        return max(cost.num_bytes / self._bytes_per_ms, cost.flops / self._flops_per_ms)

    def _cost(self, bucket: Bucket, context_len: int) -> Cost:
        return step_cost(
            self._model,
            bucket,
            context_len=context_len,
            saved_activations=self._config.saved_activations,
            lora_rank=self._config.max_lora_rank,
        )

    def _context_ms(self, bucket: Bucket, context_len: int) -> float:
        """What keys and values add to a bucket."""
        bare, full = self._cost(bucket, 0), self._cost(bucket, context_len)
        return self._time_ms(Cost(full.flops - bare.flops, full.num_bytes - bare.num_bytes))

    def _head_ms(self, rows: int, products: int) -> float:
        """A head of the vocabulary: its weights once a product."""
        return products * self._time_ms(head_cost(self._model, rows))

    def _optimizer_ms(self) -> float:
        """AdamW in float32: weights, two moments and sums read, the first three written."""
        dims = self._model.projection_dims().values()
        params = self._config.max_lora_rank * sum(i + o for i, o in dims)
        return self._time_ms(Cost(0.0, 7 * 4.0 * params * self._model.num_layers))

    def ms(self, features: StepFeatures) -> float:
        """Milliseconds of a step."""
        bucket, shares = features.bucket, self._shares
        forward = backward = 0.0
        if bucket.forward:
            forward = self._time_ms(self._cost(Bucket(bucket.decode, bucket.chunk, 0, 0), 0))
        if bucket.window:
            rows = Bucket(0, 0, bucket.window, bucket.tile_layers)
            backward = self._time_ms(self._cost(rows, 0))
        ms = shares.overhead_ms + forward + backward - shares.overlap * min(forward, backward)
        counts = (features.decode_kv_tokens, features.chunk_kv_pairs, features.tile_kv_pairs)
        ms += sum(cost * count for cost, count in zip(self._kv_ms, counts, strict=True))
        if features.sample_rows:
            ms += self._head_ms(features.sample_rows, 1)
        if features.num_losses:  # logits, then again with their gradient, and that of the input
            ms += features.num_losses * self._head_ms(features.loss_rows // features.num_losses, 3)
        return ms + features.num_optimizer_steps * self._optimizer_ms()


def roofline_profile(
    model: str = PAPER_MODEL,
    config: EngineConfig = PAPER_CONFIG,
    device: str = "h200",
    *,
    shares: RooflineShares | None = None,
) -> LatencyProfile:
    """A latency profile that was counted, NOT measured: source "roofline".

    Every bucket of the engine is "sampled" on a `RooflineDevice` with its rows behind no context, a
    few hundred tokens and the longest, and the formula fitted to that.

    Args:
      model: Name of a built-in architecture.
      config: The engine's.
      device: A key of `pallas_kernels.roofline.LIMITS`.
      shares: Of the device's limits; None for `RooflineShares()`.

    Raises:
      ModelNotFoundError: If there is no such model.
      ValueError: If nothing is known of the device, or the configuration does not fit the model.
    """
    architecture = builtin_model_config(model)
    sizing = Sizing.derive(architecture, config, "gpu")
    roofline = RooflineDevice(architecture, config, device, shares=shares)
    samples = []
    for bucket in sizing.ladder.all_buckets(finetuning=sizing.can_finetune):
        for context in (0, sizing.max_context_len // 16, sizing.max_context_len):
            features = _features(bucket, context, has_optimizer=context == sizing.max_context_len)
            samples.append(LatencySample(features, roofline.ms(features)))
    stated = dataclasses.asdict(shares or RooflineShares())
    return LatencyProfile.from_samples(
        samples,
        device=f"{device} roofline, not measured",
        model=model,
        versions={},
        sizes={
            **profile_sizes(
                sizing.ladder,
                page_size=config.page_size,
                kernels=config.kernels,
                dtype=sizing.dtype,
            ),
            "roofline": stated,
        },
        source="roofline",
        date="2026-11-21T00:00:00+00:00",
    )


def h200_profile(
    model: str = PAPER_MODEL,
    config: EngineConfig = PAPER_CONFIG,
    *,
    shares: RooflineShares | None = None,
) -> LatencyProfile:
    """`roofline_profile` of an H200: counted, NOT measured."""
    return roofline_profile(model, config, "h200", shares=shares)


def _features(bucket: Bucket, context: int, *, has_optimizer: bool) -> StepFeatures:
    """All rows of a bucket behind `context` tokens each; padding only, if that is 0."""
    if not context:
        return StepFeatures(bucket)
    has_tile = bucket.window > 0
    return StepFeatures(
        bucket,
        decode_rows=bucket.decode,
        prefill_rows=bucket.chunk,
        backward_rows=bucket.window,
        decode_kv_tokens=bucket.decode * context,
        chunk_kv_pairs=causal_pairs(context, bucket.chunk),
        tile_kv_pairs=bucket.tile_layers * causal_pairs(context, bucket.window),
        sample_rows=bucket.decode,
        num_losses=int(has_tile),
        loss_rows=bucket.window,
        num_optimizer_steps=int(has_optimizer and has_tile),
    )


def paper_table(
    model: str = PAPER_MODEL,
    config: EngineConfig = PAPER_CONFIG,
    device: str = "h200",
    *,
    shares: RooflineShares | None = None,
    **options: Any,
) -> tuple[paper.PaperRow, ...]:
    """The paper's set-up on a roofline device: every policy at every rate, an hour each.

    Args:
      model: Name of a built-in architecture.
      config: The engine's.
      device: A key of `pallas_kernels.roofline.LIMITS`.
      shares: Of the device's limits; None for `RooflineShares()`.
      **options: Keyword arguments of `flexjax.simulator.paper.paper_table`.

    Raises:
      ModelNotFoundError: If there is no such model.
      ValueError: If a value is out of range.
    """
    profile = roofline_profile(model, config, device, shares=shares)
    return paper.paper_table(profile, simulated_engine(model, config), **options)
