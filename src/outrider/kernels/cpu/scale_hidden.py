"""`kernels.scale_hidden` on a CPU."""

from __future__ import annotations

import numpy as np
import torch
from numba import carray
from torch import Tensor

from outrider.kernels.cpu.jit import Kernel, pointer


@Kernel
def _scale_hidden_kernel(
    x_at: int,
    temperature_at: int,
    seed_at: int,
    slot_at: int,
    greedy: bool,
    out_at: int,
    own_at: int,
    seeds_at: int,
    rows: int,
    size: int,
    num_slots: int,
) -> None:
    x, out = carray(pointer(x_at), (rows, size), np.float32), carray(pointer(out_at), (rows, size), np.float32)
    temperature, seed = (
        carray(pointer(temperature_at), (num_slots,), np.float32),
        carray(pointer(seed_at), (num_slots,), np.int64),
    )
    slot, seeds = carray(pointer(slot_at), (rows,), np.int64), carray(pointer(seeds_at), (rows,), np.int64)
    own = carray(pointer(own_at), (rows,), np.float32)
    for row in range(rows):
        seeds[row] = seed[slot[row]]
        own[row] = np.float32(0) if greedy else temperature[slot[row]]
        divisor = np.float32(1) if own[row] == 0 else own[row]
        for i in range(size):
            out[row, i] = x[row, i] / divisor


def scale_hidden_cpu(
    x: Tensor, temperature: Tensor, seed: Tensor, slot: Tensor, greedy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    assert x.dtype == temperature.dtype == torch.float32 and seed.dtype == slot.dtype == torch.int64
    assert x.is_contiguous() and temperature.is_contiguous() and seed.is_contiguous() and slot.is_contiguous()
    rows, size = x.shape
    out, own, seeds = torch.empty(rows, size), torch.empty(rows), torch.empty(rows, dtype=torch.int64)
    _scale_hidden_kernel.launch(
        x.data_ptr(),
        temperature.data_ptr(),
        seed.data_ptr(),
        slot.data_ptr(),
        greedy,
        out.data_ptr(),
        own.data_ptr(),
        seeds.data_ptr(),
        rows,
        size,
        len(temperature),
    )
    return out, own, seeds
