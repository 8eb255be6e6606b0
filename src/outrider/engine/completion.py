"""One completion in progress: tokens in, text and pieces out, and how it ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from outrider.core.output import AcceptanceTally, FinishReason, TokenDelta
from outrider.core.sampling import SamplingParams
from outrider.engine.detokenize import Detokenizer
from outrider.engine.outputs import CompletionOutput, Piece, RequestOutput
from outrider.errors import LogitsError


@dataclass(slots=True)
class Inbox:
    """What came for the owner of some completions, until it is taken."""

    keeps_pieces: bool
    pieces: deque[Piece] = field(default_factory=deque)
    ended: deque[Completion] = field(default_factory=deque)


@dataclass(slots=True, eq=False)
class Completion:
    """One completion of a prompt: what a request of the engine yields, as text and for its owner."""

    index: int  # over all prompts of the generation; that of `output` is within its prompt
    sampling: SamplingParams  # of this completion alone: n is 1
    parent: RequestOutput
    output: CompletionOutput
    inbox: Inbox
    eos_token_ids: Collection[int]  # stop tokens that are not reported as the reason
    id: str = ""  # of the engine's request
    detokenizer: Detokenizer | None = None
    acceptance: AcceptanceTally = field(default_factory=AcceptanceTally)
    num_cached: int = 0  # prompt tokens found in the prefix cache
    error: Exception | None = None  # what went wrong with this completion alone; its owner raises it

    @property
    def ended(self) -> bool:
        """Whether nothing more comes."""
        return self.output.finish_reason is not None

    def take(self, delta: TokenDelta, acceptance: AcceptanceTally, num_cached: int) -> bool:
        """Adds a step's tokens. True if a stop string ended it, which the engine cannot know.

        `acceptance`, `num_cached`: the request's, up to and with this step.
        """
        self.acceptance, self.num_cached = acceptance, num_cached
        output, detokenizer = self.output, self.detokenizer
        taken: list[tuple[int, str]] = []
        reason = delta.finish_reason
        stopped = False
        for count, token in enumerate(delta.tokens, start=1):
            output.token_ids.append(token)
            text = ""
            if detokenizer is not None:
                ends = delta.stop_token is not None and count == len(delta.tokens)
                if not ends or self.sampling.include_stop_str_in_output or detokenizer.names(token):
                    stopped = detokenizer.append(token, len(output.token_ids) > self.sampling.min_tokens)
                text = detokenizer.stream(finished=stopped)
            taken.append((token, text))
            if stopped:
                assert detokenizer is not None
                reason, output.stop_reason = FinishReason.STOP, detokenizer.stop_reason
                break
        if detokenizer is not None and reason is not None:
            detokenizer.finish()
            if taken:
                taken[-1] = (taken[-1][0], taken[-1][1] + detokenizer.stream(finished=True))
        # a stop string found before a stop token is the reason
        if output.stop_reason is None and delta.stop_token not in (None, *self.eos_token_ids):
            output.stop_reason = delta.stop_token
        if self.inbox.keeps_pieces:
            self._put_pieces(taken, delta.num_accepted, reason)
        if reason is FinishReason.ERROR:
            self.error = no_token(len(output.token_ids))
            output.error = str(self.error)
        if reason is not None:
            self._end(reason)
        return stopped

    def abort(self, error: Exception | None = None) -> None:
        """Ends it with what it has, unless it has ended; `error` is what went wrong, if anything did."""
        if self.ended:
            return
        self.error = error
        self._end(FinishReason.ABORT)

    def write_text(self) -> None:
        """Brings the output's text up to date, which takes as long as it is: so not every step does it."""
        if self.detokenizer is not None:
            self.output.text = self.detokenizer.text

    def _put_pieces(self, taken: list[tuple[int, str]], num_accepted: int, reason: FinishReason | None) -> None:
        last = len(taken) - 1
        finish = None if reason in (None, FinishReason.ERROR) else reason.value
        for number, (token, text) in enumerate(taken):
            position = number + 1 if number < num_accepted else 0
            self.inbox.pieces.append(Piece(self.index, token, text, position, finish if number == last else None))

    def _end(self, reason: FinishReason) -> None:
        self.write_text()
        self.output.finish_reason = reason.value
        self.parent.acceptance += self.acceptance.report()
        self.parent.num_cached_tokens = max(self.parent.num_cached_tokens, self.num_cached)
        self.inbox.ended.append(self)


def no_token(num_tokens: int) -> LogitsError:
    """The error of a completion that has so many tokens, and no further one."""
    return LogitsError(
        f"the model's logits for output token {num_tokens + 1} hold NaN, inf, or -inf for every token, so none can be "
        "drawn: if dtype is float16, take bfloat16 or float32; else look for damaged weights, or for a logits "
        "processor that failed (see the log) or masks every token"
    )
