"""`/v1/responses` through the openai package: text, reasoning and calls, whole and as events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from fake_engine import HERMES_TEMPLATE, FakeClient, fake_server, write_tokenizer

WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Tells.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
EVERYTHING = f"<think>Hm. Well.</think>Let me look.\n{CALL}\n{CALL} That is all."


class Fake:
    """A fake server and a client of it."""

    def __init__(self, url: str, engine: FakeClient) -> None:
        self.url, self.engine = f"{url}/v1", engine
        self.client = openai.OpenAI(base_url=self.url, api_key="any", max_retries=0)

    def create(self, says: str, **asked: Any) -> Any:
        """What the openai package makes of an answer with this text."""
        self.engine.says, self.engine.fails_after = [says], asked.pop("fails_after", None)
        self.engine.step = asked.pop("step", 3)
        return self.client.responses.create(**{"model": "fake", "input": "Weather?", **asked})


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fake]:
    """A template in Qwen's manner, with reasoning told apart."""
    with fake_server(write_tokenizer(tmp_path_factory.mktemp("hermes"), HERMES_TEMPLATE), None, "think") as made:
        yield Fake(*made)


def shape(response: Any) -> list[Any]:
    """The items without their ids."""
    found: list[Any] = []
    for item in response.output:
        if item.type == "function_call":
            found.append((item.type, item.status, item.name, json.loads(item.arguments)))
        else:
            (part,) = item.content
            found.append((item.type, item.status, part.text))
    return found


SHAPE = [
    ("reasoning", "completed", "Hm. Well."),
    ("message", "completed", "Let me look."),
    ("function_call", "completed", "get_weather", {"city": "Zürich"}),
    ("function_call", "completed", "get_weather", {"city": "Zürich"}),
    ("message", "completed", "That is all."),
]


def test_text(fake: Fake) -> None:
    response = fake.create("It rains.", instructions="Terse.", metadata={"a": "b"}, temperature=0.5, top_p=0.9)
    assert response.output_text == "It rains." and response.status == "completed" and response.error is None
    assert fake.engine.prompts[-1] == "<|system|>Terse.<|user|>Weather?<|assistant|>"
    assert (response.temperature, response.top_p, response.instructions) == (0.5, 0.9, "Terse.")
    assert response.metadata == {"a": "b"} and response.model == "fake" and response.store is False
    usage = response.usage
    assert usage.input_tokens == len(fake.engine.prompts[-1]) and usage.output_tokens == len("It rains.") + 1
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.input_tokens_details.cached_tokens == 0 == usage.output_tokens_details.reasoning_tokens
    assert usage.speculative["drafts"] > 0


def test_an_answer_that_is_cut_short(fake: Fake) -> None:
    response = fake.create("It rains.", max_output_tokens=4)
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    assert shape(response) == [("message", "incomplete", "It r")] and response.usage.output_tokens == 4
    last = list(fake.create("It rains.", max_output_tokens=4, stream=True))[-1]
    assert last.type == "response.incomplete" and shape(last.response) == shape(response)


def test_reasoning_and_calls(fake: Fake) -> None:
    response = fake.create(EVERYTHING, tools=[WEATHER])
    assert shape(response) == SHAPE
    assert response.usage.output_tokens_details.reasoning_tokens == EVERYTHING.index("Let")
    assert len({item.id for item in response.output}) == len(SHAPE)
    assert response.tools[0].name == "get_weather" and response.tool_choice == "auto"
    assert '"city"' in fake.engine.prompts[-1]
    assert shape(fake.create(EVERYTHING, tools=[WEATHER], parallel_tool_calls=False)) == SHAPE[:3]
    assert shape(fake.create(CALL, tools=[WEATHER], tool_choice="none")) == [("message", "completed", CALL)]


TEXT_EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


@pytest.mark.parametrize("step", [1, 5, 1000])
def test_events(fake: Fake, step: int) -> None:
    events = list(fake.create("It rains.", stream=True, step=step))
    kinds = [event.type for event in events]
    assert sorted(set(kinds), key=kinds.index) == TEXT_EVENTS
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "It rains."
    assert shape(events[-1].response) == [("message", "completed", "It rains.")]
    assert events[0].response.status == "in_progress" and events[0].response.id == events[-1].response.id
    assert [event.type for event in fake.create("", stream=True)] == [
        kind for kind in TEXT_EVENTS if kind != "response.output_text.delta"
    ]


@pytest.mark.parametrize("step", [1, 5, 1000])
def test_events_add_up_to_the_response(fake: Fake, step: int) -> None:
    events = list(fake.create(EVERYTHING, tools=[WEATHER], stream=True, step=step))
    response = events[-1].response
    assert shape(response) == SHAPE
    texts = [""] * len(SHAPE)
    added, done = [], []
    for event in events:
        if event.type.endswith(".delta"):
            assert event.item_id == response.output[event.output_index].id
            texts[event.output_index] += event.delta
        elif event.type == "response.output_item.added":
            added.append(event.output_index)
            assert event.item.status == "in_progress"
        elif event.type == "response.output_item.done":
            done.append(event.output_index)
            assert event.item == response.output[event.output_index]
    assert added == done == list(range(len(SHAPE)))
    assert texts[:2] == ["Hm. Well.", "Let me look."] and texts[4] == "That is all."
    assert [json.loads(text) for text in texts[2:4]] == [{"city": "Zürich"}] * 2


def test_the_openai_package_s_own_stream(fake: Fake) -> None:
    fake.engine.says, fake.engine.fails_after = [EVERYTHING], None
    with fake.client.responses.stream(model="fake", input="Weather?", tools=[WEATHER]) as stream:
        kinds = {event.type for event in stream}
        assert shape(stream.get_final_response()) == SHAPE
    assert {"response.function_call_arguments.done", "response.reasoning_text.delta"} <= kinds


def test_each_event_is_named(fake: Fake) -> None:
    fake.engine.says, fake.engine.fails_after = ["Hi"], None
    answer = httpx.post(f"{fake.url}/responses", json={"input": "x", "stream": True})
    blocks = [block.split("\n") for block in answer.text.strip().split("\n\n")]
    for name, data in blocks:
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


def test_async(fake: Fake) -> None:
    fake.engine.says, fake.engine.fails_after = ["It rains."], None

    async def ask() -> tuple[Any, list[Any]]:
        async with openai.AsyncOpenAI(base_url=fake.url, api_key="any", max_retries=0) as client:
            whole = await client.responses.create(model="fake", input="Weather?")
            stream = await client.responses.create(model="fake", input="Weather?", stream=True)
            return whole, [event async for event in stream]

    whole, events = asyncio.run(ask())
    assert whole.output_text == "It rains." == events[-1].response.output_text


def test_an_engine_that_dies(fake: Fake) -> None:
    last = list(fake.create("Hello there", stream=True, fails_after=2))[-1]
    assert last.type == "response.failed" and last.response.status == "failed"
    assert last.response.error.code == "server_error" and "cannot be finished" in last.response.error.message
    with pytest.raises(openai.InternalServerError, match="cannot be finished"):
        fake.create("Hello there", fails_after=2)


def test_a_conversation_goes_on_with_the_items_of_an_answer(fake: Fake) -> None:
    first = fake.create(f"<think>Hm.</think>Look.{CALL}", tools=[WEATHER])
    items: list[Any] = [
        {"role": "developer", "content": "Terse."},
        {"role": "user", "content": [{"type": "input_text", "text": "Weather"}, {"type": "input_text", "text": "?"}]},
        *(item.model_dump() for item in first.output),
        {"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "Rain"},
    ]
    assert fake.create("It rains.", input=items, tools=[WEATHER]).output_text == "It rains."
    assert fake.engine.prompts[-1].endswith(
        "<|system|>Terse.<|user|>Weather?<|assistant|><think>Hm.</think>Look."
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
        "<|tool|><tool_response>Rain</tool_response><|assistant|>"
    )
    said = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    fake.create("x", input=[*said, {"role": "user", "content": "d"}])
    assert fake.engine.prompts[-1] == "<|user|>a<|assistant|>b<|assistant|>c<|user|>d<|assistant|>"


def test_what_asks_for_nothing_is_taken(fake: Fake) -> None:
    nothing: dict[str, Any] = {
        "store": False,
        "previous_response_id": None,
        "background": False,
        "truncation": "disabled",
    }
    nothing |= {
        "text": {"format": {"type": "text"}},
        "include": [],
        "tools": [],
        "top_logprobs": 0,
        "service_tier": "auto",
    }
    nothing |= {"reasoning": {"effort": None}, "prompt_cache_key": "k", "safety_identifier": "s", "user": "me"}
    assert fake.create("Yes.", **nothing).output_text == "Yes."
    more = {"seed": 5, "top_k": 3, "stop": ["."], "speculative": {"enabled": False}}
    assert fake.create("Yes. No.", extra_body=more).output_text == "Yes"


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "store": ({"store": True}, "store", "not offered"),
    "previous": ({"previous_response_id": "resp_1"}, "previous_response_id", "not offered"),
    "background": ({"background": True}, "background", "not offered"),
    "built-in-tool": ({"tools": [{"type": "web_search"}]}, "tools.0", "type function"),
    "mcp": ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools.0", "type function"),
    "strict": ({"tools": [{**WEATHER, "strict": 1}]}, "tools.0.strict", "must be true or false"),
    "tool-choice": ({"tools": [WEATHER], "tool_choice": "required"}, "tool_choice", "not offered"),
    "include": ({"include": ["message.output_text.logprobs"]}, "include", "not offered"),
    "include-unknown": ({"include": ["everything"]}, "include.0", "must be"),
    "obfuscation": ({"stream_options": {"include_obfuscation": True}}, "stream_options", "for streams"),
    "format": ({"text": {"format": {"type": "json_object"}}}, "text", "not offered"),
    "effort": ({"reasoning": {"effort": "much"}}, "reasoning.effort", "must be"),
    "reasoning": ({"reasoning": {"budget": 5}}, "reasoning.budget", "unknown field"),
    "truncation": ({"truncation": "auto"}, "truncation", "not offered"),
    "conversation": ({"conversation": "c"}, "conversation", "not offered"),
    "chat-s-field": ({"max_tokens": 5}, "max_tokens", "unknown field"),
    "chat-s-tool": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools.0.name", "missing"),
    "metadata": ({"metadata": {"a": "b" * 600}}, "metadata", "512"),
    "much-metadata": ({"metadata": {str(number): "" for number in range(17)}}, "metadata", "at most 16 pairs: 17"),
    "limit": ({"max_output_tokens": 0}, "max_output_tokens", "0"),
    "no-input": ({"input": None}, "input", "input"),
    "empty-input": ({"input": []}, "input", "not empty"),
    "item": ({"input": [5]}, "input.0", "5"),
    "item-type": ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0", "item_reference"),
    "item-type-list": ({"input": [{"type": ["message"]}]}, "input.0", "['message']"),
    "item-field": ({"input": [{"role": "user", "content": "x", "name": "b"}]}, "input.0", "name"),
    "role": ({"input": [{"role": "robot", "content": "x"}]}, "input.0", "robot"),
    "image": ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0", "only text"),
    "summary": ({"input": [{"type": "reasoning", "summary": "x"}]}, "input.0.summary", "a list"),
    "output-of-no-call": (
        {"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]},
        "input.0.call_id",
        "'x'",
    ),
    "model": ({"model": "other"}, "", "does not exist"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(fake: Fake, name: str) -> None:
    body, param, said = BAD[name]
    answer = httpx.post(f"{fake.url}/responses", json={"input": "x", **body})
    assert answer.status_code == (400 if param else 404), answer.text
    error = answer.json()["error"]
    assert (error["param"] or "") == param and said in error["message"]
