"""Hidden states divided by their requests' temperatures, so that the logits made of them are ready to be sampled from.

x [N, H] float32 on a CPU; temperature [S] float32 and seed [S] int64 are per-slot tables, slot [N] int64 says whose
row each is. Returns x / temperature [N, H] (x itself where the temperature is 0, or for all rows if `greedy`), the
rows' temperatures [N], 0 if greedy, and their seeds [N]. A head without a bias makes of it logits / temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.op import Op


def scale_hidden_reference(
    x: Tensor, temperature: Tensor, seed: Tensor, slot: Tensor, greedy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    own = temperature.index_select(0, slot)
    if greedy:
        own = torch.zeros_like(own)
    scale = torch.where(own == 0, 1.0, own)
    return (x.float() / scale[:, None]).to(x.dtype), own, seed.index_select(0, slot)


SCALE_HIDDEN = Op("scale_hidden", scale_hidden_reference)
