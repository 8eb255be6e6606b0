"""The promise: whatever drafts, the output has the target's own law, and under `exact` the same tokens.

A Markov chain over eight tokens is the target, so the joint law of a row's first three tokens is
known exactly. Tens of thousands of rows with seeds of their own run through the real step
operations, and a chi-square test compares counts with law. Its statistic has mean d (the degrees of
freedom) and standard deviation sqrt(2 d): a right verifier must stay within FIVE of those, which
chance leaves once in some 10**6 tests, and a wrong one must be WRONG or more away. Every number is a
function of fixed seeds: nothing here is flaky.
"""

from __future__ import annotations

import atexit
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from heads import head_tensors, standalone, write_head
from kernel_examples.steps import example_slots
from outrider.capability import Feature
from outrider.core.plan import Admission
from outrider.core.sampling import SamplingParams
from outrider.core.sizes import Sizes
from outrider.draft.base import DraftContext, Drafter, DraftOptions, TargetFacts
from outrider.draft.eagle.base import HeadDrafter
from outrider.draft.eagle.eagle3 import Eagle3
from outrider.draft.eagle.peagle import PEagle
from outrider.draft.ngram import Ngram, NgramOptions
from outrider.draft.none import NoDrafter
from outrider.kernels.commit import COMMIT, STORE_DRAFT
from outrider.kernels.sample import GUMBEL_ARGMAX
from outrider.kernels.step_inputs import ASSEMBLE, load_draft
from outrider.runner.processor_tables import ProcessorTables
from outrider.tensors import Draft, Purpose, Slots, StepBatch, TargetOutput, Verdict
from outrider.verify.base import Verifier
from outrider.verify.exact import Exact
from outrider.verify.registry import PROCESSORS
from outrider.verify.rejection import Rejection
from outrider.verify.synthetic import Synthetic

VOCAB, ROWS, NUM_TOKENS, K = 8, 30_000, 3, 3
FIVE, WRONG = 5.0, 10.0
PROMPT = (5, 2)
CPU = torch.device("cpu")
FACTS = TargetFacts(VOCAB, 1, 1, Sizes(64, ROWS, ROWS, 16), CPU, torch.float32)
CHAIN = torch.randn((VOCAB, VOCAB), generator=torch.Generator().manual_seed(1)) * 1.3
"""The target: logits of the next token, by the last."""

PLAIN = SamplingParams(temperature=1.0)
COLD = SamplingParams(temperature=0.7)
NARROW = SamplingParams(temperature=0.9, top_k=6, top_p=0.85)
GREEDY = SamplingParams(temperature=0.0)


def draw(logits: Tensor, context: DraftContext, ahead: int) -> tuple[Tensor, Tensor]:
    """A drafter's own draw of the token `ahead` places after the next: its id, and the logits it came from."""
    slots, slot = context.slots, context.batch.slot
    temperature = slots.temperature[slot]
    logits = logits / torch.where(temperature == 0, 1.0, temperature)[:, None]
    position = slots.length[slot].long() + ahead
    drawn = GUMBEL_ARGMAX.on(logits.device)(logits, temperature, slots.seed[slot], position, context.noise)
    return drawn, logits


class Varying(Drafter):
    """Point masses, and a number of them that differs from row to row and step to step."""

    name: ClassVar[str] = "varying"
    needs: ClassVar[frozenset[Feature]] = frozenset()

    def propose(self, context: DraftContext) -> Draft:
        ahead = torch.arange(1, self.num_drafts + 1)
        tokens = (context.next_token[:, None] + ahead) % VOCAB
        length = (context.batch.slot + context.next_token) % (self.num_drafts + 1)
        return Draft(tokens, length.int(), None)


class Autoregressive(Drafter):
    """One token at a time, with logits, from a chain that resembles the target's."""

    name: ClassVar[str] = "autoregressive"
    needs: ClassVar[frozenset[Feature]] = frozenset()
    gives_logits: ClassVar[bool] = True
    table = CHAIN + 1.2 * torch.randn((VOCAB, VOCAB), generator=torch.Generator().manual_seed(2))

    def propose(self, context: DraftContext) -> Draft:
        tokens, logits, last = [], [], context.next_token
        for ahead in range(self.num_drafts):
            last, scores = draw(self.table[last], context, ahead)
            tokens.append(last)
            logits.append(scores)
        length = torch.full_like(context.committed, self.num_drafts)
        return Draft(torch.stack(tokens, 1), length, torch.stack(logits, 1))


class OneShot(Autoregressive):
    """All tokens from the last one alone, so that later guesses do not depend on earlier ones."""

    name: ClassVar[str] = "one-shot"

    def propose(self, context: DraftContext) -> Draft:
        drawn = [draw(self.table[context.next_token] / (1 + ahead), context, ahead) for ahead in range(self.num_drafts)]
        length = torch.full_like(context.committed, self.num_drafts)
        return Draft(
            torch.stack([token for token, _ in drawn], 1), length, torch.stack([score for _, score in drawn], 1)
        )


WIDTH, BLOCK = 6, 16
FEATURES = torch.randn((VOCAB, 3 * WIDTH), generator=torch.Generator().manual_seed(4))
"""What the target's auxiliary layers are made to say of each token."""

HEAD_FACTS = TargetFacts(VOCAB, WIDTH, 2, Sizes(64, ROWS, ROWS, BLOCK), CPU, torch.float32)
HEAD_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 10,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 64,
}


@cache
def head(parallel: bool, draft_vocab_size: int | None) -> Path:
    """A head of one layer, as sure of its guesses as the target is of its tokens."""
    shape = {"num_layers": 1, "draft_vocab_size": draft_vocab_size}
    louder = 8 * head_tensors(parallel, **shape, **HEAD_SIZES)["lm_head.weight"]
    path = Path(tempfile.mkdtemp(prefix="outrider-law-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return write_head(path, parallel, **shape, sizes=HEAD_SIZES, tensors={"lm_head.weight": louder})


def headed(method: type[HeadDrafter], k: int, rows: int = ROWS, **options: Any) -> Drafter:
    """A drafter with a head of random weights; a row has blocks for 64 positions."""
    written = head(method.parallel, options.pop("draft_vocab_size", None))
    return standalone(method, written, HEAD_FACTS, rows * 64 // BLOCK, num_speculative_tokens=k, **options)


DRAFTERS: dict[str, Callable[[int], Drafter]] = {
    "none": lambda k: NoDrafter(NoDrafter.Options(), FACTS),
    "varying": lambda k: Varying(DraftOptions(k), FACTS),
    "ngram": lambda k: Ngram(NgramOptions(k, prompt_lookup_min=1, prompt_lookup_max=2), FACTS),
    "autoregressive": lambda k: Autoregressive(DraftOptions(k), FACTS),
    "one-shot": lambda k: OneShot(DraftOptions(k), FACTS),
}
HEADS: dict[str, Callable[[int], Drafter]] = {
    "eagle3": lambda k: headed(Eagle3, k),
    "eagle3-argmax": lambda k: headed(Eagle3, k, draft_sample="argmax"),
    "peagle": lambda k: headed(PEagle, k),
    "peagle-reduced": lambda k: headed(PEagle, k, draft_vocab_size=5),
}


def admit(rows: int, sampling: SamplingParams, drafter: Drafter, keep_logits: bool) -> Slots:
    k, max_len = drafter.num_drafts, 64
    slots = example_slots(torch.Generator().manual_seed(3), CPU, rows, max_len, k)
    slots.tokens[:, : len(PROMPT)] = torch.tensor(PROMPT)
    slots.length.fill_(len(PROMPT))
    slots.computed.zero_()
    slots.temperature.fill_(sampling.temperature)
    return replace(
        slots,
        block_table=torch.arange(rows * max_len // BLOCK, dtype=torch.int32).view(rows, -1),
        seed=torch.arange(rows) + 77 * 2**31,
        draft_logits=torch.zeros((rows, k, VOCAB)) if keep_logits and drafter.gives_logits else None,
    )


def generate(
    drafter: Drafter, verifier: Verifier, sampling: SamplingParams, rows: int = ROWS, num_tokens: int = NUM_TOKENS
) -> tuple[Tensor, Tensor]:
    """The first num_tokens of each row's output, [rows, num_tokens], and the mean tokens a decode step gave."""
    slots = admit(rows, sampling, drafter, Feature.DRAFT_LOGITS in verifier.needs)
    slot, ends_prompt = torch.arange(rows), torch.ones(rows, dtype=torch.int64)
    processors = [ProcessorTables(processor, rows, VOCAB, CPU) for processor in PROCESSORS]
    for tables in processors:
        admissions = [Admission(row, PROMPT, len(PROMPT), 0, sampling, 0, ()) for row in range(rows)]
        wanting = [one for one in admissions if tables.processor.wanted(one.sampling)]
        columns = tables.columns(admissions, wanting)
        tables.write({name: torch.from_numpy(column) for name, column in columns.items()})
    gained, steps = 0, 0
    while int(slots.length.min()) < len(PROMPT) + num_tokens:
        num_drafts = slots.draft_length.clone()
        num_tokens_in = slots.length - slots.computed + num_drafts
        num_query, num_logits = int(num_tokens_in.sum()), int((num_drafts + 1).sum())
        plan = torch.stack((slot, num_tokens_in, num_drafts, ends_prompt), dim=1)
        batch = ASSEMBLE.on(CPU)(slots, plan, num_query, num_logits, BLOCK)
        logits = CHAIN[batch.input_ids[batch.logits_index]]
        target = TargetOutput(logits, logits[:0], FEATURES[batch.input_ids])
        for processor, tables in zip(PROCESSORS, processors, strict=True):
            if processor.wanted(sampling):
                logits = processor(logits, batch, slots, tables.active.state)
        verdict = verifier(logits, batch, load_draft(slots, batch), slots)
        committed, next_token = COMMIT.on(CPU)(slots, batch, verdict)
        context = DraftContext(batch, target, committed, next_token, slots, verifier.draft_noise)
        STORE_DRAFT.on(CPU)(slots, batch, drafter.propose(context))
        steps += 1
        gained += int(verdict.count.sum()) if steps > 1 else 0
    out = slots.tokens[:, len(PROMPT) : len(PROMPT) + num_tokens]
    return out, torch.tensor(gained / rows / max(steps - 1, 1))


@cache
def law(sampling: SamplingParams) -> Tensor:
    """The exact probability of each first three tokens, [VOCAB ** 3] float64, by plain arithmetic."""
    step = torch.zeros((VOCAB, VOCAB), dtype=torch.float64)
    for last in range(VOCAB):
        weights = [(math.exp(float(score) / sampling.temperature), token) for token, score in enumerate(CHAIN[last])]
        weights = sorted(weights, reverse=True)[: sampling.top_k or VOCAB]
        whole, before = sum(weight for weight, _ in weights), 0.0
        for weight, token in weights:
            if before < sampling.top_p * whole:
                step[last, token] = weight
            before += weight
    step /= step.sum(dim=1, keepdim=True)
    first = step[PROMPT[-1]]
    return (first[:, None, None] * step[:, :, None] * step[None, :, :]).reshape(-1)


def departure(tokens: Tensor, sampling: SamplingParams) -> float:
    """(chi-square - d) / sqrt(2 d); cells expected fewer than five times are put together."""
    cell = (tokens * torch.tensor([VOCAB**2, VOCAB, 1])).sum(dim=1)
    counts = torch.bincount(cell, minlength=VOCAB**3).double()
    expected = law(sampling) * tokens.shape[0]
    assert counts[expected == 0].sum() == 0, "a token came out that the target never gives"
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = counts.shape[0] - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("sampling", [PLAIN, COLD, NARROW], ids=["plain", "cold", "narrow"])
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("verifier", [Exact, Rejection])
def test_output_has_the_targets_draft_logits(verifier: type[Verifier], drafter: str, sampling: SamplingParams) -> None:
    tokens, _ = generate(DRAFTERS[drafter](K), verifier(), sampling)
    assert abs(departure(tokens, sampling)) < FIVE


@pytest.mark.parametrize("sampling", [COLD, NARROW], ids=["cold", "narrow"])
@pytest.mark.parametrize("drafter", HEADS)
def test_output_has_the_targets_law_with_draft_heads(drafter: str, sampling: SamplingParams) -> None:
    tokens, gained = generate(HEADS[drafter](K), Rejection(), sampling, ROWS // 3)
    assert abs(departure(tokens, sampling)) < FIVE
    assert 1.05 < gained < K, "drafts stand, and drafts fall"


class Scaled:
    """Wrong: the target's logits are five percent too sharp."""

    name, needs, draft_noise, faithful = "scaled", frozenset[Feature](), Purpose.TARGET, True

    def __call__(self, logits: Tensor, batch: StepBatch, draft: Draft, slots: Slots) -> Verdict:
        return Exact()(logits * 1.05, batch, draft, slots)


class SharedNoise(Rejection):
    """Wrong: the drafter draws with the noise that the verifier draws its own tokens with."""

    draft_noise: ClassVar[Purpose] = Purpose.TARGET


class SharedNoiseOfPointMasses(Rejection):
    """Wrong: the same, where the guesses count as point masses."""

    needs: ClassVar[frozenset[Feature]] = frozenset()
    draft_noise: ClassVar[Purpose] = Purpose.TARGET


@pytest.mark.parametrize(
    "verifier",
    [Scaled(), SharedNoise(), SharedNoiseOfPointMasses(), Synthetic([1.0] * K)],
    ids=lambda wrong: type(wrong).__name__,
)
def test_wrong_verifiers_are_caught(verifier: Verifier) -> None:
    tokens, _ = generate(DRAFTERS["autoregressive"](K), verifier, PLAIN, 4 * ROWS)
    assert departure(tokens, PLAIN) > WRONG


class Unmapped(PEagle):
    """Wrong: says that tokens which its vocabulary lacks might have been drawn."""

    def _draft_logits(self, logits: Tensor, tokens: Tensor) -> Tensor:
        law = super()._draft_logits(logits, tokens)
        return law.where(law > -torch.inf, 0.0)


class Unscaled(Eagle3):
    """Wrong: says what its guesses would have been drawn from at temperature 1."""

    def _draft_logits(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return super()._draft_logits(logits, tokens) * COLD.temperature


@pytest.mark.parametrize("method", [Unmapped, Unscaled])
def test_heads_that_misstate_what_they_drew_from_are_caught(method: type[HeadDrafter]) -> None:
    reduced = {"draft_vocab_size": 5} if method is Unmapped else {}
    tokens, _ = generate(headed(method, K, **reduced), Rejection(), COLD)
    assert departure(tokens, COLD) > WRONG


def test_dropping_the_drafters_logits_costs_acceptance_and_nothing_else() -> None:
    class PointMass(Rejection):
        needs: ClassVar[frozenset[Feature]] = frozenset()

    drafter = DRAFTERS["autoregressive"](K)
    tokens, without = generate(drafter, PointMass(), PLAIN)
    assert abs(departure(tokens, PLAIN)) < FIVE
    assert generate(drafter, Rejection(), PLAIN, 5000)[1] > without + 0.2


@pytest.mark.parametrize("sampling", [PLAIN, COLD, NARROW, GREEDY], ids=["plain", "cold", "narrow", "greedy"])
def test_exact_gives_the_same_tokens_whatever_drafts(sampling: SamplingParams) -> None:
    rows, num_tokens = 300, 16
    alone, _ = generate(DRAFTERS["none"](0), Exact(), sampling, rows, num_tokens)
    for name, make in {**DRAFTERS, **HEADS}.items():
        for k in () if name == "none" else (4,) if name in HEADS else (1, 2, 5):
            tokens, _ = generate(make(k), Exact(), sampling, rows, num_tokens)
            assert torch.equal(tokens, alone), (name, k)


@pytest.mark.parametrize("drafter", [*DRAFTERS, *HEADS])
def test_greedy_rows_are_the_same_under_rejection(drafter: str) -> None:
    alone, _ = generate(DRAFTERS["none"](0), Exact(), GREEDY, 500, 12)
    tokens, _ = generate({**DRAFTERS, **HEADS}[drafter](K), Rejection(), GREEDY, 500, 12)
    assert torch.equal(tokens, alone)


def test_shared_noise_is_what_makes_exact_accept() -> None:
    class Uncoupled(Exact):
        draft_noise: ClassVar[Purpose] = Purpose.DRAFT

    drafter = DRAFTERS["autoregressive"](K)
    coupled, uncoupled = (generate(drafter, verifier, PLAIN, 2000, 12)[1] for verifier in (Exact(), Uncoupled()))
    assert coupled > uncoupled + 0.5
