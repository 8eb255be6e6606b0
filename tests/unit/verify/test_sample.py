"""Drawing: greedy rows take the first largest logit, others the Gumbel-max, and nothing else matters."""

from __future__ import annotations

import pytest
import torch

from outrider.kernels.sample import gumbel_argmax_cpu, gumbel_argmax_reference
from outrider.tensors import Purpose

IMPLEMENTATIONS = pytest.mark.parametrize("draw", [gumbel_argmax_reference, gumbel_argmax_cpu])


def numbers(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(rows) * 7, torch.arange(rows) % 5


@IMPLEMENTATIONS
def test_greedy_takes_the_first_of_equals(draw) -> None:
    logits = torch.tensor(
        [[0.0, -0.0, -1.0], [-5.0, 3.0, 3.0], [-torch.inf, -torch.inf, -torch.inf], [-3.0, -2.0, -4.0]]
    )
    assert draw(logits, torch.zeros(4), *numbers(4), 1).tolist() == [0, 1, 0, 1]


@IMPLEMENTATIONS
def test_masked_tokens_are_never_drawn(draw) -> None:
    logits = torch.full((500, 3000), -torch.inf)
    logits[:, 1234] = -900.0
    logits[:, 2999] = -900.0
    drawn = draw(logits, torch.ones(500), *numbers(500), 1)
    assert set(drawn.tolist()) == {1234, 2999}


@IMPLEMENTATIONS
def test_rows_do_not_depend_on_the_batch(draw) -> None:
    logits = torch.randn((9, 700), generator=torch.Generator().manual_seed(0))
    temperature = torch.tensor([0.0, 1.0, 0.5] * 3)
    together = draw(logits, temperature, *numbers(9), 2)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    seed, position = numbers(9)
    assert torch.equal(draw(logits[order], temperature[order], seed[order], position[order], 2), together[order])


def test_kernel_and_reference_draw_the_same_tokens() -> None:
    generator = torch.Generator().manual_seed(2)
    for scale in (0.0, 0.3, 3.0, 30.0):
        logits = torch.randn((2000, 1500), generator=generator) * scale
        arguments = (logits, torch.ones(2000), *numbers(2000), int(Purpose.TARGET))
        assert torch.equal(gumbel_argmax_cpu(*arguments), gumbel_argmax_reference(*arguments))


def test_kernel_reads_padded_rows() -> None:
    logits = torch.randn((4, 96), generator=torch.Generator().manual_seed(3))
    for view in (logits[:, :70], logits.t()):
        arguments = (view, torch.ones(view.shape[0]), *numbers(view.shape[0]), 1)
        assert torch.equal(gumbel_argmax_cpu(*arguments), gumbel_argmax_reference(*arguments))


def test_draws_have_the_softmax_law() -> None:
    rows = 200_000
    logits = torch.tensor([1.5, -1.0, 0.0, 0.3, -torch.inf, 2.0])
    drawn = gumbel_argmax_cpu(logits.repeat(rows, 1), torch.ones(rows), torch.arange(rows), torch.zeros(rows).long(), 1)
    counts, expected = torch.bincount(drawn, minlength=6).double(), logits.double().softmax(0) * rows
    kept = expected > 0
    statistic = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    assert abs(statistic - 4) / 8**0.5 < 5
