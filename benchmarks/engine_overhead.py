"""What a step costs beside the model's own forward: planning, batch assembly, verification, drafting, bookkeeping.

    python benchmarks/engine_overhead.py

The bundled model, greedy, no detokenising. The forward and the head are timed inside the step; the rest is overhead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from outrider import LLM, SamplingParams
from outrider.bench.provenance import provenance
from outrider.models.decoder import Decoder


class Stopwatch:
    """Adds up the time spent inside the model."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Any) -> Any:
        def timed(*arguments: Any) -> Any:  # a plain function, so it binds like the method it replaces
            start = time.perf_counter()
            result = function(*arguments)
            self.seconds += time.perf_counter() - start
            return result

        return timed


def measure(concurrency: int, steps: int, draft: dict[str, Any] | None, model_time: Stopwatch) -> dict[str, float]:
    """Medians over decode steps, in microseconds."""
    llm = LLM(device="cpu", speculative_config=draft, enable_prefix_caching=False)
    sampling = SamplingParams(temperature=0.0, max_tokens=1900, ignore_eos=True, detokenize=False)
    prompts = torch.randint(6000, (concurrency, 32), generator=torch.Generator().manual_seed(0)).tolist()
    for index, prompt in enumerate(prompts):
        llm.engine.add(str(index), prompt, sampling)
    whole, inside = [], []
    for step in range(steps):
        model_time.seconds = 0.0
        start = time.perf_counter()
        llm.engine.step()
        if step >= steps // 4:
            whole.append(time.perf_counter() - start)
            inside.append(model_time.seconds)
    for index in range(concurrency):
        llm.engine.abort(str(index))
    overhead = [1e6 * (a - b) for a, b in zip(whole, inside, strict=True)]
    return {
        "concurrency": concurrency,
        "step_us": 1e6 * statistics.median(whole),
        "model_us": 1e6 * statistics.median(inside),
        "overhead_us": statistics.median(overhead),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    model_time = Stopwatch()
    Decoder.forward = model_time.around(Decoder.forward)  # type: ignore[method-assign]
    Decoder.logits = model_time.around(Decoder.logits)  # type: ignore[method-assign]
    ngram = {"method": "ngram", "num_speculative_tokens": 4}
    rows = [
        {"drafts": "none" if draft is None else "ngram", **measure(concurrency, options.steps, draft, model_time)}
        for draft in (None, ngram)
        for concurrency in (1, 64)
    ]
    print(json.dumps({**provenance(torch.device("cpu")), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
