"""What a draft head's first layer reads: each row's token and hidden state, normed apart, side by side.

ids [R] int64, a negative one read as 0; embedding [V, H] in its stored type; hidden [R, H] float32 on a CPU, of the
weights' type on CUDA; the norms are RMSNorm weights [H]. Returns [R, 2H] of hidden's type, the token first (EAGLE-3:
Li et al., 2025).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from outrider.kernels.norm import rms_norm_reference
from outrider.kernels.op import Op


def join_input_reference(
    ids: Tensor, embedding: Tensor, hidden: Tensor, token_norm: Tensor, hidden_norm: Tensor, eps: float
) -> Tensor:
    token = functional.embedding(ids.clamp(min=0), embedding).to(hidden.dtype)
    return torch.cat((rms_norm_reference(token, token_norm, eps), rms_norm_reference(hidden, hidden_norm, eps)), dim=-1)


JOIN_INPUT = Op("join_input", join_input_reference)
