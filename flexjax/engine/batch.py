"""From a plan to the padded integer arrays of one bucket. Numpy only."""

from __future__ import annotations

import numpy as np

from flexjax.engine.sizing import Sizing
from flexjax.layout import (
    SAMPLE_FLOATS,
    WANTS_LOGPROBS,
    WANTS_PENALTIES,
    Bucket,
    StepSizes,
    new_batch,
    program_fields,
    sample_fields,
    step_fields,
    unpack,
)
from flexjax.scheduler.kv_reads import SequenceRows, decode_kv
from flexjax.scheduler.plan import BackwardTile, ForwardPiece, LossWindow, PrefillChunk, StepPlan
from flexjax.scheduler.sequence import Sequence
from flexjax.scheduler.training import Group


def build_step(plan: StepPlan, bucket: Bucket, sizes: StepSizes, page_size: int) -> np.ndarray:
    """Fills the packed vector of `layout.step_fields`."""
    packed, fields = new_batch(step_fields(bucket, sizes))
    if bucket.decode:
        _fill_decode(plan, fields, page_size)
    if bucket.chunk:
        _fill_chunks(plan, bucket, fields, page_size)
    if bucket.forward:
        slots = _active_slots(plan, sizes.num_slots)
        fields["active_slots"][: len(slots)] = slots
        fields["num_active"][...] = len(slots)
    if plan.tile is not None:
        _fill_tile(plan.tile, fields, page_size)
    return packed


def _active_slots(plan: StepPlan, num_slots: int) -> np.ndarray:
    """Adapter slots of the forward rows, in order."""
    is_active = np.zeros(num_slots + 1, bool)
    is_active[plan.decode.adapter_slots] = True
    for chunk in plan.prefill:
        is_active[chunk.sequence.request.adapter_slot] = True
    for piece in plan.forward:
        is_active[piece.group.run.slot] = True
    return is_active[:num_slots].nonzero()[0]  # the base model, -1, is the last


def build_idle_step(bucket: Bucket, sizes: StepSizes) -> np.ndarray:
    """A batch of padding rows, which changes nothing; to measure a bucket."""
    packed, fields = new_batch(program_fields(bucket, sizes))
    for name in ("num_active", "num_chunk_pages", "num_tile_pages", "tile_slot"):
        if name in fields:
            fields[name][...] = 0
    if bucket.window:
        fields["tile_top"][...] = bucket.tile_layers
    return packed


def build_full_step(
    bucket: Bucket, sizing: Sizing, context: int
) -> tuple[np.ndarray, dict[str, int]]:
    """A batch that reads `context` tokens for each row of one kind, and changes nothing.

    To measure what reading keys and values costs. Chunk rows and the tile's are of one sequence.

    Args:
      bucket: With rows of one kind.
      sizing: The engine's.
      context: Tokens; at most the engine's context.

    Returns:
      The packed batch, and the counts of `StepFeatures` that it has.
    """
    packed, size = build_idle_step(bucket, sizing.step), sizing.page_size
    fields = unpack(packed, program_fields(bucket, sizing.step))
    pages = np.arange(-(-context // size)) % sizing.num_pages
    reads = sizing.ladder.reads
    if bucket.decode:
        fields["positions"][:] = context - 1
        fields["decode_pages"][:, : len(pages)] = pages
        positions = fields["positions"]
        return packed, {"decode_kv_tokens": decode_kv(positions, bucket.decode, reads)}
    rows = min(bucket.chunk + bucket.window, context)
    positions = np.arange(context - rows, context)
    kind = "chunk" if bucket.chunk else "tile"
    fields[f"{kind}_pages"][: len(pages)] = pages
    fields[f"{kind}_page_segments"][: len(pages)] = 0
    fields[f"{kind}_page_starts"][: len(pages)] = np.arange(len(pages)) * size
    fields[f"num_{kind}_pages"][...] = len(pages)
    fields[f"{kind}_segments"][:rows] = 0
    fields["positions" if bucket.chunk else "tile_positions"][:rows] = positions
    pairs = int((positions + 1).sum())
    if reads:
        pieces = [SequenceRows(context - rows, rows)]
        pairs = reads.pairs(bucket.chunk + bucket.window, pieces)
    if bucket.chunk:
        return packed, {"chunk_kv_pairs": pairs}
    return packed, {"tile_kv_pairs": pairs * bucket.tile_layers}


def _fill_decode(plan: StepPlan, fields: dict[str, np.ndarray], page_size: int) -> None:
    decode, rows = plan.decode, len(plan.decode)
    if not rows:
        return
    assert plan.slot_pages is not None
    positions, slots = decode.positions, decode.slots
    pages = plan.slot_pages[slots, positions // page_size]
    tokens = fields["tokens"]
    tokens[:rows] = 0
    for row in np.flatnonzero(~decode.is_fed).tolist():
        tokens[row] = decode.sequences[row].tokens[positions[row]]
    fields["feed_slots"][:rows] = np.where(decode.is_fed, slots, -1)
    fields["positions"][:rows] = positions
    fields["kv_slots"][:rows] = pages * page_size + positions % page_size
    fields["adapter_slots"][:rows] = decode.adapter_slots
    fields["sample_slots"][:rows] = slots
    np.take(plan.slot_pages, slots, axis=0, out=fields["decode_pages"][:rows], mode="clip")


class _ChunkFiller:
    """Appends pieces to the chunk rows and to their page list."""

    def __init__(self, fields: dict[str, np.ndarray], first_row: int, page_size: int):
        self._fields = fields
        self._first = first_row
        self._page_size = page_size
        self._row = 0
        self._entry = 0
        self._segment = 0

    def rows(self, length: int) -> tuple[slice, slice]:
        """Claims rows: where they are among all forward rows, and among chunk rows."""
        start, self._row = self._row, self._row + length
        return (
            slice(self._first + start, self._first + self._row),
            slice(start, self._row),
        )

    def pages(self, pages: list[int], num_tokens: int) -> int:
        """Lists the pages that the first `num_tokens` tokens lie in; returns the segment."""
        count = -(-num_tokens // self._page_size)
        entries = slice(self._entry, self._entry + count)
        self._fields["chunk_pages"][entries] = pages[:count]
        self._fields["chunk_page_segments"][entries] = self._segment
        self._fields["chunk_page_starts"][entries] = _page_starts(count, self._page_size)
        self._entry += count
        self._segment += 1
        return self._segment - 1

    def end(self) -> None:
        """Writes how many pages were listed."""
        self._fields["num_chunk_pages"][...] = self._entry


def _page_starts(count: int, page_size: int) -> np.ndarray:
    return np.arange(0, count * page_size, page_size)


def _fill_chunks(
    plan: StepPlan, bucket: Bucket, fields: dict[str, np.ndarray], page_size: int
) -> None:
    filler = _ChunkFiller(fields, bucket.decode, page_size)
    for chunk in plan.prefill:
        _fill_prefill(chunk, fields, filler, page_size)
    for piece in plan.forward:
        _fill_forward(piece, fields, filler)
    filler.end()


def _fill_prefill(
    chunk: PrefillChunk, fields: dict[str, np.ndarray], filler: _ChunkFiller, page_size: int
) -> None:
    sequence, end = chunk.sequence, chunk.start + chunk.length
    rows, chunk_rows = filler.rows(chunk.length)
    positions = np.arange(chunk.start, end)
    pages = np.asarray(sequence.pages)
    fields["tokens"][rows] = sequence.tokens[chunk.start : end]
    fields["positions"][rows] = positions
    fields["kv_slots"][rows] = pages[positions // page_size] * page_size + positions % page_size
    fields["adapter_slots"][rows] = sequence.request.adapter_slot
    fields["chunk_segments"][chunk_rows] = filler.pages(sequence.pages, end)
    if chunk.is_last:
        fields["sample_slots"][rows.stop - 1] = sequence.slot


def _fill_forward(piece: ForwardPiece, fields: dict[str, np.ndarray], filler: _ChunkFiller) -> None:
    group, part = piece.group, slice(piece.start, piece.start + piece.length)
    rows, chunk_rows = filler.rows(piece.length)
    fields["tokens"][rows] = group.tokens[part]
    fields["positions"][rows] = group.positions[part]
    fields["kv_slots"][rows] = group.kv_slots[part]
    fields["adapter_slots"][rows] = group.run.slot
    fields["chunk_arena_slots"][chunk_rows] = group.arena_slots[part]
    segments = _segments(group, part)
    numbers = [filler.pages(group.kv_pages[index], end) for index, end in segments]
    # Segments of the group and of the step are both numbered in order.
    shift = numbers[0] - segments[0][0]
    fields["chunk_segments"][chunk_rows] = group.segment_of_row[part] + shift


def _segments(group: Group, part: slice) -> list[tuple[int, int]]:
    """Sequences that have rows in a part of the stream, with the end of those rows in each."""
    first, last = group.segment_of_row[part.start], group.segment_of_row[part.stop - 1]
    bounds = group.offsets[first : last + 2].tolist()
    bounds[-1] = min(bounds[-1], part.stop)
    spans = zip(bounds, bounds[1:], strict=False)
    return [(index, end - start) for index, (start, end) in enumerate(spans, start=int(first))]


def _fill_tile(tile: BackwardTile, fields: dict[str, np.ndarray], page_size: int) -> None:
    group, part = tile.group, slice(tile.start, tile.start + tile.length)
    fields["tile_positions"][: tile.length] = group.positions[part]
    fields["tile_segments"][: tile.length] = group.segment_of_row[part]
    fields["tile_arena_slots"][: tile.length] = group.arena_slots[part]
    entry = 0
    for index, end in _segments(group, part):
        count = -(-end // page_size)
        entries = slice(entry, entry + count)
        fields["tile_pages"][entries] = group.kv_pages[index][:count]
        fields["tile_acc_pages"][entries] = group.arena_pages[index][:count]
        fields["tile_page_segments"][entries] = index
        fields["tile_page_starts"][entries] = _page_starts(count, page_size)
        entry += count
    fields["num_tile_pages"][...] = entry
    fields["tile_top"][...] = tile.top
    fields["tile_slot"][...] = group.run.slot


def build_loss(window: LossWindow, rows: int) -> np.ndarray:
    """Arena slots and targets of a loss window, int32 [2, rows], -1 padding."""
    packed = np.full((2, rows), -1, np.int32)
    part = slice(window.start, window.start + window.length)
    packed[0, : window.length] = window.group.arena_slots[part]
    packed[1, : window.length] = window.group.targets[part]
    return packed


class SampleTable:
    """Sampling options of the running requests, by slot; filled when a request is first sampled."""

    def __init__(self, num_slots: int):
        self._owners: list[Sequence | None] = [None] * num_slots
        self._integers = np.zeros((3, num_slots), np.int32)
        self._floats = np.zeros((len(SAMPLE_FLOATS), num_slots), np.float32)

    def build(self, sequences: list[Sequence], rows: int) -> np.ndarray:
        """Fills the packed vector of `layout.sample_fields`, for sequences in order."""
        packed, fields = new_batch(sample_fields(rows))
        floats = fields["floats"].view(np.float32)
        floats[:] = 0.0
        floats[SAMPLE_FLOATS.index("top_p")] = 1.0
        owners, count = self._owners, len(sequences)
        for sequence in sequences:
            if owners[sequence.slot] is not sequence:
                self._fill(sequence.slot, sequence)
        slots = fields["slots"][:count]
        slots[:] = [sequence.slot for sequence in sequences]
        fields["output_index"][:count] = [s.num_tokens - s.prompt_len - 1 for s in sequences]
        for row, name in enumerate(("top_k", "seeds", "wants")):
            fields[name][:count] = self._integers[row, slots]
        np.take(self._floats, slots, axis=1, out=floats[:, :count], mode="clip")
        return packed

    def _fill(self, slot: int, sequence: Sequence) -> None:
        params = sequence.request.params
        wants = WANTS_LOGPROBS if params.logprobs is not None else 0
        wants |= WANTS_PENALTIES if params.has_penalties else 0
        self._integers[:, slot] = min(params.top_k, 2**31 - 1), sequence.request.seed, wants
        self._floats[:, slot] = [getattr(params, name) for name in SAMPLE_FLOATS]
        self._owners[slot] = sequence
