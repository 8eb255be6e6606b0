"""The model families, by the architecture that a config.json names. A new family adds one line."""

from __future__ import annotations

from outrider.errors import UnknownArchitectureError, nearest
from outrider.models.decoder import Decoder
from outrider.models.llama import Llama
from outrider.models.qwen3 import Qwen3

MODELS: dict[str, type[Decoder]] = {family.architecture: family for family in (Llama, Qwen3)}


def find_model(architecture: str) -> type[Decoder]:
    """The class that runs an architecture, or UnknownArchitectureError naming the known ones."""
    if architecture not in MODELS:
        raise UnknownArchitectureError(
            f"architecture is not supported: {architecture} ({nearest(architecture, MODELS)})"
        )
    return MODELS[architecture]
