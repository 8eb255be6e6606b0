"""Rows of a matrix by index, and one more row behind its last.

x [T, H] float32 on a CPU; index [R] int64 from 0 to T; extra [1, H], what index T means, or None where no index is T.
Returns [R, H]: a draft head's rows take the target's features, or what stands for features not yet there.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numba import carray
from torch import Tensor

from outrider.kernels._numba import copy_row
from outrider.kernels.gpu.gather_rows import gather_rows_gpu
from outrider.kernels.native import compiled, pointer
from outrider.kernels.op import Example, Op


def gather_rows_reference(x: Tensor, extra: Tensor | None, index: Tensor) -> Tensor:
    return (x if extra is None else torch.cat((x, extra))).index_select(0, index)


@compiled()
def _gather_kernel(x: int, extra: int, index_at: int, out: int, rows: int, known: int, size: int) -> None:
    index = carray(pointer(index_at), (rows,), np.int64)
    for row in range(rows):
        source = x + index[row] * size * 4 if index[row] < known else extra
        copy_row(source, out + row * size * 4, size)


def _gather_rows_cpu(x: Tensor, extra: Tensor | None, index: Tensor) -> Tensor:
    assert x.dtype == torch.float32 and x.is_contiguous() and index.dtype == torch.int64 and index.is_contiguous()
    assert extra is None or (extra.dtype == torch.float32 and extra.is_contiguous())
    known, size = x.shape
    out = torch.empty(len(index), size)
    other = x if extra is None else extra
    _gather_kernel(x.data_ptr(), other.data_ptr(), index.data_ptr(), out.data_ptr(), len(index), known, size)
    return out


def _examples(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    for tokens, rows, size in ((1, 1, 64), (5, 8, 67), (3, 40, 256)):
        dtype = torch.float32 if wide else torch.bfloat16
        x, extra = (torch.randn(count, size, generator=generator).to(device, dtype) for count in (tokens, 1))
        yield {"x": x, "extra": extra, "index": torch.randint(tokens + 1, (rows,), generator=generator).to(device)}
        yield {"x": x, "extra": None, "index": torch.randint(tokens, (rows,), generator=generator).to(device)}


GATHER_ROWS = Op(
    "gather_rows",
    gather_rows_reference,
    {"cpu": _gather_rows_cpu, "cuda": gather_rows_gpu},
    examples=_examples,
    tolerance=0.0,
    why="copies",
)
