"""Functions of vectors of float32."""

from __future__ import annotations

import math

from llvmlite import ir

from pallas_kernels._llvm.builder import I32, Builder, Value

_LN2_HIGH = 0.693359375  # few bits, so that its multiples are exact
_LN2_LOW = math.log(2.0) - _LN2_HIGH
_SMALLEST, _LARGEST = -87.3, 88.37
_POLYNOMIAL = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)


def exp(b: Builder, x: Value) -> Value:
    """E to the power of x, to within three units in the last place; NaN stays NaN.

    Below -87.3 it is at most 2e-38 instead of what float32 cannot hold, above 88.37 at most 2.4e38.
    """
    x = b.select(x < _SMALLEST, _SMALLEST, b.select(x > _LARGEST, _LARGEST, x))
    whole = b.intrinsic("llvm.rint", x * (1.0 / math.log(2.0)))
    rest = b.fma(whole, b.like(-_LN2_HIGH, x), x)
    rest = b.fma(whole, b.like(-_LN2_LOW, x), rest)
    value = b.like(_POLYNOMIAL[0], x)
    for factor in _POLYNOMIAL[1:]:
        value = b.fma(value, rest, b.like(factor, x))
    return value * _power_of_two(b, whole)


def _power_of_two(b: Builder, whole: Value) -> Value:
    """2 to the power of a whole number between -126 and 127: its bits are the exponent."""
    kind = whole.ir.type
    is_vector = isinstance(kind, ir.VectorType)
    integers = ir.VectorType(I32, kind.count) if is_vector else I32

    def constant(number: int) -> ir.Constant:
        return ir.Constant(integers, [number] * kind.count if is_vector else number)

    exponent = b.code.add(b.code.fptosi(whole.ir, integers), constant(127))
    return Value(b, b.code.bitcast(b.code.shl(exponent, constant(23)), kind))
