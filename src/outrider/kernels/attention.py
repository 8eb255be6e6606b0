"""Causal attention of each row's newest tokens over keys and values kept in blocks.

query [T, Hq, D]; key_cache and value_cache [num_blocks, Hkv, block_size, D], of the query's type or of bfloat16 beside
a float32 query; query head h reads key head h // (Hq / Hkv). Row b holds seq_lens[b] tokens, of which the query tokens
query_start[b]:query_start[b+1] are the last; its token p lies in block block_table[b, p // block_size] at offset
p % block_size. A token sees itself and those before it; what lies in the cache past it, and in block_table past the
row's blocks, is never read. block_table [B, M], query_start [B+1] and seq_lens [B] int32. Returns [T, Hq, D], 0 for
tokens from query_start[B] on, which belong to no row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.op import Op
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
    key_position = torch.arange(max_blocks * block_size, device=query.device)
    seen = (key_position <= position.unsqueeze(1)) & (token < query_start[-1]).unsqueeze(1)
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


PAGED_ATTENTION = Op(
    "paged_attention",
    paged_attention_reference,
)
