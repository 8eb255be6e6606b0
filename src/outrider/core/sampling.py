"""How one request's tokens are chosen and when it ends. Field names follow vLLM where the meaning is the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from outrider.core.option import option
from outrider.errors import SamplingError

MAX_STOP_IDS = 16
"""Most `stop_token_ids` of a request; as many may be the model's own, and each has a column in a device table."""

GREEDY_BELOW = 1e-5
"""A temperature under this is 0: dividing logits by it leaves no second token a chance, and may overflow."""

MAX_TEMPERATURE = 1e6
"""Past this every token is as likely as any other."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """One request's sampling options; checked when made, so a bad value never reaches the engine.

    Raises SamplingError naming the field, its value and the range.
    """

    n: int = option(1, "completions of the prompt")
    temperature: float = option(1.0, "0 takes the most likely token")
    top_p: float = option(1.0, "keep the likeliest tokens that make up this probability; 1 is off")
    top_k: int = option(0, "keep this many of the likeliest tokens; 0 or -1 is off")
    min_p: float = option(0.0, "drop tokens less likely than this share of the likeliest; 0 is off")
    seed: int | None = option(None, "seed of this request; left out: from the engine's")
    max_tokens: int | None = option(16, "most tokens to generate; None: as many as fit")
    min_tokens: int = option(0, "nothing ends the text before this many tokens")
    stop: str | Sequence[str] | None = option(None, "strings that end the text")
    stop_token_ids: Sequence[int] | None = option(None, "token ids that end the text")
    ignore_eos: bool = option(False, "generate past the model's end-of-text token")
    include_stop_str_in_output: bool = option(False, "keep the stop string in the text")
    skip_special_tokens: bool = option(True, "leave special tokens out of the text")
    detokenize: bool = option(True, "turn tokens into text")

    def __post_init__(self) -> None:
        stop = self.stop
        object.__setattr__(self, "stop", () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "top_k", 0 if self.top_k == -1 else self.top_k)
        self._check()
        if self.temperature < GREEDY_BELOW:
            object.__setattr__(self, "temperature", 0.0)

    def _check(self) -> None:
        self._whole("n", 1)
        self._within("temperature", 0.0, MAX_TEMPERATURE)
        self._within("top_p", 0.0, 1.0, open_below=True)
        self._whole("top_k", 0)
        self._within("min_p", 0.0, 1.0)
        if self.seed is not None:
            self._whole("seed", 0)
        if self.max_tokens is not None:
            self._whole("max_tokens", 1)
        self._whole("min_tokens", 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingError(
                f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}: no output can satisfy both"
            )
        assert isinstance(self.stop, tuple) and isinstance(self.stop_token_ids, tuple)
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise SamplingError(f"stop must hold non-empty strings: {self.stop!r}")
        if self.stop and not self.detokenize:
            raise SamplingError("stop strings need detokenize=True: give stop_token_ids instead, or detokenize")
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in self.stop_token_ids):
            raise SamplingError(f"stop_token_ids must be token ids of 0 or more: {self.stop_token_ids!r}")
        if len(set(self.stop_token_ids)) > MAX_STOP_IDS:
            raise SamplingError(f"stop_token_ids holds {len(self.stop_token_ids)} ids; give at most {MAX_STOP_IDS}")

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least or value >= 2**63:
            raise SamplingError(f"{name} must be a whole number of {least} or more: {value!r}")

    def _within(self, name: str, low: float, high: float, *, open_below: bool = False) -> None:
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not low <= value <= high or (open_below and value == low):
            raise SamplingError(f"{name} must be a number in {'(' if open_below else '['}{low:g}, {high:g}]: {value!r}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken at every position."""
        return self.temperature == 0.0
