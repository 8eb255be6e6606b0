"""The ops that keep a step's books, on as many rows as are asked for, all of which verify K drafts."""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.bench.kernel_sizes import BLOCK_SIZE, Case, Sizes, num_bytes
from outrider.kernels.accept_drafts import ACCEPT_DRAFTS
from outrider.kernels.commit import COMMIT, STORE_DRAFT
from outrider.kernels.draft_rows import DRAFT_ROWS
from outrider.kernels.embed import EMBED
from outrider.kernels.gather_rows import GATHER_ROWS
from outrider.kernels.join_input import JOIN_INPUT
from outrider.kernels.ngram import NGRAM_LOOKUP
from outrider.kernels.noise import NOISE_BITS
from outrider.kernels.report import REPORT
from outrider.kernels.scale_hidden import SCALE_HIDDEN
from outrider.kernels.single_rows import SINGLE_ROWS
from outrider.kernels.step_inputs import ASSEMBLE, assemble_reference
from outrider.kernels.synthetic_accept import SYNTHETIC_ACCEPT
from outrider.tensors import Draft, Purpose, Slots, StepBatch, Verdict

SPARE = 1 << 14
"""Positions behind the context, for the tokens that a timed op commits over and over."""


def of_logits_rows(sizes: Sizes) -> dict[str, Tensor]:
    """A seed and a position for each row of logits."""
    rows = sizes.rows * (1 + sizes.num_drafts)
    position = torch.arange(sizes.context, sizes.context + rows, device=sizes.device)
    return {"seed": torch.arange(rows, device=sizes.device), "position": position}


def _slots(sizes: Sizes) -> Slots:
    rows, device, length = sizes.rows, sizes.device, sizes.context + SPARE
    blocks = -(-length // BLOCK_SIZE)
    drafts = torch.randint(0, sizes.config.vocab_size, (rows, sizes.num_drafts), device=device)
    return Slots(
        tokens=torch.randint(0, sizes.config.vocab_size, (rows, length), device=device),
        length=sizes.whole([sizes.context] * rows, torch.int32),
        computed=sizes.whole([sizes.context - 1] * rows, torch.int32),
        block_table=torch.randperm(rows * blocks).view(rows, blocks).to(device, torch.int32),
        temperature=torch.zeros(rows, device=device),
        seed=torch.arange(rows, device=device),
        draft_tokens=drafts,
        draft_length=sizes.whole([sizes.num_drafts] * rows, torch.int32),
        draft_logits=None,
    )


def _plan(sizes: Sizes) -> Tensor:
    """A plan whose rows all verify K drafts, as a runner hands it over."""
    count = sizes.num_drafts
    return sizes.whole([[slot, count + 1, count, 1] for slot in range(sizes.rows)])


def _batch(sizes: Sizes, slots: Slots) -> StepBatch:
    tokens = sizes.rows * (1 + sizes.num_drafts)
    return assemble_reference(slots, _plan(sizes), tokens, tokens, BLOCK_SIZE)


def _assemble(sizes: Sizes) -> Case:
    slots = _slots(sizes)
    tokens = sizes.rows * (1 + sizes.num_drafts)
    shape = {"num_query": tokens, "num_logits": tokens, "block_size": BLOCK_SIZE}
    given = {"slots": slots, "plan": _plan(sizes), **shape}
    return Case(ASSEMBLE, "", [given], num_bytes(slots.block_table) * 2 + 64 * tokens)


def _verdict(sizes: Sizes) -> Verdict:
    count = 1 + sizes.num_drafts // 2
    tokens = torch.randint(0, sizes.config.vocab_size, (sizes.rows, 1 + sizes.num_drafts), device=sizes.device)
    tokens[:, count:] = -1
    return Verdict(tokens, sizes.whole([count] * sizes.rows, torch.int32), sizes.whole([0] * sizes.rows, torch.bool))


def _commit(sizes: Sizes) -> Case:
    slots, verdict = _slots(sizes), _verdict(sizes)
    given = {"slots": slots, "batch": _batch(sizes, slots), "verdict": verdict}
    return Case(COMMIT, "", [given], 2 * num_bytes(verdict.tokens))


def _store_draft(sizes: Sizes) -> Case:
    slots = _slots(sizes)
    draft = Draft(slots.draft_tokens.clone(), slots.draft_length.clone(), None)
    given = {"slots": slots, "batch": _batch(sizes, slots), "draft": draft}
    return Case(STORE_DRAFT, "", [given], 2 * num_bytes(draft.tokens, draft.length))


def _judge(sizes: Sizes) -> Case:
    tokens = _verdict(sizes).tokens
    start = sizes.whole(range(0, tokens.numel() + 1, tokens.shape[1]), torch.int32)
    drafts = tokens[:, :-1].contiguous()
    given = {"choice": tokens.flatten(), "is_accepted": None, "logits_start": start, "draft_tokens": drafts}
    return Case(ACCEPT_DRAFTS, "", [given], 2 * tokens.nbytes + drafts.nbytes)


def _draft_rows(sizes: Sizes) -> Case:
    slots = _slots(sizes)
    batch = _batch(sizes, slots)
    masks = max(sizes.num_drafts - 1, 0)
    given = {
        "slots": slots,
        "batch": batch,
        "committed": torch.ones_like(batch.num_drafts),
        "num_drafts": sizes.num_drafts,
        "num_masks": masks,
        "limit": slots.tokens.shape[1],
        "mask_token": 0,
        "block_size": BLOCK_SIZE,
        "shift": 1,
    }
    return Case(DRAFT_ROWS, "", [given], 32 * (len(batch.input_ids) + sizes.rows * masks))


def _scale_hidden(sizes: Sizes) -> Case:
    slots = _slots(sizes)
    x = sizes.draw(sizes.rows * sizes.num_drafts, sizes.config.hidden_size)
    slot = torch.arange(sizes.rows, device=sizes.device).repeat_interleave(sizes.num_drafts)
    given = {"x": x, "temperature": slots.temperature, "seed": slots.seed, "slot": slot, "greedy": False}
    return Case(SCALE_HIDDEN, "", [given], 2 * x.nbytes)


def _gather_rows(sizes: Sizes) -> Case:
    x = sizes.draw(sizes.rows * (1 + sizes.num_drafts), sizes.config.hidden_size)
    extra = sizes.draw(1, sizes.config.hidden_size)
    index = torch.randint(0, len(x) + 1, (len(x) + sizes.rows * sizes.num_drafts,), device=sizes.device)
    return Case(GATHER_ROWS, "", [{"x": x, "extra": extra, "index": index}], 2 * len(index) * extra.nbytes)


def _join_input(sizes: Sizes) -> Case:
    hidden = sizes.draw(sizes.rows * (1 + sizes.num_drafts), sizes.config.hidden_size)
    ids = torch.randint(0, sizes.config.vocab_size, (len(hidden),), device=sizes.device)
    norms = {name: sizes.weight(hidden.shape[1]) for name in ("token_norm", "hidden_norm")}
    embedding = sizes.weight(sizes.config.vocab_size, hidden.shape[1])
    given = {"ids": ids, "embedding": embedding, "hidden": hidden, **norms, "eps": 1e-6}
    return Case(JOIN_INPUT, "", [given], 4 * hidden.nbytes)


def _report(sizes: Sizes) -> Case:
    verdict = _verdict(sizes)
    out = torch.empty(sizes.rows, sizes.num_drafts + 4, dtype=torch.int64, device=sizes.device)
    columns = {"tokens": verdict.tokens, "count": verdict.count, "invalid": verdict.invalid}
    given = {**columns, "drafted": torch.ones_like(verdict.count), "out": out}
    return Case(REPORT, "", [given], 2 * out.nbytes)


def _noise_bits(sizes: Sizes) -> Case:
    given = of_logits_rows(sizes)
    return Case(NOISE_BITS, "", [{**given, "purpose": Purpose.ACCEPT, "num_indices": 1}], 24 * len(given["seed"]))


def _ngram_lookup(sizes: Sizes) -> Case:
    slots, rows = _slots(sizes), sizes.rows
    given = {
        "tokens": slots.tokens,
        "length": slots.length,
        "slot": torch.arange(rows, device=sizes.device),
        "logits_start": sizes.whole(range(rows + 1), torch.int32),
        "num_drafts": max(sizes.num_drafts, 1),
        "shortest": 1,
        "longest": 4,
    }
    return Case(NGRAM_LOOKUP, "", [given], 8 * rows * sizes.context)


def _embed(sizes: Sizes) -> Case:
    ids = torch.randint(0, sizes.config.vocab_size, (sizes.rows * (1 + sizes.num_drafts),), device=sizes.device)
    weight = sizes.weight(sizes.config.vocab_size, sizes.config.hidden_size)
    given = {"ids": ids, "weight": weight, "dtype": sizes.draw(1, 1).dtype}
    return Case(EMBED, "", [given], 2 * len(ids) * weight.shape[1] * weight.itemsize)


def _synthetic_accept(sizes: Sizes) -> Case:
    slots = _slots(sizes)
    batch = _batch(sizes, slots)
    given = {
        "logits_start": batch.logits_start,
        "seed": slots.seed,
        "logits_slot": batch.logits_slot,
        "logits_position": batch.logits_position,
        "chances": torch.full((max(sizes.num_drafts, 1),), 0.5, dtype=torch.float64, device=sizes.device),
        "purpose": Purpose.ACCEPT,
    }
    return Case(SYNTHETIC_ACCEPT, "", [given], 24 * len(batch.logits_slot))


def _single_rows(sizes: Sizes) -> Case:
    slots, drafts = _slots(sizes), max(sizes.num_drafts, 1)
    given = {
        "logits_index": torch.zeros(sizes.rows * drafts, dtype=torch.int64, device=sizes.device),
        "guess_position": torch.full((sizes.rows * drafts,), sizes.context, device=sizes.device),
        "length": sizes.whole([drafts] * sizes.rows, torch.int32),
        "block_table": slots.block_table,
        "num_drafts": drafts,
        "block_size": BLOCK_SIZE,
    }
    return Case(SINGLE_ROWS, "", [given], 28 * sizes.rows * drafts)


BOOKS = (
    _embed,
    _synthetic_accept,
    _single_rows,
    _assemble,
    _commit,
    _store_draft,
    _judge,
    _draft_rows,
    _scale_hidden,
    _gather_rows,
    _join_input,
    _noise_bits,
    _report,
    _ngram_lookup,
)
"""A maker of each op's case."""
