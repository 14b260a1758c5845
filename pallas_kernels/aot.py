"""Compilation for a GPU that is not there: memory, kernels, registers, spills, optimized HLO.

XLA compiles for a described device (`devices/*.textproto`) as it does on the device itself; only
running needs one. Needs the extra `aot` (XLA's CUDA plugin and ptxas); keep `JAX_PLATFORMS=cpu`
set, for with the plugin installed and no GPU jax otherwise complains at start.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.resources
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib.version
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels import _platform, _ptx

_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU as the compiler sees it.

    Attributes:
      name: Name of its file in `devices/`.
      description: Product name.
      compute_capability: 90 for sm_90.
      num_cores: Streaming multiprocessors.
      shared_memory_bytes: Largest that one thread block may ask for.
      memory_bytes: Of the whole device.
      memory_bandwidth: Bytes per second, by its data sheet.
      target_config: Text of XLA's GpuTargetConfigProto.
    """

    name: str
    description: str
    compute_capability: int
    num_cores: int
    shared_memory_bytes: int
    memory_bytes: int
    memory_bandwidth: int
    target_config: str

    @property
    def architecture(self) -> str:
        """Name for ptxas; Hopper's wgmma is in sm_90a alone."""
        suffix = "a" if self.compute_capability >= 90 else ""
        return f"sm_{self.compute_capability}{suffix}"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What is known of a compiled program.

    Attributes:
      compile_s: Seconds for tracing, lowering and compiling.
      argument_bytes: Of the arguments.
      output_bytes: Of the results.
      alias_bytes: Of the results that lie where donated arguments lay.
      temp_bytes: Of temporaries, all of them at once.
      hlo: Optimized HLO.
      kernels: Generated kernels (Pallas, Triton), each once, in order of first launch.
    """

    compile_s: float
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    hlo: str
    kernels: tuple[_ptx.Kernel, ...]

    def kernel(self, name: str) -> _ptx.Kernel:
        """The kernel of that name.

        Raises:
          KeyError: If there is none; lists those that there are.
        """
        for kernel in self.kernels:
            if kernel.name == name:
                return kernel
        raise KeyError(f"{name!r} is none of {[kernel.name for kernel in self.kernels]}")


def device_names() -> list[str]:
    """Names that `device` knows."""
    files = importlib.resources.files("pallas_kernels") / "devices"
    return sorted(
        file.name.removesuffix(".textproto")
        for file in files.iterdir()
        if file.name.endswith(".textproto")
    )


@functools.cache
def device(name: str) -> Device:
    """Returns a described GPU.

    Raises:
      ValueError: If there is no description of that name.
    """
    if name not in device_names():
        raise ValueError(f"`device` must be one of {', '.join(device_names())}; got {name!r}.")
    folder = importlib.resources.files("pallas_kernels") / "devices"
    text = (folder / f"{name}.textproto").read_text(encoding="utf-8")

    def number(field: str) -> int:
        found = re.search(rf"\b{field}: (\d+)", text)
        assert found, f"{name}.textproto has no {field}"
        return int(found[1])

    description = re.search(r'device_description_str: "(.*)"', text)
    assert description, f"{name}.textproto has no device_description_str"
    return Device(
        name=name,
        description=description[1],
        compute_capability=10 * number("major") + number("minor"),
        num_cores=number("core_count"),
        shared_memory_bytes=number("shared_memory_per_block_optin"),
        memory_bytes=number("device_memory_size"),
        memory_bandwidth=number("memory_bandwidth"),
        target_config=text,
    )


_described = device  # under a name that no parameter hides


def missing() -> str | None:
    """Says what compilation for a GPU lacks here; None if nothing."""
    wanted = jaxlib.version.__version__
    found = {}
    for name in _PLUGINS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if not found:
        return (
            f"XLA's CUDA plugin is not installed; pip install 'flexjax[aot]' (for this jaxlib: "
            f"jax-cuda12-plugin=={wanted} jax-cuda12-pjrt=={wanted} nvidia-cuda-nvcc-cu12)."
        )
    if wanted not in found.values():
        versions = ", ".join(f"{name} {version}" for name, version in found.items())
        return f"XLA's CUDA plugin must have jaxlib's version, {wanted}; found {versions}."
    if _ptx.ptxas() is None:
        return "ptxas is not installed; pip install 'flexjax[aot]' (nvidia-cuda-nvcc-cu12)."
    return None


@functools.cache
def topology(name: str) -> Any:
    """The described GPU as a topology of one device, for `jax.jit(...).lower`.

    Raises:
      ImportError: If something needed is not installed; says what.
    """
    described = device(name)
    if lack := missing():
        raise ImportError(lack)
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=name,
        topology="1x1x1",
        target_config=described.target_config,
    )


def compile_for(
    function: Callable[..., Any],
    avals: Sequence[Any],
    *,
    device: str,
    donate_argnums: int | Sequence[int] = (),
    compiler_options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compiles `jax.jit(function)` for a GPU, with no array allocated and no GPU at hand.

    Args:
      function: What to compile.
      avals: Its positional arguments: pytrees of `jax.ShapeDtypeStruct` (or of arrays, of which
        only shape and dtype are taken).
      device: One of `device_names()`.
      donate_argnums: As for `jax.jit`.
      compiler_options: XLA's, by name, for this compilation.

    Raises:
      ValueError: If there is no such device.
      ImportError: If something needed is not installed; says what.
    """
    # jax 0.11 can write such a program to its persistent cache but not read it; it then compiles.
    warnings.filterwarnings(
        "ignore", message="(?s)Error reading persistent compilation cache entry.*PjRtCompiler must"
    )
    target = topology(device)
    described = _described(device)
    placed = SingleDeviceSharding(target.devices[0])
    placed_avals = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), tuple(avals)
    )
    # From jax 0.11 on, lowering Triton kernels asks the mesh what device it is for.
    mesh = topologies.make_mesh(target, (1,), ("device",)).abstract_mesh
    started = time.perf_counter()
    with (
        _platform.compile_target(described.compute_capability),
        jax.sharding.use_abstract_mesh(mesh),
    ):
        lowered = jax.jit(function, donate_argnums=donate_argnums).lower(*placed_avals)
    with tempfile.TemporaryDirectory(prefix="pallas_kernels_") as folder:
        # The second makes newer versions dump PTX too; a broad pattern costs 20 s of symbolizing.
        options: dict[str, Any] = {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"}
        options["xla_backend_optimization_level"] = 3  # whatever XLA_FLAGS say for the CPU
        options |= compiler_options or {}
        executable = lowered.compile(compiler_options=options)
        compile_s = time.perf_counter() - started
        hlo = executable.as_text()
        assert hlo is not None
        kernels = _ptx.kernels(hlo, Path(folder), described.architecture)
    memory = executable.memory_analysis()
    assert memory is not None
    return Compiled(
        compile_s=compile_s,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        hlo=hlo,
        kernels=kernels,
    )
