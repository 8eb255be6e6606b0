"""From a resolved configuration to a loaded target and a loaded drafter: the same for every runner."""

from __future__ import annotations

from collections.abc import Callable

from outrider.draft.base import Drafter, TargetParts
from outrider.layers.parameter import Allocator
from outrider.load.checkpoint import load_weights
from outrider.models.decoder import Decoder
from outrider.runner.base import RunnerConfig


def build_model(config: RunnerConfig, count: Callable[[int], None]) -> Decoder:
    """The target with its weights, loaded or random. `count` is told the bytes of each as it is filled."""
    model = config.model(config.model_config, config.max_model_len, Allocator.on(config.device, config.dtype))
    if config.directory is None:
        model.fill_dummy(config.seed)
    else:
        load_weights(config.directory, model.weights(), model.ignores, count)
    return model


def build_drafter(config: RunnerConfig, model: Decoder, count: Callable[[int], None] | None) -> Drafter:
    """The drafter, given its weights and its own layers of the cache."""
    drafter = config.drafter(config.draft_options, config.target)
    layout = drafter.layers()
    cache = [] if layout is None else layout.allocate(config.memory.num_blocks, config.device)
    dummy_seed = config.seed if config.directory is None else None
    drafter.prepare(TargetParts(model.embedding, model.head), cache, dummy_seed, count)
    return drafter
