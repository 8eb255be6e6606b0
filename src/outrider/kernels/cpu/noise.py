"""`kernels.noise` on a CPU."""

from __future__ import annotations

import numpy as np
import torch
from numba import carray
from torch import Tensor

from outrider.kernels.cpu.jit import Kernel, compiled, pointer
from outrider.kernels.noise import (
    MASK,
    MULTIPLY_1,
    MULTIPLY_2,
    PURPOSE_STEP,
    START,
)

_MULTIPLY_1, _MULTIPLY_2 = np.uint32(MULTIPLY_1), np.uint32(MULTIPLY_2)
_S15, _S16 = np.uint32(15), np.uint32(16)


@compiled(inline="always")
def native_mix(x: np.uint32) -> np.uint32:
    """`mix` for a CPU kernel. Every result is cut back to uint32, or numba would carry 64 bits along."""
    x = np.uint32(x ^ np.uint32(x >> _S16))
    x = np.uint32(x * _MULTIPLY_1)
    x = np.uint32(x ^ np.uint32(x >> _S15))
    x = np.uint32(x * _MULTIPLY_2)
    return np.uint32(x ^ np.uint32(x >> _S16))


@compiled()
def native_key(seed: int, position: int, purpose: int) -> tuple[np.uint32, np.uint32]:
    """`row_key` for a CPU kernel."""
    a = native_mix(np.uint32((seed & MASK) + START))
    b = native_mix(np.uint32((seed >> 32) & MASK) ^ a)
    a = native_mix(np.uint32(a ^ b ^ np.uint32(position & MASK)))
    b = native_mix(np.uint32(np.int64(b) + np.int64(a) + purpose * PURPOSE_STEP))
    return native_mix(np.uint32(a ^ b)), b


@compiled(inline="always")
def native_bits(a: np.uint32, b: np.uint32, index: int) -> np.uint32:
    """One integer of `noise_bits_reference`, from its row's key."""
    return native_mix(np.uint32(native_mix(np.uint32(np.uint32(index) ^ a)) + b))


@Kernel
def _bits_kernel(seed_at: int, position_at: int, purpose: int, out_at: int, num_rows: int, num_indices: int) -> None:
    seed = carray(pointer(seed_at), (num_rows,), np.int64)
    position = carray(pointer(position_at), (num_rows,), np.int64)
    out = carray(pointer(out_at), (num_rows, num_indices), np.int64)
    for row in range(num_rows):
        a, b = native_key(seed[row], position[row], purpose)
        for index in range(num_indices):
            out[row, index] = native_bits(a, b, index)


def noise_bits_cpu(seed: Tensor, position: Tensor, purpose: int, num_indices: int) -> Tensor:
    """`noise_bits_reference` in one pass."""
    seed, position = seed.contiguous(), position.contiguous()
    assert seed.dtype == position.dtype == torch.int64 and seed.shape == position.shape
    rows = seed.shape[0]
    out = torch.empty((rows, num_indices), dtype=torch.int64)
    _bits_kernel.launch(seed.data_ptr(), position.data_ptr(), int(purpose), out.data_ptr(), rows, num_indices)
    return out
