"""Norm, rotation, cache write and attention in one kernel, for steps of few query tokens a row.

See `kernels.rope_attention`. Tiles of query tokens are those of `gpu.attention`. Every program turns its tile's queries
itself, which is little work. A row's earlier keys lie in the cache; those of its query tokens do not yet, since another
program may be about to write them: each program computes them again, rounded as they will be stored. One program a
tile and key head does, and stores those of the tile's own tokens.

Keys are shared out a step of BLOCK_N at a time, the query tokens' being one more step: of N programs that have work,
program n takes the steps n, n + N, ... So what it loads first does not depend on the row's length. N follows from that:
a program takes more steps than one only where there are not enough programs. Each of N > 1 leaves a normalised result
and the logarithm of its weight (Dao et al., 2023, "Flash-Decoding"), to be added up (`gpu.attention_shares`). Where
these may be few, each takes a ticket, and who takes the last adds all up, in their order; where they may be many, a
second kernel does, since one program would read for longer than that takes to start.

A recorded graph starts as many programs as the longest row may need. Those without work leave at once: what they would
hold is needed by the kernel behind this one, which loads weights while keys are read, and memory has little else to do.
For the same reason they first ask for some of those weights, if given which they are; where keys are many all programs
have work, and none of that happens.

A step's time is that of a chain of loads, each of which needs what the one before it brought. So all that is known to
be needed is asked for at once; with AHEAD all that does not come from the kernel in front even before that has ended.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from outrider.kernels.gpu.attention import (
    Tiles,
    choose_splits,
    choose_tiles,
    count_tiles,
    find_blocks,
    find_row,
    multiprocessors,
)
from outrider.kernels.gpu.attention_shares import add_up, add_up_behind, block_of_rows, share_out
from outrider.kernels.gpu.attention_steps import attend_step, load_angles, load_step, own_step
from outrider.kernels.gpu.rope import load_norm, turn
from outrider.kernels.gpu.triton import (
    ask_for,
    begin,
    jit_counts,
    launch,
    next_power_of_2,
    overlaps,
    round_to,
    tl,
    wait,
)
from outrider.kernels.records import HeadNorms
from outrider.tensors import PagedRows

TALLEST = 64
"""Rows of a tile, query tokens times query heads of a key head, up to which a step's rows are short."""

_MIN_TOKENS = 4  # query tokens of a tile, if not one: fewer would save little, and be one more kernel to compile
# A tile's partial results are added up by one program, without a second kernel, where the tile has few rows or all of
# them together have.
_FEW_ROWS = 8
_FEW_RESULTS = 128
_OWN = 16  # query tokens whose keys are made at once: the least that tensor cores multiply
_ADDED = 2048  # numbers of partial results that a warp adds up at once: 64 a thread
# Programs without work ask for at most one in so many of the next kernel's weights: more would only wait for memory.
_ASKED = 4
_PIECE = 128  # bytes of them at a time, a line of the cache


def is_short(num_tokens: int, num_rows: int, group: int, num_kv_heads: int, processors: int) -> bool:
    """Whether this kernel is for such a step: a tile holds a row of the mean length, and all rows run at once.

    Rows that wait for others to end had better be the two kernels', which need fewer registers. A long row among many
    short ones is not kept apart, and is slower than it might be; the graph runner runs those in steps of their own.
    """
    if not num_tokens or num_rows * num_kv_heads > 2 * processors:
        return False
    return next_power_of_2(-(-num_tokens // num_rows)) * group <= TALLEST


def new_counters(device: torch.device, num_kv_heads: int) -> Tensor:
    """Tickets, all 0 between calls: enough for any step whose keys `choose_splits` shares out, on one stream.

    Of such a step neither rows nor whole tiles of tokens, times key heads, are more than the multiprocessors; there are
    no more tiles than both together and one.
    """
    return torch.zeros(2 * multiprocessors(device) + num_kv_heads, dtype=torch.int32, device=device)


def choose_short_tiles(num_tokens: int, num_rows: int, group: int, itemsize: int) -> Tiles:
    """Tiles for short rows, as measured on an H200 with 384 to 32,768 keys. A tall tile wants the registers of 8 warps.

    One stage: the kernel itself loads a step ahead. Smaller steps and more warps are no faster with few keys, and half
    as fast with many: then a multiprocessor has room for one program, where two hide each other's waits.
    """
    cut = choose_tiles(num_tokens, num_rows, group, 0, itemsize)  # head_dim, 0, only rules what is not taken of it
    if itemsize > 2:
        return cut._replace(stages=1)
    if cut.tokens == 1:
        return Tiles(min(cut.rows, TALLEST), 1, 64, 4, 1)
    tokens = min(max(cut.tokens, _MIN_TOKENS), TALLEST // group)
    rows = max(16, next_power_of_2(tokens * group))
    return Tiles(rows, tokens, 64, 8 if rows == TALLEST else 4, 1, tall=rows == TALLEST)


@jit_counts("num_tokens", "num_rows")
def _rope_attention_kernel(
    qkv,  # [T, (Hq + 2 * Hkv) * D]
    q_norm,
    k_norm,
    eps,
    rope,
    positions,
    key_cache,
    value_cache,
    cache_slot,
    block_table,
    query_start,
    seq_lens,
    out,  # [T, Hq, D]
    partial,  # with SPLIT [SPLITS, T, Hq, D] float32
    log_weights,  # with SPLIT [SPLITS, T, Hq] float32
    counters,  # with SPLIT: tickets taken, of each tile and key head
    next_weight,  # with ASK, of the kernel behind this one
    asked,  # bytes of it
    scale,  # to powers of two
    num_tokens,
    num_rows,
    num_kv_heads,
    max_blocks,
    NORM: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    TICKETS: tl.constexpr,  # with SPLIT: the last program adds up, or else a kernel behind this one
    AHEAD: tl.constexpr,  # see `rope_attend`
    ASK: tl.constexpr,  # 0, or bytes of next_weight that each thread without work asks for
    OWN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,  # of a tile, without what tensor cores want beyond
    BLOCK_S: tl.constexpr,  # partial results added up at once
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,  # of half a head
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    half: tl.constexpr = HEAD_DIM // 2
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, split = tl.program_id(1), tl.program_id(2)
    part, column = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    q_low, q_high = load_norm(q_norm, part, half, NORM)
    if not AHEAD:
        wait(PDL)
    row, start, end, length, first_token = find_row(
        tile, query_start, seq_lens, num_tokens, num_rows, BLOCK_Q, BLOCK_B
    )  # fmt: skip
    last_token = tl.minimum(first_token + BLOCK_Q, end)  # of the tile, the one behind it
    num_cached = tl.where((row < num_rows) & (first_token < end), length - (end - start), 0)

    slot = tl.arange(0, BLOCK_M)
    token = first_token + slot // GROUP
    owned = (slot < BLOCK_Q * GROUP) & (token < end)
    table = block_table + row.to(tl.int64) * max_blocks
    first_key = split * BLOCK_N
    block = find_blocks(table, first_key, num_cached, BLOCK_N, BLOCK_SIZE)
    position = tl.load(positions + token, mask=owned, other=0, cache_modifier=".cg")
    query_row = (token.to(tl.int64) * num_kv_heads + head) * GROUP + slot % GROUP
    num_heads = num_tokens * num_kv_heads * GROUP

    num_cached_steps, splits = 0, 1
    if SPLIT:
        num_cached_steps, splits = share_out(num_cached, tl.num_programs(2), BLOCK_N)
    if (first_token >= end) | (split >= splits):
        if ASK > 0:  # noqa: SIM102 (what is not compiled, and what is not run)
            if first_token < end:
                program = (split * tl.num_programs(1) + head) * tl.num_programs(0) + tile
                programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
                thread = (programs - 1 - program) * THREADS + tl.arange(0, THREADS)
                ask_for(next_weight, thread * ASK, ASK, asked)
        return

    stride = splits * BLOCK_N
    next_block = find_blocks(table, first_key + stride, num_cached, BLOCK_N, BLOCK_SIZE)
    low, high, values = load_step(
        key_cache, value_cache, block, first_key, num_cached, head, num_kv_heads,
        BLOCK_N, BLOCK_H, BLOCK_D, BLOCK_SIZE, HEAD_DIM,
    )  # fmt: skip
    cos, sin = load_angles(rope, position, owned, HEAD_DIM, BLOCK_H)
    if AHEAD:
        wait(PDL)
    at = ((token.to(tl.int64) * (GROUP + 2) * num_kv_heads + head * GROUP) + slot % GROUP)[:, None] * HEAD_DIM
    in_half = owned[:, None] & (part < half)[None, :]
    query_low = tl.load(qkv + at + part[None, :], mask=in_half, other=0)
    query_high = tl.load(qkv + at + half + part[None, :], mask=in_half, other=0)
    turned_low, turned_high = turn(query_low, query_high, q_low, q_high, cos, sin, eps, NORM, HEAD_DIM)
    query_low, query_high = round_to(turned_low, query_low.dtype), round_to(turned_high, query_low.dtype)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for key in range(first_key, num_cached, stride):
        next_low, next_high, next_values = load_step(
            key_cache, value_cache, next_block, key + stride, num_cached, head, num_kv_heads,
            BLOCK_N, BLOCK_H, BLOCK_D, BLOCK_SIZE, HEAD_DIM,
        )  # fmt: skip
        next_block = find_blocks(table, key + 2 * stride, num_cached, BLOCK_N, BLOCK_SIZE)
        seen = (key + tl.arange(0, BLOCK_N) < num_cached)[None, :]
        top, weight, total = attend_step(
            query_low, query_high, low, high, values, seen, scale, top, weight, total, False
        )  # fmt: skip
        low, high, values = next_low, next_high, next_values

    if split == num_cached_steps % splits:  # whose turn is the step of the row's query tokens
        for first_own in range(start, last_token, OWN):
            top, weight, total = own_step(
                query_low, query_high, qkv, k_norm, eps, rope, positions, key_cache, value_cache, cache_slot,
                token, first_own, first_token, last_token, row < num_rows, head, num_kv_heads, scale, top, weight,
                total, NORM, GROUP, OWN, BLOCK_H, BLOCK_D, BLOCK_SIZE, HEAD_DIM,
            )  # fmt: skip

    some = tl.where(weight == 0, 1.0, weight)  # NaN stays
    result = total / some[:, None]
    inside = owned[:, None] & (column < HEAD_DIM)[None, :]
    if not SPLIT or (TICKETS and splits == 1):
        tl.store(
            out + query_row[:, None] * HEAD_DIM + column[None, :], round_to(result, out.dtype.element_ty), mask=inside
        )
    else:
        left = query_row + split * num_heads
        tl.store(log_weights + left, tl.where(weight == 0, float("-inf"), top + tl.log2(some)), mask=owned)
        tl.store(partial + left[:, None] * HEAD_DIM + column[None, :], result, mask=inside)
        if TICKETS:
            tl.debug_barrier()  # all threads have stored before one takes the ticket
            counter = counters + tile * num_kv_heads + head
            if tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1:
                each = tl.arange(0, BLOCK_R)
                its_token = first_token + each // GROUP
                its_query_row = (its_token * num_kv_heads + head) * GROUP + each % GROUP
                its_own = (each < BLOCK_Q * GROUP) & (its_token < end)
                add_up(
                    partial, log_weights, out, its_query_row, its_own, num_heads, splits,
                    HEAD_DIM, BLOCK_R, BLOCK_S, BLOCK_D,
                )  # fmt: skip
                tl.store(counter, 0)


def rope_attend(
    qkv: Tensor,
    norms: HeadNorms,
    rope: Tensor,
    rows: PagedRows,
    key_cache: Tensor,
    value_cache: Tensor,
    scale: float,
    counters: Tensor,  # int32, all 0, and so again when it is done
    tiles: Tiles,
    splits: int,  # programs among which a tile's keys may be shared out
    ahead: bool = False,
    next_weight: Tensor | None = None,
) -> Tensor:
    """`rope_attention` cut up as given.

    `ahead`: what does not come from the kernel in front may be read before that has ended: it came late (`few_rows`).
    `next_weight`: what the kernel behind this one will read first, if that is known.
    """
    tokens, (_, num_kv_heads, block_size, head_dim) = qkv.shape[0], key_cache.shape
    num_rows, max_blocks = rows.block_table.shape
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    group = num_heads // num_kv_heads
    assert (norms.q is None) == (norms.k is None) and rope.dtype == torch.float32 and scale > 0 and head_dim % 2 == 0
    assert rows.positions.dtype == rows.cache_slot.dtype == torch.int64 and key_cache.dtype == value_cache.dtype
    assert rows.block_table.dtype == rows.query_start.dtype == rows.seq_lens.dtype == counters.dtype == torch.int32
    assert qkv.is_contiguous() and rope.is_contiguous() and rows.block_table.is_contiguous()
    assert key_cache.is_contiguous() and value_cache.is_contiguous()
    assert tiles.tokens * group <= tiles.rows
    out = torch.empty(tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    num_tiles = count_tiles(tokens, num_rows, tiles.tokens)
    partial = log_weights = None
    if splits > 1:
        assert num_tiles * num_kv_heads <= len(counters)
        partial = torch.empty(splits, tokens, num_heads, head_dim, dtype=torch.float32, device=qkv.device)
        log_weights = torch.empty(splits, tokens, num_heads, dtype=torch.float32, device=qkv.device)
    block_d, block_r = max(16, next_power_of_2(head_dim)), next_power_of_2(tiles.tokens * group)
    tickets = block_r <= _FEW_ROWS or splits * block_r <= _FEW_RESULTS
    overlap = overlaps(qkv)
    threads, asked = 32 * tiles.warps, 0
    if overlap and next_weight is not None:
        assert next_weight.is_contiguous()
        asked = next_weight.nbytes // _ASKED
    pieces = asked // (_PIECE * threads * num_tiles * num_kv_heads * splits)
    _rope_attention_kernel[(num_tiles, num_kv_heads, splits)](
        qkv,
        norms.q,
        norms.k,
        norms.eps,
        rope,
        rows.positions,
        key_cache,
        value_cache,
        rows.cache_slot,
        rows.block_table,
        rows.query_start,
        rows.seq_lens,
        out,
        partial,
        log_weights,
        counters,
        next_weight if asked else None,
        asked,
        scale * math.log2(math.e),
        tokens,
        num_rows,
        num_kv_heads,
        max_blocks,
        NORM=norms.q is not None,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        SPLIT=splits > 1,
        TICKETS=tickets,
        AHEAD=ahead and overlap,
        ASK=_PIECE * max(1, pieces) if asked else 0,
        OWN=_OWN,
        BLOCK_M=tiles.rows,
        BLOCK_Q=tiles.tokens,
        BLOCK_R=block_r,
        BLOCK_S=max(1, min(64, _ADDED * tiles.warps // (block_r * block_d))),
        BLOCK_N=tiles.keys,
        BLOCK_H=max(16, next_power_of_2(head_dim // 2)),
        BLOCK_D=block_d,
        BLOCK_B=block_of_rows(num_rows),
        THREADS=threads,
        PDL=overlap,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **launch(overlap),
    )
    if partial is not None and log_weights is not None and not tickets:
        add_up_behind(partial, log_weights, out, rows.query_start, rows.seq_lens, tiles.keys, ahead)
    return out


def rope_attention_gpu(
    qkv: Tensor,
    norms: HeadNorms,
    rope: Tensor,
    rows: PagedRows,
    key_cache: Tensor,
    value_cache: Tensor,
    scale: float,
    counters: Tensor | None = None,  # of `new_counters`: a caller of many steps keeps its own
    ahead: bool = False,
    next_weight: Tensor | None = None,
) -> Tensor:
    """`rope_attention` in one kernel or two, for short steps; `ahead` and `next_weight` as in `rope_attend`."""
    tokens, (num_rows, max_blocks) = qkv.shape[0], rows.block_table.shape
    _, num_kv_heads, block_size, head_dim = key_cache.shape
    group = qkv.shape[1] // head_dim // num_kv_heads - 2
    tiles = choose_short_tiles(tokens, num_rows, group, qkv.itemsize)
    processors = multiprocessors(qkv.device)
    max_keys = max_blocks * block_size + tiles.keys  # and a step for the query tokens'
    splits = choose_splits(tokens, num_rows, num_kv_heads, max_keys, tiles, processors)
    if counters is None:
        counters = new_counters(qkv.device, num_kv_heads)
    given = (qkv, norms, rope, rows, key_cache, value_cache, scale)
    return rope_attend(*given, counters, tiles, splits, ahead, next_weight)
