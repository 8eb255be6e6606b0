"""Draft heads, row by row, against references that recompute everything from the tokens (`tests/reference`).

Whole generations are watched, with accepted and rejected drafts, chunks, batches, preemption and prefix hits.
What each row of a head takes in (token, position, hidden state) and what comes of it (logits, drafts) must be what
the reference gives for that request alone, from hidden states that transformers computes in float64. Then heads are
run in the ways in which they are known to be run wrongly, and the same comparison must notice.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from broken_heads import BROKEN, SequentialTapsOffByOne, Stand
from checkpoints import SIZES, Case, cache_bytes, program, prompt, reference, run
from heads import TAPS, head_tensors, write_head
from outrider import LLM, SamplingParams
from outrider.draft.base import DraftContext
from outrider.draft.registry import METHODS
from outrider.tensors import Draft, Purpose
from outrider.verify.exact import Exact
from reference import eagle3, peagle

DRAFT = {"eagle3": eagle3.draft, "peagle": peagle.draft}
NUM_LAYERS, MAX_LEN = 4, 96
TOLERANCE = 2e-4
"""Of logits and hidden states that are some units wide, in float32 after a few layers."""


# What the engine does.


@dataclass
class Watched:
    """One request's share of one round."""

    tokens: list[int]  # committed, the newest last
    speaks: bool  # False: inside its prompt
    positions: list[int]
    ids: list[int]
    hidden: Tensor
    logits: Tensor  # [K, V]
    drafts: list[int]
    length: int  # of the drafts, how many are meant


class Watch:
    """All rounds of an engine from now on."""

    def __init__(self, llm: LLM) -> None:
        self.rounds: list[Watched] = []
        self._drafter = program(llm)._drafter
        self._passes: list[tuple[Tensor, Tensor, Any]] = []
        self._scores: list[Tensor] = []
        network = self._drafter.network
        self._propose, self._drafter.propose = self._drafter.propose, self.propose
        self._drafter.network = Stand(network, lambda *given: self._pass(network, *given))
        self._drafter.network.logits = lambda normed: self._logits(network, normed)

    def _pass(self, network: Any, ids: Tensor, hidden: Tensor, batch: Any, cache: Any) -> Any:
        self._passes.append((ids.clone(), hidden.clone(), batch))
        return network(ids, hidden, batch, cache)

    def _logits(self, network: Any, normed: Tensor) -> Tensor:
        self._scores.append(network.logits(normed).clone())
        return self._scores[-1]

    def propose(self, context: DraftContext) -> Draft:
        self._passes.clear()
        self._scores.clear()
        draft = self._propose(context)
        batch, size, count = context.batch, context.batch.slot.shape[0], self._drafter.num_drafts
        together = len(self._scores) == 1
        logits = self._scores[0].view(size, count, -1) if together else torch.stack(self._scores, dim=1)
        (ids, hidden, rows), *later = self._passes
        for row, slot in enumerate(batch.slot.tolist()):
            mine = slice(*rows.query_start[row : row + 2].tolist())
            further = [each for each in later if each[2].cache_slot[row] >= 0]
            length = int(context.slots.length[slot])
            self.rounds.append(
                Watched(
                    tokens=context.slots.tokens[slot, :length].tolist(),
                    speaks=bool(batch.logits_start[row + 1] > batch.logits_start[row]),
                    positions=rows.positions[mine].tolist() + [int(each[2].positions[row]) for each in further],
                    ids=ids[mine].tolist() + [int(each[0][row]) for each in further],
                    hidden=torch.cat([hidden[mine], *(each[1][row : row + 1] for each in further)]),
                    logits=logits[row],
                    drafts=draft.tokens[row].tolist(),
                    length=int(draft.length[row]),
                )
            )
        return draft


# What it ought to do.


class Streams:
    """A target's hidden states, from transformers in float64."""

    def __init__(self, path: Path, family: str) -> None:
        self._model = reference(path, family).double()
        self._known: list[tuple[list[int], Tensor]] = []

    def __call__(self, tokens: Sequence[int], taps: Sequence[int] = TAPS) -> Tensor:
        """[n, taps * H] of the tokens, side by side: the stream that enters each of these layers."""
        for known, streams in self._known:
            if known[: len(tokens)] == list(tokens):
                return streams[: len(tokens), list(taps)].flatten(1)
        entering: list[Tensor] = []
        hook = lambda _, given: entering.append(given[0][0].detach())  # noqa: E731
        readers = [*self._model.model.layers, self._model.model.norm]
        handles = [reader.register_forward_pre_hook(hook) for reader in readers]
        with torch.no_grad():
            states = self._model(torch.tensor([list(tokens)]), output_hidden_states=True).hidden_states
        for handle in handles:
            handle.remove()
        for ours, theirs in zip(entering[:-1], states, strict=False):
            assert torch.equal(ours, theirs[0]), "tap i is hidden_states[i]"
        self._known.append((list(tokens), torch.stack(entering, dim=1)))
        return self(tokens, taps)


def departures(
    rounds: Sequence[Watched], draft: Callable[..., Any], head: eagle3.Head, streams: Streams, limit: int = MAX_LEN
) -> set[str]:
    """What is not as the reference has it: of positions, ids, hidden, logits, drafts, length; empty if all is."""
    wrong: set[str] = set()

    def equal(what: str, ours: Any, theirs: Any) -> None:
        if ours != theirs:
            wrong.add(what)

    def close(what: str, ours: Tensor, theirs: Tensor) -> None:
        if ours.shape != theirs.shape or not torch.allclose(ours.double(), theirs, rtol=TOLERANCE, atol=TOLERANCE):
            wrong.add(what)

    for one in sorted(rounds, key=lambda each: -len(each.tokens)):
        features, count, first = streams(one.tokens)[:-1], len(one.logits), one.positions[0]
        if one.speaks:
            right = draft(head, one.tokens, features, count)
            end = min(len(features) + count - 1, limit)
            equal("length", one.length, count - (len(features) + count - 1 - end))
            close("logits", one.logits[: one.length], right.logits[: one.length])
            equal("drafts", one.drafts[: one.length], right.drafts[: one.length])
            ids, hidden = right.ids, right.hidden
        else:
            equal("length", one.length, 0)
            end, ids, hidden = first + len(one.ids), one.tokens[1:], head.project(features)
        equal("positions", one.positions, list(range(first, end)))
        equal("ids", one.ids, ids[first:end])
        close("hidden", one.hidden, hidden[first:end])
    return wrong


TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {"num_hidden_layers": NUM_LAYERS}),
    "llama": ("llama", {"num_hidden_layers": NUM_LAYERS, "tie_word_embeddings": True}),
}


@pytest.fixture(scope="module")
def target(tiny: Callable[..., Path]) -> Callable[[str], tuple[Path, Streams]]:
    @cache
    def make(name: str) -> tuple[Path, Streams]:
        family, config = TARGETS[name]
        path = tiny(family, **config)
        return path, Streams(path, family)

    return make


def blocks(number: int, head_layers: int) -> int:
    """`kv_cache_memory` for so many blocks of target and head."""
    return cache_bytes(number, num_hidden_layers=NUM_LAYERS + head_layers)


RATES = [0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
BY_DECREE = {"verifier": "synthetic", "synthetic_rates": RATES}
CASES = [Case.of(length, salt, temperature=0.0, max_tokens=18) for salt, length in enumerate((3, 17, 40, 26))]

VARIANTS: dict[str, tuple[str, int, dict[str, Any]]] = {  # target, K, the head
    "plain": ("qwen3", 4, {}),
    "one-layer": ("llama", 1, {"num_layers": 1, "layout": "flat"}),
    "norm-before-residual": ("qwen3", 3, {"config": {"norm_before_residual": True}, "num_layers": 1}),
    "norm-before-fc": ("llama", 7, {"norms": ["input_norm"], "layout": "speculators-rope"}),
    "3.1": ("qwen3", 3, {"norms": ["fc_norm"], "config": {"norm_output": True, "fc_norm": True}}),
    "qwen3-layers": ("llama", 5, {"num_layers": 4, "qk_norm": True, "draft_vocab_size": 100}),
    "borrowing": ("qwen3", 2, {"tensors": {"embed_tokens.weight": None, "lm_head.weight": None}, "layout": "nemo"}),
    "borrowing-tied": ("llama", 2, {"tensors": {"embed_tokens.weight": None, "lm_head.weight": None}}),
    "biases": ("llama", 4, {"bias": True, "layout": "flat-pickled", "draft_vocab_size": 60}),
    "rope": ("qwen3", 6, {"layer": {"rope_theta": 500.0}, "layout": "speculators-rope", "norms": ["input_norm"]}),
}
WAYS: dict[str, dict[str, Any]] = {
    "batched": BY_DECREE,
    "chunked": {**BY_DECREE, "max_num_batched_tokens": 13, "max_num_seqs": 3},
}


def head_of(path: Path, target: Path, method: str, **head: Any) -> tuple[Path, eagle3.Head]:
    """A head written, and as the reference reads it."""
    written = write_head(path, method == "peagle", **head)
    weights = {name: tensor for file in target.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return written, eagle3.read(written, weights)


def serve(path: Path, head: Path, num_drafts: int, **options: Any) -> LLM:
    drafting = {"model": str(head), "num_speculative_tokens": num_drafts, **options.pop("drafting", {})}
    return LLM(str(path), **{"max_model_len": MAX_LEN, "max_num_seqs": 4, "speculative_config": drafting, **options})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", DRAFT)
def test_every_row_is_the_reference_s(
    method: str, variant: str, way: str, target: Callable[[str], tuple[Path, Streams]], tmp_path: Path
) -> None:
    name, count, config = VARIANTS[variant]
    path, streams = target(name)
    directory, head = head_of(tmp_path / "head", path, method, **config)
    with serve(path, directory, count, **WAYS[way]) as llm:
        assert llm.engine.resolved.method == method
        watch = Watch(llm)
        run(llm, CASES)
        report = llm.acceptance()
        assert 0 < report.accepted < report.drafted, "rounds with and without rejected drafts"
        assert any(not one.speaks for one in watch.rounds) == (way == "chunked")
        assert departures(watch.rounds, DRAFT[method], head, streams) == set()
