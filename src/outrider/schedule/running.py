"""What the scheduler keeps of a running request."""

from __future__ import annotations

from dataclasses import dataclass

from outrider.cache.manager import BlockTable
from outrider.core.request import Request


@dataclass(slots=True, eq=False)
class RunningRequest:
    """What a request holds while it runs. Dropped whole when it finishes or is preempted.

    A row in flight that yields tokens yields from 1 to num_drafts + 1 of them. So the length that the request will
    have is known within bounds; with nothing in flight both bounds equal len(request.tokens).
    """

    request: Request
    slot: int
    table: BlockTable
    num_known: int  # tokens there were when it was admitted: the prompt, and output kept across a preemption
    num_planned: int  # of those, computed already or by a plan in flight
    num_computed: int  # tokens known to be computed
    min_length: int  # committed tokens once all that is in flight has landed: at least ...
    max_length: int  # ... and at most
    end: int  # the length at which the request ends, prompt included
    room: int  # positions its blocks have room for
    max_drafts: int  # most drafts a row of it may verify
    num_drafts: int = 0  # drafts waiting, as of the last row that landed
    num_in_flight: int = 0  # its rows in plans not yet applied
    closed: bool = False  # finished or aborted; holds its slot until nothing is in flight
