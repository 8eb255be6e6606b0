"""`kernels.join_input` on a CPU."""

from __future__ import annotations

import numpy as np
import torch
from numba import carray
from torch import Tensor

from outrider.kernels.cpu.embed import widen_row
from outrider.kernels.cpu.emit import KIND, WIDTH
from outrider.kernels.cpu.jit import Kernel, larger, pointer
from outrider.kernels.cpu.norm import norm_row


@Kernel
def _join_kernel(
    ids_at: int,
    embedding: int,
    kind: int,
    width: int,
    hidden: int,
    token_norm: int,
    hidden_norm: int,
    eps: float,
    out: int,
    rows: int,
    size: int,
) -> None:
    ids = carray(pointer(ids_at), (rows,), np.int64)
    for row in range(rows):
        address = out + row * size * 8
        widen_row(embedding + larger(ids[row], 0) * size * width, kind, address, size)
        norm_row(address, token_norm, kind, address, size, eps)
        norm_row(hidden + row * size * 4, hidden_norm, kind, address + size * 4, size, eps)


def join_input_cpu(
    ids: Tensor, embedding: Tensor, hidden: Tensor, token_norm: Tensor, hidden_norm: Tensor, eps: float
) -> Tensor:
    rows, size = hidden.shape
    assert hidden.dtype == torch.float32 and hidden.is_contiguous() and embedding.is_contiguous()
    assert ids.dtype == torch.int64 and ids.is_contiguous() and ids.shape == (rows,)
    assert embedding.dtype == token_norm.dtype == hidden_norm.dtype
    kind = KIND[embedding.dtype]
    out = torch.empty(rows, 2 * size)
    _join_kernel.launch(
        ids.data_ptr(),
        embedding.data_ptr(),
        kind,
        WIDTH[kind],
        hidden.data_ptr(),
        token_norm.data_ptr(),
        hidden_norm.data_ptr(),
        eps,
        out.data_ptr(),
        rows,
        size,
    )
    return out
