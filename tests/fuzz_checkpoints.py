"""Random checkpoints: the logits are those of transformers, or the checkpoint is refused by an error that says why.

    PYTHONPATH=src python tests/fuzz_checkpoints.py --count 20000 --seed 0

Every failure is printed with the line that repeats it. Exit code 1 if there is one.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import logging
import random
import re
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers

import test_parity_hf as parity
from checkpoints import program
from fuzz_files import Made, write_checkpoint
from fuzz_parts import head_case, tokenizer_case, write_target
from outrider import LLM, SamplingParams, env
from outrider.errors import CapacityError, CheckpointError, OptionError
from outrider.load.checkpoint import read_json
from outrider.models.registry import read_config

TOLERANCE = 5e-5
"""Largest error over the largest logit; see `test_parity_hf.TOLERANCE`. Some of these scalings double all scores."""

LONGEST = 120
"""Tokens of the longest sequence that is compared."""

SECONDS = 20

SHOWN = 40
"""Reasons that are printed of each outcome."""
FILES = re.compile(r"config\.json|\.safetensors|\.bin|index\.json|tokenizer|generation_config")
BARE = re.compile(r"Traceback|has no attribute|object is not|unsupported operand|NoneType|unhashable|<.* at 0x")


@dataclass
class Report:
    """What came of a run."""

    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, Counter[str]] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, outcome: str, reason: str | None, line: str) -> None:
        self.outcomes[outcome] += 1
        if reason is not None:
            reason = " ".join(reason.encode("utf-8", "backslashreplace").decode().split())
            reason = re.sub(r"(model\.)?layers\.\d+\.[\w.]+", "a layer's weight", reason)
            reason = re.sub(r"( must be [^:]*| not supported): .*", r"\1", reason)
            reason = re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "N", reason)[:100]
            self.reasons.setdefault(outcome, Counter())[reason] += 1
            self.examples.setdefault(f"{outcome}: {reason}", line)


@dataclass
class Ours:
    """What outrider makes of a checkpoint: logits after each of these lengths of one sequence."""

    sequence: list[int]
    logits: dict[int, torch.Tensor]
    failed: set[int]
    """Lengths after which no token could be drawn."""
    eos: tuple[int, ...]


def sequence(length: int, vocab_size: int) -> list[int]:
    rng = random.Random(length)
    return [rng.randrange(vocab_size) for _ in range(length)]


def ours(path: Path, rng: random.Random) -> Ours:
    """Raises what opening and running it raises."""
    _, config = read_config(read_json(path / "config.json"))
    longest = min(rng.choice([16, config.max_position_embeddings, config.longest, config.longest]), LONGEST)
    with LLM(str(path), dtype="float32", max_model_len=longest, max_num_seqs=4, kv_cache_memory=1 << 22) as llm:
        recorder = parity.Recorder()
        program(llm)._verifier = recorder
        whole = sequence(longest, config.vocab_size)
        lengths = sorted({1, longest // 2, longest - 1} - {0})
        greedy = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": whole[:length]} for length in lengths], greedy)
        logits = {length: recorder.seen[tuple(whole[:length])] for length in lengths}
        ends = zip(lengths, outputs, strict=True)
        failed = {length for length, output in ends if output.outputs[0].finish_reason == "error"}
        return Ours(whole, logits, failed, llm.engine.resolved.eos_token_ids)


@dataclass
class Theirs:
    """What transformers makes of it: logits after every token, and what it ends texts at."""

    logits: torch.Tensor
    eos: set[int]


class MadeUpError(Exception):
    """transformers loads it with weights that it made up."""


def theirs(path: Path, whole: list[int]) -> Theirs:
    """Raises what transformers raises, and MadeUpError."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    made_up = [*info["missing_keys"], *info["mismatched_keys"]]
    if made_up:
        raise MadeUpError(str(made_up[0]))
    with torch.inference_mode():
        logits = model.eval()(torch.tensor([whole])).logits[0]
    ends = model.generation_config.eos_token_id
    return Theirs(logits, set(ends if isinstance(ends, list) else [ends]) - {None})


def difference(found: Ours, model: Theirs) -> str | None:
    """What differs; None: nothing."""
    for length, seen in found.logits.items():
        expected = model.logits[length - 1]
        is_finite = bool(expected.isfinite().all())
        if (length in found.failed) == is_finite or bool(seen.isfinite().all()) != is_finite:
            return f"after {length} tokens logits are finite for one alone, or a token was drawn of none"
        if not is_finite:
            continue
        error = ((seen - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
        if error > TOLERANCE:
            return f"logits after {length} of {len(found.sequence)} tokens are off by {error:.1e}"
    missed = {token for token in model.eos if 0 <= token < model.logits.shape[1]} - set(found.eos)
    return f"texts end at {missed} in transformers, and not here: {found.eos}" if missed else None


def refusal(error: Exception, made: Made) -> str | None:
    """What is wrong with a refusal; None: nothing."""
    said = str(error)
    if not isinstance(error, (CheckpointError, OptionError, CapacityError)):
        return f"{type(error).__name__}: {said[:300]}"
    if BARE.search(said.partition(" and says ")[0]):
        return f"not our words: {said[:300]}"
    if not FILES.search(said) and str(made.path) not in said and not isinstance(error, CapacityError):
        return f"names no file: {said}"
    if len(said) > 1000:
        return f"too long: {len(said)} characters"
    return None


def case(seed: int, number: int, report: Report, folder: Path) -> None:
    """Makes one checkpoint and compares what is made of it."""
    rng = random.Random(f"{seed}:{number}")
    path = folder / str(number)
    line = f"PYTHONPATH=src python tests/fuzz_checkpoints.py --seed {seed} --first {number} --count 1"
    way = rng.random()

    def failed(fault: str) -> None:
        report.outcomes["FAILED"] += 1
        told = f"case {number}, {made.family}, {made.done}: {fault}\n  {line}"
        report.failures.append(told.encode("utf-8", "backslashreplace").decode())

    def add(outcome: str, reason: str | None) -> None:
        report.add(outcome, reason, line)

    made = Made(path, "?", {})
    signal.alarm(SECONDS)
    try:
        if way < 0.75:
            made = write_checkpoint(path, rng)
            compare(made, rng, add, failed)
        else:
            make = head_case if way < 0.9 else tokenizer_case
            made.done, run = make(path, folder / "target", rng)
            serve(make.__name__.removesuffix("_case"), made, run, add, failed)
    except TimeoutError:
        failed(f"it took more than {SECONDS} s")
    finally:
        signal.alarm(0)
        shutil.rmtree(path)


def serve(
    kind: str,
    made: Made,
    run: Callable[[], str | None],
    add: Callable[[str, str | None], None],
    failed: Callable[[str], None],
) -> None:
    """A part of the tiny target, which serves or is refused."""
    try:
        fault = run()
    except TimeoutError:
        raise
    except Exception as error:
        fault = refusal(error, made)
        if fault is None:
            said = f"{type(error).__name__}: {error}".replace(str(made.path), "DIR")
            add(f"{kind} refused", said)
            return
    failed(fault) if fault is not None else add(f"{kind} serves", None)


def compare(
    made: Made, rng: random.Random, add: Callable[[str, str | None], None], failed: Callable[[str], None]
) -> None:
    """Both on one checkpoint."""
    path = made.path
    try:
        found: Ours | Exception = ours(path, rng)
    except TimeoutError:
        raise
    except Exception as error:
        fault = refusal(error, made)
        if fault is not None:
            failed(fault)
            return
        found = error
    said = f"{type(found).__name__}: {found}".replace(str(path), "DIR")
    if isinstance(found, Exception) and any(mark in json.dumps(made.config, default=str) for mark in HUGE):
        add("refused by us, transformers not asked", said)
        return
    try:
        model: Theirs | Exception = theirs(path, found.sequence if isinstance(found, Ours) else [1, 2, 3])
    except Exception as error:
        model = error
    if isinstance(found, Ours):
        if isinstance(model, Theirs):
            fault = difference(found, model)
            failed(fault) if fault is not None else add("equal", None)
        elif isinstance(model, (MadeUpError, TimeoutError)):
            failed(f"it runs here, and transformers makes up weights or hangs: {model!r}")
        else:
            add("read by us alone", f"{type(model).__name__} {model}".replace(str(path), "DIR"))
    else:
        add("refused by us alone" if isinstance(model, Theirs) else "refused by both", said)


HUGE = [str(10**30), str(2**31), str(2**45), "1e+300"]


def fuzz(seed: int, first: int, count: int) -> Report:
    """Runs cases `first` to `first + count`."""
    report = Report()

    def late(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    logger = logging.getLogger("outrider")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_target(Path(folder) / "target")
            with patch.dict(os.environ, {env.CACHE: str(Path(folder) / "cache")}):
                for number in range(first, first + count):
                    case(seed, number, report, Path(folder))
    finally:
        signal.signal(signal.SIGALRM, before)
        logger.setLevel(level)
    return report


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    given = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.perf_counter()
    report = fuzz(given.seed, given.first, given.count)
    print(f"{given.count} checkpoints in {time.perf_counter() - begun:.0f} s:", dict(report.outcomes.most_common()))
    for outcome, reasons in report.reasons.items():
        print(f"{outcome}:")
        for reason, times in reasons.most_common(SHOWN):
            print(f"  {times:5} {reason}   [{report.examples[f'{outcome}: {reason}'].split('--', 1)[1]}]")
    for failure in report.failures:
        print("FAILED", failure)
    return 1 if report.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
