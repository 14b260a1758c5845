"""Static shapes of a step, and how a batch travels to the device in one array.

A bucket says how many rows of each kind a compiled step has. All integers of a batch lie in one
int32 vector, so that a step costs one host-to-device copy; the jitted function slices it back into
named fields. Imports no jax.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """Rows that a step is compiled for.

    Attributes:
      decode: Rows with one sequence each.
      chunk: Prefill and finetuning-forward rows.
      window: Rows of the backward tile.
      tile_layers: Layers of the backward tile; 0 without one.
    """

    decode: int
    chunk: int
    window: int
    tile_layers: int

    @property
    def forward(self) -> int:
        """T: all forward rows."""
        return self.decode + self.chunk

    @property
    def only_decodes(self) -> bool:
        """Whether there are decode rows alone, each of which samples a token."""
        return self.decode > 0 and not self.chunk and not self.window


@dataclasses.dataclass(frozen=True)
class StepSizes:
    """Sizes and choices that all buckets share.

    Attributes:
      pages_per_seq: M, entries of a decode row's page table.
      chunk_pages: Entries of the page list of the chunk rows.
      tile_pages: Entries of the page list of the backward tile.
      num_slots: A, adapter slots.
      kernels: `EngineConfig.kernels`.
    """

    pages_per_seq: int
    chunk_pages: int
    tile_pages: int
    num_slots: int
    kernels: str | None = None

    @property
    def implementation(self) -> str | None:
        """Implementation that each op is asked for."""
        return "pallas_triton" if self.is_fused else self.kernels

    @property
    def is_fused(self) -> bool:
        """Whether forward rows and the backward tile share launches."""
        return self.kernels == "fused"


@functools.cache
def step_fields(bucket: Bucket, sizes: StepSizes) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a step's integer fields, in the order in which they are packed.

    Forward rows are decode rows first, then chunk rows. -1 is padding everywhere.
    """
    fields: dict[str, tuple[int, ...]] = {}
    if bucket.forward:
        rows = (bucket.forward,)
        fields |= {"tokens": rows, "positions": rows, "kv_slots": rows}
        fields |= {"adapter_slots": rows, "sample_slots": rows}
        fields |= {"active_slots": (sizes.num_slots,), "num_active": ()}
    if bucket.decode:
        fields["feed_slots"] = (bucket.decode,)
        fields["decode_pages"] = (bucket.decode, sizes.pages_per_seq)
    if bucket.chunk:
        fields |= {"chunk_segments": (bucket.chunk,), "chunk_arena_slots": (bucket.chunk,)}
        pages = (sizes.chunk_pages,)
        fields |= {"chunk_pages": pages, "chunk_page_segments": pages, "chunk_page_starts": pages}
        fields["num_chunk_pages"] = ()
    if bucket.window:
        rows, pages = (bucket.window,), (sizes.tile_pages,)
        fields |= {"tile_positions": rows, "tile_segments": rows, "tile_arena_slots": rows}
        fields |= {"tile_pages": pages, "tile_page_segments": pages, "tile_page_starts": pages}
        fields |= {"tile_acc_pages": pages, "num_tile_pages": ()}
        fields |= {"tile_top": (), "tile_slot": ()}
    return fields


@functools.cache
def sample_fields(rows: int) -> dict[str, tuple[int, ...]]:
    """Integer fields of the sampling head; `floats` are the bits of `SAMPLE_FLOATS`."""
    names = ("slots", "top_k", "seeds", "output_index", "wants")
    return {**dict.fromkeys(names, (rows,)), "floats": (len(SAMPLE_FLOATS), rows)}


@functools.cache
def program_fields(bucket: Bucket, sizes: StepSizes) -> dict[str, tuple[int, ...]]:
    """Fields of a bucket's program: the step's, and where all rows sample also the head's."""
    fields = step_fields(bucket, sizes)
    return {**fields, **sample_fields(bucket.decode)} if bucket.only_decodes else fields


WANTS_LOGPROBS = 1
"""Bit of `wants`: log probabilities are asked for."""
WANTS_PENALTIES = 2
"""Bit of `wants`: some penalty changes the logits."""

SAMPLE_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
"""Rows of `floats` of `sample_fields`."""


def packed_size(fields: dict[str, tuple[int, ...]]) -> int:
    """Integers in the packed vector."""
    return sum(math.prod(shape) for shape in fields.values())


def new_batch(fields: dict[str, tuple[int, ...]]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns a fresh packed vector full of -1 and writable views of its fields.

    Fresh for each step, because the device may still be reading the one before.
    """
    packed = np.full(packed_size(fields), -1, np.int32)
    return packed, unpack(packed, fields)


def unpack(packed, fields: dict[str, tuple[int, ...]]) -> dict:
    """Slices a packed vector (numpy or jax) into its fields."""
    views, offset = {}, 0
    for name, shape in fields.items():
        size = math.prod(shape)
        view = packed[offset : offset + size]
        views[name] = view if len(shape) == 1 else view.reshape(shape)
        offset += size
    return views
