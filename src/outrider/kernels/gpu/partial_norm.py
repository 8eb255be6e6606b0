"""Half of an RMSNorm: rows times the norm's weight, and their squares. The product that reads them does the rest."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from outrider.kernels.gpu.triton import begin, jit, launch, next_power_of_2, overlaps, round_to, tl, wait

_SHRINK = 1 / 256  # of rows normed in part in float16, whose largest is 65,504: a residual stream grows beyond its root


class Rows(NamedTuple):
    """Rows that are normed in part: times the norm's weight, but not yet divided by their root mean square."""

    scaled: Tensor  # [T, H]
    squares: Tensor  # [sums, T] float32, which add up to each row's sum of squares
    eps: float


@jit
def _scale_kernel(
    x,
    residual,
    norm,
    scaled,
    squares,
    size,
    ADD: tl.constexpr,
    SHRINK: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    scale = tl.load(norm + column, mask=inside, other=0).to(tl.float32)
    wait(PDL)
    value = tl.load(residual + row * size + column, mask=inside, other=0)
    if ADD:
        more = tl.load(x + row * size + column, mask=inside, other=0).to(tl.float32)
        value = round_to(value.to(tl.float32) + more, value.dtype)
        tl.store(residual + row * size + column, value, mask=inside)
    upcast = value.to(tl.float32)
    tl.store(scaled + row * size + column, round_to(upcast * scale * SHRINK, value.dtype), mask=inside)
    tl.store(squares + row, tl.sum(upcast * upcast))


def shrink(dtype: torch.dtype) -> float:
    """What rows are made smaller by."""
    return _SHRINK if dtype == torch.float16 else 1.0


def scale_rows(x: Tensor | None, residual: Tensor, norm: Tensor, eps: float) -> Rows:
    """Adds x to residual [T, H] in place, if there is one, and norms that in part."""
    rows, size = residual.shape
    assert residual.is_contiguous() and (x is None or (x.is_contiguous() and x.shape == residual.shape))
    scaled, squares = torch.empty_like(residual), torch.empty(1, rows, dtype=torch.float32, device=residual.device)
    overlap = overlaps(residual)
    _scale_kernel[(rows,)](
        x,
        residual,
        norm,
        scaled,
        squares,
        size,
        ADD=x is not None,
        SHRINK=shrink(residual.dtype),
        BLOCK=next_power_of_2(size),
        PDL=overlap,
        **launch(overlap),
    )
    return Rows(scaled, squares, eps)
