"""EAGLE-3 from scratch: no cache, no batch, float64, every row computed anew for every guess (arXiv 2503.01840).

Row i stands at position i. It holds token i + 1 and the target's features of position i; past the last token known,
the guess before it and what the network gave at the row before. Attention is plain causal.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor


class Round(NamedTuple):
    """All rows of one round, and what they say."""

    ids: list[int]  # of every row, from position 0
    hidden: Tensor  # [rows, H], what goes in beside them
    logits: Tensor  # [K, draft vocabulary]
    drafts: list[int]  # [K], the likeliest, as the target's tokens


@dataclass
class Head:
    """A checkpoint's tensors by the speculators layout's names, and what its config says."""

    config: dict[str, Any]
    layer: dict[str, Any]  # of the draft layers
    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + self.layer["rms_norm_eps"]).rsqrt() * self[f"{name}.weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self[f"{name}.weight"].T + self.tensors.get(f"{name}.bias", 0.0)

    def project(self, features: Tensor) -> Tensor:
        """[n, 3 H] -> [n, H]."""
        if "fc_norm.0.weight" in self.tensors:
            taps = features.chunk(3, dim=-1)
            features = torch.cat([self.norm(tap, f"fc_norm.{j}") for j, tap in enumerate(taps)], dim=-1)
        if "input_norm.weight" in self.tensors:
            features = self.norm(features, "input_norm")
        return self.linear(features, "fc")

    def rotate(self, x: Tensor) -> Tensor:
        """[n, heads, D], row i at position i."""
        rope = self.layer.get("rope_parameters") or self.layer
        width = x.shape[-1]
        frequency = rope.get("rope_theta", 10_000.0) ** -(torch.arange(0, width, 2).double() / width)
        angle = torch.arange(len(x)).double()[:, None, None] * frequency
        cos, sin = angle.cos(), angle.sin()
        left, right = x.chunk(2, dim=-1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)

    def attention(self, x: Tensor, name: str) -> Tensor:
        width, n = self.layer["head_dim"], len(x)
        q, k, v = (self.linear(x, f"{name}.{part}_proj").view(n, -1, width) for part in "qkv")
        if f"{name}.q_norm.weight" in self.tensors:
            q, k = self.norm(q, f"{name}.q_norm"), self.norm(k, f"{name}.k_norm")
        q, k = self.rotate(q), self.rotate(k)
        k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], dim=1) for each in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) * width**-0.5
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        return self.linear(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(n, -1), f"{name}.o_proj")

    def mlp(self, x: Tensor, name: str) -> Tensor:
        gate = torch.nn.functional.silu(self.linear(x, f"{name}.gate_proj"))
        return self.linear(gate * self.linear(x, f"{name}.up_proj"), f"{name}.down_proj")

    def __call__(self, ids: list[int], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[n, draft vocabulary] logits, and [n, H] for the row after."""
        normed = self.norm(hidden, "layers.0.hidden_norm")
        stream = normed if self.config.get("norm_before_residual", False) else hidden
        token = self.norm(self["embed_tokens.weight"][ids], "layers.0.input_layernorm")
        x = torch.cat((token, normed), dim=-1)
        for index in range(self.layer["num_hidden_layers"]):
            name = f"layers.{index}"
            if index:
                x = self.norm(stream, f"{name}.input_layernorm")
            stream = stream + self.attention(x, f"{name}.self_attn")
            stream = stream + self.mlp(self.norm(stream, f"{name}.post_attention_layernorm"), f"{name}.mlp")
        normed = self.norm(stream, "norm")
        logits = normed @ self["lm_head.weight"].T
        return logits, normed if self.config.get("norm_output", False) else stream

    def token(self, column: int) -> int:
        """The target's token for one of the head's own."""
        return column + int(self["d2t"][column]) if "d2t" in self.tensors else column


def read(directory: Path, target: dict[str, Tensor]) -> Head:
    """A head in any layout; `target` is the target's checkpoint, for what the head borrows of it."""
    config = json.loads((directory / "config.json").read_text())
    safe, pickled = directory / "model.safetensors", directory / "pytorch_model.bin"
    raw = load_file(safe) if safe.exists() else torch.load(pickled, weights_only=True)
    borrowed = {
        "embed_tokens.weight": target["model.embed_tokens.weight"],
        "lm_head.weight": target.get("lm_head.weight", target["model.embed_tokens.weight"]),
    }
    named = {name.removeprefix("model.").replace("midlayer.", "layers.0."): tensor for name, tensor in raw.items()}
    tensors = {
        name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in (borrowed | named).items()
    }
    return Head(config, config.get("transformer_layer_config", config), tensors)


def draft(head: Head, tokens: list[int], features: Tensor, num_drafts: int, drawn: list[int] | None = None) -> Round:
    """tokens: the n + 1 committed, the target's newest last; features [n, 3 H] of all but that one.

    drawn: the drafts to go on from, where they are not the likeliest.
    """
    ids, hidden = tokens[1:], head.project(features)
    drafts, logits = [], []
    while True:
        scores, fed = head(ids, hidden)
        logits.append(scores[-1])
        drafts.append(head.token(int(scores[-1].argmax())))
        if len(drafts) == num_drafts:
            return Round(ids, hidden, torch.stack(logits), drafts)
        ids, hidden = [*ids, (drawn or drafts)[len(drafts) - 1]], torch.cat((hidden, fed[-1:]))
