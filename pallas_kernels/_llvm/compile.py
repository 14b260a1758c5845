"""Compiles kernels for this CPU and makes them callable from jitted programs.

A call is split into tasks, which run on the threads that XLA computes with. The functions below
speak XLA's C interface for foreign functions (xla/ffi/api/c_api.h, whose layout is promised not to
change within major version 0).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from llvmlite import binding, ir

from pallas_kernels._llvm.builder import I8, I32, I64, POINTER, Builder, Pointer, Value, allocate

Body = Callable[..., None]
"""`body(builder, task, *buffers)`: one task; buffers are the arguments', then the results'."""

LEVEL_VARIABLE = "PALLAS_KERNELS_LLVM_LEVEL"
"""Environment variable: how much LLVM optimizes, 0 to 3. Less compiles sooner, for tests."""

_VOID = ir.VoidType()
_SPINS = 5000

# Byte offsets into XLA's structs, on machines with pointers of 64 bits.
_FRAME_EXTENSION, _FRAME_API, _FRAME_CONTEXT = 8, 16, 24
_FRAME_ARGS, _FRAME_RETS = 40, 80
_LIST_VALUES = 32
_BUFFER_DATA = 24
_EXTENSION_METADATA = 24
_METADATA_MAJOR, _METADATA_MINOR, _METADATA_TRAITS = 24, 28, 32
_API_DESTROY, _API_SCHEDULE = 48 + 8 * 2, 48 + 8 * 11
_API_MAJOR, _API_MINOR = 0, 1

# Byte offsets into what the threads of a call share.
_JOB_NEXT, _JOB_DONE, _JOB_USERS, _JOB_BUFFERS = 0, 64, 128, 192


def num_threads() -> int:
    """Threads that a call may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def vector_lanes() -> int:
    """Float32 numbers in a vector register of this CPU."""
    features = binding.get_host_cpu_features()
    if features.get("avx512f") and features.get("avx512vl"):
        return 16
    return 8 if features.get("avx") else 4


@functools.cache
def num_vector_registers() -> int:
    """Vector registers of this CPU."""
    is_x86 = binding.get_process_triple().startswith(("x86", "i686", "amd64"))
    return 16 if is_x86 and vector_lanes() < 16 else 32


def call(
    name: str,
    statics: tuple,
    body: Body,
    results: Sequence[jax.ShapeDtypeStruct],
    args: Sequence[jax.Array],
    *,
    num_tasks: int,
    aliases: Mapping[int, int] | None = None,
) -> list[jax.Array]:
    """Calls a kernel on arrays, from within a traced function.

    Args:
      name: Of the kernel.
      statics: All that its code depends on, but shapes and dtypes; its `repr` tells them apart.
      body: Writes the code of one task; run once for each combination of statics and shapes.
      results: Shapes and dtypes of the results.
      args: Arguments, float32 or int32.
      num_tasks: Tasks of a call. Any order and any number at a time must do.
      aliases: Results that overwrite an argument, by the argument's position.

    Returns:
      The results.
    """
    kinds = [(array.shape, array.dtype.name) for array in (*args, *results)]
    target = _register(name, (statics, tuple(kinds), num_tasks), body)
    outputs = jax.ffi.ffi_call(
        target, list(results), input_output_aliases=dict(aliases or {}), vmap_method="sequential"
    )(*args)
    return list(outputs)


_LOCK = threading.Lock()
_TARGETS: dict[str, Any] = {}


def _register(name: str, key: tuple, body: Body) -> str:
    kinds, num_tasks = key[1], key[2]
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:24]
    target = f"pallas_kernels_{name}_{digest}"
    with _LOCK:
        if target not in _TARGETS:
            is_int = [dtype == "int32" for _, dtype in kinds]
            engine = _compile(target, body, is_int, num_tasks)
            pointer = ctypes.c_void_p(engine.get_function_address(target))
            handler = ctypes.cast(pointer, ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p))
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")
            _TARGETS[target] = engine, handler  # kept for as long as programs may call them
    return target


@functools.cache
def _machine(level: int) -> binding.TargetMachine:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple()
    features = binding.get_host_cpu_features().flatten()
    return target.create_target_machine(
        cpu=binding.get_host_cpu_name(), features=features, opt=level, jit=True
    )


def _compile(target: str, body: Body, is_int: Sequence[bool], num_tasks: int) -> Any:
    module = ir.Module(target)
    level = int(os.environ.get(LEVEL_VARIABLE, "3"))
    machine = _machine(level)
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    task = _emit_task(module, body, is_int)
    if num_tasks == 1:
        _emit_handler(module, target, len(is_int), task, None, 1)
    else:
        work = _emit_work(module, task, num_tasks)
        _emit_handler(module, target, len(is_int), task, work, num_tasks)
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    options = binding.create_pipeline_tuning_options(speed_level=level)
    # Bodies are written as they are to run.
    options.loop_unrolling = options.loop_vectorization = options.slp_vectorization = False
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(parsed, passes)
    engine = binding.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    return engine


def _emit_task(module: ir.Module, body: Body, is_int: Sequence[bool]) -> ir.Function:
    """`void task(i64 index, ptr* buffers)`."""
    function = ir.Function(module, ir.FunctionType(_VOID, [I64, POINTER]), "task")
    function.linkage = "internal"
    builder = Builder(function, vector_lanes())
    index, table = function.args
    buffers = [
        Pointer(builder, _load(builder.code, table, 8 * n, POINTER), flag)
        for n, flag in enumerate(is_int)
    ]
    body(builder, Value(builder, index), *buffers)
    builder.code.ret_void()
    return function


def _offset(code: ir.IRBuilder, address: ir.Value, num_bytes: int) -> ir.Value:
    return code.gep(address, [ir.Constant(I64, num_bytes)], source_etype=I8)


def _load(code: ir.IRBuilder, address: ir.Value, num_bytes: int, kind: ir.Type) -> ir.Value:
    return code.load(_offset(code, address, num_bytes), typ=kind)


def _store(code: ir.IRBuilder, value: ir.Value, address: ir.Value, num_bytes: int) -> None:
    code.store(value, _offset(code, address, num_bytes))


def _add(code: ir.IRBuilder, job: ir.Value, num_bytes: int, value: int) -> ir.Value:
    address = _offset(code, job, num_bytes)
    return code.atomic_rmw("add", address, ir.Constant(I64, value), "acq_rel")


def _emit_work(module: ir.Module, task: ir.Function, num_tasks: int) -> ir.Function:
    """`void work(ptr job)`: tasks until none is left; the last user frees the job."""
    function = ir.Function(module, ir.FunctionType(_VOID, [POINTER]), "work")
    function.linkage = "internal"
    (job,) = function.args
    code = ir.IRBuilder(function.append_basic_block())
    head, run, end = (code.append_basic_block(name) for name in ("head", "run", "end"))
    code.branch(head)
    code.position_at_end(head)
    index = _add(code, job, _JOB_NEXT, 1)
    code.cbranch(code.icmp_signed("<", index, ir.Constant(I64, num_tasks)), run, end)
    code.position_at_end(run)
    code.call(task, [index, _offset(code, job, _JOB_BUFFERS)])
    _add(code, job, _JOB_DONE, 1)
    code.branch(head)
    code.position_at_end(end)
    _emit_leave(module, code, job)
    code.ret_void()
    return function


def _emit_leave(module: ir.Module, code: ir.IRBuilder, job: ir.Value) -> None:
    users = _add(code, job, _JOB_USERS, -1)
    free = _outside(module, "free", ir.FunctionType(_VOID, [POINTER]))
    with code.if_then(code.icmp_signed("==", users, ir.Constant(I64, 1))):
        code.call(free, [job])


def _outside(module: ir.Module, name: str, kind: ir.FunctionType) -> ir.Function:
    found = module.globals.get(name)
    return found if found is not None else ir.Function(module, kind, name)


def _emit_handler(
    module: ir.Module,
    name: str,
    num_buffers: int,
    task: ir.Function,
    work: ir.Function | None,
    num_tasks: int,
) -> None:
    """`XLA_FFI_Error* handler(XLA_FFI_CallFrame*)`."""
    function = ir.Function(module, ir.FunctionType(POINTER, [POINTER]), name)
    (frame,) = function.args
    code = ir.IRBuilder(function.append_basic_block())
    null = ir.Constant(POINTER, None)
    extension = _load(code, frame, _FRAME_EXTENSION, POINTER)
    with code.if_then(code.icmp_unsigned("!=", extension, null)):
        metadata = _load(code, extension, _EXTENSION_METADATA, POINTER)
        _store(code, ir.Constant(I32, _API_MAJOR), metadata, _METADATA_MAJOR)
        _store(code, ir.Constant(I32, _API_MINOR), metadata, _METADATA_MINOR)
        _store(code, ir.Constant(I32, 0), metadata, _METADATA_TRAITS)
        code.ret(null)
    if work is None:
        table = allocate(code, POINTER, num_buffers)
        _emit_buffers(code, frame, table, num_buffers)
        code.call(task, [ir.Constant(I64, 0), table])
        code.ret(null)
        return
    malloc = _outside(module, "malloc", ir.FunctionType(POINTER, [I64]))
    job = code.call(malloc, [ir.Constant(I64, _JOB_BUFFERS + 8 * num_buffers)])
    helpers = min(num_threads(), num_tasks) - 1
    for offset, value in ((_JOB_NEXT, 0), (_JOB_DONE, 0), (_JOB_USERS, helpers + 2)):
        _store(code, ir.Constant(I64, value), job, offset)
    _emit_buffers(code, frame, _offset(code, job, _JOB_BUFFERS), num_buffers)
    for _ in range(helpers):
        _emit_schedule(module, code, frame, job, work)
    code.call(work, [job])
    _emit_wait(module, code, job, num_tasks)
    _emit_leave(module, code, job)
    code.ret(null)


def _emit_buffers(code: ir.IRBuilder, frame: ir.Value, table: ir.Value, num_buffers: int) -> None:
    """Copies the addresses of all arguments and results to `table`."""
    num_args = _load(code, frame, _FRAME_ARGS + 16, I64)
    args, rets = (
        _load(code, frame, start + _LIST_VALUES, POINTER) for start in (_FRAME_ARGS, _FRAME_RETS)
    )
    for n in range(num_buffers):
        place = ir.Constant(I64, n)
        is_arg = code.icmp_signed("<", place, num_args)
        index = code.select(is_arg, place, code.sub(place, num_args))
        values = code.select(is_arg, args, rets)
        buffer = code.load(code.gep(values, [index], source_etype=POINTER), typ=POINTER)
        _store(code, _load(code, buffer, _BUFFER_DATA, POINTER), table, 8 * n)


def _emit_schedule(
    module: ir.Module, code: ir.IRBuilder, frame: ir.Value, job: ir.Value, work: ir.Function
) -> None:
    """Asks XLA to run `work` on another thread; where it cannot, this thread does all of it."""
    args = allocate(code, I64, 5)
    api = _load(code, frame, _FRAME_API, POINTER)
    context = _load(code, frame, _FRAME_CONTEXT, POINTER)
    _store(code, ir.Constant(I64, 40), args, 0)
    for offset, value in ((8, ir.Constant(POINTER, None)), (16, context), (24, work), (32, job)):
        _store(code, value, args, offset)
    schedule = _load(code, api, _API_SCHEDULE, POINTER)
    error = _call(code, schedule, POINTER, args)
    with code.if_then(code.icmp_unsigned("!=", error, ir.Constant(POINTER, None))):
        _emit_destroy(code, api, error)
        _add(code, job, _JOB_USERS, -1)


def _emit_destroy(code: ir.IRBuilder, api: ir.Value, error: ir.Value) -> None:
    args = allocate(code, I64, 3)
    _store(code, ir.Constant(I64, 24), args, 0)
    _store(code, ir.Constant(POINTER, None), args, 8)
    _store(code, error, args, 16)
    _call(code, _load(code, api, _API_DESTROY, POINTER), _VOID, args)


def _call(code: ir.IRBuilder, address: Any, result: ir.Type, args: ir.Value) -> Any:
    """Calls a function by its address; it takes one pointer."""
    address.type = ir.FunctionType(result, [POINTER]).as_pointer()  # what llvmlite calls
    return code.call(address, [args])


def _emit_wait(module: ir.Module, code: ir.IRBuilder, job: ir.Value, num_tasks: int) -> None:
    """Waits for the tasks that other threads have begun, and lets them run if that takes long."""
    give_way = _outside(module, "sched_yield", ir.FunctionType(I32, []))
    names = ("wait", "again", "yield", "done")
    wait, again, rest, done = (code.append_basic_block(name) for name in names)
    zero = ir.Constant(I64, 0)
    turns = allocate(code, I64, 1)
    code.store(zero, turns)
    code.branch(wait)
    code.position_at_end(wait)
    finished = code.load_atomic(_offset(code, job, _JOB_DONE), "acquire", 8, typ=I64)
    code.cbranch(code.icmp_signed("<", finished, ir.Constant(I64, num_tasks)), again, done)
    code.position_at_end(again)
    turn = code.add(code.load(turns, typ=I64), ir.Constant(I64, 1))
    code.store(turn, turns)
    code.cbranch(code.icmp_signed(">", turn, ir.Constant(I64, _SPINS)), rest, wait)
    code.position_at_end(rest)
    code.call(give_way, [])
    code.branch(wait)
    code.position_at_end(done)
