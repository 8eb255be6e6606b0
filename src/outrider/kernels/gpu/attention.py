"""Attention over keys and values in blocks, of prompts and of decode steps alike. See `kernels.attention`.

A program takes a tile of consecutive query tokens of one row, for one key head: the query heads that read this head
stand below each other in the tile, so that a decode step too has rows for the tensor cores. It walks the row's keys a
step of BLOCK_N at a time, found through the block table, with a running softmax (Milakov and Gimelshein, 2018; Dao et
al., 2022) in float32.

Which row a tile belongs to is found on the device. With Q tokens a tile, row b has the tiles from
(query_start[b] + b * (Q - 1)) // Q on, which leaves each row as many as it may need; some rows have one too many. The
tokens past the last row's are one more row, without keys.

With few tiles a row's keys are shared out among SPLITS programs, in whole steps; each leaves a normalised result and
the logarithm of its weight, and a second kernel adds them up (Dao et al., 2023, "Flash-Decoding").
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from outrider.kernels.gpu.triton import begin, dot, jit, jit_counts, launch, next_power_of_2, overlaps, tl, wait
from outrider.tensors import PagedRows

_INTERPRETER = 8  # multiprocessors that it is taken to have: enough for keys to be shared out, few enough to end
_MAX_SPLITS = 64


class Tiles(NamedTuple):
    """How the work is cut up, and Triton's knobs."""

    rows: int  # of a tile: query tokens times query heads, and padding
    tokens: int  # of a tile
    keys: int  # of a step
    warps: int
    stages: int
    tall: bool = False  # one program fills a multiprocessor; worth a loop of its own over keys that all queries see


def choose_tiles(num_tokens: int, num_rows: int, group: int, head_dim: int, itemsize: int) -> Tiles:
    """Tiles that hold a row of the mean length, up to 64 tall; more tokens than that are prompts and get tall ones.

    float32, which tensor cores do not multiply exactly, gets tiles that fit into registers.
    """
    tokens = next_power_of_2(-(-num_tokens // num_rows))
    rows = max(16, next_power_of_2(tokens * group))
    if itemsize > 2:
        rows = max(min(rows, 32), next_power_of_2(group))
        return Tiles(rows, min(tokens, rows // group), 16, 8, 2)
    if rows > 64:
        return Tiles(128, 128 // group, 64, 8, 3 if head_dim <= 128 else 2, tall=True)
    return Tiles(rows, tokens, 64 if head_dim <= 128 else 32, 4, 3 if head_dim <= 128 else 2)


def count_tiles(num_tokens: int, num_rows: int, tokens: int) -> int:
    """Tiles of so many tokens that rows may need, however the step's tokens are theirs."""
    return (num_tokens + (num_rows + 1) * (tokens - 1)) // tokens


def choose_splits(
    num_tokens: int, num_rows: int, num_kv_heads: int, max_len: int, tiles: Tiles, processors: int
) -> int:
    """Among how many programs the keys of a tile are shared out: as many as keep the device busy.

    A multiprocessor holds one program with a tall tile, whose partial results are also large, and two of the others.
    """
    programs = max(num_rows, -(-num_tokens // tiles.tokens)) * num_kv_heads
    return max(1, min((1 if tiles.tall else 2) * processors // programs, -(-max_len // tiles.keys), _MAX_SPLITS))


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs a device runs side by side at least; without a GPU, what its interpreter is taken to have."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _INTERPRETER


@jit
def find_row(tile, query_start, seq_lens, num_tokens, num_rows, BLOCK_Q: tl.constexpr, BLOCK_B: tl.constexpr):
    """A tile's row, that row's first token, the one behind its last, and its length; and the tile's first token.

    Here and below past this multiprocessor's own cache: who reads before it waits (`rope_attend`, ahead) may find there
    what the step before left.

    All from what is loaded at once: the rows up to the tile's are the first ones, so the sum over them of what lengths
    differ by is its own. The tokens past the last row's are one more row, of length 0.
    """
    row = tl.arange(0, BLOCK_B)
    first_token = tl.load(query_start + row, mask=row <= num_rows, other=0, cache_modifier=".cg")
    length = tl.load(seq_lens + row, mask=row < num_rows, other=0, cache_modifier=".cg")
    behind_first = (row > 0) & (row <= num_rows)
    length_before = tl.load(seq_lens + row - 1, mask=behind_first, other=0, cache_modifier=".cg")
    first_tile = (first_token + row * (BLOCK_Q - 1)) // BLOCK_Q
    reached = (row <= num_rows) & (first_tile <= tile)
    found = tl.sum(reached.to(tl.int32)) - 1
    start = tl.max(tl.where(reached, first_token, 0))
    end = tl.min(tl.where((row <= num_rows) & (first_tile > tile), first_token, num_tokens))
    length = tl.sum(tl.where(reached, length - length_before, 0))
    return found, start, end, length, start + (tile - (start + found * (BLOCK_Q - 1)) // BLOCK_Q) * BLOCK_Q


@jit
def find_blocks(table, first_key, num_keys, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """The blocks of a step's keys. They are asked for a step ahead, so that keys and values can be several ahead."""
    key = first_key + tl.arange(0, BLOCK_N)
    return tl.load(table + key // BLOCK_SIZE, mask=key < num_keys, other=0, cache_modifier=".cg")


@jit
def _load(cache, at, mask, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(cache + at, mask=mask, other=0)
    return tl.load(cache + at)


@jit
def find_keys(block, key, head, num_kv_heads, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Where in a cache keys or values of a head start."""
    return (block.to(tl.int64) * num_kv_heads + head) * (BLOCK_SIZE * HEAD_DIM) + key % BLOCK_SIZE * HEAD_DIM


@jit
def weigh(scores, scale, top, weight, MASKED: tl.constexpr):
    """Powers of two of scores [M, N] less the largest so far; what those so far decay by; the new largest and sum."""
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    shift = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    powers = tl.exp2(scores * scale - shift[:, None])
    decay = tl.exp2(top - shift)
    return powers, decay, new_top, weight * decay + tl.sum(powers, 1)


@jit
def _step(
    query,  # [BLOCK_M, BLOCK_D]
    position,  # [BLOCK_M]
    key_cache,
    value_cache,
    table,  # of the row
    block,  # [BLOCK_N], of this step's keys
    first_key,
    num_keys,
    head,
    num_kv_heads,
    scale,  # to powers of two
    top,  # [BLOCK_M], the largest score so far
    weight,  # [BLOCK_M], the sum so far of powers of scores less the largest
    total,  # [BLOCK_M, BLOCK_D], of values
    MASKED: tl.constexpr,  # otherwise all queries see all keys
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    key = first_key + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    next_block = find_blocks(table, first_key + BLOCK_N, num_keys, BLOCK_N, BLOCK_SIZE)
    at = find_keys(block, key, head, num_kv_heads, BLOCK_SIZE, HEAD_DIM)[:, None] + column[None, :]
    inside = (key < num_keys)[:, None] & (column < HEAD_DIM)[None, :]

    keys = _load(key_cache, at, inside, MASKED or HEAD_DIM != BLOCK_D).to(query.dtype)
    scores = dot(query, tl.trans(keys), tl.zeros([query.shape[0], BLOCK_N], tl.float32))
    if MASKED:
        scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
    powers, decay, new_top, weight = weigh(scores, scale, top, weight, MASKED)
    values = _load(value_cache, at, inside, MASKED or HEAD_DIM != BLOCK_D).to(query.dtype)
    total = dot(powers.to(query.dtype), values, total * decay[:, None])
    return next_block, new_top, weight, total


@jit_counts("num_tokens", "num_rows")
def _attention_kernel(
    query,
    key_cache,
    value_cache,
    block_table,
    query_start,
    seq_lens,
    out,  # [T, Hq, D], or with SPLIT [SPLITS, T, Hq, D] float32
    log_weights,  # with SPLIT [SPLITS, T, Hq] float32
    scale,
    num_tokens,
    num_rows,
    num_kv_heads,
    max_blocks,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    TALL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # a row's last tiles have most to do
    head, split = tl.program_id(1), tl.program_id(2)
    wait(PDL)
    row, _, end, length, first_token = find_row(
        tile, query_start, seq_lens, num_tokens, num_rows, BLOCK_Q, BLOCK_B
    )  # fmt: skip
    if first_token >= end:
        return

    slot = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    token = first_token + slot // GROUP
    position = length - end + token
    owned = (slot < BLOCK_Q * GROUP) & (token < end)
    query_row = (token.to(tl.int64) * num_kv_heads + head) * GROUP + slot % GROUP
    inside = owned[:, None] & (column < HEAD_DIM)[None, :]
    queries = tl.load(query + query_row[:, None] * HEAD_DIM + column[None, :], mask=inside, other=0)

    num_keys = length - end + tl.minimum(first_token + BLOCK_Q, end)  # that the tile's last token sees
    num_steps = tl.where(row < num_rows, (num_keys + BLOCK_N - 1) // BLOCK_N, 0)
    share = (num_steps + tl.num_programs(2) - 1) // tl.num_programs(2)
    first_key = split * share * BLOCK_N
    last_key = tl.minimum((split + 1) * share, num_steps) * BLOCK_N
    table = block_table + row.to(tl.int64) * max_blocks
    block = find_blocks(table, first_key, num_keys, BLOCK_N, BLOCK_SIZE)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if TALL:
        seen_by_all = (length - end + first_token + 1) // BLOCK_N * BLOCK_N
        first_masked = tl.maximum(tl.minimum(seen_by_all, last_key), first_key)
        for key in range(first_key, first_masked, BLOCK_N):
            block, top, weight, total = _step(
                queries, position, key_cache, value_cache, table, block, key, num_keys, head, num_kv_heads, scale,
                top, weight, total, False, BLOCK_N, BLOCK_D, BLOCK_SIZE, HEAD_DIM,
            )  # fmt: skip
        first_key = first_masked
    for key in range(first_key, last_key, BLOCK_N):
        block, top, weight, total = _step(
            queries, position, key_cache, value_cache, table, block, key, num_keys, head, num_kv_heads, scale,
            top, weight, total, True, BLOCK_N, BLOCK_D, BLOCK_SIZE, HEAD_DIM,
        )  # fmt: skip

    some = tl.where(weight == 0, 1.0, weight)  # NaN stays
    if SPLIT:
        query_row += split.to(tl.int64) * num_tokens * num_kv_heads * GROUP
        tl.store(log_weights + query_row, tl.where(weight == 0, float("-inf"), top + tl.log2(some)), mask=owned)
    result = (total / some[:, None]).to(out.dtype.element_ty)
    tl.store(out + query_row[:, None] * HEAD_DIM + column[None, :], result, mask=inside)


@jit_counts("num_heads", "splits")
def _combine_kernel(
    partial,  # [SPLITS, T * Hq, D] float32
    log_weights,  # [SPLITS, T * Hq] float32
    out,  # [T * Hq, D]
    num_heads,  # T * Hq
    splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    head = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_S)
    column = tl.arange(0, BLOCK_D)
    partial_row = split * num_heads.to(tl.int64) + head
    inside = (split < splits)[:, None] & (column < HEAD_DIM)[None, :]
    wait(PDL)
    log_weight = tl.load(log_weights + partial_row, mask=split < splits, other=float("-inf"))
    value = tl.load(partial + partial_row[:, None] * HEAD_DIM + column[None, :], mask=inside, other=0)
    top = tl.max(log_weight)
    weight = tl.exp2(log_weight - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight)
    value = tl.where((weight > 0)[:, None], value, 0.0)  # a program without keys may have left none
    result = tl.sum(weight[:, None] * value, 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + head * HEAD_DIM + column, result.to(out.dtype.element_ty), mask=column < HEAD_DIM)


def combine(partial: Tensor, log_weights: Tensor, out: Tensor) -> None:
    """out [T, Hq, D] from the results [SPLITS, T, Hq, D] of programs that shared keys, and their weights' logarithms.

    A weight of 0 has a logarithm of -inf, and a result that is not looked at.
    """
    splits, num_tokens, num_heads, head_dim = partial.shape
    overlap = overlaps(out)
    _combine_kernel[(num_tokens * num_heads,)](
        partial,
        log_weights,
        out,
        num_tokens * num_heads,
        splits,
        HEAD_DIM=head_dim,
        BLOCK_S=next_power_of_2(splits),
        BLOCK_D=max(16, next_power_of_2(head_dim)),
        PDL=overlap,
        num_warps=4,
        **launch(overlap),
    )


def attend(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    rows: PagedRows,
    scale: float,
    tiles: Tiles,
    splits: int,
) -> Tensor:
    """`paged_attention` cut up as given: in one kernel, or with splits > 1 in two."""
    query = query.contiguous()
    num_tokens, num_heads, head_dim = query.shape
    block_table, query_start, seq_lens = rows.block_table, rows.query_start, rows.seq_lens
    num_rows, max_blocks = block_table.shape
    _, num_kv_heads, block_size, _ = key_cache.shape
    group = num_heads // num_kv_heads
    assert key_cache.is_contiguous() and value_cache.is_contiguous() and block_table.is_contiguous()
    assert key_cache.dtype == value_cache.dtype and scale > 0 and head_dim % 2 == 0
    assert block_table.dtype == query_start.dtype == seq_lens.dtype == torch.int32
    assert tiles.tokens * group <= tiles.rows
    out = torch.empty_like(query)
    result, log_weights = out, None
    if splits > 1:
        result = torch.empty(splits, *query.shape, dtype=torch.float32, device=query.device)
        log_weights = torch.empty(splits, num_tokens, num_heads, dtype=torch.float32, device=query.device)
    overlap = overlaps(query)
    num_tiles = count_tiles(num_tokens, num_rows, tiles.tokens)
    block_d = max(16, next_power_of_2(head_dim))
    _attention_kernel[(num_tiles, num_kv_heads, splits)](
        query,
        key_cache,
        value_cache,
        block_table,
        query_start,
        seq_lens,
        result,
        log_weights,
        scale * math.log2(math.e),
        num_tokens,
        num_rows,
        num_kv_heads,
        max_blocks,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        SPLIT=splits > 1,
        TALL=tiles.tall,
        BLOCK_M=tiles.rows,
        BLOCK_Q=tiles.tokens,
        BLOCK_N=tiles.keys,
        BLOCK_D=block_d,
        BLOCK_B=max(32, next_power_of_2(num_rows + 1)),
        PDL=overlap,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **launch(overlap),
    )
    if log_weights is not None:
        combine(result, log_weights, out)
    return out


def paged_attention_gpu(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    rows: PagedRows,
    scale: float,
) -> Tensor:
    """`paged_attention` in one kernel, or in two where one would leave the device idle."""
    num_tokens, num_heads, head_dim = query.shape
    num_rows, max_blocks = rows.block_table.shape
    _, num_kv_heads, block_size, _ = key_cache.shape
    tiles = choose_tiles(num_tokens, num_rows, num_heads // num_kv_heads, head_dim, query.element_size())
    processors = multiprocessors(query.device)
    splits = choose_splits(num_tokens, num_rows, num_kv_heads, max_blocks * block_size, tiles, processors)
    return attend(query, key_cache, value_cache, rows, scale, tiles, splits)
