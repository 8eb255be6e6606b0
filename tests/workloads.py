"""Requests that come, go and are dropped at random steps, the same for every engine they are given to."""

from __future__ import annotations

import random
from dataclasses import fields
from typing import Any

from checkpoints import Case
from outrider import LLM, SamplingParams
from outrider.core.sizes import Sizes
from outrider.schedule.options import SchedulerOptions

Tokens = dict[str, list[int]]


def scheduler_options(**options: Any) -> SchedulerOptions:
    """Options whose sizes are given beside the others."""
    sizes = {entry.name: options.pop(entry.name) for entry in fields(Sizes) if entry.name in options}
    return SchedulerOptions(sizes=Sizes(**sizes), **options)


def random_cases(count: int, seed: int, vocab_size: int = 256) -> list[Case]:
    """Prompts of 1 to 60 tokens, half of which begin alike; greedy and sampled, with and without an early end."""
    draw = random.Random(seed)
    shared = [draw.randrange(vocab_size) for _ in range(40)]
    cases = []
    for _ in range(count):
        own = [draw.randrange(vocab_size) for _ in range(draw.randint(1, 20))]
        prompt = shared[: draw.randint(16, 40)] + own if draw.random() < 0.5 else own
        sampling: dict[str, object] = {
            "max_tokens": draw.randint(4, 32),
            "detokenize": False,
            "seed": draw.randrange(99),
        }
        if draw.random() < 0.5:
            sampling |= {"temperature": 0.0}
        else:
            sampling |= {"temperature": draw.choice([0.6, 1.0]), "top_k": draw.choice([0, 20]), "min_p": 0.01}
        if draw.random() < 0.3:
            sampling |= {"stop_token_ids": draw.sample(range(vocab_size), 16), "min_tokens": draw.randint(0, 4)}
        cases.append(Case(prompt, SamplingParams(**sampling)))  # type: ignore[arg-type]
    return cases


def drive(llm: LLM, cases: list[Case], seed: int) -> tuple[Tokens, set[str]]:
    """What each request yielded, by its number, and which of them were aborted on the way."""
    draw = random.Random(seed)
    engine, waiting = llm.engine, list(enumerate(cases))
    found: Tokens = {str(number): [] for number in range(len(cases))}
    running: list[str] = []
    aborted: set[str] = set()
    while waiting or engine.has_work:
        for _ in range(draw.randint(0, 3)):
            if waiting:
                number, case = waiting.pop(0)
                engine.add(str(number), case.prompt, case.sampling, max_drafts=draw.choice([None, None, None, 0, 2]))
                running.append(str(number))
        if running and draw.random() < 0.05:
            victim = draw.choice(running)
            if engine.knows(victim):
                engine.abort(victim)
                aborted.add(victim)
        for delta, _ in engine.step():
            found[delta.request_id].extend(delta.tokens)
    engine._scheduler.check_idle()
    return found, aborted


def agree(ours: tuple[Tokens, set[str]], theirs: Tokens) -> bool:
    """Whether all that ran to its end is as it was elsewhere, and what was aborted is a beginning of it."""
    found, aborted = ours
    return all(
        tokens == theirs[number][: len(tokens)] and (number in aborted or len(tokens) == len(theirs[number]))
        for number, tokens in found.items()
    )
