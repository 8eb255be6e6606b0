"""What is declared works, and what is not is refused with its reason: there is no third case.

`verify_promise` takes one configuration to one runner. Either the runner's offer has a gap for it, and
choosing it is refused with exactly the reasons declared; or it runs, and what it yields is what its verifier
promises. `verify_gap` takes what a runner declares that it lacks to that runner, which must fail at it.
The last tests plant lies, on either side and either way, which must not get past these two.

All of it runs on a CPU, and again on a GPU where there is one (`pytest -m gpu`).
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from checkpoints import Case, Knowing, Right, drafter_failures, plugin, run
from emulated import Emulated
from heads import drafting as head_drafting
from outrider import LLM, DraftContext, Drafter
from outrider import config as config_module
from outrider.capability import DEVICES, Feature, Offer
from outrider.cli import main as cli
from outrider.cli.support import parts, support, to_markdown
from outrider.config import resolve
from outrider.draft.registry import METHODS
from outrider.errors import UnsupportedError
from outrider.models.decoder import Decoder
from outrider.models.registry import MODELS
from outrider.options import EngineOptions
from outrider.oracle import RefusedError
from outrider.runner import registry
from outrider.runner.base import RunnerConfig
from outrider.runner.eager import EagerRunner
from outrider.runner.graph import GraphRunner
from outrider.tensors import Draft
from outrider.verify.registry import PROCESSORS, VERIFIERS

MAX_LEN = 64
SMALL = {"max_model_len": MAX_LEN, "max_num_seqs": 4, "capture_sizes": [2, 4]}
FAMILIES = {"Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama"}
PLAIN = [Case.of(9, 1, temperature=0.0, max_tokens=12), Case.of(20, 2, temperature=0.0, max_tokens=12)]
WANTING: dict[str, dict[str, Any]] = {  # sampling that makes a step want the processor, and it alone
    "min_tokens": {"min_tokens": 4, "stop_token_ids": [5]},
    "temperature": {"temperature": 0.6},
    "truncation": {"top_k": 3},
}
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

on_every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
by_every_runner = pytest.mark.parametrize("runner", registry.RUNNERS, ids=lambda runner: runner.name)

Work = tuple[Sequence[Case], Any]
"""Cases, and what they yield, plainly run."""


def verify_promise(runner: type[Any], options: dict[str, Any], *work: Work) -> frozenset[Feature]:
    """Runs a configuration on a runner, or has it refused, and checks which; the features that were exercised."""
    resolved = resolve(EngineOptions.from_kwargs(runner=runner.name, **options))
    declared = [gap for part in resolved.parts for gap in runner.offer.gaps(part)]
    if declared:
        with pytest.raises(RefusedError) as refused:
            LLM(runner=runner.name, **options)
        assert all(str(gap) in str(refused.value) for gap in declared)
        (reasons,) = [entry.gaps for entry in refused.value.refused if entry.runner == runner.name]
        assert list(reasons) == declared
        return frozenset()
    with LLM(runner=runner.name, **options) as llm:
        assert llm.choice.runner is runner
        for cases, expected in work:
            tell(cases, expected)
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
        while llm.engine.has_work:  # a step submitted before the last tokens were read
            llm.engine.step()
        llm.engine._scheduler.check_idle()
        return frozenset().union(*(part.needs for part in resolved.parts))


def tell(cases: Sequence[Case], expected: Any) -> None:
    """Lets the drafters that know what will come out know it."""
    Knowing.known = [[*case.prompt, *ones[0][0]] for case, ones in zip(cases, expected, strict=True)]


Served = Callable[..., tuple[dict[str, Any], Work]]


@pytest.fixture(scope="module")
def served(tiny: Callable[..., Path]) -> Iterator[Served]:
    """A family's checkpoint on a device, as options, and cases with what they yield there, plainly run."""
    made: dict[str, Any] = {}

    def make(device: str = "cpu", family: str = "qwen3", cases: Sequence[Case] = PLAIN) -> tuple[dict[str, Any], Work]:
        options = {"model": str(tiny(family)), "device": device, **SMALL}
        key = repr((device, family, cases))
        if key not in made:
            alone = {**options, "max_num_seqs": 1, "capture_sizes": None}
            with LLM(**alone, runner="eager") as llm:
                made[key] = [run(llm, [case])[0] for case in cases]
        return options, (cases, made[key])

    yield make
    Knowing.known = ()


@pytest.fixture
def lend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`lend(*runners)`: those are the runners there are."""
    return lambda *runners: monkeypatch.setattr(config_module, "RUNNERS", runners)


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


@on_every_device
@pytest.mark.parametrize("checking", CHECKING)
@pytest.mark.parametrize("drafting", DRAFTINGS)
@pytest.mark.parametrize("architecture", MODELS)
@by_every_runner
def test_every_runner_with_every_drafter_verifier_and_model(
    runner: type[Any], architecture: str, drafting: str, checking: str, device: str, served: Served
) -> None:
    options, work = served(device, FAMILIES[architecture])
    verify_promise(runner, {**options, "speculative_config": DRAFTINGS[drafting], **CHECKING[checking]}, work)


SETS = [names for size in range(1, len(WANTING) + 1) for names in itertools.combinations(WANTING, size)]


def wanting(names: tuple[str, ...]) -> Case:
    """A request that wants these processors and no others."""
    sampling = {key: value for name in names for key, value in WANTING[name].items()}
    asked = Case.of(9, 1, max_tokens=12, **sampling)
    assert names == tuple(processor.name for processor in PROCESSORS if processor.wanted(asked.sampling))
    if "stop_token_ids" in sampling:  # once it may end, it must not: the length is checked
        asked = Case.of(9, 1, max_tokens=12, **{**sampling, "min_tokens": 12})
    return asked


def wanted_sets(served: Served, device: str = "cpu", family: str = "qwen3") -> list[Work]:
    """A batch for each set of processors, of which one request wants them."""
    return [served(device, family, [wanting(names), *PLAIN])[1] for names in SETS]


@on_every_device
@pytest.mark.parametrize("drafting", DRAFTINGS)
@pytest.mark.parametrize("architecture", MODELS)
@by_every_runner
def test_every_runner_with_every_set_of_processors(
    runner: type[Any], architecture: str, drafting: str, device: str, served: Served
) -> None:
    options, _ = served(device, FAMILIES[architecture])
    work = wanted_sets(served, device, FAMILIES[architecture])
    verify_promise(runner, {**options, "speculative_config": DRAFTINGS[drafting]}, *work)


@on_every_device
@pytest.mark.parametrize("checking", CHECKING)
@by_every_runner
def test_every_runner_with_every_verifier_and_set_of_processors(
    runner: type[Any], checking: str, device: str, served: Served
) -> None:
    options, _ = served(device)
    options |= {"speculative_config": DRAFTINGS["peagle"], **CHECKING[checking]}
    verify_promise(runner, options, *wanted_sets(served, device))


@pytest.mark.parametrize("drafting", DRAFTINGS)
def test_the_graph_runner_with_every_set_of_processors_where_no_gpu_is(
    drafting: str, served: Served, lend: Callable[..., None]
) -> None:
    options, _ = served()
    lend(Emulated)
    used = verify_promise(Emulated, options | {"speculative_config": DRAFTINGS[drafting]}, *wanted_sets(served))
    assert (not used) == (drafting == "host"), "refused if and only if the drafter needs the host"


@pytest.mark.parametrize("checking", CHECKING)
@pytest.mark.parametrize("drafting", DRAFTINGS)
@pytest.mark.parametrize("architecture", MODELS)
def test_the_graph_runner_with_every_part_where_no_gpu_is(
    architecture: str, drafting: str, checking: str, served: Served, lend: Callable[..., None]
) -> None:
    options, work = served(family=FAMILIES[architecture])
    lend(Emulated)
    options |= {"speculative_config": DRAFTINGS[drafting], **CHECKING[checking]}
    used = verify_promise(Emulated, options, work)
    assert (not used) == (drafting == "host"), "refused if and only if the drafter needs the host"


class Opinionated(Drafter):
    """Gives the distribution it drew from: always uniform, and always the same guess."""

    name = "opinionated"
    needs = frozenset({Feature.DRAFT_LOGITS})
    gives_logits = True

    def propose(self, context: DraftContext) -> Draft:
        slot = context.batch.slot
        shape = (slot.shape[0], self.num_drafts)
        logits = torch.full((*shape, self.target.vocab_size), 2.5, device=slot.device)
        past = (context.batch.logits_start.diff() > 0).int()
        return Draft(torch.ones(shape, dtype=torch.int64, device=slot.device), past * self.num_drafts, logits)


@on_every_device
@by_every_runner
def test_a_runner_that_offers_draft_logits_keeps_them(
    runner: type[Any], device: str, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, work = served(device)
    judged: list[Tensor | None] = []
    judge = VERIFIERS["rejection"].__call__  # type: ignore[operator]

    def look(self: Any, logits: Tensor, batch: Any, draft: Draft, slots: Any) -> Any:
        judged.append(draft.logits)
        return judge(self, logits, batch, draft, slots)

    monkeypatch.setattr(VERIFIERS["rejection"], "__call__", look)
    options |= {"verifier": "rejection", "speculative_config": plugin(Opinionated, 3)}  # type: ignore[arg-type]
    if not verify_promise(runner, options, work):
        return
    with LLM(runner=runner.name, **options) as llm:
        run(llm, PLAIN)
        kept = llm.engine._worker._runner._bound.table.slots.draft_logits  # type: ignore[union-attr]
        assert bool((kept[: len(PLAIN)] == 2.5).all())
    assert judged and all(logits is not None for logits in judged)


@on_every_device
@by_every_runner
def test_all_that_is_offered_here_is_exercised(runner: type[Any], device: str, served: Served) -> None:
    here = Feature.CPU if device == "cpu" else Feature.CUDA
    if here not in runner.offer.has:
        pytest.skip(f"{runner.name} is not for a {here.name}: {runner.offer.lacks[here]}")
    options, work = served(device)
    used: set[Feature] = set()
    for drafting in DRAFTINGS.values():
        used |= verify_promise(runner, {**options, "speculative_config": drafting}, work)
    used |= verify_promise(runner, {**options, "verifier": "rejection"}, work)
    assert runner.offer.has - used <= DEVICES - {here}, "offered, but by no test made use of"


@pytest.mark.parametrize("special", ["without_triton", "old_cuda"])
@pytest.mark.parametrize("drafting", DRAFTINGS)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
def test_a_gpu_without_kernels_is_served(
    device: str, drafting: str, special: str, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, work = served(device)
    if special == "without_triton":
        monkeypatch.setattr("outrider.kernels.op.HAS_TRITON", False)
    else:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    for runner in registry.RUNNERS:
        used = verify_promise(runner, {**options, "speculative_config": DRAFTINGS[drafting]}, work)
        assert (Feature[special.upper()] in used) == (Feature[special.upper()] in runner.offer.has)


@pytest.mark.parametrize("name", ["tensor", "pipeline"])
@on_every_device
@by_every_runner
def test_a_split_model_is_refused_by_every_runner(runner: type[Any], device: str, name: str, served: Served) -> None:
    options, work = served(device)
    option = f"{name}_parallel_size"
    with pytest.raises(RefusedError, match=f"runner {runner.name}: {option}=2 needs {name}: .*leave it at 1"):
        LLM(**options, **{option: 2})
    assert not verify_promise(runner, {**options, option: 2}, work)


# What a runner lacks, it really cannot do.

PROBES: dict[Feature, dict[str, Any]] = {
    Feature.HOST_CODE: {"speculative_config": plugin(Right, 3)},
    Feature.TOKEN_HISTORY: {"speculative_config": head_drafting("ngram")},
    Feature.FEATURES: {"speculative_config": head_drafting("eagle3")},
    Feature.DRAFT_CACHE: {"speculative_config": head_drafting("peagle")},
    Feature.DRAFT_LOGITS: {"verifier": "rejection", "speculative_config": head_drafting("peagle")},
    Feature.CPU: {"device": "cpu"},
    Feature.CUDA: {"device": "cuda"},
    Feature.TENSOR: {"tensor_parallel_size": 2},
    Feature.PIPELINE: {"pipeline_parallel_size": 2},
}
"""A configuration that needs the feature."""

NOT_PROBED: dict[tuple[str, Feature], str] = {
    ("graph", Feature.WITHOUT_TRITON): "declined for the memory it would take; it may well run",
    ("graph", Feature.OLD_CUDA): "there is no such GPU to try it on",
}


def attempt(runner: type[Any], options: dict[str, Any], cases: Sequence[Case]) -> Any:
    """What comes of a configuration on a runner that takes whatever it is given."""
    unchecked = type(runner.__name__, (runner,), {"offer": Offer(has=frozenset(Feature))})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_module, "RUNNERS", (unchecked,))
        with LLM(**options) as llm:
            return run(llm, cases)


def verify_gap(
    runner: type[Any], feature: Feature, options: dict[str, Any], work: Work, attempt: Callable[..., Any] = attempt
) -> None:
    """That the runner fails where it is made to serve what it declares that it lacks; and not all runners do."""
    assert feature in runner.offer.lacks
    cases, expected = work
    resolve(EngineOptions.from_kwargs(**options))  # nothing else is wrong with it
    for other in (EagerRunner, GraphRunner):
        if feature in other.offer.has and not DEVICES & {feature}:
            assert attempt(other, options, cases) == expected, "the probe itself is wrong"
            break
    try:
        found = attempt(runner, options, cases)
    except Exception:
        return
    assert found != expected, f"runner {runner.name} declares that it lacks {feature.name}, but has it"


@contextmanager
def in_its_own_process() -> Iterator[Callable[..., Any]]:
    """`attempt`, elsewhere: a recording that fails may leave CUDA in no state for the tests that follow."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda *given: pool.submit(attempt, *given).result()


GAPS = [(runner, feature) for runner in registry.RUNNERS for feature in runner.offer.lacks]


@pytest.mark.parametrize(
    ("runner", "feature"),
    [
        pytest.param(
            runner,
            feature,
            id=f"{runner.name}-{feature.name.lower()}",
            marks=ON_GPU if feature not in DEVICES and Feature.CPU not in runner.offer.has else [],
        )
        for runner, feature in GAPS
        if (runner.name, feature) not in NOT_PROBED
    ],
)
def test_what_a_runner_lacks_it_cannot_do(runner: type[Any], feature: Feature, served: Served) -> None:
    device = "cuda" if feature not in DEVICES and Feature.CPU not in runner.offer.has else "cpu"
    options, work = served(device)
    if device == "cpu":
        verify_gap(runner, feature, {**options, **PROBES[feature]}, work)
        return
    with in_its_own_process() as elsewhere:
        verify_gap(runner, feature, {**options, **PROBES[feature]}, work, elsewhere)


def test_every_gap_is_probed_or_has_a_reason_why_not() -> None:
    assert set(PROBES) | {feature for _, feature in NOT_PROBED} == set(Feature)
    assert set(NOT_PROBED) <= {(runner.name, feature) for runner, feature in GAPS}, "a reason for no gap"
    assert all(feature in PROBES or (runner.name, feature) in NOT_PROBED for runner, feature in GAPS)


# The table of all this in the documentation.


def test_the_support_page_is_what_the_code_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["outrider", "explain", "--table"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    page = (Path(__file__).parent.parent / "docs" / "reference" / "support.md").read_text()
    assert not ended.value.code
    assert page == capsys.readouterr().out, "write it anew: outrider explain --table > docs/reference/support.md"


def test_the_support_table_for_scripts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["outrider", "explain", "--table", "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    rows = json.loads(capsys.readouterr().out)["support"]
    (row,) = [row for row in rows if row["part"] == "drafter peagle" and row["device"] == "CPU"]
    lacking = {"runner": "graph", "feature": "cpu", "reason": GraphRunner.offer.lacks[Feature.CPU]}
    assert row["runners"] == ["eager"] and row["passed_over"] == [lacking]


def test_the_support_table_has_every_part_and_every_reason() -> None:
    cells = support(registry.RUNNERS)
    names = {part.name for part in parts()}
    assert {cell.part for cell in cells} == names
    for known in (*METHODS, *VERIFIERS, *MODELS, *(processor.name for processor in PROCESSORS)):
        assert any(known in name.split() for name in names)
    lacking = {(runner.name, feature.name.lower()) for runner in registry.RUNNERS for feature in runner.offer.lacks}
    assert {(reason.runner, reason.feature) for cell in cells for reason in cell.reasons} == lacking
    for cell in cells:
        assert set(cell.runners) | {reason.runner for reason in cell.reasons} == {one.name for one in registry.RUNNERS}
    page = to_markdown(cells)
    assert all(reason in page for runner in registry.RUNNERS for reason in runner.offer.lacks.values())


def test_the_support_table_follows_the_offers(monkeypatch: pytest.MonkeyPatch) -> None:
    page = to_markdown(support((Boastful,)))
    assert "refused" not in page and "[^1]" not in page
    assert to_markdown(support((Modest,))).count("eager lacks") == 0
    assert f"runner modest lacks draft_logits: {Modest.offer.lacks[Feature.DRAFT_LOGITS]}" in to_markdown(
        support((Modest,))
    )


# Lies. Runners that have less than they offer, or more, and parts that need more than they declare.


class Boastful(EagerRunner):
    name: ClassVar[str] = "boastful"
    offer: ClassVar[Offer] = Offer(has=frozenset(Feature))


class Modest(EagerRunner):
    """Has more than it says."""

    name: ClassVar[str] = "modest"
    offer: ClassVar[Offer] = Offer(
        has=EagerRunner.offer.has - {Feature.DRAFT_LOGITS, Feature.HOST_CODE},
        lacks={
            **EagerRunner.offer.lacks,
            Feature.DRAFT_LOGITS: "it says that it keeps none; take the eager runner",
            Feature.HOST_CODE: "it says that it calls none; take the eager runner",
        },
    )


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
            Feature.TENSOR: "one process; leave it at 1",
            Feature.PIPELINE: "one process; leave it at 1",
            **dict.fromkeys(DEVICES - {Feature.CPU}, "this one is for tests; take the eager runner"),
        },
    )

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        run_program = self._bound.program

        def closed(*inputs: Any) -> Any:
            with host_closed():
                return run_program(*inputs)

        self._bound.program = closed  # type: ignore[assignment]


@pytest.mark.parametrize("checking", CHECKING)
@pytest.mark.parametrize("drafting", DRAFTINGS)
def test_parts_that_declare_no_host_code_read_nothing_on_the_host(
    drafting: str, checking: str, served: Served, lend: Callable[..., None]
) -> None:
    options, work = served()
    lend(Recording)
    options |= {"speculative_config": DRAFTINGS[drafting], **CHECKING[checking]}
    used = verify_promise(Recording, options, work)
    assert (not used) == (drafting == "host"), "refused if and only if the drafter needs the host"


class Secretive(Right):
    """Needs the host and says nothing of it."""

    name = "secretive"
    needs = frozenset()


@pytest.mark.failing_drafter
def test_a_part_that_needs_more_than_it_declares_is_caught(served: Served, lend: Callable[..., None]) -> None:
    """A drafter that fails costs its drafts alone, so it is the record of its failures that tells."""
    options, work = served()
    lend(Recording)
    with drafter_failures() as failures:
        verify_promise(Recording, {**options, "speculative_config": plugin(Secretive)}, work)
    assert any("secretive failed in propose: RuntimeError: a tensor is read on the host" in line for line in failures)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
def test_a_part_that_needs_more_than_it_declares_is_caught_by_recording(device: str, served: Served) -> None:
    options, (cases, _) = served(device)
    said = r"(?s)with drafter secretive: .*must need HOST_CODE, which the eager"  # around CUDA's several lines
    with in_its_own_process() as elsewhere, pytest.raises(UnsupportedError, match=said):
        elsewhere(GraphRunner, {**options, "speculative_config": plugin(Secretive)}, cases)


def test_a_runner_that_has_less_than_it_offers_is_caught(served: Served, lend: Callable[..., None]) -> None:
    options, work = served()
    lend(Boastful)
    with pytest.raises(AssertionError, match="refuses a split model"):
        verify_promise(Boastful, {**options, "tensor_parallel_size": 2}, work)


@pytest.mark.parametrize(
    ("runner", "feature"),
    [(Modest, Feature.DRAFT_LOGITS), (Modest, Feature.HOST_CODE), (Emulated, Feature.HOST_CODE)],
    ids=["modest-draft_logits", "modest-host_code", "emulated-host_code"],  # the last calls what it says it records
)
def test_a_runner_that_has_more_than_it_offers_is_caught(runner: type[Any], feature: Feature, served: Served) -> None:
    options, work = served()
    with pytest.raises(AssertionError, match=f"runner {runner.name} declares that it lacks {feature.name}, but has it"):
        verify_gap(runner, feature, {**options, **PROBES[feature]}, work)


def test_a_probe_that_no_runner_passes_is_caught(served: Served) -> None:
    options, (cases, expected) = served()
    with pytest.raises(AssertionError, match="the probe itself is wrong"):
        verify_gap(Modest, Feature.HOST_CODE, {**options, **PROBES[Feature.HOST_CODE]}, (cases, expected[::-1]))


def test_a_runner_with_other_tokens_is_caught(served: Served, lend: Callable[..., None]) -> None:
    options, work = served()
    lend(Careless)
    with pytest.raises(AssertionError):
        verify_promise(Careless, options, work)


def test_an_offer_without_a_reason_for_what_it_lacks_is_caught() -> None:
    with pytest.raises(AssertionError, match="PIPELINE"):
        Offer(has=frozenset(Feature) - {Feature.PIPELINE})
