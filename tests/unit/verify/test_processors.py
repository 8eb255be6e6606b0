"""Each processor against plain Python, one row and one float64 at a time."""

from __future__ import annotations

import math
import os
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from outrider.core.sampling import SamplingParams
from outrider.kernels.cpu.truncate import truncate_cpu
from outrider.kernels.gpu import truncate as truncate_programs
from outrider.kernels.gpu.truncate import truncate_gpu
from outrider.kernels.truncate import truncate_reference
from outrider.verify.processors.min_tokens import MinTokens
from outrider.verify.processors.temperature import Temperature
from outrider.verify.processors.truncation import Truncation
from outrider.verify.registry import PROCESSORS

INF = math.inf
INTERPRETED = pytest.mark.skipif(
    not os.environ.get("TRITON_INTERPRET"), reason="Triton's interpreter runs where there is no GPU"
)
IMPLEMENTATIONS = pytest.mark.parametrize(
    "truncate", [truncate_reference, truncate_cpu, pytest.param(truncate_gpu, marks=INTERPRETED)]
)


def rows(**tables: list) -> tuple[SimpleNamespace, SimpleNamespace, dict[str, Tensor]]:
    """A batch whose row l belongs to slot l reversed, the slots' temperatures, and a processor's tables."""
    size = len(next(iter(tables.values())))
    batch = SimpleNamespace(logits_slot=torch.arange(size).flip(0), logits_position=torch.full((size,), 10))
    kinds = {"top_k": torch.int32, "min_length": torch.int32, "stop_ids": torch.int64}
    state = {name: torch.tensor(values, dtype=kinds.get(name)).flip(0) for name, values in tables.items()}
    return batch, SimpleNamespace(temperature=state.pop("temperature", None)), state


def cut(logits: list[float], top_k: int, top_p: float, min_p: float) -> list[float]:
    """What is kept, by the definition: min-p, then top-k, then top-p, ties with the last kept."""
    most = max(logits)
    kept = [x for x in logits if x > -INF and (min_p == 0 or x >= most + math.log(min_p))]
    if 0 < top_k < len(logits):
        least = sorted(logits, reverse=True)[top_k - 1]
        kept = [x for x in kept if x >= least]
    if top_p < 1:
        kept.sort(reverse=True)
        weights = [math.exp(x - most) for x in kept]
        needed, so_far, number = top_p * math.fsum(weights), 0.0, 0
        while so_far < needed:
            so_far += weights[number]
            number += 1
        kept = [x for x in kept if x >= kept[number - 1]]
    least = min(kept)
    return [x if x >= least else -INF for x in logits]


@IMPLEMENTATIONS
@pytest.mark.parametrize("kind", ["smooth", "tied", "masked", "steep"])
def test_truncation(truncate, kind: str) -> None:
    generator = torch.Generator().manual_seed(len(kind))
    choices = [(k, p, m) for k in (0, 1, 5, 100, 101) for p in (1.0, 0.9, 0.3, 1e-6) for m in (0.0, 0.1, 1.0)]
    if truncate is truncate_gpu:
        choices = choices[::7]  # the interpreter is slow
    logits = torch.randn((len(choices), 101), generator=generator) * (40.0 if kind == "steep" else 2.0)
    if kind == "tied":
        logits = logits.round()
    if kind == "masked":
        logits[:, ::2] = -INF
    top_k, top_p, min_p = (torch.tensor(column) for column in zip(*choices, strict=True))
    expected = [
        cut(row, int(k), float(p), float(m)) for row, k, p, m in zip(logits.tolist(), top_k, top_p, min_p, strict=True)
    ]
    assert truncate(logits.clone(), top_k.int(), top_p, min_p).tolist() == expected


@IMPLEMENTATIONS
def test_rows_with_everything_off_keep_their_bits(truncate) -> None:
    logits = torch.randn((2, 50), generator=torch.Generator().manual_seed(0))
    logits[:, 3], logits[:, 4] = -0.0, -INF
    out = truncate(logits.clone(), torch.tensor([0, 3], dtype=torch.int32), torch.tensor([1.0, 0.5]), torch.zeros(2))
    assert torch.equal(out[0].view(torch.int32), logits[0].view(torch.int32))
    assert not torch.equal(out[1], logits[1])


@INTERPRETED
def test_truncation_does_not_depend_on_the_programs_that_share_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn((1, 9000), generator=torch.Generator().manual_seed(0))
    found = []
    for programs in (1, 2, 528):
        monkeypatch.setattr(truncate_programs, "_PROGRAMS", programs)
        found.append(truncate_gpu(logits.clone(), torch.tensor([700]).int(), torch.tensor([0.7]), torch.zeros(1)))
    expected = truncate_reference(logits.clone(), torch.tensor([700]).int(), torch.tensor([0.7]), torch.zeros(1))
    assert all(torch.equal(each, expected) for each in found)


def test_truncation_leaves_greedy_rows_alone() -> None:
    batch, slots, state = rows(temperature=[0.0, 1.0], top_k=[1, 1], top_p=[0.5, 0.5], min_p=[0.5, 0.5])
    logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    assert Truncation()(logits, batch, slots, state).tolist() == [[1.0, 2.0, 3.0], [-INF, -INF, 3.0]]


def test_temperature_divides_all_but_greedy_rows() -> None:
    batch, slots, state = rows(temperature=[0.0, 1.0, 0.7, 2.0])
    logits = torch.randn((4, 9), generator=torch.Generator().manual_seed(0))
    out = Temperature()(logits.clone(), batch, slots, state)
    assert torch.equal(out[:2], logits[:2])
    for row, temperature in ((2, 0.7), (3, 2.0)):
        exact = torch.tensor([x / temperature for x in logits[row].tolist()], dtype=torch.float64)
        torch.testing.assert_close(out[row].double(), exact, rtol=2e-7, atol=0)


def test_min_tokens_bars_only_early_positions() -> None:
    stop_ids = [[1, 3, -1], [0, -1, -1], [-1, -1, -1], [1, 99, 0]]
    batch, slots, state = rows(min_length=[11, 10, 50, 12], stop_ids=stop_ids)
    logits = torch.zeros((4, 5))
    logits[:, 0] = -0.0
    out = MinTokens()(logits.clone(), batch, slots, state)
    expected = [[0, -INF, 0, -INF, 0], [0] * 5, [0] * 5, [-INF, -INF, 0, 0, 0]]
    assert out.tolist() == expected
    assert torch.equal(torch.signbit(out[:3]), torch.signbit(torch.tensor(expected[:3])) | signed_zero())


def signed_zero() -> Tensor:
    """The first column was -0.0 and must have stayed so."""
    return torch.tensor([True, False, False, False, False]).expand(3, 5)


def test_min_tokens_looks_at_each_drafts_own_position() -> None:
    batch = SimpleNamespace(logits_slot=torch.zeros(3, dtype=torch.int64), logits_position=torch.tensor([7, 8, 9]))
    state = {"min_length": torch.tensor([9]), "stop_ids": torch.tensor([[2, -1]])}
    out = MinTokens()(torch.zeros((3, 4)), batch, SimpleNamespace(), state)
    assert out[:, 2].tolist() == [-INF, -INF, 0.0]


def test_wanted() -> None:
    cases = {
        SamplingParams(): (),
        SamplingParams(temperature=0.0, top_k=3): (),
        SamplingParams(temperature=0.5): ("temperature",),
        SamplingParams(top_p=0.5): ("truncation",),
        SamplingParams(min_p=0.5, temperature=0.5): ("temperature", "truncation"),
        SamplingParams(temperature=0.0, min_tokens=3): ("min_tokens",),
    }
    for sampling, names in cases.items():
        assert tuple(processor.name for processor in PROCESSORS if processor.wanted(sampling)) == names
