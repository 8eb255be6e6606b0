"""Tokens to text as they come, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence

from outrider.core.sampling import SamplingParams
from outrider.load.tokenizer import Tokenizer


class Detokenizer:
    """One completion's text. Several tokens may arrive in one step; each is decoded on its own."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stop: Sequence[str],
        include_stop: bool,
        skip_special_tokens: bool,
    ) -> None:
        """`prompt` gives the first token its context: some tokenizers write it differently at a start."""
        self._decoder = tokenizer.text_decoder(prompt, skip_special_tokens)
        self._stop, self._include_stop = tuple(stop), include_stop
        self._longest_stop = max(map(len, self._stop), default=0)
        self.text = ""
        self.stop_reason: str | None = None
        """The stop string that ended the text, once one did."""
        self._num_streamed = 0

    @classmethod
    def of(cls, tokenizer: Tokenizer, prompt: Sequence[int], params: SamplingParams) -> Detokenizer:
        """For a completion of this prompt with these parameters."""
        assert isinstance(params.stop, tuple)
        return cls(tokenizer, prompt, params.stop, params.include_stop_str_in_output, params.skip_special_tokens)

    def append(self, token: int, may_stop: bool = True) -> bool:
        """Decodes one token; True if it completed a stop string, after which none may follow.

        Until `may_stop` (a request's `min_tokens`), stop strings are text like any other.
        """
        piece = self._decoder.step(token)
        self.text += piece
        return bool(piece) and may_stop and self._cut_at_stop(len(piece))

    def finish(self) -> None:
        """No token follows: a character that was cut short is written as the replacement character."""
        if self.stop_reason is None:
            self.text += self._decoder.finish()

    def stream(self, finished: bool) -> str:
        """Text not handed out before. What may yet become a stop string is held back until `finished`."""
        end = len(self.text) if finished else len(self.text) - self._num_held_back()
        fresh = self.text[self._num_streamed : end]
        self._num_streamed = max(self._num_streamed, end)
        return fresh

    def _cut_at_stop(self, num_new: int) -> bool:
        start = max(0, len(self.text) - num_new - self._longest_stop + 1)
        found = [(at, stop) for stop in self._stop if (at := self.text.find(stop, start)) >= 0]
        if not found:
            return False
        at, self.stop_reason = min(found)
        self.text = self.text[: at + len(self.stop_reason)] if self._include_stop else self.text[:at]
        return True

    def _num_held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest_stop - 1, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stop):
                return length
        return 0
