"""Kernels for the CPU, written in Python and compiled by LLVM when they are first traced.

`builder` writes code, `compile` makes it callable from jitted programs, and kernels share products
(`packing`, `gemm`, `few_rows`) and functions of vectors (`vector`). All of them import llvmlite,
which need not be installed: a backend asks `require_llvm` first, and imports its code after that.
"""

from __future__ import annotations

import importlib.util
import sys

import numpy as np

from pallas_kernels._platform import target


def can_run_llvm() -> bool:
    """Whether kernels for the CPU can run on what is being traced for."""
    found = target()
    if found.platform != "cpu" or found.is_interpreted or sys.maxsize < 2**32:
        return False
    return sys.platform != "win32" and importlib.util.find_spec("llvmlite") is not None


def prefers_llvm(implementation: str | None, dtype) -> bool:
    """Whether `implementation` means kernels for the CPU where one takes arrays of `dtype`."""
    if implementation is None:
        return can_run_llvm() and np.dtype(dtype) == np.float32
    return implementation == "llvm"


def cpu_implementation(implementation: str | None) -> str | None:
    """What to ask an op for that has kernels for CPUs alone, where others get `implementation`."""
    return implementation if implementation in (None, "llvm") else "reference"


def require_llvm(op: str, **arrays) -> None:
    """Checks that a kernel for the CPU can run on the target, with these arrays.

    Args:
      op: What is asked for.
      **arrays: Arrays by name, which must be float32; None is allowed.

    Raises:
      NotImplementedError: If not.
    """
    if not can_run_llvm():
        raise NotImplementedError(f"{op} by LLVM needs a CPU and llvmlite.")
    for name, array in arrays.items():
        if array is not None and array.dtype.name != "float32":
            raise NotImplementedError(
                f"{op} by LLVM takes float32 arrays; got `{name}` of {array.dtype.name}."
            )
