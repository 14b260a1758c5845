"""Products with stacked weights on the CPU: one call for each side."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._llvm import require_llvm


def dual_matmul(
    x: Float[Array, "T I"] | None,
    kernels: tuple[Float[Array, "L I _"], ...],
    layer: Int[Array, ""] | None,
    d_ys: tuple[Float[Array, "M _"], ...],
    d_kernels: tuple[Float[Array, "_ Q _"], ...],
    d_layer: Int[Array, ""] | None,
    *,
    accs: tuple[Float[Array, "T _"] | None, ...],
    d_acc: Float[Array, "M Q"] | None,
    out_dtype: Any,
) -> tuple[tuple[Float[Array, "T _"], ...], Float[Array, "M Q"] | None]:
    """See `api.dual_matmul`."""
    names = {f"kernels[{n}]": kernel for n, kernel in enumerate((*kernels, *d_kernels))}
    names |= {f"d_ys[{n}]": d_y for n, d_y in enumerate(d_ys)}
    require_llvm("dual_matmul", x=x, **names)
    if out_dtype != jnp.float32:
        raise NotImplementedError(f"dual_matmul by LLVM gives float32; got {out_dtype}.")
    from pallas_kernels.dual_matmul import llvm_code

    ys: tuple[Array, ...] = ()
    if x is not None and layer is not None:
        ys = llvm_code.forward(x, kernels, layer, accs)
    dx = None if d_layer is None else llvm_code.backward(d_ys, d_kernels, d_layer, d_acc)
    return ys, dx
