"""Writes a head in the speculators format, which vLLM and this engine read as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from outrider.load.checkpoint import read_json
from outrider.models.config import DTYPES, ModelConfig
from outrider.train.objective import Objective

EMBEDDING = "embed_tokens.weight"
LM_HEAD = "lm_head.weight"
FAMILIES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""Kinds of draft layers, and the class of transformers whose config describes them."""


def export_head(
    out: Path,
    objective: Objective,
    target: Path,  # directory of the target's checkpoint
    *,
    target_name: str,  # by which a reader finds the target
    num_speculative_tokens: int,
    with_embedding: bool,
    with_lm_head: bool,
    dtype: str,
) -> None:
    """Writes config.json and model.safetensors into `out`."""
    head = objective.head
    described = read_json(target / "config.json")
    config: dict[str, Any] = {
        "architectures": [objective.architecture],
        "speculators_model_type": objective.name,
        "speculators_config": {
            "algorithm": objective.name,
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": num_speculative_tokens}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": target_name, "architectures": described["architectures"]},
        },
        "transformer_layer_config": layer_config(head.config.layer, described, dtype),
        "draft_vocab_size": head.config.draft_vocab_size,
        "target_hidden_size": head.config.target_hidden_size,
        "norm_before_residual": head.config.norm_before_residual,
        "norm_before_fc": head.config.norm_before_fc,
        "fc_norm": head.config.fc_norm,
        "norm_output": head.config.norm_output,
        "eagle_aux_hidden_state_layer_ids": list(head.config.aux_layer_ids or ()),
        "embed_requires_grad": head.embed_tokens.weight.requires_grad,
        "dtype": dtype,
    }
    if head.config.parallel:
        config["mask_token_id"] = head.config.mask_token_id
    targets_own = {EMBEDDING: not with_embedding, LM_HEAD: not with_lm_head}
    weights = {
        name: tensor.detach().to("cpu", DTYPES[dtype] if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in head.state_dict().items()
        if not targets_own.get(name, False)
    }
    save_file(weights, out / "model.safetensors.tmp", metadata={"format": "pt"})
    (out / "model.safetensors.tmp").replace(out / "model.safetensors")
    write_json(out / "config.json", config)


def layer_config(config: ModelConfig, target: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The draft layers as a Hugging Face config; rotation is the target's, as the target's config says it."""
    rope = {
        key: target[key] for key in ("rope_theta", "rope_scaling", "rope_parameters") if target.get(key) is not None
    }
    return {
        "model_type": next(kind for kind, family in FAMILIES.items() if family == config.architecture),
        "architectures": [config.architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": target["max_position_embeddings"],
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        **rope,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": dtype,
    }


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON object, indented."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
