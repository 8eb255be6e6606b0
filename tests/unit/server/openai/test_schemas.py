"""Request bodies: every field is taken, or refused by name."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any

import pytest

from outrider.core.sampling import NOT_OFFERED as SAMPLING_NOT_OFFERED
from outrider.core.sampling import SamplingParams
from outrider.core.sampling_fields import FIELDS, SamplingField
from outrider.errors import FieldError, InputError, SamplingError
from outrider.server.openai.record import MAX_NESTED, NOT_OFFERED, parse
from outrider.server.openai.schemas import ChatRequest, CompletionRequest, Speculative

TEXT = {"prompt": "x"}


def completion(**given: Any) -> CompletionRequest:
    return parse(json.dumps({**TEXT, **given}).encode(), CompletionRequest)


def chat(**given: Any) -> ChatRequest:
    return parse(json.dumps({"messages": [], **given}).encode(), ChatRequest)


def test_every_sampling_parameter_can_be_given() -> None:
    given = {"n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 4, "max_tokens": 9}
    given |= {"min_tokens": 2, "stop": ["a"], "stop_token_ids": [5], "ignore_eos": True}
    given |= {"include_stop_str_in_output": True, "skip_special_tokens": False}
    assert given.keys() == {entry.name for entry in fields(SamplingParams)} - {"detokenize", "extra_args"}
    assert completion(**given).sampling() == SamplingParams(**given) == chat(**given).sampling()


def test_defaults_are_the_offline_api_s_but_for_the_length_of_an_answer() -> None:
    assert completion().sampling() == SamplingParams()
    assert completion(**dict.fromkeys(["n", "seed", "stop", "top_p"])).sampling() == SamplingParams()
    assert chat().sampling() == SamplingParams(max_tokens=None)
    assert chat(max_completion_tokens=5).sampling().max_tokens == chat(max_tokens=5).sampling().max_tokens == 5
    assert chat(max_completion_tokens=5, max_tokens=5).sampling().max_tokens == 5


def test_a_servers_own_parameters_go_to_its_processors() -> None:
    asked = parse(json.dumps({"prompt": "a", "vllm_xargs": {"no_repeat": 1.5}}).encode(), CompletionRequest)
    assert asked.sampling().extra_args == {"no_repeat": 1.5}
    assert parse(b'{"prompt": "a"}', CompletionRequest).sampling().extra_args == {}


@pytest.mark.parametrize("declared", FIELDS, ids=lambda declared: declared.name)
def test_a_field_of_a_body_has_the_bounds_of_the_engines(declared: SamplingField) -> None:
    (schema,) = [
        one for one in CompletionRequest.model_json_schema()["properties"][declared.name]["anyOf"] if "type" in one
    ][:1]
    low = declared.low if declared.also_off is None else declared.also_off
    assert schema["exclusiveMinimum" if declared.above_low else "minimum"] == low
    assert schema.get("maximum", math.inf) == declared.high


def test_what_the_engine_lacks_is_not_offered_here() -> None:
    assert set(NOT_OFFERED) >= set(SAMPLING_NOT_OFFERED)
    assert not set(NOT_OFFERED) & {*CompletionRequest.model_fields, *ChatRequest.model_fields}


@pytest.mark.parametrize("name", NOT_OFFERED)
def test_a_field_that_is_not_offered_is_refused_unless_it_asks_for_nothing(name: str) -> None:
    for value in NOT_OFFERED[name]:
        assert completion(**{name: value}) == completion()
    for value in (5, "x", [1], {"a": 1}, 1.5):
        if value not in NOT_OFFERED[name]:
            with pytest.raises(FieldError, match=f"^{name} is not offered") as refused:
                completion(**{name: value})
            assert refused.value.field == name


@pytest.mark.parametrize(("name", "value"), [("logprobs", 0), ("best_of", True), ("presence_penalty", False)])
def test_a_truth_value_is_no_number(name: str, value: Any) -> None:
    with pytest.raises(FieldError):
        completion(**{name: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "0"),
        ("temperature", True),
        ("n", 1.5),
        ("n", True),
        ("n", "2"),
        ("seed", 0.5),
        ("stream", 1),
        ("stream", "true"),
        ("echo", "no"),
        ("stop_token_ids", ["a"]),
        ("stop", [5]),
        ("top_k", -2),
        ("min_p", 2),
        ("user", 5),
        ("return_token_ids", 1),
    ],
)
def test_no_value_is_bent_into_shape(field: str, value: Any) -> None:
    with pytest.raises(InputError) as refused:
        completion(**{field: value}).sampling()
    assert (refused.value.field or "").split(".")[0] == field and field in str(refused.value)


@pytest.mark.parametrize(
    ("given", "max_drafts"),
    [({}, None), ({"enabled": False}, 0), ({"num_speculative_tokens": 2}, 2), ({"num_speculative_tokens": 4}, 4)],
)
def test_speculation(given: dict[str, Any], max_drafts: int | None) -> None:
    assert Speculative(**given).max_drafts(4) == max_drafts


def test_speculation_of_a_server_that_does_not_speculate() -> None:
    assert Speculative(enabled=False).max_drafts(0) == 0
    with pytest.raises(FieldError, match="more than the 0"):
        Speculative(num_speculative_tokens=1).max_drafts(0)


def test_contradictions() -> None:
    with pytest.raises(FieldError, match="contradicts max_tokens 4"):
        chat(max_tokens=4, max_completion_tokens=5).sampling()
    with pytest.raises(SamplingError, match="min_tokens 9 is more than max_tokens 5"):
        chat(max_completion_tokens=5, min_tokens=9).sampling()
    with pytest.raises(FieldError, match="stream_options is for streams"):
        completion(stream_options={"include_usage": True}).check()


def test_schemas_know_every_field() -> None:
    for record in (CompletionRequest, ChatRequest):
        schema = record.model_json_schema()
        assert schema["properties"].keys() == record.model_fields.keys()
        assert schema["additionalProperties"] is False


@pytest.mark.parametrize("depth", [MAX_NESTED - 2, MAX_NESTED - 1, 900, 964, 967, 990, 5000])
@pytest.mark.parametrize(("opening", "closing"), ["[]", ('{"a":', "}")])
def test_a_body_has_a_depth(depth: int, opening: str, closing: str) -> None:
    nested = f"{opening * depth}1{closing * depth}"
    body = f'{{"messages": [], "chat_template_kwargs": {{"a": {nested}}}}}'.encode()
    if depth < MAX_NESTED - 1:
        parse(body, ChatRequest)
        return
    with pytest.raises(FieldError, match=r"nested more than 64 deep|not JSON"):
        parse(body, ChatRequest)
