"""Which keys each tile of ragged rows can see, worked out before the launch."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pallas_kernels.paged_attention.tiling import Tiling
from pallas_kernels.paged_attention.types import PageList


def tile_bounds(
    page_list: PageList,
    row_segments: Int[Array, "T"],
    row_positions: Int[Array, "T"],
    tiling: Tiling,
) -> Int[Array, "tiles 4"]:
    """What the rows of each tile can see.

    Keys are counted in slots, the tokens of the page list laid end to end. Only a whole range of
    slots is skipped or not masked: sequences whose rows and pages stand in the same order pay
    nothing for each other, other orders are right and slower.

    Args:
      page_list: Pages that the rows may read.
      row_segments: Segment of each row, -1 padding.
      row_positions: Position of each row, -1 padding.
      tiling: Of the kernel.

    Returns:
      Per tile: first slot, number of blocks of keys from there that some row sees, the first of
      these that every row sees whole, and how many in sequence are such.
    """
    num_rows = row_segments.shape[0]
    num_tiles = tiling.num_tiles(num_rows)
    # A piece is what may be skipped: a page, or a block of keys where that is smaller.
    piece = min(tiling.page_size, tiling.block_keys)
    per_page, per_block = tiling.page_size // piece, tiling.block_keys // piece
    first_row = np.arange(num_tiles) * tiling.block_rows // tiling.group
    last_row = ((np.arange(num_tiles) + 1) * tiling.block_rows - 1) // tiling.group
    reach = int((last_row - first_row).max()) + 1
    rows = np.minimum(first_row[:, None] + np.arange(reach), num_rows - 1)  # some twice: harmless
    segments, positions = row_segments[rows], row_positions[rows]  # [tiles, reach]
    segments, positions = segments[:, :, None], positions[:, :, None]

    entries = jnp.arange(page_list.pages.shape[0])
    is_named = (page_list.pages >= 0) & (entries < page_list.num_pages)
    page_segments = jnp.repeat(jnp.where(is_named, page_list.segments, -1), per_page)
    starts = jnp.repeat(page_list.starts, per_page) + jnp.tile(
        jnp.arange(per_page) * piece, entries.shape[0]
    )
    page_segments, starts = page_segments[None, None], starts[None, None]
    is_row = (segments >= 0) & (positions >= 0)
    sees = is_row & (segments == page_segments) & (positions >= starts)
    sees_whole = sees & (positions >= starts + (piece - 1))
    if tiling.sliding_window is not None:
        sees &= positions - (starts + (piece - 1)) < tiling.sliding_window
        sees_whole &= positions - starts < tiling.sliding_window
    is_seen = sees.any(1)  # [tiles, pieces]
    is_whole = is_seen & (sees_whole | ~is_row).all(1)

    pieces = jnp.arange(is_seen.shape[1])[None, :]
    num_pieces = is_seen.shape[1]
    first = jnp.where(is_seen, pieces, num_pieces).min(1)
    behind = jnp.maximum(jnp.where(is_seen, pieces + 1, 0).max(1), first)
    run = jnp.where(is_whole, pieces, num_pieces).min(1)
    run_end = jnp.where(~is_whole & (pieces > run[:, None]), pieces, num_pieces).min(1)
    num_blocks = (behind - first + per_block - 1) // per_block
    first_whole = (run - first + per_block - 1) // per_block
    num_whole = jnp.maximum((run_end - first) // per_block - first_whole, 0)
    return jnp.stack([first * piece, num_blocks, first_whole, num_whole], axis=1)
