"""Scalings of rotary embedding, for contexts longer than those of a model's first training.

They are those of transformers' `modeling_rope_utils.py`, in the same order of operations: at position 100,000 the last
bit of a frequency is a hundredth of a radian.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from outrider.core.reading import Reader
from outrider.errors import CheckpointError


def frequencies(theta: float, head_dim: int) -> Tensor:
    """[D/2] float32, radians a position: 1 for the first pair of a head, near 1 / theta for the last."""
    return theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def periods(theta: float, head_dim: int) -> Tensor:
    """[D/2] float32, positions a radian; their inverse is `frequencies`, but for the last bit."""
    return theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


@dataclass(frozen=True, slots=True)
class Scaling(ABC):
    """How frequencies are changed for contexts longer than those of the first training."""

    READS: ClassVar[tuple[str, ...]] = ()
    """The keys that it takes from a config."""

    @classmethod
    @abstractmethod
    def read(cls, given: Reader, length: int) -> Self:
        """From the rope parameters of a config whose `max_position_embeddings` is `length`."""

    @abstractmethod
    def frequencies(self, theta: float, head_dim: int, max_len: int) -> Tensor:
        """[D/2] float32, for sequences of up to `max_len` tokens."""

    def refusal(self, theta: float, head_dim: int) -> str | None:
        """Why the values make no frequencies for heads of this size; None: they do."""
        return None

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by; queries times keys grow by its square."""
        return 1.0

    def trained(self, length: int) -> int:
        """Positions that the model was made for; `length` is the config's `max_position_embeddings`."""
        return length

    def longest(self, length: int) -> int:
        """Positions that may be asked for."""
        return self.trained(length)

    def note(self, max_len: int) -> str | None:
        """What differs from transformers for sequences of up to `max_len` tokens."""
        return None


def _factor(given: Reader) -> float:
    return given.number("factor", low=0.0, open_below=True)


def _original(given: Reader, default: float, *, low: float = 0.0) -> float:
    return given.number("original_max_position_embeddings", default, low=low, open_below=True)


@dataclass(frozen=True, slots=True)
class Llama3Scaling(Scaling):
    """Llama 3.1's rule: low frequencies are divided by `factor`, high ones kept, those between blended."""

    READS: ClassVar[tuple[str, ...]] = (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    )

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: float

    @classmethod
    def read(cls, given: Reader, length: int) -> Self:
        low = given.number("low_freq_factor", low=0.0, open_below=True)
        high = given.number("high_freq_factor", low=low, open_below=True)
        return cls(_factor(given), low, high, _original(given, length))

    def frequencies(self, theta: float, head_dim: int, max_len: int) -> Tensor:
        return self.scale(frequencies(theta, head_dim))

    def scale(self, frequency: Tensor) -> Tensor:
        """The frequencies that are used, from those before scaling."""
        wavelength = 2 * math.pi / frequency
        rotations = self.original_max_position_embeddings / wavelength
        kept = (rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0.0, 1.0)
        return (1 - kept) * frequency / self.factor + kept * frequency


@dataclass(frozen=True, slots=True)
class LinearScaling(Scaling):
    """Positions divided by `factor` (Chen et al., 2023)."""

    READS: ClassVar[tuple[str, ...]] = ("factor",)

    factor: float

    @classmethod
    def read(cls, given: Reader, length: int) -> Self:
        return cls(_factor(given))

    def frequencies(self, theta: float, head_dim: int, max_len: int) -> Tensor:
        return frequencies(theta, head_dim) / self.factor

    def longest(self, length: int) -> int:
        return max(length, int(length * self.factor))


@dataclass(frozen=True, slots=True)
class DynamicScaling(Scaling):
    """A theta that grows with the length of the sequence, past the positions of the training (dynamic NTK).

    transformers computes the table again for each sequence. Here one table serves all: that of the longest sequence.
    """

    READS: ClassVar[tuple[str, ...]] = ("factor",)

    factor: float
    max_position_embeddings: int

    @classmethod
    def read(cls, given: Reader, length: int) -> Self:
        return cls(given.number("factor", low=1.0), length)

    def refusal(self, theta: float, head_dim: int) -> str | None:
        return f"dynamic needs a head_dim above 2: {head_dim}" if head_dim <= 2 else None

    def frequencies(self, theta: float, head_dim: int, max_len: int) -> Tensor:
        length = max(max_len, self.max_position_embeddings)
        stretch = (self.factor * length / self.max_position_embeddings) - (self.factor - 1)
        return 1.0 / periods(theta * stretch ** (head_dim / (head_dim - 2)), head_dim)

    def longest(self, length: int) -> int:
        return int(length * self.factor)

    def note(self, max_len: int) -> str | None:
        if max_len <= self.max_position_embeddings:
            return None
        return (
            f"dynamic rope scaling is that of a sequence of {max_len} tokens for all; for shorter ones to be as "
            f"transformers has them, set max_model_len to {self.max_position_embeddings}"
        )


@dataclass(frozen=True, slots=True)
class YarnScaling(Scaling):
    """YaRN (Peng et al., 2023): slow frequencies are interpolated, fast ones kept, and attention is sharpened."""

    READS: ClassVar[tuple[str, ...]] = (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    )

    factor: float
    original_max_position_embeddings: float
    sharpening: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @classmethod
    def read(cls, given: Reader, length: int) -> Self:
        original = _original(given, length)
        if "factor" not in given.values:
            raise CheckpointError(f"{given.file} lacks {given.prefix}factor: add it")
        factor = _factor(given) if given.has("factor") else length / original
        mscale, mscale_all_dim = (given.number(key, 0.0, low=0.0) for key in ("mscale", "mscale_all_dim"))
        if given.has("attention_factor"):
            sharpening = given.number("attention_factor", low=0.0, open_below=True)
        elif mscale and mscale_all_dim:
            sharpening = cls._sharpen(factor, mscale) / cls._sharpen(factor, mscale_all_dim)
        else:
            sharpening = cls._sharpen(factor)
        fast, slow = (given.number(key, 0.0, low=0.0) for key in ("beta_fast", "beta_slow"))
        # null is false to transformers, and a key that is not there true
        truncate = given.flag("truncate", "truncate" not in given.values)
        return cls(factor, original, sharpening, fast or 32.0, slow or 1.0, truncate)

    @staticmethod
    def _sharpen(factor: float, mscale: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    def refusal(self, theta: float, head_dim: int) -> str | None:
        return f"yarn needs a rope_theta above 1: {theta:g}" if theta <= 1.0 else None

    @property
    def attention_factor(self) -> float:
        return self.sharpening

    def trained(self, length: int) -> int:
        return max(length, int(self.original_max_position_embeddings * self.factor))

    def frequencies(self, theta: float, head_dim: int, max_len: int) -> Tensor:
        period = periods(theta, head_dim)
        kept, interpolated = 1.0 / period, 1.0 / (self.factor * period)
        low, high = (self._pair(turns, theta, head_dim) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001
        ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        share = 1 - ramp
        return interpolated * (1 - share) + kept * share

    def _pair(self, turns: float, theta: float, head_dim: int) -> float:
        """Which pair of a head turns so often over the positions of the training."""
        length = self.original_max_position_embeddings
        return (head_dim * math.log(length / (turns * 2 * math.pi))) / (2 * math.log(theta))


@dataclass(frozen=True, slots=True)
class LongRopeScaling(Scaling):
    """LongRoPE (Ding et al., 2024): a divisor of its own for each frequency, one list short of the original length.

    transformers chooses the list for each sequence. Here one table serves all: that of the longest sequence.
    """

    READS: ClassVar[tuple[str, ...]] = (
        "short_factor",
        "long_factor",
        "factor",
        "attention_factor",
        "original_max_position_embeddings",
    )

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: float
    sharpening: float

    @classmethod
    def read(cls, given: Reader, length: int) -> Self:
        original = _original(given, length, low=1.0)
        factor = _factor(given) if given.has("factor") else length / original
        if given.has("attention_factor"):
            sharpening = given.number("attention_factor", low=0.0, open_below=True)
        else:
            sharpening = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
        short, long = (given.numbers(key, low=0.0) for key in ("short_factor", "long_factor"))
        return cls(short, long, original, sharpening)

    def refusal(self, theta: float, head_dim: int) -> str | None:
        for key, held in (("short_factor", self.short_factor), ("long_factor", self.long_factor)):
            if len(held) != head_dim // 2:
                return f"{key} must hold {head_dim // 2} numbers, half of head_dim: {len(held)}"
        return None

    @property
    def attention_factor(self) -> float:
        return self.sharpening

    def frequencies(self, theta: float, head_dim: int, max_len: int) -> Tensor:
        divisors = self.long_factor if max_len > self.original_max_position_embeddings else self.short_factor
        return 1.0 / (torch.tensor(divisors, dtype=torch.float32) * periods(theta, head_dim))

    def note(self, max_len: int) -> str | None:
        original = int(self.original_max_position_embeddings)
        if max_len <= original:
            return None
        return (
            f"longrope takes long_factor for all sequences; for short_factor, as transformers has sequences of up to "
            f"{original} tokens, set max_model_len to {original}"
        )


SCALINGS: dict[str, type[Scaling] | None] = {
    "default": None,
    "linear": LinearScaling,
    "dynamic": DynamicScaling,
    "yarn": YarnScaling,
    "longrope": LongRopeScaling,
    "llama3": Llama3Scaling,
}
