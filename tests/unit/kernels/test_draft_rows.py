"""The rows of draft models and of EAGLE heads, against what a reader of the contract would write down by hand."""

from __future__ import annotations

import os

import pytest
import torch

from kernel_examples.steps import example_slots
from outrider.kernels.cpu.draft_rows import draft_rows_cpu
from outrider.kernels.draft_rows import draft_rows_reference
from outrider.kernels.gpu.draft_rows import draft_rows_gpu
from outrider.kernels.step_inputs import assemble_reference

INTERPRETED = pytest.mark.skipif(not os.environ.get("TRITON_INTERPRET"), reason="not interpreted")
LIMIT, MASK = 30, 7


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(
    "draft_rows", [draft_rows_reference, draft_rows_cpu, pytest.param(draft_rows_gpu, marks=INTERPRETED)]
)
def test_a_row_holds_the_token_that_its_position_and_the_shift_say(draft_rows, shift: int) -> None:  # type: ignore[no-untyped-def]
    slots = example_slots(torch.Generator().manual_seed(0), torch.device("cpu"), 4, 40, 2)
    slots.length[:] = torch.tensor([12, 20, 9, 5])
    slots.computed[:] = torch.tensor([9, 19, 3, 0])  # two accepted drafts, a decode row, a chunk of a prompt, nobody's
    rows = torch.tensor([[0, 3, 2, 1], [1, 1, 0, 1], [2, 4, 0, 0], [3, 0, 0, 0]])
    batch = assemble_reference(slots, rows, 8, 4, 4)
    committed = torch.tensor([2, 1, 4, 0], dtype=torch.int32)
    found = draft_rows(slots, batch, committed, 2, 1, LIMIT, MASK, 4, shift)
    ids, positions, source, index, starts = [], [], [], [], [0]
    for row, (slot, num_tokens, _, samples) in enumerate(rows.tolist()):
        first, start = int(slots.computed[slot]), int(batch.rows.query_start[row])
        known = int(committed[row]) + 1 - shift if num_tokens else 0
        for position in range(first, first + known + samples):
            last = position >= first + known
            positions.append(position)
            ids.append(MASK if last else int(slots.tokens[slot, position + shift]))
            source.append(start + position - first if position < first + committed[row] else 8)
        if samples:
            index += [starts[-1] + known - 1, starts[-1] + known]
        starts.append(len(ids))
    assert found.rows.query_start.tolist() == starts
    assert len(found.input_ids) == 8 + 4 * (1 - shift + 1)
    assert found.input_ids[: len(ids)].tolist() == ids and not found.input_ids[len(ids) :].any()
    assert found.rows.positions[: len(ids)].tolist() == positions
    assert found.source[: len(ids)].tolist() == source
    assert found.logits_index[:4].tolist() == index
    assert found.length.tolist() == [2, 2, 0, 0]
    assert (found.rows.cache_slot[len(ids) :] == -1).all()
