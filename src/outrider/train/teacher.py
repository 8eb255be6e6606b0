"""The frozen target over whole packed rows: features for the head to read, distributions for it to learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.errors import OptionError
from outrider.layers.layer import DecoderLayer
from outrider.layers.mlp import GatedMLP
from outrider.layers.parameter import Allocator
from outrider.layers.weight import dense_tensor
from outrider.load.checkpoint import load_weights, read_json
from outrider.models.config import ModelConfig
from outrider.models.registry import find_model
from outrider.train.attention import Attention, Mask, build_mask
from outrider.train.functional import angles, compiler, rms_norm, rotate
from outrider.train.packing import Batch
from outrider.train.vocabulary import DraftVocabulary

NUM_TAPS = 3
CHUNK_BYTES = 1 << 28
"""Most that a chunk of logits over the target's whole vocabulary takes."""


def default_taps(num_layers: int) -> tuple[int, ...]:
    """EAGLE-3's choice: an early, a middle and a late layer, each the stream entering it."""
    return (2, num_layers // 2, num_layers - 3)


def check_taps(taps: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    """The taps asked for, or the default ones. OptionError where the target has no such layer."""
    if taps is None:
        taps = default_taps(num_layers)
        if min(taps) < 1 or len(set(taps)) != NUM_TAPS:
            raise OptionError(
                f"a target of {num_layers} layers has no layers 2, n//2, n-3: name three with --feature-layers"
            )
    if len(taps) != NUM_TAPS or any(not 0 <= tap <= num_layers for tap in taps):
        raise OptionError(
            f"feature_layers must be {NUM_TAPS} of 0 to {num_layers}: {list(taps)}; "
            "i is the stream entering layer i, and the number of layers is that after the last"
        )
    return tuple(taps)


@dataclass(frozen=True, slots=True)
class Truth:
    """What the target says of a batch; n = B * L rows, row by row."""

    features: Tensor  # [B, L, 3H]
    logits: Tensor  # [n, draft V] of the target at each place, over the draft vocabulary
    drafted: Tensor  # [B, L] bool, whether the target's most likely token can be drafted


class _Weights(NamedTuple):
    """One layer's, as plain tensors, so that one compiled function serves all layers."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None

    @classmethod
    def of(cls, layer: DecoderLayer) -> _Weights:
        attention, mlp = layer.attention, layer.mlp
        assert isinstance(mlp, GatedMLP)
        return cls(
            layer.input_norm.weight,
            dense_tensor(attention.qkv.weight),
            attention.qkv.bias,
            attention.q_norm.weight if attention.q_norm else None,
            attention.k_norm.weight if attention.k_norm else None,
            dense_tensor(attention.out.weight),
            attention.out.bias,
            layer.post_norm.weight,
            dense_tensor(mlp.gate_up.weight),
            mlp.gate_up.bias,
            dense_tensor(mlp.down.weight),
            mlp.down.bias,
        )


def _before(
    x: Tensor, weights: _Weights, cos: Tensor, sin: Tensor, num_kv_heads: int, head_dim: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, L, H] -> turned q [B, Hq, L, D], turned k and v [B, Hkv, L, D]."""
    joined = F.linear(rms_norm(x, weights.input_norm, eps), weights.qkv, weights.qkv_bias)
    heads = joined.view(*joined.shape[:2], -1, head_dim).transpose(1, 2)
    q, k, v = torch.split(heads, [heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    if weights.q_norm is not None and weights.k_norm is not None:
        q, k = rms_norm(q, weights.q_norm, eps), rms_norm(k, weights.k_norm, eps)
    return rotate(q, cos, sin), rotate(k, cos, sin), v.contiguous()


def _after(x: Tensor, mixed: Tensor, weights: _Weights, eps: float) -> Tensor:
    """The residual stream [B, L, H] after a layer, from it before and attention's [B, Hq, L, D]."""
    x = x + F.linear(mixed.transpose(1, 2).flatten(2), weights.out, weights.out_bias)
    gate, up = F.linear(rms_norm(x, weights.mlp_norm, eps), weights.gate_up, weights.gate_up_bias).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, weights.down, weights.down_bias)


class Teacher:
    """A target model with frozen weights, as the engine loads it, run over rows instead of through a cache."""

    def __init__(
        self,
        directory: Path,
        max_length: int,
        taps: Sequence[int] | None,  # tap i: the residual stream entering layer i
        device: torch.device,
        compiled: bool,
    ) -> None:
        """Raises CheckpointError or OptionError. On a CPU weights are widened to float32."""
        self.config = config = ModelConfig.from_dict(read_json(directory / "config.json"))
        if max_length > config.max_position_embeddings:
            raise OptionError(
                f"max_length {max_length} is more than the target's positions: at most {config.max_position_embeddings}"
            )
        self.taps = check_taps(taps, config.num_layers)
        self.dtype = config.dtype if device.type == "cuda" else torch.float32
        model = find_model(config.architecture)(config, max_length, Allocator(device, self.dtype, self.dtype))
        load_weights(directory, model.slots(), model.ignores)
        self.has_qk_norm = model.qk_norm
        self.embedding, self.head = dense_tensor(model.embedding.weight), dense_tensor(model.head.weight)
        self.norm = model.norm.weight
        self._rope = model.rope
        self._layers = [_Weights.of(layer) for layer in model.layers]
        wrap = compiler(compiled)
        self._before, self._after, self._attention = wrap(_before), wrap(_after), Attention(device)

    @torch.no_grad()
    def run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features [B, L, 3H], the taps side by side, and hidden states [B, L, H] after the final norm."""
        place = torch.arange(batch.tokens.shape[1], device=batch.tokens.device).expand_as(batch.tokens)
        mask = build_mask(batch.document, place, torch.zeros_like(place))
        return self._run(batch, mask)

    def _run(self, batch: Batch, mask: Mask) -> tuple[Tensor, Tensor]:
        cos, sin = angles(self._rope, batch.position)
        eps, config = self.config.rms_norm_eps, self.config
        x = F.embedding(batch.tokens, self.embedding)
        streams = []
        for weights in self._layers:
            streams.append(x)
            q, k, v = self._before(x, weights, cos, sin, config.num_kv_heads, config.head_dim, eps)
            x = self._after(x, self._attention(q, k, v, mask), weights, eps)
        streams.append(x)
        return torch.cat([streams[tap] for tap in self.taps], dim=-1), rms_norm(x, self.norm, eps)

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
