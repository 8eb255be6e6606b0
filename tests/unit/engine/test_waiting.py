"""Whoever waits for a completion hears how it ended, whatever became of it or of the one beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoints import Case, plugin, program, prompt, run
from outrider import LLM, EngineDeadError, HostDrafter, SamplingParams
from outrider.engine.detokenize import Detokenizer
from outrider.engine.stream import Stream
from outrider.runner.eager import EagerRunner
from outrider.schedule.scheduler import Scheduler

LONG = SamplingParams(temperature=0.8, seed=1, max_tokens=40, ignore_eos=True)
CHECKS = [Case.of(5, 1, temperature=0.0), Case.of(17, 2, temperature=0.8, top_k=5), Case.of(17, 3, detokenize=True)]
MOST_STEPS = 300


class Counting(HostDrafter):
    """Repeats the text's end, and knows who is in a slot."""

    slots: set[int]

    def admit(self, slot: int, tokens: Any) -> None:
        self.slots = {*getattr(self, "slots", ()), slot}

    def release(self, slot: int) -> None:
        self.slots.remove(slot)

    def guess(self, slot: int, tokens: list[int]) -> list[int]:
        assert slot in self.slots
        return tokens[-2:]


def start(llm: LLM, salt: int, sampling: SamplingParams = LONG) -> Stream:
    return llm.stream(prompt(9, salt), sampling)


def text(stream: Stream) -> str:
    return "".join(piece.text for piece in stream)


@pytest.fixture(scope="module")
def path(tiny: Callable[..., Path]) -> str:
    return str(tiny("qwen3"))


@pytest.fixture(scope="module")
def expected(path: str) -> tuple[Any, list[str]]:
    with LLM(path, max_model_len=96) as llm:
        return run(llm, CHECKS), [text(start(llm, salt)) for salt in range(3)]


@pytest.fixture
def llm(path: str, expected: tuple[Any, list[str]]) -> Iterator[LLM]:
    """An engine that steps no more than it must, and serves as before whatever a test did to it."""
    with LLM(path, max_model_len=96, max_num_seqs=8, speculative_config=plugin(Counting)) as llm:
        steps, step = 0, llm.engine.step

        def counted() -> Any:
            nonlocal steps
            steps += 1
            assert steps < MOST_STEPS, "somebody waits for ever"
            return step()

        llm.engine.step = counted  # type: ignore[method-assign]
        yield llm
        assert run(llm, CHECKS) == expected[0]
        assert not llm.engine.has_work and not llm._client.completions
        llm.engine._scheduler.check_idle()
        llm.engine.add("last", [1], SamplingParams(max_tokens=1))
        llm.engine.step()
        assert len(program(llm)._drafter.slots) == 1, "released, but for the last"  # type: ignore[attr-defined]


def interrupt(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, after: int, error: type[BaseException]) -> None:
    """The nth call from now on raises, once, when it is done."""
    call, calls = getattr(where, name), 0

    def interrupted(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        result = call(*given, **named)
        if calls == after:
            raise error
        return result

    monkeypatch.setattr(where, name, interrupted)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize(
    "place",
    ["submit", "forward", "guess", "admit", "release", "update", "schedule", "_take", "close", "apply", "preempt"],
)
def test_an_interrupt_leaves_the_engine_usable(
    llm: LLM, place: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, scheduler, drafter = llm.engine, llm.engine._scheduler, program(llm)._drafter
    runner = engine._worker._runner
    found: dict[str, tuple[Any, str, int]] = {
        "submit": (engine._worker, "submit", 5),
        "forward": (program(llm)._model, "forward", 5),
        "guess": (drafter, "guess", 5),
        "admit": (drafter, "admit", 2),
        "release": (drafter, "release", 1),
        "update": (runner._bound.table, "update", 3),  # type: ignore[union-attr]
        "schedule": (scheduler, "_plan_decodes", 4),
        "_take": (Scheduler, "_take", 5),
        "close": (scheduler._queues, "close", 1),
        "apply": (scheduler, "apply", 4),
        "preempt": (scheduler._queues, "start", 2),
    }
    stream = start(llm, 0)
    next(stream)
    interrupt(monkeypatch, *found[place], error)
    with pytest.raises(error):
        run(llm, [Case.of(9, salt, max_tokens=4 + salt) for salt in range(5)])
    assert not engine.has_work
    assert not drafter.slots, "all are released, one whose admission was interrupted too"  # type: ignore[attr-defined]
    before = len(stream.output.outputs[0].token_ids)
    assert len(list(stream)) <= before
    assert stream.output.outputs[0].finish_reason == "abort"


def test_a_runner_that_cannot_be_emptied_is_not_used_again(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(path, max_model_len=96, speculative_config=plugin(Counting)) as llm:
        next(start(llm, 0))
        stream = start(llm, 1)
        next(stream)

        def refuse(runner: EagerRunner) -> None:
            raise LookupError("never heard of it")

        monkeypatch.setattr(EagerRunner, "reset", refuse)
        interrupt(monkeypatch, program(llm)._model, "forward", 1, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        with pytest.raises(EngineDeadError, match="failed earlier") as dead:
            next(stream)
        assert isinstance(dead.value.__cause__, LookupError)


def test_an_interrupt_while_text_is_made_costs_one_completion(
    llm: LLM, expected: tuple[Any, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [start(llm, salt) for salt in range(3)]
    texts = [next(stream).text for stream in streams]
    interrupt(monkeypatch, Detokenizer, "append", 4, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        for index, stream in enumerate(streams):
            texts[index] += text(stream)
    found = [one + text(stream) for one, stream in zip(texts, streams, strict=True)]
    reasons = [stream.output.outputs[0].finish_reason for stream in streams]
    assert sorted(reasons) == ["abort", "length", "length"]
    for one, whole, reason in zip(found, expected[1], reasons, strict=True):
        assert one == whole if reason == "length" else whole.startswith(one)


class BrokenTextError(Exception):
    pass


def break_text(stream: Stream, llm: LLM, after: int = 5) -> None:
    """One completion's text fails at its nth token from now on."""
    request_id = stream._generation.completions[0].id
    detokenizer = llm._client.completions[request_id][1].detokenizer
    assert detokenizer is not None
    append, calls = detokenizer.append, 0

    def broken(*given: Any) -> bool:
        nonlocal calls
        calls += 1
        if calls == after:
            raise BrokenTextError(f"token {calls}")
        return append(*given)

    detokenizer.append = broken  # type: ignore[method-assign]


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_an_error_of_one_completion_is_raised_to_its_owner_alone(
    llm: LLM, expected: tuple[Any, list[str]], broken: int
) -> None:
    streams = [start(llm, salt) for salt in range(3)]
    break_text(streams[broken], llm)
    found = {}
    for index, stream in enumerate(streams):
        if index != broken:
            found[index] = text(stream)
    assert found == {index: expected[1][index] for index in found}
    output = streams[broken].output.outputs[0]
    assert output.finish_reason == "abort"
    taken = []
    with pytest.raises(BrokenTextError, match="token 5"):
        taken.extend(streams[broken])  # what came before it first, then the error
    assert len(taken) == 0 or expected[1][broken].startswith("".join(piece.text for piece in taken))
    assert list(streams[broken]) == [], "told once"
    assert len(output.token_ids) >= 5 and expected[1][broken].startswith(output.text) and output.text


def test_pieces_before_an_error_are_handed_out(llm: LLM, expected: tuple[Any, list[str]]) -> None:
    stream, beside = start(llm, 0), start(llm, 1)
    break_text(stream, llm, after=20)
    assert text(beside) == expected[1][1]
    taken = []
    with pytest.raises(BrokenTextError):
        for piece in stream:
            taken.append(piece)
    assert 10 < len(taken) < 20 and expected[1][0].startswith("".join(piece.text for piece in taken))


def test_an_error_in_generate_is_raised_by_it(
    llm: LLM, expected: tuple[Any, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = start(llm, 0)
    made: list[Detokenizer] = []
    make = llm._detokenizer

    def making(*given: Any) -> Any:
        made.append(make(*given))  # type: ignore[arg-type]
        if len(made) == 2:
            monkeypatch.setattr(made[-1], "append", None)
        return made[-1]

    monkeypatch.setattr(llm, "_detokenizer", making)
    with pytest.raises(TypeError, match="NoneType"):
        llm.generate([prompt(9, salt) for salt in range(3)], LONG)
    assert len(llm._client.completions) == 1
    assert text(beside) == expected[1][0]


def test_a_request_that_was_aborted_by_hand_ends(llm: LLM, expected: tuple[Any, list[str]]) -> None:
    stream, beside = start(llm, 0), start(llm, 1)
    first = next(stream).text
    request_id = stream._generation.completions[0].id
    assert llm.engine.knows(request_id)
    llm.engine.abort(request_id)
    assert not llm.engine.knows(request_id)
    rest = text(stream)
    output = stream.output.outputs[0]
    assert output.finish_reason == "abort" and expected[1][0].startswith(first + rest)
    assert stream.output.acceptance.drafts >= 0 and len(output.token_ids) < 40
    assert llm.engine.has_work, "it was told at once, while others go on"
    assert text(beside) == expected[1][1]


def test_generate_ends_if_all_is_aborted_by_hand(llm: LLM) -> None:
    def abort_all(done: int, total: int) -> None:
        for request_id in list(llm.engine._requests):
            llm.engine.abort(request_id)

    first = SamplingParams(max_tokens=2, ignore_eos=True, detokenize=False)
    found = llm.generate([prompt(9, salt) for salt in range(3)], [first, LONG, LONG], progress=abort_all)
    assert [output.outputs[0].finish_reason for output in found] == ["length", "abort", "abort"]
    assert all(0 < len(output.outputs[0].token_ids) < 40 for output in found)


def test_steps_that_somebody_else_took_leave_nobody_waiting(llm: LLM) -> None:
    stream = start(llm, 0)
    while llm.engine.has_work:
        llm.engine.step()
    assert list(stream) == [] and stream.output.outputs[0].finish_reason == "abort"


def test_generate_within_generate(llm: LLM, expected: tuple[Any, list[str]]) -> None:
    inner: list[str] = []

    def again(done: int, total: int) -> None:
        if not inner:
            inner.append(llm.generate(prompt(9, 2), LONG)[0].outputs[0].text)

    short = SamplingParams(max_tokens=2, ignore_eos=True)
    found = llm.generate([prompt(9, 0), prompt(9, 1), prompt(9, 0)], [LONG, LONG, short], progress=again)
    assert [output.outputs[0].text for output in found[:2]] + inner == expected[1]


def test_a_closed_stream_ends(llm: LLM) -> None:
    stream = start(llm, 0)
    next(stream)
    stream.close()
    stream.close()
    assert not llm.engine.has_work
    list(stream)
    assert stream.output.outputs[0].finish_reason == "abort" and stream.output.finished


@pytest.mark.parametrize("place", ["_take", "_advance", "schedule", "_plan_decodes"])
def test_a_stream_dropped_in_the_middle_of_a_step_disturbs_nothing(
    llm: LLM, place: str, expected: tuple[Any, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [start(llm, salt) for salt in range(3)]
    for stream in streams:
        next(stream)
    request_id = streams[1]._generation.completions[0].id
    del stream
    call = getattr(llm.engine._scheduler, place)
    seen = []

    def dropping(*given: Any) -> Any:
        result = call(*given)
        if streams[1] is not None:
            streams[1] = None  # type: ignore[call-overload]
            seen.append(llm.engine.knows(request_id))
        return result

    monkeypatch.setattr(llm.engine._scheduler, place, dropping)
    rest = text(streams[0])
    assert expected[1][0].endswith(rest) and rest
    assert seen == [True], "it was aborted while the scheduler was at work"
    assert not llm.engine.knows(request_id)
    assert expected[1][2].endswith(text(streams[2]))


def test_a_stream_dropped_while_another_is_started(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = [start(llm, 0)]
    add = llm.engine._scheduler.add

    def dropping(request: Any) -> None:
        streams.clear()
        add(request)

    monkeypatch.setattr(llm.engine._scheduler, "add", dropping)
    assert len(list(start(llm, 1))) == 40
