"""How one request's tokens are chosen and when it ends. Field names follow vLLM where the meaning is the same."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, Self

from outrider.core.option import option
from outrider.errors import SamplingError, nearest

MAX_STOP_IDS = 16
"""Most `stop_token_ids` of a request; as many may be the model's own, and each has a column in a device table."""

GREEDY_BELOW = 1e-5
"""A temperature under this is 0: dividing logits by it leaves no second token a chance, and may overflow."""

MAX_TEMPERATURE = 1e6
"""Past this every token is as likely as any other."""

NOT_OFFERED = frozenset(
    {
        "allowed_token_ids",
        "bad_words",
        "frequency_penalty",
        "logit_bias",
        "logits_processors",
        "logprobs",
        "presence_penalty",
        "prompt_logprobs",
        "repetition_penalty",
        "structured_outputs",
    }
)
"""Fields of vLLM's that the engine lacks: unknown like any other, but no slip of the pen."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """One request's sampling options; checked when made, so a bad value never reaches the engine.

    Raises SamplingError naming the field, its value and the range, or the nearest to an unknown field.
    Whole numbers may be numpy's. As in vLLM, a seed of -1 is none, and a top_k of -1 is off.
    """

    n: int = option(1, "completions of the prompt")
    temperature: float = option(1.0, "0 takes the most likely token")
    top_p: float = option(1.0, "keep the likeliest tokens that make up this probability; 1 is off")
    top_k: int = option(0, "keep this many of the likeliest tokens; 0 or -1 is off")
    min_p: float = option(0.0, "drop tokens less likely than this share of the likeliest; 0 is off")
    seed: int | None = option(None, "seed of this request")
    max_tokens: int | None = option(16, "most tokens to generate")
    min_tokens: int = option(0, "nothing but max_model_len ends the text before this many tokens")
    stop: str | Sequence[str] | None = option(None, "strings that end the text")
    stop_token_ids: Sequence[int] | None = option(None, "token ids that end the text")
    ignore_eos: bool = option(False, "generate past the model's end-of-text token")
    include_stop_str_in_output: bool = option(False, "keep the stop string in the text")
    skip_special_tokens: bool = option(True, "leave special tokens out of the text")
    detokenize: bool = option(True, "turn tokens into text")

    def __new__(cls, *given: Any, **named: Any) -> Self:
        known = [entry.name for entry in fields(cls)]
        for name in named:
            if name in NOT_OFFERED:
                raise SamplingError(f"sampling parameter {name} is not offered yet: drop it", name)
            if name not in known:
                raise SamplingError(f"unknown sampling parameter: {name} ({nearest(name, known)})", name)
        return object.__new__(cls)

    def __post_init__(self) -> None:
        stop = self.stop
        self._set("stop", (stop,) if isinstance(stop, str) else self._listed("stop", "strings"))
        self._set("stop_token_ids", self._listed("stop_token_ids", "token ids"))
        self._whole("n", 1)
        self._within("temperature", 0.0, MAX_TEMPERATURE)
        self._within("top_p", 0.0, 1.0, open_below=True)
        self._whole("top_k", 0, unset=-1)
        if self.top_k == -1:
            self._set("top_k", 0)
        self._within("min_p", 0.0, 1.0)
        if self.seed is not None:
            self._whole("seed", 0, unset=-1)
            if self.seed == -1:
                self._set("seed", None)
        if self.max_tokens is not None:
            self._whole("max_tokens", 1)
        self._whole("min_tokens", 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingError(
                f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}: no output can satisfy both",
                "min_tokens",
            )
        self._check_stops()
        if self.temperature < GREEDY_BELOW:
            self._set("temperature", 0.0)

    def _check_stops(self) -> None:
        assert isinstance(self.stop, tuple) and isinstance(self.stop_token_ids, tuple)
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise SamplingError(f"stop must hold non-empty strings: {self.stop!r}", "stop")
        if self.stop and not self.detokenize:
            raise SamplingError("stop strings need detokenize=True: give stop_token_ids instead, or detokenize", "stop")
        ids = [_whole_or_none(token) for token in self.stop_token_ids]
        if any(token is None or token < 0 for token in ids):
            raise SamplingError(
                f"stop_token_ids must be token ids of 0 or more: {self.stop_token_ids!r}", "stop_token_ids"
            )
        if len(set(ids)) > MAX_STOP_IDS:
            raise SamplingError(f"stop_token_ids holds {len(ids)} ids; give at most {MAX_STOP_IDS}", "stop_token_ids")
        self._set("stop_token_ids", tuple(ids))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _listed(self, name: str, what: str) -> tuple[Any, ...]:
        value = getattr(self, name)
        if value is None:
            return ()
        try:
            if not isinstance(value, (str, bytes)):
                return tuple(value)
        except TypeError:
            pass
        raise SamplingError(f"{name} must be a list of {what}: {value!r}", name)

    def _whole(self, name: str, least: int, unset: int | None = None) -> None:
        value = getattr(self, name)
        number = _whole_or_none(value)
        if number is None or (number != unset and not least <= number < 2**63):
            raise SamplingError(f"{name} must be a whole number of {least} or more: {value!r}", name)
        self._set(name, number)

    def _within(self, name: str, low: float, high: float, *, open_below: bool = False) -> None:
        value = getattr(self, name)
        number = _number(value)
        if not low <= number <= high or (open_below and number == low):  # nan is in no range
            raise SamplingError(
                f"{name} must be a number in {'(' if open_below else '['}{low:g}, {high:g}]: {value!r}", name
            )
        self._set(name, number)

    def of_completion(self, index: int) -> SamplingParams:
        """Those of one of the `n` completions: a seed is for the first, and each further one has the next."""
        return self if self.seed is None or not index else replace(self, seed=(self.seed + index) % 2**63)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken at every position."""
        return self.temperature == 0.0


def _number(value: Any) -> float:
    """A real number as a float; nan for what is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _whole_or_none(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


# `__new__` takes anything, so that it can name what is unknown: `help` and editors are told what is known
SamplingParams.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    list(inspect.signature(SamplingParams.__init__).parameters.values())[1:]
)
