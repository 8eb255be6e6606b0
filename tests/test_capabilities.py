"""What is declared works, and what is not is refused with its reason: there is no third case.

`verify_promise` takes one configuration to one runner. Either the runner's offer has a gap for it, and
choosing it is refused with that very reason; or it runs, and what it yields is what its verifier
promises. The last tests plant lies, on either side, which must not get past it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from checkpoints import Case, Knowing, Right, plugin, run
from heads import drafting as head_drafting
from outrider import LLM, DraftContext, Drafter
from outrider.capability import Feature, Offer
from outrider.config import EngineOptions, resolve
from outrider.draft.registry import METHODS
from outrider.engine import engine as engine_module
from outrider.models.decoder import Decoder
from outrider.models.registry import MODELS
from outrider.oracle import RefusedError
from outrider.runner import registry
from outrider.runner.base import RunnerConfig
from outrider.runner.eager import EagerRunner
from outrider.tensors import Draft
from outrider.verify.processors import PROCESSORS
from outrider.verify.registry import VERIFIERS

MAX_LEN = 64
FAMILIES = {"Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama"}
PLAIN = [Case.of(9, 1, temperature=0.0, max_tokens=12), Case.of(20, 2, temperature=0.0, max_tokens=12)]
WANTING: dict[str, dict[str, Any]] = {  # sampling that makes a step want the processor, and it alone
    "min_tokens": {"min_tokens": 4, "stop_token_ids": [5]},
    "temperature": {"temperature": 0.6},
    "truncation": {"top_k": 3},
}


def verify_promise(runner: type[Any], options: dict[str, Any], cases: list[Case], expected: Any) -> frozenset[Feature]:
    """Runs a configuration on a runner, or has it refused, and checks which; the features that were exercised."""
    resolved = resolve(EngineOptions.from_kwargs(runner=runner.name, **options))
    gaps = [gap for part in resolved.parts for gap in runner.offer.gaps(part)]
    if gaps:
        with pytest.raises(RefusedError) as refused:
            LLM(runner=runner.name, **options)
        assert all(str(gap) in str(refused.value) for gap in gaps)
        return frozenset()
    with LLM(runner=runner.name, **options) as llm:
        assert llm.choice.runner is runner
        found = run(llm, cases)
        name = llm.engine.resolved.runner.verifier.name
        if name == "synthetic":
            rates, report = options["synthetic_rates"], llm.acceptance()
            assert set(rates) <= {0.0, 1.0}, "rates that leave nothing to chance"
            allowed = report.drafted if all(rates) else 0
            assert report.accepted == allowed
        elif name == "exact" or all(case.sampling.greedy for case in cases):
            assert found == expected
        assert [len(ones[0][0]) for ones in found] == [case.sampling.max_tokens for case in cases]
        llm.engine._scheduler.check_idle()
        return frozenset().union(*(part.needs for part in resolved.parts))


@pytest.fixture(scope="module")
def served(tiny: Callable[..., Path]) -> Callable[[str, list[Case]], tuple[str, Any]]:
    """A family's checkpoint, and what cases yield on it, plainly run."""
    made: dict[str, Any] = {}

    def make(family: str, cases: list[Case]) -> tuple[str, Any]:
        path = str(tiny(family))
        key = repr((family, cases))
        if key not in made:
            with LLM(path, max_model_len=MAX_LEN, max_num_seqs=1, runner="eager") as llm:
                made[key] = [run(llm, [case])[0] for case in cases]
        Knowing.known = [[*case.prompt, *ones[0][0]] for case, ones in zip(cases, made[key], strict=True)]
        return path, made[key]

    yield make  # type: ignore[misc]
    Knowing.known = ()


DRAFTINGS: dict[str, dict[str, Any]] = {
    **{name: head_drafting(name) for name in METHODS},
    "host": plugin(Right, 3),
}
CHECKING: dict[str, dict[str, Any]] = {name: {"verifier": name} for name in VERIFIERS if name != "synthetic"} | {
    "synthetic-all": {"verifier": "synthetic", "synthetic_rates": [1.0] * 3},
    "synthetic-none": {"verifier": "synthetic", "synthetic_rates": [0.0] * 3},
}


def test_every_part_is_in_the_matrix() -> None:
    assert set(FAMILIES) == set(MODELS)
    assert set(WANTING) == {processor.name for processor in PROCESSORS}
    assert {options["verifier"] for options in CHECKING.values()} == set(VERIFIERS)
    assert set(METHODS) < set(DRAFTINGS)


@pytest.mark.parametrize("checking", CHECKING)
@pytest.mark.parametrize("drafting", DRAFTINGS)
@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("runner", registry.RUNNERS, ids=lambda runner: runner.name)
def test_every_runner_with_every_drafter_verifier_and_model(
    runner: type[Any], architecture: str, drafting: str, checking: str, served: Any
) -> None:
    path, expected = served(FAMILIES[architecture], PLAIN)
    options = {"model": path, "max_model_len": MAX_LEN, "speculative_config": DRAFTINGS[drafting], **CHECKING[checking]}
    verify_promise(runner, options, PLAIN, expected)


SETS = [names for size in range(1, len(WANTING) + 1) for names in itertools.combinations(WANTING, size)]


@pytest.mark.parametrize("names", SETS, ids="-".join)
@pytest.mark.parametrize("drafting", DRAFTINGS)
@pytest.mark.parametrize("runner", registry.RUNNERS, ids=lambda runner: runner.name)
def test_every_runner_with_every_set_of_processors(runner: type[Any], drafting: str, names: Any, served: Any) -> None:
    sampling = {key: value for name in names for key, value in WANTING[name].items()}
    asked = Case.of(9, 1, max_tokens=12, **sampling)
    assert names == tuple(processor.name for processor in PROCESSORS if processor.wanted(asked.sampling))
    if "stop_token_ids" in sampling:  # once it may end, it must not: the length is checked
        asked = Case.of(9, 1, max_tokens=12, **{**sampling, "min_tokens": 12})
    path, expected = served("qwen3", [asked, *PLAIN])
    options = {"model": path, "max_model_len": MAX_LEN, "speculative_config": DRAFTINGS[drafting]}
    verify_promise(runner, options, [asked, *PLAIN], expected)


class Opinionated(Drafter):
    """Gives the distribution it drew from: always uniform, and always the same guess."""

    name = "opinionated"
    needs = frozenset({Feature.DRAFT_LOGITS})
    gives_logits = True

    def propose(self, context: DraftContext) -> Draft:
        size = len(context.batch.slot)
        shape = (size, self.num_drafts)
        logits = torch.full((*shape, self.target.vocab_size), 2.5)
        past = (context.batch.logits_start.diff() > 0).int()
        return Draft(torch.ones(shape, dtype=torch.int64), past * self.num_drafts, logits)


def test_a_runner_that_offers_draft_logits_keeps_them(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, expected = served("qwen3", PLAIN)
    kept: list[Tensor | None] = []
    judge = VERIFIERS["rejection"].__call__  # type: ignore[operator]

    def look(self: Any, logits: Tensor, batch: Any, draft: Draft, slots: Any) -> Any:
        if batch.num_drafts.sum():
            kept.append(draft.logits)
        return judge(self, logits, batch, draft, slots)

    monkeypatch.setattr(VERIFIERS["rejection"], "__call__", look)
    drafting: dict[str, Any] = plugin(Opinionated, 3)  # type: ignore[arg-type]
    for runner in registry.RUNNERS:
        if Feature.DRAFT_LOGITS not in runner.offer.has:
            continue
        with LLM(
            path, max_model_len=MAX_LEN, verifier="rejection", speculative_config=drafting, runner=runner.name
        ) as llm:
            assert run(llm, PLAIN) == expected
        assert kept and all(logits is not None and bool((logits == 2.5).all()) for logits in kept)


def test_all_that_is_offered_here_is_exercised(served: Any) -> None:
    path, expected = served("qwen3", PLAIN)
    elsewhere = {Feature.CPU if torch.cuda.is_available() else Feature.CUDA}
    for runner in registry.RUNNERS:
        used: set[Feature] = set()
        for drafting, checking in itertools.product(DRAFTINGS, ("exact", "rejection")):
            options = {"model": path, "max_model_len": MAX_LEN, "speculative_config": DRAFTINGS[drafting]}
            used |= verify_promise(runner, {**options, **CHECKING[checking]}, PLAIN, expected)
        assert runner.offer.has - used <= elsewhere, "offered, but by no test made use of"


@pytest.mark.parametrize(
    ("option", "feature"), [("tensor_parallel_size", "tensor"), ("pipeline_parallel_size", "pipeline")]
)
def test_a_split_model_is_refused_by_the_eager_runner(served: Any, option: str, feature: str) -> None:
    path, expected = served("qwen3", PLAIN)
    with pytest.raises(RefusedError, match=f"runner eager: {option}=2 needs {feature}: .*leave it at 1"):
        LLM(path, **{option: 2})
    verify_promise(EagerRunner, {"model": path, option: 2}, PLAIN, expected)


# Lies. A runner that has less than it offers, and parts that need more than they declare.


class Boastful(EagerRunner):
    name: ClassVar[str] = "boastful"
    offer: ClassVar[Offer] = Offer(has=frozenset(Feature))


class Careless(EagerRunner):
    """Runs another model than it was given."""

    name: ClassVar[str] = "careless"

    def __init__(self, config: RunnerConfig, model: Decoder, *more: Any) -> None:
        model.norm.weight.neg_()
        super().__init__(config, model, *more)


def _refuse_host(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a tensor is read on the host")


@contextmanager
def host_closed() -> Iterator[None]:
    """While open, reading a tensor's numbers from Python fails, as it would while a step is recorded."""
    names = ("tolist", "item", "numpy", "__int__", "__bool__", "__float__", "__index__")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(torch.Tensor, name, _refuse_host)
        yield


class Recording(EagerRunner):
    """Runs the program as a runner that records it must: no part may read on the host."""

    name: ClassVar[str] = "recording"
    offer: ClassVar[Offer] = Offer(
        has=frozenset(
            {Feature.TOKEN_HISTORY, Feature.FEATURES, Feature.DRAFT_CACHE, Feature.CPU, Feature.DRAFT_LOGITS}
        ),
        lacks={
            Feature.HOST_CODE: "a recorded program has no Python in it; take the eager runner",
            Feature.CUDA: "this one is for tests; take the eager runner",
            Feature.TENSOR: "one process; leave it at 1",
            Feature.PIPELINE: "one process; leave it at 1",
        },
    )

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        run_program = self._program

        def closed(*inputs: Any) -> Any:
            with host_closed():
                return run_program(*inputs)

        self._program = closed  # type: ignore[assignment]


@pytest.fixture
def lend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return lambda *runners: monkeypatch.setattr(engine_module, "RUNNERS", runners)


@pytest.mark.parametrize("checking", CHECKING)
@pytest.mark.parametrize("drafting", DRAFTINGS)
def test_parts_that_declare_no_host_code_read_nothing_on_the_host(
    drafting: str, checking: str, served: Any, lend: Callable[..., None]
) -> None:
    lend(Recording)
    path, expected = served("qwen3", PLAIN)
    options = {"model": path, "max_model_len": MAX_LEN, "speculative_config": DRAFTINGS[drafting], **CHECKING[checking]}
    used = verify_promise(Recording, options, PLAIN, expected)
    assert (not used) == (drafting == "host"), "refused if and only if the drafter needs the host"


class Secretive(Right):
    """Needs the host and says nothing of it."""

    name = "secretive"
    needs = frozenset()


def test_a_part_that_needs_more_than_it_declares_is_caught(served: Any, lend: Callable[..., None]) -> None:
    lend(Recording)
    path, expected = served("qwen3", PLAIN)
    options = {"model": path, "max_model_len": MAX_LEN, "speculative_config": plugin(Secretive)}
    with pytest.raises(Exception, match="read on the host"):
        verify_promise(Recording, options, PLAIN, expected)


def test_a_runner_that_has_less_than_it_offers_is_caught(served: Any, lend: Callable[..., None]) -> None:
    lend(Boastful)
    path, expected = served("qwen3", PLAIN)
    with pytest.raises(AssertionError, match="refuses a split model"):
        verify_promise(Boastful, {"model": path, "tensor_parallel_size": 2}, PLAIN, expected)


def test_a_runner_with_other_tokens_is_caught(served: Any, lend: Callable[..., None]) -> None:
    lend(Careless)
    path, expected = served("qwen3", PLAIN)
    with pytest.raises(AssertionError):
        verify_promise(Careless, {"model": path, "max_model_len": MAX_LEN}, PLAIN, expected)


def test_an_offer_without_a_reason_for_what_it_lacks_is_caught() -> None:
    with pytest.raises(AssertionError, match="PIPELINE"):
        Offer(has=frozenset(Feature) - {Feature.PIPELINE})
