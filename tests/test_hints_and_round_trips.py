"""What clients send beside the conversation, and messages that the server wrote and clients send back."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_engine import HERMES_TEMPLATE, LLAMA_TEMPLATE, FakeClient, fake_server, write_tokenizer
from outrider.engine.hints import note_hint

USER: list[Any] = [{"role": "user", "content": "Weather?"}]
WEATHER = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOLS: list[Any] = [{"type": "function", "function": {**WEATHER, "strict": True}}]
FLAT_TOOLS: list[Any] = [{"type": "function", **WEATHER, "strict": True}]
HERMES = '<tool_call>{"name": "get_weather", "arguments": {"city": "Zürich"}}</tool_call>'
LLAMA = '{"name": "get_weather", "parameters": {"city": "Zürich"}}'

Served = tuple[str, FakeClient]


@pytest.fixture(scope="module", params=["hermes, think", "hermes", "llama", "llama, think"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with each pair of parsers."""
    tools, _, reasoning = request.param.partition(", ")
    template = HERMES_TEMPLATE if tools == "hermes" else LLAMA_TEMPLATE
    with fake_server(write_tokenizer(tmp_path_factory.mktemp(tools), template), tools, reasoning or None) as made:
        yield made


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with fake_server(write_tokenizer(tmp_path_factory.mktemp("one"), HERMES_TEMPLATE), None, "think") as made:
        yield made


def post(served: Served, path: str, says: str = "Yes.", **body: Any) -> httpx.Response:
    served[1].says = [says]
    answer = httpx.post(f"{served[0]}/v1/{path}", json=body)
    assert answer.status_code == 200, answer.text
    return answer


CHAT_HINTS: dict[str, Any] = {
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "prompt_cache_options": {"mode": "explicit", "ttl": "30m"},
    "safety_identifier": "s",
    "user": "u",
    "client_metadata": {"a": "b"},
    "metadata": {"a": "b"},
    "service_tier": "flex",
    "store": False,
    "reasoning_effort": "low",
    "verbosity": "medium",
    "tools": TOOLS,
}
RESPONSES_HINTS: dict[str, Any] = {
    **{name: value for name, value in CHAT_HINTS.items() if name not in ("reasoning_effort", "verbosity", "tools")},
    "include": ["reasoning.encrypted_content"],
    "reasoning": {"effort": "high", "summary": "auto"},
    "text": {"verbosity": "medium"},
    "tools": FLAT_TOOLS,
}


@pytest.mark.parametrize("name", CHAT_HINTS)
def test_hints_of_chat_completions(hermes: Served, name: str) -> None:
    """Bug 15: fields on which the text does not depend, and which clients cannot leave out."""
    answer = post(hermes, "chat/completions", messages=USER, **{name: CHAT_HINTS[name]}).json()
    assert answer["choices"][0]["message"]["content"] == "Yes."
    assert answer.get("metadata") == ({"a": "b"} if name == "metadata" else None)
    assert answer.get("service_tier") == ("default" if name == "service_tier" else None)


@pytest.mark.parametrize("name", RESPONSES_HINTS)
def test_hints_of_responses(hermes: Served, name: str) -> None:
    answer = post(hermes, "responses", input="Weather?", **{name: RESPONSES_HINTS[name]}).json()
    assert answer["output"][0]["content"][0]["text"] == "Yes."
    if name in ("metadata", "prompt_cache_key", "safety_identifier"):
        assert answer[name] == RESPONSES_HINTS[name]
    if name == "tools":
        assert answer["tools"][0]["strict"] is False, "nothing holds the model to a schema"


MESSAGES: dict[str, list[Any]] = {
    "name": [{"role": "user", "content": "Weather?", "name": "ann"}],
    "id": [{"role": "user", "content": "Weather?", "id": "msg_1"}],
    "cache-control": [
        {"role": "user", "content": [{"type": "text", "text": "Weather?", "cache_control": {"type": "ephemeral"}}]}
    ],
    "provider": [*USER, {"role": "assistant", "content": "x", "provider_specific_fields": {"a": 1}}, *USER],
    "refusal": [*USER, {"role": "assistant", "content": None, "refusal": "No."}, *USER],
    "null": [*USER, {"role": "assistant", "content": None}, *USER],
    "refusal-part": [*USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, *USER],
    "function": [
        *USER,
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "rain"},
    ],
    "tool-name": [
        *USER,
        {
            "role": "assistant",
            "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": ""}}],
        },
        {"role": "tool", "name": "f", "tool_call_id": "a", "content": "rain"},
    ],
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_as_clients_send_them(hermes: Served, name: str) -> None:
    post(hermes, "chat/completions", messages=MESSAGES[name])
    prompt = hermes[1].prompts[-1]
    assert "Weather?" in prompt
    assert "refusal" not in name or "<|assistant|>No.<|user|>" in prompt
    assert name not in ("function", "tool-name") or "<tool_response>rain</tool_response>" in prompt


def test_a_hint_is_named_once_in_the_log(hermes: Served, caplog: pytest.LogCaptureFixture) -> None:
    note_hint.cache_clear()
    with caplog.at_level(logging.INFO, "outrider"):
        for _ in range(3):
            post(hermes, "chat/completions", messages=MESSAGES["name"], prompt_cache_key="secret", tools=TOOLS)
    said = [record.getMessage() for record in caplog.records if "is taken" in record.getMessage()]
    assert len(said) == 3 and "secret" not in caplog.text
    assert {line.split(" is taken")[0] for line in said} == {
        "prompt_cache_key",
        "tools[].function.strict",
        "name of a message of role user",
    }


def test_an_effort_reaches_a_template_that_reads_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    template = "{{ reasoning_effort or 'medium' }}" + HERMES_TEMPLATE
    with fake_server(write_tokenizer(tmp_path_factory.mktemp("effort"), template)) as served:
        post(served, "chat/completions", messages=USER, reasoning_effort="high")
        assert served[1].prompts[-1].startswith("high<|user|>")
        post(served, "responses", input="x", reasoning={"effort": "low"})
        assert served[1].prompts[-1].startswith("low<|user|>")
        body = {"messages": USER, "reasoning_effort": "high", "chat_template_kwargs": {"reasoning_effort": "low"}}
        answer = httpx.post(f"{served[0]}/v1/chat/completions", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "reasoning_effort"


@pytest.mark.parametrize("with_last", [True, False])
@pytest.mark.parametrize(
    ("path", "asked"), [("chat/completions", {"messages": USER}), ("completions", {"prompt": "x"})]
)
def test_usage_in_every_chunk(hermes: Served, path: str, asked: dict[str, Any], with_last: bool) -> None:
    """guidellm asks for it, always."""
    options = {"continuous_usage_stats": True, **({"include_usage": True} if with_last else {})}
    answer = post(hermes, path, says="It rains.", stream=True, stream_options=options, **asked)
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == len("It rains.") + 1
    assert path == "completions" or counts[0] == 0 < chunks[0]["usage"]["prompt_tokens"]
    for chunk in chunks:
        assert chunk["usage"]["total_tokens"] == chunk["usage"]["completion_tokens"] + chunk["usage"]["prompt_tokens"]
    assert (chunks[-1]["choices"] == []) is with_last


TEXTS = st.text("ab <>{}/é\n", max_size=6)
SAYINGS = st.lists(
    st.sampled_from(["<think>", "</think>", HERMES, LLAMA, "<|python_tag|>", "Look. ", "", "</tool_call>"]) | TEXTS,
    max_size=5,
).map("".join)


def assembled(chunks: list[Any]) -> dict[str, Any]:
    """The message that a client makes of a stream."""
    message: dict[str, Any] = {}
    for chunk in chunks:
        for name, value in chunk["choices"][0]["delta"].items() if chunk["choices"] else ():
            if name == "tool_calls":
                for call in value:
                    calls = message.setdefault(name, {})
                    held = calls.setdefault(call["index"], {"index": call["index"], "function": {"arguments": ""}})
                    held |= {key: call[key] for key in ("id", "type") if key in call}
                    function = call["function"]
                    held["function"] |= {"name": function["name"]} if "name" in function else {}
                    held["function"]["arguments"] += function["arguments"]
            else:
                message[name] = message.get(name, "") + value if name != "role" else value
    if "tool_calls" in message:
        message["tool_calls"] = list(message["tool_calls"].values())
    return message


@settings(max_examples=40, deadline=None)
@given(says=SAYINGS, stream=st.booleans(), most=st.integers(1, 90))
def test_every_message_that_is_written_is_taken(served: Served, says: str, stream: bool, most: int) -> None:
    """Bug 16: whole or from a stream, with reasoning, calls, both or nothing; cut short anywhere."""
    answer = post(served, "chat/completions", says, messages=USER, tools=TOOLS, stream=stream, max_tokens=most)
    if stream:
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        message = assembled(chunks)
    else:
        message = answer.json()["choices"][0]["message"]
    calls = message.get("tool_calls") or []
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "rain"} for call in calls]
    served[1].says = ["So."]
    back = httpx.post(f"{served[0]}/v1/chat/completions", json={"messages": [*USER, message, *results], "tools": TOOLS})
    assert back.status_code == 200 or "one call at a time" in back.text, (message, back.text)
    text = message.get("content") or ""
    if back.status_code == 200 and not calls:
        assert text in served[1].prompts[-1]


@settings(max_examples=40, deadline=None)
@given(says=SAYINGS, stream=st.booleans(), most=st.integers(1, 90))
def test_every_item_that_is_written_is_taken(served: Served, says: str, stream: bool, most: int) -> None:
    answer = post(served, "responses", says, input="x", tools=FLAT_TOOLS, stream=stream, max_output_tokens=most)
    if stream:
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        items = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        assert items == events[-1]["response"]["output"]
    else:
        items = answer.json()["output"]
    calls = [item for item in items if item["type"] == "function_call"]
    results = [{"type": "function_call_output", "call_id": call["call_id"], "output": "rain"} for call in calls]
    body = {"input": [*USER, *items, *results], "tools": FLAT_TOOLS}
    back = httpx.post(f"{served[0]}/v1/responses", json=body)
    assert back.status_code == 200 or "one call at a time" in back.text, (items, back.text)


def test_what_the_openai_package_parses_is_taken(hermes: Served) -> None:
    """Its stream helper adds the arguments of strict tools as a record, and `parsed`."""
    client = openai.OpenAI(base_url=f"{hermes[0]}/v1", api_key="any", max_retries=0)
    hermes[1].says = [f"Look. {HERMES}"]
    with client.chat.completions.stream(model="fake", messages=USER, tools=TOOLS) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls[0].function.parsed_arguments == {"city": "Zürich"}
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    post(hermes, "chat/completions", messages=[*USER, message.model_dump(), result], tools=TOOLS)
    hermes[1].says = [f"Look. {HERMES}"]
    with client.responses.stream(model="fake", input="x", tools=FLAT_TOOLS) as events:
        items = events.get_final_response().output
    output = {"type": "function_call_output", "call_id": items[-1].call_id, "output": "rain"}
    post(hermes, "responses", input=[*(item.model_dump() for item in items), output])
