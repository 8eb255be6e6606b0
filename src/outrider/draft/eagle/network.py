"""The network of EAGLE-3 and P-EAGLE heads: a few decoder layers that read the target's auxiliary hidden states.

The row at position i holds the token of position i + 1 and a hidden state. The hidden state is the target's features
of position i, projected to the head's width. After a draft it is what this network returned for the row before. The
first layer's attention reads both side by side, each normed by itself. Further layers are ordinary ones.

EAGLE-3: Li et al., 2025, arXiv 2503.01840 (3.1: `fc_norm`, `norm_output`); P-EAGLE: arXiv 2602.01469.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from outrider.cache.layout import CacheLayout, LayerCache
from outrider.draft.base import TargetParts
from outrider.draft.eagle.checkpoint import HeadConfig
from outrider.kernels.join_input import JOIN_INPUT
from outrider.layers.embedding import Embedding, Head
from outrider.layers.linear import Linear
from outrider.layers.norm import RMSNorm
from outrider.layers.parameter import Allocator
from outrider.layers.spec import JoinedInput, LayerSpec
from outrider.layers.stack import DecoderStack
from outrider.layers.weight import TensorSlot, WeightSlots, fill_dummy
from outrider.models.decoder import gated_mlp, layer_spec
from outrider.tensors import StepBatch


def layer_specs(config: HeadConfig) -> list[LayerSpec]:
    """The layers of a head: the first joins embedding and hidden state, the others are a language model's."""
    layer, mlp = config.layer, gated_mlp(config.layer)
    first = layer_spec(layer, config.qk_norm, mlp, JoinedInput(config.norm_before_residual))
    return [first] + [layer_spec(layer, config.qk_norm, mlp)] * (layer.num_layers - 1)


class HeadNetwork:
    """Parameters are NaN until `slots()` is filled; what the checkpoint lacks is borrowed of the target."""

    def __init__(self, config: HeadConfig, max_len: int, allocator: Allocator) -> None:
        layer, aux_size = config.layer, config.num_aux_layers * config.target_hidden_size
        self.config = config
        self.fc = Linear(aux_size, {"fc": layer.hidden_size}, config.fc_bias, allocator)
        self.input_norm = RMSNorm(aux_size, layer.rms_norm_eps, allocator) if config.norm_before_fc else None
        self.aux_norms = [
            RMSNorm(config.target_hidden_size, layer.rms_norm_eps, allocator)
            for _ in range(config.num_aux_layers if config.fc_norm else 0)
        ]
        self.layers = DecoderStack(layer_specs(config), allocator)
        self.norm = RMSNorm(layer.hidden_size, layer.rms_norm_eps, allocator)
        self.rope = layer.rope.table(max_len, layer.head_dim, allocator.device)
        self.mask_hidden = allocator.parameter(1, 1, aux_size) if config.parallel else None
        self.embedding = Embedding(layer.vocab_size, layer.hidden_size, allocator) if config.own_embedding else None
        self.head = Head(config.draft_vocab_size, layer.hidden_size, allocator, None) if config.own_head else None
        self._dtype = allocator.dtype
        self._join = JOIN_INPUT.on(allocator.device)
        self._activation_dtype, self._cache_dtype = allocator.activation_dtype, allocator.cache_dtype

    def cache_layout(self, block_size: int) -> CacheLayout:
        """The key and value layers it reads and writes."""
        layer = self.config.layer
        return CacheLayout(layer.num_layers, layer.num_kv_heads, layer.head_dim, block_size, self._cache_dtype)

    def slots(self) -> WeightSlots:
        """The speculators layout's name for every parameter."""
        found = self._projection_slots() | self.layers.slots("layers.") | self.norm.slots("norm.")
        if self.mask_hidden is not None:
            found["mask_hidden"] = TensorSlot(self.mask_hidden, is_read=False)
        if self.embedding is not None:
            found |= self.embedding.slots("embed_tokens.")
        return found | (self.head.slots("lm_head.") if self.head is not None else {})

    def _projection_slots(self) -> WeightSlots:
        """Of `project`, which runs once a round."""
        found = self.fc.slots("")
        for index, norm in enumerate(self.aux_norms):
            found |= norm.slots(f"fc_norm.{index}.")
        return found | (self.input_norm.slots("input_norm.") if self.input_norm is not None else {})

    def weights_read(self, num_passes: int) -> int:
        """Bytes that a round reads: features projected once, layers and head in every pass, no embedding.

        A head that the target lends is read as one's own would be.
        """
        once = sum(slot.nbytes_read for slot in self._projection_slots().values())
        every_pass = sum(slot.nbytes_read for slot in self.slots().values()) - once
        if self.head is None:
            every_pass += self.config.draft_vocab_size * self.config.layer.hidden_size * self._dtype.itemsize
        return once + num_passes * every_pass

    def borrow(self, target: TargetParts) -> None:
        """Takes the target's embedding and head where the checkpoint has none."""
        self.embedding = self.embedding or target.embedding
        self.head = self.head or target.head

    def project(self, features: Tensor) -> Tensor:
        """[T, A * target H], A auxiliary hidden states side by side -> [T, H]."""
        if self.aux_norms:
            parts = features.chunk(self.config.num_aux_layers, dim=-1)
            normed = (norm(part) for norm, part in zip(self.aux_norms, parts, strict=True))
            features = torch.cat(list(normed), dim=-1)
        if self.input_norm is not None:
            features = self.input_norm(features)
        return self.fc(features)

    def mask_row(self) -> Tensor:
        """[1, H], the hidden state of every mask row: its learned features, projected as any others are."""
        assert self.mask_hidden is not None, "only a parallel head has mask rows"
        return self.project(self.mask_hidden.view(1, -1).to(self._activation_dtype))

    def __call__(
        self, ids: Tensor, hidden: Tensor, batch: StepBatch, cache: Sequence[LayerCache]
    ) -> tuple[Tensor, Tensor]:
        """ids [T], hidden [T, H] -> [T, H] for `logits`, and [T, H] for the row after a guess.

        Keys and values of the rows are written. `hidden` is overwritten.
        """
        assert self.embedding is not None, "the head was not given its weights"
        token_norm, hidden_norm = self.layers[0].input_norm, self.layers[0].hidden_norm
        assert hidden_norm is not None
        norms = token_norm.weight, hidden_norm.weight, hidden_norm.eps
        joined = self._join(ids, self.embedding.weight.tensor, hidden, *norms)
        residual = joined[:, hidden.shape[1] :].contiguous() if self.config.norm_before_residual else hidden
        x = self.layers.run(joined, residual, batch, self.rope, cache)
        normed = self.norm(residual) if x is None else self.norm.add(x, residual)
        return normed, normed if self.config.norm_output else residual

    def logits(self, normed: Tensor) -> Tensor:
        """[L, H] -> [L, draft vocabulary] float32."""
        assert self.head is not None, "the head was not given its weights"
        return self.head(normed)

    def fill_dummy(self, seed: int) -> None:
        """Random weights of a plausible size, for benchmarks without a checkpoint."""
        fill_dummy(self.slots(), self.rope.device, seed)
