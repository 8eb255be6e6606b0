"""`LLM` over an engine in a process of its own: as over one in this process, and clear when that process ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from checkpoints import Case, prompt, run
from outrider import LLM, CapacityError, EngineDeadError, OptionError, PromptError, SamplingParams

NGRAM = {"method": "ngram", "prompt_lookup_min": 1, "num_speculative_tokens": 3}
CASES = [
    Case.of(5, 1, temperature=0.0, max_tokens=40),
    Case.of(17, 2, temperature=0.8, top_k=5, n=2),
    Case.of(30, 3, detokenize=True),
]
ENDLESS = SamplingParams(temperature=0.8, seed=1, max_tokens=80, ignore_eos=True)


def serve(path: Path, **options: Any) -> LLM:
    return LLM(str(path), **{"max_model_len": 96, "speculative_config": NGRAM, **options})


@pytest.fixture(scope="module")
def path(tiny: Callable[..., Path]) -> Path:
    return tiny("qwen3")


def processes() -> list[psutil.Process]:
    return [one for one in psutil.Process().children() if "spawn_main" in " ".join(one.cmdline())]


@pytest.fixture(scope="module")
def here(path: Path) -> Iterator[LLM]:
    with serve(path) as llm:
        yield llm


@pytest.fixture
def llm(path: Path) -> Iterator[LLM]:
    with serve(path, enable_multiprocessing=True) as llm:
        (engine,) = processes()
        yield llm
    assert not engine.is_running()


def test_it_is_as_in_one_process(path: Path, llm: LLM) -> None:
    with serve(path) as here:
        assert run(llm, CASES) == run(here, CASES)
        assert llm.acceptance() == here.acceptance() and llm.acceptance().accepted > 0
        assert llm.choice == here.choice and llm.watchdog() == here.watchdog()
        plain = here.generate(prompt(9), ENDLESS)[0].outputs[0]
        stop = plain.text[20:24]
        stopped = SamplingParams(temperature=0.8, seed=1, max_tokens=80, ignore_eos=True, stop=stop)
        found = [each.generate(prompt(9), stopped)[0] for each in (llm, here)]
        assert found[0].outputs == found[1].outputs and found[0].outputs[0].stop_reason == stop
        streams = [llm.stream(prompt(9, salt), ENDLESS) for salt in range(3)]
        pieces = ["" for _ in streams]
        for _ in range(10):
            for index, stream in enumerate(streams):
                pieces[index] += next(stream).text
        del streams[1]
        texts = [
            pieces[index] + "".join(piece.text for piece in stream)
            for index, stream in ((0, streams[0]), (2, streams[1]))
        ]
        assert texts == [here.generate(prompt(9, salt), ENDLESS)[0].outputs[0].text for salt in (0, 2)]
    with pytest.raises(PromptError, match="outside the vocabulary"):
        llm.generate([1, 10**6], ENDLESS)
    with pytest.raises(OptionError, match="process of its own"):
        llm.engine  # noqa: B018


class BrokenTextError(Exception):
    pass


def test_an_error_of_one_completion_or_an_interrupt_leaves_the_others_alone(llm: LLM, here: LLM) -> None:
    beside, broken = llm.stream(prompt(9, 1), ENDLESS), llm.stream(prompt(9, 2), ENDLESS)
    detokenizer: Any = broken._generation.completions[0].detokenizer

    def fails(*_: Any) -> bool:
        raise BrokenTextError

    detokenizer.append = fails
    with pytest.raises(BrokenTextError):
        list(broken)
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            while True:
                llm.generate([prompt(9, salt) for salt in range(4)], ENDLESS)
    finally:
        timer.cancel()
    assert "".join(piece.text for piece in beside) == here.generate(prompt(9, 1), ENDLESS)[0].outputs[0].text
    (engine,) = processes()
    stream = llm.stream(prompt(9), ENDLESS)
    next(stream)
    engine.kill()
    with pytest.raises(EngineDeadError, match="the engine failed") as found:
        list(stream)
    assert "killed by signal 9" in str(found.value.__cause__)
    with pytest.raises(EngineDeadError, match="the engine is dead"):
        llm.generate([1], ENDLESS)


def test_what_building_raises_is_raised_here_and_nothing_stays(path: Path) -> None:
    with pytest.raises(CapacityError, match="kv_cache_memory"):
        serve(path, kv_cache_memory=1, enable_multiprocessing=True)

    def interrupted(done: int, total: int) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        serve(path, progress=interrupted, enable_multiprocessing=True)
    assert processes() == [] and not [one for one in threading.enumerate() if one.name == "outrider-client"]


def test_a_stream_that_outlives_the_engine_ends_with_an_error(path: Path) -> None:
    llm = serve(path, enable_multiprocessing=True)
    pieces = llm.stream({"prompt_token_ids": [1, 2]}, ENDLESS)
    next(pieces)
    llm.close()
    with pytest.raises(EngineDeadError, match="closed"):
        list(pieces)
