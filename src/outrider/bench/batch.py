"""One batch of requests, run together, and the steady stretch of it in which all of them decode."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from outrider.core.output import FinishReason
from outrider.core.sampling import SamplingParams
from outrider.engine.engine import Engine, StepTimes
from outrider.errors import LogitsError


@dataclass(frozen=True, slots=True)
class Steady:
    """The steps after the one that gave the last request its first token, up to the last before a request ends."""

    seconds: float
    steps: int
    tokens: int
    rounds: int  # how often a request gained tokens: the requests times the steps, unless one was preempted
    tokens_before: int  # output tokens of all requests before the first of these steps
    host: StepTimes  # where the host's time went
    parts: dict[str, float] | None  # milliseconds of a step's parts on the device, where it timed two steps or more


@dataclass(frozen=True, slots=True)
class BatchRun:
    """A batch from its arrival to its end, or to where it was cut off."""

    seconds: float
    first_token: float  # seconds until every request had its first token
    tokens: int
    decode_steps: int  # after that
    steady: Steady | None  # None: a request ended before all of them decoded for a step


class _Stretch:
    """Watches for the steady steps while they go by."""

    def __init__(self, engine: Engine, tokens_before: int) -> None:
        self._engine, self._tokens_before = engine, tokens_before
        self.steps = self._tokens = self._rounds = 0
        self._host = engine.times.copy()
        self._start = self._end = time.perf_counter()

    def count(self, gains: Sequence[int]) -> None:
        """A step in which no request ended, and what each gained."""
        self._end = time.perf_counter()
        self.steps += 1
        if self.steps == 1:  # the device's gap before this step held the prompts: it is timed from the next on
            self._engine.worker_stats()
        self._tokens += sum(gains)
        self._rounds += len(gains)

    def close(self) -> Steady | None:
        """The figures; None if there was no such step."""
        engine = self._engine
        host, parts = engine.times.since(self._host), engine.worker_stats().part_times
        if not self.steps:
            return None
        seconds = self._end - self._start
        timed = parts if self.steps > 1 else None
        return Steady(seconds, self.steps, self._tokens, self._rounds, self._tokens_before, host, timed)


def run_batch(
    engine: Engine, prompts: Sequence[Sequence[int]], sampling: SamplingParams, max_steps: int | None = None
) -> BatchRun:
    """Runs prompts that all arrive at once. With `max_steps` the batch is cut off after so many steady steps."""
    start = time.perf_counter()
    request_ids = [f"bench-{index}" for index in range(len(prompts))]
    for request_id, prompt in zip(request_ids, prompts, strict=True):
        engine.add(request_id, prompt, sampling)
    waiting = set(request_ids)
    tokens = steps = 0
    first_token = 0.0
    stretch: _Stretch | None = None
    steady: Steady | None = None
    while engine.has_work:
        gained = engine.step()
        if not gained:  # a chunk of a prompt, or a step that is still in flight
            continue
        gains = [len(delta.tokens) for delta, _ in gained]
        ended = any(delta.finish_reason is not None for delta, _ in gained)
        if any(delta.finish_reason is FinishReason.ERROR for delta, _ in gained):
            raise LogitsError("the model's logits hold NaN or inf, so its speed says nothing: take another dtype")
        tokens += sum(gains)
        if waiting:
            waiting.difference_update(delta.request_id for delta, _ in gained)
            if not waiting:
                first_token = time.perf_counter() - start
                if not ended:
                    stretch = _Stretch(engine, tokens)
            continue
        steps += 1
        if stretch is None:
            continue
        if not ended:
            stretch.count(gains)
        cut = max_steps is not None and (ended or stretch.steps >= max_steps)
        if ended or cut:
            steady, stretch = stretch.close(), None
        if cut:
            break
    seconds = time.perf_counter() - start
    for request_id in request_ids:
        engine.abort(request_id)
    while engine.has_work:
        engine.step()
    return BatchRun(seconds, first_token, tokens, steps, steady)
