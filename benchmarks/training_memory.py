"""What training a head costs on one GPU: tokens a second of each method, and peak memory by sequence length.

    python benchmarks/training_memory.py --out my_training
    python benchmarks/training_memory.py --device cpu --lengths 256 512 --speed-length 256 --speed-tokens 512 --steps 4

Writes OUT.json, row by row, and OUT.svg where matplotlib is installed. The target is the bundled model with its
positions raised: cost does not depend on what it says. Speed is that of many rows of one length; memory that of a step
of one row.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from outrider.bench.provenance import provenance
from outrider.load.hub import BUNDLED
from outrider.train.options import TrainOptions
from outrider.train.registry import OBJECTIVES
from outrider.train.run import train

MIB = 1 << 20


def stretched(folder: Path, positions: int) -> Path:
    """The bundled model with more positions."""
    target = folder / "target"
    target.mkdir()
    for file in (BUNDLED / "model").iterdir():
        (target / file.name).symlink_to(file)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps({**config, "max_position_embeddings": positions}))
    return target


def documents(path: Path, length: int, count: int) -> Path:
    """Random tokens: `count` documents that fill a row each."""
    draw = random.Random(0)
    with open(path, "w") as file:
        for _ in range(count):
            file.write(json.dumps({"token_ids": draw.choices(range(8, 6144), k=length)}) + "\n")
    return path


def measure(folder: Path, target: Path, method: str, length: int, tokens: int, **options: Any) -> dict[str, Any]:
    """One short run."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()
    data = documents(folder / "data.jsonl", length, max(2, tokens // length))
    asked = {"log_every": max(1, options["steps"] // 2), **options}
    figures = train(
        TrainOptions(
            model=str(target),
            method=method,
            data=[str(data)],
            held_out=str(documents(folder / "held_out.jsonl", length, 1)),
            out=str(folder / "head"),
            max_length=length,
            batch_tokens=tokens,
            **asked,
        )
    )
    measured = {key: figures[key] for key in ("tokens_per_second", "peak_memory")}
    partitions = options.get("partitions", 1)
    row = {"method": method, "max_length": length, "batch_tokens": tokens, "partitions": partitions, **measured}
    print(json.dumps(row), flush=True)
    return row


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Peak memory against sequence length, a line for each method and number of partitions."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for method, partitions in sorted({(row["method"], row["partitions"]) for row in rows}):
        line = [row for row in rows if (row["method"], row["partitions"]) == (method, partitions)]
        label = method if partitions == 1 else f"{method}, {partitions} partitions"
        axes.plot([row["max_length"] for row in line], [row["peak_memory"] / MIB for row in line], "o-", label=label)
    lengths = sorted({row["max_length"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_xlabel("sequence length (tokens), one row a step")
    axes.set_ylabel("peak memory (MiB)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("training_memory"), help="path without a suffix")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--partitions", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--speed-length", type=int, default=1024)
    parser.add_argument("--speed-tokens", type=int, default=65536)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    shared: dict[str, Any] = {"device": options.device, "steps": options.steps, "compile": options.compile}
    result = {**provenance(torch.device(options.device)), "speed": [], "memory": []}

    def add(kind: str, row: dict[str, Any]) -> None:
        result[kind].append(row)
        options.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")

    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        target = stretched(folder, max(*options.lengths, options.speed_length))
        for method in sorted(OBJECTIVES):
            add("speed", measure(folder, target, method, options.speed_length, options.speed_tokens, **shared))
        shared["steps"] = 2
        for method, objective in sorted(OBJECTIVES.items(), reverse=True):
            for partitions in options.partitions if objective.parallel else [1]:
                for length in options.lengths:
                    add("memory", measure(folder, target, method, length, length, partitions=partitions, **shared))
    if find_spec("matplotlib") is None:
        print(f"no plot: matplotlib is not installed; the figures are in {options.out.with_suffix('.json')}")
    else:
        plot(result["memory"], options.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
