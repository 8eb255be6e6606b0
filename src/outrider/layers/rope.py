"""Rotary position embedding (Su et al., 2021) as a table, from what a config says of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from outrider.core.reading import Fact, Reader
from outrider.errors import CheckpointError, nearest, shortened
from outrider.layers.rope_scaling import SCALINGS, Scaling, frequencies

DEFAULT_THETA = 10_000.0
"""The base of the frequencies where no place says it."""

_ROPE_KEYS = ("rope_scaling", "rope_parameters")
"""Where a config describes rotary embedding. The first that says anything is taken, as transformers takes it."""


@dataclass(frozen=True, slots=True)
class Rope:
    """What a config says of rotary embedding."""

    theta: float = DEFAULT_THETA
    scaling: Scaling | None = None
    fact: Fact | None = field(default=None, compare=False)
    """Which places said it, and which was taken."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Rope:
        """Reads both spellings: `rope_theta` + `rope_scaling`, and transformers 5's `rope_parameters`."""
        outer = Reader(config)
        said = {rope_key: outer.inner(rope_key) for rope_key in _ROPE_KEYS}
        rope_key = next((rope_key for rope_key in _ROPE_KEYS if said[rope_key].values), _ROPE_KEYS[0])
        given = said[rope_key]
        kind = _kind(given)
        theta = given.number("rope_theta", outer.number("rope_theta", DEFAULT_THETA, low=1.0), low=1.0)
        scaling = None
        if (made := SCALINGS[kind]) is not None:
            length = outer.whole("max_position_embeddings", 2048)
            # a length beside the rope parameters is taken before the one inside, as transformers does for Phi-3
            key = "original_max_position_embeddings"
            beside = {key: config[key]} if outer.has(key) and key in made.READS else {}
            scaling = made.read(Reader({**given.values, **beside}, prefix=given.prefix), length)
        notes = [*_unread(given, made), *_overruled(outer, said, rope_key, theta)]
        seen = {f"config.json's {one}": dict(said[one].values) for one in _ROPE_KEYS if said[one].values}
        if outer.has("rope_theta"):
            seen["config.json's rope_theta"] = config["rope_theta"]
        return cls(theta, scaling, Fact("rope", f"{kind}, theta {theta:g}", seen, "; ".join(notes) or None))

    def check(self, head_dim: int, longest: int) -> None:
        """CheckpointError where the scaling is not for heads of this size, or makes angles that are no numbers.

        `longest` are the positions that may be asked for.
        """
        if self.scaling is None:
            return
        refusal = self.scaling.refusal(self.theta, head_dim)
        if refusal is None:
            try:
                angles = self.scaling.frequencies(self.theta, head_dim, longest) * longest
                is_finite = bool(angles.isfinite().all()) and 0 < self.scaling.attention_factor < math.inf
            except OverflowError:
                is_finite = False
            if not is_finite:
                refusal = "makes no finite angles: one of its values is too large, or too near to 0"
        if refusal is not None:
            raise CheckpointError(f"config.json: rope scaling {refusal}; correct it there")

    def trained(self, length: int) -> int:
        """Positions that the model was made for; `length` is the config's `max_position_embeddings`."""
        return length if self.scaling is None else self.scaling.trained(length)

    def longest(self, length: int) -> int:
        """Positions that may be asked for."""
        return length if self.scaling is None else self.scaling.longest(length)

    def note(self, max_len: int) -> str | None:
        """What differs from transformers for sequences of up to `max_len` tokens."""
        return None if self.scaling is None else self.scaling.note(max_len)

    def table(self, max_len: int, head_dim: int, device: torch.device) -> Tensor:
        """[max_len, D] float32: the cosines of D/2 frequencies, then their sines."""
        scaling = self.scaling
        frequency = (
            frequencies(self.theta, head_dim) if scaling is None else scaling.frequencies(self.theta, head_dim, max_len)
        )
        factor = 1.0 if scaling is None else scaling.attention_factor
        angle = torch.outer(torch.arange(max_len, dtype=torch.float32), frequency)
        table = torch.cat((angle.cos(), angle.sin()), dim=-1)
        return (table if factor == 1.0 else table * factor).to(device)


def _kind(given: Reader) -> str:
    """The scaling's name. CheckpointError for one that is not known, and for parameters a kind of layer."""
    nested = [key for key, value in given.values.items() if isinstance(value, Mapping)]
    if nested:
        raise CheckpointError(
            f"config.json: {given.prefix}{nested[0]} gives a kind of layer its own rope, which is not supported: "
            "use a model whose layers share one"
        )
    if given.number("partial_rotary_factor", 1.0, low=0.0) != 1.0:
        raise CheckpointError(
            f"config.json: {given.prefix}partial_rotary_factor is not supported: "
            f"{given.values['partial_rotary_factor']}; use a model that rotates whole heads"
        )
    kind = given.text("rope_type", given.text("type", "default"))
    if kind not in SCALINGS:
        where = f"config.json: {given.prefix}rope_type"
        raise CheckpointError(f"{where} is not supported: {shortened(kind)} ({nearest(kind, SCALINGS)})")
    return kind


def _unread(given: Reader, made: type[Scaling] | None) -> list[str]:
    """Keys that nothing reads: with a misspelt one the default would be used in silence."""
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *(made.READS if made is not None else ())}
    unread = sorted(set(given.values) - known)
    return [f"{given.prefix}{', '.join(unread)} is read by no rope scaling of this kind"] if unread else []


def _overruled(outer: Reader, said: Mapping[str, Reader], rope_key: str, theta: float) -> list[str]:
    """What another place says otherwise."""
    notes = []
    given, other = said[rope_key], said[_ROPE_KEYS[1 - _ROPE_KEYS.index(rope_key)]]
    if given.has("type") and given.text("type") != given.text("rope_type", given.text("type")):
        notes.append(f"{given.prefix}rope_type is taken, and type is not")
    if other.values and dict(other.values) != dict(given.values):
        notes.append(f"{rope_key} is taken before {other.prefix.removesuffix('.')}, as transformers does")
    thetas = {one.number("rope_theta", low=1.0) for one in (given, other, outer) if one.has("rope_theta")}
    if thetas - {theta}:
        source = (
            f"{rope_key} says" if given.has("rope_theta") else "the config's top level says or, saying none, leaves"
        )
        notes.append(f"rope_theta is {theta:g}, as {source} it: write the right one into {rope_key}")
    return notes
