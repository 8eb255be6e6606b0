"""One request's host record: what was asked, what came out so far, how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from outrider.core.output import AcceptanceTally, FinishReason, RoundCounter
from outrider.core.sampling import SamplingParams
from outrider.errors import PromptError


def check_prompt_length(num_tokens: int, limit: int, is_lower_bound: bool = False) -> None:
    """Raises PromptError for a prompt that is empty, or leaves no room for output within `limit`, max_model_len.

    `is_lower_bound`: the prompt may have more tokens than the number says.
    """
    if not num_tokens and not is_lower_bound:
        raise PromptError("the prompt is empty: give at least one token")
    if num_tokens >= limit:
        count = f"at least {num_tokens}" if is_lower_bound else str(num_tokens)
        raise PromptError(
            f"the prompt has {count} tokens, which leaves no room for output within max_model_len {limit}: "
            f"shorten it to at most {limit - 1}"
        )


class RequestStatus(Enum):
    """Where a request stands with the scheduler."""

    NEW = "new"  # not yet added
    WAITING = "waiting"  # holds no slot; also after a preemption
    RUNNING = "running"  # holds a slot
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """One sequence to generate.

    The engine makes it, with the seed and the stop ids resolved; after `Scheduler.add` only the
    scheduler changes it. What a request holds while it runs (slot, blocks, drafts) is the scheduler's.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    seed: int = 0  # its own, resolved
    stop_ids: tuple[int, ...] = ()  # every token that ends it, the model's end-of-text included unless ignored
    max_drafts: int | None = None  # most drafts verified a step, fewer than the engine drafts; None: all of them
    cache_salt: str = ""  # cached prefixes are shared only between requests of one salt

    arrival: int = -1  # order of arrival, from the scheduler
    status: RequestStatus = RequestStatus.NEW
    finish_reason: FinishReason | None = None
    stop_token: int | None = None  # the token that ended it
    num_cached: int = 0  # prompt tokens found in the prefix cache when first admitted
    num_preemptions: int = 0
    acceptance: AcceptanceTally = field(default_factory=AcceptanceTally)
    watch: RoundCounter | None = None  # counts every round too, if anyone watches
    tokens: list[int] = field(init=False)  # prompt and output, all committed
    stop_set: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.stop_set = frozenset(self.stop_ids)

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt)

    @property
    def num_output(self) -> int:
        """Tokens generated so far, a stop token included."""
        return len(self.tokens) - len(self.prompt)

    @property
    def output(self) -> list[int]:
        """Tokens generated so far, a stop token included (a copy)."""
        return self.tokens[len(self.prompt) :]

    def max_length(self, max_model_len: int) -> int:
        """The length, prompt included, at which the request ends whatever its tokens say."""
        if self.sampling.max_tokens is None:
            return max_model_len
        return min(len(self.prompt) + self.sampling.max_tokens, max_model_len)

    def extend(self, tokens: tuple[int, ...], end: int) -> tuple[int, ...]:
        """Commit new tokens up to the one that ends the request, if any does; what comes after it is dropped.

        `end` is `max_length()`. Returns the tokens kept; sets `finish_reason` and `stop_token`.
        """
        length = len(self.tokens)
        if length + len(tokens) < end and self.stop_set.isdisjoint(tokens):
            self.tokens.extend(tokens)
            return tokens
        first_stop = len(self.prompt) + self.sampling.min_tokens  # the length from which a stop token counts
        for count, token in enumerate(tokens, start=1):
            if token in self.stop_set and length + count >= first_stop:
                self.finish_reason, self.stop_token = FinishReason.STOP, token
            elif length + count >= end:
                self.finish_reason = FinishReason.LENGTH
            if self.finish_reason is not None:
                tokens = tokens[:count]
                break
        self.tokens.extend(tokens)
        return tokens
