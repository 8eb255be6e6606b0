"""RMSNorm, alone or behind a residual addition: a program a row. See `kernels.norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.gpu.triton import begin, jit, launch, next_power_of_2, overlaps, tl, wait


@jit
def _norm_kernel(x, residual, weight, out, size, eps, ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    scale = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    wait(PDL)
    value = tl.load(x + row * size + column, mask=inside, other=0)
    if ADD:
        there = tl.load(residual + row * size + column, mask=inside, other=0)
        value = (value.to(tl.float32) + there.to(tl.float32)).to(value.dtype)
        tl.store(residual + row * size + column, value, mask=inside)
    upcast = value.to(tl.float32)
    root = tl.rsqrt(tl.sum(upcast * upcast) / size + eps)
    tl.store(out + row * size + column, (scale * (upcast * root)).to(value.dtype), mask=inside)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    size = weight.shape[0]
    out = torch.empty_like(x)
    overlap = overlaps(x)
    _norm_kernel[(x.numel() // size,)](
        x,
        residual,
        weight,
        out,
        size,
        eps,
        ADD=residual is not None,
        BLOCK=next_power_of_2(size),
        PDL=overlap,
        num_warps=4 if size <= 4096 else 8,
        **launch(overlap),
    )
    return out


def rms_norm_gpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in one kernel."""
    return _launch(x, None, weight, eps)


def add_rms_norm_gpu(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`add_rms_norm` in one kernel."""
    assert residual.is_contiguous() and residual.shape == x.shape and residual.dtype == x.dtype
    return _launch(x, residual, weight, eps)
