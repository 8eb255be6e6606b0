"""What prompts cost the requests that decode when they arrive, with prompt tokens beside decodes bounded and not.

    python benchmarks/mixed_steps.py --output my_mixed_steps.json
    python benchmarks/mixed_steps.py --prompts 8 --prompt-len 1024
    python benchmarks/mixed_steps.py --device cpu --model tiny --prompt-len 1024 --bounds 128,2048   (a rehearsal)

Random weights of a public shape in `benchmarks/shapes`, random tokens, greedy, no drafts. Some requests decode; after
`--steps` steps prompts arrive, all at once. Told are the times between the tokens of the requests that decode, before
the prompts arrive and from then until each has its first token, and the time to the last of those. `--bounds` are
values of max_prefill_tokens_beside_decodes, an engine each, in one run; left out, the engine's default and no bound at
all, which is max_num_batched_tokens. The floor of a step that only decodes is its weights over the read rate.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from outrider.bench.bandwidth import read_bandwidth
from outrider.bench.floors import Reads
from outrider.bench.provenance import provenance
from outrider.bench.speed import Workload, configuration, device_of, give_back, sampling_of
from outrider.config import resolve
from outrider.engine.engine import Engine
from outrider.engine.llm import LLM
from outrider.options import EngineOptions

SHAPES = Path(__file__).parent / "shapes"

SETTLING = 4
"""Steps that are not counted, after all who decode have their first token."""

HEADINGS = (
    f"{'':>8}{'before: median':>16}{'largest':>9}{'during: median':>17}{'largest':>9}{'first token':>13}"
    f"{'prompt tokens/s':>17}"
)


@dataclass(slots=True)
class Watch:
    """When requests gain tokens."""

    engine: Engine
    last: dict[str, float] = field(default_factory=dict)  # when a request last gained any

    def step(self, watched: Collection[str] = ()) -> list[float]:
        """One step of the engine; for each watched request that gained tokens, seconds since it last did."""
        gained = self.engine.step()
        now = time.perf_counter()
        between: list[float] = []
        for delta, _ in gained:
            if delta.request_id in watched:
                assert delta.finish_reason is None, f"{delta.request_id} ended before it was to"
                between.append(now - self.last[delta.request_id])
            self.last[delta.request_id] = now
        return between


@dataclass(slots=True)
class Found:
    """What all rounds of one engine gave, in seconds."""

    before: list[float] = field(default_factory=list)  # between tokens
    during: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)  # a round each


def play(llm: LLM, arguments: argparse.Namespace, output_len: int, number: int, found: Found) -> None:
    """One round: some decode, prompts arrive, each has its first token, all are dropped."""
    engine, watch = llm.engine, Watch(llm.engine)
    decoding = [f"decoding-{index}" for index in range(arguments.requests)]
    arriving = [f"prompt-{index}" for index in range(arguments.prompts)]
    early, late = Workload(arguments.input_len, output_len), Workload(arguments.prompt_len, output_len)
    prompts = late.batch(llm, len(arriving), 2 * number + 1)
    for name, tokens in zip(decoding, early.batch(llm, len(decoding), 2 * number), strict=True):
        engine.add(name, tokens, sampling_of(early))
    while len(watch.last) < len(decoding):
        watch.step()
    for _ in range(SETTLING):
        watch.step(decoding)
    for _ in range(arguments.steps):
        found.before += watch.step(decoding)
    start = time.perf_counter()
    for name, tokens in zip(arriving, prompts, strict=True):
        engine.add(name, tokens, sampling_of(late))
    while len(watch.last) < len(decoding) + len(arriving):
        found.during += watch.step(decoding)
    found.first_token.append(time.perf_counter() - start)
    for name in (*decoding, *arriving):
        engine.abort(name)
    while engine.has_work:
        engine.step()


def measure(arguments: argparse.Namespace, options: EngineOptions, bound: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures with one bound, and the configuration they were measured with."""
    device, found = device_of(options), Found()
    with LLM.from_options(options) as llm:
        for number in range(arguments.repeats + 1):
            if number == 1:  # the first warms up
                found = Found()
            play(llm, arguments, output_len(arguments, bound), number, found)
        config = configuration(llm, Workload(arguments.input_len, output_len(arguments, bound)))
        num_preemptions = llm.engine.stats().num_preemptions
    del llm
    give_back(device)
    first_token = median(found.first_token)
    row = {
        "bound": bound,
        "before_ms": between(found.before),
        "during_ms": between(found.during),
        "first_token_ms": 1e3 * first_token,
        "all_first_token_ms": [1e3 * seconds for seconds in found.first_token],
        "prompt_tokens_per_second": arguments.prompts * arguments.prompt_len / first_token,
        "num_preemptions": num_preemptions,
    }
    return row, config


def between(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds between tokens, of all requests and rounds together."""
    return {"median": 1e3 * median(seconds), "largest": 1e3 * max(seconds), "count": len(seconds)}


def output_len(arguments: argparse.Namespace, bound: int) -> int:
    """Tokens that nobody comes to the end of: for the steps that are counted, and for those of all prompts."""
    tokens = arguments.requests * arguments.input_len + arguments.prompts * arguments.prompt_len
    return arguments.steps + SETTLING + arguments.requests + arguments.prompts + -(-tokens // bound) + 16


def options_of(arguments: argparse.Namespace, bound: int | None) -> EngineOptions:
    """An engine for these requests and no more; without a bound, one that only tells its default."""
    longest = max(arguments.input_len, arguments.prompt_len)
    both = arguments.requests + arguments.prompts
    return EngineOptions(
        model=str(SHAPES / arguments.model),
        load_format="dummy",
        device=arguments.device,
        runner=arguments.runner,
        max_num_seqs=both,
        max_model_len=longest + (1 if bound is None else output_len(arguments, bound)),
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        max_prefill_tokens_beside_decodes=bound,
        capture_sizes=sorted({arguments.requests, both}),
    )


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """One bound after the other, in one process."""
    resolved = resolve(options_of(arguments, None))
    scheduler = resolved.scheduler
    default, whole = scheduler.max_prefill_tokens_beside_decodes, scheduler.sizes.max_num_batched_tokens
    bandwidth = read_bandwidth(resolved.runner.device)
    result: dict[str, Any] = {
        **provenance(resolved.runner.device),
        "config": {},
        "read_gb_per_second": bandwidth / 1e9,
        "floor_ms": 1e3 * Reads.of(resolved).target / bandwidth,
        "default_bound": default,
        "rows": [],
    }
    asked = ("requests", "input_len", "prompts", "prompt_len", "steps", "repeats")
    if not arguments.json:
        print(*(f"{name}: {result[name]}" for name in ("command", "commit", "device", "versions")), sep="\n")
        print(
            f"\n{arguments.model}: {arguments.requests} requests decode, {arguments.prompts} x {arguments.prompt_len:,}"
            f" prompt tokens arrive; milliseconds; floor of a decode step {result['floor_ms']:.3f}\n{HEADINGS}",
            flush=True,
        )
    for bound in dict.fromkeys(arguments.bounds or (default, whole)):
        row, config = measure(arguments, options_of(arguments, bound), bound)
        result["config"] = {**config, **{name: getattr(arguments, name) for name in asked}}
        result["rows"].append(row)
        if not arguments.json:
            print(line(row), flush=True)
    return result


def line(row: dict[str, Any]) -> str:
    """A bound's figures for people."""
    before, during = row["before_ms"], row["during_ms"]
    told = f"{row['bound']:>8}{before['median']:>16.2f}{before['largest']:>9.2f}{during['median']:>17.2f}"
    told += f"{during['largest']:>9.2f}{row['first_token_ms']:>13.1f}{row['prompt_tokens_per_second']:>17,.0f}"
    return told + ("  preempted" if row["num_preemptions"] else "")


def counts(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-8b", choices=sorted(path.name for path in SHAPES.iterdir()))
    parser.add_argument("--requests", type=int, default=8, help="that decode")
    parser.add_argument("--input-len", type=int, default=128, help="prompt tokens of each of those")
    parser.add_argument("--prompts", type=int, default=1, help="that arrive later")
    parser.add_argument("--prompt-len", type=int, default=8192, help="tokens of each")
    parser.add_argument("--bounds", type=counts, default=None, help="with commas between; left out: the default, none")
    parser.add_argument("--steps", type=int, default=40, help="counted before the prompts arrive")
    parser.add_argument("--repeats", type=int, default=3, help="rounds for each bound, after one that warms up")
    parser.add_argument("--max-num-batched-tokens", type=int, default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--runner", default="auto")
    parser.add_argument("--json", action="store_true", help="print the result as one object")
    parser.add_argument("--output", type=Path, default=None, help="file to write it to as well")
    arguments = parser.parse_args(given)
    for name in ("requests", "input_len", "prompts", "prompt_len", "steps", "repeats"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more: {getattr(arguments, name)}")
    result = compare(arguments)
    if arguments.json:
        print(json.dumps(result, indent=2))
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
