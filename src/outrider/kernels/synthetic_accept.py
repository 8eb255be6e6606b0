"""Accepts each draft with a given chance, which depends only on its index among its row's drafts."""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.noise import noise_bits_reference, uniform
from outrider.kernels.op import Op
from outrider.kernels.step_inputs import locate


def synthetic_accept_reference(
    logits_start: Tensor,  # [B+1] int32, row b owns logits rows logits_start[b]:logits_start[b+1]
    seed: Tensor,  # [S] int64, by slot
    logits_slot: Tensor,  # [L] int64
    logits_position: Tensor,  # [L] int64
    chances: Tensor,  # [N] float64, of the drafts at index 0..N-1; 0 for later ones
    purpose: int,  # of the noise, as in `kernels.noise`
) -> Tensor:
    """accepted [L] bool: whether the uniform number of a row of logits is below the chance of its draft's index."""
    _, index = locate(logits_start, logits_slot.shape[0])
    given = torch.nn.functional.pad(chances, (0, 1))[index.clamp(max=len(chances))]
    return uniform(noise_bits_reference(seed[logits_slot], logits_position, purpose, 1))[:, 0] < given


SYNTHETIC_ACCEPT = Op("synthetic_accept", synthetic_accept_reference, ("cuda",), tolerance=0.0, why="yes or no")
