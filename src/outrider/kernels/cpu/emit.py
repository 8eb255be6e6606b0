"""What the CPU kernels write in LLVM by hand: float32 arithmetic whose order is fixed.

A sum is kept in a vector of 16 lanes and folded in halves at the end, so the order of a dot product's additions
depends on its length alone: not on how many rows or outputs share the pass, nor on what the compiler prefers.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from outrider.kernels.cpu.jit import TARGET_FEATURES

LANES = 16
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
KIND = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
NO: Any = np.int64(0)  # a plain 0 would be a type of its own to numba, and a second copy of what takes it
YES: Any = np.int64(1)
CACHES = FLOAT32, BFLOAT16  # what keys and values may be kept in
SERIAL = 1 << 15  # numbers to handle, below which a kernel is faster on one thread

_F32, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_POINTER = ir.IntType(8).as_pointer()
_FLOATS, _INTS, _HALVES = (ir.VectorType(each, LANES) for each in (_F32, _I32, _I16))
WIDTH = {FLOAT32: 4, BFLOAT16: 2, FLOAT16: 2}
_STORED = {FLOAT32: (_F32, "f32"), BFLOAT16: (_I16, "i16"), FLOAT16: (ir.HalfType(), "f16")}


Int: TypeAlias = Any
"""An int64 in LLVM; methods of `Emitter` take Python's as well. One named like a tensor is its address; strides are in
bytes."""
Real: TypeAlias = Any
"""A float64 in LLVM."""
Vector: TypeAlias = Any
Turn: TypeAlias = Callable[[Int, list[Vector]], list[Vector]]
Step: TypeAlias = Callable[[Int, Vector | None, list[Vector]], list[Vector]]


def emitted(emit: Callable[..., None]) -> Callable[..., None]:
    """Makes emit(emitter, ...), whose parameters are `Int` or `Real`, a function that kernels can call."""
    first, *parameters = inspect.signature(emit).parameters.values()
    takes = [types.float64 if parameter.annotation == "Real" else types.int64 for parameter in parameters]

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.function.attributes.add("noinline")  # a second copy would be optimised all over again
        emit(Emitter(builder), *values)
        return context.get_dummy_value()

    def typing(*_: Any) -> Any:
        return types.void(*takes), codegen

    typing.__name__, typing.__doc__ = emit.__name__, emit.__doc__
    typing.__signature__ = inspect.Signature([first, *parameters])  # type: ignore[attr-defined]
    made: Callable[..., None] = intrinsic(typing)
    return made


def _int(value: Any) -> Any:
    return _I64(value) if isinstance(value, int) else value


class Emitter:
    """Emits arithmetic on vectors of 16 float32 lanes."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        """Calls an LLVM intrinsic."""
        signature = ir.FunctionType(result, [argument.type for argument in arguments])
        function = cgutils.get_or_insert_function(self.builder.module, signature, name)
        return self.builder.call(function, arguments)

    def pointer(self, base: Int, offset: Int, target: Any) -> Any:
        """The address `offset` bytes after `base`, as a pointer."""
        return self.builder.inttoptr(self.builder.add(base, _int(offset)), target.as_pointer())

    def _at(self, base: Int, index: Int, size: int, target: Any) -> Any:
        return self.pointer(base, self.times(index, size), target)

    def shuffle(self, a: Vector, b: Vector, lanes: Iterable[int]) -> Vector:
        """The lanes of a and b, one after the other, that are named."""
        picked = [_I32(lane) for lane in lanes]
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(picked)), picked))

    def plus(self, base: Int, index: Int, stride: Int) -> Int:
        """base + index * stride."""
        return self.builder.add(_int(base), self.times(index, stride))

    def times(self, a: Int, b: Int) -> Int:
        return self.builder.mul(_int(a), _int(b))

    def minimum(self, a: Int, b: Int) -> Int:
        a, b = _int(a), _int(b)
        return self.builder.select(self.builder.icmp_signed("<", a, b), a, b)

    def splat(self, scalar: Any, lanes: int = LANES) -> Vector:
        single = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
        single = self.builder.insert_element(single, scalar, _I32(0))
        return self.shuffle(single, single, [0] * lanes)

    def ints(self, value: int) -> Vector:
        return ir.Constant(_INTS, [_I32(value)] * LANES)

    def floats(self, value: float) -> Vector:
        return ir.Constant(_FLOATS, [_F32(np.float32(value))] * LANES)

    def below(self, bound: Int, lanes: int = LANES) -> Vector:
        """The mask of lanes whose index is less than `bound`."""
        index = ir.Constant(ir.VectorType(_I64, lanes), [_I64(lane) for lane in range(lanes)])
        return self.builder.icmp_signed("<", index, self.splat(_int(bound), lanes))

    def load(self, base: Int, index: Int, mask: Vector | None = None, kind: int = FLOAT32) -> Vector:
        """Elements from `index` on, of a stored kind, widened to float32; 0 where the mask is off."""
        (stored, name), size = _STORED[kind], WIDTH[kind]
        vector = ir.VectorType(stored, LANES)
        address = self._at(base, index, size, vector)
        if mask is None:
            value = self.builder.load(address, align=size)
        else:
            nothing = ir.Constant(vector, None)
            masked = f"llvm.masked.load.v16{name}.p0"
            value = self.call(masked, vector, address, _I32(size), mask, nothing)
        if kind == BFLOAT16:
            bits = self.builder.shl(self.builder.zext(value, _INTS), self.ints(16))
            return self.builder.bitcast(bits, _FLOATS)
        return self._widened(value) if kind == FLOAT16 else value

    def _widened(self, halves: Vector) -> Vector:
        """float16 to float32: exact, and by integers where the processor may have no instruction for it."""
        if "f16c" in TARGET_FEATURES or "x86" not in self.builder.module.triple:
            return self.builder.fpext(halves, _FLOATS)
        builder, bits = self.builder, self.builder.zext(self.builder.bitcast(halves, _HALVES), _INTS)
        sign = builder.shl(builder.and_(bits, self.ints(0x8000)), self.ints(16))
        magnitude = builder.shl(builder.and_(bits, self.ints(0x7FFF)), self.ints(13))
        # exponents of float32 begin 112 lower; a product by 2^112 also makes float16's subnormals normal numbers
        value = builder.fmul(builder.bitcast(magnitude, _FLOATS), self.floats(2.0**112))
        special = builder.icmp_unsigned(">=", magnitude, self.ints(0x0F800000))  # infinity or not a number
        whole = builder.select(special, builder.or_(magnitude, self.ints(0x7F800000)), builder.bitcast(value, _INTS))
        return builder.bitcast(builder.or_(whole, sign), _FLOATS)

    def integer(self, base: Int, index: Int) -> Int:
        """The int64 at `index`."""
        return self.builder.load(self._at(base, index, 8, _I64))

    def spread(self, base: Int, index: Int) -> Vector:
        """The float32 at `index`, in every lane."""
        return self.splat(self.builder.load(self._at(base, index, 4, _F32)))

    def store(self, value: Vector, base: Int, index: Int, mask: Vector | None = None) -> None:
        """float32 lanes to elements from `index` on, where the mask is on."""
        address = self._at(base, index, 4, value.type)
        if mask is None:
            self.builder.store(value, address, align=4)
        else:
            name = f"llvm.masked.store.v{value.type.count}f32.p0"
            self.call(name, ir.VoidType(), value, address, _I32(4), mask)

    def load_pairs(self, base: Int, index: Int) -> list[Vector]:
        """32 bfloat16 from `index` on as two float32 vectors: those at even places, those at odd ones.

        One operation each, where `load` takes two to widen 16 in their order.
        """
        words = self.builder.load(self._at(base, index, 2, _INTS), align=2)
        halves = self.builder.shl(words, self.ints(16)), self.builder.and_(words, self.ints(-0x10000))
        return [self.builder.bitcast(half, _FLOATS) for half in halves]

    def rounded(self, value: Vector) -> tuple[Vector, Vector]:
        """A float32 rounded to bfloat16, to the nearest and halves to even, as a float32 and as its bits.

        A NaN whose mantissa is all ones would not stay one; arithmetic makes no such NaN.
        """
        builder, bits = self.builder, self.builder.bitcast(value, _INTS)
        odd = builder.and_(builder.lshr(bits, self.ints(16)), self.ints(1))
        bits = builder.add(builder.add(bits, self.ints(0x7FFF)), odd)
        bits = builder.and_(bits, self.ints(-0x10000))
        return builder.bitcast(bits, value.type), bits

    def store_rounded(self, value: Vector, base: Int, index: Int, mask: Vector | None = None) -> None:
        """float32 lanes to bfloat16 elements from `index` on, where the mask is on."""
        halves = self.builder.trunc(self.builder.lshr(self.rounded(value)[1], self.ints(16)), _HALVES)
        address = self._at(base, index, 2, _HALVES)
        if mask is None:
            self.builder.store(halves, address, align=2)
        else:
            self.call("llvm.masked.store.v16i16.p0", ir.VoidType(), halves, address, _I32(2), mask)

    def prefetch(self, base: Int, index: Int, size: int) -> None:
        """Asks for the cache line of an element of `size` bytes, as far as the second level: the first is small."""
        line = self._at(base, index, size, ir.IntType(8))
        self.call("llvm.prefetch.p0", ir.VoidType(), line, _I32(0), _I32(2), _I32(1))

    def fma(self, x: Vector, y: Vector, z: Vector) -> Vector:
        """x * y + z, rounded once."""
        return self.call("llvm.fma.v16f32", _FLOATS, x, y, z)

    def sqrt(self, scalar: Any) -> Any:
        return self.call("llvm.sqrt.f32", _F32, scalar)

    def exp(self, x: Vector) -> Vector:
        """e^x to about 1 ulp; exactly 1 at 0; 0 for x < -87.34, where results stop being normal; inf for x > 88.72.

        x = n ln 2 + r with |r| <= ln 2 / 2, and the polynomial of Cephes' expf (Moshier) in r.
        """
        builder = self.builder
        n = self.call("llvm.rint.v16f32", _FLOATS, builder.fmul(x, self.floats(1 / math.log(2))))
        r = self.fma(n, self.floats(2.12194440e-4), self.fma(n, self.floats(-0.693359375), x))
        power = self.floats(1.9875691500e-4)
        for term in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0):
            power = self.fma(power, r, self.floats(term))
        # n + 126 and not + 127: the exponent of 2^128 would not fit, so half of it, twice
        biased = builder.add(builder.fptosi(n, _INTS), self.ints(126))
        half = builder.bitcast(builder.shl(biased, self.ints(23)), _FLOATS)
        value = builder.fmul(builder.fmul(power, self.floats(2)), half)
        value = builder.select(builder.fcmp_ordered(">", x, self.floats(88.72283)), self.floats(math.inf), value)
        return builder.select(builder.fcmp_ordered("<", x, self.floats(-87.33654)), self.floats(0), value)

    def part(self, vector: Vector, start: int, count: int) -> Vector:
        return self.shuffle(vector, vector, range(start, start + count))

    def maximum(self, x: Vector, y: Vector) -> Vector:
        return self.builder.select(self.builder.fcmp_ordered(">", x, y), x, y)

    def fold(self, vectors: list[Vector], combine: Callable[[Vector, Vector], Vector] | None = None) -> Vector:
        """The lanes of each of 2^k <= 16 vectors combined (added): one vector of 2^k floats, in their order.

        Each step adds the upper half of every sum's lanes to the lower, packing two vectors into one while there are
        two.
        """
        combine, shuffle, width = combine or self.builder.fadd, self.shuffle, LANES
        while width > 1:
            width //= 2
            pairs = list(zip(vectors[::2], vectors[1::2], strict=True)) if len(vectors) > 1 else [vectors * 2]
            starts = range(0, 2 * LANES if len(vectors) > 1 else vectors[0].type.count, 2 * width)
            low = [start + lane for start in starts for lane in range(width)]
            high = [lane + width for lane in low]
            vectors = [combine(shuffle(a, b, low), shuffle(a, b, high)) for a, b in pairs]
        return vectors[0]

    def first(self, vector: Vector) -> Any:
        """Lane 0, as a scalar."""
        return self.builder.extract_element(vector, _I32(0))

    def total(self, vector: Vector) -> Vector:
        """The sum of the lanes, in every lane."""
        return self.splat(self.first(self.fold([vector])))

    def largest(self, vector: Vector) -> Vector:
        """The largest lane, in every lane."""
        return self.splat(self.first(self.fold([vector], self.maximum)))

    def loop(self, start: Int, stop: Int, stride: int, step: Turn, state: list[Vector]) -> list[Vector]:
        """for index in range(start, stop, stride): state = step(index, state)."""
        builder, start, stop = self.builder, _int(start), _int(stop)
        before, head = builder.block, builder.append_basic_block("head")
        inside, after = builder.append_basic_block("inside"), builder.append_basic_block("after")
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(_I64)
        carried = [builder.phi(value.type) for value in state]
        builder.cbranch(builder.icmp_signed("<", index, stop), inside, after)
        builder.position_at_end(inside)
        new = step(index, list(carried))
        following = builder.add(index, _I64(stride))
        for phi, first, then in zip((index, *carried), (start, *state), (following, *new), strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(then, builder.block)
        builder.branch(head)
        builder.position_at_end(after)
        return carried

    def sweep(
        self,
        size: Int,
        step: Step,
        state: list[Vector],
        unroll: int = 1,
        begin: Callable[[Int], None] = lambda index: None,  # what to do before each `unroll` steps
        start: Int = 0,  # a multiple of 16 * unroll
    ) -> list[Vector]:
        """state = step(index, mask, state) for each 16 of `size` elements; the mask is None but for the last few."""

        def whole(index: Int, state: list[Vector]) -> list[Vector]:
            begin(index)
            for turn in range(unroll):
                state = step(self.builder.add(index, _I64(turn * LANES)), None, state)
            return state

        def rest(index: Int, state: list[Vector]) -> list[Vector]:
            return step(index, self.below(self.builder.sub(size, index)), state)

        middle = self.builder.and_(size, _I64(-LANES * unroll))
        state = self.loop(start, middle, LANES * unroll, whole, state)
        return self.loop(middle, size, LANES, rest, state)

    def each_kind(self, kind: Int, emit: Callable[[int], None], kinds: Iterable[int] = tuple(_STORED)) -> None:
        """Emits one copy for each kind, of which `kind` picks one where it runs."""
        for constant in kinds:
            with self.builder.if_then(self.builder.icmp_signed("==", kind, _I64(constant))):
                emit(constant)

    def each_height(self, count: Int, emit: Callable[[int], None], heights: tuple[int, ...]) -> None:
        """Emits one copy for each height of tile, of which the lowest that holds `count` rows runs."""
        less = 0
        for height in heights:
            low, high = (self.builder.icmp_signed(sign, count, _int(n)) for sign, n in ((">", less), ("<=", height)))
            with self.builder.if_then(self.builder.and_(low, high)):
                emit(height)
            less = height

    def rows(self, base: Int, stride: Int, height: int, count: Int) -> list[Int]:
        """Addresses of a tile's rows; those past `count` repeat the last."""
        last = self.builder.sub(_int(count), _I64(1))
        return [self.plus(base, self.minimum(i, last), stride) for i in range(height)]

    def dots(
        self,
        x_rows: list[Int],  # float32
        w_rows: list[Int],  # of a kind; no more than 16 with x_rows' number multiplied
        size: Int,
        out_rows: list[Int],  # float32
        kind: int = FLOAT32,
        mask: Vector | None = None,  # of the outputs to write
        ahead: Int | None = None,  # bytes; each cache line of w that is read asks for the one so much further on
        paired: bool = False,  # w is bfloat16, and in each 32 elements of x those at even places come first
    ) -> None:
        """out[r][o] = x[r] . w[o]."""
        builder, width = self.builder, WIDTH[kind]

        def fetch(index: Int) -> None:
            for row in w_rows if ahead is not None else ():
                self.prefetch(builder.add(row, ahead), index, width)

        def step(index: Int, part: Vector | None, sums: list[Vector]) -> list[Vector]:
            weights = [self.load(row, index, part, kind) for row in w_rows]
            new: list[Vector] = []
            for row in x_rows:
                value = self.load(row, index, part)
                new += [self.fma(value, weight, sums[len(new) + o]) for o, weight in enumerate(weights)]
            return new

        def pairs(index: Int, sums: list[Vector]) -> list[Vector]:
            fetch(index)
            weights = zip(*(self.load_pairs(row, index) for row in w_rows), strict=True)
            for parity, halves in enumerate(weights):
                values = [self.load(row, self.plus(index, parity, LANES)) for row in x_rows]
                terms = [(value, half) for value in values for half in halves]
                sums = [self.fma(value, half, old) for (value, half), old in zip(terms, sums, strict=True)]
            return sums

        count = len(x_rows) * len(w_rows)
        sums, start = [self.floats(0)] * count, _int(0)
        if paired:
            start = builder.and_(size, _I64(-2 * LANES))
            sums = self.loop(0, start, 2 * LANES, pairs, sums)
        sums = self.sweep(size, step, sums, 64 // width // LANES, fetch, start)
        sums = self.fold(sums + [self.floats(0)] * (2 ** (count - 1).bit_length() - count))
        for r, row in enumerate(out_rows):
            self.store(self.part(sums, r * len(w_rows), len(w_rows)), row, 0, mask)


@emitted
def copy_row(emitter: Emitter, source: Int, out: Int, size: Int) -> None:
    """out[:size] = source[:size], float32."""

    def step(index: Int, mask: Vector | None, state: list[Vector]) -> list[Vector]:
        emitter.store(emitter.load(source, index, mask), out, index, mask)
        return []

    emitter.sweep(size, step, [])
