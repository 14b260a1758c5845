"""What a named kernel case is: one set of shapes that tests, compile gate and benchmarks share."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

OPS = (
    "paged_attention",
    "window_attention_backward",
    "co_serve_attention",
    "dual_matmul",
    "grouped_lora",
    "linear_cross_entropy",
)
"""Every op that has kernels, by the name of its package."""

TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}
"""Largest allowed difference from the reference, relative to its largest value, by dtype."""

TAGS = {
    "hot": "A serving shape of llama-3.1-8b: no register may spill; timed by benchmarks.",
    "interpret": "Small enough for the interpreter; tests compare it with the reference.",
    "wgmma": "The PTX for sm_90a must hold wgmma instructions.",
}
"""What a tag asks for."""


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Standard normal values; of gigabytes, repetitions of a stretch of odd length."""
    count = math.prod(shape)
    drawn = rng.standard_normal(min(count, 2**22 + 1), np.float32).astype(dtype)
    return np.resize(drawn, shape) if count > drawn.size else drawn.reshape(shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(abc.ABC):
    """One call of an op. Each op's `cases.py` subclasses it, adding the sizes as fields.

    Attributes:
      op: Name of the op, that of its package.
      implementations: The op's GPU backends, each of which must run every case of the op, except
        those named in `unsupported`.
      donate_argnums: Positional arguments that the op adds to in place.
      name: Unique within the op.
      dtype: Of the operands: "float32" or "bfloat16".
      tags: Of `TAGS`.
      unsupported: Backends that refuse this case with NotImplementedError.
    """

    op: ClassVar[str]
    implementations: ClassVar[tuple[str, ...]]
    donate_argnums: ClassVar[tuple[int, ...]] = ()

    name: str
    dtype: str = "bfloat16"
    tags: frozenset[str] = frozenset()
    unsupported: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if unknown := self.tags - TAGS.keys():
            raise ValueError(f"`tags` must be of {sorted(TAGS)}; got {sorted(unknown)}.")

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    @property
    def tolerance(self) -> float:
        """Allowed difference from the reference, relative to its largest value."""
        return TOLERANCES[self.dtype]

    @abc.abstractmethod
    def arrays(self, rng: np.random.Generator) -> tuple[Any, ...]:
        """Arguments with data: pytrees of numpy arrays, with the shapes of `avals`."""

    @abc.abstractmethod
    def avals(self) -> tuple[Any, ...]:
        """The same arguments as `jax.ShapeDtypeStruct`, with nothing allocated."""

    @abc.abstractmethod
    def function(self, implementation: str | None) -> Callable[..., Any]:
        """The op as a function of `avals` alone; static options and implementation are bound."""

    @abc.abstractmethod
    def flops(self) -> float:
        """Multiplications and additions that the result needs, counted from shapes."""

    @abc.abstractmethod
    def bytes(self) -> float:
        """Bytes that must cross the GPU's memory: each operand in once, each result out once."""
