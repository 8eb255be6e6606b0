"""Llama 2 to 3.3 and models of that shape (Touvron et al., 2023)."""

from __future__ import annotations

from outrider.models.decoder import Decoder


class Llama(Decoder):
    architecture = "LlamaForCausalLM"
    qk_norm = False
