"""Causal attention of each row's newest tokens over keys and values kept in blocks.

query [T, Hq, D]; key_cache and value_cache [num_blocks, Hkv, block_size, D]; query head h reads key head
h // (Hq / Hkv). Row b holds seq_lens[b] tokens, of which the query tokens query_start[b]:query_start[b+1] are
the last; its token p lies in block block_table[b, p // block_size] at offset p % block_size. A token sees
itself and those before it; what lies in the cache past it, and in block_table past the row's blocks, is never
read. block_table [B, M], query_start [B+1] and seq_lens [B] int32. Returns [T, Hq, D], 0 for tokens from
query_start[B] on, which belong to no row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numba import carray
from torch import Tensor

from outrider.kernels._numba import (
    LANES,
    SERIAL,
    Emitter,
    Int,
    Real,
    Vector,
    copy_row,
    emitted,
)
from outrider.kernels._threads import add, num_threads, parallel
from outrider.kernels.native import Floats, compiled, pointer
from outrider.kernels.op import Example, Op

_QUERIES_AT_ONCE = 64  # bounds what the reference gathers


def paged_attention_reference(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> Tensor:
    num_rows, max_blocks = block_table.shape
    num_blocks, num_kv_heads, block_size, _ = key_cache.shape
    token = torch.arange(len(query), device=query.device, dtype=torch.int32)
    row = torch.searchsorted(query_start[1:].contiguous(), token, right=True).clamp(max=num_rows - 1)
    position = seq_lens[row] - query_start[row + 1] + token
    place = torch.arange(max_blocks * block_size, device=query.device)
    seen = (place <= position.unsqueeze(1)) & (token < query_start[-1]).unsqueeze(1)
    parts = []
    for begin in range(0, len(query), _QUERIES_AT_ONCE):
        part = slice(begin, begin + _QUERIES_AT_ONCE)
        blocks = block_table[row[part]].clamp(0, num_blocks - 1)
        hidden = ~seen[part, None, :]
        key = key_cache[blocks].transpose(1, 2).flatten(2, 3).float()  # [t, Hkv, M * block_size, D]
        value = value_cache[blocks].transpose(1, 2).flatten(2, 3).float().masked_fill(hidden.unsqueeze(-1), 0)
        grouped = query[part].float().unflatten(1, (num_kv_heads, -1))  # [t, Hkv, Hq / Hkv, D]
        scores = (grouped @ key.transpose(-1, -2) * scale).masked_fill(hidden.unsqueeze(2), -torch.inf)
        weights = scores.softmax(-1).masked_fill(hidden.unsqueeze(2), 0)
        parts.append((weights @ value).flatten(1, 2))
    return torch.cat(parts).to(query.dtype)


_SPLIT = 512  # keys in one task: fixed, so that a query's sums are the same whatever the number of threads
_TILE = 8  # query rows in one task, a row being one head of one token
_HEIGHTS = (2, 4, _TILE)
_STATE = 3 * LANES * 4  # bytes of a row's state: its maximum, sum of weights, and factor for the sum so far


@emitted
def _start_row(emitter: Emitter, state: Int, mixed: Int, size: Int) -> None:
    emitter.store(emitter.floats(-math.inf), state, size.type(0))
    emitter.store(emitter.floats(0), state, size.type(LANES))

    def clear(index: Int, mask: Vector | None, none: list[Vector]) -> list[Vector]:
        emitter.store(emitter.floats(0), mixed, index, mask)
        return []

    emitter.sweep(size, clear, [])


def _joined(emitter: Emitter, before: Vector, most: Vector) -> tuple[Vector, Vector, Vector]:
    """The maximum of both, what to subtract for it, and the factor that turns sums under `before` into sums under it.

    The maximum is -inf while nothing is seen, and -inf - -inf would be no number.
    """
    most = emitter.maximum(before, most)
    unseen = emitter.builder.fcmp_ordered("==", most, emitter.floats(-math.inf))
    base = emitter.builder.select(unseen, emitter.floats(0), most)
    return most, base, emitter.exp(emitter.builder.fsub(before, base))


@emitted
def _soften_row(emitter: Emitter, scores: Int, scale: Real, seen: Int, state: Int) -> None:
    """Turns a row's 16 scores into weights relative to its running maximum, and takes them into its state."""
    builder, zero = emitter.builder, seen.type(0)
    sum_at, factor_at = seen.type(LANES), seen.type(2 * LANES)
    loaded = emitter.load(scores, zero)
    scaled = builder.fmul(loaded, emitter.splat(builder.fptrunc(scale, loaded.type.element)))
    scaled = builder.select(emitter.below(seen), scaled, emitter.floats(-math.inf))
    most, base, factor = _joined(emitter, emitter.load(state, zero), emitter.widest(scaled))
    weights = emitter.exp(builder.fsub(scaled, base))
    emitter.store(weights, scores, zero)
    emitter.store(most, state, zero)
    emitter.store(emitter.fma(emitter.load(state, sum_at), factor, emitter.total(weights)), state, sum_at)
    emitter.store(factor, state, factor_at)


@emitted
def _score(emitter: Emitter, queries: Int, count: Int, keys: Int, size: Int, scores: Int) -> None:
    """scores[r][k] = queries[r] . keys[k], for up to 8 rows and 16 keys."""
    number = size.type
    stride = emitter.builder.mul(size, number(4))

    def of_height(height: int) -> None:
        width = LANES // height
        q_rows = emitter.rows(queries, stride, height, count)
        score_rows = emitter.rows(scores, number(LANES * 4), height, count)

        def tile(key: Int, state: list[Vector]) -> list[Vector]:
            k_rows = emitter.rows(emitter.plus(keys, key, stride), stride, width, number(width))
            emitter.dots(q_rows, k_rows, size, [emitter.plus(row, key, number(4)) for row in score_rows])
            return state

        emitter.loop(number(0), number(LANES), width, tile, [])

    emitter.each_height(count, of_height, _HEIGHTS)


@emitted
def _mix(
    emitter: Emitter, weights: Int, states: Int, count: Int, values: Int, seen: Int, mixed: Int, size: Int
) -> None:
    """mixed[r] = mixed[r] * factor of r + sum over the keys seen of weights[r][k] * values[k]."""
    builder, number = emitter.builder, size.type
    stride = builder.mul(size, number(4))

    def of_height(height: int) -> None:
        weight_rows = emitter.rows(weights, number(LANES * 4), height, count)
        factors = [
            emitter.load(state, number(2 * LANES)) for state in emitter.rows(states, number(_STATE), height, count)
        ]
        mixed_rows = emitter.rows(mixed, stride, height, count)

        def tile(columns: list[Int], mask: Vector | None) -> None:
            places = [(row, column) for row in mixed_rows for column in columns]
            sums = [emitter.load(row, column, mask) for row, column in places]
            sums = [builder.fmul(old, factors[i // len(columns)]) for i, old in enumerate(sums)]

            def step(key: Int, old: list[Vector]) -> list[Vector]:
                parts = [emitter.load(emitter.plus(values, key, stride), column, mask) for column in columns]
                new: list[Vector] = []
                for row in weight_rows:
                    weight = emitter.spread(row, key)
                    new += [emitter.fma(weight, part, old[len(new) + i]) for i, part in enumerate(parts)]
                return new

            for (row, column), value in zip(places, emitter.loop(number(0), seen, 1, step, sums), strict=True):
                emitter.store(value, row, column, mask)

        def wide(column: Int, state: list[Vector]) -> list[Vector]:
            tile([builder.add(column, number(i * LANES)) for i in range(vectors)], None)
            return state

        def rest(column: Int, state: list[Vector]) -> list[Vector]:
            tile([column], emitter.below(builder.sub(size, column)))
            return state

        vectors = min(16 // height, 4)
        middle = builder.and_(size, number(-LANES * vectors))
        emitter.loop(number(0), middle, LANES * vectors, wide, [])
        emitter.loop(middle, size, LANES, rest, [])

    emitter.each_height(count, of_height, _HEIGHTS)


@emitted
def _merge_row(emitter: Emitter, state: Int, mixed: Int, other_state: Int, other_mixed: Int, size: Int) -> None:
    """Takes a row's sums over later keys into those over earlier ones."""
    builder, zero, sum_at = emitter.builder, size.type(0), size.type(LANES)
    theirs = emitter.load(other_state, zero)
    most, base, factor = _joined(emitter, emitter.load(state, zero), theirs)
    other_factor = emitter.exp(builder.fsub(theirs, base))
    added = builder.fmul(emitter.load(other_state, sum_at), other_factor)
    emitter.store(most, state, zero)
    emitter.store(emitter.fma(emitter.load(state, sum_at), factor, added), state, sum_at)

    def add(index: Int, mask: Vector | None, none: list[Vector]) -> list[Vector]:
        added = builder.fmul(emitter.load(other_mixed, index, mask), other_factor)
        emitter.store(emitter.fma(emitter.load(mixed, index, mask), factor, added), mixed, index, mask)
        return []

    emitter.sweep(size, add, [])


@emitted
def _finish_row(emitter: Emitter, state: Int, mixed: Int, out: Int, size: Int) -> None:
    total = emitter.load(state, size.type(LANES))

    def divide(index: Int, mask: Vector | None, none: list[Vector]) -> list[Vector]:
        emitter.store(emitter.builder.fdiv(emitter.load(mixed, index, mask), total), out, index, mask)
        return []

    emitter.sweep(size, divide, [])


@compiled()
def _keep(memory: Floats) -> None:
    """Called after the last use of an array's address: numba frees what no name refers to any more."""


@compiled()
def _attend(
    tickets: int,
    tasks: int,
    num_tasks: int,
    partial: int,
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
) -> None:
    task = carray(pointer(tasks), (num_tasks, 8), np.int64)
    size, stride = head_dim * 4, group * num_kv_heads * head_dim * 4
    area = _TILE * (size + _STATE)
    scratch = np.empty(_TILE * (2 * head_dim + LANES) + _TILE * _STATE // 4, np.float32)
    queries = scratch.ctypes.data
    scores = queries + _TILE * size
    own = scores + _TILE * LANES * 4
    while True:
        index = add(tickets, 1)
        if index >= num_tasks:
            break
        row, head, token, position, first, count, split, place = task[index]
        mixed = own if place < 0 else partial + place * area
        states = mixed + _TILE * size
        for i in range(count):
            heads = (first + i) // group * stride + (head * group + (first + i) % group) * size
            copy_row(query + token * stride + heads, queries + i * size, head_dim)
            _start_row(states + i * _STATE, mixed + i * size, head_dim)
        table = carray(pointer(block_table + row * max_blocks * 4), (max_blocks,), np.int32)
        stop = position + (first + count - 1) // group + 1
        for key in range(split * _SPLIT, min((split + 1) * _SPLIT, stop), LANES):
            block = np.int64(table[key // block_size])
            offset = ((block * num_kv_heads + head) * block_size + key % block_size) * size
            _score(queries, count, key_cache + offset, head_dim, scores)
            for i in range(count):
                seen = position + (first + i) // group + 1 - key
                _soften_row(scores + i * LANES * 4, scale, seen, states + i * _STATE)
            _mix(scores, states, count, value_cache + offset, min(LANES, stop - key), mixed, head_dim)
        if place < 0:
            for i in range(count):
                heads = (first + i) // group * stride + (head * group + (first + i) % group) * size
                _finish_row(states + i * _STATE, mixed + i * size, out + token * stride + heads, head_dim)
    _keep(scratch)


@compiled()
def _merge(
    tickets: int, tasks: int, num_tasks: int, partial: int, group: int, num_kv_heads: int, head_dim: int, out: int
) -> None:
    task = carray(pointer(tasks), (num_tasks, 8), np.int64)
    size, stride = head_dim * 4, group * num_kv_heads * head_dim * 4
    area = _TILE * (size + _STATE)
    while True:
        index = add(tickets, 1)
        if index >= num_tasks:
            break
        _, head, token, position, first, count, split, place = task[index]
        if place < 0 or split > 0:
            continue
        for i in range(count):
            mixed = partial + place * area + i * size
            state = partial + place * area + _TILE * size + i * _STATE
            for later in range(1, (position + (first + i) // group) // _SPLIT + 1):
                _merge_row(state, mixed, state + later * area, mixed + later * area, head_dim)
            heads = (first + i) // group * stride + (head * group + (first + i) % group) * size
            _finish_row(state, mixed, out + token * stride + heads, head_dim)


@compiled()
def _attention_kernel(
    query: int,
    key_cache: int,
    value_cache: int,
    block_table: int,
    query_start: int,
    seq_lens: int,
    scale: float,
    tokens: int,
    rows: int,
    max_blocks: int,
    group: int,
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
    out: int,
    threads: int,
) -> None:
    starts = carray(pointer(query_start), (rows + 1,), np.int32)
    lens = carray(pointer(seq_lens), (rows,), np.int32)
    most = 0
    for row in range(rows):
        tiles = ((starts[row + 1] - starts[row]) * group + _TILE - 1) // _TILE
        most += tiles * num_kv_heads * ((lens[row] + _SPLIT - 1) // _SPLIT)
    task = np.empty((most, 8), np.int64)
    num_tasks = places = work = 0
    for row in range(rows):
        token, count = np.int64(starts[row]), np.int64(starts[row + 1] - starts[row])
        position = lens[row] - count
        for head in range(num_kv_heads):
            for first in range(0, count * group, _TILE):
                height = min(_TILE, count * group - first)
                last = position + (first + height - 1) // group
                splits = last // _SPLIT + 1
                work += last * height * head_dim
                for split in range(splits):
                    place = -1 if splits == 1 else places + split
                    task[num_tasks] = (row, head, token, position, first, height, split, place)
                    num_tasks += 1
                if splits > 1:
                    places += splits
    partial = np.empty(places * _TILE * (head_dim + _STATE // 4), np.float32)
    if work < SERIAL:
        threads = 1
    stride = group * num_kv_heads * head_dim
    ownerless = carray(pointer(out), (tokens * stride,), np.float32)[np.int64(starts[rows]) * stride :]
    ownerless[:] = 0
    plan = (task.ctypes.data, num_tasks, partial.ctypes.data)
    tensors = (query, key_cache, value_cache, block_table, max_blocks)
    parallel(_attend, threads, plan + tensors + (group, num_kv_heads, block_size, head_dim, scale, out))
    if places > 0:
        parallel(_merge, threads, plan + (group, num_kv_heads, head_dim, out))
    _keep(task)
    _keep(partial)


def _paged_attention_cpu(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> Tensor:
    tokens, num_heads, head_dim = query.shape
    rows, max_blocks = block_table.shape
    _, num_kv_heads, block_size, _ = key_cache.shape
    assert query.dtype == key_cache.dtype == value_cache.dtype == torch.float32
    assert block_table.dtype == query_start.dtype == seq_lens.dtype == torch.int32
    assert key_cache.is_contiguous() and value_cache.is_contiguous() and block_table.is_contiguous()
    assert block_size % LANES == 0, f"the CPU kernel reads keys in sixteens: block_size {block_size}"
    query = query.contiguous()
    out = torch.empty_like(query)
    _attention_kernel(
        query.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        block_table.data_ptr(),
        query_start.data_ptr(),
        seq_lens.data_ptr(),
        scale,
        tokens,
        rows,
        max_blocks,
        num_heads // num_kv_heads,
        num_kv_heads,
        block_size,
        head_dim,
        out.data_ptr(),
        num_threads(),
    )
    return out


def _examples(generator: torch.Generator, device: torch.device) -> Iterator[Example]:
    block_size = 16
    rows = (  # (query tokens, all tokens) of each row
        ((1, 1),),
        ((1, 33), (5, 5), (3, 40)),
        ((8, 600), (1, 511), (1, 513), (17, 50)),
        ((130, 301), (1, 16)),
    )
    for lengths in rows:
        for num_heads, num_kv_heads, head_dim in ((4, 2, 64), (16, 8, 128), (4, 4, 64), (8, 1, 64), (8, 2, 128)):
            activation = torch.float32 if device.type == "cpu" else torch.bfloat16
            used = [-(-length // block_size) for _, length in lengths]
            width = max(used) + 1
            order = torch.randperm(sum(used) + 3, generator=generator).int()
            table = torch.full((len(lengths), width), 2**31 - 1, dtype=torch.int32)
            for index, count in enumerate(used):
                table[index, :count], order = order[:count], order[count:]
            shape = (sum(used) + 3, num_kv_heads, block_size, head_dim)
            query_lens = torch.tensor([0, *(count for count, _ in lengths)])
            padding = 2 if len(lengths) == 3 else 0
            query = torch.randn(int(query_lens.sum()) + padding, num_heads, head_dim, generator=generator)
            yield {
                "query": 3 * query.to(device, activation),
                "key_cache": torch.randn(shape, generator=generator).to(device, activation),
                "value_cache": torch.randn(shape, generator=generator).to(device, activation),
                "block_table": table.to(device),
                "query_start": query_lens.cumsum(0).to(device, torch.int32),
                "seq_lens": torch.tensor([length for _, length in lengths], device=device, dtype=torch.int32),
                "scale": head_dim**-0.5,
            }


PAGED_ATTENTION = Op("paged_attention", paged_attention_reference, {"cpu": _paged_attention_cpu}, examples=_examples)
