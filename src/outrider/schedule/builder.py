"""A step's plan in the making."""

from __future__ import annotations

from dataclasses import dataclass, field

from outrider.core.plan import Admission, Growth, Row
from outrider.schedule.running import RunningRequest


@dataclass(slots=True)
class PlanBuilder:
    """A plan in the making: what `StepPlan` will hold, and how many tokens it may still take."""

    budget: int
    rows: list[Row] = field(default_factory=list)
    running: list[RunningRequest] = field(default_factory=list)  # aligned with rows
    admit: list[Admission] = field(default_factory=list)
    grow: list[Growth] = field(default_factory=list)
    stalled: bool = False  # blocks are short until something lands: nobody younger may be planned
    preempted: bool = False  # somebody was preempted: nobody may be admitted

    def add(self, running: RunningRequest, num_tokens: int, num_drafts: int, ends_prompt: bool) -> None:
        """Give a request its row."""
        self.rows.append(Row(running.slot, num_tokens, num_drafts, ends_prompt))
        self.running.append(running)
        self.budget -= num_tokens
        running.num_in_flight += 1
        if ends_prompt:
            running.min_length += 1
            running.max_length += 1 + num_drafts
