"""Hidden states divided by their requests' temperatures, so that the logits made of them are ready to be sampled from.

x [N, H] float32 on a CPU; temperature [S] float32 and seed [S] int64 are per-slot tables, slot [N] int64 says whose
row each is. Returns x / temperature [N, H] (x itself where the temperature is 0, or for all rows if `greedy`), the
rows' temperatures [N], 0 if greedy, and their seeds [N]. A head without a bias makes of it logits / temperature.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numba import carray
from torch import Tensor

from outrider.kernels.gpu.temper import temper_gpu
from outrider.kernels.native import compiled, pointer
from outrider.kernels.op import Example, Op


def temper_reference(
    x: Tensor, temperature: Tensor, seed: Tensor, slot: Tensor, greedy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    own = temperature.index_select(0, slot)
    if greedy:
        own = torch.zeros_like(own)
    scale = torch.where(own == 0, 1.0, own)
    return (x.float() / scale[:, None]).to(x.dtype), own, seed.index_select(0, slot)


@compiled()
def _temper_kernel(
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


def _temper_cpu(
    x: Tensor, temperature: Tensor, seed: Tensor, slot: Tensor, greedy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    assert x.dtype == temperature.dtype == torch.float32 and seed.dtype == slot.dtype == torch.int64
    assert x.is_contiguous() and temperature.is_contiguous() and seed.is_contiguous() and slot.is_contiguous()
    rows, size = x.shape
    out, own, seeds = torch.empty(rows, size), torch.empty(rows), torch.empty(rows, dtype=torch.int64)
    _temper_kernel(
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


def _examples(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    for rows, size in ((1, 64), (7, 67)):
        dtype = torch.float32 if wide else torch.bfloat16
        for greedy in (False, True):
            yield {
                "x": torch.randn(rows, size, generator=generator).to(device, dtype),
                "temperature": torch.tensor([0.0, 0.7, 1.0, 2.5]).to(device),
                "seed": torch.randint(2**62, (4,), generator=generator).to(device),
                "slot": torch.randint(4, (rows,), generator=generator).to(device),
                "greedy": greedy,
            }


TEMPER = Op("temper", temper_reference, {"cpu": _temper_cpu, "cuda": temper_gpu}, examples=_examples)
