"""Attention over paged keys and values in plain jnp: a loop over blocks of pages.

Online softmax with float32 accumulation. The loop ends with the last page that is in use, so the
cost follows the live context lengths, not the padded shapes. Many rows go in tiles, and a block of
pages meets only the tiles between the first and the last that see any of it: about half of them
where a sequence attends to itself, and few where short sequences are packed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.paged_attention.types import PageList

MASKED = -1e30
"""Score of a key that a query must not see; finite, so that fully masked rows stay finite."""

_DECODE_KEYS_PER_BLOCK = 128


def pages_per_block(page_size: int, keys: int = _DECODE_KEYS_PER_BLOCK) -> int:
    """Pages that one loop iteration reads; by default those of decode rows."""
    return max(1, keys // page_size)


def tile_shape(num_rows: int) -> tuple[int, int]:
    """Rows of a tile and keys of a block for so many rows.

    Small tiles skip more, large ones make better products. Measured on two CPU cores.
    """
    rows, keys = (64, 64) if num_rows <= 256 else (128, 256)
    return -(-num_rows // -(-num_rows // rows)), keys


def pad_pages(pages: Int[Array, "*B M"], multiple: int) -> Int[Array, "*B m"]:
    """Pads the last axis with -1 to a multiple, so that every block slice is whole."""
    padding = -pages.shape[-1] % multiple
    widths = [(0, 0)] * (pages.ndim - 1) + [(0, padding)]
    return jnp.pad(pages, widths, constant_values=-1)


def visible(
    query_positions: Int[Array, "... Q #S"],
    key_positions: Int[Array, "... #Q S"],
    sliding_window: int | None,
) -> Bool[Array, "... Q S"]:
    """Causal (and sliding-window) mask; negative positions are padding on either side."""
    mask = (key_positions >= 0) & (query_positions >= key_positions)
    if sliding_window is not None:
        mask &= query_positions - key_positions < sliding_window
    return mask


def decode_attention(
    q: Float[Array, "B N H"],
    k_pool: Float[Array, "L P Z K H"],
    v_pool: Float[Array, "L P Z K H"],
    layer: Int[Array, ""],
    page_table: Int[Array, "B M"],
    positions: Int[Array, "B"],
    *,
    sm_scale: float,
    sliding_window: int | None = None,
) -> Float[Array, "B N H"]:
    """Attention of one query row per sequence; see `api.decode_attention`."""
    num_rows, num_heads, head_dim = q.shape
    page_size, num_kv_heads = k_pool.shape[2:4]
    block_pages = pages_per_block(page_size)
    block_keys = block_pages * page_size
    groups = num_heads // num_kv_heads
    queries = (q.astype(jnp.float32) * sm_scale).reshape(num_rows, num_kv_heads, groups, head_dim)
    by_group = [queries[:, None, :, group] for group in range(groups)]  # [B, 1, K, H] each
    table = pad_pages(page_table, block_pages)

    def body(block, carry):
        maximum, total, acc = carry  # [B, K, G], [B, K, G], [B, K, G, H]
        pages = lax.dynamic_slice_in_dim(table, block * block_pages, block_pages, axis=1)
        key_positions = (block * block_keys + jnp.arange(block_keys))[None, :]
        named = jnp.repeat(pages >= 0, page_size, axis=1)
        mask = visible(
            positions[:, None, None], jnp.where(named, key_positions, -1)[:, None], sliding_window
        )[:, 0, :, None]  # [B, S, 1]
        shape = (num_rows, block_keys, num_kv_heads, head_dim)
        k = k_pool[layer, jnp.maximum(pages, 0)].reshape(shape).astype(jnp.float32)
        v = v_pool[layer, jnp.maximum(pages, 0)].reshape(shape).astype(jnp.float32)
        v = jnp.where(mask[..., None], v, 0)
        # Products and sums, not dots: a dot would transpose the keys it has just gathered.
        k, v = lax.optimization_barrier((k, v))
        scores = jnp.stack([(query * k).sum(-1) for query in by_group], axis=-1)  # [B, S, K, G]
        scores = jnp.where(mask[..., None], scores, MASKED)
        new_maximum = jnp.maximum(maximum, scores.max(1))
        probs = jnp.where(mask[..., None], jnp.exp(scores - new_maximum[:, None]), 0.0)
        decay = jnp.exp(maximum - new_maximum)
        added = [(probs[..., group, None] * v).sum(1) for group in range(groups)]
        acc = acc * decay[..., None] + jnp.stack(added, axis=2)
        return new_maximum, total * decay + probs.sum(1), acc

    shape = (num_rows, num_kv_heads, groups)
    init = (
        jnp.full(shape, MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )
    num_blocks = (jnp.max(positions) + block_keys) // block_keys
    _, total, acc = lax.fori_loop(0, num_blocks, body, init)
    out = acc / jnp.where(total > 0, total, 1.0)[..., None]
    return out.reshape(q.shape).astype(q.dtype)


def gather_block(
    pool: Float[Array, "L P Z K H"],
    layer: Int[Array, ""],
    pages: Int[Array, "m"],
) -> Float[Array, "S K H"]:
    """Reads the tokens of a few pages of one layer; padding pages read page 0."""
    block = pool[layer, jnp.maximum(pages, 0)]
    return block.reshape(-1, *block.shape[2:])


class RowTiles:
    """Rows of several sequences in tiles of equal size, and the pages they see in blocks.

    Attributes:
      size: Rows of a tile.
      count: Tiles.
      block_pages: Pages of a block.
      num_blocks: Blocks with pages in use.
    """

    def __init__(
        self,
        row_segments: Int[Array, "T"],
        row_positions: Int[Array, "T"],
        page_list: PageList,
        page_size: int,
        sliding_window: int | None,
    ):
        (num_rows,) = row_segments.shape
        self.size, keys = tile_shape(num_rows)
        self.count = -(-num_rows // self.size)
        self.block_pages = pages_per_block(page_size, keys)
        self.num_blocks = -(-page_list.num_pages // self.block_pages)
        self._num_rows, self._page_size, self._sliding_window = num_rows, page_size, sliding_window
        self._pages, self._page_segments, self._page_starts = (
            pad_pages(values, self.block_pages) for values in page_list[:3]
        )
        self._segments = self.split(row_segments, -1)
        self._positions = self.split(row_positions, -1)
        self._first, self._behind = self._met()

    def split(self, rows: Array, fill: float = 0) -> Array:
        """[T, ...] -> [tiles, rows, ...]; padding is `fill`."""
        padding = self.count * self.size - self._num_rows
        widths = [(0, padding)] + [(0, 0)] * (rows.ndim - 1)
        rows = jnp.pad(rows, widths, constant_values=fill)
        return rows.reshape(self.count, self.size, *rows.shape[1:])

    def split_heads(self, rows: Float[Array, "T N H"], num_kv_heads: int) -> Array:
        """[T, N, H] -> [tiles, K, groups x rows, H], float32."""
        tiles = self.split(rows.astype(jnp.float32))
        shape = (self.count, self.size, num_kv_heads, -1, rows.shape[-1])
        tiles = tiles.reshape(shape).transpose(0, 2, 3, 1, 4)
        return tiles.reshape(self.count, num_kv_heads, -1, rows.shape[-1])

    def join_heads(self, tiles: Float[Array, "n K GR H"]) -> Float[Array, "T N H"]:
        """Undoes `split_heads`."""
        num_kv_heads, head_dim = tiles.shape[1], tiles.shape[-1]
        tiles = tiles.reshape(self.count, num_kv_heads, -1, self.size, head_dim)
        tiles = tiles.transpose(0, 3, 1, 2, 4)
        return tiles.reshape(self.count * self.size, -1, head_dim)[: self._num_rows]

    def keys(self, block: Int[Array, ""]) -> tuple[Int[Array, "m"], Bool[Array, "n R S"]]:
        """Pages of a block, and which of its keys each row sees."""

        def take(values: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(values, block * self.block_pages, self.block_pages)

        pages, starts = take(self._pages), take(self._page_starts)
        segments = jnp.repeat(take(self._page_segments), self._page_size)[None, None, :]
        offsets = jnp.arange(self._page_size)[None, :]
        positions = jnp.where((pages >= 0)[:, None], starts[:, None] + offsets, -1).reshape(-1)
        seen = visible(self._positions[..., None], positions[None, None, :], self._sliding_window)
        return pages, seen & (self._segments[..., None] == segments)

    def meeting(self, block: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """The first tile that sees any key of a block, and the one behind the last."""
        return self._first[block], self._behind[block]

    def _met(self) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
        lists = self._pages, self._page_segments, self._page_starts
        pages, segments, starts = (values[None, None, :] for values in lists)
        sees = (pages >= 0) & (self._segments[..., None] == segments)
        sees &= self._positions[..., None] >= starts
        if self._sliding_window is not None:
            last = starts + self._page_size - 1
            sees &= self._positions[..., None] - last < self._sliding_window
        sees = sees.any(1).reshape(self.count, -1, self.block_pages).any(-1)  # [tiles, blocks]
        index = jnp.arange(self.count, dtype=jnp.int32)[:, None]
        return (
            jnp.where(sees, index, self.count).min(0),
            jnp.where(sees, index + 1, 0).max(0),
        )


def ragged_attention(
    q: Float[Array, "T N H"],
    k_pool: Float[Array, "L P Z K H"],
    v_pool: Float[Array, "L P Z K H"],
    layer: Int[Array, ""],
    page_list: PageList,
    row_segments: Int[Array, "T"],
    row_positions: Int[Array, "T"],
    *,
    sm_scale: float,
    sliding_window: int | None = None,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """Attention of rows of several sequences; see `api.ragged_attention`."""
    page_size, num_kv_heads = k_pool.shape[2:4]
    tiles = RowTiles(row_segments, row_positions, page_list, page_size, sliding_window)
    queries = tiles.split_heads(q.astype(jnp.float32) * sm_scale, num_kv_heads)  # [n, K, GR, H]

    def block_body(block, carry):
        maximum, total, acc, sees_bad = carry
        pages, mask = tiles.keys(block)  # [m], [n, R, S]
        k = gather_block(k_pool, layer, pages).astype(jnp.float32)
        v = gather_block(v_pool, layer, pages).astype(jnp.float32)
        # Rows of other segments meet these values with probability zero, and 0 * NaN is NaN: a
        # value that is not finite goes only to the rows that see it.
        is_read = mask.any((0, 1))
        is_bad = is_read & ~jnp.isfinite(v).all((1, 2))
        sees_bad |= (mask & is_bad[None, None, :]).any(-1)
        v = jnp.where((is_read & ~is_bad)[:, None, None], v, 0)
        k, v = k.transpose(1, 2, 0), v.transpose(1, 0, 2)  # [K, H, S], [K, S, H]

        def tile_body(tile, carry):
            maximum, total, acc = carry
            shape = (num_kv_heads, -1, *mask.shape[1:])
            scores = jnp.matmul(queries[tile], k).reshape(shape)  # [K, G, R, S]
            scores = jnp.where(mask[tile][None, None], scores, MASKED)
            scores = scores.reshape(num_kv_heads, -1, mask.shape[-1])
            old = maximum[tile]
            new = jnp.maximum(old, scores.max(-1))
            # What is masked is far below the maximum, but for rows that see nothing yet: their
            # sums are wiped out by `decay` when they do.
            probs = jnp.exp(scores - new[..., None])
            decay = jnp.exp(old - new)
            added = jnp.matmul(probs, v)
            return (
                maximum.at[tile].set(new),
                total.at[tile].set(total[tile] * decay + probs.sum(-1)),
                acc.at[tile].set(acc[tile] * decay[..., None] + added),
            )

        sums = lax.fori_loop(*tiles.meeting(block), tile_body, (maximum, total, acc))
        return *sums, sees_bad

    shape = queries.shape[:-1]
    init = (
        jnp.full(shape, MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(queries.shape, jnp.float32),
        jnp.zeros((tiles.count, tiles.size), bool),
    )
    maximum, total, acc, sees_bad = lax.fori_loop(0, tiles.num_blocks, block_body, init)
    sees_any = ~(maximum <= MASKED)  # also of rows whose scores are not finite, to show it
    total = jnp.where(sees_any, total, 1.0)
    out = tiles.join_heads(jnp.where(sees_any[..., None], acc / total[..., None], 0.0))
    out = jnp.where(sees_bad.reshape(-1)[: q.shape[0], None, None], jnp.nan, out)
    lse = tiles.join_heads((maximum + jnp.log(total))[..., None])[..., 0]
    return out.astype(q.dtype), lse
