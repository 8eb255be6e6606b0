"""Which drafts stand by decree: each with a chance that depends on its place among its row's drafts alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from outrider.kernels.noise import noise_bits_reference, uniform
from outrider.kernels.op import Example, Op
from outrider.kernels.step_inputs import locate
from outrider.tensors import Purpose


def synthetic_accept_reference(
    logits_start: Tensor,  # [B+1] int32, row b owns logits rows logits_start[b]:logits_start[b+1]
    seed: Tensor,  # [S] int64, by slot
    logits_slot: Tensor,  # [L] int64
    logits_position: Tensor,  # [L] int64
    chances: Tensor,  # [N] float64, of the drafts at places 0..N-1; 0 for later ones
    purpose: int,  # of the noise, as in `kernels.noise`
) -> Tensor:
    """stands [L] bool: whether the row's uniform number is below the chance of its place among its row's."""
    _, place = locate(logits_start, logits_slot.shape[0])
    given = torch.nn.functional.pad(chances, (0, 1))[place.clamp(max=len(chances))]
    return uniform(noise_bits_reference(seed[logits_slot], logits_position, purpose, 1))[:, 0] < given


def _examples(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    for rows, drafts, padding, chances in (
        (1, 0, 0, [0.5]),
        (1, 7, 0, [0.9, 0.5, 0.0, 1.0, 0.3, 0.2, 1e-12]),
        (3, 32, 2, [0.7] * 32),
        (33, 1, 1, [0.25]),
        (128, 7, 40, [0.8, 0.75, 0.5]),
    ):
        owned = torch.randint(0, drafts + 2, (rows,), generator=generator)
        total = int(owned.sum()) + padding
        seed = torch.randint(-(2**63), 2**63 - 1, (9,), generator=generator, dtype=torch.int64)
        yield {
            "logits_start": torch.nn.functional.pad(owned.cumsum(0), (1, 0)).int().to(device),
            "seed": seed.to(device),
            "logits_slot": torch.randint(9, (total,), generator=generator).to(device),
            "logits_position": torch.randint(2**20, (total,), generator=generator).to(device),
            "chances": torch.tensor(chances, dtype=torch.float64).to(device),
            "purpose": Purpose.ACCEPT,
        }


SYNTHETIC_ACCEPT = Op(
    "synthetic_accept", synthetic_accept_reference, ("cuda",), examples=_examples, tolerance=0.0, why="yes or no"
)
