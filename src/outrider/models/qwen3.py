"""Qwen3, dense (Qwen team, 2025): a Llama with each head's q and k normalised before rotation."""

from __future__ import annotations

from outrider.models.decoder import Decoder


class Qwen3(Decoder):
    architecture = "Qwen3ForCausalLM"
    qk_norm = True
