"""The CPU's paged attention: which tasks there are, and what a thread does with one.

A query row is one head of one token. A task is up to 32 rows that share a key head, against up to 512 keys. Keys are
taken 64 at a time, and the sums over one 512 are joined with those over the next in order, so what a row gets depends
on its own query and the keys before it: not on the rows beside it, nor on the number of threads.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import carray

from outrider.kernels.cpu.addresses import Heads, Rows
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
from outrider.kernels.cpu.emit import LANES
from outrider.kernels.cpu.jit import allocate, clear, compiled, free, larger, pointer, smaller, task
from outrider.kernels.cpu.threads import add

_SPLIT = 512  # keys in a task
_GROUPS = CHUNK // LANES  # sixteens in a chunk
_ROWS = 32  # rows in a task
_TILE = 8  # of them, in a tile


_FIELDS = 8  # of a task


class Plan(NamedTuple):
    """The tasks [num_tasks, 8] int64 of some query tokens; whoever asked for it frees `tasks`.

    A task is its row, key head, the row's first query token after the first of all, counted from there, and that
    token's position, its first query row and number of them, its 512 keys, and the area for its sums: -1 where no other
    task has the same query rows.
    """

    tasks: int
    num_tasks: int
    num_areas: int  # to join
    num_pairs: int  # of query and key
    num_owned: int  # query tokens that belong to a row; the rest get 0


@compiled()
def area(head_dim: int) -> int:
    """Bytes that a task's sums and states take."""
    return _ROWS * (head_dim * 4 + STATE)


@task()
def plan(rows: Rows, heads: Heads, begin: int, end: int) -> Plan:
    """The tasks of query tokens begin:end."""
    starts = carray(pointer(rows.query_start), (rows.num_rows + 1,), np.int32)
    lens = carray(pointer(rows.seq_lens), (rows.num_rows,), np.int32)
    group, num_kv_heads = heads.num_heads // heads.num_kv_heads, heads.num_kv_heads
    max_tasks = 0
    for row in range(rows.num_rows):
        tokens = smaller(starts[row + 1], end) - larger(starts[row], begin)
        if tokens > 0:
            tiles = (tokens * group + _ROWS - 1) // _ROWS
            max_tasks += tiles * num_kv_heads * ((lens[row] + _SPLIT - 1) // _SPLIT)
    memory = allocate(max_tasks * _FIELDS * 8)
    tasks = carray(pointer(memory), (max_tasks, _FIELDS), np.int64)
    count = areas = pairs = 0
    for row in range(rows.num_rows):
        token = larger(starts[row], begin)
        tokens = smaller(starts[row + 1], end) - token
        if tokens <= 0:
            continue
        position = lens[row] - starts[row + 1] + token
        for head in range(num_kv_heads):
            for first in range(0, tokens * group, _ROWS):
                height = smaller(_ROWS, tokens * group - first)
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
    owned = smaller(larger(starts[rows.num_rows] - begin, 0), end - begin)
    return Plan(memory, count, areas, pairs, owned)


@compiled()
def _find(groups: int, table: int, begin: int, stop: int, head: int, heads: Heads) -> None:
    """How many heads of one token lie before each 16 keys of a chunk; past the last key, the last sixteen again."""
    found, block_size = carray(pointer(groups), (_GROUPS,), np.int64), heads.block_size
    token = smaller(begin, stop - 1)
    for i in range(_GROUPS):
        block = np.int64(carray(pointer(table + token // block_size * 4), (1,), np.int32)[0])
        found[i] = (block * heads.num_kv_heads + head) * block_size + token % block_size // LANES * LANES
        token = smaller(token + LANES, stop - 1)


@compiled()
def _copy_groups(source: int, out: int) -> None:
    """What `_find` has found, from one place to another."""
    found, copy = carray(pointer(source), (_GROUPS,), np.int64), carray(pointer(out), (_GROUPS,), np.int64)
    for i in range(_GROUPS):
        copy[i] = found[i]


@task()
def attend(
    tickets: int,
    plan: Plan,
    areas: int,
    query: int,
    keys: int,
    values: int,
    rows: Rows,
    heads: Heads,
    scale: float,
    out: int,
    num_tokens: int,
) -> None:
    """Takes tasks; where one has its query rows to itself it finishes them."""
    tasks = carray(pointer(plan.tasks), (plan.num_tasks, _FIELDS), np.int64)
    head_dim, kind, group = heads.head_dim, heads.cache_kind, heads.num_heads // heads.num_kv_heads
    size, stride, whole = head_dim * 4, heads.num_heads * head_dim * 4, area(head_dim)
    queries = allocate(_ROWS * size + _TILE * CHUNK * 4 + whole + 2 * _GROUPS * 8)
    scores = queries + _ROWS * size
    own = scores + _TILE * CHUNK * 4
    offsets = own + whole  # of this chunk, and of the next
    later = offsets + _GROUPS * 8
    while True:
        index = add(tickets, 1)
        if index >= plan.num_tasks:
            if index == plan.num_tasks:
                clear(out + plan.num_owned * stride, (num_tokens - plan.num_owned) * stride)
            break
        row, head, token, position = tasks[index, 0], tasks[index, 1], tasks[index, 2], tasks[index, 3]
        first, height, split, area_index = tasks[index, 4], tasks[index, 5], tasks[index, 6], tasks[index, 7]
        mixed = own if area_index < 0 else areas + area_index * whole
        states = mixed + _ROWS * size
        for i in range(height):
            offset = (first + i) // group * stride + (head * group + (first + i) % group) * size
            take_row(query + token * stride + offset, queries + i * size, kind, head_dim)
            start_row(states + i * STATE, mixed + i * size, head_dim)
        table = rows.block_table + row * rows.max_blocks * 4
        stop = smaller((split + 1) * _SPLIT, position + (first + height - 1) // group + 1)
        _find(offsets, table, split * _SPLIT, stop, head, heads)
        for begin in range(split * _SPLIT, stop, CHUNK):
            if begin > split * _SPLIT:
                _copy_groups(later, offsets)
            _find(later, table, begin + CHUNK, stop, head, heads)
            for part in range(0, height, _TILE):
                # the tile's last row sees the most
                last = position + (first + smaller(part + _TILE, height) - 1) // group + 1
                num_keys = smaller(smaller(begin + CHUNK, stop), last) - begin
                if num_keys <= 0:
                    continue
                num_rows = smaller(_TILE, height - part)
                q, state = queries + part * size, states + part * STATE
                score(q, num_rows, keys, offsets, num_keys, kind, head_dim, scores, values - keys)
                for i in range(num_rows):
                    seen = position + (first + part + i) // group + 1 - begin
                    soften_row(scores + i * CHUNK * 4, scale, num_keys, seen, state + i * STATE)
                sums = mixed + part * size
                mix(scores, state, num_rows, values, offsets, kind, num_keys, sums, head_dim, keys, later)
        if area_index < 0:
            for i in range(height):
                offset = (first + i) // group * stride + (head * group + (first + i) % group) * size
                finish_row(states + i * STATE, mixed + i * size, out + token * stride + offset, kind, head_dim)
    free(queries)


@task()
def join(tickets: int, plan: Plan, areas: int, heads: Heads, out: int) -> None:
    """After all tasks: joins and finishes the query rows that several of them shared."""
    tasks = carray(pointer(plan.tasks), (plan.num_tasks, _FIELDS), np.int64)
    head_dim, kind, group = heads.head_dim, heads.cache_kind, heads.num_heads // heads.num_kv_heads
    size, stride, whole = head_dim * 4, heads.num_heads * head_dim * 4, area(head_dim)
    while True:
        index = add(tickets, 1)
        if index >= plan.num_tasks:
            break
        head, token, position = tasks[index, 1], tasks[index, 2], tasks[index, 3]
        first, height, split, area_index = tasks[index, 4], tasks[index, 5], tasks[index, 6], tasks[index, 7]
        if area_index < 0 or split > 0:
            continue
        for i in range(height):
            mixed = areas + area_index * whole + i * size
            state = areas + area_index * whole + _ROWS * size + i * STATE
            for later in range(1, (position + (first + i) // group) // _SPLIT + 1):
                join_row(state, mixed, state + later * whole, mixed + later * whole, head_dim)
            offset = (first + i) // group * stride + (head * group + (first + i) % group) * size
            finish_row(state, mixed, out + token * stride + offset, kind, head_dim)
