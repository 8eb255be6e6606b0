"""What `make demo` runs: a quick choice of K, then the bundled model writes and edits code with drafts in colour."""

from __future__ import annotations

import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping

from rich.console import Console

from outrider import LLM, SamplingParams
from outrider.bench.prompts import HELD_OUT, read_prompts
from outrider.bench.provenance import provenance
from outrider.draft.base import BUNDLED_MODEL
from outrider.draft.registry import default_method

EDIT = """Add a docstring to this function.

```python
def moving_average(values, width):
    total = 0.0
    averages = []
    for index, value in enumerate(values):
        total += value
        if index >= width:
            total -= values[index - width]
        if index >= width - 1:
            averages.append(total / width)
    return averages
```"""

COMMANDS = [
    ["generate", "--prompt", "def read_json(path):", "--max-tokens", "200", "--compare"],
    ["generate", "--chat", EDIT, "--max-tokens", "200", "--compare"],
]
COUNTS = (0, 2, 4, 7)
"""Numbers of drafts a round (K) to choose from; 0 is the model alone."""
PROMPTS, TOKENS, REPEATS = 2, 40, 3

screen = Console(highlight=False, soft_wrap=True)


def measure() -> dict[int, float]:
    """Tokens a second at each K, on held-out prompts: the median of runs in turn, after one that warms up."""
    method, prompts = default_method(BUNDLED_MODEL), list(read_prompts(HELD_OUT).first(PROMPTS).texts)
    sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    small = {"max_num_seqs": 8, "kv_cache_memory": 64 << 20, "enable_prefix_caching": False}
    configs = {k: {"method": method, "num_speculative_tokens": k} if k else None for k in COUNTS}
    llms = {k: LLM(speculative_config=config, **small) for k, config in configs.items()}
    speeds: dict[int, list[float]] = {k: [] for k in COUNTS}
    for repeat in range(REPEATS + 1):
        for k, llm in llms.items():
            start = time.perf_counter()
            for prompt in prompts:
                llm.generate(prompt, sampling)
            if repeat:
                speeds[k].append(PROMPTS * TOKENS / (time.perf_counter() - start))
    screen.print(f"[dim]{provenance(llms[0].engine.resolved.runner.device)['device']}[/]")
    for llm in llms.values():
        llm.close()
    return {k: statistics.median(found) for k, found in speeds.items()}


def choose(speeds: Mapping[int, float]) -> int:
    """Prints the speeds and returns the fastest K above 0."""
    alone = speeds[0]
    best = max((k for k in speeds if k), key=lambda k: speeds[k])
    screen.print(
        f"\nTokens a second by drafts a round (K): {PROMPTS} held-out prompts of {TOKENS} new tokens,\n"
        f"one at a time, median of {REPEATS} runs.\n"
    )
    for k, speed in speeds.items():
        what = "no drafts" if not k else f"K = {k}"
        mark = "  [bold]taken[/]" if k == best else ""
        screen.print(f"  {what:10}{speed:6.0f}   {speed / alone:.2f}x{mark}")
    if speeds[best] <= alone:
        screen.print("\n[bold yellow]Drafts do not pay on this machine[/]: no K is faster than the model alone.")
        screen.print(f"What follows shows K = {best} all the same. To serve, give --draft none.")
    return best


def main() -> None:
    """Chooses K, then runs each command as a user would type it."""
    screen.print("Loading the bundled model, compiling kernels on the first run, and choosing K ...")
    best = choose(measure())
    for command in COMMANDS:
        asked = [*command, "-k", str(best)]
        screen.print(f"\n$ outrider {shlex.join(asked)}\n", style="bold", markup=False)
        # figures go to stderr: in a file they stand below their text too
        finished = subprocess.run([sys.executable, "-m", "outrider", *asked], stderr=subprocess.STDOUT, check=False)
        if finished.returncode:
            sys.exit(finished.returncode)


if __name__ == "__main__":
    main()
