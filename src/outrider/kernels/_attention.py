"""The CPU's paged attention: tasks, and the tiles that they are made of.

A query row is one head of one token. A task is up to 32 rows that share a key head, against up to 512 keys: every row
keeps a running maximum and sums relative to it (Milakov and Gimelshein, 2018). Keys are taken 64 at a time, and the
sums over one 512 are joined with those over the next in order, so what a row gets depends on its own query and the
keys before it: not on the rows beside it, nor on the number of threads.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray

from outrider.kernels._numba import (
    BFLOAT16,
    CACHES,
    LANES,
    WIDTH,
    Emitter,
    Int,
    Real,
    Turn,
    Vector,
    address,
    emitted,
    keep,
)
from outrider.kernels._threads import add
from outrider.kernels.native import compiled, pointer

_SPLIT = 512  # keys in a task
_CHUNK = 64  # keys between two updates of the maximum
_GROUPS = _CHUNK // LANES  # sixteens in a chunk
_ROWS = 32  # rows in a task
_TILE = 8  # of them, in a tile
_HEIGHTS = (2, 4, _TILE)
_STATE = 3 * LANES * 4  # bytes of a row's state: its maximum, sum of weights, and factor for the sums so far
_SUM, _FACTOR = LANES, 2 * LANES


@emitted
def _start_row(emitter: Emitter, state: Int, mixed: Int, size: Int) -> None:
    emitter.store(emitter.floats(-math.inf), state, 0)
    emitter.store(emitter.floats(0), state, _SUM)

    def clear(index: Int, mask: Vector | None, none: list[Vector]) -> list[Vector]:
        emitter.store(emitter.floats(0), mixed, index, mask)
        return none

    emitter.sweep(size, clear, [])


def _group(emitter: Emitter, places: Int, key: Int, cache: Int, cell: Int) -> Int:
    """Where the 16 keys or values from `key` of a chunk on lie in a cache of `cell` bytes a head."""
    return emitter.plus(cache, emitter.integer(places, emitter.builder.lshr(key, key.type(4))), cell)


@emitted
def _score(
    emitter: Emitter,
    queries: Int,
    count: Int,
    cache: Int,
    places: Int,
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
        score_rows = emitter.rows(scores, _CHUNK * 4, height, count)

        def sixteen(start: Int, none: list[Vector]) -> list[Vector]:
            base = _group(emitter, places, start, cache, cell)

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


def _joined(emitter: Emitter, before: Vector, most: Vector) -> tuple[Vector, Vector, Vector]:
    """The maximum of both, what to subtract for it, and the factor that turns sums under `before` into sums under it.

    The maximum is -inf while nothing is seen, and -inf - -inf would be no number.
    """
    most = emitter.maximum(before, most)
    unseen = emitter.builder.fcmp_ordered("==", most, emitter.floats(-math.inf))
    base = emitter.builder.select(unseen, emitter.floats(0), most)
    return most, base, emitter.exp(emitter.builder.fsub(before, base))


@emitted
def _soften_row(emitter: Emitter, scores: Int, scale: Real, keys: Int, seen: Int, state: Int) -> None:
    """Turns a row's scores into weights relative to its running maximum, 0 from `seen` on, and updates its state."""
    builder = emitter.builder
    factor = emitter.splat(builder.fptrunc(scale, emitter.floats(0).type.element))

    def scaled(index: Int, state: list[Vector]) -> list[Vector]:
        visible = emitter.below(builder.sub(seen, index))
        value = builder.fmul(emitter.load(scores, index), factor)
        value = builder.select(visible, value, emitter.floats(-math.inf))
        emitter.store(value, scores, index)
        return [emitter.maximum(state[0], value)]

    most = emitter.loop(0, keys, LANES, scaled, [emitter.floats(-math.inf)])[0]
    most, base, keep = _joined(emitter, emitter.load(state, 0), emitter.widest(most))

    def weights(index: Int, state: list[Vector]) -> list[Vector]:
        value = emitter.exp(builder.fsub(emitter.load(scores, index), base))
        emitter.store(value, scores, index)
        return [builder.fadd(state[0], value)]

    total = emitter.total(emitter.loop(0, keys, LANES, weights, [emitter.floats(0)])[0])
    emitter.store(most, state, 0)
    emitter.store(emitter.fma(emitter.load(state, _SUM), keep, total), state, _SUM)
    emitter.store(keep, state, _FACTOR)


@emitted
def _mix(
    emitter: Emitter,
    weights: Int,
    states: Int,
    count: Int,
    cache: Int,
    places: Int,
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
        weight_rows = emitter.rows(weights, _CHUNK * 4, height, count)
        state_rows = emitter.rows(states, _STATE, height, count)
        mixed_rows = emitter.rows(mixed, emitter.times(size, 4), height, count)
        factors = [emitter.load(state, _FACTOR) for state in state_rows]

        def tile(column: Int, vectors: int, paired: bool, mask: Vector | None) -> None:
            columns = [emitter.plus(column, i, LANES) for i in range(vectors)]
            places_of_sums = [(row, column) for row in mixed_rows for column in columns]
            sums = [emitter.load(row, column, mask) for row, column in places_of_sums]
            sums = [builder.fmul(old, factors[i // len(columns)]) for i, old in enumerate(sums)]

            def sixteen(start: Int, sums: list[Vector]) -> list[Vector]:
                base = _group(emitter, places, start, cache, cell)
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

                return emitter.loop(start, emitter.least(emitter.plus(start, LANES, 1), seen), 1, step, sums)

            sums = emitter.loop(0, seen, LANES, sixteen, sums)
            for (row, column), value in zip(places_of_sums, sums, strict=True):
                emitter.store(value, row, column, mask)

        def wide(column: Int, none: list[Vector]) -> list[Vector]:
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
        emitter.loop(0, middle, LANES * vectors, wide, [])
        if kind == BFLOAT16 and vectors > 2:
            start, middle = middle, builder.and_(size, size.type(-2 * LANES))
            emitter.loop(start, middle, 2 * LANES, pair, [])
        emitter.loop(middle, size, LANES, rest, [])

    def of_kind(kind: int) -> None:
        emitter.each_height(count, lambda height: of_kind_and_height(kind, height), _HEIGHTS)

    emitter.each_kind(kind, of_kind, CACHES)


@emitted
def _join_row(emitter: Emitter, state: Int, mixed: Int, other_state: Int, other_mixed: Int, size: Int) -> None:
    """Takes a row's sums over later keys into those over earlier ones."""
    builder = emitter.builder
    theirs = emitter.load(other_state, 0)
    most, base, keep = _joined(emitter, emitter.load(state, 0), theirs)
    factor = emitter.exp(builder.fsub(theirs, base))
    added = builder.fmul(emitter.load(other_state, _SUM), factor)
    emitter.store(most, state, 0)
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
def _take_row(emitter: Emitter, source: Int, out: Int, kind: Int, size: Int) -> None:
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
def _finish_row(emitter: Emitter, state: Int, mixed: Int, out: Int, kind: Int, size: Int) -> None:
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


@compiled()
def area(head_dim: int) -> int:
    """Bytes that a task's sums and states take."""
    return _ROWS * (head_dim * 4 + _STATE)


@compiled()
def plan(query_start: int, seq_lens: int, rows: int, group: int, num_kv_heads: int, begin: int, end: int) -> Any:
    """[n + 1, 8] int64: the tasks of query tokens begin:end, and in the last row how many there are, areas to join,
    query-key pairs, and how many of the tokens belong to a row.

    A task is its row, key head, the row's first query token after `begin`, counted from there, and that token's
    position, its first query row and number of them, its 512 keys, and the area for its sums: -1 where no other task
    has the same query rows.
    """
    starts = carray(pointer(query_start), (rows + 1,), np.int32)
    lens = carray(pointer(seq_lens), (rows,), np.int32)
    most = 1
    for row in range(rows):
        tokens = min(int(starts[row + 1]), end) - max(int(starts[row]), begin)
        if tokens > 0:
            tiles = (tokens * group + _ROWS - 1) // _ROWS
            most += tiles * num_kv_heads * ((lens[row] + _SPLIT - 1) // _SPLIT)
    tasks = np.empty((most, 8), np.int64)
    count = areas = pairs = 0
    for row in range(rows):
        token = max(int(starts[row]), begin)
        tokens = min(int(starts[row + 1]), end) - token
        if tokens <= 0:
            continue
        position = int(lens[row]) - int(starts[row + 1]) + token
        for head in range(num_kv_heads):
            for first in range(0, tokens * group, _ROWS):
                height = min(_ROWS, tokens * group - first)
                last = position + (first + height - 1) // group
                splits = last // _SPLIT + 1
                pairs += (last + 1) * height
                for split in range(splits):
                    tasks[count, 0] = row
                    tasks[count, 1] = head
                    tasks[count, 2] = token - begin
                    tasks[count, 3] = position
                    tasks[count, 4] = first
                    tasks[count, 5] = height
                    tasks[count, 6] = split
                    tasks[count, 7] = -1 if splits == 1 else areas + split
                    count += 1
                if splits > 1:
                    areas += splits
    tasks[-1, 0], tasks[-1, 1], tasks[-1, 2] = count, areas, pairs
    tasks[-1, 3] = min(max(int(starts[rows]) - begin, 0), end - begin)
    return tasks


@compiled()
def _find(groups: Any, table: Any, begin: int, stop: int, head: int, num_kv_heads: int, block_size: int) -> None:
    """How many heads of one token lie before each 16 keys of a chunk; past the last key, the last sixteen again."""
    token = min(begin, stop - 1)
    for i in range(_GROUPS):
        groups[i] = (
            int(table[token // block_size]) * num_kv_heads + head
        ) * block_size + token % block_size // LANES * LANES
        token = min(token + LANES, stop - 1)


@compiled()
def attend(
    tickets: int,
    plan: int,
    count: int,
    areas: int,
    query: int,
    key_cache: int,
    value_cache: int,
    kind: int,  # of the caches
    block_table: int,
    max_blocks: int,
    group: int,
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
    scale: float,
    out: int,
    owned: int,  # query tokens that belong to a row; the rest get 0
    tokens: int,
) -> None:
    """Takes tasks; where one has its query rows to itself it finishes them."""
    tasks = carray(pointer(plan), (count, 8), np.int64)
    size, stride, whole = head_dim * 4, group * num_kv_heads * head_dim * 4, area(head_dim)
    scratch = np.empty((_ROWS * size + _TILE * _CHUNK * 4 + whole) // 4, np.float32)
    groups = np.empty(2 * _GROUPS, np.int64)  # of this chunk, and of the next
    places, later = address(groups), address(groups) + _GROUPS * 8
    queries = address(scratch)
    scores = queries + _ROWS * size
    own = scores + _TILE * _CHUNK * 4
    while True:
        index = add(tickets, 1)
        if index >= count:
            if index == count:
                carray(pointer(out), (tokens, stride // 4), np.float32)[owned:] = 0
            break
        row, head, token, position, first, height, split, place = tasks[index]
        mixed = own if place < 0 else areas + place * whole
        states = mixed + _ROWS * size
        for i in range(height):
            heads = (first + i) // group * stride + (head * group + (first + i) % group) * size
            _take_row(query + token * stride + heads, queries + i * size, kind, head_dim)
            _start_row(states + i * _STATE, mixed + i * size, head_dim)
        table = carray(pointer(block_table + row * max_blocks * 4), (max_blocks,), np.int32)
        stop = min((split + 1) * _SPLIT, position + (first + height - 1) // group + 1)
        _find(groups[_GROUPS:], table, split * _SPLIT, stop, head, num_kv_heads, block_size)
        for begin in range(split * _SPLIT, stop, _CHUNK):
            groups[:_GROUPS] = groups[_GROUPS:]
            _find(groups[_GROUPS:], table, begin + _CHUNK, stop, head, num_kv_heads, block_size)
            for part in range(0, height, _TILE):
                # the tile's last row sees the most
                end = min(min(begin + _CHUNK, stop), position + (first + min(part + _TILE, height) - 1) // group + 1)
                if end <= begin:
                    continue
                rows, keys = min(_TILE, height - part), end - begin
                q, state = queries + part * size, states + part * _STATE
                _score(q, rows, key_cache, places, keys, kind, head_dim, scores, value_cache - key_cache)
                for i in range(rows):
                    seen = position + (first + part + i) // group + 1 - begin
                    _soften_row(scores + i * _CHUNK * 4, scale, keys, seen, state + i * _STATE)
                sums = mixed + part * size
                _mix(scores, state, rows, value_cache, places, kind, keys, sums, head_dim, key_cache, later)
        if place < 0:
            for i in range(height):
                heads = (first + i) // group * stride + (head * group + (first + i) % group) * size
                _finish_row(states + i * _STATE, mixed + i * size, out + token * stride + heads, kind, head_dim)
    keep(scratch)
    keep(groups)


@compiled()
def join(
    tickets: int, plan: int, count: int, areas: int, kind: int, group: int, num_kv_heads: int, head_dim: int, out: int
) -> None:
    """After all tasks: joins and finishes the query rows that several of them shared."""
    tasks = carray(pointer(plan), (count, 8), np.int64)
    size, stride, whole = head_dim * 4, group * num_kv_heads * head_dim * 4, area(head_dim)
    while True:
        index = add(tickets, 1)
        if index >= count:
            break
        _, head, token, position, first, height, split, place = tasks[index]
        if place < 0 or split > 0:
            continue
        for i in range(height):
            mixed = areas + place * whole + i * size
            state = areas + place * whole + _ROWS * size + i * _STATE
            for later in range(1, (position + (first + i) // group) // _SPLIT + 1):
                _join_row(state, mixed, state + later * whole, mixed + later * whole, head_dim)
            heads = (first + i) // group * stride + (head * group + (first + i) % group) * size
            _finish_row(state, mixed, out + token * stride + heads, kind, head_dim)
