"""Tiny draft heads of random weights for the tiny targets of `checkpoints`, in the speculators layout."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoints import SIZES
from outrider.draft.head import HeadDrafter
from outrider.draft.none import NoDrafter
from outrider.draft.registry import METHODS

MASK_TOKEN = 7
TAPS = [0, 1, 2]


def head_tensors(
    parallel: bool, *, num_layers: int = 2, draft_vocab_size: int | None = None, qk_norm: bool = False, **sizes: Any
) -> dict[str, Tensor]:
    """Every tensor of a head, by the speculators layout's names. Norms are drawn too: leaving one out must show."""
    size = {**SIZES, **sizes}
    hidden, vocab, wide = size["hidden_size"], size["vocab_size"], 3 * size["hidden_size"]
    head_dim = size["head_dim"]
    query, key = size["num_attention_heads"] * head_dim, size["num_key_value_heads"] * head_dim
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> Tensor:
        return 0.15 * torch.randn(shape, generator=generator)

    def norm(width: int) -> Tensor:
        return 1 + 0.3 * torch.randn(width, generator=generator)

    own_vocab = draft_vocab_size or vocab
    tensors = {
        "embed_tokens.weight": draw(vocab, hidden),
        "fc.weight": draw(hidden, wide),
        "layers.0.hidden_norm.weight": norm(hidden),
        "norm.weight": norm(hidden),
        "lm_head.weight": draw(own_vocab, hidden),
    }
    for index in range(num_layers):
        layer, width = f"layers.{index}.", hidden if index else 2 * hidden
        tensors |= {
            f"{layer}input_layernorm.weight": norm(hidden),
            f"{layer}self_attn.q_proj.weight": draw(query, width),
            f"{layer}self_attn.k_proj.weight": draw(key, width),
            f"{layer}self_attn.v_proj.weight": draw(key, width),
            f"{layer}self_attn.o_proj.weight": draw(hidden, query),
            f"{layer}post_attention_layernorm.weight": norm(hidden),
            f"{layer}mlp.gate_proj.weight": draw(size["intermediate_size"], hidden),
            f"{layer}mlp.up_proj.weight": draw(size["intermediate_size"], hidden),
            f"{layer}mlp.down_proj.weight": draw(hidden, size["intermediate_size"]),
        }
        if qk_norm:
            tensors |= {f"{layer}self_attn.{part}_norm.weight": norm(head_dim) for part in "qk"}
    if own_vocab != vocab:
        ids = torch.randperm(vocab, generator=generator)[:own_vocab].sort().values
        marked = torch.zeros(vocab, dtype=torch.bool)
        marked[ids] = True
        tensors |= {"d2t": ids - torch.arange(own_vocab), "t2d": marked}
    if parallel:
        tensors["mask_hidden"] = draw(1, 1, wide)
    return tensors


def layer_config(num_layers: int, qk_norm: bool, **sizes: Any) -> dict[str, Any]:
    """The draft layers' own config, as transformers would write it."""
    size = {**SIZES, **sizes}
    kept = {name: value for name, value in size.items() if not name.endswith("token_id")}
    return {
        **kept,
        "num_hidden_layers": num_layers,
        "model_type": "qwen3" if qk_norm else "llama",
        "rms_norm_eps": 1e-6,
    }


def write_head(
    path: Path,
    parallel: bool,
    *,
    num_layers: int = 2,
    draft_vocab_size: int | None = None,
    qk_norm: bool = False,
    config: dict[str, Any] | None = None,  # what to say otherwise; None leaves a key out
    sizes: dict[str, Any] | None = None,  # of target and head, where not those of `checkpoints`
) -> Path:
    """A head in the speculators layout."""
    size = {**SIZES, **(sizes or {})}
    tensors = head_tensors(
        parallel, num_layers=num_layers, draft_vocab_size=draft_vocab_size, qk_norm=qk_norm, **(sizes or {})
    )
    said = {
        "speculators_model_type": "peagle" if parallel else "eagle3",
        "architectures": ["PEagleSpeculator" if parallel else "Eagle3Speculator"],
        "transformer_layer_config": layer_config(num_layers, qk_norm, **(sizes or {})),
        "draft_vocab_size": draft_vocab_size or size["vocab_size"],
        "target_hidden_size": size["hidden_size"],
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": TAPS,
        "mask_token_id": MASK_TOKEN if parallel else None,
        **(config or {}),
    }
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    kept = {name: value for name, value in said.items() if value is not None}
    (path / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    return path


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="outrider-heads-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def tiny_head(parallel: bool) -> str:
    """The directory of a head for the tiny Qwen3 and Llama, written once a process."""
    return str(write_head(_folder() / f"parallel-{parallel}", parallel))


def drafting(method: str, num_drafts: int = 3) -> dict[str, Any]:
    """`speculative_config` of a method, with a tiny head if it reads one."""
    if method == NoDrafter.name:
        return {"method": method}
    config: dict[str, Any] = {"method": method, "num_speculative_tokens": num_drafts}
    drafter = METHODS[method]
    return {**config, "model": tiny_head(drafter.parallel)} if issubclass(drafter, HeadDrafter) else config
