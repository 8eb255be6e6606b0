"""The decode table of one GPU: models x drafting methods x concurrencies, beside what vLLM 0.26 gave there.

    python benchmarks/gpu_decode_table.py --output my_decode.json
    python benchmarks/gpu_decode_table.py --device cpu --models tiny --steps 10 --concurrency 1,4   (a rehearsal)

Random weights of the public shapes in `benchmarks/shapes`, prompts of 128 random tokens, 512 new ones, greedy, drafts
accepted at given unconditional rates. Each model and method is built once, for the largest concurrency, and all
concurrencies are measured on it: tokens a second of the steps in which all requests decode, at most `--steps` of them.
A cell that fails is reported with its error and the rest go on; the file is written anew after every cell.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from outrider.bench.bandwidth import read_bandwidth
from outrider.bench.provenance import provenance
from outrider.bench.speed import (
    Row,
    Workload,
    configuration,
    device_of,
    give_back,
    measure,
    memory,
    times_of_parts,
    with_parts,
)
from outrider.device import free_memory
from outrider.engine.llm import LLM
from outrider.options import EngineOptions

SHAPES = Path(__file__).parent / "shapes"

MODELS = ("qwen3-8b", "qwen3-0.6b")
METHODS: dict[str, tuple[str | None, int]] = {
    "none": (None, 0),
    "eagle3-3": ("eagle3", 3),
    "eagle3-7": ("eagle3", 7),
    "peagle-3": ("peagle", 3),
    "peagle-7": ("peagle", 7),
}
"""The draft head, by the end of its directory's name, and K."""

LEFT_OUT = {("qwen3-0.6b", "peagle-3")}
"""What vLLM was not measured at; `--methods` brings it back."""

RATES = (0.75, 0.60, 0.48, 0.38, 0.30, 0.24, 0.19)
"""Share of rounds that get as far as each draft: an acceptance length of 3.94 at K=7, 2.83 at K=3."""

Cell = tuple[float, float]  # tokens a second, milliseconds a step

VLLM: dict[str, dict[str, dict[int, Cell]]] = {
    "qwen3-8b": {
        "none": {1: (148, 6.77), 8: (1143, 7.00), 32: (4212, 7.60), 128: (12727, 10.06)},
        "eagle3-3": {1: (355, 7.87), 8: (2779, 8.13), 32: (10087, 9.04), 128: (20657, 17.56)},
        "eagle3-7": {1: (406, 9.22), 8: (3278, 9.65), 32: (10862, 11.70), 128: (16298, 30.82)},
        "peagle-3": {1: (379, 7.38), 8: (2937, 7.70), 32: (10645, 8.61), 128: (20065, 17.95)},
        "peagle-7": {1: (520, 7.45), 8: (4020, 7.86), 32: (12127, 10.35), 128: (16310, 30.88)},
    },
    "qwen3-0.6b": {
        "none": {1: (437, 2.29), 8: (3464, 2.31), 32: (11239, 2.85), 128: (30006, 4.27)},
        "eagle3-3": {1: (803, 3.43), 8: (7024, 3.23), 32: (18287, 5.00), 128: (48699, 7.45)},
        "eagle3-7": {1: (1011, 3.62), 8: (6088, 5.20), 32: (19132, 6.65), 128: (49512, 10.14)},
        "peagle-7": {1: (780, 4.99), 8: (5600, 5.66), 32: (17383, 7.18), 128: (51496, 9.80)},
    },
}
VLLM_SOURCE = (
    "vLLM 0.26 on one H100: bfloat16, random weights, prompt 128, 512 new tokens, greedy, CUDA graphs, async "
    "scheduling, the same acceptance; its V2 runner, P-EAGLE its V1 runner; the steps in which all requests decode. "
    "Measured for issue 4 of this project, where the table stands."
)

VLLM_READS = 3.01e12
"""Bytes a second that the H100 read. On a GPU that reads more, `least_ratio` grants vLLM all of that in every step."""

ROUNDS = 320
"""Rounds of drafts that a cell takes at least, in up to four runs: their acceptance is drawn, and few say little."""

HEADINGS = f"{'':24}{'c':>5}{'tokens/s':>11}{'step ms':>9}{'floor':>7}{'accepted':>10}{'gap':>7}"
VLLM_HEADINGS = f"{'vLLM tokens/s':>16}{'step ms':>9}{'ratio':>8}{'nominal':>9}{'least':>8}"


def options_of(arguments: argparse.Namespace, model: str, method: str) -> EngineOptions:
    """The engine of one model and method, recorded at the concurrencies that are measured and no others."""
    head, count = METHODS[method]
    drafting: dict[str, Any] = {}
    if head is not None:
        drafting = {
            "speculative_config": {"model": str(SHAPES / f"{model}-{head}"), "num_speculative_tokens": count},
            "verifier": "synthetic",
            "synthetic_rates": RATES[:count],
        }
    return EngineOptions(
        model=str(SHAPES / model),
        load_format="dummy",
        device=arguments.device,
        runner=arguments.runner,
        max_num_seqs=max(arguments.concurrency),
        max_model_len=arguments.max_model_len,
        capture_sizes=sorted(set(arguments.concurrency)),
        **drafting,
    )


def table(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures what was asked for, prints it, and writes it as it comes."""
    begun = time.perf_counter()
    device = device_of(EngineOptions(device=arguments.device))
    bandwidth = read_bandwidth(device)
    result: dict[str, Any] = {
        **provenance(device),
        "read_gb_per_second": bandwidth / 1e9,
        "synthetic_rates": RATES,
        "vllm": VLLM_SOURCE,
        "engines": [],
        "cells": [],
    }
    print(f"{result['device']}, reads {bandwidth / 1e9:,.0f} GB/s\n{HEADINGS}{VLLM_HEADINGS}", flush=True)
    for model, method in pairs(arguments):
        if arguments.budget is not None and time.perf_counter() - begun > arguments.budget:
            tell(result, {"model": model, "method": method, "concurrency": None, "error": "no time was left"})
        elif arguments.isolate:
            isolated(arguments, model, method, result)
        else:
            for cell in cells(arguments, model, method, bandwidth, result):
                tell(result, cell)
                write(result, arguments.output)
        write(result, arguments.output)
    result["seconds"] = time.perf_counter() - begun
    write(result, arguments.output)
    return result


def pairs(arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Models and methods, the first of each first."""
    for model in arguments.models:
        for method in arguments.methods or METHODS:
            if arguments.methods or (model, method) not in LEFT_OUT:
                yield model, method


def cells(
    arguments: argparse.Namespace, model: str, method: str, bandwidth: float, result: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """One model and method at every concurrency. What fails is a cell with an error; nothing is raised."""
    options = options_of(arguments, model, method)
    workload = Workload(arguments.input_len, arguments.output_len, max_steps=arguments.steps or None)
    named = {"model": model, "method": method}
    device = device_of(options)
    rows: list[Row] = []
    try:
        free_before, start = free_memory(device), time.perf_counter()
        with LLM.from_options(options) as llm:
            built = time.perf_counter() - start
            workload.check(llm, arguments.concurrency)
            for concurrency in arguments.concurrency:
                runs = min(-(-ROUNDS // (concurrency * (arguments.steps or ROUNDS))), 4)
                try:
                    rows.append(measure(llm, workload, concurrency, max(runs, arguments.repeats), bandwidth))
                    yield cell_of(named, rows[-1], bandwidth)
                except Exception as error:
                    yield {**named, "concurrency": concurrency, "error": said(error)}
            engine = {**configuration(llm, workload), **named, "build_seconds": built}
            result["engines"].append(engine | {"memory": memory(llm, free_before)})
        del llm
    except Exception as error:
        yield {**named, "concurrency": None, "error": said(error)}
    give_back(device)
    if arguments.parts and rows:
        try:
            timed = times_of_parts(options, workload, [row.concurrency for row in rows])
            for row in rows:
                place = result["cells"].index(cell_of(named, row, bandwidth))
                result["cells"][place] = cell_of(named, with_parts(row, timed[row.concurrency]), bandwidth)
                print_parts(result["cells"][place])
        except Exception as error:
            yield {**named, "concurrency": None, "error": f"parts: {said(error)}"}
        give_back(device)


def cell_of(named: dict[str, str], row: Row, bandwidth: float) -> dict[str, Any]:
    """A row with its names, what vLLM gave there, and ratios to it: as measured, and at the nominal acceptance length.

    The latter holds the steps' times against each other, since a run of few rounds may have been lucky; the least of
    what that may be is as if vLLM's steps took as much less time here as this device (`bandwidth`) reads faster.
    """
    nominal = 1.0 + sum(RATES[: METHODS[named["method"]][1]])
    nominal_rate = 1e3 * row.concurrency * nominal / row.step_ms
    theirs = VLLM.get(named["model"], {}).get(named["method"], {}).get(row.concurrency)
    ratio = row.steady_tokens_per_second / theirs[0] if theirs and row.steady_tokens_per_second else None
    told = {"tokens_per_second": theirs[0], "step_ms": theirs[1]} if theirs else None
    return {
        **named,
        **asdict(row),
        "gap_share": row.gap_share,
        "nominal_tokens_per_second": nominal_rate,
        "vllm": told,
        "ratio": ratio,
        "nominal_ratio": nominal_rate / theirs[0] if theirs else None,
        "least_ratio": nominal_rate / theirs[0] / max(bandwidth / VLLM_READS, 1.0) if theirs else None,
        "error": None,
    }


def said(error: Exception) -> str:
    """An error in a line; where it came from goes to stderr."""
    traceback.print_exception(error, limit=-4)
    cause = error.__cause__
    lines = [*str(error).strip().splitlines(), ""]
    return f"{type(error).__name__}: {lines[0]}" + (f" ({type(cause).__name__})" if cause else "")


def isolated(arguments: argparse.Namespace, model: str, method: str, result: dict[str, Any]) -> None:
    """The same in a process of its own, which may hang or take its device down with it."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "cells.json"
        said_again = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in PASSED_ON]
        concurrency = ",".join(map(str, arguments.concurrency))
        chosen = [f"--models={model}", f"--methods={method}", f"--concurrency={concurrency}", f"--output={output}"]
        flags = [*said_again, *chosen, *(["--parts"] if arguments.parts else [])]
        try:
            subprocess.run([sys.executable, __file__, *flags], stdout=subprocess.DEVNULL, timeout=arguments.timeout)
            error = "the process ended without a result"
        except subprocess.TimeoutExpired:
            error = f"not done after {arguments.timeout:.0f} s"
        found = json.loads(output.read_text()) if output.exists() else {"cells": [], "engines": []}
        result["engines"] += found["engines"]
        for cell in found["cells"]:
            tell(result, cell)
        if "seconds" not in found:
            tell(result, {"model": model, "method": method, "concurrency": None, "error": error})


def tell(result: dict[str, Any], cell: dict[str, Any]) -> None:
    """Keeps a cell and prints its line."""
    result["cells"].append(cell)
    name = f"{cell['model']} {cell['method']}"
    if cell["error"] is not None:
        print(f"{name:24}{cell['concurrency'] or 'all':>5}  {cell['error']}", flush=True)
        return
    steady, gap, theirs = cell["steady_tokens_per_second"], cell["gap_share"], cell["vllm"]
    line = f"{name:24}{cell['concurrency']:>5}{'-' if steady is None else f'{steady:,.0f}':>11}{cell['step_ms']:>9.3f}"
    line += f"{cell['floor_share']:>7.2f}{cell['acceptance_length']:>10.2f}{'-' if gap is None else f'{gap:.1%}':>7}"
    if theirs is not None:
        line += f"{theirs['tokens_per_second']:>16,}{theirs['step_ms']:>9.2f}"
        line += (
            f"{'-' if cell['ratio'] is None else format(cell['ratio'], '.2f') + 'x':>8}"
            f"{cell['nominal_ratio']:>8.2f}x{cell['least_ratio']:>7.2f}x"
        )
    print(line + ("  preempted" if cell["num_preemptions"] else ""), flush=True)


def print_parts(cell: dict[str, Any]) -> None:
    """The parts of a step in a line, where the device timed them."""
    if cell["parts_on"] == "device":
        parts = ", ".join(f"{name} {value:.3f}" for name, value in cell["parts_ms"].items())
        print(f"{'':24}{cell['concurrency']:>5}  {parts} ms; gap {cell['gap_share'] or 0:.1%}", flush=True)


def write(result: dict[str, Any], output: Path | None) -> None:
    """The file whole or as it was, whenever the process is stopped."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        part = output.with_suffix(".part")
        part.write_text(json.dumps(result, indent=2) + "\n")
        os.replace(part, output)


def words(text: str) -> list[str]:
    return text.split(",")


def counts(text: str) -> list[int]:
    return [int(word) for word in words(text)]


PASSED_ON = ("device", "runner", "input_len", "output_len", "steps", "repeats", "max_model_len")


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=words, default=MODELS, help="directories of shapes, with commas between")
    parser.add_argument("--methods", type=words, default=None, help=f"of {', '.join(METHODS)}")
    parser.add_argument("--concurrency", type=counts, default=[1, 8, 32, 128])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=512)
    parser.add_argument("--steps", type=int, default=80, help="most steady steps a cell takes; 0: all there are")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--runner", default="auto")
    parser.add_argument("--parts", action="store_true", help="time the parts of a step, on a second engine each")
    parser.add_argument("--isolate", action="store_true", help="a process for each model and method")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds such a process may take")
    parser.add_argument("--budget", type=float, default=None, help="seconds after which no further engine is built")
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args(given)
    for method in arguments.methods or ():
        if method not in METHODS:
            parser.error(f"unknown method: {method} (known: {', '.join(METHODS)})")
    for model in arguments.models:
        if not (SHAPES / model).is_dir():
            parser.error(f"no such shape: {model} (known: {', '.join(sorted(path.name for path in SHAPES.iterdir()))})")
    return table(arguments)


if __name__ == "__main__":
    main()
