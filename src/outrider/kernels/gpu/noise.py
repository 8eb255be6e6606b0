"""The noise's integers, for kernels of this room and as an op. See `kernels.noise`."""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.gpu.triton import begin, jit, launch, overlaps, tl, wait

_BLOCK = 1024


@jit
def _mix(x):
    """`kernels.noise.mix`; x is uint32, and so is every product."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@jit
def row_key(seed, position, PURPOSE: tl.constexpr):
    """`kernels.noise.row_key`: seed and position int64, of any one shape -> two uint32 of it."""
    step: tl.constexpr = (PURPOSE * 0x85EBCA6B) & 0xFFFFFFFF
    a = _mix(seed.to(tl.uint32) + 0x9E3779B9)
    b = _mix((seed >> 32).to(tl.uint32) ^ a)
    a = _mix(a ^ b ^ position.to(tl.uint32))
    b = _mix(b + a + step)
    return _mix(a ^ b), b


@jit
def bits(a, b, index):
    """The integers, uint32, of a row's key at int32 or int64 indices."""
    return _mix(_mix(index.to(tl.uint32) ^ a) + b)


@jit
def _bits_kernel(seed, position, out, num_indices, PURPOSE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    a, b = row_key(tl.load(seed + row), tl.load(position + row), PURPOSE)
    tl.store(out + row * num_indices + index, bits(a, b, index).to(tl.int64), mask=index < num_indices)


def noise_bits_gpu(seed: Tensor, position: Tensor, purpose: int, num_indices: int) -> Tensor:
    """`noise_bits_reference` in one kernel."""
    seed, position = seed.contiguous(), position.contiguous()
    assert seed.dtype == position.dtype == torch.int64 and seed.shape == position.shape
    out = torch.empty((seed.shape[0], num_indices), dtype=torch.int64, device=seed.device)
    overlap = overlaps(seed)
    _bits_kernel[(seed.shape[0], -(-num_indices // _BLOCK))](
        seed, position, out, num_indices, PURPOSE=int(purpose), BLOCK=_BLOCK, PDL=overlap, **launch(overlap)
    )
    return out
