"""The gate of a SwiGLU block: a program some columns of a row. See `kernels.activation`."""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.gpu.triton import begin, jit, launch, next_power_of_2, overlaps, round_to, tl, wait

_BLOCK = 2048  # sixteen numbers of each half a thread: two loads of 16 bytes, if they are of 16 bits


@jit
def _silu_mul_kernel(gate_up, out, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    wait(PDL)
    gate = tl.load(gate_up + row * 2 * size + column, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * size + column, mask=inside, other=0).to(tl.float32)
    product = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + row * size + column, round_to(product, out.dtype.element_ty), mask=inside)


def silu_mul_gpu(gate_up: Tensor) -> Tensor:
    """`silu_mul` in one kernel."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.is_contiguous()
    out = torch.empty(rows, size, dtype=gate_up.dtype, device=gate_up.device)
    overlap = overlaps(gate_up)
    block = min(next_power_of_2(size), _BLOCK)
    _silu_mul_kernel[(rows, -(-size // block))](gate_up, out, size, BLOCK=block, PDL=overlap, **launch(overlap))
    return out
