"""Draft heads, row by row, against references that recompute everything from the tokens (`tests/reference`).

Whole generations are watched, with accepted and rejected drafts, chunks, batches, preemption and prefix hits.
What each row of a head takes in (token, position, hidden state) and what comes of it (logits, drafts) must be what
the reference gives for that request alone, from hidden states that transformers computes in float64. Then heads are
run in the ways in which they are known to be run wrongly, and the same comparison must notice.
"""

from __future__ import annotations

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
from checkpoints import SIZES, Case, cache_bytes, program, prompt, reference, run, write
from heads import TAPS, head_tensors, write_head
from outrider import LLM, SamplingParams
from outrider.draft.base import DraftContext
from outrider.draft.eagle.base import HeadDrafter
from outrider.draft.registry import METHODS
from outrider.kernels.sample import gumbel_argmax_reference
from outrider.tensors import Draft, Purpose
from outrider.verify.exact import Exact
from reference import eagle3, peagle

DRAFT = {"eagle3": eagle3.draft, "peagle": peagle.draft}
NUM_LAYERS, MAX_LEN, BLOCK_SIZE = 4, 96, 16
TOLERANCE = 2e-4
"""Of logits and hidden states that are some units wide, in float32 after a few layers."""


# What the engine does.


@dataclass
class Watched:
    """One request's share of one round."""

    tokens: list[int]  # committed, the newest last
    speaks: bool  # False: inside its prompt
    start: int  # the first position the target ran
    num_query: int  # how many it ran
    positions: list[int]
    ids: list[int]
    hidden: Tensor
    logits: Tensor  # [K, V]
    drafts: list[int]
    length: int  # of the drafts, how many are meant
    stray: bool  # whether a row's keys and values went anywhere but into a block that is the request's alone
    temperature: float
    seed: int
    noise: int
    argmax: bool  # drafts are the likeliest whatever the temperature


class Watch:
    """All rounds of an engine from now on."""

    def __init__(self, llm: LLM) -> None:
        self.rounds: list[Watched] = []
        self._drafter, self._scheduler = program(llm)._drafter, llm.engine._scheduler
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
        (ids, hidden, run), *later = self._passes
        for row, slot in enumerate(batch.slot.tolist()):
            mine = slice(*run.rows.query_start[row : row + 2].tolist())
            further = [each for each in later if each[2].rows.cache_slot[row] >= 0]
            length, positions = int(context.slots.length[slot]), run.rows.positions[mine].tolist()
            positions += [int(each[2].rows.positions[row]) for each in further]
            cells = run.rows.cache_slot[mine].tolist() + [int(each[2].rows.cache_slot[row]) for each in further]
            self.rounds.append(
                Watched(
                    tokens=context.slots.tokens[slot, :length].tolist(),
                    speaks=bool(batch.logits_start[row + 1] > batch.logits_start[row]),
                    start=int(batch.rows.positions[batch.rows.query_start[row]]),
                    num_query=int(batch.rows.query_start[row + 1] - batch.rows.query_start[row]),
                    positions=positions,
                    ids=ids[mine].tolist() + [int(each[0][row]) for each in further],
                    hidden=torch.cat([hidden[mine], *(each[1][row : row + 1] for each in further)]),
                    logits=logits[row],
                    drafts=draft.tokens[row].tolist(),
                    length=int(draft.length[row]),
                    stray=cells != [self._cell(slot, position) for position in positions],
                    temperature=float(context.slots.temperature[slot]),
                    seed=int(context.slots.seed[slot]),
                    noise=int(context.noise),
                    argmax=self._drafter._argmax,
                )
            )
        return draft

    def _cell(self, slot: int, position: int) -> int | None:
        """Where a position of the slot's request belongs; None if it has no block of its own there."""
        table = next(one.table for one in self._scheduler._queues.running if one.slot == slot)
        own = table.num_filed <= position // BLOCK_SIZE < len(table.blocks)
        return table.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE if own else None


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
    """What is not as the reference has it (positions, ids, hidden, logits, drafts, length, cells); empty if all is."""
    wrong: set[str] = set()

    def equal(what: str, ours: Any, theirs: Any) -> None:
        if ours != theirs:
            wrong.add(what)

    def close(what: str, ours: Tensor, theirs: Tensor) -> None:
        if ours.shape != theirs.shape or not torch.allclose(ours.double(), theirs, rtol=TOLERANCE, atol=TOLERANCE):
            wrong.add(what)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so many small products are only kept waiting by a team
    for one in sorted(rounds, key=lambda each: -len(each.tokens)):
        features, count, first = streams(one.tokens)[:-1], len(one.logits), one.start
        equal("cells", one.stray, False)
        if one.speaks:
            right = draft(head, one.tokens, features, count, one.drafts)
            end = len(features) + count - 1
            equal("length", one.length, max(0, min(count, limit - len(features) + 1)))
            scaled = right.logits / (1.0 if one.argmax else one.temperature or 1.0)
            close("logits", one.logits[: one.length], scaled[: one.length])
            drafts = right.drafts if one.argmax or not one.temperature else drawn(one, scaled, head)
            equal("drafts", one.drafts[: one.length], drafts[: one.length])
            ids, hidden = right.ids, right.hidden
        else:
            equal("length", one.length, 0)
            end, ids, hidden = first + one.num_query, one.tokens[1:], head.project(features)
        end = min(end, limit)
        equal("positions", one.positions, list(range(first, end)))
        equal("ids", one.ids, ids[first:end])
        close("hidden", one.hidden, hidden[first:end])
    torch.set_num_threads(threads)
    return wrong


def drawn(one: Watched, scaled: Tensor, head: eagle3.Head) -> list[int]:
    """The drafts by the noise of their own positions: draft k is the sequence's token len(tokens) + k."""
    count = len(scaled)
    ids = torch.tensor([head.token(column) for column in range(scaled.shape[1])])
    position = len(one.tokens) + torch.arange(count)
    temperature, seed = torch.full((count,), one.temperature), torch.full((count,), one.seed)
    return gumbel_argmax_reference(scaled.float(), temperature, seed, position, one.noise, ids).tolist()


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
CASES = [Case.of(length, salt, temperature=0.0, max_tokens=15) for salt, length in enumerate((3, 40, 26))]

SAMPLED = [
    Case.of(9, 1, temperature=1.0, max_tokens=15),
    Case.of(33, 2, temperature=0.6, max_tokens=15, seed=2**63 - 1),
    Case.of(20, 3, temperature=0.0, max_tokens=15),
]

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
    "chunked": {**BY_DECREE, "max_num_batched_tokens": 13},
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


@pytest.mark.parametrize("drafting", [{}, {"draft_sample": "argmax"}], ids=["coupled", "argmax"])
@pytest.mark.parametrize(
    "verifier", [BY_DECREE, {"verifier": "exact"}, {"verifier": "rejection"}], ids=lambda v: v["verifier"]
)
@pytest.mark.parametrize("method", DRAFT)
def test_sampled_drafts_are_drawn_with_the_noise_of_their_positions(
    method: str, verifier: dict[str, Any], drafting: dict[str, Any], target: Any, tmp_path: Path
) -> None:
    path, streams = target("qwen3")
    directory, head = head_of(tmp_path / "head", path, method, draft_vocab_size=90)
    with serve(path, directory, 3, drafting=drafting, **verifier) as llm:
        watch = Watch(llm)
        run(llm, SAMPLED)
        assert departures(watch.rounds, DRAFT[method], head, streams) == set()
        assert {one.noise for one in watch.rounds} == {llm.engine.resolved.runner.verifier.draft_noise}
        for one in watch.rounds:
            one.noise = Purpose.TARGET + Purpose.DRAFT - one.noise  # the other of the two
        noticed = departures(watch.rounds, DRAFT[method], head, streams)
        assert noticed == (set() if drafting else {"drafts"}), "drawn with other noise, other drafts"


@pytest.mark.parametrize("method", DRAFT)
def test_rows_of_preempted_requests(method: str, target: Any, tmp_path: Path) -> None:
    path, streams = target("qwen3")
    directory, head = head_of(tmp_path / "head", path, method)
    cases = [Case.of(length, length, temperature=0.0, max_tokens=40) for length in (33, 30, 14)]
    with serve(path, directory, 4, kv_cache_memory=blocks(8, 2), **BY_DECREE) as llm:
        watch = Watch(llm)
        run(llm, cases)
        assert llm.engine._scheduler.num_preemptions > 0
        assert departures(watch.rounds, DRAFT[method], head, streams) == set()


def branching() -> list[Case]:
    """Prompts that are alike up to where a block ends, and then are not; and one that is just the same."""
    stem, plain = prompt(32), {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, "detokenize": False}
    ends = ([1, *prompt(9, 1)], [2, *prompt(9, 2)], [1, *prompt(9, 1)], [3])
    return [Case([*stem, *end], SamplingParams(**plain)) for end in ends]


def after_hits(llm: LLM) -> list[Watched]:
    """All rounds of requests that come one after another and share their prefixes."""
    watch = Watch(llm)
    for case in branching():
        run(llm, [case])
    assert llm.engine._scheduler.cache.num_hit >= 32
    return watch.rounds


@pytest.mark.parametrize("method", DRAFT)
def test_rows_after_a_prefix_hit(method: str, target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, streams = target("qwen3")
    directory, head = head_of(tmp_path / "head", path, method)
    with serve(path, directory, 3, **BY_DECREE) as llm:
        rounds = after_hits(llm)
        assert departures(rounds, DRAFT[method], head, streams) == set()
    # a block's last row holds the next block's first token: a hit that does not heed it finds another's
    monkeypatch.setattr(HeadDrafter, "rerun", 0)
    with serve(path, directory, 3, **BY_DECREE) as llm:
        assert "logits" in departures(after_hits(llm), DRAFT[method], head, streams)


@pytest.mark.parametrize("method", DRAFT)
def test_requests_that_take_no_drafts_leave_the_drafter_out(method: str, target: Any, tmp_path: Path) -> None:
    path, streams = target("qwen3")
    directory, head = head_of(tmp_path / "head", path, method)
    case = branching()[0]
    with serve(path, directory, 3, **BY_DECREE) as llm:
        watch, gained = Watch(llm), []
        for number in range(2):
            llm.engine.add(str(number), case.prompt, case.sampling, max_drafts=0)
            while llm.engine.has_work:
                gained += [token for delta, _ in llm.engine.step() for token in delta.tokens]
        assert watch.rounds == [] and llm.engine._scheduler.cache.num_hit >= 32
        run(llm, [case])  # which must not take up the blocks that the drafter left empty
        assert departures(watch.rounds, DRAFT[method], head, streams) == set()
    assert len(gained) == 16 and gained[:8] == gained[8:]


NOTICED = {
    "Sequential": {"ids", "hidden", "logits", "drafts"},
    "TapsOffByOne": {"hidden", "logits", "drafts"},
    "Stale": {"hidden", "logits", "drafts"},
    "OneBehind": {"positions", "logits", "drafts"},
    "Unshifted": {"ids", "logits", "drafts"},
    "Blind": {"logits", "drafts"},
}
"""What the comparison must say of each head that is run wrongly; cells left out, which follow from positions."""


@pytest.mark.failing_drafter  # one reads hidden states that nobody wrote, which may be NaN
@pytest.mark.parametrize("name", BROKEN)
def test_a_head_run_wrongly_is_noticed(name: str, target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, streams = target("qwen3")
    directory, head = head_of(tmp_path / "head", path, "peagle")
    monkeypatch.setitem(METHODS, "peagle", BROKEN[name])
    with serve(path, directory, 4, **BY_DECREE) as llm:
        watch = Watch(llm)
        run(llm, CASES)
        assert departures(watch.rounds, peagle.draft, head, streams) - {"cells"} == NOTICED[name]
        # the first guess is the bonus row's, which these leave alone: a check of position 0 would see nothing
        for one in watch.rounds:
            one.logits, one.drafts, one.positions = one.logits[:1], one.drafts[:1], one.positions[:1]
        if name in ("Stale", "OneBehind", "Blind", "Sequential"):
            firsts = [replace(one, length=min(one.length, 1)) for one in watch.rounds]
            assert not {"logits", "drafts"} & departures(firsts, peagle.draft, head, streams)


def test_taps_off_by_one_are_noticed_of_eagle3_too(
    target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, streams = target("qwen3")
    directory, head = head_of(tmp_path / "head", path, "eagle3")
    monkeypatch.setitem(METHODS, "eagle3", SequentialTapsOffByOne)
    with serve(path, directory, 2, **BY_DECREE) as llm:
        watch = Watch(llm)
        run(llm, CASES[:1])
        assert departures(watch.rounds, eagle3.draft, head, streams) == {"hidden", "logits", "drafts"}


@pytest.mark.parametrize("method", DRAFT)
def test_blocks_that_nobody_was_given_are_noticed(
    method: str, target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, streams = target("qwen3")
    directory, head = head_of(tmp_path / "head", path, method)
    monkeypatch.setattr(HeadDrafter, "writes_ahead", False)
    with serve(path, directory, 7, **BY_DECREE) as llm:
        watch = Watch(llm)
        run(llm, CASES)
        assert "cells" in departures(watch.rounds, DRAFT[method], head, streams)


@pytest.mark.parametrize("max_model_len", [41, 48, 50])
@pytest.mark.parametrize("method", DRAFT)
def test_near_the_longest_sequence_nothing_is_written_past_it(
    method: str, max_model_len: int, target: Any, tmp_path: Path
) -> None:
    path, streams = target("llama")
    directory, head = head_of(tmp_path / "head", path, method)
    cases = [Case.of(length, length, temperature=0.0, max_tokens=None) for length in (max_model_len - 1, 25, 33)]
    with serve(path, directory, 6, max_model_len=max_model_len, **BY_DECREE) as llm:
        watch = Watch(llm)
        run(llm, cases)
        assert departures(watch.rounds, DRAFT[method], head, streams, max_model_len) == set()
        written = [position for one in watch.rounds for position in one.positions]
        assert max(written) == max_model_len - 1 and any(0 < one.length < 6 for one in watch.rounds)


@pytest.mark.parametrize("verifier", [BY_DECREE, {}], ids=["synthetic", "exact"])
@pytest.mark.parametrize("method", DRAFT)
def test_past_the_head_s_positions_generation_goes_on_without_drafts(
    method: str, verifier: dict[str, Any], target: Any, tmp_path: Path
) -> None:
    path, streams = target("qwen3")
    directory, head = head_of(tmp_path / "head", path, method, layer={"max_position_embeddings": 40})
    cases = [Case.of(length, length, temperature=0.0, max_tokens=None) for length in (20, 38, 60)]
    with serve(path, directory, 5, max_num_batched_tokens=33, **verifier) as llm:
        watch = Watch(llm)
        found = run(llm, cases)
        assert departures(watch.rounds, DRAFT[method], head, streams, 40) == set()
        assert {one.length for one in watch.rounds if len(one.tokens) > 41} == {0}
        assert {len(case.prompt) + len(ones[0][0]) for case, ones in zip(cases, found, strict=True)} == {MAX_LEN}
        llm.engine._scheduler.check_idle()
    if not verifier:
        with LLM(str(path), max_model_len=MAX_LEN) as llm:
            assert run(llm, cases) == found


# How often guesses stand, on a target whose next token is always of the same law, by a head that knows that law.


def knowing(path: Path, method: str, **head: Any) -> tuple[Path, Path]:
    """Both residual streams carry one vector from end to end, and both lm_heads are the same."""
    vector = torch.randn(SIZES["hidden_size"], generator=torch.Generator().manual_seed(5))
    target = write(path / "target")
    weights = load_file(target / "model.safetensors")
    dead = {name: torch.zeros_like(weights[name]) for name in weights if "o_proj" in name or "down_proj" in name}
    embedding = vector.expand_as(weights["model.embed_tokens.weight"]).clone()
    weights |= dead | {"model.embed_tokens.weight": embedding}
    save_file(weights, target / "model.safetensors")
    nothing = torch.zeros(SIZES["hidden_size"], 2 * SIZES["hidden_size"])
    tensors = head_tensors(method == "peagle", **head)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if "o_proj" in name or "down" in name}
    tensors["fc.weight"] = torch.cat((torch.eye(SIZES["hidden_size"]), nothing), dim=1)
    tensors |= {"norm.weight": weights["model.norm.weight"], "lm_head.weight": weights["lm_head.weight"]}
    if "draft_vocab_size" in head:
        marked = head_tensors(False, **head)["t2d"]
        tensors["lm_head.weight"] = weights["lm_head.weight"][marked].clone()
    if method == "peagle":
        tensors["mask_hidden"] = torch.nn.functional.pad(vector, (0, 2 * len(vector))).view(1, 1, -1)
    return target, write_head(path / "head", method == "peagle", tensors=tensors, **head)


class Uncoupled(Exact):
    """Lets drafters draw with noise of their own."""

    draft_noise = Purpose.DRAFT


def rates(target: Path, head: Path, uncoupled: bool = False, **options: Any) -> list[float]:
    """Acceptance by position, and the tokens must be those without drafts."""
    cases = [Case.of(9, salt, temperature=0.5 + 0.25 * salt, max_tokens=60) for salt in range(6)]
    with serve(target, head, 4, **options) as llm:
        if uncoupled:
            program(llm)._verifier = Uncoupled()
        found = run(llm, cases)
        report = llm.acceptance()
    with LLM(str(target), max_model_len=MAX_LEN) as llm:
        assert "verifier" in options or run(llm, cases) == found
    return [accepted / report.drafts for accepted in report.per_position]


@pytest.mark.parametrize("method", DRAFT)
def test_shared_noise_makes_a_head_that_knows_the_law_always_right(method: str, tmp_path: Path) -> None:
    target, head = knowing(tmp_path, method)
    coupled = rates(target, head)
    assert coupled[0] == 1.0 and min(coupled) > 0.9, "nothing falls but what lies past the end of a request"
    assert max(rates(target, head, uncoupled=True)) < 0.3, "it takes luck to draw the same token"
    assert max(rates(target, head, drafting={"draft_sample": "argmax"})) < 0.5
    assert rates(target, head, verifier="rejection") == coupled, "where p is q every draft stands"


@pytest.mark.parametrize("method", DRAFT)
def test_shared_noise_over_a_reduced_vocabulary(method: str, tmp_path: Path) -> None:
    target, head = knowing(tmp_path, method, draft_vocab_size=130)
    coupled, apart = rates(target, head), rates(target, head, uncoupled=True)
    assert 0.25 < coupled[0] < 0.85, "right wherever the target draws a token that the head has"
    assert coupled[0] > apart[0] + 0.2
