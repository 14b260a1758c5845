"""Writes LLVM code from Python: numbers with operators, loops, pointers and vectors.

A kernel for the CPU is a Python function that is run once, with symbolic `Value`s; what it does to
them becomes the code. Python's own loops are unrolled, `Builder.loop` makes a loop of the program.
Integers are 64 bits wide, numbers are float32, and shapes are Python integers.

The classes are not checked at run time when tests check everything else: a kernel calls them tens
of thousands of times.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, no_type_check

from llvmlite import ir

I1, I8, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 32, 64))
F32 = ir.FloatType()
POINTER = ir.PointerType()

Number = Any
"""A `Value`, or a Python number of the same kind."""


def allocate(code: ir.IRBuilder, kind: ir.Type, count: int = 1) -> ir.Value:
    """Memory of the function's call, uninitialized and aligned to cache lines."""
    with code.goto_entry_block():
        slot: Any = code.alloca(kind, ir.Constant(I64, count))
    slot.align = 64
    slot.type = POINTER  # llvmlite gives it a type of its own
    return slot


@no_type_check
class Value:
    """A number, a truth value or a vector of the program under construction.

    Arithmetic takes Python numbers on either side; comparisons give truth values (of each lane).
    Comparisons of floats are false where one side is NaN.
    """

    __slots__ = ("builder", "ir")

    def __init__(self, builder: Builder, value: Any):
        self.builder = builder
        self.ir: Any = value  # of llvmlite, whose values have types that pyright cannot see

    @property
    def is_float(self) -> bool:
        """Whether this is a float32 or a vector of them."""
        kind = self.ir.type
        return (kind.element if isinstance(kind, ir.VectorType) else kind) == F32

    def _binary(self, other: Number, on_floats: str, on_ints: str, *, flip: bool = False) -> Value:
        pair = (self, self.builder.like(other, self))
        left, right = reversed(pair) if flip else pair
        emit = self.builder.code
        method = getattr(emit, on_floats if self.is_float else on_ints)
        return Value(self.builder, method(left.ir, right.ir))

    def __add__(self, other: Number) -> Value:
        return self._binary(other, "fadd", "add")

    def __radd__(self, other: Number) -> Value:
        return self._binary(other, "fadd", "add", flip=True)

    def __sub__(self, other: Number) -> Value:
        return self._binary(other, "fsub", "sub")

    def __rsub__(self, other: Number) -> Value:
        return self._binary(other, "fsub", "sub", flip=True)

    def __mul__(self, other: Number) -> Value:
        return self._binary(other, "fmul", "mul")

    def __rmul__(self, other: Number) -> Value:
        return self._binary(other, "fmul", "mul", flip=True)

    def __truediv__(self, other: Number) -> Value:
        return self._binary(other, "fdiv", "sdiv")

    def __rtruediv__(self, other: Number) -> Value:
        return self._binary(other, "fdiv", "sdiv", flip=True)

    def __floordiv__(self, other: Number) -> Value:
        """Quotient of integers that are not negative."""
        return self._binary(other, "fdiv", "udiv")

    def __mod__(self, other: Number) -> Value:
        """Remainder of integers that are not negative."""
        return self._binary(other, "frem", "urem")

    def __and__(self, other: Number) -> Value:
        return self._binary(other, "and_", "and_")

    def __or__(self, other: Number) -> Value:
        return self._binary(other, "or_", "or_")

    def _compare(self, operator: str, other: Number) -> Value:
        right, code = self.builder.like(other, self), self.builder.code
        compare = code.fcmp_ordered if self.is_float else code.icmp_signed
        return Value(self.builder, compare(operator, self.ir, right.ir))

    def __lt__(self, other: Number) -> Value:
        return self._compare("<", other)

    def __le__(self, other: Number) -> Value:
        return self._compare("<=", other)

    def __gt__(self, other: Number) -> Value:
        return self._compare(">", other)

    def __ge__(self, other: Number) -> Value:
        return self._compare(">=", other)

    def equals(self, other: Number) -> Value:
        """Whether both are the same number."""
        return self._compare("==", other)

    def differs(self, other: Number) -> Value:
        """Whether they are different numbers; false where one is NaN."""
        return self._compare("!=", other)

    def is_nan(self) -> Value:
        """Whether it is NaN."""
        return Value(self.builder, self.builder.code.fcmp_unordered("uno", self.ir, self.ir))


@no_type_check
class Pointer:
    """An address in an array of float32, or of int32 where `is_int`; indices count elements."""

    __slots__ = ("address", "builder", "is_int")

    def __init__(self, builder: Builder, address: ir.Value, is_int: bool = False):
        self.builder, self.address, self.is_int = builder, address, is_int

    def at(self, index: Number) -> Pointer:
        """The address `index` elements further on."""
        index = self.builder.integer(index)
        kind = I32 if self.is_int else F32
        moved = self.builder.code.gep(self.address, [index.ir], source_etype=kind)
        return Pointer(self.builder, moved, self.is_int)

    def __getitem__(self, index: Number) -> Value:
        """The element; integers are widened to 64 bits."""
        code, kind = self.builder.code, I32 if self.is_int else F32
        loaded = code.load(self.at(index).address, align=4, typ=kind)
        return Value(self.builder, code.sext(loaded, I64) if self.is_int else loaded)

    def __setitem__(self, index: Number, value: Number) -> None:
        code = self.builder.code
        if self.is_int:
            stored = code.trunc(self.builder.integer(value).ir, I32)
        else:
            stored = self.builder.number(value).ir
        code.store(stored, self.at(index).address, align=4)

    def vector(self, index: Number, lanes: int) -> Value:
        """As many elements from `index` on; integers stay 32 bits wide."""
        address, kind = self.at(index).address, ir.VectorType(I32 if self.is_int else F32, lanes)
        loaded = self.builder.code.load(address, align=4, typ=kind)
        return Value(self.builder, loaded)

    def store(self, index: Number, vector: Value, *, is_streamed: bool = False) -> None:
        """Stores a vector's elements from `index` on.

        If streamed, past the caches: the address must be a multiple of the vector's size, and
        `Builder.fence` must follow before another thread may read.
        """
        align = 4 * vector.ir.type.count if is_streamed else 4
        stored = self.builder.code.store(vector.ir, self.at(index).address, align=align)
        if is_streamed:
            stored.set_metadata("nontemporal", self.builder.note(1))

    def prefetch(self, index: Number, *, is_written: bool = False) -> None:
        """Asks for the cache line of an element that is read soon, or written."""
        kind = ir.FunctionType(ir.VoidType(), [POINTER, I32, I32, I32])
        function = self.builder.declare("llvm.prefetch.p0", kind)
        numbers = [ir.Constant(I32, n) for n in (int(is_written), 3, 1)]
        self.builder.code.call(function, [self.at(index).address, *numbers])


@no_type_check
class Variable:
    """A number that loops change."""

    __slots__ = ("_builder", "_slot", "_type")

    def __init__(self, builder: Builder, initial: Value):
        self._builder, self._type = builder, initial.ir.type
        self._slot = allocate(builder.code, self._type)
        self.set(initial)

    def get(self) -> Value:
        """Its present value."""
        return Value(self._builder, self._builder.code.load(self._slot, typ=self._type))

    def set(self, value: Value) -> None:
        """Gives it another value."""
        self._builder.code.store(value.ir, self._slot)


@no_type_check
class Builder:
    """Appends to one function.

    Attributes:
      code: llvmlite's builder.
      lanes: Elements of a vector register.
    """

    def __init__(self, function: ir.Function, lanes: int):
        self.code: Any = ir.IRBuilder(function.append_basic_block())
        self.lanes = lanes
        self._module = function.module

    # Numbers.

    def integer(self, value: Number) -> Value:
        """An integer."""
        return value if isinstance(value, Value) else Value(self, ir.Constant(I64, int(value)))

    def number(self, value: Number) -> Value:
        """A float32."""
        return value if isinstance(value, Value) else Value(self, ir.Constant(F32, float(value)))

    def like(self, value: Number, other: Value) -> Value:
        """`value` as `other` is: a vector's number in every lane."""
        kind = other.ir.type
        if isinstance(value, Value):
            if isinstance(kind, ir.VectorType) and not isinstance(value.ir.type, ir.VectorType):
                return self.splat(value, kind.count)
            return value
        if isinstance(kind, ir.VectorType):
            convert = float if kind.element == F32 else int
            return Value(self, ir.Constant(kind, [convert(value)] * kind.count))
        return Value(self, ir.Constant(kind, float(value) if kind == F32 else int(value)))

    def splat(self, value: Number, lanes: int | None = None) -> Value:
        """A vector of one number."""
        value, lanes = self.number(value), lanes or self.lanes
        kind = ir.VectorType(value.ir.type, lanes)
        if isinstance(value.ir, ir.Constant):
            return Value(self, ir.Constant(kind, [value.ir.constant] * lanes))
        one = self.code.insert_element(
            ir.Constant(kind, ir.Undefined), value.ir, ir.Constant(I32, 0)
        )
        mask = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
        return Value(self, self.code.shuffle_vector(one, ir.Constant(kind, ir.Undefined), mask))

    def shuffle(self, first: Value, second: Value, order: Sequence[int]) -> Value:
        """Lanes of two vectors, counted through both."""
        mask = ir.Constant(ir.VectorType(I32, len(order)), list(order))
        return Value(self, self.code.shuffle_vector(first.ir, second.ir, mask))

    def int32(self, value: Value) -> Value:
        """An integer in 32 bits, in every lane of a vector."""
        narrow = Value(self, self.code.trunc(value.ir, I32))
        kind = ir.VectorType(I32, self.lanes)
        one = self.code.insert_element(
            ir.Constant(kind, ir.Undefined), narrow.ir, ir.Constant(I32, 0)
        )
        mask = ir.Constant(kind, [0] * self.lanes)
        return Value(self, self.code.shuffle_vector(one, ir.Constant(kind, ir.Undefined), mask))

    def to_float(self, value: Value) -> Value:
        """An integer as float32."""
        return Value(self, self.code.sitofp(value.ir, F32))

    def select(self, condition: Value, yes: Number, no: Number) -> Value:
        """`yes` where the condition holds, else `no`; one of them is a `Value`."""
        like = yes if isinstance(yes, Value) else no
        pair = (self.like(yes, like).ir, self.like(no, like).ir)
        return Value(self, self.code.select(condition.ir, *pair))

    def select_pointer(self, condition: Value, yes: Pointer, no: Pointer) -> Pointer:
        """`yes` where the condition holds, else `no`."""
        chosen = self.code.select(condition.ir, yes.address, no.address)
        return Pointer(self, chosen, yes.is_int)

    def minimum(self, first: Number, second: Number) -> Value:
        """The smaller one; `second` where one is NaN."""
        first = first if isinstance(first, Value) else self.like(first, second)
        return self.select(first < second, first, second)

    def maximum(self, first: Number, second: Number) -> Value:
        """The larger one; `second` where one is NaN."""
        first = first if isinstance(first, Value) else self.like(first, second)
        return self.select(first > second, first, second)

    def fma(self, first: Value, second: Value, third: Value) -> Value:
        """First * second + third, rounded once."""
        return self.intrinsic("llvm.fma", first, second, third)

    def intrinsic(self, name: str, *values: Value) -> Value:
        """Calls a function of LLVM's that takes and gives values of one type."""
        kind = values[0].ir.type
        is_vector = isinstance(kind, ir.VectorType)
        suffix = f"v{kind.count}f32" if is_vector else "f32"
        function = self.declare(f"{name}.{suffix}", ir.FunctionType(kind, [kind] * len(values)))
        return Value(self, self.code.call(function, [value.ir for value in values]))

    def reduce(self, name: str, vector: Value) -> Value:
        """A vector's lanes as one number; `name` is "fadd" or "fmax".

        In a tree, so in the same order always.
        """
        while (lanes := vector.ir.type.count) > 1:
            half = lanes // 2
            low = self.shuffle(vector, vector, range(half))
            high = self.shuffle(vector, vector, range(half, lanes))
            vector = low + high if name == "fadd" else self.maximum(low, high)
        return Value(self, self.code.extract_element(vector.ir, ir.Constant(I32, 0)))

    # Memory.

    def buffer(self, size: int) -> Pointer:
        """Uninitialized float32 memory of this call, aligned to cache lines."""
        return Pointer(self, allocate(self.code, F32, size))

    def int_buffer(self, size: int) -> Pointer:
        """The same of int32."""
        return Pointer(self, allocate(self.code, I32, size), is_int=True)

    def variable(self, initial: Number) -> Variable:
        """A number that loops change; an integer or a float32 as the Python number is."""
        if isinstance(initial, int):
            initial = self.integer(initial)
        return Variable(self, initial if isinstance(initial, Value) else self.number(initial))

    def zeros(self, *shape: int) -> Any:
        """Vectors of zeros in registers, in nested lists of `Variable`."""
        if not shape:
            return Variable(self, self.splat(0.0))
        return [self.zeros(*shape[1:]) for _ in range(shape[0])]

    def fence(self) -> None:
        """Puts everything stored so far before everything stored later, for all threads."""
        self.code.fence("seq_cst")

    def note(self, number: int) -> Any:
        """A number as metadata of instructions."""
        return self._module.add_metadata([ir.Constant(I32, number)])

    # Flow.

    @contextlib.contextmanager
    def loop(self, start: Number, stop: Number, step: int = 1) -> Iterator[Value]:
        """Repeats what is in the block for `start`, `start + step`, ... below `stop`."""
        code, stop = self.code, self.integer(stop)
        index = Variable(self, self.integer(start))
        head = code.append_basic_block("head")
        body, behind = code.append_basic_block("body"), code.append_basic_block("behind")
        code.branch(head)
        code.position_at_end(head)
        now = index.get()
        code.cbranch((now < stop).ir, body, behind)
        code.position_at_end(body)
        yield now
        index.set(now + step)
        code.branch(head)
        code.position_at_end(behind)

    @contextlib.contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """Runs what is in the block if the condition holds."""
        with self.code.if_then(condition.ir):
            yield

    @contextlib.contextmanager
    def either(self, condition: Value) -> Iterator[tuple[Any, Any]]:
        """Two blocks, `with yes:` and `with no:`."""
        with self.code.if_else(condition.ir) as (yes, no):
            yield yes, no

    def declare(self, name: str, kind: ir.FunctionType) -> ir.Function:
        """A function from outside."""
        found = self._module.globals.get(name)
        return found if found is not None else ir.Function(self._module, kind, name)
