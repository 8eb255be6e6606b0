"""The model families, by the architecture that a config.json names. A new family adds one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outrider.core.plugin import import_class
from outrider.errors import OptionError, UnknownArchitectureError, nearest, shortened
from outrider.models.config import ModelConfig, architecture_of
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
            f"config.json: architecture is not supported: {shortened(architecture)} ({nearest(architecture, MODELS)}, "
            "or a class of your own by model_class)"
        )
    return MODELS[architecture]


def read_config(config: Mapping[str, Any], named: str | None = None) -> tuple[type[Decoder], ModelConfig]:
    """The class that runs a config.json, as `find_model`, and what the config says of it.

    Raises CheckpointError, as `ModelConfig.from_dict`, and as `find_model`.
    """
    model = find_model(architecture_of(config), named)
    return model, ModelConfig.from_dict(config, model.left_out)
