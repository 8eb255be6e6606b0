"""What the engine's process and its client send each other: plain records, encoded by msgspec.

The engine sends `Building` until it is `Ready`. A client sends `Add`, `End`, `AskWatchdog` and `Quit`. The engine
answers an `Add` with `Taken` or `Refused`, and sends `Progress` after each step that gained anything, and now and then
while it is idle, as a sign of life. Only the engine's own records for Python callers, `Ready.choice` and
`Watchdog.state`, are pickled.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from outrider.core.output import AcceptanceReport, AcceptanceTally, FinishReason, TokenDelta
from outrider.core.sampling import SamplingParams


class Prompt(msgspec.Struct, array_like=True, frozen=True):
    """One sequence to generate."""

    id: str
    tokens: list[int]
    sampling: dict[str, Any]  # fields of SamplingParams
    max_drafts: int | None

    def params(self) -> SamplingParams:
        """The sampling parameters, checked as any."""
        return SamplingParams(**self.sampling)


class Add(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Run these, or none of them: `Taken` or `Refused` answers."""

    number: int  # the client's, for the answer
    prompts: list[Prompt]


class End(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """End these wherever they are; those that have ended are passed over, and nothing answers."""

    ids: list[str]
    reason: FinishReason


class AskWatchdog(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """What does the watchdog know? `Watchdog` answers."""

    number: int


class Quit(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Stop the process: whatever runs is dropped."""


class Facts(msgspec.Struct, frozen=True):
    """What is served, in facts that any client may see: no path of this machine."""

    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    eos_token_ids: list[int]
    num_blocks: int
    block_size: int
    method: str
    num_speculative_tokens: int
    verifier: str
    faithful: bool  # whether the text is the target's own
    dtype: str
    device: str
    runner: str
    forced: bool
    passed_over: list[dict[str, str]]  # runner, part, feature, reason
    sampling_defaults: dict[str, Any] = {}  # of requests that do not say otherwise


class Failed(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """The engine could not be made, or failed in a step; its process ends."""

    error: str  # name of the class in `outrider.errors`
    message: str


class Taken(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Every prompt of an `Add` is queued."""

    number: int


class Refused(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """A prompt of an `Add` is wrong, and none of it runs."""

    number: int
    error: str
    message: str
    field: str | None


class Watchdog(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """What the watchdog knows."""

    number: int
    state: bytes  # a WatchState, pickled


class Delta(msgspec.Struct, array_like=True, frozen=True):
    """What one request gained in a step, and how its drafts fared so far."""

    id: str
    tokens: tuple[int, ...]
    num_accepted: int
    finish_reason: FinishReason | None
    stop_token: int | None
    num_cached: int
    drafted: int
    rounds: tuple[int, ...]
    drafting_ended: str | None = None  # as in `AcceptanceReport`

    def tokens_gained(self) -> TokenDelta:
        """As the engine gave it."""
        return TokenDelta(self.id, self.tokens, self.num_accepted, self.finish_reason, self.stop_token)

    def tally(self) -> AcceptanceTally:
        """The request's acceptance up to here."""
        return AcceptanceTally.of(self.drafted, self.rounds, self.drafting_ended)


class WatchedRates(msgspec.Struct, array_like=True, frozen=True):
    """Acceptance at one temperature that is on record."""

    temperature: float
    expected: tuple[float, ...]
    measured: tuple[float, ...]
    departed: bool


class Snapshot(msgspec.Struct, array_like=True, frozen=True):
    """The engine at one moment; counts are since it was ready."""

    num_running: int
    num_waiting: int
    cache_usage: float
    prefix_queries: int
    prefix_hits: int
    num_preemptions: int
    num_steps: int
    acceptance: AcceptanceReport
    watched: tuple[WatchedRates, ...]  # empty: nothing is on record for what is served
    drafter_failures: int = 0
    drafting_stopped: bool = False  # after too many of them


class Building(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Progress of building the engine."""

    what: Literal["weights", "programs"]  # bytes of weights loaded, or programs recorded
    done: int
    total: int


class Ready(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """The model is loaded and its kernels are compiled."""

    facts: Facts
    snapshot: Snapshot
    choice: bytes  # the oracle's, pickled


class Progress(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """What a step brought. A snapshot comes with some, and always with the one after which nothing is left to do."""

    deltas: list[Delta]
    snapshot: Snapshot | None


ToEngine = Add | AskWatchdog | End | Quit
FromEngine = Building | Ready | Failed | Taken | Refused | Watchdog | Progress
