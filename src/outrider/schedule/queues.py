"""Who waits, who runs, and who holds which slot."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from outrider.cache.manager import BlockTable, CacheManager
from outrider.core.output import FinishReason
from outrider.core.request import Request, RequestStatus
from outrider.schedule.options import SchedulerOptions
from outrider.schedule.running import RunningRequest


class RequestQueues:
    """Every unfinished request, waiting or running, and every slot, free or taken.

    Both queues are in order of arrival, and every running request arrived before every waiting one. No request
    starts before an older one, and the youngest is preempted first. A request may end while rows of it are in
    flight: then its slot and blocks come free when the last of those rows has landed.
    """

    def __init__(self, options: SchedulerOptions, cache: CacheManager) -> None:
        self.options = options
        self.cache = cache
        self.waiting: OrderedDict[str, Request] = OrderedDict()
        self.running: list[RunningRequest] = []
        self.running_by_id: dict[str, RunningRequest] = {}  # those of `running`, by request id
        self.free_slots = list(range(options.sizes.max_num_seqs - 1, -1, -1))
        self.released: list[int] = []  # slots freed since the last plan
        self.num_closing = 0
        self.drafting = True  # whether requests may verify drafts
        self.num_prefilling = 0  # running, with known tokens not yet planned
        self._num_arrivals = 0

    def enqueue(self, request: Request) -> None:
        """A new request joins the end of the queue."""
        request.arrival = self._num_arrivals
        request.status = RequestStatus.WAITING
        self._num_arrivals += 1
        self.waiting[request.id] = request

    def oldest_waiting(self) -> Request:
        """The request that starts next."""
        return next(iter(self.waiting.values()))

    def start(self, table: BlockTable) -> RunningRequest:
        """The oldest waiting request takes a free slot and the table."""
        _, request = self.waiting.popitem(last=False)
        if not request.num_preemptions:
            request.num_cached = table.num_cached
        request.status = RequestStatus.RUNNING
        running = RunningRequest(
            request=request,
            slot=self.free_slots.pop(),
            table=table,
            num_known=len(request.tokens),
            num_planned=table.num_cached,
            num_computed=table.num_cached,
            min_length=len(request.tokens),
            max_length=len(request.tokens),
            end=request.max_length(self.options.sizes.max_model_len),
            room=len(table.blocks) * self.options.sizes.block_size,
            max_drafts=self._max_drafts(request),
        )
        self.running.append(running)
        self.running_by_id[request.id] = running
        self.num_prefilling += 1
        return running

    def preempt_youngest(self) -> RunningRequest:
        """The youngest goes back to the head of the queue with the tokens it has; its drafts are forgotten."""
        running = self.running.pop()
        assert not running.num_in_flight, (
            f"slot {running.slot} is preempted with {running.num_in_flight} rows in flight"
        )
        self._leave(running, RequestStatus.WAITING)
        self._vacate(running)
        request = running.request
        request.num_preemptions += 1
        self.waiting[request.id] = request
        self.waiting.move_to_end(request.id, last=False)
        return running

    def close(self, running: RunningRequest) -> None:
        """The request has ended. The caller takes it off `running`."""
        self._leave(running, RequestStatus.FINISHED)
        running.closed = True
        if running.num_in_flight:
            self.num_closing += 1
        else:
            self._vacate(running)

    def finish(self, request_id: str, reason: FinishReason) -> bool:
        """End a request from outside, waiting or running; False if it is neither."""
        if (running := self.running_by_id.get(request_id)) is not None:
            running.request.finish_reason = reason
            self.running.remove(running)
            self.close(running)
            return True
        if (request := self.waiting.pop(request_id, None)) is not None:
            request.status, request.finish_reason = RequestStatus.FINISHED, reason
            return True
        return False

    def land_late(self, running: RunningRequest) -> None:
        """A row of a request that has ended has landed; after the last one nothing writes to its slot and blocks."""
        running.num_in_flight -= 1
        if not running.num_in_flight:
            self.num_closing -= 1
            self._vacate(running)

    def check(self, rows: Iterable[RunningRequest]) -> None:
        """Raise AssertionError unless slots and queues are accounted for; `rows`: the request of each row in flight."""
        in_flight = Counter(rows)
        closing = {one for one in in_flight if one.closed}
        holders = {*self.running, *closing}
        slots = sorted([*self.free_slots, *(one.slot for one in holders)])
        num_slots = self.options.sizes.max_num_seqs
        assert slots == list(range(num_slots)), f"free and taken slots are not all, each once: {slots}"
        assert len(closing) == self.num_closing, f"{len(closing)} ended requests hold slots, not {self.num_closing}"
        for running in holders:
            assert running.num_in_flight == in_flight[running], (
                f"slot {running.slot}: {in_flight[running]} rows are in flight"
            )
        prefilling = sum(running.num_planned < running.num_known for running in self.running)
        assert prefilling == self.num_prefilling, f"{prefilling} prompts are running, not {self.num_prefilling}"
        assert self.running_by_id == {running.request.id: running for running in self.running}, (
            "the running list and index differ"
        )
        arrivals = [*(running.request.arrival for running in self.running), *(r.arrival for r in self.waiting.values())]
        assert arrivals == sorted(arrivals), f"requests are out of order: {arrivals}"

    def _leave(self, running: RunningRequest, status: RequestStatus) -> None:
        running.request.status = status
        del self.running_by_id[running.request.id]
        if running.num_planned < running.num_known:
            self.num_prefilling -= 1

    def cache_salt(self, request: Request) -> str:
        """Requests of one salt share prefixes. What takes no drafts leaves a drafter's own cache unfilled."""
        apart = self.options.draft_cache and not self._max_drafts(request)
        return f"{request.cache_salt}\0without drafts" if apart else request.cache_salt

    def _max_drafts(self, request: Request) -> int:
        limit = self.options.sizes.num_drafts if self.drafting else 0
        return limit if request.max_drafts is None else min(limit, request.max_drafts)

    def _vacate(self, running: RunningRequest) -> None:
        self.cache.free(running.table)
        self.free_slots.append(running.slot)
        self.released.append(running.slot)
