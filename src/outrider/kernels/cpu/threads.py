"""Helper threads that a kernel may share its work with, and never has to wait for.

A kernel is a function that takes tasks from a counter until none is left. The thread that launches it runs it too;
helpers that happen to be awake join in. So a launch costs well under a microsecond, and on a machine (or a
container) that is busy with something else the work is done by whoever is running, where OpenMP would wait at every
call for a thread that the system has put aside. The launcher waits for those that are in the middle of a task only.

`torch.set_num_threads` sets how many take part. Helpers look for work for about a tenth of a millisecond, then sleep.
Any thread may launch; while one does, kernels launched by others run on their own thread alone.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from outrider.kernels.cpu.jit import Kernel, Task, compiled, task

_intrinsic: Callable[[Callable[..., Any]], Callable[..., Any]] = intrinsic  # numba has no types
_INT, _BYTE = ir.IntType(64), ir.IntType(8)
_POINTER = _BYTE.as_pointer()

# The pool is one block of memory, each word of it on a cache line of its own.
_OWNER, _GENERATION, _GATE, _SLEEPING, _STOP, _JOB, _DATA, _LIMIT, _MUTEX, _CONDITION = range(0, 640, 64)
_CLOSED = 1 << 32  # added to the gate's count of helpers inside while none may enter
_PATIENCE = 2000  # looks, of some 50 ns each

_POOL = ctypes.create_string_buffer(704)
_ADDRESS = (ctypes.addressof(_POOL) + 63) & -64
llvmlite.binding.add_symbol("outrider_pool", _ADDRESS)
_LIBC = ctypes.CDLL(None) if os.name == "posix" else None  # elsewhere: no helpers


def _external(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    signature = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments)


@_intrinsic
def add(typing_context: Any, address: Any, value: Any) -> Any:
    """Adds to the int64 at an address, at one stroke; returns what it was."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(values[0], _INT.as_pointer()), values[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@_intrinsic
def read(typing_context: Any, address: Any) -> Any:
    """The int64 at an address, as other threads have left it."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(values[0], _INT.as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), codegen


@_intrinsic
def _swap(typing_context: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.atomic_rmw("xchg", builder.inttoptr(values[0], _INT.as_pointer()), values[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@_intrinsic
def _pool(typing_context: Any) -> Any:
    """The pool's address, by a name that is looked up when compiled code is loaded, so that it can be cached."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pool = cgutils.add_global_variable(builder.module, _BYTE, "outrider_pool")
        return builder.ptrtoint(pool, _INT)

    return types.int64(), codegen


@_intrinsic
def _run(typing_context: Any, job: Any, data: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        job = builder.inttoptr(values[0], ir.FunctionType(ir.VoidType(), [_INT]).as_pointer())
        builder.call(job, [values[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@_intrinsic
def _relax(typing_context: Any) -> Any:
    """What a thread does between two looks at a word that another will write."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if "x86" in builder.module.triple:
            _external(builder, "llvm.x86.sse2.pause", ir.VoidType())
        elif "arm64" in builder.module.triple or "aarch64" in builder.module.triple:
            _external(builder, "llvm.aarch64.hint", ir.VoidType(), ir.IntType(32)(1))
        return context.get_dummy_value()

    return types.void(), codegen


def _system(name: str, *offsets: int) -> Any:
    """A function that calls `name` of the C library on words of the pool."""

    def typing(typing_context: Any, pool: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            if _LIBC is None:
                return context.get_dummy_value()  # without helpers none of these is reached
            pointers = [builder.inttoptr(builder.add(values[0], _INT(offset)), _POINTER) for offset in offsets]
            _external(builder, name, ir.IntType(32), *pointers)
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    return _intrinsic(typing)


_lock, _unlock = _system("pthread_mutex_lock", _MUTEX), _system("pthread_mutex_unlock", _MUTEX)
_wait, _wake_all = _system("pthread_cond_wait", _CONDITION, _MUTEX), _system("pthread_cond_broadcast", _CONDITION)
_yield = _system("sched_yield")


@task()
def _wait_for(address: int, value: int) -> None:
    """Returns when the word at `address` is `value`; gives way to other threads if that takes long."""
    looks = 0
    while read(address) != value:
        looks += 1
        if looks % _PATIENCE == 0:
            _yield(address)
        else:
            _relax()


PHASE = 128  # bytes, at first 0: the tickets of a phase, and on the next cache line the threads inside it


@compiled()
def enter(phase: int) -> None:
    """Before a thread takes tickets of a phase of a kernel that has several."""
    add(phase + 64, 1)


@compiled()
def leave(phase: int) -> None:
    """After the thread found no more tickets. Returns when every task of the phase is done.

    A thread that enters later finds no ticket, so one that has seen the last ticket go and then nobody inside knows
    that all is done.
    """
    add(phase + 64, -1)
    _wait_for(phase + 64, 0)


@task()
def _launch(job: int, data: int, threads: int) -> None:
    pool = _pool()
    if threads == 1 or _swap(pool + _OWNER, 1) != 0:
        _run(job, data)
        return
    _swap(pool + _JOB, job)
    _swap(pool + _DATA, data)
    _swap(pool + _LIMIT, threads - 1)
    add(pool + _GATE, -_CLOSED)
    add(pool + _GENERATION, 1)
    if read(pool + _SLEEPING) > 0:
        _lock(pool)
        _wake_all(pool)
        _unlock(pool)
    _run(job, data)
    add(pool + _GATE, _CLOSED)
    _wait_for(pool + _GATE, _CLOSED)
    _swap(pool + _OWNER, 0)


@Kernel
def _help() -> None:
    pool = _pool()
    seen, looks = read(pool + _GENERATION), 0
    while read(pool + _STOP) == 0:
        generation = read(pool + _GENERATION)
        if generation != seen:
            seen, looks = generation, 0
            if add(pool + _GATE, 1) < read(pool + _LIMIT):
                _run(read(pool + _JOB), read(pool + _DATA))
            add(pool + _GATE, -1)
            continue
        looks += 1
        _relax()
        if looks > _PATIENCE:
            looks = 0
            _lock(pool)
            add(pool + _SLEEPING, 1)
            if read(pool + _GENERATION) == seen and read(pool + _STOP) == 0:
                _wait(pool)
            add(pool + _SLEEPING, -1)
            _unlock(pool)


_helpers: list[threading.Thread] = []
_starting = threading.Lock()  # a second thread would let the first one's trial run of `_help` go on for ever


def num_threads() -> int:
    """How many threads may take part in a kernel; helpers are started when first they may."""
    count = torch.get_num_threads()
    if count <= len(_helpers) + 1:
        return count
    if _LIBC is None:
        return 1
    _start(count - 1)
    return count


def _start(count: int) -> None:
    with _starting:
        if not _helpers:
            stop = ctypes.c_int64.from_address(_ADDRESS + _STOP)
            stop.value = 1
            _help.launch()  # compiles it here and now: a helper would fight for the GIL to do it
            stop.value = 0
        while len(_helpers) < count:
            helper = threading.Thread(target=_help.launch, name="outrider-kernels", daemon=True)
            _helpers.append(helper)
            helper.start()


def _reset() -> None:
    """Makes a new pool: at the start, and in a forked process, which has none of its parent's threads."""
    _helpers.clear()
    ctypes.memset(_ADDRESS, 0, 640)
    ctypes.c_int64.from_address(_ADDRESS + _GATE).value = _CLOSED
    if _LIBC is not None:
        _LIBC.pthread_mutex_init(ctypes.c_void_p(_ADDRESS + _MUTEX), None)
        _LIBC.pthread_cond_init(ctypes.c_void_p(_ADDRESS + _CONDITION), None)


def _stop() -> None:
    """Helpers must be gone before the interpreter takes down the code that they run."""
    if _helpers and _LIBC is not None:
        ctypes.c_int64.from_address(_ADDRESS + _STOP).value = 1
        _LIBC.pthread_mutex_lock(ctypes.c_void_p(_ADDRESS + _MUTEX))
        _LIBC.pthread_cond_broadcast(ctypes.c_void_p(_ADDRESS + _CONDITION))
        _LIBC.pthread_mutex_unlock(ctypes.c_void_p(_ADDRESS + _MUTEX))
        for helper in _helpers:
            helper.join()


_reset()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset)
atexit.register(_stop)


@_intrinsic
def parallel(typing_context: Any, body: Any, threads: Any, arguments: Any) -> Any:
    """parallel(body, threads, arguments) runs the task body(tickets, *arguments) here and on helpers.

    `tickets` is the address of an int64, 0 at first: add(tickets, 1) is the number of a task that is nobody else's.
    """
    task: Task = body.typing_key
    takes = types.Tuple.from_types(task.arguments[1:])

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _, count, packed = values
        packed = context.cast(builder, packed, arguments, takes)
        data_type = ir.LiteralStructType([packed.type, ir.ArrayType(_INT, 16), _INT, ir.ArrayType(_INT, 15)])
        job = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [_INT]), builder.module.get_unique_name("job"))
        job.linkage = "internal"
        inside = ir.IRBuilder(job.append_basic_block())
        data = inside.inttoptr(job.args[0], data_type.as_pointer())
        unpacked = inside.load(cgutils.gep_inbounds(inside, data, 0, 0))
        tickets = inside.ptrtoint(cgutils.gep_inbounds(inside, data, 0, 2), _INT)
        task.call(context, inside, [tickets, *(inside.extract_value(unpacked, i) for i in range(len(takes)))])
        inside.ret_void()
        data = cgutils.alloca_once(builder, data_type)
        builder.store(packed, cgutils.gep_inbounds(builder, data, 0, 0))
        builder.store(_INT(0), cgutils.gep_inbounds(builder, data, 0, 2))
        launch: Any = _launch
        launch.call(context, builder, [builder.ptrtoint(job, _INT), builder.ptrtoint(data, _INT), count])
        return context.get_dummy_value()

    return types.void(body, types.int64, arguments), codegen


parallel.needs = (_launch,)  # type: ignore[attr-defined]
