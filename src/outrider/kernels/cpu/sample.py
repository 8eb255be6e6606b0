"""`kernels.sample` on a CPU."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numba import carray
from torch import Tensor

from outrider.kernels.cpu.addresses import address
from outrider.kernels.cpu.jit import Floats, Kernel, Tokens, compiled, largest, pointer
from outrider.kernels.cpu.noise import native_bits, native_key
from outrider.kernels.noise import GUMBEL_MAX
from outrider.kernels.sample import NO_TOKEN

_BLOCK = 1024
_LN2_STEP = np.float32(math.log(2.0) * 2.0**-23)
_LN2_BASE = np.float32(math.log(2.0) * 151.0 + 1e-3)
_GUMBEL_MAX = np.float32(GUMBEL_MAX)
_NEG_INF, _INF = np.float32(-math.inf), np.float32(math.inf)
_S8 = np.uint32(8)


@compiled()
def _bound(logits: Floats, tokens: Tokens, a: np.uint32, b: np.uint32, bound: Floats) -> None:
    """bound[i] is at least the score of tokens[i].

    gumbel <= -log(u), and a float's own bits are a straight line below its log2: no logarithm is
    taken, so the loops are vectorised, and the few tokens that can win are settled afterwards.
    """
    for i in range(len(logits)):
        bound[i] = np.float32(np.int32(native_bits(a, b, tokens[i]) >> _S8))
    bits = bound.view(np.int32)
    for i in range(len(logits)):
        bound[i] = np.float32(logits[i] + np.float32(_LN2_BASE - np.float32(np.float32(bits[i]) * _LN2_STEP)))


@compiled()
def _greedy_row(logits: Floats, scratch: Floats) -> int:
    best, token = _NEG_INF, 0
    for start in range(0, len(logits), _BLOCK):
        block = logits[start : start + _BLOCK]
        block_max = largest(block, scratch)
        if not block_max < _INF:
            return NO_TOKEN
        if block_max > best:
            best = block_max
            token = start
            while logits[token] != best:
                token += 1
    return token if best > _NEG_INF else NO_TOKEN


@compiled()
def _noisy_row(logits: Floats, ids: Tokens, a: np.uint32, b: np.uint32, scratch: Floats) -> int:
    best, token = _NEG_INF, 0
    for start in range(0, len(logits), _BLOCK):
        block = logits[start : start + _BLOCK]
        block_max = largest(block, scratch)
        if not block_max < _INF:
            return NO_TOKEN
        if block_max + _GUMBEL_MAX <= best:
            continue
        bound = scratch[1 : 1 + len(block)]
        tokens = ids[start : start + _BLOCK]
        _bound(block, tokens, a, b, bound)
        if largest(bound, scratch) <= best:
            continue
        for i in range(len(block)):
            if bound[i] > best:
                u = (np.float64(native_bits(a, b, tokens[i])) + 0.5) * 2.0**-32
                score = np.float32(block[i] + np.float32(-math.log(-math.log1p(-u))))
                if score > best:
                    best, token = score, start + i
    return token if best > _NEG_INF else NO_TOKEN


@cache
def _every_token(size: int) -> Tensor:
    return torch.arange(size)


class Logits(NamedTuple):
    """Rows of logits, `stride` numbers apart, and the token that each column stands for."""

    at: int
    stride: int
    num_rows: int
    size: int
    ids: int
    mapped: bool  # whether the ids are not 0, 1, ...


class Draws(NamedTuple):
    """With which temperature, seed and position each row is drawn, and whether the first two are tables by slot."""

    temperature: int
    noisy: bool
    seed: int
    num_slots: int
    slot: int
    by_slot: bool
    position: int
    purpose: int


@Kernel
def _gumbel_argmax_kernel(given: Logits, draws: Draws, out_at: int) -> None:
    num_rows, size = given.num_rows, given.size
    temperature = carray(pointer(draws.temperature), (draws.num_slots,), np.float32)
    seed = carray(pointer(draws.seed), (draws.num_slots,), np.int64)
    slot = carray(pointer(draws.slot), (num_rows,), np.int64)
    position = carray(pointer(draws.position), (num_rows,), np.int64)
    ids = carray(pointer(given.ids), (size,), np.int64)
    out = carray(pointer(out_at), (num_rows,), np.int64)
    scratch = np.empty(1 + _BLOCK, np.float32)
    for row in range(num_rows):
        logits = carray(pointer(given.at + 4 * given.stride * row), (size,), np.float32)
        owner = slot[row] if draws.by_slot else row
        if not draws.noisy or temperature[owner] == 0:
            out[row] = _greedy_row(logits, scratch)
        else:
            a, b = native_key(seed[owner], position[row], draws.purpose)
            out[row] = _noisy_row(logits, ids, a, b, scratch)
        if given.mapped and out[row] != NO_TOKEN:
            out[row] = ids[out[row]]


def gumbel_argmax_cpu(
    logits: Tensor,
    temperature: Tensor | None,
    seed: Tensor,
    position: Tensor,
    purpose: int,
    ids: Tensor | None = None,
    slot: Tensor | None = None,
) -> Tensor:
    """One pass over the logits, and no noise at all for greedy rows."""
    assert logits.dtype == torch.float32 and seed.dtype == position.dtype == torch.int64
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    temperature = None if temperature is None else temperature.contiguous()
    slot = None if slot is None else slot.contiguous()
    seed, position = seed.contiguous(), position.contiguous()
    rows, size = logits.shape
    owners = seed.shape if slot is not None else (rows,)
    assert temperature is None or (temperature.dtype == torch.float32 and temperature.shape == owners)
    assert seed.shape == owners and position.shape == (rows,)
    assert slot is None or (slot.dtype == torch.int64 and slot.shape == (rows,))
    index = _every_token(size) if ids is None else ids
    assert index.shape == (size,) and index.dtype == torch.int64 and index.is_contiguous()
    out = torch.empty(rows, dtype=torch.int64)
    given = Logits(logits.data_ptr(), logits.stride(0), rows, size, index.data_ptr(), ids is not None)
    draws = Draws(
        address(temperature),
        temperature is not None,
        seed.data_ptr(),
        seed.shape[0],
        address(slot),
        slot is not None,
        position.data_ptr(),
        int(purpose),
    )
    _gumbel_argmax_kernel.launch(given, draws, out.data_ptr())
    return out
