"""Slots hold one request's state at a time, and nothing of the one before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from outrider.core.plan import Admission, Growth, Row, StepPlan
from outrider.core.sampling import SamplingParams
from outrider.core.sizes import Sizes
from outrider.draft.base import DraftContext, Drafter, DraftOptions, TargetFacts
from outrider.runner.drafter_guard import DrafterGuard
from outrider.runner.slots import SlotTable
from outrider.tensors import Draft
from outrider.verify.base import Verifier
from outrider.verify.exact import Exact
from outrider.verify.registry import PROCESSORS
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
        sizes=replace(FACTS.sizes, block_size=8),
        drafter=DrafterGuard(drafter, verifier),
        processors=PROCESSORS,
        device=CPU,
    )


def state(table: SlotTable, name: str) -> Mapping[str, Tensor]:
    """The tables of a processor."""
    (found,) = (state for processor, state in table.all_processors if processor.name == name)
    return found


def assert_filled(table: SlotTable) -> None:
    """No table of a processor holds anything."""
    for processor, tables in table.all_processors:
        for one in processor.tables:
            assert bool((tables[one.name] == one.fill).all()), (processor.name, one.name)


@pytest.fixture
def table(witness: Witness) -> SlotTable:
    return make_table(witness, Exact())


def plan(
    admit: Sequence[Admission] = (), release: Sequence[int] = (), grow: Sequence[Growth] = (), step: int = 0
) -> StepPlan:
    return StepPlan(step, tuple(release), tuple(admit), tuple(grow), ())


def admission(slot: int, stop_ids: Sequence[int] = (), seed: int = 5, **sampling: Any) -> Admission:
    return Admission(slot, (3, 1, 2), 2, 0, SamplingParams(**{"max_tokens": None, **sampling}), seed, tuple(stop_ids))


def test_an_admission_fills_every_table(table: SlotTable) -> None:
    given = admission(2, [7, 8], 2**63 - 1, temperature=0.5, top_k=4, top_p=0.9, min_p=0.1, min_tokens=3)
    table.update(plan([given], grow=[Growth(2, 0, (6, 5)), Growth(2, 2, (9,))]))
    slots = table.slots
    assert slots.tokens[2, :3].tolist() == [3, 1, 2]
    found = [getattr(slots, name)[2].item() for name in ("length", "computed", "seed")]
    assert found == [3, 0, 2**63 - 1] and slots.temperature[2] == 0.5
    truncation, min_tokens = state(table, "truncation"), state(table, "min_tokens")
    assert [truncation[name][2].item() for name in ("top_k", "top_p", "min_p")] == pytest.approx([4, 0.9, 0.1])
    assert min_tokens["min_length"][2] == 2 + 3 and min_tokens["stop_ids"][2, :3].tolist() == [7, 8, -1]
    assert slots.block_table[2, :3].tolist() == [6, 5, 9]
    assert slots.draft_length[2] == 0


def test_nothing_is_left_of_the_one_before(table: SlotTable) -> None:
    first = admission(1, [7, 8, 6], temperature=0.5, top_k=4, top_p=0.9, min_p=0.1, min_tokens=3)
    table.update(plan([first]))
    table.slots.draft_length[1] = 3
    table.slots.computed[1] = 20
    table.update(plan([admission(1, [4], temperature=0.0)], release=[1]))
    slots = table.slots
    assert [slots.draft_length[1].item(), slots.computed[1].item(), slots.temperature[1].item()] == [0, 0, 0.0]
    assert_filled(table)
    table.update(plan([admission(1, [4], min_tokens=9)], release=[1]))
    ids = state(table, "min_tokens")["stop_ids"][1]
    assert ids.tolist() == [4] + [-1] * (len(ids) - 1)
    assert state(table, "min_tokens")["min_length"].tolist() == [0, 2 + 9, 0, 0]


def test_an_interrupted_admission_leaves_nothing_either(table: SlotTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a slot whose admission was cut short are emptied for the next request in it."""
    table.update(plan([admission(1, [7], min_tokens=3)]))
    with monkeypatch.context() as patch:
        patch.setattr(table, "_register", lambda admission: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            table.update(plan([admission(2, top_k=4), admission(3, top_k=3)]))
    table.reset()
    table.update(plan([admission(slot, temperature=0.0) for slot in range(4)]))
    assert_filled(table)


def test_whole_numbers_past_a_tables_largest_are_the_largest(table: SlotTable) -> None:
    table.update(plan([admission(0, top_k=2**40), admission(1, min_tokens=2**40)._replace(stop_ids=(1,))]))
    assert state(table, "truncation")["top_k"][0] == 2**31 - 1
    assert state(table, "min_tokens")["min_length"][1] == 2**31 - 1


def test_the_drafter_is_told_in_order(table: SlotTable, witness: Witness) -> None:
    table.update(plan([admission(0)]))
    table.update(plan([admission(0), admission(1)], release=[0]))
    admitted = [("admit", slot, [3, 1, 2]) for slot in (0, 0, 1)]
    assert witness.told == [admitted[0], ("release", 0), *admitted[1:]]


def test_only_wanted_processors_run(table: SlotTable) -> None:
    def wanted() -> list[str]:
        return [processor.name for processor, _ in table.processors()]

    assert wanted() == []
    table.update(plan([admission(0, temperature=0.5), admission(1, temperature=0.5, top_k=2)]))
    assert wanted() == ["temperature", "truncation"]
    table.update(plan([admission(2, temperature=0.0, top_k=2, min_tokens=1)], release=[1]))
    assert wanted() == ["min_tokens", "temperature"]
    table.update(plan(release=[0, 2]))
    assert wanted() == []
    table.update(plan([admission(3, temperature=1.0)]))
    assert wanted() == []


def test_a_processor_is_asked_once_whether_a_request_wants_it(
    table: SlotTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two answers could differ, and its slot would then be released by one and kept by the other."""
    asked: list[Any] = []
    temperature = next(processor for processor, _ in table.all_processors if processor.name == "temperature")
    monkeypatch.setattr(type(temperature), "wanted", lambda self, sampling: asked.append(sampling) or True)
    table.update(plan([admission(0), admission(1)]))
    assert len(asked) == 2


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
