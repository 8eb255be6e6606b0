"""The CPU's paged attention: which tasks there are, and what a thread does with one.

A query row is one head of one token. A task is up to 32 rows that share a key head, against up to 512 keys. Keys are
taken 64 at a time, and the sums over one 512 are joined with those over the next in order, so what a row gets depends
on its own query and the keys before it: not on the rows beside it, nor on the number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from outrider.kernels.cpu.attention_tiles import (
    CHUNK,
    STATE,
    finish_row,
    join_row,
    mix,
    score,
    soften_row,
    start_row,
    take_row,
)
from outrider.kernels.cpu.emit import LANES, address, keep
from outrider.kernels.cpu.jit import compiled, pointer
from outrider.kernels.cpu.threads import add

_SPLIT = 512  # keys in a task
_GROUPS = CHUNK // LANES  # sixteens in a chunk
_ROWS = 32  # rows in a task
_TILE = 8  # of them, in a tile


@compiled()
def area(head_dim: int) -> int:
    """Bytes that a task's sums and states take."""
    return _ROWS * (head_dim * 4 + STATE)


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
    scratch = np.empty((_ROWS * size + _TILE * CHUNK * 4 + whole) // 4, np.float32)
    groups = np.empty(2 * _GROUPS, np.int64)  # of this chunk, and of the next
    places, later = address(groups), address(groups) + _GROUPS * 8
    queries = address(scratch)
    scores = queries + _ROWS * size
    own = scores + _TILE * CHUNK * 4
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
            take_row(query + token * stride + heads, queries + i * size, kind, head_dim)
            start_row(states + i * STATE, mixed + i * size, head_dim)
        table = carray(pointer(block_table + row * max_blocks * 4), (max_blocks,), np.int32)
        stop = min((split + 1) * _SPLIT, position + (first + height - 1) // group + 1)
        _find(groups[_GROUPS:], table, split * _SPLIT, stop, head, num_kv_heads, block_size)
        for begin in range(split * _SPLIT, stop, CHUNK):
            groups[:_GROUPS] = groups[_GROUPS:]
            _find(groups[_GROUPS:], table, begin + CHUNK, stop, head, num_kv_heads, block_size)
            for part in range(0, height, _TILE):
                # the tile's last row sees the most
                end = min(min(begin + CHUNK, stop), position + (first + min(part + _TILE, height) - 1) // group + 1)
                if end <= begin:
                    continue
                rows, keys = min(_TILE, height - part), end - begin
                q, state = queries + part * size, states + part * STATE
                score(q, rows, key_cache, places, keys, kind, head_dim, scores, value_cache - key_cache)
                for i in range(rows):
                    seen = position + (first + part + i) // group + 1 - begin
                    soften_row(scores + i * CHUNK * 4, scale, keys, seen, state + i * STATE)
                sums = mixed + part * size
                mix(scores, state, rows, value_cache, places, kind, keys, sums, head_dim, key_cache, later)
        if place < 0:
            for i in range(height):
                heads = (first + i) // group * stride + (head * group + (first + i) % group) * size
                finish_row(states + i * STATE, mixed + i * size, out + token * stride + heads, kind, head_dim)
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
            state = areas + place * whole + _ROWS * size + i * STATE
            for later in range(1, (position + (first + i) // group) // _SPLIT + 1):
                join_row(state, mixed, state + later * whole, mixed + later * whole, head_dim)
            heads = (first + i) // group * stride + (head * group + (first + i) % group) * size
            finish_row(state, mixed, out + token * stride + heads, kind, head_dim)
