import pytest

from outrider.core.output import FinishReason
from outrider.core.request import Request, RequestStatus
from outrider.core.sampling import SamplingParams


def make(max_tokens: int | None = 8, min_tokens: int = 0, stop_ids: tuple[int, ...] = (9,)) -> Request:
    return Request("a", (1, 2, 3), SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens), stop_ids=stop_ids)


def extend(request: Request, *tokens: int, max_model_len: int = 100) -> tuple[int, ...]:
    return request.extend(tokens, request.max_length(max_model_len))


def test_a_new_request_holds_its_prompt() -> None:
    request = make()
    assert request.status is RequestStatus.NEW
    assert (request.tokens, request.output, request.num_prompt, request.num_output) == ([1, 2, 3], [], 3, 0)


def test_tokens_are_kept_in_order() -> None:
    request = make()
    assert extend(request, 4, 5) == (4, 5)
    assert extend(request, 6) == (6,)
    assert request.output == [4, 5, 6] and request.finish_reason is None


@pytest.mark.parametrize("max_tokens, max_model_len, most", [(8, 100, 11), (8, 5, 5), (None, 100, 100)])
def test_max_length(max_tokens: int | None, max_model_len: int, most: int) -> None:
    assert make(max_tokens).max_length(max_model_len) == most


def test_a_stop_token_is_kept_and_what_follows_is_not() -> None:
    request = make()
    assert extend(request, 4, 9, 5, 9) == (4, 9)
    assert request.output == [4, 9]
    assert (request.finish_reason, request.stop_token) == (FinishReason.STOP, 9)


def test_the_limit_cuts_a_step() -> None:
    request = make(max_tokens=2)
    assert extend(request, 4, 5, 6) == (4, 5)
    assert (request.finish_reason, request.stop_token) == (FinishReason.LENGTH, None)


def test_max_model_len_is_a_limit_too() -> None:
    request = make(max_tokens=None)
    assert extend(request, 4, 5, max_model_len=5) == (4, 5)
    assert request.finish_reason is FinishReason.LENGTH


def test_a_stop_token_at_the_limit_is_a_stop() -> None:
    request = make(max_tokens=2)
    assert extend(request, 4, 9) == (4, 9)
    assert request.finish_reason is FinishReason.STOP


def test_stop_after_the_limit_does_not_count() -> None:
    request = make(max_tokens=1)
    assert extend(request, 4, 9) == (4,)
    assert request.finish_reason is FinishReason.LENGTH


def test_nothing_stops_before_min_tokens() -> None:
    request = make(min_tokens=3)
    assert extend(request, 9, 9) == (9, 9)
    assert request.finish_reason is None
    assert extend(request, 9, 4) == (9,)
    assert (request.finish_reason, request.num_output) == (FinishReason.STOP, 3)
