"""Tokens to text as they come, and where a stop string ends it."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from functools import lru_cache

from outrider.core.sampling import SamplingParams
from outrider.engine.stops import StopSearch, stop_strings
from outrider.load.tokenizer import Tokenizer


class Detokenizer:
    """One completion's text. Several tokens may arrive in one step; each is decoded on its own.

    A token costs the same however long the text is.
    """

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
        self._search = StopSearch(stop_strings(tuple(stop))) if stop else None
        special = special_in(tuple(stop), tokenizer) if stop else {}
        self._hidden = special if skip_special_tokens else {}
        self._named = {token for token, text in special.items() if text in stop}
        self._gaps: list[tuple[int, int]] = []  # where hidden tokens stand in `_rest`: start and end
        self._include_stop = include_stop
        self.stop_reason: str | None = None
        """The stop string that ended the text, once one did."""
        self._head = ""  # of the text; what was handed out since follows, then the rest
        self._streamed: list[str] = []
        self._rest = ""
        # A stream's reader may ask for the text while another thread hands out what came.
        self._moving = threading.RLock()

    @classmethod
    def of(cls, tokenizer: Tokenizer, prompt: Sequence[int], params: SamplingParams) -> Detokenizer:
        """For a completion of this prompt with these parameters."""
        assert isinstance(params.stop, tuple)
        return cls(tokenizer, prompt, params.stop, params.include_stop_str_in_output, params.skip_special_tokens)

    @property
    def text(self) -> str:
        """All text so far."""
        with self._moving:
            self._head = "".join((self._head, *self._streamed))
            self._streamed.clear()
            return self._head + self._shown(self._rest)

    def names(self, token: int) -> bool:
        """Whether a special token is a stop string by itself."""
        return token in self._named

    def append(self, token: int, may_stop: bool = True) -> bool:
        """Decodes one token; True if it completed a stop string, after which none may follow.

        Until `may_stop` (a request's `min_tokens`), stop strings are text like any other.
        """
        piece = self._hidden.get(token) or self._decoder.step(token)
        if not piece:
            return False
        length = len(self._rest)
        self._rest += piece
        if token in self._hidden:
            self._gaps.append((length, length + len(piece)))
        found = self._search.feed(piece) if self._search is not None else None
        if found is None or not may_stop:
            return False
        start, self.stop_reason = found
        start += length
        if self._include_stop:  # with the tokens in it, since it is asked for as it is written
            self._gaps = [gap for gap in self._gaps if gap[0] < start]
            start += len(self.stop_reason)
        self._rest = self._rest[:start]
        return True

    def finish(self) -> None:
        """No token follows: a character that was cut short is written as the replacement character."""
        if self.stop_reason is None:
            self._rest += self._decoder.finish()

    def stream(self, finished: bool) -> str:
        """Text not handed out before. What may yet become a stop string is held back until `finished`."""
        num_held = 0 if finished or self._search is None else self._search.num_held
        end = len(self._rest) - num_held
        with self._moving:
            fresh, self._rest = self._shown(self._rest[:end]), self._rest[end:]
            if self._gaps:
                self._gaps = [(max(0, start - end), stop - end) for start, stop in self._gaps if stop > end]
            if fresh:
                self._streamed.append(fresh)
        return fresh

    def _shown(self, text: str) -> str:
        """A beginning of the rest without the hidden tokens in it."""
        for start, end in reversed(self._gaps):
            text = text[:start] + text[end:]
        return text


@lru_cache(maxsize=16)
def special_in(stop: tuple[str, ...], tokenizer: Tokenizer) -> dict[int, str]:
    """The special tokens that occur in stop strings, by id: they count there though texts leave them out."""
    written, special = "\0".join(stop), tokenizer.special_tokens
    heads = "|".join(sorted({re.escape(text[:4]) for text in special if text}))
    lengths = sorted({len(text) for text in special})
    # not one search a token: a request may bring 2**18 characters, and a tokenizer have a thousand such tokens
    starts = (match.start() for match in re.finditer(f"(?={heads})", written)) if heads else ()
    parts = (written[start : start + length] for start in starts for length in lengths)
    return {special[part]: part for part in parts if part in special}
