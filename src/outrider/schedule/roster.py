"""Who waits, who runs, and who holds which slot."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from outrider.cache.manager import BlockTable, CacheManager
from outrider.core.output import FinishReason
from outrider.core.request import Request, RequestStatus
from outrider.schedule.options import SchedulerOptions
from outrider.schedule.seat import Seat


class Roster:
    """Every unfinished request, waiting or seated, and every slot, free or taken.

    Both queues are in order of arrival, and all who run arrived before all who wait: nobody is
    seated before an older request, and it is the youngest that loses its seat. A seat whose request
    has ended while its rows are under way lingers: slot and blocks come free when the last has landed.
    """

    def __init__(self, options: SchedulerOptions, cache: CacheManager) -> None:
        self.options = options
        self.cache = cache
        self.waiting: OrderedDict[str, Request] = OrderedDict()
        self.running: list[Seat] = []
        self.seats: dict[str, Seat] = {}  # those of `running`, by request id
        self.free_slots = list(range(options.max_num_seqs - 1, -1, -1))
        self.released: list[int] = []  # slots freed since the last plan
        self.num_lingering = 0
        self.num_prefilling = 0  # running, with known tokens not yet planned
        self._num_arrivals = 0

    def enqueue(self, request: Request) -> None:
        """A new request joins the end of the queue."""
        request.arrival = self._num_arrivals
        request.status = RequestStatus.WAITING
        self._num_arrivals += 1
        self.waiting[request.id] = request

    def oldest_waiting(self) -> Request:
        """The request that is next to be seated."""
        return next(iter(self.waiting.values()))

    def seat(self, table: BlockTable) -> Seat:
        """The oldest waiting request takes a free slot and the table."""
        _, request = self.waiting.popitem(last=False)
        if not request.num_preemptions:
            request.num_cached = table.num_cached
        request.status = RequestStatus.RUNNING
        seat = Seat(
            request=request,
            slot=self.free_slots.pop(),
            table=table,
            num_known=len(request.tokens),
            num_planned=table.num_cached,
            num_computed=table.num_cached,
            least=len(request.tokens),
            most=len(request.tokens),
            end=request.most_tokens(self.options.max_model_len),
            room=len(table.blocks) * self.options.block_size,
            max_drafts=self._max_drafts(request),
        )
        self.running.append(seat)
        self.seats[request.id] = seat
        self.num_prefilling += 1
        return seat

    def preempt_youngest(self) -> Seat:
        """The youngest goes back to the head of the queue with the tokens it has; its drafts are forgotten."""
        seat = self.running.pop()
        assert not seat.num_under_way, f"slot {seat.slot} is preempted with {seat.num_under_way} rows under way"
        self._leave(seat, RequestStatus.WAITING)
        self._vacate(seat)
        request = seat.request
        request.num_preemptions += 1
        self.waiting[request.id] = request
        self.waiting.move_to_end(request.id, last=False)
        return seat

    def close(self, seat: Seat) -> None:
        """The request has ended. It is the caller who takes its seat off `running`."""
        self._leave(seat, RequestStatus.FINISHED)
        seat.closed = True
        if seat.num_under_way:
            self.num_lingering += 1
        else:
            self._vacate(seat)

    def finish(self, request_id: str, reason: FinishReason) -> bool:
        """End a request from outside, waiting or running; False if it is neither."""
        if (seat := self.seats.get(request_id)) is not None:
            seat.request.finish_reason = reason
            self.running.remove(seat)
            self.close(seat)
            return True
        if (request := self.waiting.pop(request_id, None)) is not None:
            request.status, request.finish_reason = RequestStatus.FINISHED, reason
            return True
        return False

    def land_late(self, seat: Seat) -> None:
        """A row of a lingering seat has landed; after the last one nothing writes to its slot and blocks."""
        seat.num_under_way -= 1
        if not seat.num_under_way:
            self.num_lingering -= 1
            self._vacate(seat)

    def check(self, rows: Iterable[Seat]) -> None:
        """Raise AssertionError unless slots and queues are accounted for; `rows`: whose the rows under way are."""
        under_way = Counter(rows)
        lingering = {seat for seat in under_way if seat.closed}
        seats = {*self.running, *lingering}
        slots = sorted([*self.free_slots, *(seat.slot for seat in seats)])
        assert slots == list(range(self.options.max_num_seqs)), f"free and taken slots are not all, each once: {slots}"
        assert len(lingering) == self.num_lingering, f"{len(lingering)} seats linger, not {self.num_lingering}"
        for seat in seats:
            assert seat.num_under_way == under_way[seat], f"slot {seat.slot}: {under_way[seat]} rows are under way"
        prefilling = sum(seat.num_planned < seat.num_known for seat in self.running)
        assert prefilling == self.num_prefilling, f"{prefilling} prompts are running, not {self.num_prefilling}"
        assert self.seats == {seat.request.id: seat for seat in self.running}, "the running list and index differ"
        arrivals = [*(seat.request.arrival for seat in self.running), *(r.arrival for r in self.waiting.values())]
        assert arrivals == sorted(arrivals), f"requests are out of order: {arrivals}"

    def _leave(self, seat: Seat, status: RequestStatus) -> None:
        seat.request.status = status
        del self.seats[seat.request.id]
        if seat.num_planned < seat.num_known:
            self.num_prefilling -= 1

    def cache_salt(self, request: Request) -> str:
        """Requests of one salt share prefixes. What takes no drafts leaves a drafter's own cache unfilled."""
        apart = self.options.draft_cache and not self._max_drafts(request)
        return f"{request.cache_salt}\0without drafts" if apart else request.cache_salt

    def _max_drafts(self, request: Request) -> int:
        most = self.options.num_drafts
        return most if request.max_drafts is None else min(most, request.max_drafts)

    def _vacate(self, seat: Seat) -> None:
        self.cache.free(seat.table)
        self.free_slots.append(seat.slot)
        self.released.append(seat.slot)
