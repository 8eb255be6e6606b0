"""The one decoder that every dense family is a few differences from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, overload

import torch
from torch import Tensor

from outrider.cache.layout import CacheLayout, LayerCache
from outrider.capability import Feature, Part
from outrider.kernels.decoder_layer import DECODER_LAYER, LayerWeights, Stack, layer_stack, take_taps
from outrider.layers.attention import Attention
from outrider.layers.embedding import Embedding, Head
from outrider.layers.mlp import GatedMLP
from outrider.layers.norm import RMSNorm
from outrider.layers.parameter import Allocator, Weights
from outrider.models.config import ModelConfig
from outrider.tensors import StepBatch


def can_fuse(attention: Attention, mlp: GatedMLP, device: torch.device) -> bool:
    """Whether the device has a kernel for a whole layer of these; it knows no biases but those of q, k and v."""
    has_kernel = DECODER_LAYER.on(device) is not DECODER_LAYER.reference
    return attention.out.bias is None and mlp.down.bias is None and has_kernel


def fused_weights(input_norm: RMSNorm | None, attention: Attention, mlp_norm: RMSNorm, mlp: GatedMLP) -> LayerWeights:
    """A layer's parameters as that kernel takes them."""
    return LayerWeights(
        input_norm.weight if input_norm else None,
        attention.qkv.weight,
        attention.qkv.bias,
        attention.q_norm.weight if attention.q_norm else None,
        attention.k_norm.weight if attention.k_norm else None,
        attention.out.weight,
        mlp_norm.weight,
        mlp.gate_up.weight,
        mlp.down.weight,
    )


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
        self.is_fused = can_fuse(self.attention, self.mlp, allocator.device)

    def __call__(self, x: Tensor | None, residual: Tensor, batch: StepBatch, rope: Tensor, cache: LayerCache) -> Tensor:
        """[T, H] to be added to the residual stream; `x`, what the layer before gave, is added first, in place."""
        normed = self.input_norm(residual) if x is None else self.input_norm.add(x, residual)
        mixed = self.attention(normed, batch, rope, cache)
        return self.mlp(self.mlp_norm.add(mixed, residual))

    def fused_weights(self) -> LayerWeights:
        """The parameters as that kernel takes them."""
        return fused_weights(self.input_norm, self.attention, self.mlp_norm, self.mlp)

    def weights(self, prefix: str) -> Weights:
        return (
            self.input_norm.weights(f"{prefix}input_layernorm.")
            | self.attention.weights(f"{prefix}self_attn.")
            | self.mlp_norm.weights(f"{prefix}post_attention_layernorm.")
            | self.mlp.weights(f"{prefix}mlp.")
        )


class LayerRun(Sequence[DecoderLayer]):
    """Layers one behind the other, run in one call where the device has a kernel for all of them."""

    def __init__(self, layers: Sequence[DecoderLayer]) -> None:
        self._layers = list(layers)
        self._fused = all(layer.is_fused for layer in layers)
        self._stack: Stack | None = None  # the layers on the cache of the last step
        self._stacked: Sequence[LayerCache] = ()

    def run(
        self,
        x: Tensor | None,
        residual: Tensor,
        batch: StepBatch,
        rope: Tensor,
        cache: Sequence[LayerCache],
        taps: Sequence[int] = (),
        features: Tensor | None = None,
    ) -> Tensor | None:
        """From what the layer before gave, None for nothing, to what the last one gives; see `DecoderLayer`.

        `features` [T, len(taps) * H] is filled with the stream as it enters each tapped layer, side by side.
        """
        if self._fused:
            if self._stack is None or self._stacked is not cache:
                self._stack, self._stacked = self._stack_on(cache), cache
            where = batch.positions, batch.cache_slot, batch.block_table, batch.query_start, batch.seq_lens
            return self._stack(0, len(self._layers), x, residual, rope, *where, taps, features)
        for index, (layer, layer_cache) in enumerate(zip(self._layers, cache, strict=True)):
            take_taps(index, x, residual, taps, features)
            x = layer(x, residual, batch, rope, layer_cache)
        return x

    def _stack_on(self, cache: Sequence[LayerCache]) -> Stack:
        attention, eps = self._layers[0].attention, self._layers[0].mlp_norm.eps
        weights = [layer.fused_weights() for layer in self._layers]
        return layer_stack(weights, cache, eps, attention.num_heads, attention.head_dim**-0.5)

    def __len__(self) -> int:
        return len(self._layers)

    @overload
    def __getitem__(self, index: int) -> DecoderLayer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[DecoderLayer]: ...
    def __getitem__(self, index: int | slice) -> DecoderLayer | Sequence[DecoderLayer]:
        return self._layers[index]


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
        self.layers = LayerRun([DecoderLayer(config, self.qk_norm, allocator) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, allocator)
        tied = self.embedding if config.tie_word_embeddings else None
        self.head = Head(config.vocab_size, config.hidden_size, allocator, tied)
        self.rope = config.rope.table(max_len, config.head_dim, allocator.device)
        self.cache_dtype = allocator.cache_dtype

    @classmethod
    def part(cls) -> Part:
        """The model as the oracle sees it."""
        return Part(cls.architecture, cls.needs)

    def cache_layout(self, block_size: int) -> CacheLayout:
        """The key/value layers this model reads and writes, in the allocator's `cache_dtype`."""
        config = self.config
        return CacheLayout(config.num_layers, config.num_kv_heads, config.head_dim, block_size, self.cache_dtype)

    def forward(
        self, batch: StepBatch, cache: Sequence[LayerCache], taps: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """[T, H] after the final norm; the step's keys and values are written into the cache.

        Also [T, len(taps) * H], or None without taps: the residual stream as it enters each tapped layer, side by
        side in the order given. Tap i is what layer i reads, so 0 is the embedding, and the number of layers what the
        final norm reads.
        """
        residual = self.embedding(batch.input_ids)
        features = residual.new_empty(len(residual), len(taps) * residual.shape[1]) if taps else None
        x = self.layers.run(None, residual, batch, self.rope, cache, taps, features)
        take_taps(len(self.layers), x, residual, taps, features)
        return self.norm(residual) if x is None else self.norm.add(x, residual), features

    def logits(self, hidden: Tensor) -> Tensor:
        """[L, H] -> [L, V] float32."""
        return self.head(hidden)

    def weights(self) -> Weights:
        """The checkpoint's names for every parameter."""
        found = self.embedding.weights("model.embed_tokens.") | self.norm.weights("model.norm.")
        for index, layer in enumerate(self.layers):
            found |= layer.weights(f"model.layers.{index}.")
        return found | self.head.weights("lm_head.")

    def ignores(self, name: str) -> bool:
        """What a checkpoint may hold and this model does not read: a copy of the tied head, rotary frequencies."""
        return name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and self.config.tie_word_embeddings)

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
