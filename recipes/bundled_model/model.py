"""The training model: the Qwen3 dense architecture in plain PyTorch, with Hugging Face's parameter names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Config:
    """The shape of the model."""

    vocab_size: int = 6144
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 14
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Returns x in its own dtype."""
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * y).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rotary positions to (batch, heads, time, head_dim)."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query causal attention with a norm on each query and key head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        hidden, width = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * width, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * width, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * width, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * width, hidden, bias=False)
        self.q_norm = RMSNorm(width, config.rms_norm_eps)
        self.k_norm = RMSNorm(width, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The three projections run as one matrix product."""
        batch, time, _ = x.shape
        config = self.config
        heads, kv = config.num_attention_heads, config.num_key_value_heads
        weight = torch.cat((self.q_proj.weight, self.k_proj.weight, self.v_proj.weight))
        joined = functional.linear(x, weight).view(batch, time, heads + 2 * kv, config.head_dim)
        q, k, v = (part.transpose(1, 2) for part in joined.split((heads, kv, kv), dim=2))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        k, v = (part.repeat_interleave(heads // kv, dim=1) for part in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return functional.linear(y.transpose(1, 2).reshape(batch, time, -1), self.o_proj.weight)


class MLP(nn.Module):
    """The SwiGLU block."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The gate and the input projection run as one matrix product."""
        gate, up = functional.linear(x, torch.cat((self.gate_proj.weight, self.up_proj.weight))).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate) * up, self.down_proj.weight)


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Pre-norm residual block."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and final norm: the parameters below `model.` in a checkpoint."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Model(nn.Module):
    """The language model; the output projection is the embedding matrix."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        frequency = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
        angle = torch.outer(torch.arange(config.max_position_embeddings, dtype=torch.float64), frequency)
        angle = torch.cat((angle, angle), dim=-1)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)
        residual_scale = (2 * config.num_hidden_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = residual_scale if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)

    def hidden(self, tokens: Tensor, run_layer: Callable[..., Tensor]) -> Tensor:
        """The final hidden states, before the last norm."""
        x = self.model.embed_tokens(tokens)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for layer in self.model.layers:
            x = run_layer(layer, x, self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]])
        return x

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of (batch, time) token ids."""
        return functional.linear(self.model.norm(self.hidden(tokens, apply_layer)), self.model.embed_tokens.weight)


def apply_layer(layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Runs one layer; compiled once and shared by all layers."""
    return layer(x, cos, sin)


def token_loss(decoder: Decoder, x: Tensor, targets: Tensor) -> Tensor:
    """Mean next-token loss from the final hidden states."""
    logits = functional.linear(decoder.norm(x), decoder.embed_tokens.weight)
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Loss:
    """Training loss of a model, with the layer and the output head compiled as two regions."""

    def __init__(self, model: Model, compiled: bool) -> None:
        self.model = model
        self.run_layer: Callable[..., Tensor] = torch.compile(apply_layer, dynamic=False) if compiled else apply_layer
        self.head: Callable[..., Tensor] = torch.compile(token_loss, dynamic=False) if compiled else token_loss

    def __call__(self, window: Tensor) -> Tensor:
        """Mean loss of (batch, time + 1) token ids."""
        x = self.model.hidden(window[:, :-1], self.run_layer)
        return self.head(self.model.model, x, window[:, 1:].contiguous())
