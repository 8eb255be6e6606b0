"""A target's weights, under the names that its files give them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from outrider.load.checkpoint import Checkpoint, load_weights, weight_files
from outrider.models.decoder import Decoder

logger = logging.getLogger("outrider")

PREFIX = "model."
"""What names begin with, but for the head's; checkpoints of the decoder alone are saved without it."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_target(
    directory: Path,
    model: Decoder,
    ignores: Callable[[str], bool],  # names the checkpoint may hold that nothing reads
    progress: Callable[[int], None] | None = None,  # called with the bytes of each tensor as it is filled
) -> None:
    """Fills a target's parameters. Names may lack `model.`, and a tied matrix may be held as the head's alone.

    A head that the config ties to the embedding is warned of if the files hold another matrix for it. Raises
    CheckpointError as `load_weights`.
    """
    checkpoint, slots = Checkpoint.open(directory), model.slots()

    def prefixed(name: str) -> str:
        return f"{PREFIX}{name}" if name not in slots and f"{PREFIX}{name}" in slots else name

    weight_files(directory)  # what is missing, or pickled, is refused with the remedy
    held = {prefixed(name): name for name in checkpoint.tensors}
    is_tied = model.config.tie_word_embeddings and EMBEDDING in slots
    only_head = is_tied and HEAD in held and EMBEDDING not in held
    if is_tied and HEAD in held and EMBEDDING in held:
        head, embedding = (checkpoint.read(held[name]) for name in (HEAD, EMBEDDING))
        if not torch.equal(head, embedding):
            logger.warning(
                "%s/config.json ties head and embedding, but %s and %s differ: the embedding is taken for both; set "
                "tie_word_embeddings to false if the head is to be used",
                *(directory, held[HEAD], held[EMBEDDING]),
            )
    load_weights(
        directory, slots, ignores, progress, lambda name: EMBEDDING if only_head and name == HEAD else prefixed(name)
    )
