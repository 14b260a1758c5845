"""The rows of a step between layers, and what all layers of a step read."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from jaxtyping import Array, Float, Int

from flexjax.autodiff.arena import KVGrads
from flexjax.autodiff.tile import TileRows, sm_scale
from flexjax.cache.pages import KVPool
from flexjax.layout import Bucket, StepSizes, step_fields, unpack
from flexjax.lora.bank import AdapterBank, LoraTree
from flexjax.lora.linear import AdapterRows
from flexjax.model_config import ModelConfig
from flexjax.models.weights import DecoderWeights
from flexjax.optim.sums import GradSums
from pallas_kernels import PageList, group_rows


class Forward(NamedTuple):
    """Forward rows between layers, and what they write.

    Attributes:
      x: Input of the next layer; decode rows first, then chunk rows.
      pool: Keys and values.
      kept: As in `Arena.kept`.
    """

    x: Float[Array, "T D"]
    pool: KVPool
    kept: dict[str, Array]


class Backward(NamedTuple):
    """Rows of the backward tile between layers, and what they add to.

    Attributes:
      dy: Gradient at the output of the next layer down.
      kv_grads: Accumulators of the attention backward.
      sums: Gradient sums of the tile's job.
    """

    dy: Float[Array, "W D"]
    kv_grads: KVGrads
    sums: GradSums


@dataclasses.dataclass(frozen=True)
class Walk:
    """What every layer of one step reads, and what of it is static.

    Attributes:
      config: Architecture; static.
      bucket: Row counts; static.
      sizes: Sizes and choices; static.
      weights: Frozen base.
      bank: Adapters.
      batch: Fields of the packed batch, by name.
      adapters: Adapters of the forward rows; None without any.
      chunk_pages: Pages that the chunk rows may read; None without any.
      tile: Rows of the backward tile; None without one.
    """

    config: ModelConfig
    bucket: Bucket
    sizes: StepSizes
    weights: DecoderWeights
    bank: AdapterBank
    batch: dict[str, Array]
    adapters: AdapterRows | None
    chunk_pages: PageList | None
    tile: TileRows | None

    @classmethod
    def begin(
        cls,
        config: ModelConfig,
        bucket: Bucket,
        sizes: StepSizes,
        weights: DecoderWeights,
        bank: AdapterBank,
        packed: Int[Array, "n"],
    ) -> Walk:
        """Unpacks a batch."""
        batch = unpack(packed, step_fields(bucket, sizes))
        adapters = _adapter_rows(batch, sizes) if bucket.forward else None
        pages = _page_list(batch, "chunk") if bucket.chunk else None
        tile = _tile_rows(batch) if bucket.window else None
        return cls(config, bucket, sizes, weights, bank, batch, adapters, pages, tile)

    @property
    def sm_scale(self) -> float:
        """What attention scores are multiplied by."""
        return sm_scale(self.config)


def _adapter_rows(batch: dict[str, Array], sizes: StepSizes) -> AdapterRows:
    slots = batch["adapter_slots"]
    groups = None if sizes.kernels == "reference" else group_rows(slots, sizes.num_slots)
    return AdapterRows(slots, batch["active_slots"], batch["num_active"], groups)


def _page_list(batch: dict[str, Array], rows: str) -> PageList:
    return PageList(
        batch[f"{rows}_pages"],
        batch[f"{rows}_page_segments"],
        batch[f"{rows}_page_starts"],
        batch[f"num_{rows}_pages"],
    )


def _tile_rows(batch: dict[str, Array]) -> TileRows:
    return TileRows(
        batch["tile_positions"],
        batch["tile_segments"],
        batch["tile_arena_slots"],
        _page_list(batch, "tile"),
        batch["tile_acc_pages"],
    )


def add_layer(sums: GradSums, layer: Int[Array, ""], d_lora: LoraTree) -> GradSums:
    """Adds a layer's gradient of its adapter."""
    added = LoraTree(
        *(
            {name: stack[name].at[layer].add(rows_sum[name]) for name in stack}
            for stack, rows_sum in zip(sums.lora, d_lora, strict=True)
        )
    )
    return sums._replace(lora=added)
