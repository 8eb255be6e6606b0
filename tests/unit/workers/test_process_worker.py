"""A runner in a process of its own: the same tokens, clear errors, and nothing left behind."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from checkpoints import Case, plugin, prompt, run
from heads import drafting as head_drafting
from outrider import LLM, CheckpointError, EngineDeadError, HostDrafter, OptionError, SamplingError, SamplingParams
from outrider.config import resolve
from outrider.draft.none import NoDrafter
from outrider.errors import rebuilt
from outrider.models.qwen3 import Qwen3
from outrider.options import EngineOptions
from outrider.parallel.mesh import Mesh
from outrider.tensors import StepBatch
from outrider.workers import process_main
from outrider.workers.messages import Failed
from outrider.workers.process import ProcessWorker

CASES = [Case.of(5, 1, temperature=0.0), Case.of(17, 2, temperature=0.8, top_k=5), Case.of(30, 3, detokenize=True)]
ENDLESS = SamplingParams(temperature=0.8, seed=1, max_tokens=80, ignore_eos=True)


class Echo(HostDrafter):
    """Repeats the end of the text. A prompt of 1 and one of these makes it misbehave."""

    name = "echo"
    RAISE, CRASH, LOG = 251, 252, 253

    def admit(self, slot: int, tokens: Any) -> None:
        if list(tokens[:2]) == [1, self.LOG]:
            unsendable = {"thing": lambda: 0, "fields": {"slot": slot, "lock": threading.Lock()}}
            logging.getLogger("outrider").warning(
                "admitted to slot %d of process %d", slot, os.getpid(), extra=unsendable
            )

    def guess(self, slot: int, tokens: list[int]) -> Sequence[int]:
        if tokens[:2] == [1, self.RAISE]:
            raise LookupError("no guess for such a text")
        if tokens[:2] == [1, self.CRASH]:
            os.abort()
        return tokens[-2:]


class Exits(Echo):
    """Ends its process while the runner is built."""

    name = "exits"

    def __init__(self, *given: Any, **named: Any) -> None:
        os._exit(7)


def children() -> list[psutil.Process]:
    return [one for one in psutil.Process().children() if one.status() != psutil.STATUS_ZOMBIE]


def serve(path: Path, **options: Any) -> LLM:
    return LLM(str(path), **{"max_model_len": 96, "distributed_executor_backend": "mp", **options})


@pytest.fixture(scope="module")
def path(tiny: Callable[..., Path]) -> Path:
    return tiny("qwen3")


@pytest.fixture(scope="module")
def expected(path: Path) -> Any:
    with serve(path, distributed_executor_backend="uni") as llm:
        return run(llm, CASES)


@pytest.fixture
def llm(path: Path) -> Iterator[LLM]:
    before = children()
    with serve(path, speculative_config=plugin(Echo), max_num_seqs=4) as llm:
        (child,) = set(children()) - set(before)
        yield llm
    assert not child.is_running()


def worker_process(llm: LLM) -> psutil.Process:
    (child,) = (one for one in children() if "process_main" in " ".join(one.cmdline()))
    return child


@pytest.mark.parametrize("head", [None, "eagle3", "peagle"])
def test_the_same_tokens_as_in_one_process(path: Path, expected: Any, head: str | None) -> None:
    config = {"method": "ngram", "prompt_lookup_min": 1} if head is None else head_drafting(head, 4)
    with serve(path, speculative_config=config) as llm:
        assert run(llm, CASES) == expected
        assert llm.acceptance().drafts > 0
        assert llm.choice.to_dict()["distributed_executor_backend"] == "mp"
        stats = llm.engine.worker_stats()
        assert stats.memory > 1 << 20 and stats.part_times is None and stats.recorded is None


def test_a_drafter_of_ones_own_runs_in_the_workers_process(
    path: Path, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "drafter_of_mine.py").write_text(
        "import os\nfrom outrider import HostDrafter\n\n\nclass Mine(HostDrafter):\n    name = 'mine'\n\n"
        "    def guess(self, slot, tokens):\n        open(__file__ + '.pid', 'w').write(str(os.getpid()))\n"
        "        return tokens[-3:]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with serve(path, speculative_config={"method": "drafter_of_mine:Mine", "num_speculative_tokens": 3}) as llm:
        assert run(llm, CASES) == expected
        pid = int((tmp_path / "drafter_of_mine.py.pid").read_text())
        assert pid == worker_process(llm).pid != os.getpid()


@pytest.mark.failing_drafter
def test_what_a_part_logs_and_raises_is_told_in_the_engines_process(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    pid = worker_process(llm).pid
    llm.generate([1, Echo.LOG], ENDLESS)
    (record,) = (record for record in caplog.records if f"of process {pid}" in record.getMessage())
    assert "lambda" in record.thing and "lock" in record.fields["lock"] and record.fields["slot"] == 0  # type: ignore[attr-defined]
    llm.generate([1, Echo.RAISE], ENDLESS)
    assert "no guess for such a text; its drafts of this step are dropped" in caplog.text and "in guess" in caplog.text
    assert "drafting by echo has stopped after 3 failures" in caplog.text
    found = llm.engine.stats().drafter
    assert found is not None and found.stopped


class Unlucky(Qwen3):
    """Fails at one token."""

    TOKEN = 250

    def forward(self, batch: StepBatch, *given: Any) -> Any:
        if bool((batch.input_ids == self.TOKEN).any()):
            raise LookupError("no hidden state for such a text")
        return super().forward(batch, *given)


def test_what_the_model_raises_ends_the_engine_with_the_reason(path: Path) -> None:
    with serve(path, model_class=f"{__name__}:Unlucky") as llm:
        llm.generate([1], SamplingParams(max_tokens=2))
        with pytest.raises(EngineDeadError, match=r"failed in a step: no hidden state for such a text") as found:
            llm.generate([1, Unlucky.TOKEN], ENDLESS)
        assert "in forward" in found.value.__cause__.__notes__[0]  # type: ignore[union-attr]
        with pytest.raises(EngineDeadError, match="failed earlier"):
            llm.generate([1], ENDLESS)


def test_a_crash_is_told_with_the_last_words(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EngineDeadError, match=r"(?s)killed by signal 6 \(Aborted\); its last words:.*in guess"):
        llm.generate([1, Echo.CRASH], ENDLESS)
    assert "Fatal Python error: Aborted" in capfd.readouterr().err


def test_an_interrupt_leaves_the_engine_usable_and_a_killed_worker_does_not(llm: LLM, expected: Any) -> None:
    for _ in range(3):
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                while True:
                    llm.generate([prompt(9, salt) for salt in range(4)], ENDLESS)
        finally:
            timer.cancel()
        assert not llm.engine.has_work
        assert run(llm, CASES) == expected
    stream = llm.stream(prompt(9), ENDLESS)
    next(stream)
    worker_process(llm).kill()
    with pytest.raises(EngineDeadError, match=r"the worker's process was killed by signal 9 \(Killed\)"):
        list(stream)


def test_what_building_raises_is_raised_here_and_nothing_stays(path: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in path.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes(b"\0" * 100)
    before, messages = children(), []
    for backend in ("uni", "mp"):
        with pytest.raises(CheckpointError) as found:
            serve(broken, distributed_executor_backend=backend)
        messages.append(str(found.value))
    assert messages[0] == messages[1]
    with pytest.raises(EngineDeadError, match="the worker's process ended with exit code 7"):
        serve(path, speculative_config=plugin(Exits))
    seen: list[tuple[int, int]] = []

    def interrupted(done: int, total: int) -> None:
        seen.append((done, total))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serve(path, progress=interrupted)
    assert len(seen) == 1 and 0 < seen[0][0] <= seen[0][1]
    assert children() == before


def test_a_drafter_that_no_module_holds_is_refused(path: Path) -> None:
    class Local(NoDrafter):
        name = "local"

    resolved = resolve(EngineOptions(model=str(path)))
    with pytest.raises(OptionError, match="cannot be sent to a worker's process"):
        ProcessWorker(resolved.served_by().runner, replace(resolved.runner, drafter=Local), Mesh())


def test_a_class_of_the_script_that_runs_is_refused_with_the_remedy(path: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom outrider import LLM, HostDrafter, OptionError\n\n"
        "class Mine(HostDrafter):\n    def guess(self, slot, tokens):\n        return tokens[-2:]\n\n"
        "try:\n    LLM(sys.argv[1], max_model_len=64, distributed_executor_backend='mp',\n"
        "        speculative_config={'method': '__main__:Mine'})\n"
        "except OptionError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, script, path], capture_output=True, text=True, check=True, timeout=120)
    assert "Mine is defined in the script that runs (__main__)" in done.stdout and "a module of its own" in done.stdout
    assert done.stderr == ""


def test_the_field_of_an_input_error_crosses() -> None:
    failed = Failed.of(SamplingError("too large", "top_p"))
    error = rebuilt(failed.error, failed.message, failed.field)
    assert isinstance(error, SamplingError) and error.field == "top_p"


def test_what_failed_is_sent_before_the_process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    replies, sent = process_main.Replies(), threading.Event()

    def send() -> None:
        replies.queue.get()
        time.sleep(0.2)
        sent.set()
        replies.queue.task_done()

    monkeypatch.setattr(process_main, "_receive", lambda connection: None)
    monkeypatch.setattr(process_main, "_build", lambda message, replies: contextlib.nullcontext())
    monkeypatch.setattr(contextlib, "closing", lambda worker: worker)
    replies.failed = True
    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(SystemExit):
        process_main._serve(None, replies)  # type: ignore[arg-type]
    assert sent.is_set()


def test_a_worker_that_is_forgotten_ends(path: Path) -> None:
    resolved = resolve(EngineOptions(model=str(path), max_model_len=32))
    worker = ProcessWorker(resolved.served_by().runner, resolved.runner, Mesh())
    child = psutil.Process(worker._process.pid)
    del worker
    assert not child.is_running()


def test_it_ends_with_the_engines_process(path: Path) -> None:
    """Also while a step runs, and though nobody closes it."""
    script = (
        "import sys; from outrider import LLM\n"
        f"llm = LLM({str(path)!r}, max_model_len=64, distributed_executor_backend='mp')\n"
        "print(llm.engine._worker._process.pid, flush=True)\n"
        "while True: llm.generate([1, 2])\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as engine:
        assert engine.stdout is not None
        worker = psutil.Process(int(engine.stdout.readline()))
        time.sleep(0.2)
        engine.kill()
    psutil.wait_procs([worker], timeout=5)
    assert not worker.is_running()
