"""Generated kernels of a compiled program: their PTX, and what ptxas says of it.

XLA writes the PTX of Pallas kernels to its dump folder; jax-triton puts that of Triton kernels into
the custom call, as a compressed protobuf (`jaxlib/gpu/triton.proto`).
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

_PALLAS_CALL = re.compile(
    r'custom_call_target="__gpu\$xla\.gpu\.triton"[^\n]*\bname = "([^"]+)", num_stages'
)
_TRITON_CALL = re.compile(
    r'custom_call_target="triton_kernel_call"[^\n]*\bbackend_config="((?:[^"\\]|\\.)*)"'
)
_THUNK = re.compile(
    r"(\S+) grid: \[([\d, ]+)\] threads: \[(\d+)[\d, ]*\]\s+shared_memory: (\d+) bytes"
)
_ENTRY = re.compile(r"\.entry (\w+)\s*\(")
_PTXAS_ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One generated kernel.

    Attributes:
      name: As in a profile.
      language: "pallas" or "triton".
      grid: Thread blocks along each axis, of the first launch.
      num_launches: Places in the program that launch it; a loop's body counts once.
      num_warps: Of a thread block.
      shared_bytes: Shared memory of a thread block.
      registers: Of a thread.
      spill_bytes: Registers stored to memory for want of space, and loaded from it.
      ptx: Its code.
    """

    name: str
    language: str
    grid: tuple[int, ...]
    num_launches: int
    num_warps: int
    shared_bytes: int
    registers: int
    spill_bytes: int
    ptx: str = dataclasses.field(repr=False)

    @property
    def uses_wgmma(self) -> bool:
        """Whether it multiplies with Hopper's warpgroup instructions."""
        return "wgmma.mma_async" in self.ptx

    @property
    def uses_tensor_cores(self) -> bool:
        """Whether it has matrix instructions at all."""
        return self.uses_wgmma or "mma.sync" in self.ptx


def kernels(hlo: str, dump: Path, architecture: str) -> tuple[Kernel, ...]:
    """Finds the Pallas and Triton kernels of a program.

    Args:
      hlo: Optimized HLO.
      dump: Folder with XLA's dump of the compilation.
      architecture: For ptxas: "sm_90a".
    """
    return (*_pallas_kernels(hlo, dump, architecture), *_triton_kernels(hlo, architecture))


def _pallas_kernels(hlo: str, dump: Path, architecture: str) -> Iterator[Kernel]:
    # XLA numbers kernels of the same name: name, name__1, ...
    names = {name.replace(".", "_") for name in _PALLAS_CALL.findall(hlo)}
    if not names:
        return
    code = {}
    for file in dump.glob("*.ptx"):
        text = file.read_text()
        code |= {entry: text for entry in _ENTRY.findall(text)}
    launches: dict[str, list[tuple[str, ...]]] = {}
    for file in dump.glob("*.thunk_sequence.txt"):
        for name, *launch in _THUNK.findall(file.read_text()):
            if name in names or re.sub(r"__\d+$", "", name) in names:
                launches.setdefault(name, []).append(tuple(launch))
    for name, found in launches.items():
        grid, threads, shared = found[0]
        registers, spills = _usage(code[name], architecture)[name]
        yield Kernel(
            name=name,
            language="pallas",
            grid=tuple(int(size) for size in grid.split(",")),
            num_launches=len(found),
            num_warps=int(threads) // 32,
            shared_bytes=int(shared),
            registers=registers,
            spill_bytes=spills,
            ptx=code[name],
        )


def _triton_kernels(hlo: str, architecture: str) -> Iterator[Kernel]:
    calls = _TRITON_CALL.findall(hlo)
    for config in dict.fromkeys(calls):
        # TritonAnyKernelCall.kernel_call, and in it the kernel and the grid.
        proto = zlib.decompress(ast.literal_eval(f'b"{config}"'))
        call = _proto_fields(_proto_fields(proto)[1])
        kernel = _proto_fields(call[1])
        ptx = kernel[4].decode()
        (name,) = _ENTRY.findall(ptx)
        registers, spills = _usage(ptx, architecture)[name]
        yield Kernel(
            name=name,
            language="triton",
            grid=tuple(call.get(axis, 1) for axis in (2, 3, 4)),
            num_launches=calls.count(config),
            num_warps=kernel[2],
            shared_bytes=kernel.get(3, 0),
            registers=registers,
            spill_bytes=spills,
            ptx=ptx,
        )


def _proto_fields(message: bytes) -> dict:
    """Fields of a protobuf message by number: bytes or integers; the last one if repeated."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = message[at]
            value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
            if byte < 128:
                return value, at

    fields, at = {}, 0
    while at < len(message):
        key, at = varint(at)
        number, kind = divmod(key, 8)
        value, at = varint(at)
        if kind == 2:
            value, at = message[at : at + value], at + value
        else:
            assert kind == 0, f"protobuf wire type {kind}"
        fields[number] = value
    return fields


@functools.cache
def ptxas() -> tuple[str, ...] | None:
    """Paths of the PTX assemblers that are installed, the one that XLA uses first."""
    folders = []
    # Namespace packages of NVIDIA's wheels: CUDA 12 and CUDA 13.
    for module in ("nvidia.cuda_nvcc", "nvidia.cu13"):
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            continue
        folders += [Path(path) / "bin" for path in (spec and spec.submodule_search_locations) or []]
    if home := os.environ.get("CUDA_HOME"):
        folders.append(Path(home) / "bin")
    paths = [str(folder / "ptxas") for folder in folders]
    paths.append(shutil.which("ptxas") or "")
    # Triton writes PTX of a newer version than CUDA 12's assembler reads, and brings its own.
    triton = importlib.util.find_spec("triton")
    for path in (triton and triton.submodule_search_locations) or []:
        folder = Path(path) / "backends" / "nvidia" / "bin"
        paths += [str(folder / name) for name in ("ptxas", "ptxas-blackwell")]
    return tuple(path for path in paths if os.access(path, os.X_OK)) or None


@functools.lru_cache(maxsize=512)
def _usage(ptx: str, architecture: str) -> dict[str, tuple[int, int]]:
    """Registers and spilled bytes (stores and loads) of each kernel of a PTX module."""
    assemblers = ptxas()
    assert assemblers, "aot.missing() has said so"
    error = ""
    for assembler in assemblers:
        command = [assembler, "-v", f"-arch={architecture}", "-", "-o", os.devnull]
        done = subprocess.run(command, input=ptx, capture_output=True, text=True)
        if done.returncode == 0:
            return {
                name: (int(registers), int(stores) + int(loads))
                for name, stores, loads, registers in _PTXAS_ENTRY.findall(done.stderr)
            }
        error = done.stderr
    raise RuntimeError(f"ptxas refuses the kernel:\n{error}")
