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

from outrider.kernels._numba import LANES, Emitter, Int, Real, Vector, address, copy_row, emitted, keep
from outrider.kernels._threads import add
from outrider.kernels.native import compiled, pointer

_SPLIT = 512  # keys in a task
_CHUNK = 64  # keys between two updates of the maximum
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


@emitted
def _score(emitter: Emitter, queries: Int, count: Int, keys: Int, size: Int, scores: Int, ahead: Int) -> None:
    """scores[r][k] = queries[r] . keys[k], for up to 8 rows and 16 keys; what lies `ahead` of these is asked for."""
    stride = emitter.times(size, 4)

    def of_height(height: int) -> None:
        width = LANES // height
        q_rows = emitter.rows(queries, stride, height, count)
        score_rows = emitter.rows(scores, _CHUNK * 4, height, count)

        def tile(key: Int, state: list[Vector]) -> list[Vector]:
            k_rows = emitter.rows(emitter.plus(keys, key, stride), stride, width, width)
            places = [emitter.plus(row, key, 4) for row in score_rows]
            emitter.dots(q_rows, k_rows, size, places, ahead=ahead)
            return state

        emitter.loop(0, LANES, width, tile, [])

    emitter.each_height(count, of_height, _HEIGHTS)


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
    values: Int,
    seen: Int,
    mixed: Int,
    size: Int,
    ahead: Int,
) -> None:
    """mixed[r] = mixed[r] * factor of r + sum over up to 16 keys of weights[r][k] * values[k]; the factor is then 1."""
    builder = emitter.builder
    stride = emitter.times(size, 4)

    def of_height(height: int) -> None:
        weight_rows = emitter.rows(weights, _CHUNK * 4, height, count)
        state_rows = emitter.rows(states, _STATE, height, count)
        mixed_rows = emitter.rows(mixed, stride, height, count)
        factors = [emitter.load(state, _FACTOR) for state in state_rows]

        def tile(columns: list[Int], mask: Vector | None) -> None:
            places = [(row, column) for row in mixed_rows for column in columns]
            sums = [emitter.load(row, column, mask) for row, column in places]
            sums = [builder.fmul(old, factors[i // len(columns)]) for i, old in enumerate(sums)]

            def step(key: Int, old: list[Vector]) -> list[Vector]:
                value = emitter.plus(values, key, stride)
                for column in columns:
                    emitter.prefetch(builder.add(value, ahead), column, 4)
                parts = [emitter.load(value, column, mask) for column in columns]
                new: list[Vector] = []
                for row in weight_rows:
                    weight = emitter.spread(row, key)
                    new += [emitter.fma(weight, part, old[len(new) + i]) for i, part in enumerate(parts)]
                return new

            for (row, column), value in zip(places, emitter.loop(0, seen, 1, step, sums), strict=True):
                emitter.store(value, row, column, mask)

        def wide(column: Int, none: list[Vector]) -> list[Vector]:
            tile([emitter.plus(column, i, LANES) for i in range(vectors)], None)
            return none

        def rest(column: Int, none: list[Vector]) -> list[Vector]:
            tile([column], emitter.below(builder.sub(size, column)))
            return none

        vectors = min(16 // height, 4)
        middle = builder.and_(size, size.type(-LANES * vectors))
        emitter.loop(0, middle, LANES * vectors, wide, [])
        emitter.loop(middle, size, LANES, rest, [])
        for state in state_rows:
            emitter.store(emitter.floats(1), state, _FACTOR)

    emitter.each_height(count, of_height, _HEIGHTS)


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


@emitted
def _finish_row(emitter: Emitter, state: Int, mixed: Int, out: Int, size: Int) -> None:
    total = emitter.load(state, _SUM)

    def divide(index: Int, mask: Vector | None, none: list[Vector]) -> list[Vector]:
        emitter.store(emitter.builder.fdiv(emitter.load(mixed, index, mask), total), out, index, mask)
        return none

    emitter.sweep(size, divide, [])


@compiled()
def area(head_dim: int) -> int:
    """Bytes that a task's sums and states take."""
    return _ROWS * (head_dim * 4 + _STATE)


@compiled()
def plan(query_start: int, seq_lens: int, rows: int, group: int, num_kv_heads: int) -> Any:
    """[n + 1, 8] int64: the tasks, and in the last row how many there are, areas to join, and query-key pairs.

    A task is its row, key head, the row's first query token and that token's position, its first query row and
    number of them, its 512 keys, and the area for its sums: -1 where no other task has the same query rows.
    """
    starts = carray(pointer(query_start), (rows + 1,), np.int32)
    lens = carray(pointer(seq_lens), (rows,), np.int32)
    most = 1
    for row in range(rows):
        tiles = ((starts[row + 1] - starts[row]) * group + _ROWS - 1) // _ROWS
        most += tiles * num_kv_heads * ((lens[row] + _SPLIT - 1) // _SPLIT)
    tasks = np.empty((most, 8), np.int64)
    count = areas = pairs = 0
    for row in range(rows):
        token, tokens = int(starts[row]), int(starts[row + 1] - starts[row])
        position = int(lens[row]) - tokens
        for head in range(num_kv_heads):
            for first in range(0, tokens * group, _ROWS):
                height = min(_ROWS, tokens * group - first)
                last = position + (first + height - 1) // group
                splits = last // _SPLIT + 1
                pairs += (last + 1) * height
                for split in range(splits):
                    tasks[count, 0] = row
                    tasks[count, 1] = head
                    tasks[count, 2] = token
                    tasks[count, 3] = position
                    tasks[count, 4] = first
                    tasks[count, 5] = height
                    tasks[count, 6] = split
                    tasks[count, 7] = -1 if splits == 1 else areas + split
                    count += 1
                if splits > 1:
                    areas += splits
    tasks[-1, 0], tasks[-1, 1], tasks[-1, 2] = count, areas, pairs
    return tasks


@compiled()
def _place(table: Any, token: int, head: int, num_kv_heads: int, block_size: int) -> int:
    """How many heads of one token lie before this one in a cache."""
    return (int(table[token // block_size]) * num_kv_heads + head) * block_size + token % block_size


@compiled()
def attend(
    tickets: int,
    plan: int,
    count: int,
    areas: int,
    query: int,
    key_cache: int,
    value_cache: int,
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
            copy_row(query + token * stride + heads, queries + i * size, head_dim)
            _start_row(states + i * _STATE, mixed + i * size, head_dim)
        table = carray(pointer(block_table + row * max_blocks * 4), (max_blocks,), np.int32)
        stop = min((split + 1) * _SPLIT, position + (first + height - 1) // group + 1)
        for begin in range(split * _SPLIT, stop, _CHUNK):
            for part in range(0, height, _TILE):
                # the tile's last row sees the most
                end = min(min(begin + _CHUNK, stop), position + (first + min(part + _TILE, height) - 1) // group + 1)
                rows = min(_TILE, height - part)
                for key in range(begin, end, LANES):
                    at = _place(table, key, head, num_kv_heads, block_size) * size
                    ahead = value_cache - key_cache
                    _score(queries + part * size, rows, key_cache + at, head_dim, scores + (key - begin) * 4, ahead)
                for i in range(part, part + rows if end > begin else part):
                    seen = position + (first + i) // group + 1 - begin
                    _soften_row(scores + (i - part) * _CHUNK * 4, scale, end - begin, seen, states + i * _STATE)
                for key in range(begin, end, LANES):
                    at = _place(table, key, head, num_kv_heads, block_size) * size
                    then = _place(table, min(key + _CHUNK, stop - 1), head, num_kv_heads, block_size) * size
                    _mix(
                        scores + (key - begin) * 4,
                        states + part * _STATE,
                        rows,
                        value_cache + at,
                        min(LANES, end - key),
                        mixed + part * size,
                        head_dim,
                        key_cache + then - value_cache - at,
                    )
        if place < 0:
            for i in range(height):
                heads = (first + i) // group * stride + (head * group + (first + i) % group) * size
                _finish_row(states + i * _STATE, mixed + i * size, out + token * stride + heads, head_dim)
    keep(scratch)


@compiled()
def join(
    tickets: int, plan: int, count: int, areas: int, group: int, num_kv_heads: int, head_dim: int, out: int
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
            _finish_row(state, mixed, out + token * stride + heads, head_dim)
