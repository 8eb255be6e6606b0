"""What a draft head's first layer reads: for each row a program of its token and one of its hidden state.

See `kernels.join_input`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.gpu.triton import begin, jit, launch, next_power_of_2, overlaps, tl, wait


@jit
def _join_kernel(
    ids, embedding, hidden, token_norm, hidden_norm, out, size, eps, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    begin(PDL)
    row, half = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < size
    if half == 0:
        scale = tl.load(token_norm + column, mask=inside, other=0).to(tl.float32)
        wait(PDL)
        token = tl.load(embedding + tl.maximum(tl.load(ids + row), 0) * size + column, mask=inside, other=0)
        upcast = token.to(out.dtype.element_ty).to(tl.float32)
    else:
        scale = tl.load(hidden_norm + column, mask=inside, other=0).to(tl.float32)
        wait(PDL)
        upcast = tl.load(hidden + row * size + column, mask=inside, other=0).to(tl.float32)
    root = tl.rsqrt(tl.sum(upcast * upcast) / size + eps)
    normed = (scale * (upcast * root)).to(out.dtype.element_ty)
    tl.store(out + (2 * row + half) * size + column, normed, mask=inside)


def join_input_gpu(
    ids: Tensor, embedding: Tensor, hidden: Tensor, token_norm: Tensor, hidden_norm: Tensor, eps: float
) -> Tensor:
    """`join_input_reference` in one kernel."""
    rows, size = hidden.shape
    assert hidden.is_contiguous() and embedding.is_contiguous() and ids.is_contiguous()
    out = torch.empty((rows, 2 * size), dtype=hidden.dtype, device=hidden.device)
    overlap = overlaps(hidden)
    _join_kernel[(rows, 2)](
        ids,
        embedding,
        hidden,
        token_norm,
        hidden_norm,
        out,
        size,
        eps,
        BLOCK=next_power_of_2(size),
        PDL=overlap,
        num_warps=4 if size <= 4096 else 8,
        **launch(overlap),
    )
    return out
