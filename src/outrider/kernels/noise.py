"""Counter-based random numbers: a pure function of (seed, position, purpose, vocabulary index).

Never of the batch, the slot or the step, so a request gets the same noise wherever it runs. The
integers are defined by 32-bit arithmetic alone (xor, add, multiply, shift), so that torch, the CPU
kernel and a GPU kernel give the same bits.

    (a, b) = row_key(seed, position, purpose)      five rounds; one-to-one in the seed
    bits   = mix(mix(index ^ a) + b)               32 bits an index
    u      = (bits + 0.5) * 2**-32                 in (0, 1), exact in float64
    Gumbel = -log(-log1p(-u))                      in float64, then rounded to float32

A large Gumbel number comes from a small u, where the spacing of 2**-32 is finest: the largest is
22.9. `mix` is the finaliser "lowbias32" (Wellons, "Prospecting for hash functions", 2018).
"""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.op import Op

MASK = 0xFFFFFFFF
MULTIPLY_1 = 0x7FEB352D
MULTIPLY_2 = 0x846CA68B
START = 0x9E3779B9
PURPOSE_STEP = 0x85EBCA6B
GUMBEL_MAX = 22.9
"""No Gumbel number is larger."""


def mix(x: Tensor) -> Tensor:
    """A one-to-one scrambling of 32 bits held in int64; products wrap, and the mask keeps what uint32 would."""
    x = x ^ (x >> 16)
    x = (x * MULTIPLY_1) & MASK
    x = x ^ (x >> 15)
    x = (x * MULTIPLY_2) & MASK
    return x ^ (x >> 16)


def row_key(seed: Tensor, position: Tensor, purpose: int) -> tuple[Tensor, Tensor]:
    """Two 32-bit keys for each (seed [L] int64, position [L] int64, purpose): [L] int64, [L] int64."""
    a = mix(((seed & MASK) + START) & MASK)
    b = mix(((seed >> 32) & MASK) ^ a)
    a = mix(a ^ b ^ (position & MASK))
    b = mix((b + a + purpose * PURPOSE_STEP) & MASK)
    return mix(a ^ b), b


def noise_bits_reference(seed: Tensor, position: Tensor, purpose: int, num_indices: int) -> Tensor:
    """The raw integers: seed [L] int64, position [L] int64 -> [L, num_indices] int64, each below 2**32."""
    return bits_at(seed, position, purpose, torch.arange(num_indices, device=seed.device))


def bits_at(seed: Tensor, position: Tensor, purpose: int, index: Tensor) -> Tensor:
    """`noise_bits_reference` at some indices only: index [N] int64 -> [L, N] int64."""
    a, b = row_key(seed, position, purpose)
    return mix((mix(index[None, :] ^ a[:, None]) + b[:, None]) & MASK)


def uniform(bits: Tensor) -> Tensor:
    """Float64 in (0, 1), never either end."""
    return (bits.double() + 0.5) * 2.0**-32


def gumbel(bits: Tensor) -> Tensor:
    """Float32 from the standard Gumbel distribution, so that argmax(logits + gumbel) is a draw from softmax(logits)."""
    return -torch.log(-torch.log1p(-uniform(bits))).float()


NOISE_BITS = Op(
    name="noise_bits",
    reference=noise_bits_reference,
    tolerance=0.0,
    why="the integers define the noise, so they must agree to the last bit",
)
