"""Writes a trained model as an ordinary Hugging Face checkpoint and checks that `transformers` computes the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from model import Config, Model
from safetensors.torch import save_file

EOS, END_OF_TURN = 0, 2


def write_checkpoint(model: Model, tokenizer: Path, out: Path) -> None:
    """Writes config.json, generation_config.json, model.safetensors (bf16) and the tokenizer files."""
    out.mkdir(parents=True, exist_ok=True)
    config = asdict(model.config)
    theta = config.pop("rope_theta")
    config |= {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "use_sliding_window": False,
        "sliding_window": None,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    generation = {"eos_token_id": [EOS, END_OF_TURN], "pad_token_id": EOS, "do_sample": False}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    weights = {name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in model.named_parameters()}
    save_file(weights, out / "model.safetensors.tmp", metadata={"format": "pt"})
    (out / "model.safetensors.tmp").replace(out / "model.safetensors")
    for path in tokenizer.iterdir():
        shutil.copy(path, out / path.name)


def check_checkpoint(folder: Path, tolerance: float = 2e-3) -> float:
    """Loads the checkpoint in `transformers` and here, in fp32 on the CPU; returns the largest logit difference."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    theirs, info = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {kind: info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    if wrong:
        raise ValueError(f"transformers reports {wrong}")
    ours = Model(Config())
    ours.load_state_dict({name: value.float() for name, value in load_file(folder / "model.safetensors").items()})
    ids = AutoTokenizer.from_pretrained(folder)("def main(argv):\n    return [x for x in argv]\n" * 8)["input_ids"]
    tokens = torch.tensor([ids])
    with torch.no_grad():
        difference = float((theirs.eval()(tokens).logits - ours(tokens)).abs().max())
    if not difference < tolerance:
        raise ValueError(f"logits differ from those of transformers by {difference}")
    return difference


if __name__ == "__main__":
    import sys

    print(f"largest logit difference {check_checkpoint(Path(sys.argv[1])):.2e}")
