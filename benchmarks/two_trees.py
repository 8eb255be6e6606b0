"""Two source trees of outrider on the same requests, in turn: what a change did to speed, and whether a token differs.

    python benchmarks/two_trees.py ../before .          # the older tree first
    python benchmarks/two_trees.py ../before . --rounds 15 --cases plain peagle

Each tree runs in a process of its own, which keeps one engine a case. In every round each tree gets the same prompts
right after the other, so that whatever else the machine does meets both. A ratio is the second tree's tokens a second
over the first's, within a round; the table gives its median and its quartiles. The floor is a ratio of 1: both trees
read the same weights.

Where a process's memory lies can make it faster or slower for all of its life, on a CPU by several percent. So both
trees start anew `--processes` times, and the rounds of all processes count. Name one tree twice to see what is left.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "plain": {"draft": None, "concurrency": 1},
    "plain, 16 at once": {"draft": None, "concurrency": 16},
    "ngram": {"draft": {"method": "ngram", "num_speculative_tokens": 4}, "concurrency": 1},
    "eagle3": {"draft": {"method": "eagle3", "num_speculative_tokens": 4}, "concurrency": 1},
    "peagle": {"draft": {"method": "peagle", "num_speculative_tokens": 7}, "concurrency": 1},
    "peagle, 16 at once": {"draft": {"method": "peagle", "num_speculative_tokens": 7}, "concurrency": 16},
    "sampled": {"draft": {"method": "peagle", "num_speculative_tokens": 7}, "concurrency": 4, "temperature": 0.8},
}
PROMPT_TOKENS = 64


class Tree:
    """A process that runs one tree's engine."""

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        environment = {**os.environ, "PYTHONPATH": str(path.resolve() / "src")}
        command = [sys.executable, __file__, "--worker", "--device", options.device]
        self.path = path
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, case: dict[str, Any]) -> dict[str, Any]:
        """Seconds and tokens of one run of a case."""
        assert self._process.stdin and self._process.stdout
        print(json.dumps(case), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the engine of {self.path} ended with exit code {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def work(device: str) -> None:
    """Runs the cases that standard input names, and prints a line for each."""
    from outrider import LLM, SamplingParams

    engine: tuple[str, LLM] | None = None
    for line in sys.stdin:
        case = json.loads(line)
        name = json.dumps(case["draft"])
        if engine is None or engine[0] != name:
            if engine is not None:
                engine[1].close()
            engine = name, LLM(device=device, speculative_config=case["draft"], max_num_seqs=16)
        prompts = [list(range(10 + row, 10 + row + PROMPT_TOKENS)) for row in range(case["concurrency"])]
        sampling = SamplingParams(
            temperature=case.get("temperature", 0.0), max_tokens=case["new_tokens"], ignore_eos=True, seed=1
        )
        start = time.perf_counter()
        outputs = engine[1].generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
        seconds = time.perf_counter() - start
        tokens = [output.outputs[0].token_ids for output in outputs]
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


class Found:
    """What the rounds of one case found, over all processes."""

    def __init__(self) -> None:
        self.same = True
        self.ratios: list[float] = []
        self.speeds: list[float] = []

    def row(self) -> dict[str, Any]:
        """The ratio of the two trees' speeds, and whether their tokens are the same."""
        low, middle, high = statistics.quantiles(self.ratios, n=4)
        speed = statistics.median(self.speeds)
        return {"ratio": middle, "quartiles": [low, high], "tokens_per_second": speed, "same": self.same}


def compare(trees: list[Tree], case: dict[str, Any], rounds: int, found: Found) -> None:
    """Adds rounds of one case to what was found of it."""
    for number in range(rounds + 1):
        order = trees if number % 2 == 0 else trees[::-1]
        results = {id(tree): tree.run(case) for tree in order}
        before, after = (results[id(tree)] for tree in trees)
        found.same = found.same and before["tokens"] == after["tokens"]
        # the first round compiles and warms up
        if number > 0:
            found.ratios.append(before["seconds"] / after["seconds"])
            found.speeds.append(sum(len(tokens) for tokens in after["tokens"]) / after["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", type=Path, help="the older tree, then the newer one")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=9, help="of each case, in each pair of processes")
    parser.add_argument("--processes", type=int, default=3, help="pairs of processes, one after the other")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.device)
        return
    if len(options.trees) != 2:
        parser.error("give two trees: the older one, then the newer one")
    found = {name: Found() for name in options.cases}
    for _ in range(options.processes):
        trees = [Tree(path, options) for path in options.trees]
        for name in options.cases:
            compare(trees, {**CASES[name], "new_tokens": options.new_tokens}, options.rounds, found[name])
        for tree in trees:
            tree.close()
    rows = {name: found[name].row() for name in options.cases}
    for name, row in rows.items() if not options.json else ():
        low, high = row["quartiles"]
        same = "same tokens" if row["same"] else "TOKENS DIFFER"
        speed = f"{row['tokens_per_second']:8.0f} tokens/s"
        print(f"{name:20} {row['ratio']:.3f} ({low:.3f} to {high:.3f}) {speed}  {same}")
    if options.json:
        print(json.dumps({"trees": [str(path) for path in options.trees], "rows": rows}, indent=2))
    if not all(row["same"] for row in rows.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
