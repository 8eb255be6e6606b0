"""The noise: its bits are the same wherever they are made, and nothing about its counter shows in them.

A statistic is compared with its mean in standard deviations; within five for every right answer.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from outrider.kernels.cpu.noise import noise_bits_cpu
from outrider.kernels.noise import (
    GUMBEL_MAX,
    MASK,
    NOISE_BITS,
    gumbel,
    mix,
    noise_bits_reference,
    uniform,
)
from outrider.tensors import Purpose

ONE = torch.ones(1, dtype=torch.int64)


def chi_square(bins: Tensor, num_bins: int) -> float:
    """Standard deviations between the counts of `bins` and evenness."""
    counts = torch.bincount(bins.flatten(), minlength=num_bins).double()
    expected = bins.numel() / num_bins
    freedom = num_bins - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


def grid(axis: str, size: int = 1 << 20) -> Tensor:
    """`size` consecutive values of one part of the counter, the others held."""
    if axis == "index":
        return noise_bits_cpu(ONE * 1234, ONE * 17, Purpose.TARGET, size)[0]
    held, moving = torch.full((size,), 17), torch.arange(size)
    seed, position = {
        "position": (held, moving),
        "seed": (moving, held),
        "high seed": (moving << 32, held),
        "negative seed": (-moving, held),
    }[axis]
    return noise_bits_cpu(seed, position, Purpose.TARGET, 3)[:, 2]


AXES = ["index", "position", "seed", "high seed", "negative seed"]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_every_byte_is_even(axis: str, shift: int) -> None:
    assert abs(chi_square((grid(axis) >> shift) & 255, 256)) < 5


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("apart", [1, 2, 256, 4096])
def test_neighbours_are_independent(axis: str, apart: int) -> None:
    bits = grid(axis)
    for shift in (0, 26):
        part = (bits >> shift) & 63
        assert abs(chi_square(part[apart:] * 64 + part[:-apart], 4096)) < 5


def test_purposes_positions_and_seeds_are_independent_at_every_index() -> None:
    size = 1 << 20
    base = noise_bits_cpu(ONE * 9, ONE * 100, Purpose.TARGET, size)[0]
    for seed, position, purpose in (
        (9, 100, Purpose.ACCEPT),
        (9, 100, Purpose.DRAFT),
        (9, 101, Purpose.TARGET),
        (10, 100, Purpose.TARGET),
        (9 + (1 << 32), 100, Purpose.TARGET),
        (100, 9, Purpose.TARGET),
    ):
        other = noise_bits_cpu(ONE * seed, ONE * position, purpose, size)[0]
        for shift in (0, 26):
            pair = ((base >> shift) & 63) * 64 + ((other >> shift) & 63)
            assert abs(chi_square(pair, 4096)) < 5
        flipped = base ^ other
        share = sum(((flipped >> bit) & 1).double().mean() for bit in range(32)) / 32
        assert abs(float(share) - 0.5) * 2 * (32 * size) ** 0.5 < 5


def test_one_bit_of_the_counter_flips_half_the_noise() -> None:
    rows = 4096
    generator = torch.Generator().manual_seed(0)
    seed = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    position = torch.randint(0, 2**20, (rows,), generator=generator)
    base = noise_bits_cpu(seed, position, Purpose.TARGET, 1)
    changed = [noise_bits_cpu(seed ^ (1 << bit), position, Purpose.TARGET, 1) for bit in range(63)]
    changed += [noise_bits_cpu(seed, position ^ (1 << bit), Purpose.TARGET, 1) for bit in range(20)]
    for other in changed:
        for bit in range(32):
            share = float((((base ^ other) >> bit) & 1).double().mean())
            assert abs(share - 0.5) * 2 * rows**0.5 < 5.5  # 2,656 such tests


def test_kernel_and_reference_agree_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(1)
    edges = torch.tensor([0, 1, -1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, -(2**63)])
    seed = torch.cat([edges, torch.randint(-(2**63), 2**63 - 1, (56,), generator=generator)])
    position = torch.cat([torch.zeros(8, dtype=torch.int64), torch.randint(0, 2**31, (56,), generator=generator)])
    for purpose in Purpose:
        expected = noise_bits_reference(seed, position, purpose, 1000)
        assert torch.equal(expected, noise_bits_cpu(seed, position, purpose, 1000))
        assert expected.min() >= 0 and expected.max() <= MASK


def test_the_definition_in_plain_integers() -> None:
    def scramble(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
        x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
        return x ^ (x >> 16)

    seed, position, purpose, index = 0x0123456789ABCDEF, 4242, 3, 150_000
    a = scramble(((seed & MASK) + 0x9E3779B9) & MASK)
    b = scramble((seed >> 32) ^ a)
    a = scramble(a ^ b ^ position)
    b = scramble((b + a + purpose * 0x85EBCA6B) & MASK)
    a = scramble(a ^ b)
    expected = scramble((scramble(index ^ a) + b) & MASK)
    assert int(NOISE_BITS.reference(ONE * seed, ONE * position, purpose, index + 1)[0, -1]) == expected


def test_mix_is_one_to_one() -> None:
    assert mix(torch.arange(1 << 20)).unique().numel() == 1 << 20


def test_uniform_and_gumbel_stay_finite() -> None:
    ends = torch.tensor([0, MASK])
    assert 0 < uniform(ends)[0] < uniform(ends)[1] < 1
    assert float(gumbel(ends)[0]) < GUMBEL_MAX and torch.isfinite(gumbel(ends)).all()


def test_gumbel_has_its_law() -> None:
    noise = gumbel(grid("index"))
    assert abs(chi_square((torch.exp(-torch.exp(-noise.double())) * 1000).long(), 1000)) < 5
