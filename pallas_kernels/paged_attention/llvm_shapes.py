"""What the code of attention for the CPU depends on, and the sizes that follow from it."""

from __future__ import annotations

import dataclasses

from jaxtyping import Array, Float

from pallas_kernels._llvm.builder import Builder, Value
from pallas_kernels._llvm.packing import panel_columns, tile_rows

LINE = 16
"""Float32 numbers in a line of the caches."""

MAX_BYTES = 240 << 10
"""Of the buffers of a task: they stay in the second cache."""


@dataclasses.dataclass(frozen=True)
class Attention:
    """What the code of attention over a pool depends on.

    Attributes:
      num_tokens: Query tokens; those of decode attention are sequences.
      num_heads: N.
      num_kv_heads: K.
      head_dim: H.
      page_size: Z.
      pool_pages: P.
      list_len: M.
      sm_scale: Multiplies the scores.
      sliding_window: Keys that a query sees; None for all.
    """

    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    pool_pages: int
    list_len: int
    sm_scale: float
    sliding_window: int | None

    @classmethod
    def of(
        cls,
        q: Float[Array, "T N H"],
        k_pool: Float[Array, "L P Z K H"],
        list_len: int,
        sm_scale: float,
        sliding_window: int | None,
    ) -> Attention:
        """That of queries with a pool, from their shapes."""
        num_tokens, num_heads, head_dim = q.shape
        _, pool_pages, page_size, num_kv_heads, _ = k_pool.shape
        heads, pages = (num_heads, num_kv_heads, head_dim), (page_size, pool_pages, list_len)
        return cls(num_tokens, *heads, *pages, sm_scale, sliding_window)

    @property
    def groups(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_rows(self) -> int:
        """Rows of a KV head."""
        return self.num_tokens * self.groups

    @property
    def key_stride(self) -> int:
        """Elements of the pool from a token to the next."""
        return self.num_kv_heads * self.head_dim

    @property
    def width(self) -> int:
        """Head dim in whole panels."""
        return ceil_div(self.head_dim, panel_columns()) * panel_columns()

    @property
    def stride(self) -> int:
        """Elements from a row to the next in buffers of the head dim's width."""
        return padded_stride(self.width)

    def row_offset(self, b: Builder, row: Value, head: Value) -> Value:
        """Where a row of a KV head lies in [tokens, N, H]."""
        token, member = row // self.groups, row % self.groups
        return (token * self.num_heads + head * self.groups + member) * self.head_dim


def ceil_div(count: int, size: int) -> int:
    """Pieces of a size that cover a count."""
    return -(-count // size)


def padded_stride(width: int) -> int:
    """An odd number of cache lines, so that the lines of a column are spread over the cache."""
    return (ceil_div(width, LINE) | 1) * LINE


def row_tiles(num_rows: int, at_most: int) -> tuple[int, int]:
    """Rows of a tile, in whole groups, and number of tiles."""
    even = ceil_div(num_rows, ceil_div(num_rows, at_most))
    size = ceil_div(even, tile_rows()) * tile_rows()
    return size, ceil_div(num_rows, size)


def pieces(width: int, lanes: int) -> list[tuple[int, int]]:
    """Cuts a line into vectors: (offset, lanes) of each, the last ones shorter."""
    found, offset = [], 0
    while offset < width:
        while lanes > width - offset:
            lanes //= 2
        found.append((offset, lanes))
        offset += lanes
    return found
