"""The frozen target over whole packed rows: features for the head to read, distributions for it to learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.draft.eagle.checkpoint import NUM_DEFAULT_AUX_LAYERS, default_aux_layers
from outrider.errors import OptionError
from outrider.layers.parameter import Allocator
from outrider.layers.weight import dense_tensor
from outrider.load.checkpoint import Checkpoint
from outrider.load.target import load_target, read_target
from outrider.train.attention import Attention, Mask, build_mask
from outrider.train.functional import angles, compiler, rms_norm
from outrider.train.layer import Layer, after, before
from outrider.train.packing import Batch
from outrider.train.vocabulary import DraftVocabulary

CHUNK_BYTES = 1 << 28
"""Maximum size of a chunk of logits over the target's whole vocabulary."""


def check_aux_layers(layers: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    """The auxiliary layers asked for, or the default ones. OptionError where the target has no such layer."""
    if layers is None:
        layers = default_aux_layers(num_layers)
        if min(layers) < 1 or len(set(layers)) != NUM_DEFAULT_AUX_LAYERS:
            raise OptionError(
                f"a target of {num_layers} layers has no layers 2, n//2, n-3: name three with --feature-layers"
            )
    if len(layers) != NUM_DEFAULT_AUX_LAYERS or any(not 0 <= layer <= num_layers for layer in layers):
        raise OptionError(
            f"feature_layers must be {NUM_DEFAULT_AUX_LAYERS} of 0 to {num_layers}: {list(layers)}; "
            "i is the stream entering layer i, and the number of layers is that after the last"
        )
    return tuple(layers)


@dataclass(frozen=True, slots=True)
class Truth:
    """What the target says of a batch; n = B * L rows, row by row."""

    features: Tensor  # [B, L, 3H]
    logits: Tensor  # [n, draft V] of the target at each position, over the draft vocabulary
    drafted: Tensor  # [B, L] bool, whether the target's most likely token can be drafted


class Teacher:
    """A target model with frozen weights, as the engine loads it, run over rows instead of through a cache."""

    def __init__(
        self,
        directory: Path,
        max_length: int,
        aux_layer_ids: Sequence[int] | None,  # i: the residual stream entering layer i
        device: torch.device,
        compiled: bool,
    ) -> None:
        """Raises CheckpointError or OptionError. On a CPU weights are widened to float32."""
        made, config = read_target(Checkpoint.open(directory))
        self.config = config
        if max_length > config.max_position_embeddings:
            raise OptionError(
                f"max_length {max_length} is more than the target's positions: at most {config.max_position_embeddings}"
            )
        self.aux_layer_ids = check_aux_layers(aux_layer_ids, config.num_layers)
        self.dtype = config.dtype if device.type == "cuda" else torch.float32
        model = made(config, max_length, Allocator(device, self.dtype, self.dtype))
        load_target(directory, model, model.ignores)
        self.qk_norm = model.qk_norm
        self.embedding, self.head = dense_tensor(model.embedding.weight), dense_tensor(model.head.weight)
        self.norm = model.norm.weight
        self._rope = model.rope
        self._layers = [Layer.of(layer) for layer in model.layers]
        wrap = compiler(compiled)
        self._before, self._after, self._attention = wrap(before), wrap(after), Attention(device)

    @torch.no_grad()
    def run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features [B, L, 3H], layer by layer side by side, and hidden states [B, L, H] after the final norm."""
        anchor = torch.arange(batch.tokens.shape[1], device=batch.tokens.device).expand_as(batch.tokens)
        mask = build_mask(batch.document, anchor, torch.zeros_like(anchor))
        return self._run(batch, mask)

    def _run(self, batch: Batch, mask: Mask) -> tuple[Tensor, Tensor]:
        cos, sin = angles(self._rope, batch.position)
        x = F.embedding(batch.tokens, self.embedding)
        streams = []
        for layer in self._layers:
            streams.append(x)
            x, q, k, v = self._before(layer, None, x, cos, sin)
            x = self._after(layer, self._attention(q, k, v, mask), x)
        streams.append(x)
        features = torch.cat([streams[index] for index in self.aux_layer_ids], dim=-1)
        return features, rms_norm(x, self.norm, self.config.rms_norm_eps)

    @torch.no_grad()
    def truth(self, batch: Batch, vocabulary: Tensor | None) -> Truth:
        """Features and distributions. `vocabulary` [draft V] int64 holds the drafted tokens, None: all.

        Logits over the whole vocabulary exist for a chunk of rows at a time.
        """
        features, hidden = self.run(batch)
        rows = hidden.flatten(0, 1)
        if vocabulary is None:
            everywhere = torch.ones_like(batch.tokens, dtype=torch.bool)
            return Truth(features, F.linear(rows, self.head), everywhere)
        contains = torch.zeros(self.config.vocab_size, dtype=torch.bool, device=rows.device)
        contains[vocabulary] = True
        logits, drafted = [], []
        for chunk in torch.split(rows, max(1, CHUNK_BYTES // (4 * self.config.vocab_size))):
            whole = F.linear(chunk, self.head)
            logits.append(whole[:, vocabulary])
            drafted.append(contains[whole.argmax(-1)])
        return Truth(features, torch.cat(logits), torch.cat(drafted).view_as(batch.tokens))


def on_device(vocabulary: DraftVocabulary, device: torch.device) -> Tensor | None:
    """The drafted tokens for `Teacher.truth`."""
    return None if vocabulary.is_full else vocabulary.tokens.to(device)
