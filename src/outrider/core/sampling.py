"""How one request's tokens are chosen and when it ends. Field names follow vLLM where the meaning is the same."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any, Self

from outrider.core.option import option
from outrider.core.reading import written_short
from outrider.core.sampling_fields import (
    FIELDS,
    MIN_P,
    MIN_TOKENS,
    OF_VLLM,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    SamplingField,
    whole,
    whole_or_none,
)
from outrider.errors import SamplingError, nearest, shortened

MAX_STOP_IDS = 16
"""Most `stop_token_ids` of a request; as many may be the model's own, and each has a column in a device table."""

MAX_STOP_IDS_READ = 1024
"""A longer list of `stop_token_ids` is refused, though it may name few ids many times."""

MAX_STOPS = 4096
"""Most `stop` strings of a request."""

MAX_STOP_LENGTH = 1 << 18
"""Most characters of them all together."""

MAX_EXTRA_ARGS = 64
"""Most `extra_args` of a request."""

GREEDY_BELOW = 1e-5
"""A temperature under this is 0: dividing logits by it leaves no second token a chance, and may overflow."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """One request's sampling options; checked when made, so a bad value never reaches the engine.

    Raises SamplingError naming the field, its value and the range, or the nearest to an unknown field.
    Whole numbers may be numpy's. As in vLLM, a seed of -1 is none, other negative seeds are seeds, and a top_k of -1 is
    off. As with OpenAI and in llama.cpp, a top_p of 0 keeps one token, which vLLM refuses.
    """

    n: int = option(1, "completions of the prompt")
    temperature: float = TEMPERATURE.option()
    top_p: float = TOP_P.option()
    top_k: int = TOP_K.option()
    min_p: float = MIN_P.option()
    seed: int | None = option(None, "seed of this request")
    max_tokens: int | None = option(16, "most tokens to generate")
    min_tokens: int = MIN_TOKENS.option()
    stop: str | Sequence[str] | None = option(None, "strings that end the text")
    stop_token_ids: Sequence[int] | None = option(None, "token ids that end the text")
    ignore_eos: bool = option(False, "generate past the model's end-of-text token")
    include_stop_str_in_output: bool = option(False, "keep the stop string in the text")
    skip_special_tokens: bool = option(True, "leave special tokens out of the text")
    detokenize: bool = option(True, "turn tokens into text")
    extra_args: Mapping[str, Any] | None = field(
        default=None, hash=False, metadata={"help": "parameters of logits processors of your own, by name"}
    )

    def __new__(cls, *given: Any, **named: Any) -> Self:
        known = [entry.name for entry in fields(cls)]
        for name in named:
            if name in NOT_OFFERED:
                raise SamplingError(f"sampling parameter {name} is not offered yet: drop it", name)
            if name not in known:
                raise SamplingError(f"unknown sampling parameter: {shortened(name)} ({nearest(name, known)})", name)
        return object.__new__(cls)

    def __post_init__(self) -> None:
        stop = self.stop
        self._set("stop", (stop,) if isinstance(stop, str) else self._listed("stop", "strings"))
        self._set("stop_token_ids", self._listed("stop_token_ids", "token ids"))
        self._set("n", whole("n", self.n, 1))
        for one in FIELDS:
            self._set(one.name, one.checked(getattr(self, one.name)))
        if self.top_p == 0.0:  # no token makes up no probability: the likeliest stays, as a top_k of 1 keeps it
            self._set("top_k", 1)
            self._set("top_p", 1.0)
        if self.seed is not None:
            self._set("seed", _seed(self.seed))
        if self.max_tokens is not None:
            self._set("max_tokens", whole("max_tokens", self.max_tokens, 1))
        self._check_extra_args()
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
        if len(self.stop) > MAX_STOPS:
            raise SamplingError(f"stop holds {len(self.stop)} strings: give at most {MAX_STOPS}", "stop")
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise SamplingError(f"stop must hold non-empty strings: {written_short(self.stop)}", "stop")
        if self.stop and not self.detokenize:
            raise SamplingError("stop strings need detokenize=True: give stop_token_ids instead, or detokenize", "stop")
        length = sum(map(len, self.stop))
        if length > MAX_STOP_LENGTH:
            raise SamplingError(
                f"stop holds {length} characters in all: give at most {MAX_STOP_LENGTH}, in shorter or fewer strings",
                "stop",
            )
        self._check_stop_ids()

    def _check_stop_ids(self) -> None:
        assert isinstance(self.stop_token_ids, tuple)
        ids = [whole_or_none(token) for token in self.stop_token_ids[: MAX_STOP_IDS_READ + 1]]
        if any(token is None or token < 0 for token in ids):
            raise SamplingError(
                f"stop_token_ids must be token ids of 0 or more: {written_short(self.stop_token_ids)}", "stop_token_ids"
            )
        if len(ids) > MAX_STOP_IDS_READ or len(set(ids)) > MAX_STOP_IDS:
            count = len(self.stop_token_ids)
            raise SamplingError(f"stop_token_ids holds {count} ids; give at most {MAX_STOP_IDS}", "stop_token_ids")
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
        raise SamplingError(f"{name} must be a list of {what}: {written_short(value)}", name)

    def _check_extra_args(self) -> None:
        given = {} if self.extra_args is None else self.extra_args
        if isinstance(given, Mapping) and len(given) > MAX_EXTRA_ARGS:
            raise SamplingError(f"extra_args holds {len(given)} names: give at most {MAX_EXTRA_ARGS}", "extra_args")
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise SamplingError(f"extra_args must map names to values: {written_short(given)}", "extra_args")
        self._set("extra_args", dict(given))

    def check_extra_args(self, declared: Mapping[str, SamplingField]) -> None:
        """SamplingError unless a logits processor declares each of `extra_args`, and takes its value."""
        assert self.extra_args is not None
        for name, value in self.extra_args.items():
            if name not in declared:
                known = nearest(name, declared) if declared else "the option logits_processors names none of your own"
                said = f"extra_args: no logits processor reads {shortened(name)} ({known})"
                raise SamplingError(said, f"extra_args.{shortened(name)}")
            try:
                declared[name].checked(value)
            except SamplingError as error:
                raise SamplingError(f"extra_args: {error}", f"extra_args.{name}") from None

    def of_completion(self, index: int) -> SamplingParams:
        """Those of one of the `n` completions: a seed is for the first, and each further one has the next."""
        if self.seed is None or not index:
            return self
        other = copy(self)  # not `replace`, which would check all the rest again
        other._set("seed", (self.seed + index) % 2**63)
        return other

    def stopping_at(self, special: Mapping[str, int], vocab_size: int) -> SamplingParams:
        """These, where each stop string that is a special token is a stop id too, while there is room for it.

        `special`: ids of such tokens by the way they are written. Text does not show them, and the engine ends at ids.
        """
        assert isinstance(self.stop, tuple) and isinstance(self.stop_token_ids, tuple)
        named = (special[text] for text in self.stop if special.get(text, vocab_size) < vocab_size)
        ids = tuple(dict.fromkeys((*self.stop_token_ids, *named)))[:MAX_STOP_IDS]
        if len(ids) <= len(self.stop_token_ids):
            return self
        other = copy(self)
        other._set("stop_token_ids", ids)
        return other

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken at every position."""
        return self.temperature == 0.0


def _seed(given: Any) -> int | None:
    """A seed from 0 on: a negative one counts down from 2**63, and -1 is none."""
    number = whole_or_none(given)
    if number is None or number < -(2**63):
        raise SamplingError(f"seed must be a whole number of at least -2**63: {written_short(given)}", "seed")
    return None if number == -1 else whole("seed", number, number) % 2**63


NOT_OFFERED = {name: off for name, off in OF_VLLM.items() if name not in SamplingParams.__dataclass_fields__}
"""Fields of vLLM's that no part reads, with their values that ask for nothing: unknown, but no slip of the pen."""

# `__new__` takes anything, so that it can name what is unknown: this signature shows `help` and editors what is known
SamplingParams.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    list(inspect.signature(SamplingParams.__init__).parameters.values())[1:]
)
