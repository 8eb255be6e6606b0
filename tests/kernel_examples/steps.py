"""Arguments for the ops around a step: its inputs, its drafts, and what it leaves."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from outrider.kernels.commit import commit_reference
from outrider.kernels.step_inputs import assemble_reference
from outrider.tensors import Draft, Purpose, Slots, Verdict

Example = Mapping[str, Any]


def example_slots(generator: torch.Generator, device: torch.device, num_slots: int, max_len: int, width: int) -> Slots:
    """Slots full of distinct values, one token behind; block 0 of a table is never used."""

    def move(table: Any) -> Any:
        return None if table is None else table.to(device)

    blocks = -(-max_len // 4)
    length = torch.randint(max_len // 4, max_len // 2, (num_slots,), generator=generator).int()
    slots = Slots(
        tokens=torch.arange(num_slots * max_len).view(num_slots, max_len),
        length=length,
        computed=length - 1,
        block_table=1 + torch.randperm(num_slots * blocks, generator=generator).view(num_slots, blocks).int(),
        temperature=torch.zeros(num_slots),
        seed=torch.arange(num_slots),
        draft_tokens=10_000 + torch.arange(num_slots * width).view(num_slots, width),
        draft_length=torch.zeros(num_slots, dtype=torch.int32),
        draft_logits=None,
    )
    return Slots(**{field.name: move(getattr(slots, field.name)) for field in fields(slots)})


Case = tuple[int, int, int, int]
"""A plan's row: slot, num_tokens, num_drafts, ends_prompt."""


def example_rows(generator: torch.Generator, num_rows: int, width: int, num_empty: int = 0) -> list[Case]:
    """Rows with 0 to `width` drafts, every eighth inside its prompt or at its end; then `num_empty` that pad."""
    drafts = torch.randint(0, width + 1, (num_rows,), generator=generator).tolist()
    drafts[0] = width
    rows = []
    for slot, drafted in enumerate(drafts):
        chunk = slot % 8 == 7
        rows.append((slot, 9 if chunk else drafted + 1, 0 if chunk else drafted, int(not chunk or slot % 16 == 7)))
    return rows[::-1] + [(num_rows, 0, 0, 0)] * num_empty


def example_step(
    generator: torch.Generator, device: torch.device, rows: list[Case], width: int
) -> tuple[Slots, Tensor]:
    """Slots in which such rows can be run, and the rows as a plan."""
    slots = example_slots(generator, device, max(row[0] for row in rows) + 4, 37 if width < 8 else 80, width)
    for slot, num_tokens, num_drafts, ends in rows:
        behind = num_tokens - num_drafts + (0 if ends else 2)
        slots.computed[slot] = max(int(slots.length[slot]) - behind, 0)
    return slots, torch.tensor(rows, device=device)


def assemble(generator: torch.Generator, device: torch.device, wide: bool) -> Iterable[Example]:
    # a decode row, drafts, a chunk inside a prompt, a prompt's end, padding
    mixed = [(2, 1, 0, 1), (0, 4, 3, 1), (5, 2, 1, 1), (3, 7, 0, 0), (1, 5, 0, 1), (6, 0, 0, 0), (6, 0, 0, 0)]
    for width, padding, rows in (
        (0, 0, [(1, 1, 0, 1)]),
        (3, 0, [(4, 4, 3, 1)]),
        (3, 2, mixed),
        (3, 8, [(6, 0, 0, 0), (6, 0, 0, 0)]),
        (32, 40, example_rows(generator, 2, 32)),
        (1, 3, example_rows(generator, 33, 1)),
        (7, 21, example_rows(generator, 125, 7, num_empty=3)),
    ):
        slots, plan = example_step(generator, device, rows, width)
        yield {
            "slots": slots,
            "plan": plan,
            "num_query": sum(row[1] for row in rows) + padding,
            "num_logits": sum(row[2] + 1 for row in rows if row[3]) + padding,
            "block_size": 4,
        }


def accept_drafts(generator: torch.Generator, device: torch.device, wide: bool) -> Iterable[Example]:
    for width, owned, padding in (
        (0, [1], 0),
        (3, [4], 0),
        (3, [0, 0], 0),
        (3, [0, 0], 2),
        (5, [1, 0, 6, 4, 2, 6, 3], 3),
        (32, [33, 1, 20], 0),
        (1, torch.randint(0, 3, (33,), generator=generator).tolist(), 1),
        (7, torch.randint(0, 9, (128,), generator=generator).tolist(), 0),
    ):
        logits_start = torch.tensor([0, *owned]).cumsum(0).int()
        choice = torch.randint(-1, 2, (sum(owned) + padding,), generator=generator)
        drafts = torch.randint(0, 2, (len(owned), width), generator=generator)
        is_accepted = torch.randint(0, 2, (sum(owned) + padding,), generator=generator).bool()
        for test in (None, is_accepted.to(device)):
            yield {
                "choice": choice.to(device),
                "is_accepted": test,
                "logits_start": logits_start.to(device),
                "draft_tokens": drafts.to(device),
            }


def commit(generator: torch.Generator, device: torch.device, wide: bool) -> Iterable[Example]:
    mixed = [(2, 1, 0, 1), (0, 4, 3, 1), (5, 2, 1, 1), (3, 7, 0, 0), (1, 5, 0, 1)]
    for width, rows in (
        (0, [(1, 1, 0, 1)]),
        (3, [(4, 4, 3, 1)]),
        (3, mixed),
        (32, example_rows(generator, 2, 32)),
        (1, example_rows(generator, 33, 1)),
        (7, example_rows(generator, 125, 7, num_empty=3)),
    ):
        slots, plan = example_step(generator, device, rows, width)
        num_query, num_logits = sum(row[1] for row in rows), sum(row[2] + 1 for row in rows if row[3])
        batch = assemble_reference(slots, plan, num_query, num_logits, 4)
        part = torch.rand(len(rows), generator=generator).to(device)
        count = (plan[:, 3] * (1 + part * (plan[:, 2] + 1)).floor()).int()
        column = torch.arange(width + 1, device=device)
        tokens = torch.where(column < count[:, None], 20_000 + 100 * batch.slot[:, None] + column, -1)
        yield {"slots": slots, "batch": batch, "verdict": Verdict(tokens, count, count < 0)}
    full = copy.deepcopy(slots)  # no room for all that is gained
    full.length[:] = full.tokens.shape[1] - 2
    full.computed[:] = full.length - 1
    yield {"slots": full, "batch": batch, "verdict": Verdict(tokens, count, count < 0)}


def store_draft(generator: torch.Generator, device: torch.device, wide: bool) -> Iterable[Example]:
    for example in commit(generator, device, wide):
        slots, batch = example["slots"], example["batch"]
        size, width = batch.draft_tokens.shape
        real = batch.rows.query_start.diff() > 0
        drawn = torch.randint(-5, 99, (size, width), generator=generator).to(device)
        tokens = torch.where(real[:, None], drawn, batch.draft_tokens)
        length = torch.where(real, width, slots.draft_length[batch.slot])
        yield {"slots": slots, "batch": batch, "draft": Draft(tokens, length.int(), None)}
        if 0 < size < 34 and width > 0:
            keeping = replace(slots, draft_logits=torch.zeros(len(slots.length), width, 301, device=device))
            logits = torch.randn(size, width, 301, generator=generator).to(device)
            yield {"slots": keeping, "batch": batch, "draft": Draft(tokens, length.int(), logits)}


def draft_rows(generator: torch.Generator, device: torch.device, wide: bool) -> Iterable[Example]:
    mixed = [(2, 1, 0, 1), (0, 4, 3, 1), (5, 3, 2, 1), (3, 7, 0, 0), (1, 5, 0, 1)]
    for rows, width, padding, num_drafts, num_masks in (
        ([(1, 1, 0, 1)], 3, 0, 3, 0),
        ([(4, 4, 3, 1)], 3, 0, 3, 2),
        (mixed, 3, 0, 4, 3),
        (example_rows(generator, 2, 32), 32, 30, 32, 31),
        (example_rows(generator, 33, 1), 1, 2, 1, 0),
        (example_rows(generator, 125, 7, num_empty=3), 7, 24, 7, 6),
    ):
        for limit in (37, 14) if len(rows) < 9 else (22,):
            slots, plan = example_step(generator, device, rows, width)
            num_query, num_logits = sum(row[1] for row in rows), sum(row[2] + 1 for row in rows if row[3])
            batch = assemble_reference(slots, plan, num_query + padding, num_logits + padding, 4)
            part = torch.rand(len(rows), generator=generator).to(device)
            count = (plan[:, 3] * (1 + part * (plan[:, 2] + 1)).floor()).int()
            gained = torch.full((len(rows), width + 1), 7, device=device)
            committed, _ = commit_reference(slots, batch, Verdict(gained, count, count < 0))
            example = {
                "slots": slots,
                "batch": batch,
                "committed": committed,
                "num_drafts": num_drafts,
                "num_masks": num_masks,
                "limit": limit,
                "mask_token": 9,
                "block_size": 4,
            }
            yield {**example, "shift": 1}
            yield {**example, "shift": 0}


def ngram_lookup(generator: torch.Generator, device: torch.device, wide: bool) -> Iterable[Example]:
    for max_len, alphabet, num_drafts, shortest, longest in (
        (1, 2, 1, 1, 1),
        (9, 2, 3, 1, 2),
        (65, 3, 5, 2, 4),
        (301, 40, 7, 1, 3),
        (4999, 150, 8, 2, 3),  # of three tokens there is one copy or none
        (40_960, 3000, 32, 1, 3),
    ):
        rows = 7
        length = torch.randint(1, max_len + 1, (rows,), generator=generator).int()
        length[0] = max_len
        owned = torch.tensor([1, 1, 0, 2, 1, 1, 1])
        yield {
            "tokens": torch.randint(0, alphabet, (rows, max_len), generator=generator).to(device),
            "length": length.to(device),
            "slot": torch.randperm(rows, generator=generator).to(device),
            "logits_start": torch.nn.functional.pad(owned.cumsum(0), (1, 0)).int().to(device),
            "num_drafts": num_drafts,
            "shortest": shortest,
            "longest": longest,
        }
    # A copy must not reach past the start of its own row: the token there, and at the row's end, would lengthen it.
    yield {
        "tokens": torch.tensor([[1, 2, 1, 2]] * 2, device=device),
        "length": torch.full((2,), 3, dtype=torch.int32, device=device),
        "slot": torch.tensor([1, 0], device=device),
        "logits_start": torch.arange(3, dtype=torch.int32, device=device),
        "num_drafts": 4,
        "shortest": 1,
        "longest": 3,
    }


def report(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    for rows, drafts in ((1, 0), (5, 7), (33, 1)):
        counts = torch.randint(0, drafts + 2, (2, rows), generator=generator, dtype=torch.int32).to(device)
        example = {
            "tokens": torch.randint(-1, 151_936, (rows, drafts + 1), generator=generator).to(device),
            "count": counts[0],
            "invalid": counts[0] > counts[1],
            "out": torch.full((rows, drafts + 4), -7, device=device),
        }
        yield {**example, "drafted": counts[1]}
        yield {**example, "drafted": None}
        table = torch.full((rows, drafts + 9), -7, device=device)
        yield {**example, "drafted": counts[1], "out": table[:, : drafts + 4]}


def single_rows(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    for size, num_drafts in ((1, 1), (1, 7), (3, 32), (33, 2), (128, 7)):
        bonus = torch.randint(0, 99, (size, 1), generator=generator)
        first = torch.randint(2, 30, (size, 1), generator=generator)
        guess = torch.arange(num_drafts)
        yield {
            "logits_index": bonus.repeat(1, num_drafts).flatten().to(device),
            "guess_position": (first + guess).flatten().to(device),
            "length": torch.randint(0, num_drafts + 1, (size,), generator=generator).int().to(device),
            "block_table": torch.randint(0, 99, (size, 16), generator=generator).int().to(device),
            "num_drafts": num_drafts,
            "block_size": 4,
        }


def synthetic_accept(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    for rows, drafts, padding, chances in (
        (1, 0, 0, [0.5]),
        (1, 7, 0, [0.9, 0.5, 0.0, 1.0, 0.3, 0.2, 1e-12]),
        (3, 32, 2, [0.7] * 32),
        (33, 1, 1, [0.25]),
        (128, 7, 40, [0.8, 0.75, 0.5]),
    ):
        owned = torch.randint(0, drafts + 2, (rows,), generator=generator)
        total = int(owned.sum()) + padding
        seed = torch.randint(-(2**63), 2**63 - 1, (9,), generator=generator, dtype=torch.int64)
        yield {
            "logits_start": torch.nn.functional.pad(owned.cumsum(0), (1, 0)).int().to(device),
            "seed": seed.to(device),
            "logits_slot": torch.randint(9, (total,), generator=generator).to(device),
            "logits_position": torch.randint(2**20, (total,), generator=generator).to(device),
            "chances": torch.tensor(chances, dtype=torch.float64).to(device),
            "purpose": Purpose.ACCEPT,
        }
