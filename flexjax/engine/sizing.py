"""Sizes that follow from a model and an engine configuration. Imports no jax."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys

from flexjax.config import EngineConfig
from flexjax.layout import StepSizes
from flexjax.model_config import ModelConfig
from flexjax.scheduler.buckets import BucketLadder
from flexjax.scheduler.kv_reads import TiledReads

_DEFAULT_CONTEXT = 2048


def has_llvm() -> bool:
    """Whether the kernels for the CPU can run here: `pallas_kernels.can_run_llvm`, without jax."""
    is_known = sys.platform != "win32" and sys.maxsize > 2**32
    return is_known and importlib.util.find_spec("llvmlite") is not None


@dataclasses.dataclass(frozen=True)
class Sizing:
    """Everything whose size is fixed at start.

    Attributes:
      dtype: Of weights, pages and activations.
      max_context_len: Tokens of the longest request or finetuning sequence.
      page_size: Tokens of a page.
      num_pages: KV pages.
      arena_pages: Arena pages; 1 when the engine only serves.
      acc_layers: Layers of the key and value gradient accumulators.
      ladder: Buckets.
      step: Sizes that all buckets share.
      can_finetune: Whether finetuning programs exist.
    """

    dtype: str
    max_context_len: int
    page_size: int
    num_pages: int
    arena_pages: int
    acc_layers: int
    ladder: BucketLadder
    step: StepSizes
    can_finetune: bool

    @classmethod
    def derive(cls, model: ModelConfig, config: EngineConfig, platform: str) -> Sizing:
        """Derives all sizes.

        Args:
          model: Architecture.
          config: What the user asked for.
          platform: "cpu", "gpu", ...: decides the dtype "auto".

        Raises:
          ValueError: If a size exceeds what the model or the rest of the configuration allows.
        """
        context = config.max_context_len or min(model.max_position, _DEFAULT_CONTEXT)
        if context > model.max_position:
            raise ValueError(
                f"`max_context_len` must be at most {model.max_position}, the model's; "
                f"got {context}."
            )
        dtype = config.dtype
        if dtype == "auto":
            dtype = "float32" if platform == "cpu" else model.dtype
        if config.kernels == "llvm" and dtype != "float32":
            raise ValueError(f"`dtype` must be float32 with `kernels`='llvm'; got {dtype}.")
        is_reference = config.kernels == "reference"
        if config.kernels is None and platform == "cpu":
            is_reference = dtype != "float32" or not has_llvm()
        reads = TiledReads(config.page_size) if is_reference else None
        ladder = BucketLadder.from_config(config, model.num_layers, reads)
        pages_per_seq = -(-context // config.page_size)
        can_finetune = config.max_jobs > 0
        finetune_tokens = config.finetune_tokens or max(context, 4 * ladder.max_window)
        if can_finetune and finetune_tokens < context:
            raise ValueError(
                f"`finetune_tokens` must be at least `max_context_len`={context}; "
                f"got {finetune_tokens}."
            )
        # Short sequences leave their last page partly empty: room for that beside the tokens.
        arena_pages = -(-finetune_tokens // config.page_size) + pages_per_seq
        arena_pages = arena_pages if can_finetune else 1
        num_pages = config.num_pages
        if num_pages is None:
            num_pages = config.max_running * pages_per_seq + (arena_pages if can_finetune else 0)
        if num_pages < pages_per_seq:
            raise ValueError(
                f"`num_pages` must be at least {pages_per_seq}, for one sequence of "
                f"`max_context_len`={context} tokens; got {num_pages}."
            )
        step = StepSizes(
            pages_per_seq=pages_per_seq,
            chunk_pages=4 * pages_per_seq + ladder.max_chunk,
            tile_pages=arena_pages,
            num_slots=config.max_adapters,
            kernels=config.kernels,
        )
        acc_layers = model.num_layers if config.tile_order == "window_major" else ladder.tile_layers
        return cls(
            dtype=dtype,
            max_context_len=context,
            page_size=config.page_size,
            num_pages=num_pages,
            arena_pages=arena_pages,
            acc_layers=acc_layers,
            ladder=ladder,
            step=step,
            can_finetune=can_finetune,
        )

    @property
    def group_rows(self) -> int:
        """Rows that a group of short sequences is packed up to."""
        return self.ladder.max_window

    @property
    def arena_tokens(self) -> int:
        """Tokens that a group may hold, counted in whole pages of the arena and of the pool."""
        return min(self.arena_pages, self.num_pages) * self.page_size
