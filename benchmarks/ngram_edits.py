"""What n-gram drafts are worth where text repeats itself: code edits, with and without, runs in turn.

    python benchmarks/ngram_edits.py

Greedy, batch 1, the bundled model and its edit prompts, which come from files it was not trained on.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from _pairs import in_turn, ratio, spread

from outrider import LLM, SamplingParams
from outrider.bench.prompts import EDITS, read_prompts
from outrider.bench.provenance import provenance


def measure(num_prompts: int, num_drafts: int, max_tokens: int, rounds: int) -> dict[str, Any]:
    """The speed-up over all prompts, and whether every output is the same."""
    texts = read_prompts(EDITS).first(num_prompts).texts
    drafting = {"method": "ngram", "num_speculative_tokens": num_drafts}
    engines = {
        "with": LLM(device="cpu", speculative_config=drafting, enable_prefix_caching=False),
        "without": LLM(device="cpu", enable_prefix_caching=False),
    }
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    outputs: dict[str, list[list[int]]] = {}

    def runner(name: str) -> Any:
        def run() -> None:
            answers = [engines[name].generate(text, sampling)[0] for text in texts]
            outputs[name] = [answer.outputs[0].token_ids for answer in answers]

        return run

    seconds = in_turn({name: runner(name) for name in engines}, rounds)
    pairs = list(zip(outputs["with"], outputs["without"], strict=True))
    return {
        "prompts": len(texts),
        "num_speculative_tokens": num_drafts,
        "identical": sum(a == b for a, b in pairs),
        "speedup": ratio(seconds, "without", "with"),
        "speedup_range": spread(seconds, "without", "with"),
        "tokens": sum(len(tokens) for tokens, _ in pairs),
        "acceptance": engines["with"].acceptance().to_dict(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("-k", "--num-speculative-tokens", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    result = measure(options.num_prompts, options.num_speculative_tokens, options.max_tokens, options.rounds)
    print(json.dumps({**provenance(torch.device("cpu")), **result}, indent=2))


if __name__ == "__main__":
    main()
