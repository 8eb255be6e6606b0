"""Products with bfloat16 weights in the matrix unit of recent x86 servers (AMX).

The unit multiplies bfloat16 only, so each float32 activation is split in two: its own rounding to bfloat16, and that
of what is left. With both products added in float32 the result is good to about 2^-17, a hundred times better than
rounding the activations, for twice the multiplications of a unit that has eight times the vector unit's rate.

A tile is 16 rows of up to 64 bytes. Weights are loaded as they lie, 16 outputs by 32 inputs. Activations are packed
first: [16 pairs of inputs][tokens][2], the number of tokens being 1, 2, 4, 8 or 16. So sums come out as [16 outputs]
[tokens], and are turned on their way to memory. A sum takes its inputs in order, 32 at a time, whatever the number of
tokens: a token's result does not depend on those beside it.
"""

from __future__ import annotations

import ctypes
import sys
from functools import partial
from typing import Any, NamedTuple

from llvmlite import ir

from outrider.kernels.cpu.activation import silu_mul
from outrider.kernels.cpu.addresses import Product
from outrider.kernels.cpu.emit import BFLOAT16, LANES, NO, Emitter, Int, Vector, emitted
from outrider.kernels.cpu.jit import TARGET_FEATURES, Kernel, allocate, compiled, free, larger, smaller, task
from outrider.kernels.cpu.threads import add, parallel, read

_BYTE = ir.IntType(8)
_STEP = 32  # inputs in a tile
_OUTPUTS = 32  # that are summed at once, in two tiles a tile of tokens
_HEIGHTS = (1, 2, 4, 8, LANES)
_TILE = 1024  # bytes of one
_TASK = 1 << 15, 1 << 20  # bytes of weights in a task: at least, cheap to hand out, and at most, long enough to stream
_AHEAD = 2 * _STEP  # inputs, from where weights are asked for to where they are used
_SHORT = 1024  # inputs: one token does better without asking for the next rows where these are longer
_SMALL = 1 << 14  # activations, some two microseconds' packing
_PANEL = 1 << 20  # bytes of packed activations that are used against all weights before the next: they stay in cache

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


_EXISTS = sys.platform == "linux" and {"amx-bf16", "amx-tile"} <= TARGET_FEATURES
AVAILABLE = _EXISTS and ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0
"""Whether this process may use the unit."""


@compiled()
def fits(inputs: int, outputs: int) -> bool:
    """Whether a bfloat16 weight of this shape is for this file's kernels, where they are available."""
    return inputs % _STEP == 0 and outputs >= _OUTPUTS


def _zipped(emitter: Emitter, rows: list[Vector]) -> list[Vector]:
    """2^k vectors' lanes in turn: the first lane of each, then the second, ..."""
    if len(rows) == 1:
        return rows
    evens, odds = _zipped(emitter, rows[::2]), _zipped(emitter, rows[1::2])
    low, high = ([lane + part for i in range(8) for lane in (i, i + LANES)] for part in (0, 8))
    pairs = zip(evens, odds, strict=True)
    return [emitter.shuffle(even, odd, half) for even, odd in pairs for half in (low, high)]


def _unzipped(emitter: Emitter, vectors: list[Vector]) -> list[Vector]:
    """What `_zipped` was given."""
    if len(vectors) == 1:
        return vectors
    pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
    evens, odds = ([emitter.shuffle(a, b, range(first, 2 * LANES, 2)) for a, b in pairs] for first in (0, 1))
    rows = zip(_unzipped(emitter, evens), _unzipped(emitter, odds), strict=True)
    return [row for pair in rows for row in pair]


@emitted
def _pack(emitter: Emitter, x: Int, count: Int, size: Int, first: Int, last: Int, height: Int, out: Int) -> None:
    """Inputs first:last of `count` rows, as pairs of tiles for `height` tokens: rounded, and what that leaves."""
    builder = emitter.builder

    def of_height(height: int) -> None:
        rows = emitter.rows(x, emitter.times(size, 4), height, count)

        def step(index: Int, none: list[Vector]) -> list[Vector]:
            coarse: list[Vector] = []
            fine: list[Vector] = []
            for row in rows:
                low, high = (emitter.load(row, emitter.plus(index, start, 1)) for start in (0, LANES))
                words = []
                for parity in (0, 1):
                    value = emitter.shuffle(low, high, range(parity, 2 * LANES, 2))
                    top, top_bits = emitter.rounded(value)
                    words.append((top_bits, emitter.rounded(builder.fsub(value, top))[1]))
                for (even, odd), tile in zip(zip(*words, strict=True), (coarse, fine), strict=True):
                    word = builder.or_(builder.lshr(even, emitter.ints(16)), odd)
                    tile.append(builder.bitcast(word, emitter.floats(0).type))
            for i, vector in enumerate([*_zipped(emitter, coarse), *_zipped(emitter, fine)]):
                emitter.store(vector, out, emitter.plus(emitter.times(index, height), i, LANES))
            return none

        emitter.loop(first, last, _STEP, step, [])

    emitter.each_height(height, of_height, _HEIGHTS)


def _tile_call(emitter: Emitter, name: str, *arguments: Any) -> None:
    given = [ir.Constant(_BYTE, each) if isinstance(each, int) else each for each in arguments]
    emitter.call(f"llvm.x86.{name}", ir.VoidType(), *given)


_SUMS, _WEIGHTS, _TOKENS = (0, 1, 2, 3), (4, 5), (6, 7)  # what the eight tiles are for


@emitted
def _configure(emitter: Emitter, height: Int, scratch: Int) -> None:
    """16 rows in each tile: of 32 inputs' weights, or of so many tokens."""

    def of_height(height: int) -> None:
        widths = [64 if tile in _WEIGHTS else 4 * height for tile in range(8)]
        table = [1] + [0] * 15 + [byte for width in widths for byte in (width, 0)] + [0] * 16 + [16] * 8 + [0] * 8
        for start in range(0, 64, 16):
            row = ir.Constant(ir.VectorType(_BYTE, 16), [_BYTE(value) for value in table[start : start + 16]])
            emitter.builder.store(row, emitter.pointer(scratch, start, row.type), align=1)
        _tile_call(emitter, "ldtilecfg", emitter.pointer(scratch, 0, _BYTE))

    emitter.each_height(height, of_height, _HEIGHTS)


@emitted
def _release(emitter: Emitter, scratch: Int) -> None:
    _tile_call(emitter, "tilerelease")


class _Sums(NamedTuple):
    """What tiles are summed: 32 outputs of tokens of which `left` are wanted."""

    weight: Int
    apart: Int
    bias: Int
    size: Int
    packed: Int
    out: Int
    outputs: Int
    left: Int
    scratch: Int


def _sum_tiles(emitter: Emitter, height: int, width: int, gated: bool, given: _Sums) -> None:
    """The outputs of `width` tiles of `height` tokens."""
    weight, apart, bias, size, packed, out, outputs, left, scratch = given
    builder, stride, panel = emitter.builder, emitter.times(size, 2), emitter.times(size, 4 * height)
    sums = [(o, t, _SUMS[2 * o + t]) for o in range(2) for t in range(width)]
    for _, _, tile in sums:
        _tile_call(emitter, "tilezero", tile)
    bases = weight, emitter.plus(weight, apart, stride)

    def steps(start: Int, stop: Int, further: Int | None) -> None:
        """Adds inputs start:stop, asking for weights ahead and so many bytes further, or not at all."""

        def step(index: Int, none: list[Vector]) -> list[Vector]:
            for tile, first in zip(_WEIGHTS, bases, strict=True):
                base = emitter.plus(first, index, 2)
                for row in range(LANES if further is not None else 0):
                    emitter.prefetch(emitter.plus(builder.add(base, further), row, stride), 2, _AHEAD)
                _tile_call(emitter, "tileloadd64", tile, emitter.pointer(base, 0, _BYTE), stride)
            for part in range(2):
                for t in range(width):
                    base = emitter.plus(emitter.plus(packed, index, 4 * height), panel, t)
                    address = emitter.pointer(base, part * 64 * height, _BYTE)
                    _tile_call(emitter, "tileloadd64", _TOKENS[t], address, size.type(4 * height))
                for o, t, tile in sums:
                    _tile_call(emitter, "tdpbf16ps", tile, _WEIGHTS[o], _TOKENS[t])
            return none

        emitter.loop(start, stop, _STEP, step, [])

    if height * width <= LANES:
        # memory is the limit, and a row of weights is the stream to follow; it ends in the rows of the next outputs
        end = builder.sub(size, size.type(_AHEAD))
        end = builder.select(builder.icmp_signed("<", end, size.type(0)), size.type(0), end)
        wrap = emitter.times(stride, LANES - 1 if gated else 2 * LANES - 1)
        if height == 1:
            wrap = builder.select(builder.icmp_signed("<", size, size.type(_SHORT)), wrap, size.type(0))
        steps(0, end, size.type(0))
        steps(end, size, wrap)
    else:
        steps(0, size, None)
    for index, (_, _, tile) in enumerate(sums):
        address = emitter.pointer(scratch, index * _TILE, _BYTE)
        _tile_call(emitter, "tilestored64", tile, address, size.type(4 * height))

    def turned(o: int, t: int) -> list[Vector]:
        start = (o * width + t) * _TILE // 4
        return _unzipped(emitter, [emitter.load(scratch, start + i * LANES) for i in range(height)])

    line = emitter.times(outputs, 4)
    biased = emitter.splat(builder.icmp_signed("!=", bias, bias.type(0)))
    for t in range(width):
        start = emitter.plus(out, line, height * t)
        addresses = emitter.rows(start, line, height, builder.sub(left, left.type(height * t)))
        # a row past the last goes where the last one does, and before it
        if gated:
            for gate, up, address in reversed(list(zip(turned(0, t), turned(1, t), addresses, strict=True))):
                emitter.store(silu_mul(emitter, gate, up), address, 0)
            continue
        for o in range(2):
            added = emitter.load(bias, 16 * o, biased, BFLOAT16)
            for row, address in reversed(list(zip(turned(o, t), addresses, strict=True))):
                emitter.store(builder.fadd(row, added), address, 16 * o)


@emitted
def _multiply(
    emitter: Emitter,
    height: Int,
    weight: Int,
    apart: Int,
    gated: Int,
    bias: Int,
    size: Int,
    packed: Int,
    out: Int,
    outputs: Int,
    left: Int,
    scratch: Int,
) -> None:
    """Two times 16 outputs, whose weights lie `apart` outputs from each other, of up to `height` tokens, or of up to
    32 where tiles hold 16. Gated, the first 16 are gates of the second, and what is stored is their product."""
    given = _Sums(weight, apart, bias, size, packed, out, outputs, left, scratch)

    def of_mode(gated: bool) -> None:
        with emitter.builder.if_else(emitter.builder.icmp_signed(">", left, left.type(LANES))) as (two, one):
            with two:
                _sum_tiles(emitter, LANES, 2, gated, given)
            with one:
                each = partial(_sum_tiles, emitter)
                emitter.each_height(height, lambda height: each(height, 1, gated, given), _HEIGHTS)

    with emitter.builder.if_else(emitter.builder.icmp_signed("!=", gated, gated.type(0))) as (is_gated, plain):
        with is_gated:
            of_mode(True)
        with plain:
            of_mode(False)


@compiled()
def tile_height(rows: int) -> int:
    """How many tokens a tile holds: the least power of two that is enough, 16 at most."""
    height = 1
    while height < rows and height < LANES:
        height *= 2
    return height


@compiled()
def small(rows: int, inputs: int) -> bool:
    """Whether packing takes less than handing the work to others would."""
    return rows <= LANES and rows * inputs <= _SMALL


@task(exists=AVAILABLE)
def pack(tickets: int, x: int, rows: int, inputs: int, height: int, packed: int) -> None:
    """Takes 16 rows, or `height` if they are all, and 256 of their inputs."""
    parts = (inputs + 255) // 256
    while True:
        ticket = add(tickets, 1)
        row, first = ticket // parts * height, ticket % parts * 256
        if row >= rows:
            break
        address = packed + row * inputs * 4
        last = smaller(first + 256, inputs)
        _pack(x + row * inputs * 4, smaller(rows - row, height), inputs, first, last, height, address)


@task(exists=AVAILABLE)
def products(
    tickets: int, packed: int, rows: int, height: int, product: Product, gated: int, out: int, threads: int
) -> None:
    """Takes some outputs of all rows: many at first, and fewer the fewer are left, so that threads end together.

    Gated, the weight has gates for `outputs` columns and then as many columns, and their products are what comes out.
    """
    weight, bias, inputs, outputs, _ = product
    width, apart = (LANES, outputs) if gated else (_OUTPUTS, LANES)
    blocks, size = (outputs + width - 1) // width, inputs * 2 * _OUTPUTS
    max_share, min_share = larger(_TASK[1] // size, 1), larger(_TASK[0] // size, 1)
    scratch = allocate(4 * _TILE)
    _configure(height, scratch)
    while True:
        share = larger(smaller((blocks - read(tickets)) // (2 * threads), max_share), min_share)
        start = add(tickets, share)
        if start >= blocks:
            break
        for row in range(0, rows, 2 * LANES):  # which stay in the first cache while weights pass
            x, left = packed + row * inputs * 4, smaller(rows - row, 2 * LANES)
            for each in range(start, smaller(start + share, blocks)):
                o = smaller(each * width, outputs - width)
                weights, added = weight + o * inputs * 2, bias + o * 2 if bias != 0 else bias
                address = out + (row * outputs + o) * 4
                _multiply(height, weights, apart, gated, added, inputs, x, address, outputs, left, scratch)
    _release(scratch)
    free(scratch)


@task(exists=AVAILABLE)
def alone(tickets: int, x: int, rows: int, height: int, product: Product, gated: int, out: int, threads: int) -> None:
    """`pack` and `products` in one, for up to 16 rows: every thread packs them all, and waits for none to do it."""
    inputs = product.inputs
    packed = allocate(height * inputs * 4)
    _pack(x, rows, inputs, 0, inputs, height, packed)
    products(tickets, packed, rows, height, product, gated, out, threads)
    free(packed)


@Kernel
def multiply(x: int, product: Product, out: int, rows: int, threads: int) -> None:
    """out = x @ weight.T + bias"""
    height, inputs, outputs = tile_height(rows), product.inputs, product.outputs
    if small(rows, inputs):
        parallel(alone, threads, (x, rows, height, product, NO, out, threads))
        return
    packed = allocate((rows + height - 1) // height * height * inputs * 4)
    parallel(pack, threads, (x, rows, inputs, height, packed))
    block = larger(_PANEL // (inputs * 4) // (2 * LANES), 1) * 2 * LANES
    for row in range(0, rows, block):
        count, address = smaller(rows - row, block), out + row * outputs * 4
        parallel(products, threads, (packed + row * inputs * 4, count, height, product, NO, address, threads))
    free(packed)
