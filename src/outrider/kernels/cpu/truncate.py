"""`kernels.truncate` on a CPU."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import torch
from numba import carray
from torch import Tensor

from outrider.kernels.cpu.jit import Floats, Kernel, compiled, largest, pointer
from outrider.kernels.truncate import by_row

Bins: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.float64]]"

_BINS = 2048
_BINS_PER_NAT = np.float32(64.0)
_NEG_INF, _INF = np.float32(-math.inf), np.float32(math.inf)


@compiled(inline="always")
def _bin(value: np.float32, maximum: np.float32) -> np.int64:
    """Which bin a logit falls in, the largest logits first; never decreasing as logits fall."""
    distance = np.float32(np.float32(maximum - value) * _BINS_PER_NAT)
    return np.int64(distance) if distance < _BINS - 1 else np.int64(_BINS - 1)


@compiled()
def _bin_sorted(logits: Floats, maximum: np.float32, floor: float, bin_index: int, found: Floats) -> Floats:
    """The logits of one bin that are no less than `floor`, falling."""
    count = 0
    for value in logits:
        if value >= floor and _bin(value, maximum) == bin_index:
            found[count] = value
            count += 1
    return np.sort(found[:count])[::-1]


@compiled()
def _kth(logits: Floats, maximum: np.float32, k: int, counts: Bins, found: Floats) -> float:
    counts[:] = 0
    for value in logits:
        counts[_bin(value, maximum)] += 1
    bin_index = 0
    while counts[bin_index] < k:
        k -= int(counts[bin_index])
        bin_index += 1
    return np.float64(_bin_sorted(logits, maximum, -math.inf, bin_index, found)[k - 1])


@compiled()
def _pth(logits: Floats, maximum: np.float32, floor: float, top_p: float, mass: Bins, found: Floats) -> float:
    mass[:] = 0.0
    for value in logits:
        if value >= floor:
            mass[_bin(value, maximum)] += math.exp(np.float64(value) - maximum)
    wanted = top_p * mass.sum()
    before = 0.0
    for bin_index in range(_BINS):
        if before + mass[bin_index] >= wanted:
            last = np.float64(maximum)
            for value in _bin_sorted(logits, maximum, floor, bin_index, found):
                if before >= wanted:
                    break
                last = np.float64(value)
                before += math.exp(last - maximum)
            return last
        before += mass[bin_index]
    return -math.inf


@Kernel
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
        maximum = largest(logits, found)
        if not _NEG_INF < maximum < _INF:
            continue
        floor: float = np.float64(maximum) + math.log(np.float64(min_p[row])) if by_min else -math.inf
        if by_k:
            floor = max(floor, _kth(logits, maximum, top_k[row], bins, found))
        if by_p:
            floor = max(floor, _pth(logits, maximum, floor, np.float64(top_p[row]), bins, found))
        for i in range(size):
            logits[i] = logits[i] if logits[i] >= floor else _NEG_INF


def truncate_cpu(
    logits: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    temperature: Tensor | None = None,
    slot: Tensor | None = None,
) -> Tensor:
    """No sort of the vocabulary: a histogram finds the bin a threshold falls in, and only that bin is sorted."""
    top_k, top_p, min_p = by_row(top_k, top_p, min_p, temperature, slot)
    assert logits.dtype == top_p.dtype == min_p.dtype == torch.float32 and top_k.dtype == torch.int32
    assert logits.stride(1) == 1 and top_k.is_contiguous() and top_p.is_contiguous() and min_p.is_contiguous()
    rows, size = logits.shape
    assert top_k.shape == top_p.shape == min_p.shape == (rows,)
    _truncate_kernel.launch(
        logits.data_ptr(), logits.stride(0), top_k.data_ptr(), top_p.data_ptr(), min_p.data_ptr(), rows, size
    )
    return logits
