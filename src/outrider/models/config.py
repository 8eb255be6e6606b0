"""One record of what a dense decoder's config.json says, whichever family wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from outrider.core.reading import Fact, Reader, as_number, written_short
from outrider.errors import CheckpointError, shortened
from outrider.layers.rope import Rope

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float": torch.float32,
    "half": torch.float16,
}
"""The types of weights that are read, as configs name them."""

MAX_POSITIONS = 2**24
"""Angles are computed from positions in float32, which does not hold every whole number above this one."""

MAX_LAYERS = 4096
MAX_SIZE = 2**24
"""Bounds far above any model's: past them a config is damaged, and memory cannot be planned."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder's sizes and switches, read from a Hugging Face config."""

    architecture: str  # the class transformers names, "Qwen3ForCausalLM"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int  # those of the scaled rope
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    hidden_act: str  # the MLP's activation; a family says which it has
    dtype: torch.dtype  # of the checkpoint
    eos_token_ids: tuple[int, ...]
    longest: int = 0  # positions that may be asked for; more than the model was made for under some rope scalings
    facts: tuple[Fact, ...] = field(default=(), compare=False)  # what was taken where the config says a thing twice

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], left_out: Mapping[str, Any] | None = None) -> ModelConfig:
        """`left_out`: a family's values for keys that the config does not have.

        Raises CheckpointError for a key that is missing or a value this engine does not implement.
        """
        given = Reader({**(left_out or {}), **config})
        architecture = architecture_of(config)
        _refuse_unsupported(given)
        hidden = given.whole("hidden_size", high=MAX_SIZE)
        heads = given.whole("num_attention_heads", high=hidden)
        kv_heads = given.whole("num_key_value_heads", heads, high=heads)
        head_dim = given.whole("head_dim", hidden // heads, high=2**16)
        if heads % kv_heads:
            raise CheckpointError(
                f"config.json: num_key_value_heads {kv_heads} does not divide {heads} attention heads"
            )
        if head_dim % 2:
            raise CheckpointError(f"config.json: head_dim must be even to be rotated: {head_dim}")
        rope, positions = Rope.from_config(config), given.whole("max_position_embeddings", high=MAX_POSITIONS)
        longest = min(rope.longest(positions), MAX_POSITIONS)
        rope.check(head_dim, longest)
        if (trained := rope.trained(positions)) > MAX_POSITIONS:
            raise CheckpointError(
                f"config.json: rope scaling makes {trained} positions: at most {MAX_POSITIONS}; correct its factor"
            )
        dtype, dtype_fact = _dtype(given)
        return cls(
            architecture=architecture,
            vocab_size=given.whole("vocab_size", high=2**27),
            hidden_size=hidden,
            intermediate_size=given.whole("intermediate_size", high=MAX_SIZE),
            num_layers=given.whole("num_hidden_layers", high=MAX_LAYERS),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=trained,
            rms_norm_eps=given.number("rms_norm_eps", 1e-6, low=0.0, high=1.0),
            rope=rope,
            tie_word_embeddings=given.flag("tie_word_embeddings", False),
            attention_bias=given.flag("attention_bias", False),
            mlp_bias=given.flag("mlp_bias", False),
            hidden_act=given.text("hidden_act", "silu"),
            dtype=dtype,
            eos_token_ids=given.token_ids("eos_token_id"),
            longest=longest,
            facts=tuple(fact for fact in (rope.fact, dtype_fact) if fact is not None),
        )


def architecture_of(config: Mapping[str, Any]) -> str:
    """The one model that a config names. CheckpointError if it names none, or several."""
    architectures = Reader(config).texts("architectures")
    if len(architectures) != 1:
        raise CheckpointError(f"config.json: architectures must name one model: {written_short(architectures)}")
    return architectures[0]


def _dtype(given: Reader) -> tuple[torch.dtype, Fact]:
    """The checkpoint's type: `dtype`, or as it was called before, `torch_dtype`."""
    said = {key: given.text(key) for key in ("dtype", "torch_dtype") if given.has(key)}
    name = next(iter(said.values()), "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise CheckpointError(f"config.json: dtype is not supported: {shortened(name)} (known: {', '.join(DTYPES)})")
    differ = len({value.removeprefix("torch.") for value in said.values()}) > 1
    note = "dtype is taken before torch_dtype, as transformers does: correct one of them" if differ else None
    return DTYPES[name], Fact("dtype", name, {f"config.json's {key}": value for key, value in said.items()}, note)


def _refuse_unsupported(given: Reader) -> None:
    """What a config may ask that the decoder does not do: refused, since ignoring it gives wrong text."""
    if given.flag("use_sliding_window", False) or any(kind != "full_attention" for kind in given.texts("layer_types")):
        raise CheckpointError("config.json: sliding-window attention is not supported; use a model with full attention")
    is_said = given.has("use_sliding_window") or given.has("layer_types")
    window = None if is_said else given.values.get("sliding_window")
    if window is not None and not as_number(window) >= given.whole("max_position_embeddings", high=MAX_POSITIONS):
        raise CheckpointError(
            f"config.json: sliding_window {written_short(window)} is not supported; use a model with full attention, "
            "or set it to null if this one has it"
        )
    if given.number("partial_rotary_factor", 1.0, low=0.0) != 1.0:
        raise CheckpointError(
            f"config.json: partial_rotary_factor is not supported: {given.values['partial_rotary_factor']}; "
            "use a model that rotates whole heads"
        )
    if quantised := given.values.get("quantization_config"):
        method = quantised.get("quant_method", "unnamed") if isinstance(quantised, Mapping) else quantised
        name = shortened(method) if isinstance(method, str) else written_short(method)
        raise CheckpointError(f"config.json: quantised weights are not supported: {name}; use the unquantised model")
