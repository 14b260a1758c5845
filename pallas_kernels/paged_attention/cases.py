"""Named cases of decode and ragged attention, over pages that hold NaN wherever nothing is seen."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._cases import Case
from pallas_kernels.paged_attention import api
from pallas_kernels.paged_attention.types import PageList

_NUM_DRAWS = 1_000_003
"""Numbers drawn for a pool, which repeats them: drawing gigabytes would take minutes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedCase(Case, abc.ABC):
    """Query rows of sequences whose keys and values lie in shuffled pages of a pool.

    Attributes:
      num_heads: N.
      num_kv_heads: K.
      head_dim: H.
      page_size: Z.
      max_pages: M; None for a few more than are in use.
      pool_pages: P; None for three more than are in use.
      num_layers: L; the last layer is read.
      sliding_window: Keys that a row sees; None for all.
      padding: Rows of padding.
    """

    op: ClassVar[str] = "paged_attention"
    implementations: ClassVar[tuple[str, ...]] = ("pallas_triton",)

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int = 16
    max_pages: int | None = None
    pool_pages: int | None = None
    num_layers: int = 2
    sliding_window: int | None = None
    padding: int = 0

    @property
    @abc.abstractmethod
    def lengths(self) -> tuple[int, ...]:
        """Context length of each sequence."""

    @property
    @abc.abstractmethod
    def num_rows(self) -> int:
        """Query rows, padding included."""

    @property
    def page_counts(self) -> list[int]:
        """Pages of each sequence."""
        return [-(-length // self.page_size) for length in self.lengths]

    @property
    def pool_shape(self) -> tuple[int, ...]:
        """Of keys and of values; some pages are named by nobody."""
        token = (self.page_size, self.num_kv_heads, self.head_dim)
        return (self.num_layers, self.pool_pages or sum(self.page_counts) + 3, *token)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Of the queries."""
        return (self.num_rows, self.num_heads, self.head_dim)

    def options(self, implementation: str | None) -> dict[str, Any]:
        """Keyword arguments of either op."""
        scale = self.head_dim**-0.5
        return {
            "sm_scale": scale,
            "sliding_window": self.sliding_window,
            "implementation": implementation,
        }

    def draw_pages(self, rng: np.random.Generator) -> list[np.ndarray]:
        """Pages of each sequence in order."""
        order = rng.permutation(self.pool_shape[1])[: sum(self.page_counts)].astype(np.int32)
        return np.split(order, np.cumsum(self.page_counts)[:-1])

    def draw_pool(self, rng: np.random.Generator, pages: list[np.ndarray]) -> np.ndarray:
        """Keys or values of unit variance; NaN in other pages of the layer and behind the ends."""
        pool = np.zeros(self.pool_shape, jnp.dtype(self.dtype))
        pool[-1] = np.nan
        draws = rng.standard_normal(_NUM_DRAWS, np.float32).astype(pool.dtype)
        for length, mine in zip(self.lengths, pages, strict=True):
            draws = np.roll(draws, 7919)
            pool[-1, mine] = np.resize(draws, (len(mine), *pool.shape[2:]))
            pool[-1, mine[-1], (length - 1) % self.page_size + 1 :] = np.nan
        return pool

    def draw_rows(self, rng: np.random.Generator, is_row: np.ndarray) -> np.ndarray:
        """Queries; NaN in padding rows."""
        q = rng.standard_normal(self.row_shape, np.float32)
        q[~is_row] = np.nan
        return q.astype(jnp.dtype(self.dtype))

    def operand_avals(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Queries, both pools and the layer."""
        dtype = jnp.dtype(self.dtype)
        pool = jax.ShapeDtypeStruct(self.pool_shape, dtype)
        return jax.ShapeDtypeStruct(self.row_shape, dtype), pool, pool, _int32()

    def num_seen(self, position: int) -> int:
        """Keys that a row sees."""
        return min(position + 1, self.sliding_window or position + 1)

    def _cost_bytes(self, num_keys: int) -> float:
        """Queries in and outputs out, and keys and values in."""
        itemsize = jnp.dtype(self.dtype).itemsize
        rows = 2 * self.num_rows * self.num_heads
        return float((rows + 2 * num_keys * self.num_kv_heads) * self.head_dim * itemsize)


def _int32(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeCase(PagedCase):
    """One row per sequence.

    Attributes:
      contexts: Context length of each row.
    """

    contexts: tuple[int, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Context length of each sequence."""
        return self.contexts

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.contexts) + self.padding

    @property
    def table_shape(self) -> tuple[int, int]:
        """Of the page table."""
        return self.num_rows, self.max_pages or max(self.page_counts) + 2

    def arrays(self, rng: np.random.Generator) -> tuple[Any, ...]:
        """Queries, pools, layer, page table and positions; padding rows stand at random places."""
        pages = self.draw_pages(rng)
        table = np.full(self.table_shape, -1, np.int32)
        positions = np.full(self.num_rows, -1, np.int32)
        places = rng.permutation(self.num_rows)[: len(pages)]
        for row, length, mine in zip(places, self.lengths, pages, strict=True):
            table[row, : len(mine)], positions[row] = mine, length - 1
        pools = [self.draw_pool(rng, pages) for _ in range(2)]
        q = self.draw_rows(rng, positions >= 0)
        return q, *pools, np.asarray(self.num_layers - 1, np.int32), table, positions

    def avals(self) -> tuple[Any, ...]:
        """Shapes of the arguments."""
        return *self.operand_avals(), _int32(*self.table_shape), _int32(self.num_rows)

    def function(self, implementation: str | None) -> Callable[..., Any]:
        """`api.decode_attention` with its options bound."""
        return functools.partial(api.decode_attention, **self.options(implementation))

    def _num_keys(self) -> int:
        return sum(self.num_seen(length - 1) for length in self.lengths)

    def flops(self) -> float:
        """Two products for each pair of a query head and a key that it sees."""
        return 4.0 * self._num_keys() * self.num_heads * self.head_dim

    def bytes(self) -> float:
        """Every key and value seen in once."""
        return self._cost_bytes(self._num_keys())


@dataclasses.dataclass(frozen=True, kw_only=True)
class RaggedCase(PagedCase):
    """Several rows of each sequence.

    Attributes:
      segments: Context length and rows of each sequence; the rows are its last positions.
      is_shuffled: Rows, and pages of the list, are in random order.
    """

    segments: tuple[tuple[int, int], ...]
    is_shuffled: bool = False

    @property
    def lengths(self) -> tuple[int, ...]:
        """Context length of each sequence."""
        return tuple(length for length, _ in self.segments)

    @property
    def num_rows(self) -> int:
        """T."""
        return sum(rows for _, rows in self.segments) + self.padding

    @property
    def list_length(self) -> int:
        """M."""
        return self.max_pages or sum(self.page_counts) + 3

    def _page_list(self, rng: np.random.Generator, pages: list[np.ndarray]) -> PageList:
        entries = [
            (page, segment, index * self.page_size)
            for segment, mine in enumerate(pages)
            for index, page in enumerate(mine)
        ]
        if self.is_shuffled:
            rng.shuffle(entries)
        columns: Any = np.full((3, self.list_length), -1, np.int32)
        columns[:, : len(entries)] = np.asarray(entries, np.int32).T
        num_pages: Any = np.asarray(len(entries), np.int32)
        return PageList(columns[0], columns[1], columns[2], num_pages)

    def arrays(self, rng: np.random.Generator) -> tuple[Any, ...]:
        """Queries, pools, layer, page list, and segment and position of each row."""
        pages = self.draw_pages(rng)
        places = [
            (segment, position)
            for segment, (length, rows) in enumerate(self.segments)
            for position in range(length - rows, length)
        ] + [(-1, -1)] * self.padding
        if self.is_shuffled:
            rng.shuffle(places)
        segments, positions = np.ascontiguousarray(np.asarray(places, np.int32).T)
        pools = [self.draw_pool(rng, pages) for _ in range(2)]
        q, layer = self.draw_rows(rng, segments >= 0), np.asarray(self.num_layers - 1, np.int32)
        return q, *pools, layer, self._page_list(rng, pages), segments, positions

    def avals(self) -> tuple[Any, ...]:
        """Shapes of the arguments."""
        column = _int32(self.list_length)
        page_list = PageList(column, column, column, _int32())
        rows = _int32(self.num_rows)
        return *self.operand_avals(), page_list, rows, rows

    def function(self, implementation: str | None) -> Callable[..., Any]:
        """`api.ragged_attention` with its options bound."""
        return functools.partial(api.ragged_attention, **self.options(implementation))

    def flops(self) -> float:
        """Two products for each pair of a query head and a key that it sees."""
        pairs = sum(
            self.num_seen(position)
            for length, rows in self.segments
            for position in range(length - rows, length)
        )
        return 4.0 * pairs * self.num_heads * self.head_dim

    def bytes(self) -> float:
        """Every key and value that some row sees in once, log-sum-exps out."""
        seen = sum(
            min(length, (self.sliding_window or length) + rows - 1)
            for length, rows in self.segments
        )
        return self._cost_bytes(seen) + 4.0 * self.num_rows * self.num_heads


_LLAMA: dict[str, Any] = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
_QWEN: dict[str, Any] = {"num_heads": 40, "num_kv_heads": 8, "head_dim": 128}
_SMALL: dict[str, Any] = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "tags": frozenset({"interpret"}),
}
_HOT = frozenset({"hot"})
_HOT_WGMMA = frozenset({"hot", "wgmma"})
_WGMMA = frozenset({"wgmma"})
_INTERPRET = frozenset({"interpret"})
_PACKED = ((37, 5), (9, 9), (1, 1), (140, 21))
_MIXED = tuple(128 * (1 + 61 * row % 64) for row in range(64))
_DTYPES = ("float32", "bfloat16")

_DECODE_CASES = (
    # More than 4 GiB, as the largest one below, so that offsets have 64 bits: a real pool's have.
    DecodeCase(name="decode_llama_64x8k", contexts=(8192,) * 64, max_pages=512, num_layers=5,
               tags=_HOT, **_LLAMA),
    DecodeCase(name="decode_llama_64_mixed", contexts=_MIXED, max_pages=512, tags=_HOT, **_LLAMA),
    DecodeCase(name="decode_llama_1x8k", contexts=(8192,), max_pages=512, tags=_HOT, **_LLAMA),
    DecodeCase(name="decode_llama_page_64", contexts=(8192,) * 64, page_size=64, max_pages=128,
               tags=_HOT, **_LLAMA),
    DecodeCase(name="decode_llama_sliding", contexts=(8192,) * 16, sliding_window=4096, **_LLAMA),
    DecodeCase(name="decode_qwen_64x8k", contexts=(8192,) * 64, max_pages=512, tags=_HOT, **_QWEN),
    DecodeCase(name="decode_group_1_head_dim_96", contexts=(2048,) * 8, num_heads=32,
               num_kv_heads=32, head_dim=96),
    DecodeCase(name="decode_head_dim_256", contexts=(2048,) * 8, num_heads=16, num_kv_heads=4,
               head_dim=256, page_size=256),
    DecodeCase(name="decode_float32", contexts=(2048,) * 8, dtype="float32", **_LLAMA),
    *(
        DecodeCase(name=f"decode_odd_{dtype}", contexts=(1, 7, 33, 150, 16, 64), padding=2,
                   dtype=dtype, **_SMALL)
        for dtype in _DTYPES
    ),
    DecodeCase(name="decode_one_row_split", contexts=(700,), page_size=32, dtype="float32",
               **_SMALL),
    DecodeCase(name="decode_split_beyond_short_rows", contexts=(1, 530), max_pages=36, padding=1,
               dtype="float32", **_SMALL),
    DecodeCase(name="decode_sliding", contexts=(5, 180, 64), sliding_window=33, dtype="float32",
               **_SMALL),
    DecodeCase(name="decode_full_bucket", contexts=(64, 64), max_pages=4, dtype="float32",
               **_SMALL),
    *(
        DecodeCase(name=f"decode_group_{group}", contexts=(19, 70), num_heads=group,
                   num_kv_heads=1, head_dim=16, dtype="float32", tags=_INTERPRET)
        for group in range(1, 9)
    ),
    *(
        DecodeCase(name=f"decode_head_dim_{dim}_page_{page}_{dtype}", contexts=(90, 3), num_heads=2,
                   num_kv_heads=1, head_dim=dim, page_size=page, dtype=dtype, tags=_INTERPRET)
        for dim, page in ((96, 16), (128, 64), (256, 256))
        for dtype in _DTYPES
    ),
)  # fmt: skip

_RAGGED_CASES = (
    RaggedCase(name="ragged_llama_8k", segments=((8192, 512),), max_pages=512, pool_pages=5120,
               num_layers=32, tags=_HOT_WGMMA, **_LLAMA),
    RaggedCase(name="ragged_llama_8k_64_rows", segments=((8192, 64),), max_pages=512,
               tags=_HOT_WGMMA, **_LLAMA),
    RaggedCase(name="ragged_llama_page_64", segments=((8192, 512),), page_size=64, max_pages=128,
               tags=_HOT_WGMMA, **_LLAMA),
    RaggedCase(name="ragged_llama_prefill", segments=((2048, 2048),), tags=_HOT_WGMMA, **_LLAMA),
    RaggedCase(name="ragged_llama_packed", segments=((512, 256),) * 7 + ((509, 224),), padding=32,
               max_pages=512, tags=_HOT_WGMMA, **_LLAMA),
    RaggedCase(name="ragged_llama_sliding", segments=((8192, 512),), sliding_window=4096,
               tags=_WGMMA, **_LLAMA),
    RaggedCase(name="ragged_qwen_8k", segments=((8192, 512),), max_pages=512, tags=_HOT_WGMMA,
               **_QWEN),
    RaggedCase(name="ragged_head_dim_64", segments=((2048, 256),), num_heads=32, num_kv_heads=8,
               head_dim=64, tags=_WGMMA),
    RaggedCase(name="ragged_head_dim_96", segments=((2048, 256),), num_heads=32, num_kv_heads=32,
               head_dim=96, tags=_WGMMA),
    RaggedCase(name="ragged_head_dim_256", segments=((2048, 256),), num_heads=16, num_kv_heads=4,
               head_dim=256, page_size=256, tags=_WGMMA),
    RaggedCase(name="ragged_float32", segments=((2048, 256),), dtype="float32", **_LLAMA),
    RaggedCase(name="ragged_float32_head_dim_256", segments=((999, 99),), num_heads=8,
               num_kv_heads=4, head_dim=256, dtype="float32"),
    *(
        RaggedCase(name=f"ragged_packed{'_shuffled' * shuffled}_{dtype}", segments=_PACKED,
                   padding=3, is_shuffled=shuffled, dtype=dtype, **_SMALL)
        for shuffled in (False, True)
        for dtype in _DTYPES
    ),
    RaggedCase(name="ragged_one_row", segments=((700, 1),), page_size=32, **_SMALL),
    RaggedCase(name="ragged_whole_blocks", segments=((600, 40), (300, 20)), padding=2, **_SMALL),
    RaggedCase(name="ragged_whole_blocks_float32", segments=((150, 13),), dtype="float32",
               **_SMALL),
    RaggedCase(name="ragged_full_bucket", segments=((64, 64),), page_size=32, max_pages=2,
               dtype="float32", **_SMALL),
    RaggedCase(name="ragged_padding_only", segments=((20, 0),), padding=4, dtype="float32",
               **_SMALL),
    RaggedCase(name="ragged_sliding_float32", segments=((161, 11), (30, 30)), padding=2,
               sliding_window=45, dtype="float32", **_SMALL),
    RaggedCase(name="ragged_sliding_bfloat16", segments=((500, 11),), sliding_window=300, **_SMALL),
    *(
        RaggedCase(name=f"ragged_group_{group}", segments=((29, 13), (17, 3)), padding=1,
                   num_heads=2 * group, num_kv_heads=2, head_dim=16, dtype="float32",
                   tags=_INTERPRET)
        for group in range(1, 9)
    ),
    *(
        RaggedCase(name=f"ragged_head_dim_{dim}_page_{page}_{dtype}", segments=((300, 9),),
                   num_heads=2, num_kv_heads=1, head_dim=dim, page_size=page, dtype=dtype,
                   tags=_INTERPRET)
        for dim, page in ((96, 16), (128, 64), (256, 256))
        for dtype in _DTYPES
    ),
)  # fmt: skip

CASES: tuple[PagedCase, ...] = (*_DECODE_CASES, *_RAGGED_CASES)
"""Kernels compile for all of them, by the compile gate; the interpreter runs the small ones."""
