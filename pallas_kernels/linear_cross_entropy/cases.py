"""Cases of `linear_cross_entropy`: heads of real models, and awkward shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._cases import Case, normal
from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearCrossEntropyCase(Case):
    """Sizes of one call.

    Attributes:
      rows: W.
      dim: D.
      vocab: V.
      transposed_head: Whether the head is [V, D].
      ignored: Fraction of the rows that have no target.
      poisoned: Fills the rows that have no target with NaN.
      size: Standard deviation of the hidden rows; a large one makes one-hot softmaxes.
    """

    op: ClassVar[str] = "linear_cross_entropy"
    implementations: ClassVar[tuple[str, ...]] = ("pallas_triton",)

    rows: int
    dim: int
    vocab: int
    transposed_head: bool = False
    ignored: float = 0.3
    poisoned: bool = False
    size: float = 1.0

    def avals(self) -> tuple[Any, ...]:
        """Hidden rows, head, targets."""
        dtype = jnp.dtype(self.dtype)
        head = (self.vocab, self.dim) if self.transposed_head else (self.dim, self.vocab)
        return (
            jax.ShapeDtypeStruct((self.rows, self.dim), dtype),
            jax.ShapeDtypeStruct(head, dtype),
            jax.ShapeDtypeStruct((self.rows,), jnp.int32),
        )

    def arrays(self, rng: np.random.Generator) -> tuple[Any, ...]:
        """Normal draws; a head that gives logits of the size of `size`."""
        hidden_aval, head_aval, _ = self.avals()
        hidden = self.size * normal(rng, hidden_aval.shape, np.float32)
        targets = rng.integers(0, self.vocab, self.rows).astype(np.int32)
        targets[rng.random(self.rows) < self.ignored] = -1
        if self.poisoned:
            hidden[targets < 0] = np.nan
        head = normal(rng, head_aval.shape, head_aval.dtype)
        head /= np.asarray(np.sqrt(self.dim), head.dtype)
        return hidden.astype(hidden_aval.dtype), head, targets

    def function(self, implementation: str | None) -> Callable[..., Any]:
        """`linear_cross_entropy` of what `avals` describes."""
        options = {"transposed_head": self.transposed_head, "implementation": implementation}
        return lambda *arguments: linear_cross_entropy(*arguments, **options)

    def flops(self) -> float:
        """Two products: the logits, and the gradient that they weigh."""
        return 4.0 * self.rows * self.dim * self.vocab

    def bytes(self) -> float:
        """The head once per product (it does not fit a cache), rows, targets and gradient."""
        itemsize = jnp.dtype(self.dtype).itemsize
        head = 2 * self.dim * self.vocab * itemsize
        return float(head + self.rows * self.dim * (itemsize + 4) + self.rows * 4)


_HOT = frozenset({"hot", "wgmma"})
_WGMMA = frozenset({"wgmma"})
_SMALL = frozenset({"interpret"})
_LLAMA: dict[str, Any] = {"dim": 4096, "vocab": 128256}
_ODD: dict[str, Any] = {"rows": 37, "dim": 12, "vocab": 300}

CASES: tuple[LinearCrossEntropyCase, ...] = (
    LinearCrossEntropyCase(name="llama-3.1-8b-512", tags=_HOT, rows=512, **_LLAMA),
    LinearCrossEntropyCase(name="llama-3.1-8b-64", tags=_HOT, rows=64, **_LLAMA),
    LinearCrossEntropyCase(name="qwen2.5-14b-512", tags=_WGMMA, rows=512, dim=5120, vocab=152064),
    LinearCrossEntropyCase(
        name="tied-512", tags=_WGMMA, rows=512, dim=2048, vocab=128256, transposed_head=True
    ),
    LinearCrossEntropyCase(name="llama-2-7b-2048", tags=_WGMMA, rows=2048, dim=4096, vocab=32000),
    LinearCrossEntropyCase(name="odd-vocab-512", rows=512, dim=4096, vocab=50257),
    LinearCrossEntropyCase(name="odd-sizes", tags=_SMALL, dtype="float32", **_ODD),
    LinearCrossEntropyCase(name="odd-sizes-bf16", tags=_SMALL, **_ODD),
    LinearCrossEntropyCase(name="tied", tags=_SMALL, dtype="float32", transposed_head=True, **_ODD),
    LinearCrossEntropyCase(name="tied-bf16", tags=_SMALL, transposed_head=True, **_ODD),
    LinearCrossEntropyCase(
        name="one-hot-softmax", tags=_SMALL, dtype="float32", size=200.0, **_ODD
    ),
    LinearCrossEntropyCase(name="full-blocks-bf16", tags=_SMALL, rows=64, dim=64, vocab=256),
    LinearCrossEntropyCase(
        name="one-row", tags=_SMALL, dtype="float32", rows=1, dim=5, vocab=13, ignored=0.0
    ),
    LinearCrossEntropyCase(
        name="ignored-rows-poisoned", tags=_SMALL, dtype="float32", poisoned=True, **_ODD
    ),
    LinearCrossEntropyCase(
        name="no-target", tags=_SMALL, dtype="float32", rows=3, dim=8, vocab=20, ignored=1.0
    ),
)
