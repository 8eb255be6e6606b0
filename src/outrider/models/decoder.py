"""The one decoder that every dense family is a few differences from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor

from outrider.cache.layout import CacheLayout, LayerCache
from outrider.capability import Feature, Part
from outrider.errors import CheckpointError, shortened
from outrider.kernels.records import copy_aux_hidden
from outrider.layers.embedding import Embedding, Head
from outrider.layers.mlp import GatedMlpSpec
from outrider.layers.norm import RMSNorm
from outrider.layers.parameter import Allocator
from outrider.layers.spec import AttentionSpec, JoinedInput, LayerSpec, MlpSpec
from outrider.layers.stack import DecoderStack
from outrider.layers.weight import WeightSlots, fill_dummy, num_parameters
from outrider.models.config import ModelConfig
from outrider.tensors import StepBatch


def layer_spec(config: ModelConfig, qk_norm: bool, mlp: MlpSpec, joined: JoinedInput | None = None) -> LayerSpec:
    """A layer of the sizes that a config gives."""
    return LayerSpec(
        hidden_size=config.hidden_size,
        eps=config.rms_norm_eps,
        attention=AttentionSpec(
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            qk_norm=qk_norm,
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
        ),
        mlp=mlp,
        joined=joined,
    )


def gated_mlp(config: ModelConfig) -> GatedMlpSpec:
    """The MLP of a config whose activation is silu, also called swish. CheckpointError for another one."""
    if config.hidden_act not in ("silu", "swish"):
        named = shortened(config.hidden_act)
        raise CheckpointError(f"config.json: hidden_act is not supported: {named} (known: silu); use another model")
    return GatedMlpSpec(config.intermediate_size, config.mlp_bias)


class Decoder:
    """A pre-norm transformer decoder with grouped-query attention.

    A family is a subclass that sets the class attributes, and `mlp` if its MLP is not the gated one. Weights keep the
    checkpoint's dtype; what flows between layers is in the allocator's `activation_dtype`.
    """

    architecture: ClassVar[str]
    qk_norm: ClassVar[bool]  # whether each head's q and k are normalised
    needs: ClassVar[frozenset[Feature]] = frozenset()
    left_out: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """What transformers takes for keys that a config.json of the family does not have."""

    def __init__(self, config: ModelConfig, max_len: int, allocator: Allocator) -> None:
        """Parameters are NaN until `slots()` is filled. `max_len` bounds the positions."""
        self.config = config
        is_tied = config.tie_word_embeddings
        self.embedding = Embedding(config.vocab_size, config.hidden_size, allocator, is_head=is_tied)
        self.layers = DecoderStack(self.layer_specs(config), allocator)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, allocator)
        self.head = Head(config.vocab_size, config.hidden_size, allocator, self.embedding if is_tied else None)
        self.rope = config.rope.table(max_len, config.head_dim, allocator.device)
        self.cache_dtype = allocator.cache_dtype

    @classmethod
    def mlp(cls, config: ModelConfig) -> MlpSpec:
        """Each layer's MLP. CheckpointError for a config that asks for one that the family does not have."""
        return gated_mlp(config)

    @classmethod
    def layer_specs(cls, config: ModelConfig) -> list[LayerSpec]:
        """What each layer is, first to last."""
        return [layer_spec(config, cls.qk_norm, cls.mlp(config))] * config.num_layers

    @classmethod
    def part(cls) -> Part:
        """The model as the oracle sees it."""
        return Part(cls.architecture, cls.needs)

    def cache_layout(self, block_size: int) -> CacheLayout:
        """The key/value layers this model reads and writes, in the allocator's `cache_dtype`."""
        config = self.config
        return CacheLayout(config.num_layers, config.num_kv_heads, config.head_dim, block_size, self.cache_dtype)

    def forward(
        self, batch: StepBatch, cache: Sequence[LayerCache], aux_layer_ids: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """[T, H] after the final norm; the step's keys and values are written into the cache.

        Also [T, A * H], or None for no auxiliary layers: the residual stream as it enters each of them, side by side
        in the order given. Layer 0 reads the embedding; the number of layers means what the final norm reads.
        """
        residual = self.embedding(batch.input_ids)
        features = residual.new_empty(len(residual), len(aux_layer_ids) * residual.shape[1]) if aux_layer_ids else None
        x = self.layers.run(None, residual, batch, self.rope, cache, aux_layer_ids, features)
        copy_aux_hidden(len(self.layers), x, residual, aux_layer_ids, features)
        return self.norm(residual) if x is None else self.norm.add(x, residual), features

    def logits(self, hidden: Tensor) -> Tensor:
        """[L, H] -> [L, V] float32."""
        return self.head(hidden)

    def slots(self) -> WeightSlots:
        """The checkpoint's name for every parameter."""
        outer = self.embedding.slots("model.embed_tokens.") | self.norm.slots("model.norm.")
        return outer | self.layers.slots("model.layers.") | self.head.slots("lm_head.")

    def ignores(self, name: str) -> bool:
        """What a checkpoint may hold and this model does not read: a copy of the tied head, rotary frequencies."""
        return name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and self.config.tie_word_embeddings)

    @property
    def num_parameters(self) -> int:
        """Parameters held, a tied head counted once."""
        return num_parameters(self.slots())

    def fill_dummy(self, seed: int) -> None:
        """Random weights of a plausible size, for benchmarks without a checkpoint."""
        fill_dummy(self.slots(), self.rope.device, seed)
