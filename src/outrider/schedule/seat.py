"""A running request's place, and the step being planned."""

from __future__ import annotations

from dataclasses import dataclass, field

from outrider.cache.manager import BlockTable
from outrider.core.plan import Admission, Growth, Row
from outrider.core.request import Request


@dataclass(slots=True, eq=False)
class Seat:
    """What a request holds while it runs. Dropped whole when it finishes or is preempted.

    A row that is under way and yields tokens yields from 1 to num_drafts + 1 of them, so the length the
    request will have is known within bounds; with nothing under way both equal len(request.tokens).
    """

    request: Request
    slot: int
    table: BlockTable
    num_known: int  # tokens there were when it was admitted: the prompt, and output kept across a preemption
    num_planned: int  # of those, computed already or by a plan under way
    num_computed: int  # tokens known to be computed
    least: int  # committed tokens once all that is under way has landed: at least ...
    most: int  # ... and at most
    end: int  # the length at which the request ends, prompt included
    room: int  # positions its blocks have room for
    max_drafts: int  # most drafts a row of it may verify
    num_drafts: int = 0  # drafts waiting, as of the last row that landed
    num_under_way: int = 0  # its rows in plans not yet applied
    closed: bool = False  # finished or aborted; lingers until nothing is under way


@dataclass(slots=True)
class Sketch:
    """A plan in the making: what `StepPlan` will hold, and how many tokens it may still take."""

    budget: int
    rows: list[Row] = field(default_factory=list)
    seats: list[Seat] = field(default_factory=list)  # aligned with rows
    admit: list[Admission] = field(default_factory=list)
    grow: list[Growth] = field(default_factory=list)
    stalled: bool = False  # blocks are short until something lands: nobody younger may be planned
    preempted: bool = False  # somebody was preempted: nobody may be admitted

    def add(self, seat: Seat, num_tokens: int, num_drafts: int, ends_prompt: bool) -> None:
        """Give a seat its row."""
        self.rows.append(Row(seat.slot, num_tokens, num_drafts, ends_prompt))
        self.seats.append(seat)
        self.budget -= num_tokens
        seat.num_under_way += 1
        if ends_prompt:
            seat.least += 1
            seat.most += 1 + num_drafts
