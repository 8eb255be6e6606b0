"""The step operations against plain Python over lists, on random plans."""

from __future__ import annotations

import copy
import os
import random
from dataclasses import fields, replace

import pytest
import torch

from kernel_examples.steps import example_slots
from outrider.kernels.commit import commit_reference, store_draft_reference
from outrider.kernels.cpu.addresses import slots_of
from outrider.kernels.cpu.commit import commit_cpu
from outrider.kernels.cpu.step_inputs import assemble_cpu
from outrider.kernels.embed import EMBED
from outrider.kernels.gpu.commit import commit_gpu, store_draft_gpu
from outrider.kernels.gpu.step_inputs import assemble_gpu
from outrider.kernels.step_inputs import assemble_reference, load_draft, locate
from outrider.tensors import Draft, Slots, Verdict

CPU = torch.device("cpu")
BLOCK = 4
INTERPRETED = pytest.mark.skipif(
    not os.environ.get("TRITON_INTERPRET"), reason="Triton's interpreter runs where there is no GPU"
)
ASSEMBLES = [assemble_reference, assemble_cpu, pytest.param(assemble_gpu, marks=INTERPRETED)]
COMMITS = [commit_reference, commit_cpu, pytest.param(commit_gpu, marks=INTERPRETED)]


def random_plan(seed: int) -> tuple[Slots, list[tuple[int, int, int, int]], int]:
    """Slots in mixed states and rows over some of them: (slot, num_tokens, num_drafts, ends_prompt)."""
    dice = random.Random(seed)
    width, max_len, num_slots = dice.choice([0, 1, 4]), 37, 9
    slots = example_slots(torch.Generator().manual_seed(seed), CPU, num_slots, max_len, width)
    rows = []
    for slot in dice.sample(range(num_slots), dice.randint(1, num_slots)):
        kind = dice.choice(["decode", "chunk", "last chunk"])
        if kind == "decode":
            length = dice.randint(1, max_len - width - 1)
            drafts = dice.randint(0, width)
            state, row = (length, length - 1), (slot, 1 + drafts, drafts, 1)
        else:
            length = dice.randint(2, max_len - 1)
            computed = dice.randint(0, length - 2)
            tokens = length - computed if kind == "last chunk" else dice.randint(1, length - computed - 1)
            state, row = (length, computed), (slot, tokens, 0, int(kind == "last chunk"))
        slots.length[slot], slots.computed[slot] = state
        rows.append(row)
    return slots, rows, width


@pytest.mark.parametrize("assemble", ASSEMBLES)
@pytest.mark.parametrize("seed", range(20))
def test_assemble(assemble, seed: int) -> None:
    slots, rows, _ = random_plan(seed)
    ids, positions, cache, seq_lens, starts, logits_starts = [], [], [], [], [0], [0]
    index, owner, predicted = [], [], []
    for slot, num_tokens, num_drafts, ends_prompt in rows:
        length, computed = int(slots.length[slot]), int(slots.computed[slot])
        text = slots.tokens[slot, :length].tolist() + slots.draft_tokens[slot].tolist()
        for position in range(computed, computed + num_tokens):
            ids.append(text[position])
            positions.append(position)
            cache.append(int(slots.block_table[slot, position // BLOCK]) * BLOCK + position % BLOCK)
        for place in range(len(ids) - num_drafts - 1, len(ids)) if ends_prompt else ():
            index.append(place)
            owner.append(slot)
            predicted.append(positions[place] + 1)
        seq_lens.append(computed + num_tokens)
        starts.append(len(ids))
        logits_starts.append(len(index))
    batch = assemble(slots, torch.tensor(rows), len(ids), len(index), BLOCK)
    expected = {
        "slot": [row[0] for row in rows],
        "query_start": starts,
        "input_ids": ids,
        "positions": positions,
        "seq_lens": seq_lens,
        "block_table": [slots.block_table[row[0]].tolist() for row in rows],
        "cache_slot": cache,
        "num_drafts": [row[2] for row in rows],
        "draft_tokens": [slots.draft_tokens[row[0]].tolist() for row in rows],
        "logits_start": logits_starts,
        "logits_index": index,
        "logits_slot": owner,
        "logits_position": predicted,
    }
    found = {field.name: getattr(batch, field.name) for field in fields(batch) if field.name != "rows"}
    assert {name: value.tolist() for name, value in (found | batch.rows._asdict()).items()} == expected


@pytest.mark.parametrize("assemble", ASSEMBLES)
def test_a_padded_batch_writes_nowhere(assemble) -> None:
    slots, rows, _ = random_plan(3)
    num_query = sum(row[1] for row in rows)
    num_logits = sum(row[2] + 1 for row in rows if row[3])
    alone = assemble(slots, torch.tensor(rows), num_query, num_logits, BLOCK)
    padded = assemble(slots, torch.tensor([*rows, (8, 0, 0, 0), (8, 0, 0, 0)]), num_query + 5, num_logits + 3, BLOCK)
    assert torch.equal(padded.input_ids[:num_query], alone.input_ids)
    for name in ("positions", "cache_slot"):
        assert torch.equal(getattr(padded.rows, name)[:num_query], getattr(alone.rows, name))
    assert (padded.rows.cache_slot[num_query:] == -1).all()
    assert torch.equal(padded.logits_index[:num_logits], alone.logits_index)
    assert padded.rows.query_start[-1] == num_query and padded.logits_start[-1] == num_logits


@pytest.mark.parametrize("commit", COMMITS)
@pytest.mark.parametrize("seed", range(20))
def test_commit(commit, seed: int) -> None:
    slots, rows, width = random_plan(seed)
    dice = random.Random(seed)
    num_logits = sum(row[2] + 1 for row in rows if row[3])
    batch = assemble_reference(slots, torch.tensor(rows), sum(row[1] for row in rows), num_logits, BLOCK)
    before = copy.deepcopy(slots)
    gains = [[dice.randrange(100, 200) for _ in range(dice.randint(1, 1 + row[2]))] if row[3] else [] for row in rows]
    tokens = torch.tensor([gain + [-1] * (width + 1 - len(gain)) for gain in gains])
    count = torch.tensor([len(gain) for gain in gains], dtype=torch.int32)
    verdict = Verdict(tokens, count, torch.zeros(len(gains), dtype=torch.bool))
    committed, next_token = commit(slots, batch, verdict)
    for row, (slot, num_tokens, num_drafts, _) in enumerate(rows):
        length, gain = int(before.length[slot]), gains[row]
        text = before.tokens[slot].tolist()
        text[length : length + len(gain)] = gain
        stand = num_tokens - num_drafts + len(gain) - 1 if gain else num_tokens
        assert slots.tokens[slot].tolist() == text
        assert int(slots.length[slot]) == length + len(gain)
        assert int(slots.computed[slot]) == int(before.computed[slot]) + stand
        assert int(committed[row]) == stand
        assert int(next_token[row]) == text[int(slots.computed[slot])]
        if gain:
            assert int(slots.computed[slot]) == int(slots.length[slot]) - 1
    idle = [slot for slot in range(9) if slot not in {row[0] for row in rows}]
    for name in ("tokens", "length", "computed"):
        assert torch.equal(getattr(slots, name)[idle], getattr(before, name)[idle])


@pytest.mark.parametrize("commit", COMMITS)
def test_commit_never_writes_past_the_end(commit) -> None:
    slots = example_slots(torch.Generator().manual_seed(0), CPU, 3, 10, 3)
    slots.length[:], slots.computed[:] = 8, 7
    before = slots.tokens.clone()
    batch = assemble_reference(slots, torch.tensor([(1, 1, 0, 1)]), 1, 1, BLOCK)
    count = torch.tensor([4], dtype=torch.int32)
    commit(slots, batch, Verdict(torch.tensor([[1, 2, 3, 4]]), count, torch.tensor([False])))
    assert slots.length.tolist() == [8, 10, 8]
    before[1, 8:] = torch.tensor([1, 2])
    assert torch.equal(slots.tokens, before)


def test_drafts_come_back_as_they_were_stored() -> None:
    slots = replace(example_slots(torch.Generator().manual_seed(0), CPU, 5, 16, 2), draft_logits=torch.zeros((5, 2, 3)))
    plan = (torch.tensor([(4, 1, 0, 1), (1, 1, 0, 1)]), 2, 2, BLOCK)
    batch = assemble_reference(slots, *plan)
    draft = Draft(torch.tensor([[1, 2], [3, 4]]), torch.tensor([2, 1], dtype=torch.int32), torch.randn((2, 2, 3)))
    store_draft_reference(slots, batch, draft)
    loaded = load_draft(slots, assemble_reference(slots, *plan))
    assert torch.equal(loaded.tokens, draft.tokens) and torch.equal(loaded.logits, draft.logits)
    assert slots.draft_length.tolist() == [0, 1, 0, 0, 2]


@INTERPRETED
def test_a_row_that_pads_a_batch_stores_no_draft_on_a_gpu() -> None:
    """Several such rows share a slot: what it held would depend on which came last."""
    slots = example_slots(torch.Generator().manual_seed(0), CPU, 5, 16, 2)
    before = slots.draft_tokens.clone()
    batch = assemble_reference(slots, torch.tensor([(4, 1, 0, 1), (1, 0, 0, 0), (1, 0, 0, 0)]), 3, 3, BLOCK)
    draft = Draft(torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.tensor([2, 1, 2], dtype=torch.int32), None)
    store_draft_gpu(slots, batch, draft)
    before[4] = draft.tokens[0]
    assert torch.equal(slots.draft_tokens, before) and slots.draft_length.tolist() == [0, 0, 0, 0, 2]


def test_locate_skips_empty_rows() -> None:
    row, place = locate(torch.tensor([0, 0, 2, 2, 3], dtype=torch.int32), 5)
    assert row.tolist() == [1, 1, 3, 3, 3] and place.tolist() == [0, 1, 0, 1, 2]


def test_a_copy_of_the_slots_has_its_own_addresses() -> None:
    slots = example_slots(torch.Generator().manual_seed(0), CPU, 3, 10, 3)
    assert slots_of(slots) is slots_of(slots)
    for other in (copy.deepcopy(slots), replace(slots, length=slots.length.clone())):
        assert slots_of(other).length == other.length.data_ptr() != slots.length.data_ptr()


@pytest.mark.parametrize("unknown", [-1, 5])
def test_the_embedding_of_an_unknown_token_is_an_error(unknown: int) -> None:
    with pytest.raises(IndexError, match=f"from 0 to 4: .* {unknown}"):
        EMBED.on(CPU)(torch.tensor([0, unknown]), torch.ones(5, 8, dtype=torch.bfloat16), torch.float32)
