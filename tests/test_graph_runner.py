"""The graph runner's own part, on a CPU: two steps under way, spare rows, prompts beside decodes, and its errors.

`emulated` replaces CUDA: recorded programs are called, and results come late. On a GPU tests/test_gpu.py runs the same
comparisons with real recordings.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import Case, Right, plugin, run
from emulated import ABSURD, Emulated, Recorder
from heads import drafting
from outrider import LLM, SamplingParams
from outrider import config as config_module
from outrider.cache.layout import CacheLayout
from outrider.draft.eagle.base import HeadDrafter
from outrider.draft.registry import METHODS
from outrider.errors import CapacityError, OptionError, UnsupportedError
from outrider.runner import graph, slots
from outrider.runner.bound import Bound
from outrider.runner.eager import EagerRunner
from outrider.runner.graph import GraphPending
from outrider.runner.programs import Kind, Programs, Recorded
from outrider.runner.slots import to_device
from test_lossless import CASES, NGRAM, TIGHT, TIGHT_WITH_HEAD, WAYS, reference, serve
from workloads import agree, drive, random_cases


@pytest.fixture(autouse=True)
def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "RUNNERS", (Emulated,))


@pytest.fixture(scope="module")
def expected(tiny: Callable[..., Path]) -> tuple[Path, Any]:
    path = tiny("qwen3", tie_word_embeddings=True)
    return path, reference(path, CASES)


WAYS_HERE = [
    name
    for name, options in WAYS.items()
    if ":" not in str(options.get("speculative_config", {}).get("method", ""))  # no Python of a test's own
]


@pytest.mark.parametrize("way", WAYS_HERE)
def test_completions_are_those_of_the_eager_runner(way: str, expected: tuple[Path, Any]) -> None:
    path, results = expected
    with serve(path, **WAYS[way]) as llm:
        assert llm.choice.runner is Emulated
        assert run(llm, CASES) == results
        assert run(llm, CASES[::-1]) == results[::-1]
        llm.engine._scheduler.check_idle()


@pytest.mark.parametrize("method", ["ngram", "eagle3", "peagle"])
def test_acceptance_is_counted_as_by_the_eager_runner(
    method: str, expected: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row planned ahead asks for K drafts, whatever comes: what was never proposed is neither run nor counted."""
    path, _ = expected
    config = {**NGRAM, "num_speculative_tokens": 4} if method == "ngram" else drafting(method, 4)
    greedy = [case for case in CASES if case.sampling.greedy and not case.sampling.min_tokens]
    reports = []
    for runners in ((EagerRunner,), (Emulated,)):
        monkeypatch.setattr(config_module, "RUNNERS", runners)
        with serve(path, speculative_config=config) as llm:
            run(llm, greedy)
            reports.append(llm.acceptance())
    assert reports[0] == reports[1] and reports[0].drafted > 0


SQUEEZED = {"max_num_seqs": 6, "max_num_batched_tokens": 40}


def squeeze(method: str) -> dict[str, Any]:
    """Room for some two requests, so that they are preempted."""
    tight = TIGHT_WITH_HEAD if issubclass(METHODS[method], HeadDrafter) else TIGHT
    return {**SQUEEZED, **tight, "speculative_config": drafting(method, 4)}


@pytest.fixture(scope="module")
def alone(tiny: Callable[..., Path]) -> Callable[[int], tuple[Path, list[Case], dict[str, list[int]]]]:
    """Random requests, and what each yields with the eager runner, one after the other."""
    path = tiny("qwen3", tie_word_embeddings=True)

    def make(seed: int) -> tuple[Path, list[Case], dict[str, list[int]]]:
        cases = random_cases(40, seed)
        results = reference(path, cases)
        return path, cases, {str(number): ones[0][0] for number, ones in enumerate(results)}

    return make


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [2, 3])
def test_random_arrivals_aborts_preemptions_and_prefix_hits(method: str, seed: int, alone: Any) -> None:
    path, cases, expected = alone(seed)
    with serve(path, **squeeze(method)) as llm:
        found = drive(llm, cases, seed)
        assert agree(found, expected)
        assert found[1], "nothing was aborted"
        stats = llm.engine.stats()
        assert stats.num_preemptions and stats.prefix_hits


def test_the_comparison_of_workloads_can_fail(alone: Any) -> None:
    path, cases, expected = alone(1)
    with serve(path, **SQUEEZED) as llm:
        found, aborted = drive(llm, cases, 1)
    changed = next(number for number in found if len(found[number]) > 3 and number not in aborted)
    assert agree((found, aborted), expected)
    assert not agree(({**found, changed: [*found[changed][:-1], -5]}, aborted), expected)
    assert not agree(({**found, changed: found[changed][:-1]}, aborted), expected)


def runner_of(llm: LLM) -> Any:
    return llm.engine._worker._runner


def test_decodes_are_replayed_and_prompts_are_called(expected: tuple[Path, Any]) -> None:
    path, _ = expected
    with serve(path, max_num_seqs=3, capture_sizes=[1, 3]) as llm:
        recorder = runner_of(llm)._recorder
        assert recorder.num_recorded == 2 * 2, "sizes, with and without processors"
        for number in range(2):
            llm.engine.add(str(number), [1, 2, 3], SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True))
        results = 0
        while llm.engine.has_work:
            results += len(llm.engine.step())
        assert results == 2 * 9 and recorder.num_replayed == 8


def test_prompts_beside_decodes_are_called_in_bounded_steps(
    expected: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decodes are replayed all the same, and each gets a token every step."""
    path, _ = expected
    called: list[int] = []
    call = Emulated._call

    def look(self: Any, rows: Any, *more: Any) -> Any:
        called.append(int(rows[:, 1].sum()))
        return call(self, rows, *more)

    monkeypatch.setattr(Emulated, "_call", look)
    with serve(path, max_num_seqs=2, max_prefill_tokens_beside_decodes=7, enable_prefix_caching=False) as llm:
        engine, recorder = llm.engine, runner_of(llm)._recorder
        called.clear()  # of the prompts tried before
        sampling = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
        engine.add("decodes", [1, 2, 3], sampling)
        while not engine.step():
            pass
        replayed = recorder.num_replayed
        engine.add("prompt", list(range(1, 31)), sampling)
        gained = []
        while "prompt" not in gained:
            gained += [delta.request_id for delta, _ in engine.step()]
    assert called == [3, 7, 7, 7, 7, 2]
    assert recorder.num_replayed - replayed >= 5 and gained.count("decodes") >= 5


def test_a_step_that_decodes_sends_its_rows_and_what_has_grown(
    expected: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, ...]] = []

    def look(array: Any, device: torch.device) -> torch.Tensor:
        sent.append(array.shape)
        return to_device(array, device)

    monkeypatch.setattr(graph, "to_device", look)
    monkeypatch.setattr(slots, "to_device", look)
    with serve(expected[0], max_num_seqs=2, capture_sizes=[2]) as llm:
        llm.engine.add("a", list(range(14)), SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True))
        per_step = []
        while llm.engine.has_work:
            sent.clear()
            llm.engine.step()
            per_step.append([*sent])
    rows, block = (2, 4), (2, 1)
    assert len(per_step[0]) > 2, "an admission"
    assert {tuple(step) for step in per_step[1:-2]} == {(rows,), (block, rows)}
    assert per_step[1:-2].count([block, rows]) == 2, "at 16 and at 32 tokens"


def test_a_step_is_read_when_the_next_has_been_submitted(
    expected: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[tuple[str, int]] = []
    submit, result = Emulated.submit, GraphPending.result

    def submitted(self: Any, plan: Any) -> Any:
        order.append(("submit", plan.step))
        return submit(self, plan)

    def read(self: Any) -> Any:
        found = result(self)
        order.append(("read", found.step))
        return found

    monkeypatch.setattr(Emulated, "submit", submitted)
    monkeypatch.setattr(GraphPending, "result", read)
    with serve(expected[0]) as llm:
        run(llm, CASES[:1])
    last = max(step for _, step in order)
    assert last > 3
    for step in range(last):
        assert order.index(("submit", step + 1)) < order.index(("read", step)), step


@pytest.mark.parametrize("place", [(Emulated, "_replay"), (Emulated, "_call"), (Programs, "find")], ids=str)
def test_an_interrupt_with_steps_under_way_leaves_the_engine_usable(
    place: tuple[type[Any], str], expected: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, results = expected
    with serve(path, speculative_config=drafting("peagle", 3)) as llm:
        work, calls = getattr(*place), 0

        def interrupted(self: Any, *given: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise KeyboardInterrupt
            return work(self, *given)

        with monkeypatch.context() as patch:
            patch.setattr(*place, interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(llm, CASES)
        assert not llm.engine.has_work
        llm.engine._scheduler.check_idle()
        assert run(llm, CASES) == results


def test_a_step_takes_the_smallest_program_it_fits_in(expected: tuple[Path, Any]) -> None:
    path, _ = expected
    with serve(path, max_num_seqs=5, capture_sizes=[1, 3, 5]) as llm:
        found = [
            runner_of(llm)._programs.find(Kind(0, processed=True, drafting=False), rows).size for rows in range(1, 6)
        ]
    assert found == [1, 3, 3, 5, 5]


@pytest.mark.parametrize("method", ["peagle", "ngram"])
def test_a_step_that_verifies_few_drafts_takes_a_smaller_program(
    method: str, expected: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs for two K in one engine: each step takes the smaller that holds its drafts, and tokens stay exact."""
    path, _ = expected
    taken: list[tuple[int, int]] = []
    find = Programs.find

    def look(self: Any, wanted: Kind, num_rows: int) -> Recorded:
        found = find(self, wanted, num_rows)
        kind = next(kind for kind, programs in self._recorded.items() if found in programs)
        taken.append((wanted.num_drafts, kind.num_drafts))
        return found

    monkeypatch.setattr(Programs, "find", look)
    config = {**NGRAM, "num_speculative_tokens": 4} if method == "ngram" else drafting(method, 4)
    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    outputs: list[dict[str, list[int]]] = []
    for options in ({}, {"speculative_config": config, "capture_drafts": [2]}):
        taken.clear()
        with serve(path, **options) as llm:
            tokens: dict[str, list[int]] = {}
            for number, max_drafts in enumerate((2, 1, 4)):  # the last one joins after some steps of fewer drafts
                llm.engine.add(str(number), [1, 2, 3, 1, 2, 3, number], sampling, max_drafts)
                for _ in range(4):
                    for delta, _request in llm.engine.step():
                        tokens.setdefault(delta.request_id, []).extend(delta.tokens)
            while llm.engine.has_work:
                for delta, _request in llm.engine.step():
                    tokens.setdefault(delta.request_id, []).extend(delta.tokens)
            outputs.append(tokens)
    assert outputs[0] == outputs[1]
    assert {program for wanted, program in taken if wanted <= 2} == {2}
    assert {program for wanted, program in taken if wanted > 2} == {4}


def test_numbers_of_drafts_to_record_are_checked(expected: tuple[Path, Any]) -> None:
    for wrong in ([5], [-1]):
        with pytest.raises(OptionError, match=r"capture_drafts must be .* from 0 to num_speculative_tokens 4"):
            serve(expected[0], speculative_config=drafting("peagle", 4), capture_drafts=wrong)


def test_memory_that_runs_out_while_recording_names_what_to_lower(
    expected: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, body: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Recorder, "record", fail)
    with pytest.raises(CapacityError, match=r"for 8 rows was recorded, after 0 of .*lower gpu_memory_utilization"):
        serve(expected[0])


@pytest.mark.parametrize("runner", [EagerRunner, Emulated], ids=["eager", "graph"])
def test_memory_that_somebody_else_took_meanwhile_names_what_to_lower(
    runner: type[Any], expected: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_module, "RUNNERS", (runner,))

    def fail(self: Any, *given: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CacheLayout, "allocate", fail)
    with pytest.raises(CapacityError, match=r"memory ran out on cpu .* or lower gpu_memory_utilization"):
        serve(expected[0])


class Secretive(Right):
    """Reads the host and does not say so."""

    name = "secretive"
    needs = frozenset()


def test_a_part_that_reads_the_host_unsaid_is_named_before_anything_is_served(
    expected: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any, **named: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    def record(self: Any, body: Callable[[], None]) -> Callable[[], None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("tolist", "item", "numpy", "__int__", "__bool__"):
                patch.setattr(torch.Tensor, name, refuse)
            body()
        return body

    monkeypatch.setattr(Recorder, "record", record)
    with pytest.raises(UnsupportedError, match=r"with drafter secretive: .*must need HOST_CODE, which the eager"):
        serve(expected[0], speculative_config=plugin(Secretive, 3))
    serve(expected[0], speculative_config=drafting("peagle", 3)).close()


def test_a_failure_while_recording_names_what_failed_and_its_remedy(
    expected: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for said, error, remedy in (
        ("CUDA error: out of memory", CapacityError, "memory ran out .* lower gpu_memory_utilization"),
        ("operation not permitted when stream is capturing", UnsupportedError, "drafter none: .* HOST_CODE"),
        ("no kernel image is available", UnsupportedError, "no kernel image is available$"),
    ):

        def fail(self: Any, body: Any, said: str = said) -> Any:
            raise RuntimeError(said)

        monkeypatch.setattr(Recorder, "record", fail)
        with pytest.raises(error, match=remedy):
            serve(expected[0])


def test_prompt_steps_are_tried_before_any_request_comes(
    expected: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every size, to the largest, so that memory for it is known to be there; and they leave nothing behind."""
    path, results = expected
    tried: list[tuple[int, int]] = []
    run_step, record = Bound.run, Programs._record
    warm = False

    def look(self: Any, rows: Any, num_query: int, num_logits: int, *more: Any) -> Any:
        if not warm:
            tried.append((num_query, num_logits))
        return run_step(self, rows, num_query, num_logits, *more)

    def recording(*given: Any) -> Any:
        nonlocal warm
        warm = True
        return record(*given)

    monkeypatch.setattr(Bound, "run", look)
    monkeypatch.setattr(Programs, "_record", recording)
    with serve(path, max_num_batched_tokens=100) as llm:
        assert {size for size, _ in tried} == {1, 2, 4, 5, 8, 10, 16, 20, 32, 40, 48, 64, 80, 100}
        assert {0, 1, 2} < {logits for _, logits in tried}, "inside a prompt, its end, pieces of one, several together"
        slots = runner_of(llm)._bound.table.slots
        assert int(slots.length[-1]) == int(slots.computed[-1]) == 0
        assert run(llm, CASES) == results


def test_recording_is_reported(expected: tuple[Path, Any], caplog: pytest.LogCaptureFixture) -> None:
    told: list[tuple[int, int]] = []
    with (
        caplog.at_level("INFO", "outrider"),
        LLM(str(expected[0]), max_num_seqs=2, recording=lambda *n: told.append(n)),
    ):
        assert told == [(done, 4) for done in range(1, 5)]
    assert "recorded 4 programs, for up to 2 rows" in caplog.text


def test_parts_of_a_step_are_timed_when_asked(expected: tuple[Path, Any]) -> None:
    path, results = expected
    with serve(path, time_parts=True, speculative_config=drafting("peagle", 3)) as llm:
        assert run(llm, CASES) == results
        times = runner_of(llm).part_times()
        assert times is not None and set(times) == {"inputs", "target", "verify", "draft", "gap"}
        assert all(times[part] == 1.0 for part in ("inputs", "target", "verify", "draft", "gap"))
        assert runner_of(llm).part_times()["inputs"] == 0.0, "counted anew"
    with serve(path) as llm:
        assert runner_of(llm).part_times() is None


def test_a_result_is_nonsense_before_its_fence() -> None:
    """The emulation would notice a runner that reads too early."""
    recorder, x = Recorder(torch.device("cpu")), torch.ones(3)
    found = recorder.fetch(x)
    fence = recorder.fence()
    x.fill_(2)
    assert bool((found == ABSURD).all())
    fence.wait()
    assert bool((found == 1).all())
