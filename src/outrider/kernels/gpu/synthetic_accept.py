"""Synthetic acceptance: a program for some rows of logits. See `kernels.synthetic_accept`."""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.gpu.noise import bits, row_key
from outrider.kernels.gpu.step_inputs import tile
from outrider.kernels.gpu.triton import begin, jit_counts, launch, overlaps, tl, wait


@jit_counts("num_rows", "num_logits")
def _synthetic_accept_kernel(
    logits_start, seed, logits_slot, logits_position, chances, accepted, num_rows, num_logits, num_chances,
    PURPOSE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = item < num_logits
    every = tl.arange(0, ROWS)
    wait(PDL)
    start = tl.load(logits_start + every, mask=every < num_rows, other=0)
    own = tl.max(tl.where(start[None, :] <= item[:, None], start[None, :], 0), 1)
    index = item - own
    at = tl.load(logits_slot + item, mask=inside, other=0)
    position = tl.load(logits_position + item, mask=inside, other=0)
    a, b = row_key(tl.load(seed + at, mask=inside, other=0), position, PURPOSE)
    noise = bits(a, b, tl.zeros([BLOCK], tl.int32))
    chance = tl.load(chances + index, mask=inside & (index < num_chances), other=0)
    uniform = (noise.to(tl.float64) + 0.5) * (1.0 / 4294967296.0)
    tl.store(accepted + item, (uniform < chance).to(tl.uint8), mask=inside)


def synthetic_accept_gpu(
    logits_start: Tensor,
    seed: Tensor,
    logits_slot: Tensor,
    logits_position: Tensor,
    chances: Tensor,
    purpose: int,
) -> Tensor:
    """`synthetic_accept_reference` in one kernel."""
    assert logits_slot.is_contiguous() and logits_position.is_contiguous() and chances.dtype == torch.float64
    num_logits, size = logits_slot.shape[0], logits_start.shape[0] - 1
    accepted = torch.empty(num_logits, dtype=torch.bool, device=seed.device)
    rows, block = tile(size)
    overlap = overlaps(seed)
    _synthetic_accept_kernel[(-(-num_logits // block),)](
        logits_start,
        seed,
        logits_slot,
        logits_position,
        chances,
        accepted.view(torch.uint8),
        size,
        num_logits,
        len(chances),
        PURPOSE=int(purpose),
        ROWS=rows,
        BLOCK=block,
        PDL=overlap,
        **launch(overlap),
    )
    return accepted
