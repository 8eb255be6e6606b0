"""Qwen3, dense (Qwen team, 2025): a Llama with each head's q and k normalised before rotation."""

from __future__ import annotations

from types import MappingProxyType

from outrider.models.decoder import Decoder


class Qwen3(Decoder):
    architecture = "Qwen3ForCausalLM"
    qk_norm = True
    left_out = MappingProxyType({"head_dim": 128, "num_key_value_heads": 32, "use_sliding_window": False})
