"""What a draft head's first layer reads: each row's token and hidden state, normed apart, side by side.

ids [R] int64; embedding [V, H] in its stored type; hidden [R, H] float32 on a CPU, of the weights' type on CUDA; the
norms are RMSNorm weights [H]. Returns [R, 2H] of hidden's type, the token first (EAGLE-3: Li et al., 2025).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numba import carray
from torch import Tensor
from torch.nn import functional

from outrider.kernels._numba import KIND, WIDTH, Emitter, Int, Vector, emitted
from outrider.kernels.gpu.join_input import join_input_gpu
from outrider.kernels.native import compiled, pointer
from outrider.kernels.norm import norm_row, rms_norm_reference
from outrider.kernels.op import Example, Op


def join_input_reference(
    ids: Tensor, embedding: Tensor, hidden: Tensor, token_norm: Tensor, hidden_norm: Tensor, eps: float
) -> Tensor:
    token = functional.embedding(ids, embedding).to(hidden.dtype)
    return torch.cat((rms_norm_reference(token, token_norm, eps), rms_norm_reference(hidden, hidden_norm, eps)), dim=-1)


@emitted
def _widen_row(emitter: Emitter, source: Int, kind: Int, out: Int, size: Int) -> None:
    """out[:size] = source[:size], float32 from a stored kind."""

    def of_kind(kind: int) -> None:
        def step(index: Int, mask: Vector | None, none: list[Vector]) -> list[Vector]:
            emitter.store(emitter.load(source, index, mask, kind), out, index, mask)
            return none

        emitter.sweep(size, step, [])

    emitter.each_kind(kind, of_kind)


@compiled()
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
        place = out + row * size * 8
        _widen_row(embedding + ids[row] * size * width, kind, place, size)
        norm_row(place, token_norm, kind, place, size, eps)
        norm_row(hidden + row * size * 4, hidden_norm, kind, place + size * 4, size, eps)


def _join_input_cpu(
    ids: Tensor, embedding: Tensor, hidden: Tensor, token_norm: Tensor, hidden_norm: Tensor, eps: float
) -> Tensor:
    rows, size = hidden.shape
    assert hidden.dtype == torch.float32 and hidden.is_contiguous() and embedding.is_contiguous()
    assert ids.dtype == torch.int64 and ids.is_contiguous() and ids.shape == (rows,)
    assert embedding.dtype == token_norm.dtype == hidden_norm.dtype
    kind = KIND[embedding.dtype]
    out = torch.empty(rows, 2 * size)
    _join_kernel(
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


def _examples(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows, size in ((1, 64), (7, 67), (40, 256)):
            hidden = torch.randn(rows, size, generator=generator)
            yield {
                "ids": torch.randint(31, (rows,), generator=generator).to(device),
                "embedding": torch.randn(31, size, generator=generator).to(device, dtype),
                "hidden": hidden.to(device, torch.float32 if wide else dtype),
                "token_norm": (1 + torch.randn(size, generator=generator)).to(device, dtype),
                "hidden_norm": (1 + torch.randn(size, generator=generator)).to(device, dtype),
                "eps": 1e-6,
            }


JOIN_INPUT = Op(
    "join_input", join_input_reference, {"cpu": _join_input_cpu, "cuda": join_input_gpu}, examples=_examples
)
