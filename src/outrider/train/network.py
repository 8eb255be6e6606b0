"""The network of a draft head, for both methods. Its state_dict is the checkpoint: names of the speculators format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from outrider.layers.rope import Rope
from outrider.train.functional import compiler, rms_norm, rotate
from outrider.train.teacher import NUM_TAPS, Teacher
from outrider.train.vocabulary import DraftVocabulary

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Layer, q [B, Hq, N, D], k and v [B, Hkv, N, D] -> [B, Hq, N, D]."""


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """Sizes and switches of a head."""

    vocab_size: int  # the target's
    draft_vocab_size: int
    hidden_size: int  # the target's too: features and embeddings meet in one stream
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    layer_type: str  # "qwen3" normalises each head's q and k, "llama" does not
    norm_before_residual: bool
    norm_before_fc: bool
    fc_norm: bool
    norm_output: bool


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> the same."""
        return rms_norm(x, self.weight, self.eps)


def linear(x: Tensor, *weights: Tensor) -> Tensor:
    """One product with several matrices [out, in] side by side; weights are kept wider than they are multiplied."""
    return F.linear(x, torch.cat([weight.to(x.dtype) for weight in weights]))


class SelfAttention(nn.Module):
    """The projections around attention."""

    def __init__(self, config: HeadConfig, width: int) -> None:
        super().__init__()
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(width, q, bias=False)
        self.k_proj = nn.Linear(width, kv, bias=False)
        self.v_proj = nn.Linear(width, kv, bias=False)
        self.o_proj = nn.Linear(q, config.hidden_size, bias=False)
        normed = config.layer_type == "qwen3"
        self.q_norm = Norm(config.head_dim, config.rms_norm_eps) if normed else None
        self.k_norm = Norm(config.head_dim, config.rms_norm_eps) if normed else None
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, width] -> turned q [B, Hq, N, D], turned k and v [B, Hkv, N, D]."""
        joined = linear(x, self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        heads = joined.view(*joined.shape[:2], -1, self.head_dim).transpose(1, 2)
        q, k, v = torch.split(heads, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, cos, sin), rotate(k, cos, sin), v.contiguous()


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU; Shazeer, 2020)."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, H] -> [B, N, H]."""
        gate, up = linear(x, self.gate_proj.weight, self.up_proj.weight).chunk(2, dim=-1)
        return linear(F.silu(gate) * up, self.down_proj.weight)


class Layer(nn.Module):
    """A pre-norm decoder layer; the first one reads an embedding beside the stream."""

    def __init__(self, config: HeadConfig, first: bool) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = Norm(size, eps)
        self.hidden_norm = Norm(size, eps) if first else None
        self.self_attn = SelfAttention(config, 2 * size if first else size)
        self.post_attention_layernorm = Norm(size, eps)
        self.mlp = MLP(config)
        self.norm_before_residual = config.norm_before_residual

    def before(
        self, x: Tensor, embeds: Tensor | None, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The residual [B, N, H] and q, k, v, from the stream x and, in the first layer, embeddings [B, N, H]."""
        if self.hidden_norm is None:
            return x, *self.self_attn(self.input_layernorm(x), cos, sin)
        assert embeds is not None
        normed = self.hidden_norm(x)
        residual = normed if self.norm_before_residual else x
        return residual, *self.self_attn(torch.cat((self.input_layernorm(embeds), normed), dim=-1), cos, sin)

    def after(self, residual: Tensor, mixed: Tensor) -> Tensor:
        """The stream [B, N, H] after the layer, from attention's [B, Hq, N, D]."""
        x = residual + linear(mixed.transpose(1, 2).flatten(2), self.self_attn.o_proj.weight)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Head(nn.Module):
    """A draft head: fc over three of the target's layers, decoder layers, and an own projection to tokens.

    Called piecewise, since the methods differ in what they feed it: `embed` and `project` make the first layer's
    inputs, `run` the last layer's stream, `norm` and `lm_head` the logits.
    """

    d2t: Tensor  # [draft V] int64, target token = draft token + d2t
    t2d: Tensor  # [V] bool

    def __init__(self, config: HeadConfig, vocabulary: DraftVocabulary, masked: bool, compiled: bool = False) -> None:
        """`masked`: it has a hidden state for places that no feature exists of. Weights are random."""
        super().__init__()
        self.config = config
        size, eps, features = config.hidden_size, config.rms_norm_eps, NUM_TAPS * config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.input_norm = Norm(features, eps) if config.norm_before_fc else None
        self.fc_norm = nn.ModuleList(Norm(size, eps) for _ in range(NUM_TAPS)) if config.fc_norm else None
        self.fc = nn.Linear(features, size, bias=False)
        self.layers = nn.ModuleList(Layer(config, index == 0) for index in range(config.num_layers))
        self.norm = Norm(size, eps)
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)
        self.mask_hidden = nn.Parameter(torch.empty(1, 1, features)) if masked else None
        self.register_buffer("d2t", vocabulary.offset)
        self.register_buffer("t2d", vocabulary.contains)
        wrap = compiler(compiled)
        self._before, self._after = wrap(Layer.before), wrap(Layer.after)

    def initialise(self, teacher: Teacher, vocabulary: DraftVocabulary, seed: int) -> None:
        """Random matrices from a seed; embedding, final norm and lm_head are the target's. Call it on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() > 1:
                    scale = (
                        (2 * len(self.layers)) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
                    )
                    std = 1.0 if name == "mask_hidden" else 0.02 * scale
                    parameter.normal_(0.0, std, generator=generator)
            self.embed_tokens.weight.copy_(teacher.embedding)
            self.norm.weight.copy_(teacher.norm)
            self.lm_head.weight.copy_(teacher.head.cpu()[vocabulary.tokens])

    def embed(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """[...] int64 of the target's tokens -> [..., H]."""
        return F.embedding(tokens, self.embed_tokens.weight).to(dtype)

    def project(self, features: Tensor) -> Tensor:
        """[B, N, 3H] -> [B, N, H]."""
        if self.input_norm is not None:
            features = self.input_norm(features)
        if self.fc_norm is not None:
            taps = features.chunk(NUM_TAPS, dim=-1)
            features = torch.cat([norm(tap) for norm, tap in zip(self.fc_norm, taps, strict=True)], dim=-1)
        return linear(features, self.fc.weight)

    def run(self, embeds: Tensor, hidden: Tensor, angles: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """[B, N, H] embeddings and projected features -> [B, N, H] after the last layer, not normed."""
        x, beside = hidden, embeds
        for index, layer in enumerate(self.layers):
            residual, q, k, v = self._before(layer, x, beside if index == 0 else None, *angles)
            x = self._after(layer, residual, attend(index, q, k, v))
        return x
