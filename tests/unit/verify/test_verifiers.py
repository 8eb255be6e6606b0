"""Verdicts row by row, rates that come out as asked, and names that are not known."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernel_examples.steps import example_slots
from outrider.errors import OptionError
from outrider.kernels.accept_drafts import accept_drafts_reference
from outrider.kernels.cpu.accept_drafts import accept_drafts_cpu
from outrider.kernels.gpu.accept_drafts import accept_drafts_gpu
from outrider.kernels.sample import NO_TOKEN
from outrider.kernels.step_inputs import ASSEMBLE
from outrider.tensors import Draft, Purpose, Slots, StepBatch
from outrider.verify.exact import Exact
from outrider.verify.registry import VERIFIERS, build_verifier
from outrider.verify.rejection import Rejection
from outrider.verify.synthetic import Synthetic

CPU = torch.device("cpu")


INTERPRETED = pytest.mark.skipif(
    not os.environ.get("TRITON_INTERPRET"), reason="Triton's interpreter runs where there is no GPU"
)


@pytest.mark.parametrize(
    "judge", [accept_drafts_reference, accept_drafts_cpu, pytest.param(accept_drafts_gpu, marks=INTERPRETED)]
)
def test_judge(judge) -> None:
    starts = torch.tensor([0, 3, 3, 4, 7], dtype=torch.int32)  # two drafts, inside a prompt, none, two
    drafts = torch.tensor([[5, 6, 9], [1, 1, 9], [2, 2, 9], [8, 8, 9]])
    choice = torch.tensor([5, 7, 4, 3, 8, 8, 1])
    tokens, count, invalid = judge(choice, None, starts, drafts)
    assert count.tolist() == [2, 0, 1, 3]
    assert tokens.tolist() == [[5, 7, -1, -1], [-1, -1, -1, -1], [3, -1, -1, -1], [8, 8, 1, -1]]
    stands = torch.tensor([True, True, True, True, False, True, True])
    tokens, count, invalid = judge(choice, stands, starts, drafts)
    assert count.tolist() == [3, 0, 1, 1]
    assert tokens.tolist() == [[5, 6, 4, -1], [-1, -1, -1, -1], [3, -1, -1, -1], [8, -1, -1, -1]]
    assert invalid.dtype == torch.bool and not invalid.any()


@pytest.mark.parametrize(
    "judge", [accept_drafts_reference, accept_drafts_cpu, pytest.param(accept_drafts_gpu, marks=INTERPRETED)]
)
@pytest.mark.parametrize("stands", [None, torch.ones(10, dtype=torch.bool)], ids=["compared", "given"])
def test_a_row_is_invalid_where_it_ends_without_a_token(judge, stands: Tensor | None) -> None:
    starts = torch.tensor([0, 3, 3, 4, 7, 10], dtype=torch.int32)
    drafts = torch.tensor([[5, 6], [1, 1], [2, 2], [8, 8], [4, 4]])
    # at the second draft; inside a prompt; alone; behind both drafts; behind a draft that is not the choice
    choice = torch.tensor([5, NO_TOKEN, 6, NO_TOKEN, 8, 8, NO_TOKEN, 3, NO_TOKEN, NO_TOKEN])
    tokens, count, invalid = judge(choice, stands, starts, drafts)
    last = [[3, -1, -1], 1, False] if stands is None else [[4, 0, -1], 2, True]
    assert tokens.tolist() == [[5, 0, -1], [-1, -1, -1], [0, -1, -1], [8, 8, 0], last[0]]
    assert count.tolist() == [2, 0, 1, 3, last[1]]
    assert invalid.tolist() == [True, False, True, True, last[2]]


def decode_batch(rows: int, width: int, num_drafts: int, position: int) -> tuple[Slots, StepBatch]:
    slots = example_slots(torch.Generator().manual_seed(0), CPU, rows, 64, width)
    slots.length.fill_(position)
    slots.computed.fill_(position - 1)
    slots = replace(slots, seed=torch.arange(rows) * 3 + 1)
    ones = torch.ones(rows, dtype=torch.int64)
    counts = (num_drafts + 1) * rows
    plan = torch.stack((torch.arange(rows), ones * (num_drafts + 1), ones * num_drafts, ones), dim=1)
    return slots, ASSEMBLE.on(CPU)(slots, plan, counts, counts, 4)


def shares(verifier: Synthetic, rows: int, positions: range, width: int = 3) -> Tensor:
    """The share of rounds whose drafts up to each place stand."""
    stood = torch.zeros(width)
    for position in positions:
        slots, batch = decode_batch(rows, width, width, position)
        logits = torch.randn((rows * (width + 1), 11), generator=torch.Generator().manual_seed(position))
        drafts = torch.randint(0, 11, (rows, width), generator=torch.Generator().manual_seed(position))
        verdict = verifier(logits, batch, Draft(drafts, batch.num_drafts, None), slots)
        accepted = verdict.count - 1
        stood += (accepted[:, None] > torch.arange(width)).float().mean(dim=0)
        column = torch.arange(width)
        assert torch.equal(verdict.tokens[:, :width][column < accepted[:, None]], drafts[column < accepted[:, None]])
        last = logits.view(rows, width + 1, 11).argmax(dim=-1).gather(1, accepted[:, None].long())
        assert torch.equal(verdict.tokens.gather(1, accepted[:, None].long()), last)
    return stood / len(positions)


def test_synthetic_rates_come_out() -> None:
    rates = [0.7, 0.42, 0.1]
    rows, rounds = 20_000, range(5, 15)
    errors = shares(Synthetic(rates), rows, rounds) - torch.tensor(rates)
    for error, rate in zip(errors.tolist(), rates, strict=True):
        assert abs(error) / (rate * (1 - rate) / (rows * len(rounds))) ** 0.5 < 5


def test_synthetic_at_its_ends() -> None:
    assert shares(Synthetic([1.0, 1.0, 0.0]), 500, range(5, 6)).tolist() == [1.0, 1.0, 0.0]
    assert shares(Synthetic([1.0]), 500, range(5, 6)).tolist() == [1.0, 0.0, 0.0], "no rate: never accepted"


@pytest.mark.parametrize("rates", [[], [1.1], [-0.1], [0.3, 0.4], [float("nan")]])
def test_synthetic_refuses_rates_that_cannot_be(rates: list[float]) -> None:
    with pytest.raises(OptionError, match="synthetic_rates must"):
        Synthetic(rates)


@pytest.mark.parametrize("verifier", [Exact(), Rejection(), Synthetic([0.5])])
def test_a_step_inside_every_prompt_gains_nothing(verifier) -> None:
    slots = example_slots(torch.Generator().manual_seed(0), CPU, 2, 16, 3)
    slots.computed.zero_()
    batch = ASSEMBLE.on(CPU)(slots, torch.tensor([[0, 2, 0, 0], [1, 3, 0, 0]]), 5, 0, 4)
    draft = Draft(torch.zeros((2, 3), dtype=torch.int64), batch.num_drafts, None)
    verdict = verifier(torch.empty((0, 7)), batch, draft, slots)
    assert verdict.count.tolist() == [0, 0] and (verdict.tokens == -1).all()


def test_rejection_survives_a_drafter_that_is_the_target() -> None:
    rows, width = 2000, 3
    slots, batch = decode_batch(rows, width, width, 9)
    slots.temperature.fill_(1.0)
    logits = torch.randn((rows, width + 1, 30), generator=torch.Generator().manual_seed(0))
    logits[:, :, 0] = -torch.inf
    drafts = logits[:, :width].argmax(dim=-1)
    verdict = Rejection()(logits.view(-1, 30), batch, Draft(drafts, batch.num_drafts, logits[:, :width]), slots)
    assert (verdict.count == width + 1).all() and (verdict.tokens != 0).all()


def test_registry() -> None:
    assert {
        build_verifier(name, synthetic_rates=[0.5] if name == "synthetic" else None).name for name in VERIFIERS
    } == set(VERIFIERS)
    with pytest.raises(OptionError, match=r"unknown verifier: rejektion \(did you mean rejection"):
        build_verifier("rejektion")
    with pytest.raises(OptionError, match="exact has no option synthetic_rates"):
        build_verifier("exact", synthetic_rates=[0.5])
    with pytest.raises(OptionError, match="synthetic needs synthetic_rates"):
        build_verifier("synthetic", synthetic_rates=None)


def test_what_each_verifier_declares() -> None:
    assert Exact.draft_noise is Purpose.TARGET and Rejection.draft_noise is Purpose.DRAFT
    assert Exact.faithful and Rejection.faithful and not Synthetic.faithful
