"""The loop: plan, submit, read, apply. Everything above it handles text; everything below, tensors."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from outrider.acceptance.watchdog import Watchdog
from outrider.config import Resolved
from outrider.core.output import AcceptanceReport, FinishReason, TokenDelta
from outrider.core.plan import DrafterFaults, StepPlan
from outrider.core.request import Request
from outrider.core.sampling import SamplingParams
from outrider.core.turns import FairLock, in_turn, watch_forks
from outrider.engine.prompts import check_stop_ids, check_token_ids
from outrider.errors import EngineBusyError, EngineClosedError, EngineDeadError, EngineForkedError
from outrider.runner.base import Pending
from outrider.schedule.scheduler import Scheduler
from outrider.verify.registry import own_fields
from outrider.workers.base import Worker, WorkerStats

logger = logging.getLogger("outrider")

SEED_STRIDE = 0x9E3779B97F4A7C15
"""Odd and irregular, so that the n-th seedless requests of engines with neighbouring seeds share no noise."""


@dataclass(slots=True)
class StepTimes:
    """Where the loop's time went, in seconds since the engine was made."""

    steps: int = 0
    schedule: float = 0.0  # deciding what to run
    run: float = 0.0  # submitting it and waiting for the oldest step
    apply: float = 0.0  # taking in the result

    def copy(self) -> StepTimes:
        """A copy of the times."""
        return replace(self)

    def since(self, earlier: StepTimes) -> StepTimes:
        """What was spent since a copy was taken."""
        return StepTimes(*(getattr(self, entry.name) - getattr(earlier, entry.name) for entry in fields(self)))


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine at one moment; counts are over its life."""

    num_running: int
    num_waiting: int
    cache_usage: float  # share of the blocks that running requests hold, from 0 to 1
    prefix_queries: int  # prompt tokens looked up in the prefix cache
    prefix_hits: int  # of those, found
    num_preemptions: int
    num_steps: int
    acceptance: AcceptanceReport
    drafter: DrafterFaults | None  # what went wrong in the drafter; None: nothing


@dataclass(slots=True)
class _Flight:
    plan: StepPlan
    pending: Pending | None = None  # None while it is being submitted


class Engine:
    """Runs requests to their end. Threads take turns, a call each.

    A call from inside a step raises EngineBusyError; one after `close`, EngineClosedError; one in a forked child,
    EngineForkedError.
    """

    def __init__(self, resolved: Resolved, worker: Worker) -> None:
        """Schedules for this worker, which was built from the same configuration; `build_engine` makes both."""
        self.resolved, self.choice = resolved, resolved.served_by()
        self._worker = worker
        self._scheduler_options = replace(self.resolved.scheduler, depth=self._worker.depth)
        self._scheduler = Scheduler(self._scheduler_options)
        self._requests: dict[str, Request] = {}
        self._in_flight: deque[_Flight] = deque()
        self._num_requests = 0
        self._extra_args = own_fields(self.resolved.runner.processors)
        self.lock = FairLock()
        """Held by each call; whoever holds it longer makes several calls of one."""
        self._cause_of_death: BaseException | None = None
        self._busy = self._closing = False
        self._holds_old_requests = False  # the worker, since its reset was interrupted
        self._drafter_faults: DrafterFaults | None = None
        self.num_dropped = 0
        """Requests that ended other than in a step: by `finish`, `abort` or an interrupt."""
        self._last_drafted_length, self._draft_bound = self._drafting_ends()
        self._has_logged_end = False
        self.times = StepTimes()
        self.watchdog = Watchdog.of(self.resolved)
        """Holds acceptance against what is on record for the head, and warns when it falls."""
        watch_forks(self)

    @in_turn
    def add(
        self,
        request_id: str,
        prompt: Sequence[int],
        sampling: SamplingParams,
        max_drafts: int | None = None,
    ) -> Request:
        """Queues a request and gives its record, to be read only.

        `max_drafts`: verify at most this many drafts a step for it; left out, as many as the engine drafts.

        Raises PromptError, SamplingError, or InputError if the id is in use; nothing else is affected.
        """
        self._check_usable()
        vocab_size = self.resolved.runner.model_config.vocab_size
        check_token_ids(prompt, vocab_size)
        check_stop_ids(sampling, vocab_size)
        sampling.check_extra_args(self._extra_args)
        number = self._num_requests + 1
        seed = sampling.seed
        if seed is None:
            seed = (self.resolved.options.seed + number * SEED_STRIDE) % 2**63
        eos = () if sampling.ignore_eos else self.resolved.eos_token_ids
        assert isinstance(sampling.stop_token_ids, tuple)
        request = Request(
            id=request_id,
            prompt=tuple(prompt),
            sampling=sampling,
            seed=seed,
            stop_ids=tuple(dict.fromkeys((*eos, *sampling.stop_token_ids))),
            max_drafts=max_drafts,
            watch=self.watchdog.watch(sampling),
        )
        self._busy = True
        try:
            self._scheduler.add(request)
            self._end_drafting(request)
            self._requests[request_id] = request
            self._num_requests = number
        finally:
            self._busy = False
        return request

    def abort(self, request_id: str) -> None:
        """Drops a request wherever it is; unknown ids are ignored, since it may just have ended."""
        self.finish(request_id, FinishReason.ABORT)

    @in_turn
    def finish(self, request_id: str, reason: FinishReason) -> bool:
        """Ends a request from outside, as a stop string in its text does; False if it had ended already."""
        if self._busy:
            raise EngineBusyError
        if request_id not in self._requests:
            return False
        self._busy = True
        try:
            self._scheduler.finish(request_id, reason)
            del self._requests[request_id]
            self.num_dropped += 1
        finally:
            self._busy = False
        return True

    def knows(self, request_id: str) -> bool:
        """Whether the request is waiting or running."""
        return request_id in self._requests

    @property
    def busy(self) -> bool:
        """Whether a call is changing the schedule. Only code that interrupts it, such as a finalizer, sees True."""
        return self._busy

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self._cause_of_death is None and self._scheduler.has_work

    def acceptance(self) -> AcceptanceReport:
        """How drafts fared over the life of the engine."""
        return self._scheduler.acceptance.report()

    def stats(self) -> EngineStats:
        """What is in flight and what has come of it, for metrics."""
        scheduler = self._scheduler
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            cache_usage=scheduler.cache.usage,
            prefix_queries=scheduler.cache.num_queried,
            prefix_hits=scheduler.cache.num_hit,
            num_preemptions=scheduler.num_preemptions,
            num_steps=self.times.steps,
            acceptance=self.acceptance(),
            drafter=self._drafter_faults,
        )

    @in_turn
    def worker_stats(self) -> WorkerStats:
        """The worker at this moment. Part times restart from zero."""
        self._check_usable()
        return self._worker.stats()

    @in_turn
    def step(self) -> list[tuple[TokenDelta, Request]]:
        """Submits a step and reads the oldest one due; what each request gained, and its record.

        Raises EngineDeadError, chained to the cause, if the worker failed now or earlier. An interrupt
        (Ctrl-C) goes through: every request is forgotten, and the engine is as new.
        """
        self._check_usable()
        self._busy = True
        try:
            if self._holds_old_requests:
                self._reset_worker()
            return self._step()
        except EngineBusyError:
            self._start_over()
            raise
        except Exception as error:
            self._die(error)
            raise EngineDeadError(f"the engine failed in a step: {str(error) or repr(error)}") from error
        except BaseException:
            self._start_over()
            raise
        finally:
            self._busy = False
            if self._closing:
                self._close()

    def _step(self) -> list[tuple[TokenDelta, Request]]:
        times, clock = self.times, time.perf_counter
        start = clock()
        plan = self._scheduler.schedule() if len(self._in_flight) < self._worker.depth else None
        planned = clock()
        if plan is not None and plan.rows:
            flight = _Flight(plan)
            self._in_flight.append(flight)
            flight.pending = self._worker.submit(plan)
            if len(self._in_flight) < self._worker.depth:
                return []
        if not self._in_flight:
            return []
        flight = self._in_flight[0]
        assert flight.pending is not None
        result = flight.pending.result()
        self._in_flight.popleft()
        if result.drafter is not None:
            had_stopped = self._drafter_faults is not None and self._drafter_faults.stopped
            self._drafter_faults = result.drafter
            if result.drafter.stopped and not had_stopped:
                self._scheduler.stop_drafting()
                for request in self._requests.values():
                    self._end_drafting(request)
        ran = clock()
        gained = [(delta, self._requests[delta.request_id]) for delta in self._scheduler.apply(flight.plan, result)]
        for delta, request in gained:
            if len(request.tokens) > self._last_drafted_length:
                self._end_drafting(request)
            if delta.finish_reason is not None:
                del self._requests[delta.request_id]
            if delta.finish_reason is FinishReason.ERROR:
                logger.error("request %s ended: its logits hold NaN, inf, or -inf for every token", delta.request_id)
        if not self._scheduler.has_work:
            self._scheduler.check_idle()
        self.watchdog.check()
        times.steps += 1
        times.schedule += planned - start
        times.run += ran - planned
        times.apply += clock() - ran
        return gained

    def _drafting_ends(self) -> tuple[int, str]:
        """The longest sequence that drafts are made for, and what sets that bound."""
        positions, limit = self.resolved.draft_positions, self._scheduler_options.draft_limit
        # the row of the newest token needs no position of the drafter's own
        last = sys.maxsize if positions is None else positions + 1
        if limit is not None and limit - 1 < last:
            return limit - 1, f"speculative_config sets max_model_len {limit}"
        return last, f"drafter {self.resolved.method} has {positions} positions"

    def _end_drafting(self, request: Request) -> None:
        """Writes down why a request gets no drafts any more, if that is so, and logs it of the first request."""
        tally, last = request.acceptance, self._last_drafted_length
        if not self._scheduler_options.sizes.num_drafts or tally.drafting_ended is not None:
            return
        if request.max_drafts == 0:
            tally.drafting_ended = "the request asks for no drafts"
        elif (faults := self._drafter_faults) is not None and faults.stopped:
            method = self.resolved.method
            tally.drafting_ended = f"drafter {method} has stopped after {faults.num_failures} failures: see the log"
        elif len(request.tokens) >= last:
            has = "prompt has" if not request.num_output else "sequence has grown to"
            tally.drafting_ended = f"the {has} {len(request.tokens)} tokens, and {self._draft_bound}"
            if not self._has_logged_end:
                self._has_logged_end = True
                said = "request %s goes on without drafts: %s; of later requests their acceptance says so"
                logger.warning(said, request.id, tally.drafting_ended)

    def _die(self, cause: Exception) -> None:
        """Forgets every request, so that their owners find out instead of waiting."""
        self._cause_of_death = cause
        self._requests.clear()
        if self._in_flight:  # the worker failed; had the scheduler, its books could not be trusted to close
            self._in_flight.clear()
            self._scheduler.abandon()

    def _start_over(self) -> None:
        """Forgets every request after an interrupted step; the engine is dead if a part cannot."""
        self.num_dropped += len(self._requests)
        self._requests.clear()
        self._in_flight.clear()
        try:
            self._scheduler.abandon()
            self._scheduler.check_idle()
        except Exception:  # it was interrupted itself, in the middle of its books
            acceptance = self._scheduler.acceptance
            self._scheduler = Scheduler(self._scheduler_options)
            self._scheduler.acceptance = acceptance
            if self._drafter_faults is not None and self._drafter_faults.stopped:
                self._scheduler.stop_drafting()
        # If a second interrupt ends the reset, the next step begins with it.
        self._holds_old_requests = True
        try:
            self._reset_worker()
        except Exception as error:
            self._cause_of_death = error

    def _reset_worker(self) -> None:
        self._worker.reset()
        self._holds_old_requests = False

    @in_turn
    def check_usable(self) -> None:
        """Raises what `add` and `step` raise of an engine that failed, was closed or forked, or is in a step."""
        self._check_usable()

    def _check_usable(self) -> None:
        if self._busy:
            raise EngineBusyError
        cause = self._cause_of_death
        if isinstance(cause, EngineClosedError | EngineForkedError):
            raise type(cause)
        if cause is not None:
            raise EngineDeadError("the engine failed earlier: build a new one") from cause

    @in_turn
    def close(self) -> None:
        """Gives back the model's memory; from inside a step, after it. Idempotent."""
        if self._busy:
            self._closing = True
        else:
            self._close()

    def _close(self) -> None:
        self._closing = False
        if isinstance(self._cause_of_death, EngineClosedError | EngineForkedError):
            return
        self._die(EngineClosedError())
        self._worker.close()

    def after_fork(self) -> None:
        """In a forked child: nothing here may be used, and no thread of the parent gives its lock back."""
        self.lock, self._busy, self._closing = FairLock(), False, False
        self._cause_of_death = EngineForkedError()
