"""Tokens a second and what a step's time goes to, at given concurrencies."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from outrider.bench.bandwidth import read_bandwidth
from outrider.bench.prompts import PromptSet
from outrider.bench.provenance import provenance
from outrider.core.sampling import SamplingParams
from outrider.engine.llm import LLM
from outrider.errors import OptionError

WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Row:
    """One concurrency's figures. Times are milliseconds of wall clock."""

    concurrency: int
    tokens_per_second: float  # output tokens of all sequences, prefill's time included
    first_token_ms: float  # median over runs, until every sequence had its first token
    step_ms: float  # mean decode step
    parts_ms: dict[str, float]  # of the mean step: schedule, run, apply
    floor_ms: float  # weights read once, at the bandwidth measured in the same run
    acceptance_length: float


@dataclass(frozen=True, slots=True)
class Workload:
    """What each sequence is."""

    input_len: int
    output_len: int
    prompts: PromptSet | None = None  # None: random tokens

    def batch(self, llm: LLM, count: int, seed: int) -> list[list[int]]:
        """`count` prompts of `input_len` tokens; different seeds share nothing that a cache could reuse."""
        if self.prompts is None:
            vocab = llm.engine.resolved.runner.model_config.vocab_size
            generator = torch.Generator().manual_seed(seed)
            drawn: list[list[int]] = torch.randint(vocab, (count, self.input_len), generator=generator).tolist()
            return drawn
        texts = itertools.islice(itertools.cycle(self.prompts.texts), seed * count, (seed + 1) * count)
        encoded = [llm.tokenizer.encode(text)[-self.input_len :] for text in texts]
        short = min(map(len, encoded))
        if short < self.input_len:
            raise OptionError(f"{self.prompts.name} holds a prompt of {short} tokens, less than {self.input_len}")
        return encoded


def bench(llm: LLM, workload: Workload, concurrencies: Sequence[int], repeats: int) -> dict[str, Any]:
    """Rows for each concurrency, with what is needed to trust them."""
    runner = llm.engine.resolved.runner
    largest = max(concurrencies)
    if largest > runner.max_num_seqs:
        raise OptionError(f"concurrency {largest} is more than max_num_seqs {runner.max_num_seqs}: raise that")
    whole = workload.input_len + workload.output_len
    if whole > runner.max_model_len:
        raise OptionError(f"{whole} tokens, input and output, do not fit in max_model_len {runner.max_model_len}")
    bandwidth = read_bandwidth(runner.device)
    floor_ms = 1e3 * weight_bytes_read(llm) / bandwidth
    rows = [_row(llm, workload, concurrency, repeats, floor_ms) for concurrency in concurrencies]
    resolved = llm.engine.resolved
    return {
        "config": {
            "model": str(resolved.directory),
            "load_format": resolved.options.load_format,
            "dtype": str(runner.dtype).removeprefix("torch."),
            "runner": llm.choice.runner.name,
            "method": resolved.method,
            "num_speculative_tokens": runner.draft_options.num_speculative_tokens,
            "verifier": runner.verifier.name,
            "faithful": runner.verifier.faithful,
            "input_len": workload.input_len,
            "output_len": workload.output_len,
            "prompts": workload.prompts.name if workload.prompts else "random tokens",
            "read_gb_per_second": bandwidth / 1e9,
        },
        **provenance(runner.device),
        "rows": [asdict(row) for row in rows],
    }


def weight_bytes_read(llm: LLM) -> int:
    """Bytes of weights that every decode step reads: all, but an embedding that is not the head as well."""
    runner = llm.engine.resolved.runner
    config = runner.model_config
    embedding = config.vocab_size * config.hidden_size * runner.dtype.itemsize
    return runner.memory.weights - (0 if config.tie_word_embeddings else embedding)


def _row(llm: LLM, workload: Workload, concurrency: int, repeats: int, floor_ms: float) -> Row:
    engine = llm.engine
    sampling = SamplingParams(temperature=0.0, max_tokens=workload.output_len, ignore_eos=True, detokenize=False)
    warm = SamplingParams(temperature=0.0, max_tokens=WARM_UP_TOKENS, ignore_eos=True, detokenize=False)
    _run(llm, workload.batch(llm, concurrency, 0), warm)
    before, acceptance_before = engine.times.copy(), engine.acceptance()
    runs = [_run(llm, workload.batch(llm, concurrency, 1 + repeat), sampling) for repeat in range(repeats)]
    spent, acceptance = engine.times.since(before), engine.acceptance()
    drafts = acceptance.drafts - acceptance_before.drafts
    accepted = acceptance.accepted - acceptance_before.accepted
    tokens = sum(run.tokens for run in runs)
    decode_steps = sum(run.decode_steps for run in runs)
    return Row(
        concurrency=concurrency,
        tokens_per_second=tokens / sum(run.seconds for run in runs),
        first_token_ms=1e3 * sorted(run.first_token for run in runs)[len(runs) // 2],
        step_ms=1e3 * sum(run.seconds - run.first_token for run in runs) / max(decode_steps, 1),
        parts_ms={name: 1e3 * getattr(spent, name) / spent.steps for name in ("schedule", "run", "apply")},
        floor_ms=floor_ms,
        acceptance_length=1.0 + (accepted / drafts if drafts else 0.0),
    )


@dataclass(frozen=True, slots=True)
class _Run:
    seconds: float
    first_token: float
    tokens: int
    decode_steps: int


def _run(llm: LLM, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> _Run:
    engine = llm.engine
    start = time.perf_counter()
    waiting = {f"bench-{index}" for index in range(len(prompts))}
    for request_id, prompt in zip(sorted(waiting), prompts, strict=True):
        engine.add(request_id, prompt, sampling)
    tokens = steps = 0
    first_token = 0.0
    while engine.has_work:
        gained = engine.step()
        tokens += sum(len(delta.tokens) for delta, _ in gained)
        if not waiting:
            steps += 1
            continue
        waiting.difference_update(delta.request_id for delta, _ in gained)
        if not waiting:
            first_token = time.perf_counter() - start
    return _Run(time.perf_counter() - start, first_token, tokens, steps)
