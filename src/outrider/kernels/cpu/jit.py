"""What the CPU kernels of this package share: a typed `njit` and raw addresses.

A tensor is handed over as `tensor.data_ptr()`, an int: unboxing an array costs about a microsecond
and a step has dozens of them. The launcher beside each kernel checks dtype and layout instead.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeAlias, TypeVar

import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

P = ParamSpec("P")
R = TypeVar("R")
Floats: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.float32]]"
Tokens: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.int64]]"


_SOURCES = sorted([*Path(__file__).parent.parent.glob("*.py"), *Path(__file__).parent.glob("*.py")])
_STAMP = tuple((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in _SOURCES)


def compiled(*, inline: str = "never") -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`numba.njit`, cached on disk and without the GIL, that keeps the function's type.

    What numba keeps of a function holds the code of those it calls, but is thrown away only when the function's own
    file changes. So the stamp it compares is made that of all files here.
    """

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        dispatcher = numba.njit(cache=True, nogil=True, inline=inline, error_model="numpy")(function)
        dispatcher._cache._cache_file._source_stamp = _STAMP
        jit: Callable[P, R] = dispatcher
        return jit

    return wrap


def _pointer(typing_context: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


pointer: Callable[[int], Any] = intrinsic(_pointer)
"""Inside a kernel: the address of a tensor, for `numba.carray(pointer(address), shape, dtype)`."""


_LEAST_INT = np.int32(-(2**31))
_NOT_SIGN = np.int32(2**31 - 1)
_S31 = np.int32(31)


@compiled()
def largest(values: Floats, scratch: Floats) -> np.float32:
    """The largest float, found on its bits in an order that integers share: such a loop is vectorised.

    scratch[0] is overwritten.
    """
    bits = values.view(np.int32)
    most = _LEAST_INT
    for i in range(len(bits)):
        most = np.int32(max(most, np.int32(bits[i] ^ np.int32(np.int32(bits[i] >> _S31) & _NOT_SIGN))))
    scratch.view(np.int32)[0] = most ^ np.int32(np.int32(most >> _S31) & _NOT_SIGN)
    most_float: np.float32 = scratch[0]
    return most_float
