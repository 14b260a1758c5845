"""The code of `llvm`: tasks are ranges of rows, or of elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._llvm.builder import Builder, Pointer, Value
from pallas_kernels._llvm.compile import call
from pallas_kernels._llvm.tasks import each_row, row_pieces, row_range
from pallas_kernels._llvm.vector import exp


def _each_vector(
    b: Builder, start: Value | int, stop: Value | int, visit: Callable[[Value, int], None]
) -> None:
    """Calls `visit(index, lanes)` for all elements of a range: vectors, then one by one."""
    whole = b.integer(start) + (b.integer(stop) - start) // b.lanes * b.lanes
    with b.loop(start, whole, b.lanes) as index:
        visit(index, b.lanes)
    with b.loop(whole, stop) as index:
        visit(index, 1)


class _Sum:
    """A sum over a row: of whole vectors, and of what is left behind the last one."""

    def __init__(self, b: Builder):
        self._b = b
        self._wide, self._narrow = b.zeros(), b.variable(b.splat(0.0, 1))

    def add(self, first: Value, second: Value, lanes: int) -> None:
        """Adds first * second."""
        variable = self._narrow if lanes == 1 else self._wide
        variable.set(self._b.fma(first, second, variable.get()))

    def total(self) -> Value:
        """Its value."""
        wide, narrow = (variable.get() for variable in (self._wide, self._narrow))
        return self._b.reduce("fadd", wide) + self._b.reduce("fadd", narrow)


def norm(
    terms: Sequence[Float[Array, "T D"]], scale: Float[Array, "D"], eps: float
) -> list[Float[Array, "T D"]]:
    """The norm of the sum of one or two arrays; of two, the sum before it."""
    num_rows, width = terms[0].shape
    pieces, count = row_pieces(num_rows, width), len(terms)

    def body(b: Builder, task: Value, scale: Pointer, *buffers: Pointer) -> None:
        given, results = buffers[:count], buffers[count:]

        def one(row: Value) -> None:
            lines = [buffer.at(row * width) for buffer in given]
            out, squares = results[-1].at(row * width), _Sum(b)
            read = lines[0]

            def first(index: Value, lanes: int) -> None:
                value = lines[0].vector(index, lanes)
                if count == 2:
                    value = value + lines[1].vector(index, lanes)
                    results[0].at(row * width).store(index, value)
                squares.add(value, value, lanes)

            _each_vector(b, 0, width, first)
            if count == 2:
                read = results[0].at(row * width)
            inverse = _inverse(b, squares, width, eps)

            def second(index: Value, lanes: int) -> None:
                value = read.vector(index, lanes) * inverse
                out.store(index, value * scale.vector(index, lanes))

            _each_vector(b, 0, width, second)

        each_row(b, task, pieces, num_rows, one)

    shape = jax.ShapeDtypeStruct((num_rows, width), jnp.float32)
    name, args = "rms_norm" if count == 1 else "add_rms_norm", [scale, *terms]
    return call(name, (eps, *pieces), body, [shape] * count, args, num_tasks=len(pieces))


def norm_backward(
    x: Float[Array, "T D"],
    scale: Float[Array, "D"],
    eps: float,
    d_normed: Float[Array, "T D"],
    d_x: Float[Array, "T D"] | None,
) -> Float[Array, "T D"]:
    """Gradient at the rows of a norm, added to one that is there already."""
    num_rows, width = x.shape
    pieces = row_pieces(num_rows, width)

    def body(b: Builder, task: Value, scale: Pointer, *buffers: Pointer) -> None:
        def one(row: Value) -> None:
            rows, gradients, *there, out = (buffer.at(row * width) for buffer in buffers)
            squares, products = _Sum(b), _Sum(b)

            def first(index: Value, lanes: int) -> None:
                value = rows.vector(index, lanes)
                squares.add(value, value, lanes)
                scaled = gradients.vector(index, lanes) * scale.vector(index, lanes)
                products.add(value, scaled, lanes)

            _each_vector(b, 0, width, first)
            inverse = _inverse(b, squares, width, eps)
            factor = products.total() * inverse * inverse * inverse * (-1.0 / width)

            def second(index: Value, lanes: int) -> None:
                scaled = gradients.vector(index, lanes) * scale.vector(index, lanes)
                value = b.fma(rows.vector(index, lanes), b.splat(factor, lanes), scaled * inverse)
                for line in there:
                    value = value + line.vector(index, lanes)
                out.store(index, value)

            _each_vector(b, 0, width, second)

        each_row(b, task, pieces, num_rows, one)

    args = [scale, x, d_normed, *([] if d_x is None else [d_x])]
    result = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    statics = (eps, d_x is None, *pieces)
    return call("rms_norm_backward", statics, body, [result], args, num_tasks=len(pieces))[0]


def _inverse(b: Builder, squares: _Sum, width: int, eps: float) -> Value:
    """One over the root of the mean of squares."""
    mean = squares.total() * (1.0 / width) + eps
    return b.number(1.0) / b.intrinsic("llvm.sqrt", mean)


def swiglu(gate: Float[Array, "T F"], up: Float[Array, "T F"]) -> Float[Array, "T F"]:
    """The gated values."""

    def visit(b: Builder, index: Value, lanes: int, gate, up, out) -> None:
        value = gate.vector(index, lanes)
        out.store(index, value * _sigmoid(b, value) * up.vector(index, lanes))

    return _elementwise("swiglu", visit, [gate, up], 1)[0]


def swiglu_backward(
    gate: Float[Array, "T F"], up: Float[Array, "T F"], d_gated: Float[Array, "T F"]
) -> tuple[Float[Array, "T F"], Float[Array, "T F"]]:
    """Gradients at the gate and at the other side."""

    def visit(b: Builder, index: Value, lanes: int, gate, up, d_gated, d_gate, d_up) -> None:
        value, d_value = gate.vector(index, lanes), d_gated.vector(index, lanes)
        sigmoid = _sigmoid(b, value)
        silu = value * sigmoid
        d_up.store(index, d_value * silu)
        slope = b.fma(silu, 1.0 - sigmoid, sigmoid)
        d_gate.store(index, d_value * up.vector(index, lanes) * slope)

    d_gate, d_up = _elementwise("swiglu_backward", visit, [gate, up, d_gated], 2)
    return d_gate, d_up


def _sigmoid(b: Builder, value: Value) -> Value:
    return b.like(1.0, value) / (exp(b, 0.0 - value) + 1.0)


def _elementwise(
    name: str, visit: Callable[..., None], args: Sequence[Array], num_results: int
) -> list[Array]:
    """Calls `visit(builder, index, lanes, *buffers)` for all elements of arrays of one shape."""
    count = args[0].size
    pieces = row_pieces(count, 1, 64)

    def body(b: Builder, task: Value, *buffers: Pointer) -> None:
        start, stop = row_range(b, task, pieces, count)
        _each_vector(b, start, stop, lambda index, lanes: visit(b, index, lanes, *buffers))

    result = jax.ShapeDtypeStruct(args[0].shape, jnp.float32)
    return call(name, tuple(pieces), body, [result] * num_results, args, num_tasks=len(pieces))
