"""Named cases of window_attention_backward, and the random windows that they are made of."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._cases import Case
from pallas_kernels.paged_attention import types
from pallas_kernels.window_attention_backward import api

PageList: Any = types.PageList  # here of numpy arrays, or of shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowCase(Case):
    """A window over shuffled pages, in which everything that no row sees is NaN.

    Attributes:
      segments: Context length and rows of each sequence; the rows are its last positions, so that
        sequences whose rows are all of it have been packed whole.
      padding: Rows of padding among the others.
      num_heads: N.
      num_kv_heads: K.
      head_dim: H.
      page_size: Z.
      max_pages: M; beyond the pages in use it is padding.
      pool_pages: P; None for a few more than are in use.
      num_layers: L, and the layers of the accumulators.
      sliding_window: Keys that a row sees; None for all.
      is_shuffled: Rows and pages are in random order.
    """

    op: ClassVar[str] = "window_attention_backward"
    implementations: ClassVar[tuple[str, ...]] = ("pallas_triton",)
    donate_argnums: ClassVar[tuple[int, ...]] = (10, 11)

    segments: tuple[tuple[int, int], ...]
    padding: int = 0
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int = 16
    max_pages: int | None = None
    pool_pages: int | None = None
    num_layers: int = 2
    sliding_window: int | None = None
    is_shuffled: bool = False

    @property
    def num_rows(self) -> int:
        """W."""
        return sum(rows for _, rows in self.segments) + self.padding

    @property
    def used_pages(self) -> int:
        """Entries of the page list that are in use."""
        return sum(-(-length // self.page_size) for length, _ in self.segments)

    @property
    def sm_scale(self) -> float:
        """The usual scale."""
        return self.head_dim**-0.5

    @property
    def layer(self) -> int:
        """Layer of the pool, and of the accumulators: the last."""
        return self.num_layers - 1

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        pages = self.max_pages or self.used_pages + 3
        token = (self.page_size, self.num_kv_heads, self.head_dim)
        return {
            "rows": (self.num_rows, self.num_heads, self.head_dim),
            "pages": (pages,),
            "pool": (self.num_layers, self.pool_pages or self.used_pages + 3, *token),
            "accs": (self.num_layers, pages, *token),
        }

    def page_lists(self, rng: np.random.Generator) -> tuple[Any, np.ndarray]:
        """The page list, and the accumulator page of each entry."""
        shapes = self._shapes()
        pages, acc_pages, segments, starts = np.full((4, *shapes["pages"]), -1, np.int32)
        used = self.used_pages
        pages[:used] = rng.permutation(shapes["pool"][1])[:used]
        acc_pages[:used] = rng.permutation(shapes["accs"][1])[:used]
        entries = [
            (segment, start)
            for segment, (length, _) in enumerate(self.segments)
            for start in range(0, length, self.page_size)
        ]
        if self.is_shuffled:
            rng.shuffle(entries)
        segments[:used], starts[:used] = np.array(entries).T
        return PageList(pages, segments, starts, np.int32(used)), acc_pages

    def row_places(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Segment and position of each row, -1 padding."""
        places = [
            (segment, position)
            for segment, (length, rows) in enumerate(self.segments)
            for position in range(length - rows, length)
        ] + [(-1, -1)] * self.padding
        if self.is_shuffled:
            rng.shuffle(places)
        segments, positions = np.array(places, np.int32).T
        return segments, positions

    def dense(self, page_list: Any, pool: np.ndarray) -> list[np.ndarray]:
        """Keys or values of each segment in order, [length, K, H]."""
        found = []
        for segment, (length, _) in enumerate(self.segments):
            entries = np.flatnonzero(page_list.segments == segment)
            entries = entries[np.argsort(page_list.starts[entries])]
            tokens = pool[self.layer, page_list.pages[entries]]
            found.append(tokens.reshape(-1, *tokens.shape[2:])[:length])
        return found

    def arrays(self, rng: np.random.Generator) -> tuple[Any, ...]:
        """A forward pass's results, and gradients of unit variance; NaN in what must not be read.

        Accumulators hold numbers of unit variance in the layer that is added to.
        """
        shapes, dtype = self._shapes(), jnp.dtype(self.dtype)
        page_list, acc_pages = self.page_lists(rng)
        segments, positions = self.row_places(rng)
        pools = []
        for _ in range(2):
            pool = np.zeros(shapes["pool"], dtype)
            pool[self.layer] = np.nan
            for entry in range(self.used_pages):
                length = self.segments[page_list.segments[entry]][0]
                count = min(self.page_size, length - page_list.starts[entry])
                tokens = rng.standard_normal((count, *pool.shape[3:]), np.float32)
                pool[self.layer, page_list.pages[entry], :count] = tokens
            pools.append(pool)
        q = rng.standard_normal(shapes["rows"], np.float32).astype(dtype)
        d_out = rng.standard_normal(shapes["rows"], np.float32).astype(dtype)
        out, lse = self.forward(q, page_list, pools, segments, positions)
        for rows in (q, d_out, out, lse):
            rows[segments < 0] = np.nan
        accs = [np.zeros(shapes["accs"], np.float32) for _ in range(2)]
        for acc in accs:
            acc[self.layer] = rng.standard_normal(acc.shape[1:], np.float32)
        layer = np.asarray(self.layer, np.int32)
        rows = (q, out, lse, d_out)
        return (*rows, *pools, layer, page_list, segments, positions, *accs, layer, acc_pages)

    def forward(self, q, page_list, pools, segments, positions):
        """Outputs and log-sum-exps of the rows, as the forward pass has them."""
        out, lse = np.zeros(q.shape, np.float32), np.zeros(q.shape[:2], np.float32)
        keys, values = (self.dense(page_list, pool) for pool in pools)
        for segment, (k, v) in enumerate(zip(keys, values, strict=True)):
            mine = np.flatnonzero(segments == segment)
            out[mine], lse[mine] = self.attend(q[mine], k, v, positions[mine])
        return out.astype(q.dtype), lse

    def attend(self, q, k, v, positions):
        """Plain attention of rows of one sequence, [t, N, H]; returns outputs and log-sum-exps."""
        q, k, v = (np.asarray(x, np.float32) for x in (q, k, v))
        repeats = self.num_heads // self.num_kv_heads
        k, v = (np.repeat(x, repeats, axis=1).transpose(1, 0, 2) for x in (k, v))
        scores = q.transpose(1, 0, 2) @ k.transpose(0, 2, 1) * self.sm_scale
        gap = positions[:, None] - np.arange(k.shape[1])[None, :]
        is_seen = (gap >= 0) & (gap < (self.sliding_window or k.shape[1]))
        scores = np.where(is_seen, scores, -np.inf)
        maximum = scores.max(-1, keepdims=True)
        probs = np.exp(scores - maximum)
        total = probs.sum(-1, keepdims=True)
        out = (probs / total) @ v
        return out.transpose(1, 0, 2), (maximum + np.log(total))[..., 0].T

    def avals(self) -> tuple[Any, ...]:
        """Shapes of the arguments."""
        shapes, dtype = self._shapes(), jnp.dtype(self.dtype)

        def int32(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        rows = jax.ShapeDtypeStruct(shapes["rows"], dtype)
        pool = jax.ShapeDtypeStruct(shapes["pool"], dtype)
        acc = jax.ShapeDtypeStruct(shapes["accs"], jnp.float32)
        lse = jax.ShapeDtypeStruct(shapes["rows"][:2], jnp.float32)
        page_list = PageList(*(int32(*shapes["pages"]) for _ in range(3)), int32())
        places = (int32(self.num_rows), int32(self.num_rows))
        ends = (*places, acc, acc, int32(), int32(*shapes["pages"]))
        return (rows, rows, lse, rows, pool, pool, int32(), page_list, *ends)

    def function(self, implementation: str | None) -> Callable[..., Any]:
        """`api.window_attention_backward` with scale and sliding window bound."""
        return functools.partial(
            api.window_attention_backward,
            sm_scale=self.sm_scale,
            sliding_window=self.sliding_window,
            implementation=implementation,
        )

    def num_pairs(self) -> int:
        """(row, key) pairs in which the row sees the key."""
        limit = self.sliding_window or max(length for length, _ in self.segments)
        return sum(
            min(position + 1, limit)
            for length, rows in self.segments
            for position in range(length - rows, length)
        )

    def flops(self) -> float:
        """Five products for each pair and head: scores, dP, dQ, dK and dV."""
        return 10 * self.num_pairs() * self.num_heads * self.head_dim

    def bytes(self) -> float:
        """Rows and keys in, dQ out, accumulators in and out."""
        itemsize = jnp.dtype(self.dtype).itemsize
        row = self.num_heads * (self.head_dim * (3 * itemsize + 4) + 4)
        key = self.num_kv_heads * self.head_dim * 2 * (itemsize + 8)
        return self.num_rows * row + sum(length for length, _ in self.segments) * key


_LLAMA: dict[str, Any] = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
_LLAMA_POOL: dict[str, Any] = {"num_layers": 32, "pool_pages": 5120, "max_pages": 512}
_SMALL: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
_HOT = frozenset({"hot", "wgmma"})
_WGMMA = frozenset({"wgmma"})
_INTERPRET = frozenset({"interpret"})
_PACKED = ((37, 5), (9, 9), (1, 1), (21, 6))

CASES: tuple[WindowCase, ...] = (
    WindowCase(name="llama_8k", segments=((8192, 512),), tags=_HOT, **_LLAMA, **_LLAMA_POOL),
    WindowCase(
        name="llama_8k_64_rows", segments=((8192, 64),), tags=_HOT, **_LLAMA, **_LLAMA_POOL
    ),
    WindowCase(
        name="llama_packed",
        segments=((512, 512),) * 7 + ((509, 480),),
        padding=32,
        max_pages=512,
        is_shuffled=True,
        tags=_WGMMA,
        **_LLAMA,
    ),
    WindowCase(
        name="llama_sliding", segments=((8192, 512),), sliding_window=4096, tags=_WGMMA, **_LLAMA
    ),
    WindowCase(
        name="group_5", segments=((2048, 256),), tags=_WGMMA, num_heads=40, num_kv_heads=8,
        head_dim=128, page_size=64,
    ),
    WindowCase(
        name="head_dim_256", segments=((2048, 256),), tags=_WGMMA, num_heads=16, num_kv_heads=4,
        head_dim=256, page_size=256,
    ),
    WindowCase(
        name="head_dim_96", segments=((2048, 256),), tags=_WGMMA, num_heads=32, num_kv_heads=32,
        head_dim=96,
    ),
    WindowCase(name="float32_llama", segments=((2048, 256),), dtype="float32", **_LLAMA),
    WindowCase(name="float32_head_dim_256", segments=((999, 99),), dtype="float32", num_heads=8,
               num_kv_heads=4, head_dim=256),
    *(
        WindowCase(name=f"packed_{dtype}", segments=_PACKED, padding=3, dtype=dtype,
                   is_shuffled=True, tags=_INTERPRET, **_SMALL)
        for dtype in ("float32", "bfloat16")
    ),
    WindowCase(name="one_row", segments=((50, 1),), dtype="float32", tags=_INTERPRET, **_SMALL),
    WindowCase(name="full_bucket", segments=((64, 64),), dtype="float32", tags=_INTERPRET,
               page_size=32, max_pages=2, num_heads=2, num_kv_heads=2, head_dim=64),
    WindowCase(name="sliding_float32", segments=((61, 11), (30, 30)), padding=2, dtype="float32",
               sliding_window=13, is_shuffled=True, tags=_INTERPRET, **_SMALL),
    *(
        WindowCase(name=f"group_{group}_float32", segments=((29, 13), (17, 3)), padding=1,
                   dtype="float32", num_heads=group, num_kv_heads=1, head_dim=16, page_size=8,
                   tags=_INTERPRET)
        for group in (1, 3, 5, 6, 7, 8)
    ),
    *(
        WindowCase(name=f"head_dim_{dim}_{dtype}", segments=((70, 7),), dtype=dtype, num_heads=2,
                   num_kv_heads=1, head_dim=dim, page_size=64, tags=_INTERPRET)
        for dim, dtype in ((96, "bfloat16"), (96, "float32"), (128, "bfloat16"), (256, "float32"),
                           (256, "bfloat16"))
    ),
    WindowCase(name="page_256_bfloat16", segments=((300, 20),), page_size=256, tags=_INTERPRET,
               num_heads=3, num_kv_heads=1, head_dim=64),
)  # fmt: skip
"""Kernels compile for all of them, by the compile gate; the interpreter runs the small ones."""
