"""What compiles the CPU kernels: a typed `njit`, tasks that are compiled once each, and raw memory.

A tensor is handed over as `tensor.data_ptr()`, an int: unboxing an array costs about a microsecond
and a step has dozens of them. The launcher beside each kernel checks dtype and layout instead.

numba links the code of a function into each of its callers and optimises it there again. A `task` is compiled once:
its callers hold its name, and the loader puts in the address.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar, get_type_hints

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.core.compiler_lock import global_compiler_lock
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import intrinsic, lower_builtin

from outrider.kernels.cpu.disk_cache import cache_of

P = ParamSpec("P")
R = TypeVar("R")
Floats: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.float32]]"
Tokens: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.int64]]"


def _target_features() -> frozenset[str]:
    """Of the processor that numba compiles for: this one, unless NUMBA_CPU_NAME or NUMBA_CPU_FEATURES say otherwise.

    numba would give another processor this one's features. Of a named one LLVM knows them, and this set has only those
    that are asked for besides.
    """
    other = config.CPU_NAME not in (None, llvmlite.binding.get_host_cpu_name())
    if other and config.CPU_FEATURES is None:
        config.CPU_FEATURES = ""
    if config.CPU_FEATURES is not None:
        return frozenset(part[1:] for part in config.CPU_FEATURES.split(",") if part.startswith("+"))
    return frozenset(name for name, has in llvmlite.binding.get_host_cpu_features().items() if has)


TARGET_FEATURES = _target_features()
"""LLVM's names for what the processor compiled for is known to have."""

_KERNELS = Path(__file__).parent.parent
_IMPORT = re.compile(r"^from outrider\.kernels\.?([\w.]*) import (.*)$", re.MULTILINE)


def _imported(text: str) -> Iterator[Path]:
    """The files of `outrider.kernels` that a file's text imports."""
    for module, names in _IMPORT.findall(text):
        module_path = _KERNELS.joinpath(*module.split("."))
        for path in (module_path, *(module_path / name.strip() for name in names.split(","))):
            if path.with_suffix(".py").is_file():
                yield path.with_suffix(".py")


@cache
def stamp(path: Path) -> str:
    """A digest of a file and of all that it imports from `outrider.kernels`, by content.

    What numba keeps of a function holds the code of those it calls, but is thrown away only when the stamp changes
    that it takes of the function's own file. So it is given this one.
    """
    found: dict[str, str] = {}
    left = [path]
    while left:
        path = left.pop()
        if str(path) not in found:
            found[str(path)] = path.read_text()
            left += _imported(found[str(path)])
    return sha256("\0".join(found[name] for name in sorted(found)).encode()).hexdigest()


def needed(function: Callable[..., Any], seen: set[str] | None = None) -> Iterator[Task]:
    """The tasks that a kernel's code names, itself or in the kernels that are linked into it."""
    seen = set() if seen is None else seen
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        yield from getattr(value, "needs", ())
        if isinstance(value, Task):
            yield value
        elif (inner := getattr(value, "py_func", None)) is not None and inner.__qualname__ not in seen:
            seen.add(inner.__qualname__)
            yield from needed(inner, seen)


def compiled(*, inline: str = "never") -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`numba.njit`, cached on disk and without the GIL, that keeps the function's type: linked into what calls it."""

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        dispatcher = numba.njit(nogil=True, inline=inline, error_model="numpy")(function)
        dispatcher._cache = cache_of(function, stamp(Path(function.__code__.co_filename)))
        compile_or_load = dispatcher.compile

        def after_tasks(signature: Any) -> Any:
            with global_compiler_lock:  # numba's own: two locks could wait for each other
                for task in needed(function):
                    task.load()
                return compile_or_load(signature)

        dispatcher.compile = after_tasks
        jit: Callable[P, R] = dispatcher
        return jit

    return wrap


class Entry:
    """A kernel or task, which is compiled for the one signature that its annotations say."""

    def __init__(self, function: Callable[..., Any], dispatcher: Any, arguments: tuple[Any, ...]) -> None:
        self._function, self._dispatcher, self._arguments = function, dispatcher, arguments
        self.size = len(function.__code__.co_code)
        """Of its own code, as a measure of how long it takes to compile."""
        ENTRIES[f"{function.__module__}:{function.__qualname__}"] = self

    def is_kept(self) -> bool:
        """Whether the cache holds its machine code; true also where nothing can be kept."""
        cache = self._dispatcher._cache
        if not hasattr(cache, "_cache_file"):
            return True
        key = cache._index_key(self._arguments, self._dispatcher.targetctx.codegen())
        try:
            return key in cache._cache_file._load_index()
        except Exception:  # a damaged file: it is compiled again
            return False

    @property
    def directory(self) -> str | None:
        """Where its machine code is kept; None if nowhere."""
        directory: str | None = getattr(self._dispatcher._cache, "cache_path", None)
        return directory

    def compile_alone(self) -> None:
        """Compiles it for the cache, without the tasks that it calls. Nothing may be run in this process any more."""
        for task in needed(self._function):
            task.leave_out()
        self._dispatcher.compile(self._arguments)


ENTRIES: dict[str, Entry] = {}
"""The kernels and tasks of the files imported so far, as module:function."""

_TYPES = {int: types.int64, float: types.float64, bool: types.boolean, Any: types.int64, type(None): types.void}


def _numba_type(hint: Any) -> Any:
    if hint in _TYPES:
        return _TYPES[hint]
    fields = get_type_hints(hint)
    return types.BaseTuple.from_types([_numba_type(fields[name]) for name in hint._fields], hint)


def _signature(function: Callable[..., Any]) -> tuple[tuple[Any, ...], Any]:
    """numba's types of the parameters and of the result, by the annotations."""
    hints = get_type_hints(function)
    result = _numba_type(hints.pop("return"))
    return tuple(_numba_type(hint) for hint in hints.values()), result


class Kernel(Generic[P, R]):
    """`compiled`, for what is called from Python, as `launch`: with numbers and named tuples of them, in their order.

    numba finds out the types of all arguments at every call, which takes it half a microsecond a named tuple. Here
    there is one signature, that of the annotations.
    """

    def __init__(self, function: Callable[P, R]) -> None:
        self._dispatcher: Any = compiled()(function)
        self._arguments, _ = _signature(function)
        Entry(function, self._dispatcher, self._arguments)

    @cached_property
    def launch(self) -> Callable[P, R]:
        """The compiled code itself, so that a call passes through no Python; compiled when it is first asked for."""
        self._dispatcher.compile(self._arguments)
        entry: Callable[P, R] = self._dispatcher.overloads[self._arguments].entry_point
        return entry


class Task:
    """A function of numbers and named tuples of them that kernels call, compiled once and called by its name.

    It may be absent where the processor lacks what it needs: then its callers must not reach it.
    """

    def __init__(self, function: Callable[..., Any], exists: bool) -> None:
        self.function, self.exists, self._loaded = function, exists, False
        self.symbol = f"{function.__module__}.{function.__qualname__}"
        self.arguments, self.result = _signature(function)
        self._dispatcher: Any = compiled()(function)
        if exists:
            Entry(function, self._dispatcher, self.arguments)
        _declare(self)

    def load(self) -> None:
        """Compiles it, or takes it from the cache, and gives its address to the loader; those that it calls first."""
        with global_compiler_lock:
            if not self._loaded:
                llvmlite.binding.add_symbol(self.symbol, self._address())
                self._loaded = True

    def leave_out(self) -> None:
        """Gives the loader an address that must not be reached, so that callers can be compiled without this."""
        if not self._loaded:
            llvmlite.binding.add_symbol(self.symbol, _never())
            self._loaded = True

    def _address(self) -> int:
        if not self.exists:
            return _never()
        self._dispatcher.compile(self.arguments)
        overload = self._dispatcher.overloads[self.arguments]
        address: int = overload.library.get_pointer_to_function(overload.fndesc.llvm_func_name)
        return address

    def call(self, context: Any, builder: Any, arguments: Any) -> Any:
        """Emits a call."""
        convention = context.call_conv
        function_type = convention.get_function_type(self.result, self.arguments)
        function = cgutils.get_or_insert_function(builder.module, function_type, self.symbol)
        return convention.call_function(builder, function, self.result, self.arguments, arguments)[1]


def _never() -> int:
    """The address of what ends the process."""
    address: int = ctypes.cast(ctypes.pythonapi.Py_Exit, ctypes.c_void_p).value or 0
    return address


def _declare(task: Task) -> None:
    """Tells numba what a call of the task is."""

    class Call(AbstractTemplate):  # type: ignore[misc]
        key = task

        def generic(self, arguments: Any, named: Any) -> Any:
            return task.result(*task.arguments)

    infer_global(task, types.Function(Call))

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        result = task.call(context, builder, arguments)
        return context.get_dummy_value() if task.result is types.void else result

    lower_builtin(task, *task.arguments)(lower)


def task(*, exists: bool = True) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A `Task` that mypy knows by the function's type."""

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        made: Any = Task(function, exists)
        typed: Callable[P, R] = made
        return typed

    return wrap


def _pointer(typing_context: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


pointer: Callable[[int], Any] = intrinsic(_pointer)
"""Inside a kernel: the address of a tensor, for `numba.carray(pointer(address), shape, dtype)`."""

_INT = ir.IntType(64)
_LINE = 64  # bytes, on which memory begins


def _allocate(typing_context: Any, size: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        raw = context.nrt.allocate(builder, builder.add(arguments[0], _INT(2 * _LINE)))
        address = builder.and_(builder.add(builder.ptrtoint(raw, _INT), _INT(2 * _LINE - 1)), _INT(-_LINE))
        before = builder.inttoptr(builder.sub(address, _INT(8)), _INT.as_pointer())
        builder.store(builder.ptrtoint(raw, _INT), before)
        return address

    return types.int64(types.int64), codegen


def _free(typing_context: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        before = builder.inttoptr(builder.sub(arguments[0], _INT(8)), _INT.as_pointer())
        context.nrt.free(builder, builder.inttoptr(builder.load(before), cgutils.voidptr_t))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def _clear(typing_context: Any, address: Any, size: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        cgutils.memset(builder, builder.inttoptr(arguments[0], cgutils.voidptr_t), arguments[1], 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


allocate: Callable[[int], int] = intrinsic(_allocate)
"""Inside a kernel: so many bytes, from the start of a cache line on. numpy's arrays would take a second to compile."""
free: Callable[[int], None] = intrinsic(_free)
"""Gives back what `allocate` gave."""
clear: Callable[[int, int], None] = intrinsic(_clear)
"""Sets so many bytes from an address on to 0."""


def _chosen(sign: str) -> Callable[[int, int], int]:
    def typing(typing_context: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            a, b = arguments
            return builder.select(builder.icmp_signed(sign, a, b), a, b)

        return types.int64(types.int64, types.int64), codegen

    made: Callable[[int, int], int] = intrinsic(typing)
    return made


smaller, larger = _chosen("<"), _chosen(">")
"""Of two int64. numba compiles a function for each use of `min` and `max`."""


_MIN_INT = np.int32(-(2**31))
_NOT_SIGN = np.int32(2**31 - 1)
_S31 = np.int32(31)
# Added to the ordered bits of a float, with wraparound, it puts -inf at the bottom and the NaNs of either sign on top.
_FROM_MIN = np.int32(1 - 2**23)


@compiled()
def largest(values: Floats, scratch: Floats) -> np.float32:
    """The largest float, NaN if there is one: found on its bits in an order that integers share.

    Such a loop is vectorised. scratch[0] is overwritten.
    """
    bits = values.view(np.int32)
    maximum = _MIN_INT
    for i in range(len(bits)):
        ordered = np.int32(bits[i] ^ np.int32(np.int32(bits[i] >> _S31) & _NOT_SIGN))
        maximum = np.int32(max(maximum, np.int32(ordered + _FROM_MIN)))
    maximum = np.int32(maximum - _FROM_MIN)
    scratch.view(np.int32)[0] = maximum ^ np.int32(np.int32(maximum >> _S31) & _NOT_SIGN)
    maximum_float: np.float32 = scratch[0]
    return maximum_float
