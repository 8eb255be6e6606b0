"""One LLM used by several threads, from inside itself, after its end, and in forked children."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
from torch import Tensor

from checkpoints import Case, prompt, run
from outrider import LLM, EngineDeadError, LogitsProcessor, SamplingParams
from outrider.core.turns import FairLock, in_turn
from outrider.errors import EngineBusyError, EngineClosedError
from outrider.processing import SamplingField
from outrider.workers.messages import Ask, Call

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}
WORKS = [
    [
        Case.of(5 + 3 * thread, thread + index, temperature=0.8 * (index % 2), detokenize=index == 2)
        for index in range(3)
    ]
    for thread in range(4)
]
LONG = SamplingParams(temperature=0.8, seed=1, max_tokens=80, ignore_eos=True, detokenize=False)
WAYS: dict[str, dict[str, Any]] = {
    "here": {},
    "worker": {"distributed_executor_backend": "mp"},
    "process": {"enable_multiprocessing": True},
}


class Calls(LogitsProcessor):
    """Calls what a test says, from inside a step."""

    name = "calls"
    fields = (SamplingField("call", float, 0.0, "calls"),)
    what: ClassVar[Callable[[], object]]

    def __call__(self, logits: Tensor, *given: Any) -> Tensor:
        Calls.what()
        return logits


def serve(path: Path, **options: Any) -> LLM:
    return LLM(str(path), **{"max_model_len": 96, "speculative_config": NGRAM, **options})


@pytest.fixture(scope="module")
def path(tiny: Callable[..., Path]) -> Path:
    return tiny("qwen3")


@pytest.fixture(scope="module")
def expected(path: Path) -> Any:
    with serve(path, speculative_config=None, max_num_seqs=1) as llm:
        return [run(llm, work) for work in WORKS]


@pytest.fixture(scope="module", params=WAYS)
def shared(request: pytest.FixtureRequest, path: Path) -> Iterator[LLM]:
    with serve(path, **WAYS[request.param]) as llm:
        yield llm


def streamed(llm: LLM, case: Case) -> list[int]:
    return [piece.token_id for piece in llm.stream({"prompt_token_ids": list(case.prompt)}, case.sampling)]


def test_threads_share_an_llm(shared: LLM, expected: Any) -> None:
    """Each gets its own tokens, by `generate` and by `stream`, whatever the others ask."""

    def work(thread: int) -> bool:
        for _ in range(4):
            assert run(shared, WORKS[thread]) == expected[thread]
            for case, ((tokens, *_),) in zip(WORKS[thread], expected[thread], strict=True):
                assert streamed(shared, case) == tokens
            next(shared.stream({"prompt_token_ids": [1, 2, 3]}, LONG))  # and lets it go half way
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert run(shared, WORKS[0]) == expected[0]
    assert shared.acceptance().drafts > 0


def test_without_turns_threads_break_an_engine(path: Path, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above would see if nothing kept threads apart."""

    class Nobodys:
        def _is_owned(self) -> bool:
            return True

    llm, right = serve(path), []
    monkeypatch.setattr(llm.engine.lock, "thread_lock", Nobodys())

    def work(thread: int) -> None:
        for _ in range(20):
            right.append(run(llm, WORKS[thread]) == expected[thread])

    threads = [threading.Thread(target=quietly, args=(work, thread), daemon=True) for thread in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(20)
    assert len(right) < 80 or not all(right)


def quietly(work: Callable[[int], None], thread: int) -> None:
    with contextlib.suppress(Exception):
        work(thread)


def test_a_short_call_does_not_wait_for_a_long_one(shared: LLM) -> None:
    """While one thread runs many prompts, requests of another are begun beside them."""
    done: list[str] = []
    started = threading.Event()

    def long() -> None:
        for _ in range(6):
            shared.generate([prompt(9, salt) for salt in range(2)], LONG, progress=lambda *_: started.set())
        done.append("long")

    thread = threading.Thread(target=long)
    thread.start()
    started.wait()
    shared.generate([1, 2, 3], SamplingParams(max_tokens=2, detokenize=False))
    done.append("short")
    thread.join()
    assert done == ["short", "long"]


def test_an_event_loop_may_call_it(shared: LLM, expected: Any) -> None:
    async def main() -> Any:
        first = run(shared, WORKS[0])
        rest = await asyncio.gather(*(asyncio.to_thread(run, shared, work) for work in WORKS[1:]))
        return [first, *rest]

    assert asyncio.run(main()) == expected


def test_calls_inside_a_stream_and_a_callback(shared: LLM, expected: Any) -> None:
    case, ((tokens, *_),) = WORKS[0][0], expected[0][0]
    found = []
    for piece in shared.stream({"prompt_token_ids": list(case.prompt)}, case.sampling):
        found.append(piece.token_id)
        if len(found) % 8 == 1:
            assert run(shared, WORKS[1]) == expected[1]
    assert found == tokens
    inner: list[Any] = []
    shared.generate([[1, 2]] * 2, LONG, progress=lambda *_: inner.append(run(shared, WORKS[2])))
    assert inner == [expected[2]] * 2


def test_a_call_from_inside_a_step_is_refused(path: Path, expected: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The request whose processor made the call ends with an error; the engine and other requests go on."""
    caplog.set_level("DEBUG", "outrider")  # the guard warns of a processor's first failure alone
    wants = SamplingParams(max_tokens=8, extra_args={"call": 1.0}, detokenize=False)
    with serve(path, logits_processors=[f"{__name__}:Calls"]) as llm:
        for call in (
            lambda: llm.generate([1, 2]),
            lambda: llm.stream([1, 2]),
            lambda: llm.engine.step(),
            lambda: llm.engine.abort("0-0"),
            lambda: llm.engine.worker_stats(),
        ):
            Calls.what = call
            caplog.clear()
            (output,) = llm.generate([1, 2, 3], wants)
            assert output.outputs[0].finish_reason == "error"
            assert "EngineBusyError" in caplog.text and "in the middle of a step of this very thread" in caplog.text
            assert run(llm, WORKS[0]) == expected[0]
        Calls.what = llm.close
        with pytest.raises(EngineClosedError):
            llm.generate([1, 2, 3], wants)


def test_a_signals_handler_may_close_it_or_is_refused(path: Path) -> None:
    refused: list[BaseException] = []

    def handler(*_: Any) -> None:
        try:
            llm.generate([1, 2])
        except EngineBusyError as error:
            refused.append(error)
        llm.close()

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with serve(path) as llm:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            with pytest.raises(EngineClosedError):
                while True:
                    llm.generate([prompt(9, salt) for salt in range(4)], LONG)
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("way", WAYS)
def test_interrupts_leave_it_usable(path: Path, expected: Any, way: str) -> None:
    with serve(path, **WAYS[way]) as llm:
        for delay in (0.02, 0.03, 0.05, 0.07):
            timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                while True:
                    llm.generate([prompt(9, salt) for salt in range(4)], LONG)
            assert run(llm, WORKS[0]) == expected[0]
            with ThreadPoolExecutor(1) as pool:  # the lock is free for others too
                assert pool.submit(run, llm, WORKS[1]).result(30) == expected[1]


@pytest.mark.parametrize("asked", [False, True])
def test_a_second_interrupt_during_the_reset_leaves_nothing_stale(path: Path, expected: Any, asked: bool) -> None:
    """Before the worker was asked to reset, or while its answer was awaited."""
    with serve(path, distributed_executor_backend="mp") as llm:
        worker: Any = llm.engine._worker
        result, reset, left = worker.result, worker.reset, [2]

        def interrupted_result(step: int) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return result(step)

        def interrupted_reset() -> None:
            worker.reset = reset
            if asked:
                worker._num_asked += 1
                worker._post(Ask(worker._num_asked, Call.RESET))
            raise KeyboardInterrupt

        worker.result, worker.reset = interrupted_result, interrupted_reset
        with pytest.raises(KeyboardInterrupt):
            run(llm, WORKS[3])
        assert run(llm, WORKS[0]) == expected[0]
        assert run(llm, WORKS[3]) == expected[3]


@pytest.mark.parametrize("way", WAYS)
def test_what_is_closed_says_so(path: Path, way: str) -> None:
    llm = serve(path, **WAYS[way])
    stream = llm.stream([1, 2, 3], LONG)
    next(stream)
    llm.close()
    llm.close()
    calls: list[Callable[[], object]] = [
        lambda: llm.generate([1]),
        lambda: llm.generate([]),
        lambda: llm.generate("text"),
        lambda: llm.generate(5),  # type: ignore[arg-type]
        lambda: llm.chat([{"role": "user", "content": "hi"}]),
        lambda: llm.stream("text"),
        lambda: list(stream) and llm.generate([1]),
    ]
    if way != "process":
        engine = llm.engine
        calls += [
            lambda: engine.add("a", [1], LONG),
            engine.step,
            engine.worker_stats,
            lambda: engine._worker.submit(None),  # type: ignore[arg-type]
            engine._worker.reset,
            engine._worker.stats,
        ]
        engine.abort("a")
        assert not engine.has_work
    for call in calls:
        with pytest.raises(EngineClosedError, match=r"was closed, by close\(\).*build a new one"):
            call()
    stream.close()
    assert llm.acceptance().to_dict() is not None and llm.choice is not None, "what is known stays known"


@pytest.mark.parametrize("way", WAYS)
def test_closing_ends_the_calls_of_other_threads(path: Path, way: str) -> None:
    llm = serve(path, **WAYS[way])
    started, ends = threading.Event(), []

    def work(salt: int) -> None:
        try:
            while True:
                llm.generate([prompt(9, salt)], LONG, progress=lambda *_: started.set())
        except EngineDeadError as error:
            ends.append(type(error))

    threads = [threading.Thread(target=work, args=(salt,)) for salt in range(3)]
    for one in threads:
        one.start()
    started.wait()
    llm.close()
    for one in threads:
        one.join(30)
    assert ends == [EngineClosedError] * 3


@pytest.mark.parametrize("way", ["worker", "process"])
def test_a_forgotten_one_ends_its_process(path: Path, way: str) -> None:
    before, threads = set(psutil.Process().children()), set(threading.enumerate())
    llm = serve(path, **WAYS[way])
    next(llm.stream([1, 2, 3], LONG))
    ours = [one for one in set(psutil.Process().children()) - before if "resource_tracker" not in str(one.cmdline())]
    assert len(ours) == 1
    del llm
    gc.collect()
    _, left = psutil.wait_procs(ours, timeout=10)
    assert not [one for one in left if one.status() != psutil.STATUS_ZOMBIE]
    for one in set(threading.enumerate()) - threads:
        one.join(5)
    assert set(threading.enumerate()) <= threads


SCRIPT = """
import json, multiprocessing, os, sys, threading, traceback
from outrider import LLM, SamplingParams
from outrider.errors import EngineForkedError

PARAMS = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False)

def tokens(llm):
    return llm.generate([5, 6, 7, 5, 6], PARAMS)[0].outputs[0].token_ids

def forks(child):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitpid(pid, 0)[1]

def main():
    way = json.loads(sys.argv[2])
    make = lambda: LLM(sys.argv[1], max_model_len=64, **way)
    llm = make()
    first = tokens(llm)
    stream = llm.stream([1, 2], PARAMS)
    next(stream)
    BODY

if __name__ == "__main__":
    main()
"""


def ran(body: str, path: Path, way: str, tmp_path: Path) -> str:
    """What a script prints that must end well and without a word on stderr."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("    BODY", "\n".join("    " + line for line in body.strip().splitlines())))
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", script, path, json.dumps(WAYS[way])],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    said = [line for line in done.stderr.splitlines() if " INFO " not in line]
    assert (done.returncode, said) == (0, []), done.stderr[-3000:]
    return done.stdout


FORKED = """
def used():
    for call in (lambda: llm.generate([1]), lambda: llm.stream([1]), lambda: list(stream) and llm.generate([1]),
                 lambda: llm.chat([{"role": "user", "content": "x"}])):
        try:
            call()
        except EngineForkedError as error:
            assert "build the LLM in the child" in str(error) and "spawn" in str(error), error
        else:
            raise SystemExit("no error")
    llm.close()
    stream.close()
def exits():  # as a child that runs to its end, with all that Python does there
    used()
    sys.exit(0)
def builds():
    mine = make()
    assert tokens(mine) == first
    mine.close()
taken = threading.Event(), threading.Event()
def holds():  # a thread that has its turn while the process is forked
    client = llm._client
    client.lock.acquire(); taken[0].set(); taken[1].wait(); client.lock.release()
holder = threading.Thread(target=holds, daemon=True)
holder.start(); taken[0].wait()
assert forks(used) == 0
taken[1].set(); holder.join()
assert tokens(llm) == first
pid = os.fork()
if pid == 0:
    exits()
assert os.waitpid(pid, 0)[1] == 0
assert tokens(llm) == first
assert forks(builds) == 0
assert tokens(llm) == first
context = multiprocessing.get_context("fork")
process = context.Process(target=used)
process.start(); process.join(60)
assert process.exitcode == 0, process.exitcode
assert tokens(llm) == first and sum(1 for _ in stream) == 11
llm.close()
print("good")
"""


@pytest.mark.parametrize("way", WAYS)
def test_a_forked_child_is_told_and_its_parent_unharmed(path: Path, way: str, tmp_path: Path) -> None:
    assert ran(FORKED, path, way, tmp_path) == "good\n"


@pytest.mark.parametrize("way", WAYS)
def test_the_interpreter_ends_without_close(path: Path, way: str, tmp_path: Path) -> None:
    assert ran("print(len(first))", path, way, tmp_path) == "12\n"


def test_an_llm_is_not_sent_to_another_process(path: Path) -> None:
    with serve(path) as llm, pytest.raises(TypeError, match="cannot be copied or sent to another process: build one"):
        pickle.dumps(llm)


def test_locks_are_given_in_order() -> None:
    lock, order, ready = FairLock(), [], []

    def take(name: int) -> None:
        ready.append(name)
        lock.acquire()
        order.append(name)
        lock.release()

    lock.acquire()
    lock.acquire()
    threads = [threading.Thread(target=take, args=(name,)) for name in range(2)]
    for count, one in enumerate(threads, 1):
        one.start()
        while len(ready) < count:
            time.sleep(0.01)
        time.sleep(0.05)
    lock.release()
    assert not order
    lock.release()
    lock.acquire()  # by one that asks again at once: both others were there before
    assert len(order) >= 1
    lock.release()
    for one in threads:
        one.join()
    assert order == [0, 1]


def test_a_signals_handler_may_ask_while_its_thread_waits() -> None:
    class Shared:
        lock = FairLock()

        @in_turn
        def ask(self) -> str:
            return "answered"

    shared, answers, taken = Shared(), [], threading.Event()

    def hold() -> None:
        shared.lock.acquire()
        taken.set()
        time.sleep(0.5)
        shared.lock.release()

    def give_up(*_: Any) -> None:
        raise TimeoutError("the handler waits for its own thread")

    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGALRM)}
    signal.signal(signal.SIGUSR1, lambda *_: answers.append(shared.ask()))
    signal.signal(signal.SIGALRM, give_up)
    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait()
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    signal.alarm(20)
    try:
        assert shared.ask() == "answered" and answers == ["answered"]
    finally:
        signal.alarm(0)
        holder.join()
        for number, handler in before.items():
            signal.signal(number, handler)


def test_what_waits_for_a_process_ends_with_it(path: Path) -> None:
    llm = serve(path, **WAYS["process"])
    client: Any = llm._client
    generation = llm._start([(None, prompt(5))], [LONG], keeps_pieces=True)
    while not generation.finished:
        client.step(generation)
        generation.inbox.pieces.clear()
    generation.inbox.ended.clear()
    finished = threading.Thread(target=client.step, args=(generation,), daemon=True)
    finished.start()
    finished.join(30)
    assert not finished.is_alive(), "a generation that has ended was waited for"
    ends: list[type[BaseException]] = []

    def wait() -> None:
        try:
            client._call(asyncio.sleep(600))
        except EngineDeadError as error:
            ends.append(type(error))

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    llm.close()
    waiting.join(30)
    wait()
    assert ends == [EngineClosedError] * 2
