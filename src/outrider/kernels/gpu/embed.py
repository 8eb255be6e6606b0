"""Token embedding: a program a token. See `kernels.embed`."""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.gpu.triton import begin, jit, launch, next_power_of_2, overlaps, tl, wait


@jit
def _embed_kernel(ids, weight, out, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    wait(PDL)
    value = tl.load(weight + tl.load(ids + row) * size + column, mask=column < size)
    tl.store(out + row * size + column, value.to(out.dtype.element_ty), mask=column < size)


def embed_gpu(ids: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`embed_reference` in one kernel."""
    assert ids.is_contiguous() and weight.is_contiguous()
    size = weight.shape[1]
    out = torch.empty((ids.shape[0], size), dtype=dtype, device=ids.device)
    overlap = overlaps(ids)
    _embed_kernel[(ids.shape[0],)](ids, weight, out, size, BLOCK=next_power_of_2(size), PDL=overlap, **launch(overlap))
    return out
