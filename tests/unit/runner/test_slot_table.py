"""Slots hold one request's state at a time, and nothing of the one before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from outrider.core.plan import Admission, Growth, Row, StepPlan
from outrider.core.sampling import SamplingParams
from outrider.core.sizes import Sizes
from outrider.draft.base import DraftContext, Drafter, DraftOptions, TargetFacts
from outrider.runner.slots import SlotTable
from outrider.tensors import Draft
from outrider.verify.base import Verifier
from outrider.verify.exact import Exact
from outrider.verify.processors import PROCESSORS
from outrider.verify.rejection import Rejection

CPU = torch.device("cpu")
FACTS = TargetFacts(9, 8, 1, Sizes(32, 4, 64, 16), CPU, torch.float32)


class Witness(Drafter):
    """Remembers what it was told."""

    name = "witness"
    needs = frozenset()

    def __init__(self) -> None:
        super().__init__(DraftOptions(num_speculative_tokens=3), FACTS)
        self.told: list[tuple[Any, ...]] = []

    def propose(self, context: DraftContext) -> Draft:
        raise NotImplementedError

    def admit(self, slot: int, tokens: Sequence[int]) -> None:
        self.told.append(("admit", slot, list(tokens)))

    def release(self, slot: int) -> None:
        self.told.append(("release", slot))


@pytest.fixture
def witness() -> Witness:
    return Witness()


def make_table(drafter: Drafter, verifier: Verifier) -> SlotTable:
    return SlotTable(
        num_slots=4,
        max_len=32,
        max_blocks=4,
        drafter=drafter,
        verifier=verifier,
        processors=PROCESSORS,
        device=CPU,
    )


@pytest.fixture
def table(witness: Witness) -> SlotTable:
    return make_table(witness, Exact())


def plan(
    admit: Sequence[Admission] = (), release: Sequence[int] = (), grow: Sequence[Growth] = (), step: int = 0
) -> StepPlan:
    return StepPlan(step, tuple(release), tuple(admit), tuple(grow), ())


def admission(slot: int, stop_ids: Sequence[int] = (), seed: int = 5, **sampling: Any) -> Admission:
    return Admission(slot, (3, 1, 2), 2, 0, SamplingParams(**sampling), seed, tuple(stop_ids))


def test_an_admission_fills_every_table(table: SlotTable) -> None:
    given = admission(2, [7, 8], 2**63 - 1, temperature=0.5, top_k=4, top_p=0.9, min_p=0.1, min_tokens=3)
    table.update(plan([given], grow=[Growth(2, 0, (6, 5)), Growth(2, 2, (9,))]))
    slots = table.slots
    assert slots.tokens[2, :3].tolist() == [3, 1, 2]
    found = [getattr(slots, name)[2].item() for name in ("length", "computed", "top_k", "seed", "min_length")]
    assert found == [3, 0, 4, 2**63 - 1, 2 + 3]
    floats = [getattr(slots, name)[2].item() for name in ("temperature", "top_p", "min_p")]
    assert floats == pytest.approx([0.5, 0.9, 0.1])
    assert slots.barred[2, :3].tolist() == [7, 8, -1] and slots.block_table[2, :3].tolist() == [6, 5, 9]
    assert slots.draft_length[2] == 0


def test_nothing_is_left_of_the_one_before(table: SlotTable) -> None:
    first = admission(1, [7, 8, 6], temperature=0.5, top_k=4, top_p=0.9, min_p=0.1, min_tokens=3)
    table.update(plan([first]))
    table.slots.draft_length[1] = 3
    table.slots.computed[1] = 20
    table.update(plan([admission(1, [4], temperature=0.0)], release=[1]))
    slots = table.slots
    assert slots.barred[1].tolist() == [4] + [-1] * (slots.barred.shape[1] - 1)
    assert [slots.top_k[1].item(), slots.draft_length[1].item(), slots.computed[1].item()] == [0, 0, 0]
    assert [slots.temperature[1].item(), slots.top_p[1].item(), slots.min_p[1].item()] == [0.0, 1.0, 0.0]
    assert slots.min_length[1] == 2


def test_the_drafter_is_told_in_order(table: SlotTable, witness: Witness) -> None:
    table.update(plan([admission(0)]))
    table.update(plan([admission(0), admission(1)], release=[0]))
    admitted = [("admit", slot, [3, 1, 2]) for slot in (0, 0, 1)]
    assert witness.told == [admitted[0], ("release", 0), *admitted[1:]]


def test_only_wanted_processors_run(table: SlotTable) -> None:
    def wanted() -> list[str]:
        return [processor.name for processor in table.processors()]

    assert wanted() == []
    table.update(plan([admission(0, temperature=0.5), admission(1, temperature=0.5, top_k=2)]))
    assert wanted() == ["temperature", "truncation"]
    table.update(plan([admission(2, temperature=0.0, top_k=2, min_tokens=1)], release=[1]))
    assert wanted() == ["min_tokens", "temperature"]
    table.update(plan(release=[0, 2]))
    assert wanted() == []
    table.update(plan([admission(3, temperature=1.0)]))
    assert wanted() == []


@pytest.mark.parametrize("gives", [False, True])
@pytest.mark.parametrize("verifier", [Exact(), Rejection()], ids=lambda verifier: verifier.name)
def test_draft_logits_are_kept_where_one_gives_and_the_other_reads_them(
    witness: Witness, gives: bool, verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Witness, "gives_logits", gives)
    logits = make_table(witness, verifier).slots.draft_logits
    assert (logits is not None) == (gives and verifier.name == "rejection")
    assert logits is None or logits.shape == (4, 3, 9)


def test_drafts_are_wanted_while_a_row_s_request_takes_any(table: SlotTable) -> None:
    def wanted(*slots: int) -> bool:
        return table.drafts(StepPlan(1, (), (), (), tuple(Row(slot, 1, 0, True) for slot in slots)))

    table.update(plan([admission(0), admission(1)._replace(drafts=False)]))
    assert wanted(0) and wanted(0, 1) and not wanted(1)
    table.update(plan([admission(0)._replace(drafts=False)], release=[0]))
    assert not wanted(0, 1)
    table.update(plan([admission(1)], release=[1]))
    assert wanted(0, 1)
    table.reset()
    assert not wanted(0, 1)
