"""Tokens a second and what a step's time goes to, at given concurrencies."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch

from outrider.bench.bandwidth import read_bandwidth
from outrider.bench.batch import BatchRun, Steady, run_batch
from outrider.bench.floors import Reads
from outrider.bench.prompts import PromptSet
from outrider.bench.provenance import provenance
from outrider.core.sampling import SamplingParams
from outrider.device import free_memory
from outrider.engine.llm import LLM
from outrider.errors import OptionError
from outrider.options import EngineOptions

WARM_UP_STEPS = 4
TIMED_STEPS = 32
"""Steady steps over which the parts of a step are timed: enough for a mean."""

GAP = "gap"
"""The part of a step in which the device has nothing to do."""


@dataclass(frozen=True, slots=True)
class Floor:
    """Milliseconds that a step's reading takes at the bandwidth measured in the same run."""

    target: float  # its weights
    draft: float  # the draft head's
    cache: float  # the target's keys and values, on average over the steady steps; no part of `weights`

    @property
    def weights(self) -> float:
        """What a step is held against."""
        return self.target + self.draft


@dataclass(frozen=True, slots=True)
class Row:
    """One concurrency's figures. Times are milliseconds of wall clock, the device's parts apart."""

    concurrency: int
    tokens_per_second: float  # output tokens of all sequences, prefill's time included
    first_token_ms: float  # median over runs, until every sequence had its first token
    steady_tokens_per_second: float | None  # while all sequences decode; None: they never did
    steady_steps: int
    step_ms: float  # mean steady step; without one, mean decode step
    acceptance_length: float  # tokens a sequence gains a steady step
    host_ms: dict[str, float]  # of the mean step: schedule, run (submit and wait), apply
    parts_ms: dict[str, float]  # of the mean step: as the device timed them, else as `host_ms`
    parts_on: str  # "device" or "host"
    floor_ms: float  # weights read once, target's and draft head's
    floor_parts_ms: dict[str, float]  # target, draft; and cache, which is not in `floor_ms`
    floor_share: float  # floor_ms / step_ms
    num_preemptions: int  # more than 0: the cache was too small, the figures are those of a crowded engine

    @property
    def gap_share(self) -> float | None:
        """Share of a step in which the device waits; None where that was not timed."""
        return self.parts_ms[GAP] / sum(self.parts_ms.values()) if GAP in self.parts_ms else None


@dataclass(frozen=True, slots=True)
class Workload:
    """What each sequence is, and how much of it is run."""

    input_len: int
    output_len: int
    prompts: PromptSet | None = None  # None: random tokens
    max_steps: int | None = None  # steady steps after which a run is cut off; None: never

    def batch(self, llm: LLM, count: int, seed: int) -> list[list[int]]:
        """`count` prompts of `input_len` tokens; other seeds and counts share nothing that a cache could reuse."""
        if self.prompts is None:
            vocab = llm.engine.resolved.runner.model_config.vocab_size
            generator = torch.Generator().manual_seed(seed << 16 | count)
            drawn: list[list[int]] = torch.randint(vocab, (count, self.input_len), generator=generator).tolist()
            return drawn
        texts = self.prompts.texts
        encoded = [llm.tokenizer.encode(texts[(seed * count + index) % len(texts)]) for index in range(count)]
        encoded = [tokens[-self.input_len :] for tokens in encoded]
        short = min(map(len, encoded))
        if short < self.input_len:
            raise OptionError(f"{self.prompts.name} holds a prompt of {short} tokens, less than {self.input_len}")
        return encoded

    def check(self, llm: LLM, concurrencies: Sequence[int]) -> None:
        """OptionError if the engine cannot run it."""
        sizes, largest = llm.engine.resolved.runner.sizes, max(concurrencies)
        if largest > sizes.max_num_seqs:
            raise OptionError(f"concurrency {largest} is more than max_num_seqs {sizes.max_num_seqs}: raise that")
        whole = self.input_len + self.output_len
        if whole > sizes.max_model_len:
            raise OptionError(f"{whole} tokens, input and output, do not fit in max_model_len {sizes.max_model_len}")


def bench(
    options: EngineOptions,
    workload: Workload,
    concurrencies: Sequence[int],
    repeats: int,
    *,
    parts: bool | None = None,  # whether to time the parts of a step on the device; None: on a GPU
    progress: Sequence[Callable[[int, int], None] | None] = (),  # as `LLM.from_options` takes it behind the options
) -> dict[str, Any]:
    """Rows for each concurrency, with what is needed to trust them."""
    device = device_of(options)
    bandwidth, free_before = read_bandwidth(device), free_memory(device)
    with LLM.from_options(options, *progress) as llm:
        workload.check(llm, concurrencies)
        rows = [measure(llm, workload, concurrency, repeats, bandwidth) for concurrency in concurrencies]
        result = {
            "config": configuration(llm, workload) | {"read_gb_per_second": bandwidth / 1e9},
            **provenance(device),
            "memory": memory(llm, free_before),
        }
    del llm
    give_back(device)
    parts_error = None
    if device.type == "cuda" if parts is None else parts:
        try:
            timed = times_of_parts(options, workload, concurrencies)
            rows = [with_parts(row, timed[row.concurrency]) for row in rows]
        except Exception as error:  # what was measured before is worth telling all the same
            parts_error = f"{type(error).__name__}: {error}"
    return result | {"parts_error": parts_error, "rows": [asdict(row) for row in rows]}


def measure(llm: LLM, workload: Workload, concurrency: int, repeats: int, bandwidth: float) -> Row:
    """The figures of one concurrency, on an engine that does nothing else."""
    engine = llm.engine
    preempted, accepted = engine.stats().num_preemptions, engine.acceptance()
    run_batch(engine, workload.batch(llm, concurrency, 0), sampling_of(workload), WARM_UP_STEPS)
    runs = [
        run_batch(engine, workload.batch(llm, concurrency, 1 + repeat), sampling_of(workload), workload.max_steps)
        for repeat in range(repeats)
    ]
    steady = [run.steady for run in runs if run.steady is not None]
    step_ms = _step_ms(runs, steady)
    floor = _floor(Reads.of(engine.resolved), bandwidth, workload, concurrency, steady)
    host_ms = _host_ms(steady)
    return Row(
        concurrency=concurrency,
        tokens_per_second=sum(run.tokens for run in runs) / sum(run.seconds for run in runs),
        first_token_ms=1e3 * median(run.first_token for run in runs),
        steady_tokens_per_second=sum(s.tokens for s in steady) / sum(s.seconds for s in steady) if steady else None,
        steady_steps=sum(s.steps for s in steady),
        step_ms=step_ms,
        acceptance_length=sum(s.tokens for s in steady) / sum(s.rounds for s in steady)
        if steady
        else engine.acceptance().since(accepted).length,
        host_ms=host_ms,
        parts_ms=host_ms,
        parts_on="host",
        floor_ms=floor.weights,
        floor_parts_ms=asdict(floor),
        floor_share=floor.weights / step_ms if step_ms else 0.0,
        num_preemptions=engine.stats().num_preemptions - preempted,
    )


def times_of_parts(
    options: EngineOptions, workload: Workload, concurrencies: Sequence[int]
) -> dict[int, dict[str, float] | None]:
    """For each concurrency what the device timed of a mean step, on an engine built for that: marks cost time.

    None where the runner cannot tell, or no step was steady.
    """
    workload = replace(workload, max_steps=TIMED_STEPS)
    found: dict[int, dict[str, float] | None] = {}
    with LLM.from_options(replace(options, time_parts=True)) as llm:
        for concurrency in concurrencies:
            run_batch(llm.engine, workload.batch(llm, concurrency, 0), sampling_of(workload), WARM_UP_STEPS)
            run = run_batch(llm.engine, workload.batch(llm, concurrency, 1), sampling_of(workload), TIMED_STEPS)
            found[concurrency] = None if run.steady is None else run.steady.parts
    del llm
    give_back(device_of(options))
    return found


def with_parts(row: Row, parts: dict[str, float] | None) -> Row:
    """The row with the parts that the device timed, if it did."""
    return row if parts is None else replace(row, parts_ms=parts, parts_on="device")


def configuration(llm: LLM, workload: Workload) -> dict[str, Any]:
    """What was measured, as a result file says it."""
    resolved = llm.engine.resolved
    runner = resolved.runner
    return {
        "model": str(resolved.directory),
        "load_format": resolved.options.load_format,
        "dtype": str(runner.dtype).removeprefix("torch."),
        "runner": llm.choice.runner.name,
        "method": resolved.method,
        "num_speculative_tokens": runner.draft_options.num_speculative_tokens,
        "verifier": runner.verifier.name,
        "synthetic_rates": None if resolved.options.synthetic_rates is None else [*resolved.options.synthetic_rates],
        "faithful": runner.verifier.faithful,
        "input_len": workload.input_len,
        "output_len": workload.output_len,
        "max_steps": workload.max_steps,
        "prompts": workload.prompts.name if workload.prompts else "random tokens",
        "max_num_seqs": runner.sizes.max_num_seqs,
        "max_model_len": runner.sizes.max_model_len,
        "max_num_batched_tokens": runner.sizes.max_num_batched_tokens,
        "max_prefill_tokens_beside_decodes": resolved.scheduler.max_prefill_tokens_beside_decodes,
    }


def memory(llm: LLM, free_before: int) -> dict[str, Any]:
    """The plan; on a GPU what was taken since `free_before` was measured: in all, and beside weights and cache.

    And what recording took, where the runner records.
    """
    plan = llm.engine.resolved.runner.memory
    device = llm.engine.resolved.runner.device
    record: dict[str, Any] = {"plan": plan.to_dict(), "used": None, "beside_weights_and_cache": None}
    record["recorded"] = llm.engine.worker_stats().recorded
    if device.type == "cuda":
        torch.cuda.empty_cache()
        record["used"] = free_before - free_memory(device)
        record["beside_weights_and_cache"] = record["used"] - plan.weights - plan.cache
    return record


def give_back(device: torch.device) -> None:
    """Frees what a closed engine has left on the device, so that the next finds room."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def sampling_of(workload: Workload) -> SamplingParams:
    """Greedy, and to the end whatever the text says."""
    return SamplingParams(temperature=0.0, max_tokens=workload.output_len, ignore_eos=True, detokenize=False)


def device_of(options: EngineOptions) -> torch.device:
    """The device an engine of these options will use, awake; a name that is wrong is the engine's to refuse."""
    if options.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device(options.device if options.device.startswith("cuda:") else "cuda")
    torch.zeros(1, device=device)
    return device


def _step_ms(runs: Sequence[BatchRun], steady: Sequence[Steady]) -> float:
    if steady:
        return 1e3 * sum(s.seconds for s in steady) / sum(s.steps for s in steady)
    return 1e3 * sum(run.seconds - run.first_token for run in runs) / max(sum(run.decode_steps for run in runs), 1)


def _host_ms(steady: Sequence[Steady]) -> dict[str, float]:
    steps = max(sum(s.host.steps for s in steady), 1)
    return {name: 1e3 * sum(getattr(s.host, name) for s in steady) / steps for name in ("schedule", "run", "apply")}


def _floor(reads: Reads, bandwidth: float, workload: Workload, concurrency: int, steady: Sequence[Steady]) -> Floor:
    tokens = [concurrency * workload.input_len + s.tokens_before + s.tokens / 2 for s in steady]  # held, on average
    held = sum(tokens) / len(tokens) if tokens else 0.0
    per_ms = bandwidth / 1e3
    return Floor(reads.target / per_ms, reads.draft / per_ms, held * reads.cache_per_token / per_ms)
