"""Cases of `dual_matmul`: the pairs of products of a co-serving step, and awkward shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._cases import Case, normal
from pallas_kernels.dual_matmul.api import dual_matmul


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualMatmulCase(Case):
    """Sizes of one call; a side whose `rows` are 0 is empty.

    Attributes:
      layers: Layers of every stack.
      rows: Forward rows, T.
      depth: Their width, I.
      widths: Width of each forward result.
      d_rows: Backward rows, M.
      d_depths: Width of each dy.
      d_width: Width of dx, Q.
      with_accs: Whether the results start from accumulators.
      poisoned: Fills every layer that is not read with NaN.
    """

    op: ClassVar[str] = "dual_matmul"
    implementations: ClassVar[tuple[str, ...]] = ("pallas_triton",)

    layers: int = 2
    rows: int = 0
    depth: int = 0
    widths: tuple[int, ...] = ()
    d_rows: int = 0
    d_depths: tuple[int, ...] = ()
    d_width: int = 0
    with_accs: bool = False
    poisoned: bool = False

    def avals(self) -> tuple[Any, ...]:
        """x, kernels, layer, d_ys, d_kernels, d_layer, accs, d_acc."""

        def operand(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype))

        def acc(*shape: int) -> jax.ShapeDtypeStruct | None:
            return jax.ShapeDtypeStruct(shape, jnp.float32) if self.with_accs else None

        layer = jax.ShapeDtypeStruct((), jnp.int32)
        forward: tuple[Any, ...] = (None, (), None)
        backward: tuple[Any, ...] = ((), (), None)
        if self.rows:
            kernels = tuple(operand(self.layers, self.depth, width) for width in self.widths)
            forward = (operand(self.rows, self.depth), kernels, layer)
        if self.d_rows:
            d_ys = tuple(operand(self.d_rows, depth) for depth in self.d_depths)
            kernels = tuple(operand(self.layers, self.d_width, depth) for depth in self.d_depths)
            backward = (d_ys, kernels, layer)
        accs = tuple(acc(self.rows, width) for width in self.widths)
        d_acc = acc(self.d_rows, self.d_width) if self.d_rows else None
        return (*forward, *backward, accs, d_acc)

    def arrays(self, rng: np.random.Generator) -> tuple[Any, ...]:
        """Normal draws; the forward side reads the last layer, the backward side the first."""

        def draw(aval: jax.ShapeDtypeStruct) -> np.ndarray:
            return normal(rng, aval.shape, aval.dtype)

        x, kernels, _, d_ys, d_kernels, _, accs, d_acc = jax.tree.map(draw, self.avals())
        layer = np.int32(self.layers - 1) if self.rows else None
        d_layer = np.int32(0) if self.d_rows else None
        if self.poisoned:
            for stacks, read in ((kernels, layer), (d_kernels, d_layer)):
                for stack in stacks:
                    stack[np.arange(self.layers) != read] = np.nan
        return x, kernels, layer, d_ys, d_kernels, d_layer, accs, d_acc

    def function(self, implementation: str | None) -> Callable[..., Any]:
        """`dual_matmul` of what `avals` describes."""

        def call(x, kernels, layer, d_ys, d_kernels, d_layer, accs, d_acc):
            options = {"accs": accs, "d_acc": d_acc, "implementation": implementation}
            return dual_matmul(x, kernels, layer, d_ys, d_kernels, d_layer, **options)

        return call

    def flops(self) -> float:
        """Two per multiplication of either side."""
        forward = self.rows * self.depth * sum(self.widths)
        return 2.0 * (forward + self.d_rows * sum(self.d_depths) * self.d_width)

    def bytes(self) -> float:
        """One layer of each stack, the rows, and results in float32 (read too, if accumulated)."""
        itemsize = jnp.dtype(self.dtype).itemsize
        forward = self.rows * self.depth + self.depth * sum(self.widths)
        backward = (self.d_rows + self.d_width) * sum(self.d_depths)
        results = self.rows * sum(self.widths) + self.d_rows * self.d_width
        return float((forward + backward) * itemsize + results * (8 if self.with_accs else 4))


def _layer_pairs(
    prefix: str,
    layers: int,
    dim: int,
    kv_dim: int,
    mlp_dim: int,
    rows: int,
    d_rows: int,
    tags: frozenset[str],
    with_accs: bool = False,
) -> list[DualMatmulCase]:
    """The linears of a layer, forward, each beside the input gradient that counter-flow pairs."""
    qkv = (dim, (dim, kv_dim, kv_dim))
    out = (dim, (dim,))
    gate_up = (dim, (mlp_dim, mlp_dim))
    down = (mlp_dim, (dim,))
    pairs = {
        "qkv-out": (qkv, out),
        "out-qkv": (out, qkv),
        "gate_up-down": (gate_up, down),
        "down-gate_up": (down, gate_up),
        "qkv-down": (qkv, down),
    }
    return [
        DualMatmulCase(
            name=f"{prefix}-{name}-{rows}-{d_rows}{'-added' if with_accs else ''}",
            tags=tags,
            layers=layers,
            rows=rows,
            depth=forward[0] if rows else 0,
            widths=forward[1] if rows else (),
            d_rows=d_rows,
            d_depths=backward[1] if d_rows else (),
            d_width=backward[0] if d_rows else 0,
            with_accs=with_accs,
        )
        for name, (forward, backward) in pairs.items()
    ]


_LLAMA_8B = ("llama-3.1-8b", 32, 4096, 1024, 14336)
_QWEN_14B = ("qwen2.5-14b", 48, 5120, 1024, 13824)
_HOT = frozenset({"hot", "wgmma"})
_SMALL = frozenset({"interpret"})

_FORWARD: dict[str, Any] = {"rows": 5, "depth": 40, "widths": (70, 24)}
_BACKWARD: dict[str, Any] = {"d_rows": 70, "d_depths": (33, 130), "d_width": 48}

CASES: tuple[DualMatmulCase, ...] = (
    *_layer_pairs(*_LLAMA_8B, rows=64, d_rows=512, tags=_HOT),
    *_layer_pairs(*_LLAMA_8B, rows=512, d_rows=512, tags=_HOT),
    *_layer_pairs(*_LLAMA_8B, rows=576, d_rows=512, tags=_HOT, with_accs=True),
    *_layer_pairs(*_LLAMA_8B, rows=64, d_rows=0, tags=_HOT),
    *_layer_pairs(*_LLAMA_8B, rows=16, d_rows=0, tags=frozenset({"hot"})),
    # A stack of more than 4 GiB: offsets need 64 bits.
    *_layer_pairs(*_QWEN_14B, rows=64, d_rows=512, tags=frozenset({"wgmma"})),
    DualMatmulCase(name="odd-sizes", tags=_SMALL, dtype="float32", **_FORWARD, **_BACKWARD),
    DualMatmulCase(name="odd-sizes-bf16", tags=_SMALL, **_FORWARD, **_BACKWARD),
    DualMatmulCase(
        name="other-layers-poisoned",
        tags=_SMALL,
        dtype="float32",
        layers=3,
        poisoned=True,
        **_FORWARD,
        **_BACKWARD,
    ),
    DualMatmulCase(
        name="accumulated", tags=_SMALL, dtype="float32", with_accs=True, **_FORWARD, **_BACKWARD
    ),
    DualMatmulCase(
        name="accumulated-bf16",
        tags=_SMALL,
        with_accs=True,
        rows=64,
        depth=128,
        widths=(128, 32),
        d_rows=80,
        d_depths=(64, 256),
        d_width=128,
    ),
    DualMatmulCase(name="one-row", tags=_SMALL, rows=1, depth=1100, widths=(40,)),
    DualMatmulCase(
        name="one-row-float32", tags=_SMALL, dtype="float32", rows=1, depth=1100, widths=(40,)
    ),
    DualMatmulCase(name="backward-only", tags=_SMALL, dtype="float32", **_BACKWARD),
    DualMatmulCase(
        name="many-row-blocks",
        tags=_SMALL,
        dtype="float32",
        rows=330,
        depth=32,
        widths=(100,),
        d_rows=17,
        d_depths=(1100,),
        d_width=16,
    ),
)
