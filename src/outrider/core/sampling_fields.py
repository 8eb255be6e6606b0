"""The fields of requests that logits processors read: one declaration each, from which all that knows them is made.

`SamplingParams`, the server's fields, what is not offered, and the watchdog's idea of plain sampling come from here.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from numbers import Real
from typing import Any

from outrider.core.option import option
from outrider.core.reading import written_short
from outrider.errors import SamplingError

MAX_TEMPERATURE = 1e6
"""Past this every token is as likely as any other."""


class Effect(Enum):
    """What a field does to the distribution that tokens are drawn from."""

    NOTHING = "nothing"  # it matters elsewhere, such as where a text ends
    TAIL = "tail"  # it drops unlikely tokens, so greedy text stays as it is
    ALL = "all"


@dataclass(frozen=True, slots=True)
class SamplingField:
    """One number of a request's sampling parameters."""

    name: str
    type: type[int] | type[float]
    off: float  # the default, which asks for nothing
    help: str
    low: float = 0
    high: float = math.inf  # of an int: 2**63 - 1 at most
    above_low: bool = False  # whether `low` itself is out of bounds
    also_off: int | None = None  # another value that means `off`, as vLLM's -1 for a top_k
    effect: Effect = Effect.ALL

    def option(self) -> Any:
        """The field of an options record."""
        return option(self.off, self.help)

    def checked(self, value: Any) -> Any:
        """The value as its type; SamplingError names the field, the value and the range."""
        if self.type is int:
            number = whole(self.name, value, int(self.low), self.also_off)
            return self.off if number == self.also_off else number
        return within(self.name, value, self.low, self.high, above_low=self.above_low)

    def read(self, sampling: Any) -> Any:
        """The value in `SamplingParams`, or in their `extra_args` for a field of a user's own."""
        if hasattr(sampling, self.name):
            return getattr(sampling, self.name)
        return self.checked(sampling.extra_args.get(self.name, self.off))

    def asked(self, sampling: Any) -> bool:
        """Whether it asks for anything."""
        return bool(self.read(sampling) != self.off)


TEMPERATURE = SamplingField("temperature", float, 1.0, "0 takes the most likely token", high=MAX_TEMPERATURE)
TOP_P = SamplingField(
    "top_p",
    float,
    1.0,
    "keep the likeliest tokens that make up this probability; 1 is off, 0 keeps one",
    high=1.0,
    effect=Effect.TAIL,
)
TOP_K = SamplingField(
    "top_k",
    int,
    0,
    "keep this many of the likeliest tokens; 0 or -1 is off",
    also_off=-1,
    effect=Effect.TAIL,
)
MIN_P = SamplingField(
    "min_p",
    float,
    0.0,
    "drop tokens less likely than this share of the likeliest; 0 is off",
    high=1.0,
    effect=Effect.TAIL,
)
MIN_TOKENS = SamplingField(
    "min_tokens",
    int,
    0,
    "nothing but max_model_len ends the text before this many tokens",
    effect=Effect.NOTHING,
)
FIELDS: tuple[SamplingField, ...] = (TEMPERATURE, TOP_P, TOP_K, MIN_P, MIN_TOKENS)
"""Those that `SamplingParams` has for the processors of this package."""

NONE_OR_EMPTY: tuple[Any, ...] = (None, [], {}, "")
OF_VLLM: Mapping[str, tuple[Any, ...]] = {
    "allowed_token_ids": NONE_OR_EMPTY,
    "bad_words": NONE_OR_EMPTY,
    "frequency_penalty": (None, 0),
    "logit_bias": NONE_OR_EMPTY,
    "logits_processors": NONE_OR_EMPTY,
    "logprobs": (None, False),
    "presence_penalty": (None, 0),
    "prompt_logprobs": (None,),
    "repetition_penalty": (None, 1),
    "structured_outputs": (None,),
}
"""vLLM's sampling parameters that no part read when this was written, and their values that ask for nothing."""


def whole(name: str, value: Any, low: int, also: int | None = None) -> int:
    """A whole number of `low` or more, or `also`. SamplingError names the field."""
    number = whole_or_none(value)
    if number is None or (number != also and number < low):
        raise SamplingError(f"{name} must be a whole number of {low} or more: {written_short(value)}", name)
    if number >= 2**63:
        raise SamplingError(f"{name} is too large: {written_short(value)}; give less than 2**63, or leave it out", name)
    return number


def within(name: str, value: Any, low: float, high: float, *, above_low: bool = False) -> float:
    """A number from `low` to `high`. SamplingError names the field."""
    number = _number(value)
    if not low <= number <= high or (above_low and number == low):  # nan is in no range
        raise SamplingError(
            f"{name} must be a number in {'(' if above_low else '['}{low:g}, {high:g}]: {written_short(value)}", name
        )
    return number


def _number(value: Any) -> float:
    """A real number as a float; nan for what is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def whole_or_none(value: Any) -> int | None:
    """A whole number, numpy's too; None for what is none."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
