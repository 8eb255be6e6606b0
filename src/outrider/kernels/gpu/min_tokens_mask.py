"""Masking of tokens: a program a row, which writes and never reads a logit. See `kernels.min_tokens_mask`."""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.gpu.triton import begin, jit, launch, next_power_of_2, overlaps, tl, wait


@jit
def _min_tokens_mask_kernel(
    logits,
    slot,
    position,
    min_length,
    banned,
    stride,
    size,
    width,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    wait(PDL)
    owner = tl.load(slot + row)
    if tl.load(position + row) < tl.load(min_length + owner):
        token = tl.load(banned + owner * width + column, mask=column < width, other=-1)
        tl.store(logits + row * stride + token, -float("inf"), mask=(token >= 0) & (token < size))


def min_tokens_mask_gpu(logits: Tensor, slot: Tensor, position: Tensor, min_length: Tensor, banned: Tensor) -> Tensor:
    """`min_tokens_mask_reference` in one kernel."""
    assert logits.stride(1) == 1 and slot.is_contiguous() and position.is_contiguous()
    assert min_length.is_contiguous() and banned.is_contiguous()
    assert logits.dtype == torch.float32 and slot.dtype == position.dtype == banned.dtype == torch.int64
    width, overlap = banned.shape[1], overlaps(logits)
    _min_tokens_mask_kernel[(logits.shape[0],)](
        logits,
        slot,
        position,
        min_length,
        banned,
        logits.stride(0),
        logits.shape[1],
        width,
        WIDTH=next_power_of_2(width),
        PDL=overlap,
        num_warps=1,
        **launch(overlap),
    )
    return logits
