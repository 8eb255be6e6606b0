"""Hidden states divided by their requests' temperatures: a program a row. See `kernels.scale_hidden`."""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.gpu.triton import begin, jit, launch, next_power_of_2, overlaps, tl, wait


@jit
def _scale_hidden_kernel(
    x, temperature, seed, slot, out, own, seeds, size, GREEDY: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    wait(PDL)
    value = tl.load(x + row * size + column, mask=inside, other=0)
    at = tl.load(slot + row)
    tl.store(seeds + row, tl.load(seed + at))
    if GREEDY:
        tl.store(own + row, 0.0)
    else:
        warmth = tl.load(temperature + at)
        tl.store(own + row, warmth)
        divisor = tl.where(warmth == 0, 1.0, warmth) + tl.zeros([BLOCK], tl.float32)
        value = tl.div_rn(value.to(tl.float32), divisor).to(value.dtype)
    tl.store(out + row * size + column, value, mask=inside)


def scale_hidden_gpu(
    x: Tensor, temperature: Tensor, seed: Tensor, slot: Tensor, greedy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`scale_hidden_reference` in one kernel."""
    assert x.is_contiguous() and slot.is_contiguous()
    rows, size = x.shape
    out = torch.empty_like(x)
    own = torch.empty(rows, dtype=temperature.dtype, device=x.device)
    seeds = torch.empty(rows, dtype=seed.dtype, device=x.device)
    overlap = overlaps(x)
    _scale_hidden_kernel[(rows,)](
        x,
        temperature,
        seed,
        slot,
        out,
        own,
        seeds,
        size,
        GREEDY=greedy,
        BLOCK=next_power_of_2(size),
        PDL=overlap,
        **launch(overlap),
    )
    return out, own, seeds
