"""Drawing: greedy rows take the first largest logit, others the Gumbel-max, and nothing else matters."""

from __future__ import annotations

import os

import pytest
import torch

from outrider.kernels.cpu.sample import gumbel_argmax_cpu
from outrider.kernels.cpu.truncate import truncate_cpu
from outrider.kernels.gpu.sample import _gumbel, _gumbel_bound, gumbel_argmax_gpu
from outrider.kernels.gpu.triton import jit, tl
from outrider.kernels.gpu.truncate import truncate_gpu
from outrider.kernels.noise import gumbel
from outrider.kernels.sample import NO_TOKEN, gumbel_argmax_reference
from outrider.kernels.truncate import truncate_reference
from outrider.tensors import Purpose

INTERPRETED = pytest.mark.skipif(
    not os.environ.get("TRITON_INTERPRET"), reason="Triton's interpreter runs where there is no GPU"
)
IMPLEMENTATIONS = pytest.mark.parametrize(
    "draw", [gumbel_argmax_reference, gumbel_argmax_cpu, pytest.param(gumbel_argmax_gpu, marks=INTERPRETED)]
)


def numbers(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(rows) * 7, torch.arange(rows) % 5


@IMPLEMENTATIONS
def test_greedy_takes_the_first_of_equals(draw) -> None:
    logits = torch.tensor(
        [[0.0, -0.0, -1.0], [-5.0, 3.0, 3.0], [-torch.inf, -torch.inf, -torch.inf], [-3.0, -2.0, -4.0]]
    )
    assert draw(logits, torch.zeros(4), *numbers(4), 1).tolist() == [0, 1, NO_TOKEN, 1]


@IMPLEMENTATIONS
def test_masked_tokens_are_never_drawn(draw) -> None:
    logits = torch.full((50, 3000), -torch.inf)
    logits[:, 1234] = -900.0
    logits[:, 2999] = -900.0
    drawn = draw(logits, torch.ones(50), *numbers(50), 1)
    assert set(drawn.tolist()) == {1234, 2999}


@IMPLEMENTATIONS
def test_rows_do_not_depend_on_the_batch(draw) -> None:
    logits = torch.randn((9, 700), generator=torch.Generator().manual_seed(0))
    temperature = torch.tensor([0.0, 1.0, 0.5] * 3)
    together = draw(logits, temperature, *numbers(9), 2)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    seed, position = numbers(9)
    assert torch.equal(draw(logits[order], temperature[order], seed[order], position[order], 2), together[order])


NUMBERS_THAT_ARE_NONE = {
    "nan": torch.tensor(torch.nan),
    "-nan": torch.tensor(-1, dtype=torch.int32).view(torch.float32),
    "inf": torch.tensor(torch.inf),
}


@pytest.mark.parametrize("column", [0, 1023, 1024, 2050, 2999])
@pytest.mark.parametrize("bad", NUMBERS_THAT_ARE_NONE)
@IMPLEMENTATIONS
def test_a_row_without_a_finite_largest_logit_gives_no_token(draw, bad: str, column: int) -> None:
    """Wherever it stands, with noise or without, with ids or without; other rows give their tokens."""
    temperature = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    logits = torch.randn((6, 3000), generator=torch.Generator().manual_seed(4))
    logits[0, 7] = logits[2, 7] = torch.finfo(torch.float32).max
    logits[0, column + 1 :] = logits[2, column + 1 :] = -torch.inf  # masked tokens are no fault
    ids = torch.arange(3000) * 2
    for given in ({}, {"ids": ids}):
        before = draw(logits, temperature, *numbers(6), 1, **given)
        assert (before >= 0).all()
        spoilt = logits.clone()
        spoilt[1::2, column] = NUMBERS_THAT_ARE_NONE[bad]
        after = draw(spoilt, temperature, *numbers(6), 1, **given)
        assert (after[1::2] == NO_TOKEN).all() and torch.equal(after[::2], before[::2])
        greedy = draw(spoilt, None, *numbers(6), 1, **given)
        assert (greedy[1::2] == NO_TOKEN).all() and (greedy[::2] >= 0).all()
    assert draw(torch.full((2, 3000), -torch.inf), torch.arange(2.0), *numbers(2), 1).tolist() == [NO_TOKEN] * 2


@pytest.mark.parametrize("bad", NUMBERS_THAT_ARE_NONE)
@pytest.mark.parametrize(
    "cut", [truncate_reference, truncate_cpu, pytest.param(truncate_gpu, marks=[INTERPRETED, pytest.mark.slow])]
)
def test_truncation_hides_no_row_without_a_token(cut, bad: str) -> None:
    logits = torch.randn((6, 1100), generator=torch.Generator().manual_seed(5))
    logits[:, 1050] = NUMBERS_THAT_ARE_NONE[bad]
    logits[5] = -torch.inf
    top_k = torch.tensor([1, 0, 0, 50, 1100, 3], dtype=torch.int32)
    top_p = torch.tensor([1.0, 1e-38, 1.0, 0.9, 1.0, 0.5])
    min_p = torch.tensor([0.0, 0.0, 1.0, 0.01, 1e-40, 0.1])
    drawn = gumbel_argmax_reference(cut(logits, top_k, top_p, min_p), torch.ones(6), *numbers(6), 1)
    assert drawn.tolist() == [NO_TOKEN] * 6


def test_kernel_and_reference_draw_the_same_tokens() -> None:
    generator = torch.Generator().manual_seed(2)
    for scale in (0.0, 0.3, 3.0, 30.0):
        logits = torch.randn((2000, 1500), generator=generator) * scale
        arguments = (logits, torch.ones(2000), *numbers(2000), int(Purpose.TARGET))
        assert torch.equal(gumbel_argmax_cpu(*arguments), gumbel_argmax_reference(*arguments))


@IMPLEMENTATIONS
def test_kernel_reads_padded_rows(draw) -> None:
    logits = torch.randn((4, 30), generator=torch.Generator().manual_seed(3))
    for view in (logits[:, :20], logits.t()):
        arguments = (view, torch.ones(view.shape[0]), *numbers(view.shape[0]), 1)
        assert torch.equal(draw(*arguments), gumbel_argmax_reference(*arguments))


@IMPLEMENTATIONS
def test_rows_are_drawn_for_their_slots(draw) -> None:
    logits = torch.randn((6, 300), generator=torch.Generator().manual_seed(4))
    temperature, seed = torch.tensor([1.0, 0.0, 0.5]), torch.tensor([5, -7, 2**40])
    slot, position = torch.tensor([2, 0, 1, 1, 0, 2]), torch.arange(6)
    found = draw(logits, temperature, seed, position, 1, slot=slot)
    assert torch.equal(found, gumbel_argmax_reference(logits, temperature[slot], seed[slot], position, 1))
    assert torch.equal(draw(logits, None, seed, position, 1, slot=slot), logits.argmax(-1))


@jit
def _noise_kernel(numbers, exact, bound, BLOCK: tl.constexpr):  # noqa: N803
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(numbers + place).to(tl.uint32)
    tl.store(exact + place, _gumbel(number))
    tl.store(bound + place, _gumbel_bound(number))


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_the_bound_of_the_noise_is_one_and_close_where_noise_is_large(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    powers = 2 ** torch.arange(33)
    near = (powers[:, None] + torch.arange(-16, 16)).flatten()
    scale = torch.rand(1 << 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    log_even = (2 ** (32 * scale)).long()
    numbers = torch.cat([torch.arange(1024), near, log_even]).clamp(0, 2**32 - 1)
    numbers = numbers[: len(numbers) // 1024 * 1024].to(device)
    exact, bound = (torch.full(numbers.shape, torch.nan, device=device) for _ in range(2))
    _noise_kernel[(len(numbers) // 1024,)](numbers, exact, bound, BLOCK=1024)
    assert torch.equal(exact, gumbel(numbers))
    slack = bound.double() - exact.double()
    assert bool((slack > 0).all()) and float(slack[exact > 3].max()) < 1e-3
    assert not bool((slack - 2e-5 > 0).all()), "a bound that is too low would not be noticed"


def test_draws_have_the_softmax_law() -> None:
    rows = 200_000
    logits = torch.tensor([1.5, -1.0, 0.0, 0.3, -torch.inf, 2.0])
    drawn = gumbel_argmax_cpu(logits.repeat(rows, 1), torch.ones(rows), torch.arange(rows), torch.zeros(rows).long(), 1)
    counts, expected = torch.bincount(drawn, minlength=6).double(), logits.double().softmax(0) * rows
    kept = expected > 0
    statistic = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    assert abs(statistic - 4) / 8**0.5 < 5
