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

from checkpoints import Case, run
from emulated import ABSURD, Emulated, Recorder
from heads import drafting
from outrider import LLM, SamplingParams
from outrider import config as config_module
from outrider.draft.head import HeadDrafter
from outrider.draft.registry import METHODS
from outrider.errors import CapacityError, UnsupportedError
from outrider.runner.eager import EagerRunner
from outrider.runner.graph import Kind
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
        assert isinstance(llm.engine._worker._runner, Emulated)
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


def test_a_step_takes_the_smallest_program_it_fits_in(expected: tuple[Path, Any]) -> None:
    path, _ = expected
    with serve(path, max_num_seqs=5, capture_sizes=[1, 3, 5]) as llm:
        found = [runner_of(llm)._find(Kind(drafts=False, processed=True), rows).size for rows in range(1, 6)]
    assert found == [1, 3, 3, 5, 5]


def test_memory_that_runs_out_while_recording_names_what_to_lower(
    expected: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, body: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Recorder, "record", fail)
    with pytest.raises(CapacityError, match=r"for 8 rows was recorded, after 0 of .*lower gpu_memory_utilization"):
        serve(expected[0])


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
    run_step = Emulated._run

    def look(self: Any, rows: Any, num_query: int, num_logits: int, *more: Any) -> None:
        if not self._recorded:
            tried.append((num_query, num_logits))
        run_step(self, rows, num_query, num_logits, *more)

    monkeypatch.setattr(Emulated, "_run", look)
    with serve(path, max_num_batched_tokens=100) as llm:
        assert {size for size, _ in tried} == {1, 16, 48, 100} and {logits for _, logits in tried} == {0, 1, 2}
        slots = runner_of(llm)._table.slots
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
