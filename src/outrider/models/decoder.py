"""The one decoder that every dense family is a few differences from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from outrider.cache.layout import CacheLayout, LayerCache
from outrider.capability import Feature, Part
from outrider.layers.attention import Attention
from outrider.layers.embedding import Embedding, Head
from outrider.layers.mlp import GatedMLP
from outrider.layers.norm import RMSNorm
from outrider.layers.parameter import Allocator, Weights
from outrider.models.config import ModelConfig
from outrider.tensors import StepBatch


class DecoderLayer:
    """Attention and MLP, each normalised on the way in and added to the residual stream."""

    def __init__(self, config: ModelConfig, qk_norm: bool, allocator: Allocator) -> None:
        eps = config.rms_norm_eps
        self.input_norm = RMSNorm(config.hidden_size, eps, allocator)
        self.attention = Attention(
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            bias=config.attention_bias,
            qk_norm_eps=eps if qk_norm else None,
            allocator=allocator,
        )
        self.mlp_norm = RMSNorm(config.hidden_size, eps, allocator)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.mlp_bias, allocator)

    def weights(self, prefix: str) -> Weights:
        return (
            self.input_norm.weights(f"{prefix}input_layernorm.")
            | self.attention.weights(f"{prefix}self_attn.")
            | self.mlp_norm.weights(f"{prefix}post_attention_layernorm.")
            | self.mlp.weights(f"{prefix}mlp.")
        )


class Decoder:
    """A pre-norm transformer decoder with grouped-query attention and a gated MLP.

    A family is a subclass that sets the class attributes. Weights keep the checkpoint's dtype;
    what flows between layers is in the allocator's `activation_dtype`.
    """

    architecture: ClassVar[str]
    qk_norm: ClassVar[bool]  # whether each head's q and k are normalised
    needs: ClassVar[frozenset[Feature]] = frozenset()

    def __init__(self, config: ModelConfig, max_len: int, allocator: Allocator) -> None:
        """Parameters are NaN until `weights()` is filled. `max_len` bounds the positions."""
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.hidden_size, allocator)
        self.layers = [DecoderLayer(config, self.qk_norm, allocator) for _ in range(config.num_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, allocator)
        tied = self.embedding if config.tie_word_embeddings else None
        self.head = Head(config.vocab_size, config.hidden_size, allocator, tied)
        self.rope = config.rope.table(max_len, config.head_dim, allocator.device)
        self.activation_dtype = allocator.activation_dtype

    @classmethod
    def part(cls) -> Part:
        """The model as the oracle sees it."""
        return Part(cls.architecture, cls.needs)

    def cache_layout(self, block_size: int) -> CacheLayout:
        """The key/value layers this model reads and writes, in the activations' dtype."""
        config = self.config
        return CacheLayout(config.num_layers, config.num_kv_heads, config.head_dim, block_size, self.activation_dtype)

    def forward(self, batch: StepBatch, cache: Sequence[LayerCache]) -> Tensor:
        """[T, H] after the final norm; the step's keys and values are written into the cache."""
        residual = self.embedding(batch.input_ids)
        x = self.layers[0].input_norm(residual)
        for index, (layer, layer_cache) in enumerate(zip(self.layers, cache, strict=True)):
            if index:
                x = layer.input_norm.add(x, residual)
            x = layer.attention(x, batch, self.rope, layer_cache)
            x = layer.mlp(layer.mlp_norm.add(x, residual))
        return self.norm.add(x, residual)

    def logits(self, hidden: Tensor) -> Tensor:
        """[L, H] -> [L, V] float32."""
        return self.head(hidden)

    def weights(self) -> Weights:
        """The checkpoint's names for every parameter."""
        found = self.embedding.weights("model.embed_tokens.") | self.norm.weights("model.norm.")
        for index, layer in enumerate(self.layers):
            found |= layer.weights(f"model.layers.{index}.")
        return found | self.head.weights("lm_head.")

    def ignorable(self) -> frozenset[str]:
        """Names a checkpoint may hold and this model does not read: a copy of the tied head."""
        return frozenset({"lm_head.weight"} if self.config.tie_word_embeddings else ())

    @property
    def num_parameters(self) -> int:
        """Parameters held, a tied head counted once."""
        return sum(weight.numel() for weight in self.weights().values())

    def fill_dummy(self, seed: int) -> None:
        """Random weights of a plausible size, for benchmarks without a checkpoint."""
        weights = self.weights()
        generator = torch.Generator(next(iter(weights.values())).device).manual_seed(seed)
        for name, weight in weights.items():
            if name.endswith("norm.weight"):
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, 0.02, generator=generator)
