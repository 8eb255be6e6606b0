"""What callers of the Python API get back. Names follow vLLM where the meaning is the same."""

from __future__ import annotations

from dataclasses import dataclass, field

from outrider.core.output import AcceptanceReport
from outrider.errors import LogitsError


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: None = None  # not offered yet
    logprobs: None = None  # not offered yet
    finish_reason: str | None = None  # "stop", "length", "abort" or "error"; None while it runs
    stop_reason: int | str | None = None  # the token id or string that stopped it, if it is not the model's own end
    error: str | None = None  # why it ended with "error", after the tokens that it has


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its completions."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    verifier: str  # by which drafts were accepted: "synthetic" makes up its acceptance, and the text with it
    acceptance: AcceptanceReport = field(default_factory=AcceptanceReport)  # over all completions
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        return all(output.finish_reason is not None for output in self.outputs)

    def raise_for_error(self) -> None:
        """Raises LogitsError if a completion ended with an error."""
        for output in self.outputs:
            if output.error is not None:
                raise LogitsError(output.error)


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token added to a completion that is being streamed."""

    index: int  # of the completion
    token_id: int
    text: str  # may be empty: a character not complete yet, or text held back for a stop string
    draft_position: int  # 1 for an accepted first draft of a round, 2 for a second, ...; 0: the target's own token
    finish_reason: str | None = None  # on a completion's last piece; one that was aborted or failed has no last piece
