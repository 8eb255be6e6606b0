"""Decides what each step runs, and takes in what came of it.

The scheduler knows tokens, not phases: a plan is {slot: number of tokens}. A request past its prompt
takes its last token and the drafts waiting behind it, one inside its prompt a chunk of what is not yet
computed. Everything is first come, first served: slots, blocks and the token budget go to the oldest,
and when blocks run out the youngest is preempted and computed again later. A step that decodes
gives prompts `max_prefill_tokens_beside_decodes` of its budget at most, since the decodes' tokens come when
all of it is over; a step that does not gives them the whole.
"""

from __future__ import annotations

from collections import deque

from outrider.cache.manager import CacheManager
from outrider.core.output import AcceptanceTally, FinishReason, TokenDelta
from outrider.core.plan import Admission, Growth, Row, StepPlan, StepResult
from outrider.core.request import Request, RequestStatus, check_prompt_length
from outrider.errors import InputError
from outrider.schedule.builder import PlanBuilder
from outrider.schedule.options import SchedulerOptions
from outrider.schedule.queues import RequestQueues
from outrider.schedule.running import RunningRequest

PREFILL_SHARE = 8
"""While a prompt waits to be run, drafts leave it one part in this many of a step's tokens, or all that it may get."""


class Scheduler:
    """Requests in, plans out, results in, tokens out.

    `schedule` may be called up to `options.depth` times before the oldest plan is applied; plans are
    run and applied in the order they were made. A row whose outcome is still unknown is planned for
    within bounds: blocks for the most tokens it may yield, and K drafts behind it. What turns out to
    lie past a request's end is dropped, and its slot and blocks go back only when nothing that was
    submitted writes to them any more.
    """

    def __init__(self, options: SchedulerOptions, cache: CacheManager | None = None) -> None:
        """`cache`: one made for these options; left out, the scheduler makes its own."""
        self.options = options
        self.cache = cache or CacheManager(
            options.num_blocks,
            options.sizes.block_size,
            enable_prefix_caching=options.enable_prefix_caching,
            rerun=options.rerun,
        )
        self.acceptance = AcceptanceTally(options.sizes.num_drafts)  # over all requests
        self.num_preemptions = 0
        self._queues = RequestQueues(options, self.cache)
        self._step = 0
        self._in_flight: deque[tuple[int, list[RunningRequest]]] = deque()  # step, and the request of each of its rows
        self._refused = -1  # blocks there were to spare when the oldest waiting request last did not fit

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished or any plan not yet applied."""
        return bool(self._queues.running or self._queues.waiting or self._in_flight)

    @property
    def num_running(self) -> int:
        """Requests that hold a slot and are not finished."""
        return len(self._queues.running)

    @property
    def num_waiting(self) -> int:
        """Requests without a slot, preempted ones included."""
        return len(self._queues.waiting)

    # Requests.

    def add(self, request: Request) -> None:
        """Queue a new request. PromptError, naming the numbers, if it can never be run."""
        check_prompt_length(request.num_prompt, self.options.sizes.max_model_len)
        if request.id in self._queues.waiting or request.id in self._queues.running_by_id:
            raise InputError(f"request id is already in use: {request.id!r}; give each request its own")
        assert request.status is RequestStatus.NEW, f"request {request.id!r} was added before"
        request.acceptance = AcceptanceTally(self.options.sizes.num_drafts)
        self._queues.enqueue(request)

    def abort(self, request_id: str) -> bool:
        """End a request at any time; False if it had ended already."""
        return self.finish(request_id, FinishReason.ABORT)

    def finish(self, request_id: str, reason: FinishReason) -> bool:
        """End a request for a reason only the engine can see, a stop string say; False if it had ended already.

        Whatever is in flight for it yields nothing more.
        """
        self._refused = -1
        return self._queues.finish(request_id, reason)

    def stop_drafting(self) -> None:
        """No request verifies drafts from now on, but those that were planned."""
        self._queues.drafting = False
        for running in self._queues.running:
            running.max_drafts = 0

    def abandon(self) -> list[TokenDelta]:
        """After a step failed: end everything as aborted, forget the plans in flight and all cached prefixes.

        The next plan is for a runner that holds nothing: a new one, or one that has been emptied.
        """
        queues = self._queues
        requests = [*(running.request for running in queues.running), *queues.waiting.values()]
        for request in requests:
            self.abort(request.id)
        for _, rows in self._in_flight:
            for running in rows:
                queues.land_late(running)
        self._in_flight.clear()
        queues.released.clear()
        self.cache.clear_prefixes()
        return [TokenDelta(request.id, (), 0, FinishReason.ABORT, None) for request in requests]

    # A step: plan it, then apply what came of it.

    def schedule(self) -> StepPlan:
        """Plan the next step.

        A plan without rows means that nothing can be run until a plan in flight is applied (or ever,
        if there is no work): nothing was decided, so it must be neither run nor applied.
        """
        options, queues = self.options, self._queues
        assert len(self._in_flight) < options.depth, f"depth {options.depth}: apply the oldest plan first"
        builder = PlanBuilder(options.sizes.max_num_batched_tokens)
        self._plan_decodes(builder)
        if builder.rows:
            builder.budget = min(builder.budget, options.max_prefill_tokens_beside_decodes)
        if queues.num_prefilling and not builder.stalled:
            self._plan_prefills(builder)
        if queues.waiting and not (builder.stalled or builder.preempted):
            self._plan_admissions(builder)
        if not builder.rows:
            return StepPlan(self._step, (), (), (), ())
        admit, grow, rows = tuple(builder.admit), tuple(builder.grow), tuple(builder.rows)
        plan = StepPlan(self._step, tuple(queues.released), admit, grow, rows)
        self._step += 1
        queues.released.clear()
        self._in_flight.append((plan.step, builder.running))
        return plan

    def apply(self, plan: StepPlan, result: StepResult) -> list[TokenDelta]:
        """Take in the oldest plan's result. One record for each request that gained tokens, in the plan's order."""
        oldest, rows = self._in_flight[0]
        assert plan.step == oldest, f"step {plan.step} is applied before step {oldest}"
        assert result.step == oldest, f"the result of step {result.step} is taken for step {oldest}'s"
        self._in_flight.popleft()
        deltas: list[TokenDelta] = []
        ended = False
        columns = zip(rows, plan.rows, result.tokens, result.num_drafted, strict=True)
        for index, (running, row, tokens, num_drafted) in enumerate(columns):
            if running.closed:
                self._queues.land_late(running)
                continue
            running.num_in_flight -= 1
            if row.ends_prompt:
                delta = self._take(running, row, tokens, num_drafted, index in result.invalid)
                deltas.append(delta)
                ended = ended or delta.finish_reason is not None
            else:
                assert not tokens, f"slot {row.slot} gave {len(tokens)} tokens inside its prompt"
                self._advance(running, running.num_computed + row.num_tokens)
        if ended:
            self._queues.running = [running for running in self._queues.running if not running.closed]
        return deltas

    def _take(
        self, running: RunningRequest, row: Row, tokens: tuple[int, ...], num_drafted: int, is_invalid: bool
    ) -> TokenDelta:
        """Commit what a row yielded, and end the request if that ends it.

        The last token of an invalid row is none. The request ends there with an error, unless it ends before.
        """
        request, count = running.request, len(tokens)
        assert 1 <= count <= row.num_drafts + 1, f"slot {row.slot} gave {count} tokens for {row.num_drafts} drafts"
        assert 0 <= num_drafted <= self.options.sizes.num_drafts, f"slot {row.slot} has {num_drafted} drafts waiting"
        # Planned ahead, a row may run more drafts than came: what lies behind those is right by chance, if it is.
        num_verified = min(row.num_drafts, running.num_drafts)
        num_accepted = min(count - 1, num_verified)
        if num_verified:
            request.acceptance.record(num_verified, num_accepted)
            self.acceptance.record(num_verified, num_accepted)
            if request.watch is not None:
                request.watch.record(num_verified, num_accepted)
        num_computed = len(request.tokens) + count - 1
        kept = request.extend(tokens[:-1] if is_invalid else tokens, running.end)
        if is_invalid and request.finish_reason is None:
            # Its keys and values may hold NaN, which no other request may find.
            request.finish_reason = FinishReason.ERROR
            self.cache.forget(running.table)
        else:
            self._advance(running, min(num_computed, len(request.tokens)))
        if request.finish_reason is not None:
            self._queues.close(running)
        else:
            running.min_length += count - 1
            running.max_length += count - 1 - row.num_drafts
            running.num_drafts = num_drafted
        return TokenDelta(request.id, kept, min(num_accepted, len(kept)), request.finish_reason, request.stop_token)

    def _advance(self, running: RunningRequest, num_computed: int) -> None:
        running.num_computed = num_computed
        if num_computed >= running.table.next_file:
            self.cache.commit(running.table, running.request.tokens, num_computed)

    # Planning, in order of precedence.

    def _plan_decodes(self, builder: PlanBuilder) -> None:
        """One token and the waiting drafts for every request past its prompt, oldest first."""
        limit, lookahead = self.options.sizes.max_model_len, self.options.lookahead
        draft_limit = min(self.options.draft_limit or limit, limit - 1)  # a token of the target's own follows drafts
        all_running = self._queues.running
        budget = self._draft_budget()
        index = 0
        while index < len(all_running) and not builder.stalled:  # preemption takes from the end
            running = all_running[index]
            index += 1
            if running.num_planned < running.num_known:
                continue
            max_length = running.max_length
            if running.min_length >= running.end or max_length >= limit:  # what is in flight may well end it
                continue
            num_drafts = max(0, min(running.max_drafts, budget, draft_limit - max_length))
            if not running.num_in_flight:
                num_drafts = min(num_drafts, running.num_drafts)
            needed = max_length + num_drafts + lookahead
            if running.room < needed and running.room < limit:
                fitting = self._make_room(running, num_drafts, builder)
                if fitting is None:
                    continue
                num_drafts = fitting
            budget -= num_drafts
            builder.add(running, num_drafts + 1, num_drafts, True)

    def _plan_prefills(self, builder: PlanBuilder) -> None:
        """The rest of the budget to the prompts that run already, oldest first. They hold their blocks."""
        for running in self._queues.running:
            if running.num_planned < running.num_known and builder.budget:
                self._plan_chunk(running, builder)

    def _plan_admissions(self, builder: PlanBuilder) -> None:
        """Slots, blocks and what is left of the budget to those who wait, oldest first and nobody past another."""
        queues, cache, limit = self._queues, self.cache, self.options.sizes.max_model_len
        while queues.waiting and queues.free_slots and builder.budget:
            reserve = len(queues.running)  # a block in hand for each, or starting one more is soon undone
            if reserve and cache.num_free - reserve <= self._refused:
                return
            request = queues.oldest_waiting()
            num_positions = min(len(request.tokens) + self.options.lookahead, limit)
            table = cache.open(request.tokens, num_positions, salt=queues.cache_salt(request), reserve=reserve)
            if table is None:
                assert reserve or queues.num_closing, f"an idle cache has no room for {num_positions} tokens"
                self._refused = cache.num_free - reserve
                return
            self._refused = -1
            running = queues.start(table)
            builder.admit.append(
                Admission(
                    running.slot,
                    tuple(request.tokens),
                    request.num_prompt,
                    table.num_cached,
                    request.sampling,
                    request.seed,
                    request.stop_ids,
                    running.max_drafts > 0,
                )
            )
            builder.grow.append(Growth(running.slot, 0, tuple(table.blocks)))
            self._plan_chunk(running, builder)

    def _plan_chunk(self, running: RunningRequest, builder: PlanBuilder) -> None:
        num_left = running.num_known - running.num_planned
        num_tokens = min(num_left, builder.budget)
        running.num_planned += num_tokens
        if num_tokens == num_left:
            self._queues.num_prefilling -= 1
        builder.add(running, num_tokens, 0, num_tokens == num_left)

    def _draft_budget(self) -> int:
        """How many drafts the step may verify once every request past its prompt has its one token."""
        queues, total = self._queues, self.options.sizes.max_num_batched_tokens
        left = total - (len(queues.running) - queues.num_prefilling)
        if queues.num_prefilling or (queues.waiting and queues.free_slots):
            left -= max(1, min(total // PREFILL_SHARE, self.options.max_prefill_tokens_beside_decodes))
        return max(0, left)

    def _make_room(self, running: RunningRequest, num_drafts: int, builder: PlanBuilder) -> int | None:
        """Blocks for a row: drafts are given up before anybody is preempted, and then the youngest is.

        How many drafts there is room for; None if the row cannot run in this step.
        """
        queues, base = self._queues, running.max_length + self.options.lookahead
        while True:
            if self._grow(running, base + num_drafts, builder):
                return num_drafts
            if running.room >= base or self._grow(running, base, builder):
                return running.room - base
            if queues.running[-1].num_in_flight or queues.num_closing:  # rows must land first, or blocks come back
                builder.stalled = True
                return None
            self.num_preemptions += 1
            self._refused = -1
            builder.preempted = True
            if queues.preempt_youngest() is running:
                return None

    def _grow(self, running: RunningRequest, num_positions: int, builder: PlanBuilder) -> bool:
        start = len(running.table.blocks)
        blocks = self.cache.grow(running.table, min(num_positions, self.options.sizes.max_model_len))
        if blocks:
            builder.grow.append(Growth(running.slot, start, blocks))
            running.room += len(blocks) * self.options.sizes.block_size
        return blocks is not None

    # Integrity.

    def check(self) -> None:
        """Raise AssertionError, with what is wrong, unless slots, queues and blocks are accounted for."""
        self._queues.check(running for _, rows in self._in_flight for running in rows)
        self.cache.check()

    def check_idle(self) -> None:
        """As `check`, and nothing may be left: for when the engine has no work."""
        assert not self.has_work, (
            f"{self.num_running} running, {self.num_waiting} waiting, {len(self._in_flight)} plans"
        )
        self.check()
        free, total = self.cache.num_free, self.cache.num_blocks
        assert free == total, f"{total - free} of {total} blocks are owned by nobody that runs"
