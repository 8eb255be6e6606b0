"""Decides what each step runs, and takes in what came of it.

The scheduler knows tokens, not phases: a plan is {slot: number of tokens}. A request past its prompt
takes its last token and the drafts waiting behind it, one inside its prompt a chunk of what is not yet
computed. Everything is first come, first served: slots, blocks and the token budget go to the oldest,
and when blocks run out the youngest gives up its place and is computed again later. A step that decodes
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
from outrider.schedule.options import SchedulerOptions
from outrider.schedule.roster import Roster
from outrider.schedule.seat import Seat, Sketch

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
            options.block_size,
            enable_prefix_caching=options.enable_prefix_caching,
            rerun=options.rerun,
        )
        self.acceptance = AcceptanceTally(options.num_drafts)  # over all requests
        self.num_preemptions = 0
        self._roster = Roster(options, self.cache)
        self._step = 0
        self._under_way: deque[tuple[int, list[Seat]]] = deque()  # step, and whose its rows are
        self._refused = -1  # blocks there were to spare when the oldest waiting request last did not fit

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished or any plan not yet applied."""
        return bool(self._roster.running or self._roster.waiting or self._under_way)

    @property
    def num_running(self) -> int:
        """Requests that hold a slot and are not finished."""
        return len(self._roster.running)

    @property
    def num_waiting(self) -> int:
        """Requests without a slot, preempted ones included."""
        return len(self._roster.waiting)

    # Requests.

    def add(self, request: Request) -> None:
        """Queue a new request. PromptError, naming the numbers, if it can never be run."""
        check_prompt_length(request.num_prompt, self.options.max_model_len)
        if request.id in self._roster.waiting or request.id in self._roster.seats:
            raise InputError(f"request id is already in use: {request.id!r}; give each request its own")
        assert request.status is RequestStatus.NEW, f"request {request.id!r} was added before"
        request.acceptance = AcceptanceTally(self.options.num_drafts)
        self._roster.enqueue(request)

    def abort(self, request_id: str) -> bool:
        """End a request at any time; False if it had ended already."""
        return self.finish(request_id, FinishReason.ABORT)

    def finish(self, request_id: str, reason: FinishReason) -> bool:
        """End a request for a reason only the engine can see, a stop string say; False if it had ended already.

        Whatever is under way for it yields nothing more.
        """
        self._refused = -1
        return self._roster.finish(request_id, reason)

    def abandon(self) -> list[TokenDelta]:
        """After a step failed: end everything as aborted, forget the plans under way and all cached prefixes.

        The next plan is for a runner that holds nothing: a new one, or one that has been emptied.
        """
        roster = self._roster
        requests = [*(seat.request for seat in roster.running), *roster.waiting.values()]
        for request in requests:
            self.abort(request.id)
        for _, seats in self._under_way:
            for seat in seats:
                roster.land_late(seat)
        self._under_way.clear()
        roster.released.clear()
        self.cache.clear_prefixes()
        return [TokenDelta(request.id, (), 0, FinishReason.ABORT, None) for request in requests]

    # A step: plan it, then apply what came of it.

    def schedule(self) -> StepPlan:
        """Plan the next step.

        A plan without rows means that nothing can be run until a plan under way is applied (or ever,
        if there is no work): nothing was decided, so it must be neither run nor applied.
        """
        options, roster = self.options, self._roster
        assert len(self._under_way) < options.depth, f"depth {options.depth}: apply the oldest plan first"
        sketch = Sketch(options.max_num_batched_tokens)
        self._plan_decodes(sketch)
        if sketch.rows:
            sketch.budget = min(sketch.budget, options.max_prefill_tokens_beside_decodes)
        if roster.num_prefilling and not sketch.stalled:
            self._plan_prefills(sketch)
        if roster.waiting and not (sketch.stalled or sketch.preempted):
            self._plan_admissions(sketch)
        if not sketch.rows:
            return StepPlan(self._step, (), (), (), ())
        admit, grow, rows = tuple(sketch.admit), tuple(sketch.grow), tuple(sketch.rows)
        plan = StepPlan(self._step, tuple(roster.released), admit, grow, rows)
        self._step += 1
        roster.released.clear()
        self._under_way.append((plan.step, sketch.seats))
        return plan

    def apply(self, plan: StepPlan, result: StepResult) -> list[TokenDelta]:
        """Take in the oldest plan's result. One record for each request that gained tokens, in the plan's order."""
        oldest, seats = self._under_way[0]
        assert plan.step == oldest, f"step {plan.step} is applied before step {oldest}"
        assert result.step == oldest, f"the result of step {result.step} is taken for step {oldest}'s"
        self._under_way.popleft()
        deltas: list[TokenDelta] = []
        ended = False
        for seat, row, tokens, num_drafted in zip(seats, plan.rows, result.tokens, result.num_drafted, strict=True):
            if seat.closed:
                self._roster.land_late(seat)
                continue
            seat.num_under_way -= 1
            if row.ends_prompt:
                delta = self._take(seat, row, tokens, num_drafted)
                deltas.append(delta)
                ended = ended or delta.finish_reason is not None
            else:
                assert not tokens, f"slot {row.slot} gave {len(tokens)} tokens inside its prompt"
                self._advance(seat, seat.num_computed + row.num_tokens)
        if ended:
            self._roster.running = [seat for seat in self._roster.running if not seat.closed]
        return deltas

    def _take(self, seat: Seat, row: Row, tokens: tuple[int, ...], num_drafted: int) -> TokenDelta:
        """Commit what a row yielded, and end the request if that ends it."""
        request, count = seat.request, len(tokens)
        assert 1 <= count <= row.num_drafts + 1, f"slot {row.slot} gave {count} tokens for {row.num_drafts} drafts"
        assert 0 <= num_drafted <= self.options.num_drafts, f"slot {row.slot} has {num_drafted} drafts waiting"
        # Planned ahead, a row may run more drafts than came: what lies behind those is right by chance, if it is.
        num_verified = min(row.num_drafts, seat.num_drafts)
        num_accepted = min(count - 1, num_verified)
        if num_verified:
            request.acceptance.record(num_verified, num_accepted)
            self.acceptance.record(num_verified, num_accepted)
            if request.watch is not None:
                request.watch.record(num_verified, num_accepted)
        num_computed = len(request.tokens) + count - 1
        kept = request.extend(tokens, seat.end)
        self._advance(seat, min(num_computed, len(request.tokens)))
        if request.finish_reason is not None:
            self._roster.close(seat)
        else:
            seat.least += count - 1
            seat.most += count - 1 - row.num_drafts
            seat.num_drafts = num_drafted
        return TokenDelta(request.id, kept, min(num_accepted, len(kept)), request.finish_reason, request.stop_token)

    def _advance(self, seat: Seat, num_computed: int) -> None:
        seat.num_computed = num_computed
        if num_computed >= seat.table.next_file:
            self.cache.commit(seat.table, seat.request.tokens, num_computed)

    # Planning, in order of precedence.

    def _plan_decodes(self, sketch: Sketch) -> None:
        """One token and the waiting drafts for every request past its prompt, oldest first."""
        limit, lookahead = self.options.max_model_len, self.options.lookahead
        running = self._roster.running
        budget = self._draft_budget()
        index = 0
        while index < len(running) and not sketch.stalled:  # preemption takes from the end
            seat = running[index]
            index += 1
            if seat.num_planned < seat.num_known:
                continue
            most = seat.most
            if seat.least >= seat.end or most >= limit:  # what is under way may well end it
                continue
            num_drafts = min(seat.max_drafts, budget, limit - most - 1)
            if not seat.num_under_way:
                num_drafts = min(num_drafts, seat.num_drafts)
            needed = most + num_drafts + lookahead
            if seat.room < needed and seat.room < limit:
                fitting = self._make_room(seat, num_drafts, sketch)
                if fitting is None:
                    continue
                num_drafts = fitting
            budget -= num_drafts
            sketch.add(seat, num_drafts + 1, num_drafts, True)

    def _plan_prefills(self, sketch: Sketch) -> None:
        """The rest of the budget to the prompts that run already, oldest first. They hold their blocks."""
        for seat in self._roster.running:
            if seat.num_planned < seat.num_known and sketch.budget:
                self._plan_chunk(seat, sketch)

    def _plan_admissions(self, sketch: Sketch) -> None:
        """Slots, blocks and what is left of the budget to those who wait, oldest first and nobody past another."""
        roster, cache, limit = self._roster, self.cache, self.options.max_model_len
        while roster.waiting and roster.free_slots and sketch.budget:
            reserve = len(roster.running)  # a block in hand for each, or seating one more is soon undone
            if reserve and cache.num_free - reserve <= self._refused:
                return
            request = roster.oldest_waiting()
            num_positions = min(len(request.tokens) + self.options.lookahead, limit)
            table = cache.open(request.tokens, num_positions, salt=roster.cache_salt(request), reserve=reserve)
            if table is None:
                assert reserve or roster.num_lingering, f"an idle cache has no room for {num_positions} tokens"
                self._refused = cache.num_free - reserve
                return
            self._refused = -1
            seat = roster.seat(table)
            sketch.admit.append(
                Admission(
                    seat.slot,
                    tuple(request.tokens),
                    request.num_prompt,
                    table.num_cached,
                    request.sampling,
                    request.seed,
                    request.stop_ids,
                    seat.max_drafts > 0,
                )
            )
            sketch.grow.append(Growth(seat.slot, 0, tuple(table.blocks)))
            self._plan_chunk(seat, sketch)

    def _plan_chunk(self, seat: Seat, sketch: Sketch) -> None:
        num_left = seat.num_known - seat.num_planned
        num_tokens = min(num_left, sketch.budget)
        seat.num_planned += num_tokens
        if num_tokens == num_left:
            self._roster.num_prefilling -= 1
        sketch.add(seat, num_tokens, 0, num_tokens == num_left)

    def _draft_budget(self) -> int:
        """How many drafts the step may verify once every request past its prompt has its one token."""
        roster, total = self._roster, self.options.max_num_batched_tokens
        left = total - (len(roster.running) - roster.num_prefilling)
        if roster.num_prefilling or (roster.waiting and roster.free_slots):
            left -= max(1, min(total // PREFILL_SHARE, self.options.max_prefill_tokens_beside_decodes))
        return max(0, left)

    def _make_room(self, seat: Seat, num_drafts: int, sketch: Sketch) -> int | None:
        """Blocks for a row: drafts are given up before anybody is preempted, and then the youngest is.

        How many drafts there is room for; None if the row cannot run in this step.
        """
        roster, base = self._roster, seat.most + self.options.lookahead
        while True:
            if self._grow(seat, base + num_drafts, sketch):
                return num_drafts
            if seat.room >= base or self._grow(seat, base, sketch):
                return seat.room - base
            if roster.running[-1].num_under_way or roster.num_lingering:  # rows must land first, or blocks come back
                sketch.stalled = True
                return None
            self.num_preemptions += 1
            self._refused = -1
            sketch.preempted = True
            if roster.preempt_youngest() is seat:
                return None

    def _grow(self, seat: Seat, num_positions: int, sketch: Sketch) -> bool:
        start = len(seat.table.blocks)
        blocks = self.cache.grow(seat.table, min(num_positions, self.options.max_model_len))
        if blocks:
            sketch.grow.append(Growth(seat.slot, start, blocks))
            seat.room += len(blocks) * self.options.block_size
        return blocks is not None

    # Integrity.

    def check(self) -> None:
        """Raise AssertionError, with what is wrong, unless slots, queues and blocks are accounted for."""
        self._roster.check(seat for _, seats in self._under_way for seat in seats)
        self.cache.check()

    def check_idle(self) -> None:
        """As `check`, and nothing may be left: for when the engine has no work."""
        assert not self.has_work, (
            f"{self.num_running} running, {self.num_waiting} waiting, {len(self._under_way)} plans"
        )
        self.check()
        free, total = self.cache.num_free, self.cache.num_blocks
        assert free == total, f"{total - free} of {total} blocks are owned by nobody that runs"
