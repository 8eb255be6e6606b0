"""Cutting the tail of each row's distribution: min-p, then top-k, then top-p.

Each asks for the logits at or above some value, so the three together are one threshold a row, and
tokens that tie with the last one kept are kept too: the result is a function of the row's values,
not of how a sort orders equals. All sums are in float64. With `slot`, the tables are per slot, row l
belongs to slot[l], and rows of temperature 0 have everything off.

    min-p   keep tokens with at least min_p times the largest probability
    top-k   of those, keep what is no less than the k-th largest logit
    top-p   of those, renormalised, keep the likeliest until their sum reaches top_p, at least one
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
import torch
from numba import carray
from torch import Tensor

from outrider.kernels.gpu.truncate import truncate_gpu
from outrider.kernels.native import Floats, compiled, largest, pointer
from outrider.kernels.op import Example, Op


def _by_row(
    top_k: Tensor, top_p: Tensor, min_p: Tensor, temperature: Tensor | None, slot: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What each row is asked, [L] each."""
    if slot is None or temperature is None:
        return top_k, top_p, min_p
    drawn = temperature[slot] != 0
    return (
        torch.where(drawn, top_k[slot], 0),
        torch.where(drawn, top_p[slot], 1.0),
        torch.where(drawn, min_p[slot], 0.0),
    )


def truncate_reference(
    logits: Tensor,  # [L, V] float32, already divided by the temperature; in place
    top_k: Tensor,  # [L] int32, 0 is off
    top_p: Tensor,  # [L] float32, 1 is off
    min_p: Tensor,  # [L] float32, 0 is off
    temperature: Tensor | None = None,  # [S] float32, given with `slot`; the three above are then [S]
    slot: Tensor | None = None,  # [L] int64
) -> Tensor:
    """`logits`, with -inf for what is cut. Rows with everything off keep their bits."""
    top_k, top_p, min_p = _by_row(top_k, top_p, min_p, temperature, slot)
    size = logits.shape[1]
    ordered = logits.sort(dim=-1, descending=True).values
    most = ordered[:, :1].double()
    floor = torch.where(min_p == 0, -torch.inf, min_p.double().log())[:, None] + most

    k = torch.where((top_k <= 0) | (top_k > size), size, top_k).long()[:, None]
    kth = torch.where(k == size, -torch.inf, ordered.gather(1, k - 1).double())
    floor = torch.maximum(floor, kth)

    weight = torch.where(ordered >= floor, (ordered - most).exp(), 0.0)
    before = weight.cumsum(dim=-1) - weight
    wanted = top_p.double()[:, None] * weight.sum(dim=-1, keepdim=True)
    nucleus = ((before < wanted) & (weight > 0)).sum(dim=-1, keepdim=True).clamp(min=1)
    pth = torch.where(top_p[:, None] >= 1, -torch.inf, ordered.gather(1, nucleus - 1).double())
    return logits.masked_fill_(logits < torch.maximum(floor, pth), -torch.inf)


Bins: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.float64]]"

_BINS = 2048
_BINS_PER_NAT = np.float32(64.0)
_LEAST = np.float32(-math.inf)


@compiled(inline="always")
def _bin(value: np.float32, most: np.float32) -> np.int64:
    """Which bin a logit falls in, the largest logits first; never decreasing as logits fall."""
    distance = np.float32(np.float32(most - value) * _BINS_PER_NAT)
    return np.int64(distance) if distance < _BINS - 1 else np.int64(_BINS - 1)


@compiled()
def _bin_sorted(logits: Floats, most: np.float32, floor: float, place: int, found: Floats) -> Floats:
    """The logits of one bin that are no less than `floor`, falling."""
    count = 0
    for value in logits:
        if value >= floor and _bin(value, most) == place:
            found[count] = value
            count += 1
    return np.sort(found[:count])[::-1]


@compiled()
def _kth(logits: Floats, most: np.float32, k: int, counts: Bins, found: Floats) -> float:
    counts[:] = 0
    for value in logits:
        counts[_bin(value, most)] += 1
    place = 0
    while counts[place] < k:
        k -= int(counts[place])
        place += 1
    return np.float64(_bin_sorted(logits, most, -math.inf, place, found)[k - 1])


@compiled()
def _pth(logits: Floats, most: np.float32, floor: float, top_p: float, mass: Bins, found: Floats) -> float:
    mass[:] = 0.0
    for value in logits:
        if value >= floor:
            mass[_bin(value, most)] += math.exp(np.float64(value) - most)
    wanted = top_p * mass.sum()
    before = 0.0
    for place in range(_BINS):
        if before + mass[place] >= wanted:
            last = np.float64(most)
            for value in _bin_sorted(logits, most, floor, place, found):
                if before >= wanted:
                    break
                last = np.float64(value)
                before += math.exp(last - most)
            return last
        before += mass[place]
    return -math.inf


@compiled()
def _truncate_kernel(
    logits_at: int, stride: int, top_k_at: int, top_p_at: int, min_p_at: int, num_rows: int, size: int
) -> None:
    top_k = carray(pointer(top_k_at), (num_rows,), np.int32)
    top_p = carray(pointer(top_p_at), (num_rows,), np.float32)
    min_p = carray(pointer(min_p_at), (num_rows,), np.float32)
    bins = np.empty(_BINS, np.float64)
    found = np.empty(size, np.float32)
    for row in range(num_rows):
        logits = carray(pointer(logits_at + 4 * stride * row), (size,), np.float32)
        by_k, by_p, by_min = 0 < top_k[row] < size, top_p[row] < 1, min_p[row] > 0
        if not (by_k or by_p or by_min):
            continue
        most = largest(logits, found)
        floor: float = np.float64(most) + math.log(np.float64(min_p[row])) if by_min else -math.inf
        if by_k:
            floor = max(floor, _kth(logits, most, top_k[row], bins, found))
        if by_p:
            floor = max(floor, _pth(logits, most, floor, np.float64(top_p[row]), bins, found))
        for i in range(size):
            logits[i] = logits[i] if logits[i] >= floor else _LEAST


def truncate_cpu(
    logits: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    temperature: Tensor | None = None,
    slot: Tensor | None = None,
) -> Tensor:
    """No sort of the vocabulary: a histogram finds the bin a threshold falls in, and only that bin is sorted."""
    top_k, top_p, min_p = _by_row(top_k, top_p, min_p, temperature, slot)
    assert logits.dtype == top_p.dtype == min_p.dtype == torch.float32 and top_k.dtype == torch.int32
    assert logits.stride(1) == 1 and top_k.is_contiguous() and top_p.is_contiguous() and min_p.is_contiguous()
    rows, size = logits.shape
    assert top_k.shape == top_p.shape == min_p.shape == (rows,)
    _truncate_kernel(
        logits.data_ptr(), logits.stride(0), top_k.data_ptr(), top_p.data_ptr(), min_p.data_ptr(), rows, size
    )
    return logits


def _examples(generator: torch.Generator, device: torch.device, wide: bool) -> Iterable[Example]:
    asked = {
        "top_k": torch.tensor([0, 1, 40, 0, 0, 5, 20, 5, 9999], dtype=torch.int32, device=device),
        "top_p": torch.tensor([1.0, 1.0, 1.0, 0.9, 1.0, 0.5, 0.95, 0.01, 0.999], device=device),
        "min_p": torch.tensor([0.0, 0.0, 0.0, 0.0, 0.05, 0.0, 0.01, 0.0, 0.5], device=device),
    }
    for size, scale in ((1, 1.0), (7, 1.0), (1031, 3.0), (6144, 0.5)):
        logits = torch.randn((9, size), generator=generator) * scale
        logits[5] = logits[5].round()  # ties
        logits[6, 1::2] = -torch.inf
        yield {"logits": logits.to(device), **asked}
    for slot, size in (([3], 700), ([6], 151_936), ([7, 0, 3, 8, 1, 2, 4, 6, 5, 7, 3], 70)):
        logits = torch.randn((len(slot), size), generator=generator) * 2
        if len(slot) > 1:
            logits[2, 1:] = -torch.inf
            logits[7:9] = 0.0
        yield {
            "logits": logits.to(device),
            **asked,
            "temperature": torch.tensor([1.0, 1.0, 0.5, 2.0, 1.0, 1.0, 0.6, 0.0, 1.0], device=device),
            "slot": torch.tensor(slot, device=device),
        }


TRUNCATE = Op(
    name="truncate",
    reference=truncate_reference,
    kernels={"cpu": truncate_cpu, "cuda": truncate_gpu},
    examples=_examples,
    outputs=("logits",),
    tolerance=0.0,
    why="logits are kept or cut, never changed",
)
