"""Scheduler and cache, together, under thousands of random workloads on a device that is only pretended.

The device knows nothing but the plans. It keeps its own lengths, block tables and cache cells, and
checks at every step that each query finds, at every position before it, the right token in a cell
written for that position. Outputs must be the request's own, whatever was drafted, chunked, shared,
preempted or aborted on the way. The last tests break one thing at a time: the same checks must fail.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from outrider.cache.manager import BlockTable, CacheManager
from outrider.cache.prefix import PrefixIndex
from outrider.core.output import AcceptanceReport, FinishReason, TokenDelta
from outrider.core.plan import Admission, Row, StepPlan, StepResult
from outrider.core.request import Request, RequestStatus
from outrider.core.sampling import SamplingParams
from outrider.schedule.builder import PlanBuilder
from outrider.schedule.options import SchedulerOptions
from outrider.schedule.queues import RequestQueues
from outrider.schedule.running import RunningRequest
from outrider.schedule.scheduler import Scheduler
from workloads import scheduler_options

VOCAB = 5
NO_TOKEN = -1


def next_token(tokens: Sequence[int], num_prompt: int, sampling: SamplingParams, seed: int, stop: Sequence[int]) -> int:
    """The target model: a function of the request and its tokens, and of nothing else."""
    token = hash((seed, *tokens)) % VOCAB
    while len(tokens) < num_prompt + sampling.min_tokens and token in stop:
        token = (token + 1) % VOCAB
    return token


def reference(request: Request, max_model_len: int) -> tuple[list[int], FinishReason]:
    """What the request must yield."""
    tokens = list(request.prompt)
    while True:
        token = next_token(tokens, request.num_prompt, request.sampling, request.seed, request.stop_ids)
        tokens.append(token)
        if token in request.stop_ids:
            return tokens, FinishReason.STOP
        if len(tokens) - request.num_prompt == request.sampling.max_tokens or len(tokens) == max_model_len:
            return tokens, FinishReason.LENGTH


@dataclass(slots=True)
class Occupied:
    """A slot of the device."""

    admission: Admission
    tokens: list[int]
    computed: int
    blocks: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    past_prompt: bool = False


class Device:
    """Runs plans as a runner would, and asserts all that a runner may assume of them."""

    def __init__(self, options: SchedulerOptions, *, accuracy: float, always_k: bool) -> None:
        self.options = options
        self.accuracy, self.always_k = accuracy, always_k
        self.slots: dict[int, Occupied] = {}
        num_cells = options.num_blocks * options.sizes.block_size
        self.keys: list[tuple[int, int] | None] = [None] * num_cells  # (position, token)
        self.draft_keys: list[tuple[int, ...] | None] = [None] * num_cells  # (position, token, the `rerun` after it)
        self.holders: Counter[int] = Counter()  # slots that hold a block

    def run(self, plan: StepPlan) -> StepResult:
        for slot in plan.release:
            self.holders.subtract(self.slots.pop(slot).blocks)
        for admission in plan.admit:
            self._admit(admission)
        for slot, start, blocks in plan.grow:
            self._grow(slot, start, blocks)
        drafting = not self.options.draft_cache or any(self.slots[row.slot].admission.drafts for row in plan.rows)
        outcomes = [self._row(row, drafting) for row in plan.rows]
        return StepResult(plan.step, tuple(tokens for tokens, _ in outcomes), tuple(count for _, count in outcomes))

    def _admit(self, admission: Admission) -> None:
        assert admission.slot not in self.slots, f"slot {admission.slot} is taken"
        assert 0 <= admission.slot < self.options.sizes.max_num_seqs
        assert admission.num_cached % self.options.sizes.block_size == 0
        num_left = len(admission.tokens) - admission.num_cached
        assert not admission.num_cached or num_left > self.options.rerun, "too little is left to run"
        self.slots[admission.slot] = Occupied(admission, list(admission.tokens), admission.num_cached)

    def _grow(self, slot: int, start: int, blocks: Sequence[int]) -> None:
        state = self.slots[slot]
        assert blocks and start == len(state.blocks)
        state.blocks += blocks
        num_shared = state.admission.num_cached // self.options.sizes.block_size
        for index, block in enumerate(blocks, start):
            assert index < num_shared or not self.holders[block], f"block {block} is given away while it is held"
            self.holders[block] += 1

    def _cell(self, state: Occupied, position: int) -> int:
        index, offset = divmod(position, self.options.sizes.block_size)
        return state.blocks[index] * self.options.sizes.block_size + offset

    def _write(self, cells: list, state: Occupied, position: int, value: tuple[int, ...]) -> None:
        cell = self._cell(state, position)
        assert self.holders[cell // self.options.sizes.block_size] == 1, "a shared block is written to"
        cells[cell] = value

    def _row(self, row: Row, drafting: bool) -> tuple[tuple[int, ...], int]:
        state = self.slots[row.slot]
        start, length, end = state.computed, len(state.tokens), state.computed + row.num_tokens
        queries = state.tokens[start:end]
        if state.past_prompt:
            assert row.ends_prompt and row.num_tokens == 1 + row.num_drafts and start == length - 1
            drafts = state.drafts[: row.num_drafts]
            queries += drafts + [NO_TOKEN] * (row.num_drafts - len(drafts))
        else:
            assert row.num_tokens > 0 and row.num_drafts == 0 and row.ends_prompt == (end == length)
        assert len(queries) == row.num_tokens and end <= self.options.sizes.max_model_len
        for position, token in enumerate(queries, start):
            self._write(self.keys, state, position, (position, token))
        context = state.tokens[:start] + queries
        found = [self.keys[self._cell(state, position)] for position in range(end)]
        assert found == list(enumerate(context)), f"slot {row.slot} attends to {found}, not to {context}"
        yielded = self._verify(state, queries[-row.num_drafts :] if row.num_drafts else []) if row.ends_prompt else ()
        state.tokens += yielded
        state.computed = len(state.tokens) - 1 if row.ends_prompt else end
        state.past_prompt = row.ends_prompt
        assert len(state.tokens) <= self.options.sizes.max_model_len
        if drafting:
            self._run_drafter(state, start, end)
        state.drafts = self._propose(state) if drafting and row.ends_prompt else []
        return yielded, len(state.drafts)

    def _verify(self, state: Occupied, drafts: Sequence[int]) -> tuple[int, ...]:
        yielded: list[int] = []
        for draft in [*drafts, None]:
            yielded.append(self._next(state.tokens + yielded, state))
            if draft != yielded[-1]:
                break
        return tuple(yielded)

    def _next(self, tokens: Sequence[int], state: Occupied) -> int:
        given = state.admission
        return next_token(tokens, given.num_prompt, given.sampling, given.seed, given.stop_ids)

    def _run_drafter(self, state: Occupied, start: int, end: int) -> None:
        """A drafter with a cache of its own: an entry depends on the tokens after it, and it scribbles ahead."""
        rerun, tokens = self.options.rerun, state.tokens
        late = max(0, rerun - 1)  # entries whose following tokens are not all known when they are first made
        for position in range(max(state.admission.num_cached, start - late), state.computed):
            self._write(self.draft_keys, state, position, (position, *tokens[position : position + 1 + rerun]))
        complete = state.admission.drafts or not self.options.draft_cache  # else steps without drafts left gaps
        for position in range(state.computed - late if complete else 0):
            found = self.draft_keys[self._cell(state, position)]
            assert found == (position, *tokens[position : position + 1 + rerun]), f"stale draft entry {found}"
        for position in range(state.computed, min(end + self.options.lookahead, self.options.sizes.max_model_len)):
            self._write(self.draft_keys, state, position, (position, NO_TOKEN))

    def _propose(self, state: Occupied) -> list[int]:
        """Right or wrong by a rule, not by chance, so that a request's drafts do not depend on the schedule."""
        most = self.options.sizes.num_drafts
        drafts: list[int] = []
        for _ in range(most if self.always_k else hash((1, *state.tokens)) % (most + 1)):
            right = self._next(state.tokens + drafts, state)
            luck = hash((2, *state.tokens, *drafts)) % 97
            drafts.append(right if luck < 97 * self.accuracy else (right + 1 + luck % (VOCAB - 1)) % VOCAB)
        return drafts


class Workload:
    """One random run: requests that come and go, a scheduler, a device, and what must hold between them."""

    def __init__(self, seed: int, make: Callable[[SchedulerOptions], Scheduler] = Scheduler, **fixed: int) -> None:
        rng = self.rng = random.Random(seed)
        self.options = options = random_options(rng, **fixed)
        self.scheduler = make(options)
        self.device = Device(options, accuracy=rng.choice([0.0, 0.5, 0.9, 1.0]), always_k=rng.random() < 0.5)
        self.take(random_requests(rng, options.sizes.max_model_len))
        self.abort_rate = rng.choice([0.0, 0.0, 0.02, 0.1])
        self.stop_string_rate = rng.choice([0.0, 0.0, 0.05])
        self.under_way: deque[tuple[StepPlan, StepResult]] = deque()
        self.ended: dict[str, FinishReason] = {}
        self.num_steps = self.num_plans = self.num_ahead = 0

    def take(self, requests: list[Request]) -> None:
        self.requests = requests
        self.to_come = deque(requests)
        self.expected = {request.id: reference(request, self.options.sizes.max_model_len) for request in requests}
        self.gained: dict[str, list[int]] = {request.id: [] for request in requests}

    def run(self) -> None:
        work = sum(len(tokens) + 2 for tokens, _ in self.expected.values())
        while self.to_come or self.scheduler.has_work:
            self.step()
            assert self.num_steps < 4 * work + 100, "no progress"
        self.scheduler.check_idle()
        self._check_outputs()

    def step(self) -> None:
        self._come_and_go()
        self.submit()
        if self.under_way:
            self._apply()
        else:
            assert not self.scheduler.has_work, "there is work, and nothing under way, but nothing is planned"
        self.scheduler.check()
        self.num_steps += 1

    def _come_and_go(self) -> None:
        while self.to_come and self.rng.random() < 0.4:
            self.scheduler.add(self.to_come.popleft())
        if self.rng.random() < self.abort_rate:
            request = self.rng.choice(self.requests)
            if request.status is not RequestStatus.NEW and self.scheduler.abort(request.id):
                assert request.id not in self.ended
                self.ended[request.id] = FinishReason.ABORT

    def submit(self) -> None:
        for _ in range(self.rng.randint(1, self.options.depth)):
            if len(self.under_way) == self.options.depth:
                return
            num_preemptions = self.scheduler.num_preemptions
            plan = self.scheduler.schedule()
            if not plan.rows:
                assert not (plan.release or plan.admit or plan.grow)
                return
            self._check_plan(plan, preempted=self.scheduler.num_preemptions > num_preemptions)
            self.num_plans += 1
            self.num_ahead += bool(self.under_way)
            self.under_way.append((plan, self.device.run(plan)))

    def _check_plan(self, plan: StepPlan, preempted: bool) -> None:
        options, slots = self.options, self.device.slots
        assert plan.step == self.num_plans
        rows = {row.slot: row for row in plan.rows}
        assert len(rows) == len(plan.rows) <= options.sizes.max_num_seqs
        assert sum(row.num_tokens for row in plan.rows) <= options.sizes.max_num_batched_tokens
        written = {row.slot for earlier, _ in self.under_way for row in earlier.rows}
        assert not written & set(plan.release), "a slot is released while a plan under way writes to it"
        stays = slots.keys() - set(plan.release)
        decoding = {slot for slot in stays if slots[slot].past_prompt}
        kinds = [row.slot in decoding for row in plan.rows]
        assert kinds == sorted(kinds, reverse=True), "a prefill row comes before a decode row"
        beside = sum(row.num_tokens for row in plan.rows if row.slot not in decoding)
        assert not any(kinds) or beside <= options.max_prefill_tokens_beside_decodes, "prompts hold up the decodes"
        running = [request.arrival for request in self.requests if request.status is RequestStatus.RUNNING]
        waiting = [request.arrival for request in self.requests if request.status is RequestStatus.WAITING]
        assert not running or not waiting or max(running) < min(waiting), "a request was overtaken"
        if options.depth == 1:
            assert decoding <= rows.keys(), "a decode was starved"
            inside = (stays - decoding) | {admission.slot for admission in plan.admit}
            assert not inside or inside & rows.keys(), "the prompts were starved"
        assert not (preempted and plan.admit), "somebody was admitted in a step that preempted"

    def _apply(self) -> None:
        plan, result = self.under_way.popleft()
        for delta in self.scheduler.apply(plan, result):
            self._take(delta)

    def _take(self, delta: TokenDelta) -> None:
        assert delta.request_id not in self.ended, "a request that had ended yields more"
        assert delta.tokens and 0 <= delta.num_accepted <= len(delta.tokens)
        self.gained[delta.request_id] += delta.tokens
        if delta.finish_reason is not None:
            self.ended[delta.request_id] = delta.finish_reason
        elif self.rng.random() < self.stop_string_rate:
            assert self.scheduler.finish(delta.request_id, FinishReason.STOP)
            self.ended[delta.request_id] = FinishReason.ABORT  # that is: not the reference's end

    def _check_outputs(self) -> None:
        total = AcceptanceReport(per_position=(0,) * self.options.sizes.num_drafts)
        for request in self.requests:
            tokens, reason = self.expected[request.id]
            gained = [*request.prompt, *self.gained[request.id]]
            assert gained == request.tokens and request.status is RequestStatus.FINISHED
            if self.ended[request.id] is FinishReason.ABORT:
                assert gained == tokens[: len(gained)]
            else:
                assert (gained, request.finish_reason) == (tokens, reason)
                assert (request.stop_token is not None) == (reason is FinishReason.STOP)
            report = request.acceptance.report()
            if request.max_drafts is not None:
                assert report.drafted <= report.drafts * request.max_drafts, "more drafts than the request allows"
                assert not any(report.per_position[request.max_drafts :])
            total += report
        assert total == self.scheduler.acceptance.report()


def random_options(rng: random.Random, **fixed: int) -> SchedulerOptions:
    """Small and tight: blocks run out, budgets cut prompts and drafts, slots are few."""
    block_size = rng.choice([1, 2, 3, 4, 8])
    max_model_len = rng.randint(6, 48)
    max_num_seqs = rng.choice([1, 2, 3, 4, 6, 8])
    num_drafts = rng.randint(0, 4)
    values = {
        "block_size": block_size,
        "max_model_len": max_model_len,
        "num_blocks": -(-max_model_len // block_size) + rng.choice([0, 0, 0, 1, 2, 4, 10, 40]),
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_seqs + rng.choice([0, 0, 1, 4, 12, 64]),
        "max_prefill_tokens_beside_decodes": (1, 2, 7, 2048, 2048)[max_model_len % 5],
        "enable_prefix_caching": rng.random() < 0.8,
        "num_drafts": num_drafts,
        "lookahead": rng.choice([0, num_drafts]),
        "rerun": rng.choice([0, 0, 1, 1, 2]),
        "draft_cache": rng.random() < 0.5,
        "depth": rng.choice([1, 1, 2, 2, 3]),
    }
    return scheduler_options(**(values | fixed))


def random_requests(rng: random.Random, max_model_len: int) -> list[Request]:
    """Prompts that begin alike, some of them equal to another's prompt and output."""
    stems = [[rng.randrange(VOCAB) for _ in range(max_model_len)] for _ in range(2)]
    longest = rng.choice([2, max_model_len // 3, max_model_len - 1])
    requests: list[Request] = []
    for number in range(rng.randint(1, 12)):
        stem = rng.choice(stems)
        prompt = stem[: rng.randint(0, longest)] + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 4))]
        max_tokens = rng.choice([None, 1, 2, rng.randint(1, max_model_len)])
        min_tokens = 0 if max_tokens is None else rng.choice([0, 0, rng.randint(0, max_tokens)])
        stop_ids = tuple(rng.sample(range(VOCAB), rng.choice([0, 0, 1])))
        request = Request(
            id=f"r{number}",
            prompt=tuple(prompt[: max_model_len - 1]),
            sampling=SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens),
            seed=rng.choice([0, 0, number]),
            stop_ids=stop_ids,
            max_drafts=(None, 9, 1, 0)[number % 4],
            cache_salt=rng.choice(["", "", "other"]),
        )
        requests.append(request)
    return requests


def run(seed: int, make: Callable[[SchedulerOptions], Scheduler] = Scheduler, **fixed: int) -> Workload:
    """A workload, run; a failure names its seed."""
    workload = Workload(seed, make, **fixed)
    try:
        workload.run()
    except AssertionError as error:
        error.add_note(f"seed {seed}, {workload.options}")
        raise
    return workload


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_random_workloads(depth: int) -> None:
    reached: Counter[str] = Counter()
    for seed in range(2000):
        workload = run(2000 * depth + seed, depth=depth)
        report = workload.scheduler.acceptance.report()
        reached.update(
            preemptions=workload.scheduler.num_preemptions,
            hits=workload.scheduler.cache.num_hit,
            accepted=report.accepted,
            rejected=report.drafted - report.accepted,
            aborts=sum(reason is FinishReason.ABORT for reason in workload.ended.values()),
            plans=workload.num_plans if depth == 1 else workload.num_ahead,
        )
    assert min(reached.values()) > 500, f"the workloads do not reach what they are for: {reached}"


def test_acceptance_does_not_depend_on_depth() -> None:
    """What overshoots a request's end is in no count, so planning ahead changes no figure."""
    roomy = {"max_model_len": 100, "num_blocks": 1200, "max_num_seqs": 12, "max_num_batched_tokens": 999}
    total = AcceptanceReport()
    for seed in range(80):
        reports = []
        for depth in (1, 2, 3):
            workload = Workload(seed, depth=depth, num_drafts=3, **roomy)
            workload.abort_rate = workload.stop_string_rate = 0.0
            workload.take([r for r in random_requests(random.Random(seed), 40) if r.sampling.max_tokens is not None])
            workload.run()
            reports.append([request.acceptance.report() for request in workload.requests])
        assert reports[0] == reports[1] == reports[2]
        total = sum(reports[0], total)
    assert total.accepted > 500


@pytest.mark.parametrize("depth", [1, 2])
def test_blocks_come_back_after_a_fault(depth: int) -> None:
    """A step fails and its result never comes: everything ends, nothing is lost, and a new runner serves the rest."""
    for seed in range(200):
        workload = Workload(seed, depth=depth)
        for _ in range(1 + seed % 23):
            workload.step()
        workload.submit()
        unfinished = {r.id for r in workload.requests if r.status in (RequestStatus.WAITING, RequestStatus.RUNNING)}
        ended = workload.scheduler.abandon()
        assert {delta.request_id for delta in ended} == unfinished
        assert all(delta.finish_reason is FinishReason.ABORT for delta in ended)
        assert all(request.status in (RequestStatus.NEW, RequestStatus.FINISHED) for request in workload.requests)
        workload.scheduler.check_idle()
        assert not len(workload.scheduler.cache.index)
        workload.ended.update(dict.fromkeys(unfinished, FinishReason.ABORT))
        workload.under_way.clear()
        workload.device = Device(workload.options, accuracy=0.5, always_k=True)
        workload.run()


def all_fail(make: Callable[[SchedulerOptions], Scheduler], match: str, **fixed: int) -> None:
    """With one thing broken, some workload of a few must fail for the reason given."""
    with pytest.raises(AssertionError, match=match):
        for seed in range(300):
            run(seed, make, **fixed)


def with_cache(cache: type[CacheManager], index: type[PrefixIndex] = PrefixIndex) -> Callable[..., Scheduler]:
    """Makes schedulers whose cache manager or prefix index is another."""

    def make(options: SchedulerOptions) -> Scheduler:
        manager = cache(
            options.num_blocks,
            options.sizes.block_size,
            enable_prefix_caching=options.enable_prefix_caching,
            rerun=options.rerun,
        )
        manager.index = index(options.sizes.block_size, options.rerun)
        return Scheduler(options, manager)

    return make


def with_queues(queues: type[RequestQueues]) -> Callable[..., Scheduler]:
    """Makes schedulers with other queues."""

    def make(options: SchedulerOptions) -> Scheduler:
        scheduler = Scheduler(options)
        scheduler._queues = queues(options, scheduler.cache)
        return scheduler

    return make


def test_filing_what_is_not_computed_is_found() -> None:
    class Eager(Scheduler):
        def _advance(self, running: RunningRequest, num_computed: int) -> None:
            super()._advance(running, num_computed)
            self.cache.commit(running.table, running.request.tokens, len(running.request.tokens))

    all_fail(Eager, "attends to|a shared block is written to", rerun=0)


def test_counting_rejected_drafts_as_computed_is_found() -> None:
    class Greedy(Scheduler):
        def _advance(self, running: RunningRequest, num_computed: int) -> None:
            super()._advance(running, num_computed + running.num_drafts)

    all_fail(Greedy, "drafts are not committed")


def test_freeing_twice_is_found() -> None:
    class Twice(CacheManager):
        def free(self, table: BlockTable) -> None:
            super().free(table)
            self.pool.release(table.blocks[:1])

    all_fail(with_cache(Twice), "released more often")


def test_freeing_too_little_is_found() -> None:
    class Leaky(CacheManager):
        def free(self, table: BlockTable) -> None:
            table.blocks = table.blocks[:-1] or table.blocks
            super().free(table)

    all_fail(with_cache(Leaky), "reference counts")


def test_colliding_prefixes_are_found() -> None:
    class Lossy(PrefixIndex):
        @staticmethod
        def _key(parent: object, tokens: tuple[int, ...]) -> object:
            return hash((parent, tokens)) % 7

    all_fail(with_cache(CacheManager, Lossy), "attends to")


def test_prefixes_taken_for_another_parents_are_found() -> None:
    class Orphan(PrefixIndex):
        @staticmethod
        def _key(parent: object, tokens: tuple[int, ...]) -> object:
            return tokens

    all_fail(with_cache(CacheManager, Orphan), "attends to")


def test_evicting_without_forgetting_is_found() -> None:
    class Forgetful(CacheManager):
        def _evict(self, block: int) -> None:
            pass

    all_fail(with_cache(Forgetful), "record only|attends to|indexed twice")


def test_ignoring_the_drafters_rerun_is_found() -> None:
    class Short(PrefixIndex):
        @staticmethod
        def _key(parent: object, tokens: tuple[int, ...]) -> object:
            return parent, tokens[:-1]

    all_fail(with_cache(CacheManager, Short), "stale draft entry", rerun=1)


def test_sharing_prefixes_with_requests_that_take_no_drafts_is_found() -> None:
    class Shared(RequestQueues):
        def cache_salt(self, request: Request) -> str:
            return request.cache_salt

    all_fail(with_queues(Shared), "stale draft entry", draft_cache=True)


def test_reusing_a_slot_under_a_plan_in_flight_is_found() -> None:
    class Hasty(RequestQueues):
        def close(self, running: RunningRequest) -> None:
            super().close(running)
            if running.num_in_flight:
                self._vacate(running)

        def land_late(self, running: RunningRequest) -> None:
            running.num_in_flight -= 1
            self.num_closing -= not running.num_in_flight

        def check(self, rows: object) -> None:
            pass

    all_fail(with_queues(Hasty), "a plan under way writes to it", depth=2)


def test_holding_up_decodes_is_found() -> None:
    class Hungry(Scheduler):
        def _plan_prefills(self, builder: PlanBuilder) -> None:
            builder.budget = self.options.sizes.max_num_batched_tokens - sum(row.num_tokens for row in builder.rows)
            super()._plan_prefills(builder)

    all_fail(Hungry, "prompts hold up the decodes")


def test_starting_the_young_before_the_old_is_found() -> None:
    class Queue(RequestQueues):
        def start(self, table: BlockTable) -> RunningRequest:
            self.waiting.move_to_end(self.oldest_waiting().id, last=False)
            return super().start(table)

        def oldest_waiting(self) -> Request:
            return next(reversed(self.waiting.values()))

    all_fail(with_queues(Queue), "overtaken|out of order")
