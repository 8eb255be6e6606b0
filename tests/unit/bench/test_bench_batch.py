"""The steady window: what counts in it, and what does not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from outrider.bench import batch
from outrider.bench.batch import run_batch
from outrider.core.output import FinishReason, TokenDelta
from outrider.core.sampling import SamplingParams
from outrider.engine.engine import StepTimes
from outrider.errors import EngineClosedError
from outrider.parallel.mesh import Mesh
from outrider.workers.base import WorkerStats
from outrider.workers.local import LocalWorker

SAMPLING = SamplingParams(max_tokens=100, ignore_eos=True, detokenize=False)

STEPS: list[tuple[float, dict[int, int], set[int]]] = [
    # seconds, tokens by request, who ends
    (5.0, {0: 1}, set()),
    (0.0, {}, set()),  # a chunk of a prompt, or a pipeline that fills
    (7.0, {0: 2, 1: 1}, set()),  # both have their first token: the window opens behind this step
    (2.0, {0: 3, 1: 1}, set()),
    (2.0, {0: 1, 1: 1}, set()),
    (3.0, {0: 4, 1: 2}, set()),
    (100.0, {0: 8, 1: 8}, {0}),  # a request ends: no part of it
    (100.0, {1: 8}, {1}),
]


class ScriptedEngine:
    """Gives what `STEPS` says, and moves the clock by what a step takes."""

    def __init__(self) -> None:
        self.now, self.place = 0.0, 0
        self.times = StepTimes()
        self.ids: list[str] = []
        self.aborted: list[str] = []
        self.asked_for_parts = 0

    def add(self, request_id: str, prompt: Any, sampling: SamplingParams) -> None:
        self.ids.append(request_id)

    @property
    def has_work(self) -> bool:
        return self.place < len(STEPS) and not self.aborted

    def step(self) -> list[tuple[TokenDelta, None]]:
        seconds, gains, ends = STEPS[self.place]
        self.place += 1
        self.now += seconds
        self.times.steps += bool(gains)
        self.times.run += seconds
        return [
            (TokenDelta(self.ids[who], (9,) * count, 0, FinishReason.LENGTH if who in ends else None, None), None)
            for who, count in gains.items()
        ]

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def worker_stats(self) -> WorkerStats:
        self.asked_for_parts += 1
        return WorkerStats({"gap": float(self.asked_for_parts)}, None, 0)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ScriptedEngine:
    scripted = ScriptedEngine()
    monkeypatch.setattr(batch, "time", SimpleNamespace(perf_counter=lambda: scripted.now))
    return scripted


def test_only_steps_in_which_all_decode_count(engine: ScriptedEngine) -> None:
    run = run_batch(engine, [[1], [2]], SAMPLING)
    assert (run.seconds, run.first_token, run.tokens, run.decode_steps) == (219.0, 12.0, 40, 5)
    steady = run.steady
    assert steady is not None
    assert (steady.seconds, steady.steps, steady.tokens, steady.rounds, steady.tokens_before) == (7.0, 3, 12, 6, 4)
    assert steady.parts == {"gap": 2.0}, "asked for after the first step, so that what was before is forgotten"


def test_a_run_is_cut_off_and_the_engine_left_empty(engine: ScriptedEngine) -> None:
    run = run_batch(engine, [[1], [2]], SAMPLING, max_steps=2)
    assert run.steady is not None
    assert (run.steady.seconds, run.steady.steps, run.steady.tokens) == (4.0, 2, 6)
    assert run.seconds == 16.0 and engine.aborted == engine.ids and not engine.has_work


def test_no_window_where_a_request_ends_too_soon(engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.STEPS", [(1.0, {0: 1}, {0}), (1.0, {1: 1}, set()), (1.0, {1: 5}, {1})])
    run = run_batch(engine, [[1], [2]], SAMPLING)
    assert run.steady is None and run.tokens == 7 and run.first_token == 2.0


class Runner:
    depth = 1

    @classmethod
    def build(cls, config: Any, mesh: Mesh) -> Runner:
        return cls()

    def close(self) -> None: ...


class TimingRunner(Runner):
    def part_times(self) -> dict[str, float]:
        return {"target": 1.5}


def test_a_worker_passes_on_what_its_runner_timed() -> None:
    config: Any = SimpleNamespace(device=torch.device("cpu"))
    plain = LocalWorker(Runner, config, Mesh()).stats()  # type: ignore[arg-type]
    assert plain.part_times is None and plain.memory > 1 << 20
    timing = LocalWorker(TimingRunner, config, Mesh())  # type: ignore[arg-type]
    assert timing.stats().part_times == {"target": 1.5}
    timing.close()
    with pytest.raises(EngineClosedError):
        timing.stats()
