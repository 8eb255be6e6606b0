"""One record of what a dense decoder's config.json says, whichever family wrote it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from outrider.errors import CheckpointError
from outrider.layers.rope import Rope, number

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float": torch.float32,
    "half": torch.float16,
}


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
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    hidden_act: str  # the MLP's activation; a family says which it has
    dtype: torch.dtype  # of the checkpoint
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Raises CheckpointError for a key that is missing or a value this engine does not implement."""
        architectures: list[str] = list(config.get("architectures") or [])
        if len(architectures) != 1:
            raise CheckpointError(f"config.json: architectures must name one model: {architectures}")

        _refuse_unsupported(config)
        heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
        kv_heads = _size(config, "num_key_value_heads", heads)
        head_dim = _size(config, "head_dim", hidden // heads)
        if heads % kv_heads:
            raise CheckpointError(
                f"config.json: num_key_value_heads {kv_heads} does not divide {heads} attention heads"
            )
        if head_dim % 2:
            raise CheckpointError(f"config.json: head_dim must be even to be rotated: {head_dim}")
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
        if dtype not in DTYPES:
            raise CheckpointError(f"config.json: dtype is not supported: {dtype} (known: {', '.join(DTYPES)})")
        return cls(
            architecture=architectures[0],
            vocab_size=_size(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_size(config, "intermediate_size"),
            num_layers=_size(config, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=_size(config, "max_position_embeddings"),
            rms_norm_eps=number(config, "rms_norm_eps", 1e-6),
            rope=Rope.from_config(config),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            hidden_act=str(config.get("hidden_act", "silu")),
            dtype=DTYPES[dtype],
            eos_token_ids=token_ids(config.get("eos_token_id")),
        )


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A count of something: a whole number of 1 or more."""
    value = default if config.get(key) is None else config[key]
    if value is None:
        raise CheckpointError(f"config.json lacks {key}")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json: {key} must be a whole number of 1 or more: {value!r}")
    return value


def token_ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    """Configs write none, one or several ids; here they are always several."""
    ids = () if value is None else (value,) if isinstance(value, int) else tuple(value)
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        raise CheckpointError(f"eos_token_id must be token ids: {value!r}")
    return ids


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    """What a config may ask that the decoder does not do: refused, since ignoring it gives wrong text."""
    if config.get("use_sliding_window") or any(kind != "full_attention" for kind in config.get("layer_types") or ()):
        raise CheckpointError("config.json: sliding-window attention is not supported; use a model with full attention")
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"config.json: partial_rotary_factor is not supported: {config['partial_rotary_factor']}")
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "unnamed") if isinstance(quantised, Mapping) else quantised
        raise CheckpointError(f"config.json: quantised weights are not supported: {method}; use the unquantised model")
