"""One behaviour a test, by hand; `tests/test_scheduling.py` has the thousands of random ones."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from outrider.core.output import AcceptanceReport, FinishReason, TokenDelta
from outrider.core.plan import Growth, Row, StepPlan, StepResult
from outrider.core.request import Request, RequestStatus
from outrider.core.sampling import SamplingParams
from outrider.errors import InputError, PromptError
from outrider.schedule.scheduler import Scheduler
from workloads import scheduler_options

EOS = 99


def make(**options: int) -> Scheduler:
    shape = {"max_model_len": 32, "num_blocks": 32, "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 16}
    return Scheduler(scheduler_options(**(shape | options)))


def add(scheduler: Scheduler, name: str, num_prompt: int, max_tokens: int | None = None, first: int = 0) -> Request:
    prompt = tuple(range(first, first + num_prompt))
    request = Request(name, prompt, SamplingParams(max_tokens=max_tokens), stop_ids=(EOS,))
    scheduler.add(request)
    return request


def land(scheduler: Scheduler, plan: StepPlan, *tokens: Sequence[int], num_drafted: int = 0) -> list[TokenDelta]:
    drafted = tuple(num_drafted if gained else 0 for gained in tokens)
    result = StepResult(plan.step, tuple(map(tuple, tokens)), drafted)
    deltas = scheduler.apply(plan, result)
    scheduler.check()
    return deltas


def step(scheduler: Scheduler, *tokens: Sequence[int], num_drafted: int = 0) -> StepPlan:
    plan = scheduler.schedule()
    land(scheduler, plan, *tokens, num_drafted=num_drafted)
    return plan


def test_one_request_from_start_to_end() -> None:
    scheduler = make(num_drafts=2)
    request = add(scheduler, "a", 5, max_tokens=4)
    plan = scheduler.schedule()
    (admission,) = plan.admit
    assert (admission.tokens, admission.num_prompt, admission.num_cached) == (request.prompt, 5, 0)
    assert admission.stop_ids == (EOS,)
    assert plan.rows == (Row(0, 5, 0, True),) and plan.grow[0].start == 0 and len(plan.grow[0].blocks) == 2
    assert land(scheduler, plan, [7], num_drafted=2) == [TokenDelta("a", (7,), 0, None, None)]
    plan = scheduler.schedule()
    assert plan.rows == (Row(0, 3, 2, True),) and not plan.admit and not plan.grow
    assert land(scheduler, plan, [8, 9], num_drafted=2) == [TokenDelta("a", (8, 9), 1, None, None)]
    plan = scheduler.schedule()
    assert plan.grow == (Growth(0, 2, plan.grow[0].blocks),)
    (delta,) = land(scheduler, plan, [10, 11, 12], num_drafted=2)
    assert delta == TokenDelta("a", (10,), 1, FinishReason.LENGTH, None)
    assert request.status is RequestStatus.FINISHED and request.output == [7, 8, 9, 10]
    assert request.acceptance.report() == AcceptanceReport(2, 4, 3, (2, 1)), "the last step counts past the limit too"
    assert not scheduler.has_work and not scheduler.schedule().rows
    scheduler.check_idle()


def test_a_stop_token_ends_a_request_and_drops_what_follows() -> None:
    scheduler = make(num_drafts=3)
    request = add(scheduler, "a", 2)
    step(scheduler, [5], num_drafted=3)
    (delta,) = land(scheduler, scheduler.schedule(), [6, EOS, 7])
    assert delta == TokenDelta("a", (6, EOS), 2, FinishReason.STOP, EOS)
    assert request.output == [5, 6, EOS] and request.stop_token == EOS
    scheduler.check_idle()


def test_a_request_ends_at_max_model_len_and_drafts_stay_inside() -> None:
    scheduler = make(max_model_len=8, num_drafts=4)
    request = add(scheduler, "a", 4)
    assert step(scheduler, [5], num_drafted=4).rows[0].num_drafts == 0
    plan = step(scheduler, [5], num_drafted=4)
    assert plan.rows == (Row(0, 3, 2, True),), "three more tokens fit: two drafts and the target's own"
    plan = step(scheduler, [5], num_drafted=4)
    assert plan.rows == (Row(0, 2, 1, True),)
    assert step(scheduler, [5], num_drafted=4).rows == (Row(0, 1, 0, True),)
    assert (len(request.tokens), request.finish_reason) == (8, FinishReason.LENGTH)


def test_long_prompts_run_in_chunks_behind_decodes() -> None:
    scheduler = make(max_num_batched_tokens=8)
    add(scheduler, "a", 3)
    step(scheduler, [5])
    add(scheduler, "b", 18, first=50)
    add(scheduler, "c", 4, first=80)
    assert step(scheduler, [5], []).rows == (Row(0, 1, 0, True), Row(1, 7, 0, False))
    assert step(scheduler, [5], []).rows == (Row(0, 1, 0, True), Row(1, 7, 0, False))
    plan = step(scheduler, [5], [6], [])
    assert plan.rows == (Row(0, 1, 0, True), Row(1, 4, 0, True), Row(2, 3, 0, False))
    assert [admission.slot for admission in plan.admit] == [2]


def test_prompts_beside_decodes_are_bounded_in_sum() -> None:
    scheduler = make(max_prefill_tokens_beside_decodes=6)
    add(scheduler, "a", 9)
    assert step(scheduler, [5]).rows == (Row(0, 9, 0, True),), "nobody decodes: the whole budget"
    add(scheduler, "b", 10, first=50)
    add(scheduler, "c", 4, first=80)
    assert step(scheduler, [5], []).rows == (Row(0, 1, 0, True), Row(1, 6, 0, False))
    plan = step(scheduler, [5], [6], [])
    assert plan.rows == (Row(0, 1, 0, True), Row(1, 4, 0, True), Row(2, 2, 0, False)), "running and admitted together"
    plan = step(scheduler, [EOS], [EOS], [7])
    assert plan.rows == (Row(0, 1, 0, True), Row(1, 1, 0, True), Row(2, 2, 0, True))
    scheduler.abort("c")
    add(scheduler, "d", 16, first=20)
    assert step(scheduler, [5]).rows == (Row(2, 16, 0, True),), "nobody decodes any more"


def test_a_prompt_beside_decodes_gets_a_token_a_step_at_least() -> None:
    scheduler = make(max_prefill_tokens_beside_decodes=1, max_num_batched_tokens=8, num_drafts=7)
    add(scheduler, "a", 3)
    step(scheduler, [5], num_drafted=7)
    late = add(scheduler, "b", 3, first=50)
    for gained in ([], [], [9]):
        assert step(scheduler, [5], gained, num_drafted=7).rows[1].num_tokens == 1
    assert late.output == [9]


def test_drafts_leave_a_prompt_no_more_than_it_may_get() -> None:
    scheduler = make(max_prefill_tokens_beside_decodes=1, num_drafts=15)
    add(scheduler, "a", 3)
    step(scheduler, [5], num_drafted=15)
    add(scheduler, "b", 3, first=50)
    assert step(scheduler, [5], [], num_drafted=15).rows == (Row(0, 15, 14, True), Row(1, 1, 0, False))


def test_drafts_leave_room_for_a_waiting_prompt() -> None:
    scheduler = make(max_num_batched_tokens=8, num_drafts=7)
    add(scheduler, "a", 3)
    step(scheduler, [5], num_drafted=7)
    assert step(scheduler, [5], num_drafted=7).rows == (Row(0, 8, 7, True),)
    add(scheduler, "b", 3, first=50)
    assert step(scheduler, [5], [], num_drafted=7).rows == (Row(0, 7, 6, True), Row(1, 1, 0, False))
    assert step(scheduler, [5], [], num_drafted=7).rows == (Row(0, 7, 6, True), Row(1, 1, 0, False))


def test_a_cached_prefix_is_not_run_again() -> None:
    scheduler = make()
    add(scheduler, "a", 9, max_tokens=1)
    step(scheduler, [5])
    request = add(scheduler, "b", 9, max_tokens=1)
    plan = scheduler.schedule()
    assert plan.admit[0].num_cached == request.num_cached == 8
    assert plan.rows == (Row(plan.admit[0].slot, 1, 0, True),)
    assert plan.release == (0,) and plan.admit[0].slot == 0, "a slot is released and taken in one plan"


def test_the_youngest_is_preempted_and_comes_back_first() -> None:
    scheduler = make(max_model_len=16, num_blocks=4, enable_prefix_caching=False)
    old, young = add(scheduler, "old", 3), add(scheduler, "young", 3, first=50)
    step(scheduler, [5], [6])
    late = add(scheduler, "late", 3)
    while scheduler.num_preemptions == 0:
        plan = scheduler.schedule()
        if len(plan.rows) == 2:
            land(scheduler, plan, [5], [6])
    assert young.status is RequestStatus.WAITING and young.num_preemptions == 1 and old.status is RequestStatus.RUNNING
    assert plan.release == (1,) and [row.slot for row in plan.rows] == [0] and scheduler.num_waiting == 2
    assert not plan.admit
    land(scheduler, plan, [EOS])
    kept = list(young.tokens)
    plan = step(scheduler, [6])
    assert [admission.tokens for admission in plan.admit] == [tuple(kept)] and late.status is RequestStatus.WAITING
    assert plan.admit[0].num_prompt == 3 and plan.rows[0].num_drafts == 0
    assert young.acceptance.report().drafts == 0


def test_drafts_are_given_up_before_anybody_is_preempted() -> None:
    scheduler = make(max_model_len=16, num_blocks=5, num_drafts=4, enable_prefix_caching=False)
    add(scheduler, "a", 5)
    add(scheduler, "b", 5)
    step(scheduler, [5], [5], num_drafted=4)
    plan = scheduler.schedule()
    assert [row.num_drafts for row in plan.rows] == [4, 2], "one block was free, and two drafts fit where b stands"
    assert scheduler.num_preemptions == 0


def test_lookahead_is_covered_by_blocks() -> None:
    scheduler = make(num_drafts=2, lookahead=2)
    add(scheduler, "a", 7)
    plan = scheduler.schedule()
    assert len(plan.grow[0].blocks) == 3, "positions 0 to 8"
    land(scheduler, plan, [5], num_drafted=2)
    assert scheduler.schedule().grow == (), "positions 7 to 9, and two more"


def test_abort_and_finish_wherever_a_request_stands() -> None:
    scheduler = make(max_num_seqs=1)
    running, waiting = add(scheduler, "running", 3), add(scheduler, "waiting", 3)
    plan = scheduler.schedule()
    assert scheduler.abort("waiting") and not scheduler.abort("waiting")
    assert waiting.finish_reason is FinishReason.ABORT
    assert scheduler.finish("running", FinishReason.STOP)
    assert running.finish_reason is FinishReason.STOP and scheduler.has_work
    assert land(scheduler, plan, [5]) == [], "what was under way yields nothing more"
    assert not scheduler.abort("running") and not scheduler.abort("never was")
    scheduler.check_idle()


def test_planning_ahead_reckons_with_every_outcome() -> None:
    scheduler = make(depth=2, num_drafts=2, max_model_len=12, num_blocks=3)
    request = add(scheduler, "a", 3)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first.rows == (Row(0, 3, 0, True),)
    assert second.rows == (Row(0, 3, 2, True),), "K drafts are expected before anything is known of them"
    with pytest.raises(AssertionError, match="apply the oldest plan first"):
        scheduler.schedule()
    with pytest.raises(AssertionError, match="step 1 is applied before step 0"):
        scheduler.apply(second, StepResult(1, ((6,),), (0,)))
    land(scheduler, first, [5], num_drafted=1)
    third = scheduler.schedule()
    assert third.grow == (Growth(0, 2, third.grow[0].blocks),), "up to 7 committed, so positions up to 8"
    land(scheduler, second, [6, 7], num_drafted=2)
    assert request.acceptance.report().drafted == 1, "one draft came, though two were asked for"
    land(scheduler, third, [EOS])
    assert request.output == [5, 6, 7, EOS]
    scheduler.check_idle()


def test_a_token_that_was_right_by_chance_is_no_accepted_draft() -> None:
    scheduler = make(depth=2, num_drafts=2)
    request = add(scheduler, "a", 3)
    first, second = scheduler.schedule(), scheduler.schedule()
    land(scheduler, first, [5], num_drafted=1)
    (delta,) = land(scheduler, second, [6, 7, 8], num_drafted=0)
    assert delta.tokens == (6, 7, 8) and delta.num_accepted == 1, "one draft came; what was run behind it was none"
    assert request.acceptance.report().per_position == (1, 0)


def test_what_overshoots_is_dropped_and_its_slot_kept_until_it_lands() -> None:
    scheduler = make(depth=2, max_num_seqs=1)
    add(scheduler, "a", 3)
    add(scheduler, "b", 3)
    first, second = scheduler.schedule(), scheduler.schedule()
    (delta,) = land(scheduler, first, [EOS])
    assert delta.finish_reason is FinishReason.STOP
    assert not scheduler.schedule().rows, "the only slot is still written to"
    assert land(scheduler, second, [7]) == []
    plan = scheduler.schedule()
    assert plan.release == (0,) and [admission.slot for admission in plan.admit] == [0]


def test_a_request_sure_to_end_is_not_planned_again() -> None:
    scheduler = make(depth=2)
    add(scheduler, "a", 3, max_tokens=1)
    scheduler.schedule()
    assert not scheduler.schedule().rows


def test_refusals_name_the_numbers() -> None:
    scheduler = make()
    with pytest.raises(PromptError, match="empty"):
        add(scheduler, "a", 0)
    with pytest.raises(PromptError, match=r"32 tokens.*max_model_len 32: shorten it to at most 31"):
        add(scheduler, "a", 32)
    add(scheduler, "a", 31)
    with pytest.raises(InputError, match="already in use: 'a'"):
        add(scheduler, "a", 3)


def test_results_that_no_runner_may_give_are_refused() -> None:
    scheduler = make(num_drafts=1, max_num_batched_tokens=4)
    add(scheduler, "a", 6)
    with pytest.raises(AssertionError, match="inside its prompt"):
        step(scheduler, [1])
    for tokens, num_drafted, message in (([], 0, "gave 0 tokens"), ([1, 2], 0, "gave 2 tokens"), ([1], 2, "2 drafts")):
        scheduler = make(num_drafts=1)
        add(scheduler, "a", 6)
        plan = scheduler.schedule()
        with pytest.raises(AssertionError, match=message):
            scheduler.apply(plan, StepResult(0, (tuple(tokens),), (num_drafted,)))


def test_check_idle_names_what_is_left() -> None:
    scheduler = make()
    add(scheduler, "a", 3)
    with pytest.raises(AssertionError, match="0 running, 1 waiting, 0 plans"):
        scheduler.check_idle()
