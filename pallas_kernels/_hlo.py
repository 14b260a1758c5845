"""Reads optimized HLO: what is copied in the loops of a compiled program."""

from __future__ import annotations

import collections
import dataclasses
import math
import re

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"([a-z]+)(\d*)(?:e\w+)?\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_OPERAND = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True, order=True)
class Copy:
    """Copies of arrays of one shape in a loop's body.

    Attributes:
      num_bytes: Of one array.
      shape: As in HLO: "bf16[32,4096,4096]".
      count: How many, for each turn of the loop.
    """

    num_bytes: int
    shape: str
    count: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    rest: str
    is_root: bool


def array_bytes(shape: str) -> int:
    """Bytes of an HLO shape; of a tuple, its largest array."""
    sizes = []
    for kind, bits, dims in _ARRAY.findall(shape):
        width = 8 if kind == "pred" else int(bits or 8)
        elements = math.prod(int(dim) for dim in dims.split(",") if dim)
        sizes.append(elements * width // 8)
    return max(sizes, default=0)


def loop_copies(hlo: str, *, min_bytes: int = 1 << 20) -> tuple[Copy, ...]:
    """Arrays that are duplicated in the bodies of while loops, the largest first.

    A copy is a `copy` instruction, a fusion that does nothing but copy, slice or convert one larger
    array of the same dtype, or such an instruction standing alone: bytes that a kernel with an
    index would have read where they lie.

    Args:
      hlo: Optimized HLO text.
      min_bytes: Smaller ones are not listed.
    """
    computations = _computations(hlo)
    counts: collections.Counter[tuple[int, str]] = collections.Counter()
    for name in _in_loops(computations):
        shapes = {i.name: i.shape for i in computations[name]}
        for instruction in computations[name]:
            if _is_copy(instruction, computations, shapes):
                shape = re.sub(r"\{[^}]*\}", "", instruction.shape)
                if array_bytes(shape) >= min_bytes:
                    counts[array_bytes(shape), shape] += 1
    copies = (Copy(num_bytes, shape, count) for (num_bytes, shape), count in counts.items())
    return tuple(sorted(copies, reverse=True))


def _computations(hlo: str) -> dict[str, list[_Instruction]]:
    computations: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] | None = None
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[1], [])
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            root, name, shape, opcode, rest = found.groups()
            if opcode == "fusion-start":  # newer versions run fusions of a loop asynchronously
                opcode, shape = "fusion", _second_of_tuple(shape)
            current.append(_Instruction(name, shape, opcode, rest, root is not None))
    return computations


def _second_of_tuple(shape: str) -> str:
    """The result in "((operands), result, context)"."""
    depth = 0
    for end in range(1, len(shape)):
        depth += (shape[end] in "([{") - (shape[end] in ")]}")
        if shape[end] == "," and depth == 0:
            break
    rest = shape[end + 1 :].strip()
    found = _ARRAY.match(rest)
    assert found is not None, shape
    return found[0]


def _in_loops(computations: dict[str, list[_Instruction]]) -> set[str]:
    """Computations that run in a while loop, those inside fusions left out."""
    found: set[str] = set()
    waiting = []
    for instructions in computations.values():
        for instruction in instructions:
            if instruction.opcode == "while":
                waiting += _CALLED.findall(instruction.rest)
    while waiting:
        name = waiting.pop()
        if name in found or name not in computations:
            continue
        found.add(name)
        for instruction in computations[name]:
            if instruction.opcode in ("while", "call", "conditional", "async-start"):
                waiting += _CALLED.findall(instruction.rest)
                for branches in _BRANCHES.findall(instruction.rest):
                    waiting += [branch.strip().lstrip("%") for branch in branches.split(",")]
    return found


_MOVES = {"copy", "slice", "dynamic-slice", "transpose", "concatenate", "pad", "reverse"}
_FREE = {"parameter", "constant", "bitcast", "get-tuple-element", "reshape", "tuple"}


def _is_copy(
    instruction: _Instruction,
    computations: dict[str, list[_Instruction]],
    shapes: dict[str, str],
) -> bool:
    if instruction.opcode in _MOVES or instruction.opcode == "copy-start":
        return True
    if instruction.opcode != "fusion":
        return False
    (name,) = _CALLED.findall(instruction.rest)
    body = computations[name]
    big = [i for i in body if array_bytes(i.shape) >= array_bytes(instruction.shape)]
    work = {i.opcode for i in big} - _FREE
    return bool(work) and work <= _MOVES and _reads_as_large(instruction, shapes)


def _reads_as_large(instruction: _Instruction, shapes: dict[str, str]) -> bool:
    size = array_bytes(instruction.shape)
    operands = _OPERAND.findall(instruction.rest.split("calls=")[0])
    return any(array_bytes(shapes.get(name, "")) >= size for name in operands)
