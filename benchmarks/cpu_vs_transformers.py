"""Batch-1 decoding on a CPU against transformers' `generate`: same weights, same prompt, runs in turn.

    python benchmarks/cpu_vs_transformers.py                      # the bundled model
    python benchmarks/cpu_vs_transformers.py --shape qwen3-0.6b   # random weights of that shape

Greedy, bfloat16 weights, prompt 128, 256 new tokens, no speculation. Beside the ratio stands the floor: the bytes
of weights that a step must read over the bandwidth at which this machine reads, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from _pairs import in_turn, ratio, spread
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from outrider import LLM, SamplingParams
from outrider.bench.bandwidth import read_bandwidth
from outrider.bench.floors import Reads
from outrider.bench.provenance import provenance
from outrider.load.hub import BUNDLED

SHAPES = Path(__file__).parent / "shapes"
BATCH = 16


def random_checkpoint(shape: str, directory: str) -> Path:
    """Writes a checkpoint of random weights in a public model's shape."""
    torch.manual_seed(0)
    config = Qwen3Config(**json.loads((SHAPES / shape / "config.json").read_text()))
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0.0, 0.02)
    model.tie_weights()
    model.save_pretrained(directory)
    return Path(directory)


def measure(checkpoint: Path, prompt_len: int, new_tokens: int, rounds: int, batch: bool) -> dict[str, Any]:
    """Tokens a second of both, and of our own batch of 16 if asked."""
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    llm = LLM(str(checkpoint), dtype="bfloat16", device="cpu", max_model_len=1024, enable_prefix_caching=False)
    vocab = reference.config.vocab_size
    prompts = torch.randint(vocab, (BATCH, prompt_len), generator=torch.Generator().manual_seed(0))
    sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    reference.generation_config.eos_token_id = None
    reference.generation_config.pad_token_id = 0

    def theirs() -> object:
        return reference.generate(prompts[:1], max_new_tokens=new_tokens, do_sample=False, use_cache=True)

    def ours() -> object:
        return llm.generate(prompts[0].tolist(), sampling)

    def ours_batched() -> object:
        return llm.generate(prompts.tolist(), sampling)

    contestants = {"transformers": theirs, "outrider": ours}
    if batch:
        contestants["outrider_batch_16"] = ours_batched
    seconds = in_turn(contestants, rounds)
    bandwidth = read_bandwidth(torch.device("cpu"))
    floor = Reads.of(llm.engine.resolved).target / bandwidth
    per_token = statistics.median(seconds["outrider"]) / new_tokens
    rates = {
        name: (BATCH if name.endswith("16") else 1) * new_tokens / statistics.median(times)
        for name, times in seconds.items()
    }
    result = {
        "tokens_per_second": rates,
        "speedup": ratio(seconds, "transformers", "outrider"),
        "speedup_range": spread(seconds, "transformers", "outrider"),
        "read_gb_per_second": bandwidth / 1e9,
        "floor_ms_per_token": 1e3 * floor,
        "measured_ms_per_token": 1e3 * per_token,
        "floor_over_measured": floor / per_token,
        "rounds": rounds,
    }
    if batch:
        result["batch_16_over_batch_1"] = BATCH * ratio(seconds, "outrider", "outrider_batch_16")
    llm.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="bundled", help="bundled, or a folder of benchmarks/shapes")
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-batch", dest="batch", action="store_false", help="leave out the batch of 16")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        bundled = options.shape == "bundled"
        checkpoint = BUNDLED / "model" if bundled else random_checkpoint(options.shape, directory)
        result = measure(checkpoint, options.prompt_len, options.new_tokens, options.rounds, options.batch)
    print(json.dumps({"shape": options.shape, **provenance(torch.device("cpu")), **result}, indent=2))


if __name__ == "__main__":
    main()
