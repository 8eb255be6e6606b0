"""A target's weights, under the names that its files give them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from outrider.load.checkpoint import INDEX, SINGLE, Checkpoint, load_weights, weight_files
from outrider.models.config import ModelConfig
from outrider.models.decoder import Decoder
from outrider.models.registry import read_config

PREFIX = "model."
"""What names begin with, but for the head's; checkpoints of the decoder alone are saved without it."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def read_target(
    checkpoint: Checkpoint, named: str | None = None, *, dummy: bool = False
) -> tuple[type[Decoder], ModelConfig]:
    """The class that runs a checkpoint, ours or the user's `named`, and what its config says.

    A head that the config ties to the embedding is its own if the files hold another matrix for it, as transformers
    has it. `dummy`: no weights are read. Raises as `models.registry.read_config` and `Checkpoint.read`.
    """
    model, config = read_config(checkpoint.config, named)
    if dummy or not config.tie_word_embeddings:
        return model, config
    if not any((checkpoint.directory / name).exists() for name in (SINGLE, INDEX)):
        return model, config
    held = {name.removeprefix(PREFIX): name for name in checkpoint.tensors}
    names = [held.get(name.removeprefix(PREFIX)) for name in (HEAD, EMBEDDING)]
    if any(name is None or checkpoint.tensors[name].shape is None for name in names):
        return model, config
    head, embedding = (checkpoint.read(name) for name in names if name is not None)
    return model, config if torch.equal(head, embedding) else replace(config, tie_word_embeddings=False)


def load_target(
    directory: Path,
    model: Decoder,
    ignores: Callable[[str], bool],  # names the checkpoint may hold that nothing reads
    progress: Callable[[int], None] | None = None,  # called with the bytes of each tensor as it is filled
) -> None:
    """Fills a target's parameters. Names may lack `model.`, and a tied matrix may be held as the head's alone.

    Raises CheckpointError as `load_weights`.
    """
    checkpoint, slots = Checkpoint.open(directory), model.slots()

    def prefixed(name: str) -> str:
        return f"{PREFIX}{name}" if name not in slots and f"{PREFIX}{name}" in slots else name

    weight_files(directory)  # what is missing, or pickled, is refused with the remedy
    held = {prefixed(name): name for name in checkpoint.tensors}
    is_tied = model.config.tie_word_embeddings and EMBEDDING in slots
    only_head = is_tied and HEAD in held and EMBEDDING not in held
    load_weights(
        directory, slots, ignores, progress, lambda name: EMBEDDING if only_head and name == HEAD else prefixed(name)
    )
