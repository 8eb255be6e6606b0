"""What a step costs does not depend on who waits, nor what an end costs."""

from __future__ import annotations

import time

from outrider.core.output import FinishReason
from outrider.core.plan import StepResult
from outrider.core.request import Request
from outrider.core.sampling import SamplingParams
from outrider.schedule.scheduler import Scheduler
from workloads import scheduler_options

LONG = SamplingParams(max_tokens=10_000)
STEPS = 300


def busy(num_waiting: int, num_prompt: int = 4) -> Scheduler:
    """Four requests run, as many as may, and others wait with prompts of this length."""
    options = scheduler_options(
        max_model_len=120_000, num_blocks=8000, max_num_seqs=4, max_num_batched_tokens=100_000, block_size=16
    )
    scheduler = Scheduler(options)
    for number in range(4 + num_waiting):
        prompt = tuple(range(num_prompt)) if number >= 4 else (1, 2, 3)
        scheduler.add(Request(str(number), prompt, LONG))
    run(scheduler, 1)
    assert (scheduler.num_running, scheduler.num_waiting) == (4, num_waiting)
    return scheduler


def run(scheduler: Scheduler, num_steps: int) -> float:
    """CPU seconds of some steps."""
    start = time.process_time()
    for _ in range(num_steps):
        plan = scheduler.schedule()
        tokens = tuple((7,) for _ in plan.rows)
        scheduler.apply(plan, StepResult(plan.step, tokens, (0,) * len(tokens)))
    return time.process_time() - start


def test_a_step_costs_the_same_however_many_wait() -> None:
    few, many = busy(1), busy(10_000)
    assert run(many, STEPS) < 5 * run(few, STEPS) + 0.02


def test_a_prompt_that_does_not_fit_is_not_looked_up_in_every_step() -> None:
    short, long = busy(1), busy(1, num_prompt=100_000)
    for scheduler in (short, long):  # a slot is free, and no room for the long prompt
        scheduler.finish("3", FinishReason.ABORT)
        taken = scheduler.cache.open(tuple(range(200_000, 315_000)), 115_000)
        assert taken is not None
    run(short, 1)
    run(long, 1)
    assert long.num_waiting == 1
    assert run(long, STEPS) < 5 * run(short, STEPS) + 0.05


def test_thousands_end_at_once() -> None:
    def seconds(count: int) -> float:
        scheduler = busy(count)
        start = time.process_time()
        for number in reversed(range(4 + count)):
            assert scheduler.finish(str(number), FinishReason.ABORT)
        assert not scheduler.num_waiting
        return time.process_time() - start

    assert seconds(20_000) < 5 * 20 * seconds(1000) + 0.02
