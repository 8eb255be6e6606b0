"""A step's results in one table: a program a row. See `kernels.report`."""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.gpu.triton import begin, jit, launch, next_power_of_2, overlaps, tl, wait


@jit
def _report_kernel(
    tokens, count, invalid, drafted, out, width, stride, DRAFTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    begin(PDL)
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    wait(PDL)
    token = tl.load(tokens + row * width + column, mask=column < width)
    tl.store(out + row * stride + column, token, mask=column < width)
    tl.store(out + row * stride + width, tl.load(count + row).to(tl.int64))
    tl.store(out + row * stride + width + 1, tl.load(invalid + row).to(tl.int64))
    waiting = tl.load(drafted + row).to(tl.int64) if DRAFTS else 0
    tl.store(out + row * stride + width + 2, waiting)


def report_gpu(tokens: Tensor, count: Tensor, invalid: Tensor, drafted: Tensor | None, out: Tensor) -> None:
    """`report` in one kernel."""
    rows, width = tokens.shape
    assert tokens.is_contiguous() and out.stride(1) == 1 and out.shape == (rows, width + 3)
    overlap = overlaps(out)
    _report_kernel[(rows,)](
        tokens,
        count,
        invalid.view(torch.uint8),
        drafted,
        out,
        width,
        out.stride(0),
        DRAFTS=drafted is not None,
        BLOCK=next_power_of_2(width),
        PDL=overlap,
        num_warps=1,
        **launch(overlap),
    )
