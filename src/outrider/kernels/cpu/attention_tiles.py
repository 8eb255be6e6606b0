"""What the CPU's paged attention is made of: tiles of query rows against a chunk of keys or values.

A row keeps a running maximum and sums relative to it (Milakov and Gimelshein, 2018). bfloat16 keys and values are read
in pairs: see `_in_pairs`.
"""

from __future__ import annotations

import math

from outrider.kernels.cpu.emit import BFLOAT16, CACHES, LANES, WIDTH, Emitter, Int, Real, Turn, Vector, emitted

CHUNK = 64  # keys between two updates of the maximum
STATE = 3 * LANES * 4  # bytes of a row's state: its maximum, sum of weights, and factor for the sums so far
_HEIGHTS = (2, 4, 8)  # rows of a tile
_SUM, _FACTOR = LANES, 2 * LANES


@emitted
def start_row(emitter: Emitter, state: Int, mixed: Int, size: Int) -> None:
    """A row that has seen nothing."""
    emitter.store(emitter.floats(-math.inf), state, 0)
    emitter.store(emitter.floats(0), state, _SUM)

    def clear(index: Int, mask: Vector | None, none: list[Vector]) -> list[Vector]:
        emitter.store(emitter.floats(0), mixed, index, mask)
        return none

    emitter.sweep(size, clear, [])


def _group(emitter: Emitter, offsets: Int, key: Int, cache: Int, cell: Int) -> Int:
    """Where the 16 keys or values from `key` of a chunk on lie in a cache of `cell` bytes a head."""
    return emitter.plus(cache, emitter.integer(offsets, emitter.builder.lshr(key, key.type(4))), cell)


@emitted
def score(
    emitter: Emitter,
    queries: Int,
    count: Int,
    cache: Int,
    offsets: Int,
    keys: Int,
    kind: Int,
    size: Int,
    scores: Int,
    ahead: Int,
) -> None:
    """scores[r][k] = queries[r] . keys[k], for up to 8 rows and a chunk of keys rounded up to sixteens.

    What lies `ahead` of the keys is asked for.
    """
    q_stride = emitter.times(size, 4)

    def of_kind_and_height(kind: int, height: int) -> None:
        cell, width = emitter.times(size, WIDTH[kind]), LANES // height
        q_rows = emitter.rows(queries, q_stride, height, count)
        score_rows = emitter.rows(scores, CHUNK * 4, height, count)

        def sixteen(start: Int, none: list[Vector]) -> list[Vector]:
            base = _group(emitter, offsets, start, cache, cell)

            def tile(key: Int, none: list[Vector]) -> list[Vector]:
                k_rows = emitter.rows(emitter.plus(base, key, cell), cell, width, width)
                out_rows = [emitter.plus(row, emitter.plus(start, key, 1), 4) for row in score_rows]
                emitter.dots(q_rows, k_rows, size, out_rows, kind, ahead=ahead, paired=kind == BFLOAT16)
                return none

            emitter.loop(0, LANES, width, tile, [])
            return none

        emitter.loop(0, keys, LANES, sixteen, [])

    def of_kind(kind: int) -> None:
        emitter.each_height(count, lambda height: of_kind_and_height(kind, height), _HEIGHTS)

    emitter.each_kind(kind, of_kind, CACHES)


def _joined(emitter: Emitter, before: Vector, row_max: Vector) -> tuple[Vector, Vector, Vector]:
    """The maximum of both, what to subtract for it, and the factor that turns sums under `before` into sums under it.

    The maximum is -inf while nothing is seen, and -inf - -inf would be no number.
    """
    row_max = emitter.maximum(before, row_max)
    unseen = emitter.builder.fcmp_ordered("==", row_max, emitter.floats(-math.inf))
    base = emitter.builder.select(unseen, emitter.floats(0), row_max)
    return row_max, base, emitter.exp(emitter.builder.fsub(before, base))


@emitted
def soften_row(emitter: Emitter, scores: Int, scale: Real, keys: Int, seen: Int, state: Int) -> None:
    """Turns a row's scores into weights relative to its running maximum, 0 from `seen` on, and updates its state."""
    builder = emitter.builder
    factor = emitter.splat(builder.fptrunc(scale, emitter.floats(0).type.element))

    def scaled(index: Int, state: list[Vector]) -> list[Vector]:
        visible = emitter.below(builder.sub(seen, index))
        value = builder.fmul(emitter.load(scores, index), factor)
        value = builder.select(visible, value, emitter.floats(-math.inf))
        emitter.store(value, scores, index)
        return [emitter.maximum(state[0], value)]

    row_max = emitter.loop(0, keys, LANES, scaled, [emitter.floats(-math.inf)])[0]
    row_max, base, keep = _joined(emitter, emitter.load(state, 0), emitter.largest(row_max))

    def weights(index: Int, state: list[Vector]) -> list[Vector]:
        value = emitter.exp(builder.fsub(emitter.load(scores, index), base))
        emitter.store(value, scores, index)
        return [builder.fadd(state[0], value)]

    total = emitter.total(emitter.loop(0, keys, LANES, weights, [emitter.floats(0)])[0])
    emitter.store(row_max, state, 0)
    emitter.store(emitter.fma(emitter.load(state, _SUM), keep, total), state, _SUM)
    emitter.store(keep, state, _FACTOR)


@emitted
def mix(
    emitter: Emitter,
    weights: Int,
    states: Int,
    count: Int,
    cache: Int,
    offsets: Int,
    kind: Int,
    seen: Int,
    mixed: Int,
    size: Int,
    later_cache: Int,
    later: Int,
) -> None:
    """mixed[r] = mixed[r] * factor of r + sum over a chunk's `seen` keys of weights[r][k] * values[k].

    What lies in another cache at other places is asked for.
    """
    builder = emitter.builder

    def of_kind_and_height(kind: int, height: int) -> None:
        cell = emitter.times(size, WIDTH[kind])
        weight_rows = emitter.rows(weights, CHUNK * 4, height, count)
        state_rows = emitter.rows(states, STATE, height, count)
        mixed_rows = emitter.rows(mixed, emitter.times(size, 4), height, count)
        factors = [emitter.load(state, _FACTOR) for state in state_rows]

        def tile(column: Int, vectors: int, paired: bool, mask: Vector | None) -> None:
            columns = [emitter.plus(column, i, LANES) for i in range(vectors)]
            addresses = [(row, column) for row in mixed_rows for column in columns]
            sums = [emitter.load(row, column, mask) for row, column in addresses]
            sums = [builder.fmul(old, factors[i // len(columns)]) for i, old in enumerate(sums)]

            def sixteen(start: Int, sums: list[Vector]) -> list[Vector]:
                base = _group(emitter, offsets, start, cache, cell)
                ahead = builder.sub(_group(emitter, later, start, later_cache, cell), base)

                def step(key: Int, old: list[Vector]) -> list[Vector]:
                    value = emitter.plus(base, builder.sub(key, start), cell)
                    for line in range(0, vectors * LANES * WIDTH[kind], 64):
                        emitter.prefetch(emitter.plus(builder.add(value, ahead), column, WIDTH[kind]), line, 1)
                    if paired:
                        parts = [part for pair in columns[::2] for part in emitter.load_pairs(value, pair)]
                    else:
                        parts = [emitter.load(value, column, mask, kind) for column in columns]
                    new: list[Vector] = []
                    for row in weight_rows:
                        weight = emitter.spread(row, key)
                        new += [emitter.fma(weight, part, old[len(new) + i]) for i, part in enumerate(parts)]
                    return new

                return emitter.loop(start, emitter.minimum(emitter.plus(start, LANES, 1), seen), 1, step, sums)

            sums = emitter.loop(0, seen, LANES, sixteen, sums)
            for (row, column), value in zip(addresses, sums, strict=True):
                emitter.store(value, row, column, mask)

        def full(column: Int, none: list[Vector]) -> list[Vector]:
            tile(column, vectors, kind == BFLOAT16, None)
            return none

        def pair(column: Int, none: list[Vector]) -> list[Vector]:
            tile(column, 2, True, None)
            return none

        def rest(column: Int, none: list[Vector]) -> list[Vector]:
            tile(column, 1, False, emitter.below(builder.sub(size, column)))
            return none

        vectors = min(16 // height, 4)
        middle = builder.and_(size, size.type(-LANES * vectors))
        emitter.loop(0, middle, LANES * vectors, full, [])
        if kind == BFLOAT16 and vectors > 2:
            start, middle = middle, builder.and_(size, size.type(-2 * LANES))
            emitter.loop(start, middle, 2 * LANES, pair, [])
        emitter.loop(middle, size, LANES, rest, [])

    def of_kind(kind: int) -> None:
        emitter.each_height(count, lambda height: of_kind_and_height(kind, height), _HEIGHTS)

    emitter.each_kind(kind, of_kind, CACHES)


@emitted
def join_row(emitter: Emitter, state: Int, mixed: Int, other_state: Int, other_mixed: Int, size: Int) -> None:
    """Takes a row's sums over later keys into those over earlier ones."""
    builder = emitter.builder
    theirs = emitter.load(other_state, 0)
    row_max, base, keep = _joined(emitter, emitter.load(state, 0), theirs)
    factor = emitter.exp(builder.fsub(theirs, base))
    added = builder.fmul(emitter.load(other_state, _SUM), factor)
    emitter.store(row_max, state, 0)
    emitter.store(emitter.fma(emitter.load(state, _SUM), keep, added), state, _SUM)

    def join(index: Int, mask: Vector | None, none: list[Vector]) -> list[Vector]:
        added = builder.fmul(emitter.load(other_mixed, index, mask), factor)
        emitter.store(emitter.fma(emitter.load(mixed, index, mask), keep, added), mixed, index, mask)
        return none

    emitter.sweep(size, join, [])


def _in_pairs(emitter: Emitter, kind: Int, size: Int, part: Turn) -> Int:
    """Handles what bfloat16 keys and values of `size` elements have in pairs, 32 at once; returns where that ends.

    A vector of pairs is split into the elements at even places and those at odd ones, and sums stay in that order
    until they are finished. What is left of a row after the last 32 is in its own order, as is all of a float32 row.
    """
    builder = emitter.builder
    paired = builder.icmp_signed("==", kind, kind.type(BFLOAT16))
    end = builder.select(paired, builder.and_(size, size.type(-2 * LANES)), size.type(0))
    emitter.loop(0, end, 2 * LANES, part, [])
    return end


@emitted
def take_row(emitter: Emitter, source: Int, out: Int, kind: Int, size: Int) -> None:
    """A row of the query to where it meets keys of a kind: float32 as it is, for bfloat16 in pairs."""

    def copy(index: Int, mask: Vector | None, none: list[Vector]) -> list[Vector]:
        emitter.store(emitter.load(source, index, mask), out, index, mask)
        return none

    def part(index: Int, none: list[Vector]) -> list[Vector]:
        low, high = (emitter.load(source, emitter.plus(index, start, 1)) for start in (0, LANES))
        for parity in (0, 1):
            half = emitter.shuffle(low, high, range(parity, 2 * LANES, 2))
            emitter.store(half, out, emitter.plus(index, parity, LANES))
        return none

    emitter.sweep(size, copy, [], start=_in_pairs(emitter, kind, size, part))


@emitted
def finish_row(emitter: Emitter, state: Int, mixed: Int, out: Int, kind: Int, size: Int) -> None:
    """out = the row's sums over its sum of weights, each element in its own place again."""
    total = emitter.load(state, _SUM)

    def divide(index: Int, mask: Vector | None, none: list[Vector]) -> list[Vector]:
        emitter.store(emitter.builder.fdiv(emitter.load(mixed, index, mask), total), out, index, mask)
        return none

    def part(index: Int, none: list[Vector]) -> list[Vector]:
        halves = [emitter.load(mixed, emitter.plus(index, start, 1)) for start in (0, LANES)]
        even, odd = (emitter.builder.fdiv(half, total) for half in halves)
        for start in (0, LANES):
            lanes = [lane + side for lane in range(start // 2, start // 2 + LANES // 2) for side in (0, LANES)]
            emitter.store(emitter.shuffle(even, odd, lanes), out, emitter.plus(index, start, 1))
        return none

    emitter.sweep(size, divide, [], start=_in_pairs(emitter, kind, size, part))
