"""Rows of a matrix by index: a program a row. See `kernels.gather_rows`."""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.gpu.triton import begin, jit_counts, launch, next_power_of_2, overlaps, tl, wait


@jit_counts("known")
def _gather_kernel(x, extra, index, out, known, size, EXTRA: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    wait(PDL)
    at = tl.load(index + row)
    there = column < tl.where(at < known, size, 0)  # all of x's row, or none of it
    value = tl.load(x + at * size + column, mask=there)
    if EXTRA:
        value = tl.where(there, value, tl.load(extra + column, mask=inside & (there == 0)))
    tl.store(out + row * size + column, value, mask=inside)


def gather_rows_gpu(x: Tensor, extra: Tensor | None, index: Tensor) -> Tensor:
    """`gather_rows_reference` in one kernel."""
    assert x.is_contiguous() and index.is_contiguous()
    assert extra is None or (extra.is_contiguous() and extra.dtype == x.dtype)
    known, size = x.shape
    out = torch.empty((len(index), size), dtype=x.dtype, device=x.device)
    overlap = overlaps(x)
    _gather_kernel[(len(index),)](
        x,
        extra,
        index,
        out,
        known,
        size,
        EXTRA=extra is not None,
        BLOCK=next_power_of_2(size),
        PDL=overlap,
        **launch(overlap),
    )
    return out
