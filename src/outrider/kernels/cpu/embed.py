"""`kernels.embed` on a CPU."""

from __future__ import annotations

import numpy as np
import torch
from numba import carray
from torch import Tensor

from outrider.kernels.cpu.emit import KIND, SERIAL, WIDTH, Emitter, Int, Vector, emitted
from outrider.kernels.cpu.jit import Kernel, pointer, task
from outrider.kernels.cpu.threads import add, num_threads, parallel


@emitted
def widen_row(emitter: Emitter, source: Int, kind: Int, out: Int, size: Int) -> None:
    """out[:size] = source[:size], to float32 from a stored kind."""

    def of_kind(kind: int) -> None:
        def step(index: Int, mask: Vector | None, none: list[Vector]) -> list[Vector]:
            emitter.store(emitter.load(source, index, mask, kind), out, index, mask)
            return none

        emitter.sweep(size, step, [])

    emitter.each_kind(kind, of_kind)


@task()
def _embed_rows(tickets: int, ids_at: int, weight: int, kind: int, width: int, out: int, rows: int, size: int) -> None:
    ids = carray(pointer(ids_at), (rows,), np.int64)
    while True:
        row = add(tickets, 1)
        if row >= rows:
            break
        widen_row(weight + ids[row] * size * width, kind, out + row * size * 4, size)


@Kernel
def _embed_kernel(
    ids_at: int, weight: int, num_ids: int, kind: int, width: int, out: int, rows: int, size: int, threads: int
) -> bool:
    ids = carray(pointer(ids_at), (rows,), np.int64)
    for row in range(rows):
        if ids[row] < 0 or ids[row] >= num_ids:
            return False
    parallel(_embed_rows, threads, (ids_at, weight, kind, width, out, rows, size))
    return True


def embed_cpu(ids: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`embed_reference` in one call. IndexError for an id that the matrix does not have."""
    assert dtype == torch.float32 and ids.dtype == torch.int64 and ids.is_contiguous() and weight.is_contiguous()
    rows, (num_ids, size), kind = ids.shape[0], weight.shape, KIND[weight.dtype]
    out = torch.empty(rows, size)
    threads = num_threads() if rows * size > SERIAL else 1
    at = ids.data_ptr(), weight.data_ptr()
    if not _embed_kernel.launch(*at, num_ids, kind, WIDTH[kind], out.data_ptr(), rows, size, threads):
        raise IndexError(f"token ids must be from 0 to {num_ids - 1}: they reach from {ids.min()} to {ids.max()}")
    return out
