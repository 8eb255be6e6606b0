"""`kernels.attention` on a CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from outrider.kernels.cpu.attention_tasks import area, attend, join, plan
from outrider.kernels.cpu.emit import CACHES, KIND, LANES, SERIAL, address, keep
from outrider.kernels.cpu.jit import compiled
from outrider.kernels.cpu.threads import num_threads, parallel


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


def paged_attention_cpu(
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
