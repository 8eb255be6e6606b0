"""Causal attention of each row's newest tokens over keys and values kept in blocks.

query [T, Hq, D]; key_cache and value_cache [num_blocks, Hkv, block_size, D], of the query's type or of bfloat16 beside
a float32 query; query head h reads key head h // (Hq / Hkv). Row b holds seq_lens[b] tokens, of which the query tokens
query_start[b]:query_start[b+1] are the last; its token p lies in block block_table[b, p // block_size] at offset
p % block_size. A token sees itself and those before it; what lies in the cache past it, and in block_table past the
row's blocks, is never read. block_table [B, M], query_start [B+1] and seq_lens [B] int32. Returns [T, Hq, D], 0 for
tokens from query_start[B] on, which belong to no row.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from outrider.kernels._attention import area, attend, join, plan
from outrider.kernels._numba import CACHES, KIND, LANES, SERIAL, address, keep
from outrider.kernels._threads import num_threads, parallel
from outrider.kernels.gpu.attention import paged_attention_gpu
from outrider.kernels.native import compiled
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
        queries = query[part].float()
        grouped = queries.reshape(len(queries), num_kv_heads, -1, query.shape[2])  # [t, Hkv, Hq / Hkv, D]
        scores = (grouped @ key.transpose(-1, -2) * scale).masked_fill(hidden.unsqueeze(2), -torch.inf)
        weights = scores.softmax(-1).masked_fill(hidden.unsqueeze(2), 0)
        parts.append((weights @ value).flatten(1, 2))
    return torch.cat(parts).to(query.dtype)


@compiled()
def _attention_kernel(
    query: int,
    key_cache: int,
    value_cache: int,
    kind: int,
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
    tasks = plan(query_start, seq_lens, rows, group, num_kv_heads, 0, tokens)
    count, num_areas, pairs, owned = tasks[-1, 0], tasks[-1, 1], tasks[-1, 2], tasks[-1, 3]
    areas = np.empty(num_areas * area(head_dim), np.uint8)
    if pairs * head_dim < SERIAL:
        threads = 1
    work = (address(tasks), count, address(areas))
    cache = (query, key_cache, value_cache, kind, block_table, max_blocks)
    parallel(attend, threads, (*work, *cache, group, num_kv_heads, block_size, head_dim, scale, out, owned, tokens))
    if num_areas > 0:
        parallel(join, threads, (*work, kind, group, num_kv_heads, head_dim, out))
    keep(tasks)
    keep(areas)


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
    assert query.dtype == torch.float32 and key_cache.dtype == value_cache.dtype
    assert KIND[key_cache.dtype] in CACHES, f"keys and values in {key_cache.dtype}"
    assert block_table.dtype == query_start.dtype == seq_lens.dtype == torch.int32
    assert key_cache.is_contiguous() and value_cache.is_contiguous() and block_table.is_contiguous()
    assert block_size % LANES == 0, f"the CPU kernel reads keys in sixteens: block_size {block_size}"
    query = query.contiguous()
    out = torch.empty_like(query)
    _attention_kernel(
        query.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        KIND[key_cache.dtype],
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


def _examples(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    block_size = 16
    rows = (  # (query tokens, all tokens) of each row
        ((1, 1),),
        ((1, 33), (5, 5), (3, 40)),
        ((8, 600), (1, 511), (1, 513), (17, 50)),
        ((130, 301), (1, 16)),
    )
    for lengths in rows:
        for num_heads, num_kv_heads, head_dim, cache in (
            (4, 2, 64, torch.float32),
            (4, 2, 64, torch.bfloat16),
            (16, 8, 128, torch.bfloat16),
            (4, 4, 64, torch.float32),
            (8, 1, 64, torch.bfloat16),
            (6, 2, 80, torch.bfloat16),
            (4, 2, 48, torch.float32),
            (8, 2, 128, torch.float32),
        ):
            activation = torch.float32 if wide else torch.bfloat16
            cache = cache if wide else activation
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
                "key_cache": torch.randn(shape, generator=generator).to(device, cache),
                "value_cache": torch.randn(shape, generator=generator).to(device, cache),
                "block_table": table.to(device),
                "query_start": query_lens.cumsum(0).to(device, torch.int32),
                "seq_lens": torch.tensor([length for _, length in lengths], device=device, dtype=torch.int32),
                "scale": head_dim**-0.5,
            }


PAGED_ATTENTION = Op(
    "paged_attention",
    paged_attention_reference,
    {"cpu": _paged_attention_cpu, "cuda": paged_attention_gpu},
    examples=_examples,
)
