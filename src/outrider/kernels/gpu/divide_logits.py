"""Logits by temperature: several programs a row, which leave rows alone that nothing changes.
See `kernels.divide_logits`."""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.gpu.triton import begin, jit, launch, overlaps, tl, wait

_BLOCK = 4096


@jit
def _divide_kernel(logits, temperature, slot, stride, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    divisor = tl.load(temperature + tl.load(slot + row))
    if (divisor != 0) & (divisor != 1):
        address = logits + row * stride + column
        dividend = tl.load(address, mask=column < size, other=0)
        tl.store(address, tl.div_rn(dividend, divisor + tl.zeros_like(dividend)), mask=column < size)


def divide_logits_gpu(logits: Tensor, temperature: Tensor, slot: Tensor) -> Tensor:
    """`divide_logits_reference` in one kernel."""
    assert logits.stride(1) == 1 and temperature.is_contiguous() and slot.is_contiguous()
    assert logits.dtype == temperature.dtype == torch.float32 and slot.dtype == torch.int64
    rows, size = logits.shape
    overlap = overlaps(logits)
    _divide_kernel[(rows, -(-size // _BLOCK))](
        logits, temperature, slot, logits.stride(0), size, BLOCK=_BLOCK, PDL=overlap, **launch(overlap)
    )
    return logits
