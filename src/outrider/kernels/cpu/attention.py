"""`kernels.attention` on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.cpu.addresses import Heads, Rows, heads_of, rows_of
from outrider.kernels.cpu.attention_tasks import area, attend, join, plan
from outrider.kernels.cpu.emit import SERIAL
from outrider.kernels.cpu.jit import Kernel, allocate, free
from outrider.kernels.cpu.threads import num_threads, parallel
from outrider.tensors import PagedRows


@Kernel
def _attention_kernel(
    query: int, keys: int, values: int, rows: Rows, heads: Heads, scale: float, out: int, num_tokens: int, threads: int
) -> None:
    planned = plan(rows, heads, 0, num_tokens)
    areas = allocate(planned.num_areas * area(heads.head_dim))
    if planned.num_pairs * heads.head_dim < SERIAL:
        threads = 1
    parallel(attend, threads, (planned, areas, query, keys, values, rows, heads, scale, out, num_tokens))
    if planned.num_areas > 0:
        parallel(join, threads, (planned, areas, heads, out))
    free(areas)
    free(planned.tasks)


def paged_attention_cpu(query: Tensor, key_cache: Tensor, value_cache: Tensor, rows: PagedRows, scale: float) -> Tensor:
    assert query.dtype == torch.float32
    num_tokens, num_heads, _ = query.shape
    query = query.contiguous()
    out = torch.empty_like(query)
    caches = key_cache.data_ptr(), value_cache.data_ptr()
    heads = heads_of(num_heads, key_cache, value_cache)
    _attention_kernel.launch(
        query.data_ptr(), *caches, rows_of(rows), heads, scale, out.data_ptr(), num_tokens, num_threads()
    )
    return out
