"""A full bucket: packed batches whose every row is in use, to time the step."""

from __future__ import annotations

import numpy as np

from flexjax.layout import Bucket, StepSizes, new_batch, program_fields


def busy_batch(
    bucket: Bucket, sizes: StepSizes, *, page_size: int, num_pages: int, context_len: int
) -> np.ndarray:
    """Fills a bucket: decode rows at the end of their contexts, one prompt's chunk, one window.

    Args:
      bucket: Row counts.
      sizes: Sizes that all buckets share.
      page_size: Tokens a page.
      num_pages: Pages of the pool; sequences share some where there are too few.
      context_len: Keys that each decode row, and the last row of chunk and window, sees.

    Raises:
      ValueError: If the context is shorter than the chunk or the window.
    """
    if context_len < max(bucket.chunk, bucket.window):
        rows = max(bucket.chunk, bucket.window)
        raise ValueError(f"`context_len` must be at least {rows}; got {context_len}.")
    packed, fields = new_batch(program_fields(bucket, sizes))
    count = -(-context_len // page_size)
    pages = np.random.default_rng(0).permutation(num_pages)

    def sequence(index: int) -> np.ndarray:
        return np.take(pages, np.arange(index * count, (index + 1) * count), mode="wrap")

    if bucket.forward:
        fields["tokens"][...] = 1
        fields["num_active"][...] = 1
        fields["active_slots"][0] = 0
        fields["adapter_slots"][...] = 0
    for row in range(bucket.decode):
        own = sequence(row)
        fields["positions"][row] = context_len - 1
        fields["kv_slots"][row] = own[-1] * page_size + (context_len - 1) % page_size
        fields["decode_pages"][row, :count] = own
    if bucket.chunk:
        own, positions = sequence(bucket.decode), np.arange(context_len - bucket.chunk, context_len)
        fields["positions"][bucket.decode :] = positions
        slots = own[positions // page_size] * page_size + positions % page_size
        fields["kv_slots"][bucket.decode :] = slots
        fields["chunk_segments"][...] = 0
        fields["chunk_pages"][:count] = own
        fields["chunk_page_segments"][:count] = 0
        fields["chunk_page_starts"][:count] = np.arange(count) * page_size
        fields["num_chunk_pages"][...] = count
    if bucket.window:
        positions = np.arange(context_len - bucket.window, context_len)
        fields["tile_positions"][...] = positions
        fields["tile_segments"][...] = 0
        fields["tile_arena_slots"][...] = positions
        fields["tile_pages"][:count] = sequence(bucket.decode + 1)
        fields["tile_acc_pages"][:count] = np.arange(count)
        fields["tile_page_segments"][:count] = 0
        fields["tile_page_starts"][:count] = np.arange(count) * page_size
        fields["num_tile_pages"][...] = count
        fields["tile_top"][...] = bucket.tile_layers
        fields["tile_slot"][...] = 0
    return packed
