"""What the CPU kernels write in LLVM by hand: threads, and float32 sums whose order is fixed.

Threads are those of the OpenMP runtime that torch itself runs on: one pool, one setting (`torch.set_num_threads`),
and no idle team of a second library spinning on the same cores. Starting them costs about a microsecond.

A sum is kept in a vector of 16 lanes and folded in halves at the end, so the order of a dot product's additions
depends on its length alone: not on how many rows or outputs share the pass, nor on what the compiler prefers.
"""

from __future__ import annotations

import ctypes
import inspect
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import llvmlite.binding
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
KIND = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
SERIAL = 1 << 15  # numbers to handle, below which a kernel is faster on one thread

_F32, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_POINTER = ir.IntType(8).as_pointer()
_FLOATS, _INTS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_STORED = {FLOAT32: (_F32, "f32", 4), BFLOAT16: (_I16, "i16", 2), FLOAT16: (ir.HalfType(), "f16", 2)}

_TORCH = ctypes.CDLL(torch._C.__file__)
_HAS_THREADS = hasattr(_TORCH, "GOMP_parallel")  # libgomp's own, and libomp's for its sake
for _name in ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads"):
    # where torch has no OpenMP one thread runs, and none of these is called
    _address = ctypes.cast(getattr(_TORCH, _name), ctypes.c_void_p).value if _HAS_THREADS else 1
    llvmlite.binding.add_symbol(_name, _address)


def num_threads() -> int:
    """How many threads a kernel may start."""
    return torch.get_num_threads() if _HAS_THREADS else 1


def _call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    signature = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments)


@intrinsic  # type: ignore[misc]
def parallel(typing_context: Any, body: Any, threads: Any, arguments: Any) -> Any:
    """parallel(body, threads, arguments) runs body(thread, threads, *arguments) once on each thread of a team."""
    takes = (types.int64, types.int64, *arguments.types)
    body.get_call_type(typing_context, takes, {})

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        compiled = body.dispatcher.overloads[takes]
        context.active_code_library.add_linking_library(compiled.library)
        _, team, packed = values

        def call_body(where: Any, tuple_: Any, *place: Any) -> None:
            elements = [where.extract_value(tuple_, index) for index in range(len(arguments.types))]
            context.call_internal_no_propagate(where, compiled.fndesc, types.void(*takes), [*place, *elements])

        module = builder.module
        outlined_type = ir.FunctionType(ir.VoidType(), [_POINTER])
        outlined = ir.Function(module, outlined_type, module.get_unique_name("outlined"))
        outlined.linkage = "internal"
        inside = ir.IRBuilder(outlined.append_basic_block())
        unpacked = inside.load(inside.bitcast(outlined.args[0], packed.type.as_pointer()))
        place = [inside.sext(_call(inside, f"omp_get_{what}", _I32), _I64) for what in ("thread_num", "num_threads")]
        call_body(inside, unpacked, *place)
        inside.ret_void()
        with builder.if_else(builder.icmp_signed(">", team, _I64(1))) as (many, one):
            with many:
                memory = builder.bitcast(cgutils.alloca_once_value(builder, packed), _POINTER)
                _call(builder, "GOMP_parallel", ir.VoidType(), outlined, memory, builder.trunc(team, _I32), _I32(0))
            with one:
                call_body(builder, packed, _I64(0), _I64(1))
        return context.get_dummy_value()

    return types.void(body, types.int64, arguments), codegen


Int: TypeAlias = Any
"""An int64 in LLVM. A parameter that is named like a tensor holds its address; strides are in bytes."""
Real: TypeAlias = Any
"""A float64 in LLVM."""
Vector: TypeAlias = Any
Step: TypeAlias = Callable[[Int, Vector | None, list[Vector]], list[Vector]]


def emitted(emit: Callable[..., None]) -> Callable[..., None]:
    """Makes emit(emitter, ...), whose parameters are `Int` or `Real`, a function that kernels can call."""
    first, *parameters = inspect.signature(emit).parameters.values()
    takes = [types.float64 if parameter.annotation == "Real" else types.int64 for parameter in parameters]

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        emit(Emitter(builder), *values)
        return context.get_dummy_value()

    def typing(*_: Any) -> Any:
        return types.void(*takes), codegen

    typing.__name__, typing.__doc__ = emit.__name__, emit.__doc__
    typing.__signature__ = inspect.Signature([first, *parameters])  # type: ignore[attr-defined]
    made: Callable[..., None] = intrinsic(typing)
    return made


class Emitter:
    """Emits arithmetic on vectors of 16 float32 lanes."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def _at(self, base: Int, index: Int, size: int, target: Any) -> Any:
        builder = self.builder
        return builder.inttoptr(builder.add(base, builder.mul(index, _I64(size))), target.as_pointer())

    def _lanes(self, lanes: list[int]) -> Any:
        return ir.Constant(ir.VectorType(_I32, len(lanes)), [_I32(lane) for lane in lanes])

    def splat(self, scalar: Any, lanes: int = LANES) -> Vector:
        single = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
        single = self.builder.insert_element(single, scalar, _I32(0))
        return self.builder.shuffle_vector(single, single, self._lanes([0] * lanes))

    def floats(self, value: float) -> Vector:
        return ir.Constant(_FLOATS, [_F32(np.float32(value))] * LANES)

    def below(self, bound: Int, lanes: int = LANES) -> Vector:
        """The mask of lanes whose index is less than `bound`."""
        index = ir.Constant(ir.VectorType(_I64, lanes), [_I64(lane) for lane in range(lanes)])
        return self.builder.icmp_signed("<", index, self.splat(bound, lanes))

    def load(self, base: Int, index: Int, mask: Vector | None = None, kind: int = FLOAT32) -> Vector:
        """Elements from `index` on, of a stored kind, widened to float32; 0 where the mask is off."""
        stored, name, size = _STORED[kind]
        vector = ir.VectorType(stored, LANES)
        address = self._at(base, index, size, vector)
        if mask is None:
            value = self.builder.load(address, align=size)
        else:
            nothing = ir.Constant(vector, None)
            masked = f"llvm.masked.load.v16{name}.p0"
            value = _call(self.builder, masked, vector, address, _I32(size), mask, nothing)
        if kind == BFLOAT16:
            wide = self.builder.shl(self.builder.zext(value, _INTS), self.splat(_I32(16)))
            return self.builder.bitcast(wide, _FLOATS)
        return self.builder.fpext(value, _FLOATS) if kind == FLOAT16 else value

    def store(self, value: Vector, base: Int, index: Int, mask: Vector | None = None) -> None:
        """float32 lanes to elements from `index` on, where the mask is on."""
        address = self._at(base, index, 4, value.type)
        if mask is None:
            self.builder.store(value, address, align=4)
        else:
            name = f"llvm.masked.store.v{value.type.count}f32.p0"
            _call(self.builder, name, ir.VoidType(), value, address, _I32(4), mask)

    def prefetch(self, base: Int, index: Int, size: int) -> None:
        line = self._at(base, index, size, ir.IntType(8))
        _call(self.builder, "llvm.prefetch.p0", ir.VoidType(), line, _I32(0), _I32(3), _I32(1))

    def fma(self, x: Vector, y: Vector, z: Vector) -> Vector:
        """x * y + z, rounded once."""
        return _call(self.builder, "llvm.fma.v16f32", _FLOATS, x, y, z)

    def sqrt(self, scalar: Any) -> Any:
        return _call(self.builder, "llvm.sqrt.f32", _F32, scalar)

    def exp(self, x: Vector) -> Vector:
        """e^x to about 1 ulp; exactly 1 at 0; 0 for x < -87.34, where results stop being normal; inf for x > 88.72.

        x = n ln 2 + r with |r| <= ln 2 / 2, and the polynomial of Cephes' expf (Moshier) in r.
        """
        builder = self.builder
        n = _call(builder, "llvm.rint.v16f32", _FLOATS, builder.fmul(x, self.floats(1 / math.log(2))))
        r = self.fma(n, self.floats(2.12194440e-4), self.fma(n, self.floats(-0.693359375), x))
        power = self.floats(1.9875691500e-4)
        for term in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0):
            power = self.fma(power, r, self.floats(term))
        # n + 126 and not + 127: the exponent of 2^128 would not fit, so half of it, twice
        biased = builder.add(builder.fptosi(n, _INTS), self.splat(_I32(126)))
        half = builder.bitcast(builder.shl(biased, self.splat(_I32(23))), _FLOATS)
        value = builder.fmul(builder.fmul(power, self.floats(2)), half)
        value = builder.select(builder.fcmp_ordered(">", x, self.floats(88.72283)), self.floats(math.inf), value)
        return builder.select(builder.fcmp_ordered("<", x, self.floats(-87.33654)), self.floats(0), value)

    def part(self, vector: Vector, start: int, count: int) -> Vector:
        return self.builder.shuffle_vector(vector, vector, self._lanes(list(range(start, start + count))))

    def fold(self, vectors: list[Vector], combine: str = "fadd") -> Vector:
        """The lanes of each of 2^k <= 16 vectors added up: one vector of 2^k floats, in their order.

        Each step adds the upper half of every sum's lanes to the lower, packing two vectors into one while there are
        two.
        """
        width = LANES
        while width > 1:
            width //= 2
            pairs = list(zip(vectors[::2], vectors[1::2], strict=True)) if len(vectors) > 1 else [vectors * 2]
            starts = range(0, (2 * LANES) if len(vectors) > 1 else vectors[0].type.count, 2 * width)
            low = self._lanes([start + lane for start in starts for lane in range(width)])
            high = self._lanes([start + lane + width for start in starts for lane in range(width)])
            shuffle, add = self.builder.shuffle_vector, getattr(self.builder, combine)
            vectors = [add(shuffle(a, b, low), shuffle(a, b, high)) for a, b in pairs]
        return vectors[0]

    def total(self, vector: Vector) -> Any:
        """The sum of the lanes, as a scalar."""
        return self.builder.extract_element(self.fold([vector]), _I32(0))

    def sweep(self, size: Int, step: Step, state: list[Vector], unroll: int = 1) -> list[Vector]:
        """state = step(index, mask, state) for each 16 of `size` elements; the mask is None but for the last few."""
        builder = self.builder
        whole = builder.and_(size, _I64(-LANES * unroll))
        for start, stop, times in ((_I64(0), whole, unroll), (whole, size, 1)):
            before, head = builder.block, builder.append_basic_block("head")
            inside, after = builder.append_basic_block("inside"), builder.append_basic_block("after")
            builder.branch(head)
            builder.position_at_end(head)
            index = builder.phi(_I64)
            carried = [builder.phi(value.type) for value in state]
            builder.cbranch(builder.icmp_signed("<", index, stop), inside, after)
            builder.position_at_end(inside)
            mask = self.below(builder.sub(size, index)) if stop is size else None
            new = list(carried)
            for turn in range(times):
                new = step(builder.add(index, _I64(turn * LANES)), mask, new)
            following = builder.add(index, _I64(times * LANES))
            for phi, first, then in zip((index, *carried), (start, *state), (following, *new), strict=True):
                phi.add_incoming(first, before)
                phi.add_incoming(then, builder.block)
            builder.branch(head)
            builder.position_at_end(after)
            state = list(carried)
        return state

    def each_kind(self, kind: Int, emit: Callable[[int], None]) -> None:
        """Emits one copy for each kind, of which `kind` picks one where it runs."""
        for constant in _STORED:
            with self.builder.if_then(self.builder.icmp_signed("==", kind, _I64(constant))):
                emit(constant)


def dot_tile(rows: int, outputs: int) -> Callable[..., None]:
    """A function for rows x outputs dot products, rows * outputs <= 16 being a power of two.

    Row r of out, float32, gets x[r] . w[0:outputs], x being float32 and w of a kind. Rows past last_row repeat it,
    outputs past last_output are not written. Each cache line of w asks for the one `ahead` bytes later.
    """

    def tile(
        emitter: Emitter,
        x: Int,
        x_stride: Int,
        last_row: Int,
        w: Int,
        w_stride: Int,
        last_output: Int,
        size: Int,
        kind: Int,
        out: Int,
        out_stride: Int,
        ahead: Int,
    ) -> None:
        builder = emitter.builder

        def starts(base: Int, stride: Int, count: int, last: Int) -> list[Int]:
            indices = [builder.select(builder.icmp_signed("<", _I64(i), last), _I64(i), last) for i in range(count)]
            return [builder.add(base, builder.mul(stride, index)) for index in indices]

        x_rows, out_rows = starts(x, x_stride, rows, last_row), starts(out, out_stride, rows, last_row)
        w_rows = starts(w, w_stride, outputs, last_output)

        def emit(constant: int) -> None:
            size_of = _STORED[constant][2]

            def step(index: Int, mask: Vector | None, sums: list[Vector]) -> list[Vector]:
                if mask is None:
                    for row in w_rows:
                        emitter.prefetch(builder.add(row, ahead), index, size_of)
                weights = [emitter.load(row, index, mask, constant) for row in w_rows]
                new: list[Vector] = []
                for row in x_rows:
                    value = emitter.load(row, index, mask)
                    new += [emitter.fma(value, weight, sums[len(new) + o]) for o, weight in enumerate(weights)]
                return new

            sums = emitter.sweep(size, step, [emitter.floats(0)] * (rows * outputs), 64 // size_of // LANES)
            found = emitter.fold(sums)
            mask = emitter.below(builder.add(last_output, _I64(1)), outputs)
            for r, row in enumerate(out_rows):
                emitter.store(emitter.part(found, r * outputs, outputs), row, _I64(0), mask)

        emitter.each_kind(kind, emit)

    return emitted(tile)
