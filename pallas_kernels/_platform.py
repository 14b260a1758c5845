"""What kernels are compiled for, and everything of Pallas that depends on its version.

A kernel asks `target()` what it is being traced for. Normally that is jax's default device; ahead
of time it is set by `compile_target`, and `interpreted` runs GPU kernels on the CPU, for tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from jax.experimental.pallas import triton as plgpu

INTERPRET_VARIABLE = "PALLAS_KERNELS_INTERPRET"
"""Environment variable; "1" is `interpreted` for the whole process."""


@dataclasses.dataclass(frozen=True)
class Target:
    """What a kernel is traced for.

    Attributes:
      platform: "cpu" or "cuda".
      compute_capability: 90 for sm_90; None on a CPU.
      is_interpreted: Whether GPU kernels run in Pallas's interpreter instead.
    """

    platform: str
    compute_capability: int | None = None
    is_interpreted: bool = False

    @property
    def runs_triton(self) -> bool:
        """Whether Triton kernels can run here."""
        return self.is_interpreted or (self.compute_capability or 0) >= 80


# Part of the key of jax's caches: a function traced for one target is traced anew for another.
_CHOSEN = jax.make_user_context(None)


@functools.cache
def _default_target() -> Target:
    device = jax.devices()[0]
    if device.platform not in ("gpu", "cuda"):
        return Target("cpu")
    return Target("cuda", int(float(device.compute_capability) * 10 + 0.5))


def target() -> Target:
    """Returns what kernels are being traced for."""
    chosen: Target | None = _CHOSEN.value
    if chosen is None:
        chosen = _default_target()
        if os.environ.get(INTERPRET_VARIABLE) == "1":
            chosen = dataclasses.replace(chosen, is_interpreted=True)
    return chosen


@contextlib.contextmanager
def compile_target(compute_capability: int) -> Iterator[None]:
    """Traces kernels for a GPU that need not be present.

    Args:
      compute_capability: 90 for sm_90.
    """
    with _CHOSEN(Target("cuda", compute_capability)):
        yield


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Runs GPU kernels in the interpreter, on the CPU; for tests, and very slow."""
    with _CHOSEN(dataclasses.replace(target(), is_interpreted=True)):
        yield


def can_run_triton() -> bool:
    """Whether Triton kernels can run on what is being traced for."""
    return target().runs_triton


def require_triton(op: str) -> None:
    """Checks that a Triton kernel can run on the target.

    Raises:
      NotImplementedError: If not.
    """
    if not target().runs_triton:
        found = target().compute_capability
        what = "no NVIDIA GPU" if found is None else f"compute capability {found / 10}"
        raise NotImplementedError(f"{op} in Triton needs compute capability 8.0; found {what}.")


def triton_call(
    kernel: Callable[..., None],
    out_shape: Any,
    *,
    grid: tuple[int, ...],
    name: str,
    num_warps: int,
    num_stages: int,
    in_specs: Any = None,
    out_specs: Any = None,
    input_output_aliases: Mapping[int, int] | None = None,
) -> Callable[..., Any]:
    """`pl.pallas_call` for the Triton backend; `name` is the generated kernel's.

    Arguments without specs are whole arrays in the GPU's memory, which a kernel reads by index.
    """
    require_triton(name)
    specs = {} if in_specs is None else {"in_specs": in_specs}
    if out_specs is not None:
        specs["out_specs"] = out_specs
    return pl.pallas_call(
        kernel,
        out_shape,
        grid=grid,
        name=name,
        interpret=target().is_interpreted,
        input_output_aliases=dict(input_output_aliases or {}),
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        **specs,
    )


def next_power_of_two(value: int) -> int:
    """Smallest power of two that is at least `value`: the size of a Triton load."""
    return 1 << max(0, value - 1).bit_length()


def exp2(x: jax.Array) -> jax.Array:
    """2 ** x of float32 inside a Triton kernel, as one instruction.

    Results below 2**-126 are zero. `jnp.exp2` would spend three more instructions on these.
    """
    if target().is_interpreted:
        return jnp.exp2(x)
    return _float32_asm("ex2.approx.ftz.f32 $0, $1;", x)


def exp2_scaled(x: jax.Array, scale: float, shift: jax.Array) -> jax.Array:
    """2 ** (x * scale + shift) as `exp2` has it, in two instructions; `shift` broadcasts."""
    if target().is_interpreted:
        return jnp.exp2(x * scale + shift)
    asm = "{.reg .f32 y; fma.rn.f32 y, $1, $2, $3; ex2.approx.ftz.f32 $0, y;}"
    return _float32_asm(asm, x, jnp.full_like(x, scale), jnp.broadcast_to(shift, x.shape))


def _float32_asm(asm: str, *args: jax.Array) -> jax.Array:
    """Result of inline PTX on float32 elements of arrays of one shape."""
    [result] = plgpu.elementwise_inline_asm(
        asm,
        args=args,
        constraints="=f" + ",f" * len(args),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, jnp.float32)],
    )
    return result
