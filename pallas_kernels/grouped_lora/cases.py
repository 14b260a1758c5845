"""Named cases of grouped_lora and its backward pass."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._cases import Case
from pallas_kernels.grouped_lora import api

_POPULARITIES = ("distinct", "identical", "uniform", "chunks", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedLoraCase(Case):
    """Linears that share their input rows, in a bank where all that no row uses is NaN.

    Attributes:
      rows: T.
      in_features: I.
      out_features: O of each linear.
      rank: R.
      popularity: Who uses which slot. "distinct": as many slots as there are; "identical": one
        slot; "uniform": slots and the base model in shuffled order; "chunks": 64 rows of distinct
        slots, a run of one slot, a shorter run of another, a few rows of padding; "none": no row
        uses any.
      slots: A.
      layers: L.
      has_ranks: Adapters of every rank up to R, which the kernels are told.
    """

    op: ClassVar[str] = "grouped_lora"
    implementations: ClassVar[tuple[str, ...]] = ("triton", "pallas_triton")
    donate_argnums: ClassVar[tuple[int, ...]] = (1,)

    rows: int
    in_features: int
    out_features: tuple[int, ...]
    rank: int
    popularity: str = "uniform"
    slots: int = 5
    layers: int = 2
    has_ranks: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.popularity not in _POPULARITIES:
            raise ValueError(f"`popularity` must be of {_POPULARITIES}; got {self.popularity!r}.")

    @property
    def layer(self) -> int:
        """The layer read, which is the last."""
        return self.layers - 1

    def row_slots(self) -> np.ndarray:
        """Slot of each row, int32 [T]."""
        row = np.arange(self.rows)
        if self.popularity == "distinct":
            slots = row % self.slots
        elif self.popularity == "identical":
            slots = np.full_like(row, self.slots - 1)
        elif self.popularity == "none":
            slots = np.full_like(row, -1)
        elif self.popularity == "uniform":
            slots = np.random.default_rng(0).permutation(row % (self.slots + 1)) - 1
        else:
            run = 64 + (self.rows - 64) * 3 // 4
            slots = np.select(
                [row < 64, row < run, row < self.rows - 5], [row % self.slots, 1, 0], -1
            )
        return slots.astype(np.int32)

    def used_slots(self) -> np.ndarray:
        """The slots that occur, ascending."""
        slots = np.unique(self.row_slots())
        return slots[slots >= 0]

    def ranks(self) -> np.ndarray:
        """Rank of each slot, int32 [A]; the maximum is among them."""
        if not self.has_ranks:
            return np.full(self.slots, self.rank, np.int32)
        return (self.rank - np.arange(self.slots) * self.rank // self.slots).astype(np.int32)

    def arrays(self, rng: np.random.Generator) -> tuple[Any, ...]:
        """Rows of unit variance and deltas of unit variance; NaN in what must not be read."""
        dtype = jnp.dtype(self.dtype)
        slots, used = self.row_slots(), self.used_slots()
        x = rng.standard_normal((self.rows, self.in_features), np.float32)
        x[slots < 0] = np.nan
        accs, lora_a, lora_b = [], [], []
        for out in self.out_features:
            a = np.full((self.slots, self.layers, self.in_features, self.rank), np.nan, dtype)
            b = np.full((self.slots, self.layers, self.rank, out), np.nan, dtype)
            for slot in used:
                rank = self.ranks()[slot]
                down = rng.standard_normal((self.in_features, rank), np.float32)
                up = rng.standard_normal((rank, out), np.float32)
                a[slot, self.layer], b[slot, self.layer] = 0, 0
                a[slot, self.layer, :, :rank] = down / np.sqrt(self.in_features)
                b[slot, self.layer, :rank] = up / np.sqrt(rank)
            accs.append(rng.standard_normal((self.rows, out), np.float32))
            lora_a.append(a)
            lora_b.append(b)
        weights = (tuple(lora_a), tuple(lora_b))
        return (x.astype(dtype), tuple(accs), *weights, *self._rest(rng))

    def _rest(self, rng: np.random.Generator) -> tuple[Any, ...]:
        used = self.used_slots()
        scale = np.full(self.slots, np.nan, np.float32)
        scale[used] = rng.uniform(0.5, 2.0, len(used))
        active = np.full(self.num_active, -1, np.int32)
        active[: len(used)] = used
        counts = (np.asarray(self.layer, np.int32), self.row_slots(), active)
        return (scale, *counts, np.asarray(len(used), np.int32), self.ranks())

    @property
    def num_active(self) -> int:
        """Length of the list of active slots, which may end in padding."""
        return self.slots

    def avals(self) -> tuple[Any, ...]:
        """Shapes of `arrays`."""
        dtype, shape = jnp.dtype(self.dtype), jax.ShapeDtypeStruct
        bank = (self.slots, self.layers)
        outs = self.out_features
        return (
            shape((self.rows, self.in_features), dtype),
            tuple(shape((self.rows, out), jnp.float32) for out in outs),
            tuple(shape((*bank, self.in_features, self.rank), dtype) for _ in outs),
            tuple(shape((*bank, self.rank, out), dtype) for out in outs),
            *self._rest_avals(),
        )

    def _rest_avals(self) -> tuple[Any, ...]:
        int32, shape = jnp.int32, jax.ShapeDtypeStruct
        return (
            shape((self.slots,), jnp.float32),
            shape((), int32),
            shape((self.rows,), int32),
            shape((self.num_active,), int32),
            shape((), int32),
            shape((self.slots,), int32),
        )

    def function(self, implementation: str | None) -> Callable[..., Any]:
        """`grouped_lora_many`, given ranks if the case has them."""
        return self._bind(api.grouped_lora_many, implementation)

    def _bind(self, op: Callable[..., Any], implementation: str | None) -> Callable[..., Any]:
        @functools.wraps(op)
        def call(*args):
            *args, ranks = args
            given = ranks if self.has_ranks else None
            return op(*args, ranks=given, implementation=implementation)

        return call

    def flops(self) -> float:
        """Of rows that have an adapter."""
        rows = int((self.row_slots() >= 0).sum())
        return 2.0 * rows * self.rank * sum(self.in_features + out for out in self.out_features)

    def bytes(self) -> float:
        """Rows with an adapter, the adapters that occur, and the sums in and out."""
        rows, item = int((self.row_slots() >= 0).sum()), jnp.dtype(self.dtype).itemsize
        weights = self.rank * sum(self.in_features + out for out in self.out_features)
        moved = item * self.in_features + 2 * 4 * sum(self.out_features)
        return float(rows * moved + len(self.used_slots()) * weights * item)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardCase(GroupedLoraCase):
    """The backward pass of one linear.

    Attributes:
      d_y_dtype: Of the gradient at the output.
      trained: Slots for whose gradients there is room; by default all.
    """

    donate_argnums: ClassVar[tuple[int, ...]] = (2,)

    d_y_dtype: str = "float32"
    trained: int | None = None

    @property
    def num_active(self) -> int:
        """Length of the list of active slots, which may end in padding."""
        return self.slots if self.trained is None else self.trained

    def arrays(self, rng: np.random.Generator) -> tuple[Any, ...]:
        """Like those of the forward pass, with gradients of unit variance."""
        x, (d_y,), (a,), (b,), *rest = super().arrays(rng)
        d_y[self.row_slots() < 0] = np.nan
        d_x = rng.standard_normal(x.shape, np.float32)
        return (x, d_y.astype(jnp.dtype(self.d_y_dtype)), d_x, a, b, *rest)

    def avals(self) -> tuple[Any, ...]:
        """Shapes of `arrays`."""
        x, (d_y,), (a,), (b,), *rest = super().avals()
        d_y = jax.ShapeDtypeStruct(d_y.shape, jnp.dtype(self.d_y_dtype))
        return (x, d_y, jax.ShapeDtypeStruct(x.shape, jnp.float32), a, b, *rest)

    def function(self, implementation: str | None) -> Callable[..., Any]:
        """`grouped_lora_backward`, given ranks if the case has them."""
        return self._bind(api.grouped_lora_backward, implementation)

    def flops(self) -> float:
        """Two products forward, and for each of the two the gradients of both factors."""
        rows = int((self.row_slots() >= 0).sum())
        (out,) = self.out_features
        return 2.0 * rows * self.rank * (3 * self.in_features + 2 * out)

    def bytes(self) -> float:
        """Rows and sums of rows with an adapter, the adapters that occur, and their gradients."""
        rows, item = int((self.row_slots() >= 0).sum()), jnp.dtype(self.dtype).itemsize
        (out,) = self.out_features
        moved = (item + 2 * 4) * self.in_features + jnp.dtype(self.d_y_dtype).itemsize * out
        weights = len(self.used_slots()) * self.rank * (self.in_features + out) * item
        gradients = self.num_active * self.rank * (self.in_features + out) * 4
        return float(rows * moved + weights + gradients)


def _small() -> list[Case]:
    tags = frozenset({"interpret"})
    cases: list[Case] = []
    for dtype in ("float32", "bfloat16"):
        size = {"dtype": dtype, "tags": tags}
        cases += [
            GroupedLoraCase(
                name=f"one_row_{dtype}", rows=1, in_features=40, out_features=(24,), rank=8,
                popularity="identical", **size,
            ),
            GroupedLoraCase(
                name=f"odd_{dtype}", rows=37, in_features=100, out_features=(72,), rank=12, **size
            ),
            GroupedLoraCase(
                name=f"distinct_{dtype}", rows=16, in_features=64, out_features=(128,), rank=16,
                popularity="distinct", slots=16, **size,
            ),
            GroupedLoraCase(
                name=f"identical_{dtype}", rows=48, in_features=1100, out_features=(130,), rank=16,
                popularity="identical", **size,
            ),
            GroupedLoraCase(
                name=f"none_{dtype}", rows=9, in_features=32, out_features=(32,), rank=16,
                popularity="none", **size,
            ),
            GroupedLoraCase(
                name=f"many_{dtype}", rows=21, in_features=72, out_features=(136, 40, 40), rank=20,
                **size,
            ),
            GroupedLoraCase(
                name=f"ranks_{dtype}", rows=25, in_features=80, out_features=(48, 48), rank=48,
                has_ranks=True, **size,
            ),
            GroupedLoraCase(
                name=f"chunks_{dtype}", rows=150, in_features=2100, out_features=(160,), rank=16,
                popularity="chunks", slots=3, **size,
            ),
            BackwardCase(
                name=f"backward_one_row_{dtype}", rows=1, in_features=40, out_features=(24,),
                rank=8, popularity="identical", **size,
            ),
            BackwardCase(
                name=f"backward_odd_{dtype}", rows=37, in_features=100, out_features=(72,),
                rank=12, **size,
            ),
            BackwardCase(
                name=f"backward_ranks_{dtype}", rows=25, in_features=80, out_features=(48,),
                rank=48, has_ranks=True, d_y_dtype=dtype, **size,
            ),
            BackwardCase(
                name=f"backward_chunks_{dtype}", rows=150, in_features=160, out_features=(2100,),
                rank=16, popularity="chunks", slots=3, **size,
            ),
        ]  # fmt: skip
    wide = GroupedLoraCase(
        name="wide", rows=200, in_features=512, out_features=(512, 512, 512), rank=128,
        popularity="chunks",
    )  # fmt: skip
    return [*cases, wide]


_LLAMA_8B = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
_LLAMA_8B_BACKWARD = {
    "q": (4096, 4096), "kv": (4096, 1024), "gate": (4096, 14336), "down": (14336, 4096)
}  # fmt: skip


def _hot() -> list[Case]:
    cases: list[Case] = []
    for rank in (16, 64):
        for linears, (width, outs) in _LLAMA_8B.items():
            for rows, popularity in ((64, "distinct"), (576, "chunks")):
                cases.append(
                    GroupedLoraCase(
                        name=f"{linears}_r{rank}_{rows}_{popularity}",
                        tags=frozenset({"hot", "wgmma"} if rows > 128 else {"hot"}),
                        rows=rows,
                        in_features=width,
                        out_features=outs,
                        rank=rank,
                        popularity=popularity,
                        slots=33,
                        layers=4,
                    )
                )
        if rank > 16:
            decode = next(case for case in cases if case.name == f"qkv_r{rank}_64_distinct")
            name = f"qkv_r{rank}_64_ranks"
            cases.append(dataclasses.replace(decode, name=name, has_ranks=True))
        for linear, (width, out) in _LLAMA_8B_BACKWARD.items():
            cases.append(
                BackwardCase(
                    name=f"backward_{linear}_r{rank}_512",
                    tags=frozenset({"hot", "wgmma"}),
                    rows=512,
                    in_features=width,
                    out_features=(out,),
                    rank=rank,
                    popularity="identical",
                    slots=33,
                    layers=4,
                    d_y_dtype="bfloat16",
                    trained=1,
                )
            )
    return cases


CASES: tuple[Case, ...] = (*_small(), *_hot())
