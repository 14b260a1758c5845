"""Named cases of co_serve_attention."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._cases import Case
from pallas_kernels.co_serve_attention import api, types
from pallas_kernels.window_attention_backward.cases import WindowCase

# Here of numpy arrays, or of shapes.
ChunkRows: Any = types.ChunkRows
DecodeRows: Any = types.DecodeRows
WindowRows: Any = types.WindowRows


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoServeCase(Case):
    """Forward rows and a window of sequences in one pool; what nobody may read is NaN.

    The forward rows read the last layer, the window the first.

    Attributes:
      decode: Context length of each decode row; 0 for padding. Empty: no decode part.
      chunk: Context length and rows of each chunk, at the end of the context. Empty: no chunks.
      window: The same of each sequence of the window. Empty: no window.
      padding: Rows of padding behind the chunk rows.
      num_heads: N.
      num_kv_heads: K.
      head_dim: H.
      page_size: Z.
      max_pages: Entries of the decode table's rows and of both page lists; None for a few more than
        are in use.
      pool_pages: P; None for a few more than are in use.
      num_layers: L, and the layers of the accumulators.
      sliding_window: Keys that a row sees; None for all.
    """

    op: ClassVar[str] = "co_serve_attention"
    implementations: ClassVar[tuple[str, ...]] = ("pallas_triton",)
    donate_argnums: ClassVar[tuple[int, ...]] = (6,)

    decode: tuple[int, ...] = ()
    chunk: tuple[tuple[int, int], ...] = ()
    window: tuple[tuple[int, int], ...] = ()
    padding: int = 0
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int = 16
    max_pages: int | None = None
    pool_pages: int | None = None
    num_layers: int = 2
    sliding_window: int | None = None

    def _part(self, segments: tuple[tuple[int, int], ...], padding: int = 0) -> WindowCase:
        """A part's rows and page list, as the window's cases make them."""
        return WindowCase(
            name=self.name,
            dtype=self.dtype,
            segments=segments,
            padding=padding,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            page_size=self.page_size,
            max_pages=self.max_pages,
            pool_pages=self._num_pages(),
            num_layers=self.num_layers,
            sliding_window=self.sliding_window,
        )

    def _pages_of(self, lengths: list[int]) -> int:
        return sum(-(-length // self.page_size) for length in lengths)

    def _num_pages(self) -> int:
        lengths = [*self.decode, *(length for length, _ in self.chunk + self.window)]
        return self.pool_pages or self._pages_of(lengths) + 3

    def _table_width(self) -> int:
        return self.max_pages or self._pages_of([max(self.decode)]) + 2

    def _window(self) -> WindowCase:
        return self._part(self.window)

    def _chunk(self) -> WindowCase:
        return self._part(self.chunk, self.padding)

    def arrays(self, rng: np.random.Generator) -> tuple[Any, ...]:
        """Both pools, their layer and the three parts; see `WindowCase.arrays`."""
        pages = iter(rng.permutation(self._num_pages()))
        dtype = jnp.dtype(self.dtype)
        token = (self.page_size, self.num_kv_heads, self.head_dim)
        pools = [np.zeros((self.num_layers, self._num_pages(), *token), dtype) for _ in range(2)]
        last = self.num_layers - 1
        for pool in pools:
            pool[0], pool[last] = np.nan, np.nan

        def fill(layer: int, length: int) -> list[int]:
            mine = [int(next(pages)) for _ in range(-(-length // self.page_size))]
            for index, page in enumerate(mine):
                count = min(self.page_size, length - index * self.page_size)
                for pool in pools:
                    tokens = rng.standard_normal((count, *token[1:]), np.float32)
                    pool[layer, page, :count] = tokens
            return mine

        def listed(case: WindowCase, layer: int) -> tuple[Any, np.ndarray]:
            page_list, acc_pages = case.page_lists(rng)
            entries = [page for length, _ in case.segments for page in fill(layer, length)]
            page_list.pages[: len(entries)] = entries
            return page_list, acc_pages

        def draw(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32).astype(dtype)

        decode = chunk = window = None
        if self.decode:
            table = np.full((len(self.decode), self._table_width()), -1, np.int32)
            for row, length in enumerate(self.decode):
                mine = fill(last, length)
                table[row, : len(mine)] = mine
            q = draw(len(self.decode), self.num_heads, self.head_dim)
            decode = DecodeRows(q, table, np.array(self.decode, np.int32) - 1)
        if self.chunk:
            case = self._chunk()
            page_list, _ = listed(case, last)
            q = draw(case.num_rows, self.num_heads, self.head_dim)
            chunk = ChunkRows(q, page_list, *case.row_places(rng))
        if self.window:
            case = self._window()
            page_list, acc_pages = listed(case, 0)
            segments, positions = case.row_places(rng)
            q, d_out = draw(2, case.num_rows, self.num_heads, self.head_dim)
            first = [pool[:1] for pool in pools]
            out, lse = dataclasses.replace(case, num_layers=1).forward(
                q, page_list, first, segments, positions
            )
            shape = (self.num_layers, len(acc_pages), *token)
            dk_acc, dv_acc = (rng.standard_normal(shape, np.float32) for _ in range(2))
            window = WindowRows(
                q, out, lse, d_out, np.asarray(0, np.int32), page_list, segments, positions,
                dk_acc, dv_acc, np.asarray(last, np.int32), acc_pages,
            )  # fmt: skip
        return (*pools, np.asarray(last, np.int32), decode, chunk, *self._apart(window))

    def _apart(self, window: Any) -> tuple[Any, Any]:
        """The window without accumulators, and these: they alone are donated."""
        if window is None:
            return None, None
        return window._replace(dk_acc=None, dv_acc=None), (window.dk_acc, window.dv_acc)

    def avals(self) -> tuple[Any, ...]:
        """Shapes of the arguments."""
        dtype = jnp.dtype(self.dtype)

        def int32(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        def rows(count: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((count, self.num_heads, self.head_dim), dtype)

        token = (self.page_size, self.num_kv_heads, self.head_dim)
        pool = jax.ShapeDtypeStruct((self.num_layers, self._num_pages(), *token), dtype)
        decode = chunk = window = None
        if self.decode:
            count = len(self.decode)
            decode = DecodeRows(rows(count), int32(count, self._table_width()), int32(count))
        if self.chunk:
            _, _, _, _, _, _, _, page_list, *places = self._chunk().avals()[:10]
            chunk = ChunkRows(rows(self._chunk().num_rows), page_list, *places)
        if self.window:
            avals = self._window().avals()
            window = WindowRows(*avals[:4], *avals[6:])
        return (pool, pool, int32(), decode, chunk, *self._apart(window))

    def function(self, implementation: str | None) -> Callable[..., Any]:
        """`api.co_serve_attention` with scale and sliding window bound."""
        op = functools.partial(
            api.co_serve_attention,
            sm_scale=self.head_dim**-0.5,
            sliding_window=self.sliding_window,
            implementation=implementation,
        )

        def co_serve_attention(k_pool, v_pool, layer, decode, chunk, window, accs):
            if window is not None:
                window = window._replace(dk_acc=accs[0], dv_acc=accs[1])
            return op(k_pool, v_pool, layer, decode, chunk, window)

        return co_serve_attention

    def _forward_parts(self) -> list[WindowCase]:
        """Decode and chunk rows, as far as they are there."""
        decode = tuple((length, 1) for length in self.decode if length)
        return [self._part(part) for part in (decode, self.chunk) if part]

    def flops(self) -> float:
        """Two products for each pair of a forward row and a key it sees, five for the window's."""
        pairs = sum(part.num_pairs() for part in self._forward_parts())
        window = self._window().flops() if self.window else 0
        return 4 * pairs * self.num_heads * self.head_dim + window

    def bytes(self) -> float:
        """Rows in and out, each sequence's keys once, accumulators in and out."""
        itemsize = jnp.dtype(self.dtype).itemsize
        total = self._window().bytes() if self.window else 0
        limit = self.sliding_window
        for part in self._forward_parts():
            total += part.num_rows * self.num_heads * self.head_dim * 2 * itemsize
            for length, rows in part.segments:
                read = length if limit is None else min(length, limit - 1 + rows)
                total += read * self.num_kv_heads * self.head_dim * 2 * itemsize
        return total


_LLAMA: dict[str, Any] = {
    "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "num_layers": 32, "max_pages": 512,
}  # fmt: skip
_SMALL: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
_TINY: dict[str, Any] = {"num_heads": 3, "num_kv_heads": 1, "head_dim": 16, "page_size": 8}
_HOT = frozenset({"hot", "wgmma"})
_INTERPRET = frozenset({"interpret"})
_DECODE = (33, 0, 1, 50, 18)
_CHUNK = ((20, 9), (7, 7))
_WINDOW = ((26, 11), (5, 5))

CASES: tuple[CoServeCase, ...] = (
    CoServeCase(
        name="llama_8k", decode=(8192,) * 64, chunk=((8192, 448),), window=((8192, 512),),
        pool_pages=34_000, tags=_HOT, **_LLAMA,
    ),
    CoServeCase(
        name="llama_decode_and_window", decode=(2048,) * 64, window=((8192, 256),),
        pool_pages=9_000, tags=_HOT, **_LLAMA,
    ),
    CoServeCase(
        name="llama_chunk_and_window", chunk=((2048, 512),), window=((4096, 512),),
        pool_pages=2_000, tags=_HOT, **_LLAMA,
    ),
    CoServeCase(
        name="head_dim_256", decode=(1000,) * 16, chunk=((1000, 100),), window=((2048, 256),),
        num_heads=16, num_kv_heads=4, head_dim=256,
    ),
    CoServeCase(
        name="group_5_head_dim_96", decode=(1000,) * 16, chunk=((1000, 100),),
        window=((2048, 256),), num_heads=40, num_kv_heads=8, head_dim=96, page_size=64,
    ),
    CoServeCase(
        name="float32", decode=(1000,) * 4, chunk=((1000, 100),), window=((999, 99),),
        num_heads=8, num_kv_heads=4, head_dim=128, dtype="float32",
    ),
    *(
        CoServeCase(name=f"all_{dtype}", decode=_DECODE, chunk=_CHUNK, window=_WINDOW, padding=2,
                    dtype=dtype, tags=_INTERPRET, **_SMALL)
        for dtype in ("float32", "bfloat16")
    ),
    CoServeCase(name="sliding", decode=_DECODE, chunk=_CHUNK, window=_WINDOW, dtype="float32",
                sliding_window=9, tags=_INTERPRET, **_TINY),
    CoServeCase(name="decode_only", decode=_DECODE, dtype="float32", tags=_INTERPRET, **_TINY),
    CoServeCase(name="chunk_only", chunk=_CHUNK, padding=1, dtype="float32", tags=_INTERPRET,
                **_TINY),
    CoServeCase(name="window_only", window=_WINDOW, dtype="float32", tags=_INTERPRET, **_TINY),
    CoServeCase(name="no_chunk", decode=(9,), window=((12, 1),), dtype="float32",
                tags=_INTERPRET, **_TINY),
    CoServeCase(name="no_decode", chunk=_CHUNK, window=_WINDOW, dtype="float32", tags=_INTERPRET,
                **_TINY),
    CoServeCase(name="no_window", decode=_DECODE, chunk=_CHUNK, padding=3, dtype="float32",
                tags=_INTERPRET, **_TINY),
)  # fmt: skip
"""Kernels compile for all of them, by the compile gate; the interpreter runs the small ones."""
