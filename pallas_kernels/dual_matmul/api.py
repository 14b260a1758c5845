"""Products with stacked weights: forward X W_i and backward dY W_j^T, apart or in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._dispatch import dispatch
from pallas_kernels.dual_matmul import llvm, pallas_triton, reference

_IMPLEMENTATIONS = {
    "llvm": llvm.dual_matmul,
    "pallas_triton": pallas_triton.dual_matmul,
    "reference": reference.dual_matmul,
}


def dual_matmul(
    x: Float[Array, "T I"] | None,
    kernels: Sequence[Float[Array, "L I _"]],
    layer: Int[Array, ""] | None,
    d_ys: Sequence[Float[Array, "M _"]],
    d_kernels: Sequence[Float[Array, "_ Q _"]],
    d_layer: Int[Array, ""] | None,
    *,
    accs: Sequence[Float[Array, "T _"] | None] | None = None,
    d_acc: Float[Array, "M Q"] | None = None,
    out_dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> tuple[tuple[Float[Array, "T _"], ...], Float[Array, "M Q"] | None]:
    """Forward products of some rows and the backward product of others, in one launch.

    y_k = acc_k + x W_k[layer] for every forward kernel, and
    dx = d_acc + sum_k dy_k U_k[d_layer]^T over the backward ones. A forward product of few rows is
    bound by reading its weights, a backward product of a tile by arithmetic, and programs of both
    are interleaved so that a multiprocessor holds some of each. Linears that read the same rows
    (q, k and v; gate and up) are one call: their forward products share `x`, their input
    gradients are one sum that never leaves the registers.

    Kernels are read in place from the stack of all layers. The two sides may read the same stack.

    **Where a LoRA delta goes.** Its first product, x A, needs the whole of x before any column of
    (x A) B can begin, so it cannot be part of this launch without every column block repeating
    it. Before or after, then. Forward: after, by `grouped_lora` on `y_k` in place, which touches
    only rows that have an adapter; as `accs`, each row's delta would be written, zeros included,
    and read again here. Backward: before. The gradient that reaches x through the adapters is
    ready when dy is, in float32; passed as `d_acc` it is added to in place, and so can a residual
    branch's gradient be. A bias is best left to the compiler, which fuses it into what reads y.

    Args:
      x: Forward rows; None when there are none.
      kernels: Stacked kernels that multiply `x`; empty when there are none.
      layer: Layer that the forward side reads, int32; None when there are no forward rows.
      d_ys: Gradients at the outputs of the backward side's linears, one per kernel.
      d_kernels: Their stacked kernels, as the forward direction stores them: [L, in, out].
      d_layer: Layer that the backward side reads, int32.
      accs: What each y_k starts from, float32 (or None for zeros); None for zeros everywhere.
        Added to in place when `out_dtype` is float32 and the caller no longer needs it.
      d_acc: The same for dx.
      out_dtype: Of the results. Products always accumulate in float32.
      implementation: None, "reference", "pallas_triton", or "llvm" (on a CPU, float32).

    Returns:
      (y_k for every forward kernel, dx); dx is None without backward kernels.

    Raises:
      ValueError: If both sides are empty, or the arguments of a side do not fit each other.
      NotImplementedError: If the implementation cannot run here, or not with these dtypes.
    """
    kernels, d_ys, d_kernels = tuple(kernels), tuple(d_ys), tuple(d_kernels)
    accs = (None,) * len(kernels) if accs is None else tuple(accs)
    _check(x, kernels, layer, d_ys, d_kernels, d_layer, accs, d_acc)
    return dispatch(
        "dual_matmul",
        _IMPLEMENTATIONS,
        implementation,
        x,
        kernels,
        layer,
        d_ys,
        d_kernels,
        d_layer,
        accs=accs,
        d_acc=d_acc,
        out_dtype=jnp.dtype(out_dtype),
    )


def stacked_matmul(
    x: Float[Array, "T I"],
    kernels: Sequence[Float[Array, "L I _"]],
    layer: Int[Array, ""],
    *,
    accs: Sequence[Float[Array, "T _"] | None] | None = None,
    out_dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> tuple[Float[Array, "T _"], ...]:
    """The forward side of `dual_matmul` alone: (acc_k + x W_k[layer], ...)."""
    options = {"accs": accs, "out_dtype": out_dtype, "implementation": implementation}
    return dual_matmul(x, kernels, layer, (), (), None, **options)[0]


def stacked_matmul_transposed(
    d_ys: Sequence[Float[Array, "M _"]],
    kernels: Sequence[Float[Array, "_ Q _"]],
    layer: Int[Array, ""],
    *,
    acc: Float[Array, "M Q"] | None = None,
    out_dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> Float[Array, "M Q"]:
    """The backward side of `dual_matmul` alone: acc + sum_k dy_k W_k[layer]^T."""
    options = {"d_acc": acc, "out_dtype": out_dtype, "implementation": implementation}
    dx = dual_matmul(None, (), None, d_ys, kernels, layer, **options)[1]
    assert dx is not None
    return dx


def _check(x, kernels, layer, d_ys, d_kernels, d_layer, accs, d_acc) -> None:
    if not kernels and not d_kernels:
        raise ValueError("`kernels` and `d_kernels` must not both be empty.")
    for name, value in (("x", x), ("layer", layer)):
        if (value is None) != (not kernels):
            found = "None" if value is None else "an array"
            raise ValueError(f"`{name}` must be given with `kernels`, and only then; got {found}.")
    if (d_layer is None) != (not d_kernels):
        found = "None" if d_layer is None else "an array"
        raise ValueError(f"`d_layer` must be given with `d_kernels`, and only then; got {found}.")
    for name, values, count in (("d_ys", d_ys, len(d_kernels)), ("accs", accs, len(kernels))):
        if len(values) != count:
            raise ValueError(f"`{name}` must have {count} entries; got {len(values)}.")
    for kernel, acc in zip(kernels, accs, strict=True):
        _same("kernels", "in", kernel.shape[1], x.shape[1])
        if acc is not None:
            _same("accs", "shape", acc.shape, (x.shape[0], kernel.shape[2]))
    for d_y, kernel in zip(d_ys, d_kernels, strict=True):
        _same("d_ys", "shape", d_y.shape, (d_ys[0].shape[0], kernel.shape[2]))
        _same("d_kernels", "in", kernel.shape[1], d_kernels[0].shape[1])
    if d_acc is not None:
        if not d_kernels:
            raise ValueError("`d_acc` must be None without `d_kernels`; got an array.")
        _same("d_acc", "shape", d_acc.shape, (d_ys[0].shape[0], d_kernels[0].shape[1]))
    for name, values in (("accs", accs), ("d_acc", (d_acc,))):
        for value in values:
            if value is not None and value.dtype != jnp.float32:
                raise ValueError(f"`{name}` must be float32; got {value.dtype}.")


def _same(name: str, what: str, found, wanted) -> None:
    if found != wanted:
        raise ValueError(f"`{name}` must have {what} {wanted}; got {found}.")
