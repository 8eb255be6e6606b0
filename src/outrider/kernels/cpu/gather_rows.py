"""`kernels.gather_rows` on a CPU."""

from __future__ import annotations

import numpy as np
import torch
from numba import carray
from torch import Tensor

from outrider.kernels.cpu.emit import copy_row
from outrider.kernels.cpu.jit import Kernel, pointer


@Kernel
def _gather_kernel(x: int, extra: int, index_at: int, out: int, rows: int, known: int, size: int) -> None:
    index = carray(pointer(index_at), (rows,), np.int64)
    for row in range(rows):
        source = x + index[row] * size * 4 if index[row] < known else extra
        copy_row(source, out + row * size * 4, size)


def gather_rows_cpu(x: Tensor, extra: Tensor | None, index: Tensor) -> Tensor:
    assert x.dtype == torch.float32 and x.is_contiguous() and index.dtype == torch.int64 and index.is_contiguous()
    assert extra is None or (extra.dtype == torch.float32 and extra.is_contiguous())
    known, size = x.shape
    out = torch.empty(len(index), size)
    other = x if extra is None else extra
    _gather_kernel.launch(x.data_ptr(), other.data_ptr(), index.data_ptr(), out.data_ptr(), len(index), known, size)
    return out
