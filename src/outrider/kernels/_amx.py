"""Products with bfloat16 weights in the matrix unit of recent x86 servers (AMX), for many rows.

The unit multiplies bfloat16 only, so each float32 activation is split in two: its own rounding to bfloat16, and that
of what is left. With both products added in float32 the result is good to about 2^-17, a hundred times better than
rounding the activations, for twice the multiplications of a unit that has eight times the vector unit's rate.

A tile is 16 rows of 64 bytes. Weights are loaded as they lie, 16 outputs by 32 inputs; activations are packed first,
[16 pairs of inputs][16 tokens][2]; so sums come out as [16 outputs][16 tokens] and are turned on their way to memory.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir

from outrider.kernels._attention import keep
from outrider.kernels._numba import LANES, Emitter, Int, Vector, emitted
from outrider.kernels._threads import add, parallel
from outrider.kernels.native import compiled

_BYTE, _INTS = ir.IntType(8), ir.VectorType(ir.IntType(32), LANES)
_TILE = 1024  # bytes
_STEP = 32  # inputs in a tile
_OUTPUTS = 32  # a thread's sums are 2 x 2 tiles: 32 outputs by 32 tokens
_PANEL = 1 << 20  # bytes of packed activations that are used against all weights before the next: they stay in cache

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


def _available() -> bool:
    features = llvmlite.binding.get_host_cpu_features()
    if sys.platform != "linux" or not (features.get("amx-bf16") and features.get("amx-tile")):
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)


AVAILABLE = _available()


def _turned(emitter: Emitter, rows: list[Vector]) -> list[Vector]:
    """The transpose of 16 vectors of 16 lanes: halves of halves change places."""
    for span in (8, 4, 2, 1):
        low = [lane if not lane & span else LANES + lane - span for lane in range(LANES)]
        high = [lane + span if not lane & span else LANES + lane for lane in range(LANES)]
        for i in range(LANES):
            if not i & span:
                pair = rows[i], rows[i + span]
                rows[i], rows[i + span] = emitter.shuffle(*pair, low), emitter.shuffle(*pair, high)
    return rows


def _rounded(emitter: Emitter, value: Vector) -> tuple[Vector, Vector]:
    """A float32 rounded to bfloat16, to the nearest and halves to even, as a float32 and as its bits."""
    builder, bits = emitter.builder, emitter.builder.bitcast(value, _INTS)
    odd = builder.and_(builder.lshr(bits, emitter.ints(16)), emitter.ints(1))
    bits = builder.add(builder.add(bits, emitter.ints(0x7FFF)), odd)
    bits = builder.and_(bits, emitter.ints(-0x10000))
    return builder.bitcast(bits, value.type), bits


@emitted
def _pack(emitter: Emitter, x: Int, count: Int, size: Int, out: Int) -> None:
    """Up to 16 rows of x, as `size` / 32 pairs of tiles: the activations rounded, and what that leaves."""
    builder = emitter.builder
    rows = emitter.rows(x, emitter.times(size, 4), LANES, count)
    present = [builder.icmp_signed("<", count.type(i), count) for i in range(LANES)]

    def step(index: Int, none: list[Vector]) -> list[Vector]:
        coarse, fine = [], []
        for row, there in zip(rows, present, strict=True):
            low, high = (emitter.load(row, emitter.plus(index, start, 1)) for start in (0, LANES))
            words = []
            for parity in (0, 1):
                value = emitter.shuffle(low, high, list(range(parity, 2 * LANES, 2)))
                value = builder.select(there, value, emitter.floats(0))
                top, top_bits = _rounded(emitter, value)
                words.append((top_bits, _rounded(emitter, builder.fsub(value, top))[1]))
            for (even, odd), tile in zip(zip(*words, strict=True), (coarse, fine), strict=True):
                word = builder.or_(builder.lshr(even, emitter.ints(16)), odd)
                tile.append(builder.bitcast(word, emitter.floats(0).type))
        for i, vector in enumerate([*_turned(emitter, coarse), *_turned(emitter, fine)]):
            emitter.store(vector, out, emitter.plus(emitter.times(index, LANES), i, LANES))
        return none

    emitter.loop(0, size, _STEP, step, [])


def _tile_call(emitter: Emitter, name: str, *arguments: Any) -> None:
    given = [ir.Constant(_BYTE, each) if isinstance(each, int) else each for each in arguments]
    emitter.call(f"llvm.x86.{name}", ir.VoidType(), *given)


@emitted
def _configure(emitter: Emitter, scratch: Int) -> None:
    """Gives all eight tiles 16 rows of 64 bytes."""
    for offset, values in ((0, [1] + [0] * 15), (16, [64, 0] * 8), (32, [0] * 16), (48, [16] * 8 + [0] * 8)):
        row = ir.Constant(ir.VectorType(_BYTE, 16), [_BYTE(value) for value in values])
        emitter.builder.store(row, emitter.pointer(scratch, offset, row.type), align=1)
    _tile_call(emitter, "ldtilecfg", emitter.pointer(scratch, 0, _BYTE))


@emitted
def _release(emitter: Emitter, scratch: Int) -> None:
    _tile_call(emitter, "tilerelease")


@emitted
def _multiply(
    emitter: Emitter, weight: Int, size: Int, packed: Int, tokens: Int, out: Int, outputs: Int, scratch: Int
) -> None:
    """out[:tokens, :32], a row being `outputs` long, for up to 32 tokens."""
    builder, stride, panel = emitter.builder, emitter.times(size, 2), emitter.times(size, LANES * 4)
    first, second, halves = 4, 5, (6, 7)  # tiles 0 to 3 are the sums

    def of_width(width: int) -> None:
        sums = [(o, t, 2 * o + t) for o in range(2) for t in range(width)]
        for _, _, tile in sums:
            _tile_call(emitter, "tilezero", tile)

        def step(index: Int, none: list[Vector]) -> list[Vector]:
            for o, tile in enumerate((first, second)):
                base = emitter.plus(emitter.plus(weight, 16 * o, stride), index, 2)
                _tile_call(emitter, "tileloadd64", tile, emitter.pointer(base, 0, _BYTE), stride)
            place = emitter.plus(packed, index, 2 * _TILE // _STEP)
            for half in range(2):
                for t in range(width):
                    base = emitter.plus(place, panel, t)
                    _tile_call(
                        emitter, "tileloadd64", halves[t], emitter.pointer(base, half * _TILE, _BYTE), size.type(64)
                    )
                for o, t, tile in sums:
                    _tile_call(emitter, "tdpbf16ps", tile, (first, second)[o], halves[t])
            return none

        emitter.loop(0, size, _STEP, step, [])
        for o, t, tile in sums:
            _tile_call(emitter, "tilestored64", tile, emitter.pointer(scratch, 0, _BYTE), size.type(64))
            rows = _turned(emitter, [emitter.load(scratch, i * LANES) for i in range(LANES)])
            line = emitter.times(outputs, 4)
            places = emitter.rows(
                emitter.plus(out, line, 16 * t), line, LANES, builder.sub(tokens, tokens.type(16 * t))
            )
            # a row past the last goes where the last one does, and before it
            for row, place in reversed(list(zip(rows, places, strict=True))):
                emitter.store(row, place, 16 * o)

    emitter.each_height(emitter.builder.ashr(emitter.plus(tokens, 15, 1), tokens.type(4)), of_width, (1, 2))


@compiled()
def _pack_all(tickets: int, x: int, rows: int, inputs: int, packed: int) -> None:
    while True:
        row = add(tickets, 1) * LANES
        if row >= rows:
            break
        _pack(x + row * inputs * 4, min(rows - row, LANES), inputs, packed + row * inputs * 4)


@compiled()
def _products(
    tickets: int, packed: int, rows: int, inputs: int, weight: int, outputs: int, share: int, out: int
) -> None:
    scratch = np.empty(_TILE, np.uint8)
    _configure(scratch.ctypes.data)
    while True:
        start = add(tickets, 1) * share
        if start >= outputs:
            break
        for each in range(start, min(start + share, outputs), _OUTPUTS):
            o = min(each, outputs - _OUTPUTS)
            for row in range(0, rows, 2 * LANES):
                place = out + (row * outputs + o) * 4
                count = min(rows - row, 2 * LANES)
                weights = weight + o * inputs * 2
                _multiply(weights, inputs, packed + row * inputs * 4, count, place, outputs, scratch.ctypes.data)
    _release(scratch.ctypes.data)
    keep(scratch)


@compiled()
def multiply(x: int, weight: int, out: int, rows: int, inputs: int, outputs: int, threads: int) -> None:
    """out = x @ weight.T; inputs are a multiple of 32, outputs 32 or more. Outputs past the last full 32 overlap."""
    packed = np.empty((rows + LANES - 1) // LANES * LANES * inputs, np.float32)
    parallel(_pack_all, threads, (x, rows, inputs, packed.ctypes.data))
    share = max(outputs // (4 * threads) // _OUTPUTS, 1) * _OUTPUTS
    block = max(_PANEL // (inputs * 4) // (2 * LANES), 1) * 2 * LANES
    for row in range(0, rows, block):
        count, place = min(rows - row, block), out + row * outputs * 4
        work = (packed.ctypes.data + row * inputs * 4, count, inputs, weight, outputs, share, place)
        parallel(_products, threads, work)
    keep(packed)
