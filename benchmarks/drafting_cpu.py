"""What the bundled draft heads are worth at batch 1: P-EAGLE and EAGLE-3 at several K, runs in turn.

    python benchmarks/drafting_cpu.py

Greedy, the bundled model, held-out prompts. Each row is a ratio to plain decoding measured in the same rounds, and
says whether every prompt's text is the same. A step's floor is stated beside it: with drafts as without, no step is
faster than reading the target's weights once, so tokens a second cannot grow by more than the acceptance length.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from _pairs import in_turn, ratio, spread

from outrider import LLM, AcceptanceReport, SamplingParams
from outrider.bench.bandwidth import read_bandwidth
from outrider.bench.prompts import HELD_OUT, read_prompts
from outrider.bench.provenance import provenance

PLAIN = "none"


def measure(settings: dict[str, tuple[str, int]], num_prompts: int, max_tokens: int, rounds: int) -> dict[str, Any]:
    """Speed-up, acceptance and equality of text for each setting, (method, K) by name."""
    texts = read_prompts(HELD_OUT).first(num_prompts).texts
    engines = {PLAIN: LLM(device="cpu", enable_prefix_caching=False, max_num_seqs=4)} | {
        name: LLM(
            device="cpu",
            enable_prefix_caching=False,
            max_num_seqs=4,
            speculative_config={"method": method, "num_speculative_tokens": drafts},
        )
        for name, (method, drafts) in settings.items()
    }
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    outputs: dict[str, list[list[int]]] = {}
    reports: dict[str, AcceptanceReport] = {}

    def runner(name: str) -> Callable[[], None]:
        def run() -> None:
            answers = [engines[name].generate(text, sampling)[0] for text in texts]
            outputs[name] = [answer.outputs[0].token_ids for answer in answers]
            reports[name] = sum((answer.acceptance for answer in answers), AcceptanceReport())

        return run

    seconds = in_turn({name: runner(name) for name in engines}, rounds)
    num_tokens = sum(len(tokens) for tokens in outputs[PLAIN])
    plain_ms = 1e3 * statistics.median(seconds[PLAIN]) / num_tokens
    weights = engines[PLAIN].engine.resolved.runner.memory.weights
    rows = [
        {
            "method": method,
            "num_speculative_tokens": drafts,
            "speedup": ratio(seconds, PLAIN, name),
            "speedup_range": spread(seconds, PLAIN, name),
            "identical": sum(a == b for a, b in zip(outputs[name], outputs[PLAIN], strict=True)),
            "acceptance_length": reports[name].length,
            "rates": list(reports[name].rates),
            "step_over_plain_step": reports[name].length / ratio(seconds, PLAIN, name),
        }
        for name, (method, drafts) in settings.items()
    ]
    best = {
        method: max((row for row in rows if row["method"] == method), key=lambda row: float(row["speedup"]))
        for method in dict.fromkeys(method for method, _ in settings.values())
    }
    bandwidth = read_bandwidth(torch.device("cpu"))
    return {
        "prompts": len(texts),
        "tokens": num_tokens,
        "plain_ms_per_token": plain_ms,
        "floor_ms_per_step": 1e3 * weights / bandwidth,
        "best": {method: [row["num_speculative_tokens"], row["speedup"]] for method, row in best.items()},
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["peagle", "eagle3"])
    parser.add_argument("-k", "--num-speculative-tokens", nargs="+", type=int, default=[3, 4, 5, 6, 7])
    options = parser.parse_args()
    settings = {
        f"{method}-{drafts}": (method, drafts)
        for method in options.methods
        for drafts in options.num_speculative_tokens
    }
    result = measure(settings, options.num_prompts, options.max_tokens, options.rounds)
    print(json.dumps({**provenance(torch.device("cpu")), **result}, indent=2))


if __name__ == "__main__":
    main()
