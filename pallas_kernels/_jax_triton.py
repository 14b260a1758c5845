"""Calls of kernels written in Triton: compiled through jax-triton, or in Triton's interpreter.

All that depends on the versions of jax-triton and Triton is here. Neither need be installed, and
neither is imported before `triton_kernel_call` is called.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from pallas_kernels import _platform, _ptx


def require_jax_triton(op: str) -> None:
    """Checks that a kernel written in Triton can run on the target.

    Raises:
      NotImplementedError: If the target runs no Triton kernels, or a package is missing.
    """
    _platform.require_triton(op)
    for module, package in (("triton", "triton"), ("jax_triton", "jax-triton")):
        if importlib.util.find_spec(module) is None:
            raise NotImplementedError(f"{op} in Triton needs {package}, which is not installed.")


def triton_kernel_call(
    kernel: Any,
    inputs: Sequence[jax.Array],
    out_shapes: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, ...],
    name: str,
    num_warps: int,
    num_stages: int,
    input_output_aliases: Mapping[int, int] | None = None,
    **constants: Any,
) -> list[jax.Array]:
    """Runs a `triton.jit` function whose parameters are inputs, then outputs, then constants.

    Args:
      kernel: The function; interpreted, it may use only what `triton.language.core` defines.
      inputs: Arrays, passed as pointers.
      out_shapes: Arrays returned; floating point.
      grid: Programs along up to three axes.
      name: The kernel's name, in errors and profiles.
      num_warps: Warps of a program.
      num_stages: Depth of pipelined loops.
      input_output_aliases: Output that takes an input's place, by input.
      **constants: Compile-time constants, by parameter.

    Raises:
      NotImplementedError: If the target runs no Triton kernels, or a package is missing.
    """
    require_jax_triton(name)
    aliases = dict(input_output_aliases or {})
    if _platform.target().is_interpreted:

        def run(*arrays):
            return _interpret(kernel, arrays, out_shapes, grid, aliases, constants)

        return jax.pure_callback(run, list(out_shapes), *inputs)
    _match_ptx_version()
    import jax_triton

    programs: Any = grid
    return jax_triton.triton_call(
        *inputs,
        kernel=kernel,
        out_shape=list(out_shapes),
        grid=programs,
        name=name,
        num_warps=num_warps,
        num_stages=num_stages,
        compute_capability=_platform.target().compute_capability,
        input_output_aliases=aliases,
        **constants,
    )


@functools.cache
def _match_ptx_version() -> None:
    """Has Triton write PTX that jax's CUDA can read: Triton 3.9 brings an assembler of its own."""
    if assemblers := _ptx.ptxas():
        for variable in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
            os.environ.setdefault(variable, assemblers[0])


class _HostTensor:
    """A numpy array as Triton's interpreter wants its arguments: like a torch tensor."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.dtype = array.dtype

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> _HostTensor:
        return self

    def cpu(self) -> _HostTensor:
        return self

    def copy_(self, other: _HostTensor) -> None:
        assert other.array is self.array, "interpreted kernels work in place"

    def new_empty(self, size: int, device: str) -> _HostTensor:
        return _HostTensor(self.array)

    def set_(self, storage: _HostTensor, offset: int, size: Any, stride: Any) -> None:
        self.array = storage.array

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return self.array.strides


_INTERPRETER_LOCK = threading.Lock()  # it keeps the program's index in a global


@contextlib.contextmanager
def _bfloat16_as_on_a_gpu() -> Iterator[None]:
    """Corrects Triton 3.9's interpreter, which truncates to bfloat16 and multiplies its bits."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.interpreter_builder
    cast, create_dot = builder.cast_impl, builder.create_dot

    def cast_rounding(source, dtype):
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(source, dtype)
        rounded = source.data.astype(ml_dtypes.bfloat16).view(np.uint16)
        return interpreter.TensorHandle(rounded, dtype.scalar)

    def create_dot_wide(a, b, *rest):
        a, b = (cast(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return create_dot(a, b, *rest)

    builder.cast_impl, builder.create_dot = cast_rounding, create_dot_wide
    try:
        yield
    finally:
        del builder.cast_impl, builder.create_dot


def _interpret(kernel, arrays, out_shapes, grid, aliases, constants) -> list[np.ndarray]:
    """Runs every program of `grid` on the CPU, one after another.

    Outputs that alias no input begin as NaN: a GPU does not clear memory.
    """
    from triton.runtime.interpreter import InterpretedFunction

    inputs = [np.asarray(array) for array in arrays]
    outputs = [np.full(out.shape, np.nan, out.dtype) for out in out_shapes]
    for source, index in aliases.items():
        outputs[index][...] = inputs[source]
        inputs[source] = outputs[index]
    tensors = [_HostTensor(array) for array in (*inputs, *outputs)]
    with _INTERPRETER_LOCK, _bfloat16_as_on_a_gpu():
        InterpretedFunction(kernel.fn).run(*tensors, grid=grid, warmup=False, **constants)
    return outputs
