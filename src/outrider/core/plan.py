"""What the scheduler tells a runner, and what it hears back. Standard library only, so it crosses processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from outrider.core.sampling import SamplingParams


class Row(NamedTuple):
    """One request's share of a step."""

    slot: int  # index into every per-request device table
    num_tokens: int  # query tokens to run, drafts included
    num_drafts: int  # of those, how many are drafts to verify
    ends_prompt: bool  # False: a chunk that stops inside the prompt, so no token comes out


class Admission(NamedTuple):
    """A request takes a slot."""

    slot: int
    tokens: tuple[int, ...]  # the prompt, and any output kept across a preemption
    num_prompt: int  # leading tokens that are the prompt
    num_cached: int  # leading tokens whose keys and values the prefix cache already holds
    sampling: SamplingParams
    seed: int  # the request's own, resolved
    stop_ids: tuple[int, ...]  # every token that would end it, the model's end-of-text included
    drafts: bool = True  # whether it may verify any, ever


class Growth(NamedTuple):
    """Blocks appended to a slot's table."""

    slot: int
    start: int  # how many blocks the slot's table held before
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything a runner must know to run one step; decode rows come before prefill rows.

    Applied in the order of the fields: releases, admissions, growth, then the rows are run.
    """

    step: int
    release: tuple[int, ...]
    admit: tuple[Admission, ...]
    grow: tuple[Growth, ...]
    rows: tuple[Row, ...]


class DrafterFaults(NamedTuple):
    """What has gone wrong in the drafter so far."""

    num_failures: int
    stopped: bool  # whether it is asked no more


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step produced, aligned with `StepPlan.rows`."""

    step: int
    tokens: tuple[tuple[int, ...], ...]  # accepted drafts, then one token of the target's own; () inside a prompt
    num_drafted: tuple[int, ...]  # drafts now waiting to be verified in the row's next step
    invalid: tuple[int, ...] = ()  # indexes of rows whose last token is none, since no token could be drawn
    # further columns that the verifier or a logits processor declares: of each row, the values of each of its tokens
    values: Mapping[str, tuple[tuple[tuple[float, ...], ...], ...]] = field(default_factory=dict)
    drafter: DrafterFaults | None = None  # None: nothing has gone wrong
