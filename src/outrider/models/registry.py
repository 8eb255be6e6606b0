"""The model families, by the architecture that a config.json names. A new family adds one line."""

from __future__ import annotations

from outrider.core.plugin import import_class
from outrider.errors import OptionError, UnknownArchitectureError, nearest
from outrider.models.decoder import Decoder
from outrider.models.llama import Llama
from outrider.models.qwen3 import Qwen3

MODELS: dict[str, type[Decoder]] = {family.architecture: family for family in (Llama, Qwen3)}


def find_model(architecture: str, named: str | None = None) -> type[Decoder]:
    """The class that runs an architecture: ours, or a user's `named` by module:Class.

    UnknownArchitectureError names the known ones. OptionError if the user's class is none, or of another architecture.
    """
    if named is not None:
        found = import_class("model_class", named, Decoder, "outrider.modelling.Decoder", ("architecture", "qk_norm"))
        if found.architecture != architecture:
            raise OptionError(f"model_class {named} is for {found.architecture}, the checkpoint is {architecture}")
        return found
    if architecture not in MODELS:
        raise UnknownArchitectureError(
            f"architecture is not supported: {architecture} ({nearest(architecture, MODELS)}, "
            "or a class of your own by model_class)"
        )
    return MODELS[architecture]
