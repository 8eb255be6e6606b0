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

import torch
from torch import Tensor

from outrider.kernels.op import Example, Op
from outrider.tensors import PagedRows

_QUERIES_AT_ONCE = 64  # bounds what the reference gathers


def paged_attention_reference(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    rows: PagedRows,
    scale: float,
) -> Tensor:
    block_table, query_start, seq_lens = rows.block_table, rows.query_start, rows.seq_lens
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


def _examples(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    block_size = 16
    cases = (  # (query tokens, all tokens) of each row
        ((1, 1),),
        ((1, 33), (5, 5), (3, 40)),
        ((8, 600), (1, 511), (1, 513), (17, 50)),
        ((130, 301), (1, 16)),
    )
    for lengths in cases:
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
                "rows": PagedRows(
                    positions=torch.zeros(len(query), dtype=torch.int64, device=device),
                    cache_slot=torch.full((len(query),), -1, device=device),
                    block_table=table.to(device),
                    query_start=query_lens.cumsum(0).to(device, torch.int32),
                    seq_lens=torch.tensor([length for _, length in lengths], device=device, dtype=torch.int32),
                ),
                "scale": head_dim**-0.5,
            }


PAGED_ATTENTION = Op(
    "paged_attention",
    paged_attention_reference,
    examples=_examples,
)
