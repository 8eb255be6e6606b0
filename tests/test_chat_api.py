"""Tools, reasoning and messages through the openai package, over an engine that writes what it is told to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from fake_engine import HERMES_TEMPLATE, LLAMA_TEMPLATE, FakeClient, fake_server, write_tokenizer
from outrider.errors import OptionError
from outrider.server.tokenizer_service import TokenizerService

USER: list[Any] = [{"role": "user", "content": "Weather?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Tells.", "parameters": PARAMETERS},
}
TIME: Any = {"type": "function", "function": {"name": "get_time"}}
TOOLS = [WEATHER, TIME]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
CALL_TIME = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'


class Fake:
    """A fake server and a client of it."""

    def __init__(self, url: str, engine: FakeClient) -> None:
        self.url, self.engine = f"{url}/v1", engine
        self.client = openai.OpenAI(base_url=self.url, api_key="any", max_retries=0)

    def chat(self, says: str | list[str], **asked: Any) -> Any:
        """What the openai package makes of an answer with this text."""
        self.engine.says = [says] if isinstance(says, str) else says
        self.engine.fails_after, self.engine.step = None, asked.pop("step", 3)
        return self.client.chat.completions.create(**{"model": "fake", "messages": USER, **asked})

    def streamed(self, says: str, **asked: Any) -> tuple[dict[str, Any], str | None, list[Any]]:
        """The message that a stream's deltas add up to, its finish reason, and its chunks."""
        chunks = list(self.chat(says, stream=True, **asked))
        message: dict[str, Any] = {"content": "", "reasoning": "", "tool_calls": []}
        reasons = []
        for chunk in chunks:
            for choice in chunk.choices:
                delta = choice.delta
                message["content"] += delta.content or ""
                message["reasoning"] += getattr(delta, "reasoning", None) or ""
                assert getattr(delta, "reasoning", None) == getattr(delta, "reasoning_content", None)
                for call in delta.tool_calls or ():
                    if call.index == len(message["tool_calls"]):
                        assert call.id and call.type == "function" and call.function.name
                        message["tool_calls"].append([call.id, call.function.name, ""])
                    else:
                        assert call.id is None and call.function.name is None, "given once"
                    message["tool_calls"][call.index][2] += call.function.arguments
                reasons.append(choice.finish_reason)
        assert reasons[:-1] == [None] * (len(reasons) - 1)
        return message, reasons[-1], chunks


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fake]:
    """A template in Qwen's manner; no flag says which parser reads its calls."""
    with fake_server(write_tokenizer(tmp_path_factory.mktemp("hermes"), HERMES_TEMPLATE), None, "think") as made:
        yield Fake(*made)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fake]:
    """A template in Llama's manner, and a tag that is a special token."""
    path = write_tokenizer(tmp_path_factory.mktemp("llama"), LLAMA_TEMPLATE, ("<|python_tag|>",))
    with fake_server(path) as made:
        yield Fake(*made)


def names_and_arguments(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]


def test_tool_calls(hermes: Fake) -> None:
    answer = hermes.chat(f"Let me look.\n{CALL}\n{CALL_TIME}", tools=TOOLS, tool_choice="auto")
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me look."
    assert names_and_arguments(choice.message) == [("get_weather", {"city": "Zürich"}), ("get_time", {})]
    assert len({call.id for call in choice.message.tool_calls}) == 2
    assert '"get_weather"' in hermes.engine.prompts[-1] and '"city"' in hermes.engine.prompts[-1]
    bare = hermes.chat(CALL, tools=TOOLS).choices[0].message
    assert bare.content is None and len(bare.tool_calls) == 1


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_tool_calls_in_a_stream(hermes: Fake, step: int) -> None:
    says = f"Let me look.\n{CALL}\n{CALL_TIME}"
    message, reason, _ = hermes.streamed(says, tools=TOOLS, step=step)
    assert reason == "tool_calls" and message["content"] == "Let me look."
    calls = [(name, json.loads(arguments)) for _, name, arguments in message["tool_calls"]]
    assert calls == [("get_weather", {"city": "Zürich"}), ("get_time", {})]


def test_the_openai_package_s_own_stream(hermes: Fake) -> None:
    hermes.engine.says = [f"Look: {CALL}"]
    with hermes.client.chat.completions.stream(model="fake", messages=USER, tools=TOOLS) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    assert {"content.delta", "tool_calls.function.arguments.done"} <= kinds
    assert names_and_arguments(message) == [("get_weather", {"city": "Zürich"})] and message.content == "Look:"


def test_async_tools(hermes: Fake) -> None:
    hermes.engine.says, hermes.engine.fails_after = [CALL], None

    async def ask() -> tuple[Any, list[Any]]:
        async with openai.AsyncOpenAI(base_url=hermes.url, api_key="any", max_retries=0) as client:
            asked: dict[str, Any] = {"model": "fake", "messages": USER, "tools": TOOLS}
            whole = await client.chat.completions.create(**asked)
            stream = await client.chat.completions.create(**asked, stream=True)
            return whole, [chunk async for chunk in stream]

    whole, chunks = asyncio.run(ask())
    assert names_and_arguments(whole.choices[0].message) == [("get_weather", {"city": "Zürich"})]
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [call.function.name for call in calls] == ["get_weather", None]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_whole_conversation_with_tools(hermes: Fake) -> None:
    first = hermes.chat(f"<think>Hm.</think>{CALL}", tools=TOOLS).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": [{"type": "text", "text": "Rain"}]}
    answer = hermes.chat("It rains.", messages=[*USER, first.model_dump(), result], tools=TOOLS)
    assert answer.choices[0].message.content == "It rains." and answer.choices[0].finish_reason == "stop"
    prompt = hermes.engine.prompts[-1]
    assert "<think>Hm.</think>" in prompt and "<tool_response>Rain</tool_response>" in prompt
    assert '{"name": "get_weather", "arguments": {"city": "Zürich"}}' in prompt, "arguments as a record, not as text"


def test_malformed_calls_are_content(hermes: Fake) -> None:
    for says in (CALL.replace("}}", "}"), CALL.replace("get_weather", "other"), CALL[:30]):
        whole = hermes.chat(says, tools=TOOLS).choices[0]
        assert (whole.message.content, whole.message.tool_calls, whole.finish_reason) == (says, None, "stop")
        message, reason, _ = hermes.streamed(says, tools=TOOLS)
        assert (message["content"], message["tool_calls"], reason) == (says, [], "stop")


def test_a_call_that_is_cut_short(hermes: Fake) -> None:
    cut = hermes.chat(CALL, tools=TOOLS, max_tokens=30).choices[0]
    assert cut.finish_reason == "length" and cut.message.tool_calls is None and cut.message.content == CALL[:30]
    later = hermes.chat(f"{CALL} and so on", tools=TOOLS, max_tokens=len(CALL.encode()) + 3).choices[0]
    assert later.finish_reason == "length" and len(later.message.tool_calls) == 1


def test_parallel_tool_calls(hermes: Fake) -> None:
    for parallel, count in ((False, 1), (True, 2), (None, 2)):
        answer = hermes.chat(f"{CALL}\n{CALL_TIME}", tools=TOOLS, parallel_tool_calls=parallel)
        assert len(answer.choices[0].message.tool_calls) == count


def test_tool_choice(hermes: Fake) -> None:
    answer = hermes.chat(CALL, tools=TOOLS, tool_choice="none").choices[0]
    assert answer.message.tool_calls is None and answer.message.content == CALL
    assert "get_weather" not in hermes.engine.prompts[-1], "a model that may not call tools is shown none"
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        with pytest.raises(openai.BadRequestError, match="not offered, as nothing makes the model call") as refused:
            hermes.chat(CALL, tools=TOOLS, tool_choice=choice)
        assert refused.value.param == "tool_choice"


def test_without_tools_a_call_is_text(hermes: Fake) -> None:
    for asked in ({}, {"tools": []}, {"tool_choice": "none"}):
        assert hermes.chat(CALL, **asked).choices[0].message.content == CALL


def test_several_choices_are_told_apart(hermes: Fake) -> None:
    says = [CALL, "No.", f"<think>Hm.</think>Yes. {CALL_TIME}"]
    answer = hermes.chat(says, tools=TOOLS, n=3)
    assert [len(choice.message.tool_calls or ()) for choice in answer.choices] == [1, 0, 1]
    assert [choice.finish_reason for choice in answer.choices] == ["tool_calls", "stop", "tool_calls"]
    assert answer.choices[2].message.content == "Yes." and answer.choices[2].message.reasoning == "Hm."
    contents = dict.fromkeys(range(3), "")
    for chunk in hermes.chat(says, tools=TOOLS, n=3, stream=True):
        contents[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert contents == {0: "", 1: "No.", 2: "Yes."}


@pytest.mark.parametrize("step", [1, 4, 1000])
def test_reasoning(hermes: Fake, step: int) -> None:
    says = "<think>\nIt may rain.\n</think>\n\nRain."
    whole = hermes.chat(says, step=step)
    message = whole.choices[0].message
    assert (message.reasoning, message.reasoning_content, message.content) == ("It may rain.",) * 2 + ("Rain.",)
    assert whole.usage.completion_tokens_details.reasoning_tokens == says.index("\n\nRain")
    streamed, reason, chunks = hermes.streamed(says, step=step, stream_options={"include_usage": True})
    assert (streamed["reasoning"], streamed["content"], reason) == ("It may rain.", "Rain.", "stop")
    assert chunks[-1].usage.completion_tokens_details == whole.usage.completion_tokens_details
    assert hermes.chat("Rain.").usage.completion_tokens_details.reasoning_tokens == 0


def test_reasoning_that_the_prompt_opens(hermes: Fake) -> None:
    asked: dict[str, Any] = {"extra_body": {"chat_template_kwargs": {"thinking": True}}}
    message = hermes.chat("It may rain.</think>Rain.", **asked).choices[0].message
    assert hermes.engine.prompts[-1].endswith("<think>\n")
    assert (message.reasoning, message.content) == ("It may rain.", "Rain.")
    unfinished = hermes.chat("It may rain.", max_tokens=6, **asked)
    assert (unfinished.choices[0].message.reasoning, unfinished.choices[0].message.content) == ("It may", None)
    assert unfinished.usage.completion_tokens_details.reasoning_tokens == 6
    assert hermes.chat("It may rain.</think>Rain.").choices[0].message.content == "It may rain.</think>Rain."


def test_reasoning_stays_in_the_text_unless_the_server_is_told(llama: Fake) -> None:
    message = llama.chat("<think>a</think>b").choices[0].message
    assert message.content == "<think>a</think>b" and not hasattr(message, "reasoning")


def test_llama_calls(llama: Fake) -> None:
    call = '{"name": "get_weather", "parameters": {"city": "Bern"}}'
    for says in (call, f"<|python_tag|>{call}"):
        (choice,) = llama.chat(says, tools=TOOLS).choices
        assert names_and_arguments(choice.message) == [("get_weather", {"city": "Bern"})]
        message, reason, _ = llama.streamed(says, tools=TOOLS)
        assert message["tool_calls"][0][1:] == ["get_weather", '{"city": "Bern"}'] and reason == "tool_calls"
    assert llama.chat(f"<|python_tag|>{call}").choices[0].message.content == call, "special tokens are left out"
    with pytest.raises(openai.BadRequestError, match=r"hides <\|python_tag\|>") as refused:
        llama.chat(call, tools=TOOLS, extra_body={"skip_special_tokens": True})
    assert refused.value.param == "skip_special_tokens"


def test_tags_that_are_special_tokens_are_read(tmp_path_factory: pytest.TempPathFactory) -> None:
    tags = ("<tool_call>", "</tool_call>", "<think>", "</think>")
    path = write_tokenizer(tmp_path_factory.mktemp("special"), HERMES_TEMPLATE, tags)
    with fake_server(path, None, "think") as made:
        fake = Fake(*made)
        answer = fake.chat(f"<think>Hm.</think>{CALL}", tools=TOOLS)
        message = answer.choices[0].message
        assert message.reasoning == "Hm." and names_and_arguments(message) == [("get_weather", {"city": "Zürich"})]
        assert answer.usage.completion_tokens_details.reasoning_tokens == 1 + len("Hm.") + 1


def assistant(**call: Any) -> Any:
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function", **call}]}


def test_what_a_template_refuses_is_told(llama: Fake) -> None:
    one = assistant(function={"name": "get_time", "arguments": "{}"})
    two = {**one, "tool_calls": [*one["tool_calls"], {**one["tool_calls"][0], "id": "b"}]}
    with pytest.raises(openai.BadRequestError, match="one call at a time") as refused:
        llama.chat("x", messages=[*USER, two])
    assert refused.value.param == "messages"


CALLED = assistant(function={"name": "get_time", "arguments": "{}"})
BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "type": ({"tools": [{"type": "web_search"}]}, "tools.0", "type function"),
    "no-function": ({"tools": [{"type": "function"}]}, "tools.0.function", "missing"),
    "no-name": ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name", "missing"),
    "name": ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "a b"),
    "unknown": ({"tools": [{**TIME, "x": 1}]}, "tools.0.x", "unknown"),
    "strict": (
        {"tools": [{"type": "function", "function": {"name": "f", "strict": "yes"}}]},
        "tools.0.function.strict",
        "must be true or false",
    ),
    "twice": ({"tools": [TIME, TIME]}, "tools.1.function.name", "get_time"),
    "template-tools": ({"chat_template_kwargs": {"tools": [TIME]}}, "chat_template_kwargs", "set otherwise"),
    "template-given": ({"chat_template_kwargs": {"chat_template": "{{ 1 / 0 }}"}}, "chat_template_kwargs", "otherwise"),
    "template-messages": ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "set otherwise"),
    "template-self": ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs", "reads no self"),
    "template-unknown": ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs", "thinking"),
    "role": ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "robot"),
    "name-of-user": ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "messages.0.name", "5"),
    "field-of-user": ({"messages": [{"role": "user", "content": "x", "nom": "b"}]}, "messages.0", "nom of a message"),
    "id": ({"messages": [{"role": "user", "content": "x", "id": 5}]}, "messages.0.id", "must be text"),
    "cache-control": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": "e"}]}]},
        "messages.0.content.0.cache_control",
        "must be an object",
    ),
    "no-user-content": ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "must be text"),
    "audio": ({"messages": [{"role": "assistant", "content": "x", "audio": {"id": "a"}}]}, "messages.0", "audio"),
    "function-of-none": (
        {"messages": [*USER, {"role": "function", "name": "f", "content": "x"}]},
        "messages.1.name",
        "no function called",
    ),
    "both-calls": (
        {"messages": [{**CALLED, "function_call": CALLED["tool_calls"][0]["function"]}]},
        "messages.0.function_call",
        "contradicts tool_calls",
    ),
    "metadata": ({"metadata": {"a": 1}}, "metadata.a", "must be text: 1"),
    "much-metadata": ({"metadata": {"a": "b" * 513}}, "metadata", "512"),
    "cache-key": ({"prompt_cache_key": 5}, "prompt_cache_key", "must be text: 5"),
    "safety": ({"safety_identifier": ["a"]}, "safety_identifier", 'must be text: ["a"]'),
    "store": ({"store": True}, "store", "not offered"),
    "tier": ({"service_tier": "best"}, "service_tier", "must be 'auto'"),
    "effort": ({"reasoning_effort": "much"}, "reasoning_effort", "must be 'none'"),
    "obfuscation": (
        {"stream": True, "stream_options": {"include_obfuscation": 1}},
        "stream_options.include_obfuscation",
        "",
    ),
    "continuing": ({"continue_final_message": True}, "add_generation_prompt", "set that to false"),
    "unknown-field": ({"prompt_cache": "x"}, "prompt_cache", "unknown field: prompt_cache (did you mean"),
    "user-calls": ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages.0", "tool_calls"),
    "calls": ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "messages.0.tool_calls", "list"),
    "call": ({"messages": [{"role": "assistant", "tool_calls": [5]}]}, "messages.0.tool_calls.0", "function"),
    "call-name": (
        {"messages": [assistant(function={"arguments": "{}"})]},
        "messages.0.tool_calls.0.function.name",
        "not empty",
    ),
    "arguments": (
        {"messages": [assistant(function={"name": "f", "arguments": "[1]"})]},
        "messages.0.tool_calls.0.function.arguments",
        "object",
    ),
    "arguments-record": (
        {"messages": [assistant(function={"name": "f", "arguments": {"a": 1}})]},
        "messages.0.tool_calls.0.function.arguments",
        "JSON text",
    ),
    "call-more": (
        {"messages": [assistant(function=CALLED["tool_calls"][0]["function"], x=1)]},
        "messages.0.tool_calls.0",
        "x",
    ),
    "no-id": ({"messages": [*USER, {"role": "tool", "content": "x"}]}, "messages.1.tool_call_id", "not empty"),
    "id-of-none": (
        {"messages": [CALLED, {"role": "tool", "content": "x", "tool_call_id": "b"}]},
        "messages.1.tool_call_id",
        "'b'",
    ),
    "two-reasonings": (
        {"messages": [{"role": "assistant", "content": "x", "reasoning": "a", "reasoning_content": "b"}]},
        "messages.0.reasoning",
        "contradicts",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tools_and_messages(hermes: Fake, name: str) -> None:
    body, param, said = BAD[name]
    answer = httpx.post(f"{hermes.url}/chat/completions", json={"messages": USER, **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert said in answer.json()["error"]["message"]


def test_messages_as_openai_takes_them(hermes: Fake) -> None:
    """All roles, and what the openai package adds to a message that it gives back."""
    said = hermes.chat("Hello.").choices[0].message.model_dump()
    assert {"refusal", "annotations", "function_call", "tool_calls"} <= said.keys()
    messages = [{"role": "developer", "content": "Terse."}, USER[0], said, CALLED]
    messages.append({"role": "tool", "tool_call_id": "a", "content": "noon"})
    hermes.chat("x", messages=messages)
    prompt = hermes.engine.prompts[-1]
    assert prompt.startswith("<|system|>Terse.<|user|>Weather?<|assistant|>Hello.<|assistant|><tool_call>")
    assert prompt.endswith("</tool_call><|tool|><tool_response>noon</tool_response><|assistant|>")


def test_stop_and_limits(hermes: Fake) -> None:
    for stop in ("STOP", ["never", "STOP"]):
        whole = hermes.chat("One STOP two", stop=stop).choices[0]
        assert (whole.message.content, whole.finish_reason, whole.model_extra["stop_reason"]) == (
            "One ",
            "stop",
            "STOP",
        )
        message, reason, _ = hermes.streamed("One STOP two", stop=stop)
        assert (message["content"], reason) == ("One ", "stop")
    short = hermes.chat("One two", max_completion_tokens=3)
    assert (short.choices[0].message.content, short.choices[0].finish_reason) == ("One", "length")
    assert short.usage.completion_tokens == 3 and short.usage.total_tokens == short.usage.prompt_tokens + 3


def test_token_ids_of_a_stream_with_calls(hermes: Fake) -> None:
    ids = []
    says = f"So: {CALL} {CALL_TIME}"
    for chunk in hermes.chat(says, tools=TOOLS, stream=True, step=40, extra_body={"return_token_ids": True}):
        ids += getattr(chunk.choices[0], "token_ids", [])
    whole = hermes.chat(says, tools=TOOLS, extra_body={"return_token_ids": True}).choices[0]
    assert ids == whole.token_ids and len(ids) == len(says.encode()) + 1


def test_completions_through_the_openai_package(hermes: Fake) -> None:
    hermes.engine.says, hermes.engine.fails_after = ["One STOP", "Two STOP"], None
    hermes.engine.asked.clear()
    asked: dict[str, Any] = {"model": "fake", "prompt": "Count: ", "n": 2, "seed": 7, "stop": "STOP", "echo": True}
    whole = hermes.client.completions.create(**asked)
    assert [choice.text for choice in whole.choices] == ["Count: One ", "Count: Two "]
    assert [choice.finish_reason for choice in whole.choices] == ["stop", "stop"]
    first, second = (request.sampling for request in hermes.engine.asked)
    assert (first.seed, second.seed) == (7, 8), "as offline"
    texts = ["", ""]
    *chunks, last = hermes.client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices] and all(chunk.usage is None for chunk in chunks)
    assert last.choices == [] and last.usage == whole.usage
    assert [request.sampling for request in hermes.engine.asked] == [first, second] * 2


def test_a_seed_is_the_request_s(hermes: Fake) -> None:
    hermes.engine.asked.clear()
    hermes.chat("x", seed=11, temperature=0.3, top_p=0.8)
    (request,) = hermes.engine.asked
    assert (request.sampling.seed, request.sampling.temperature, request.sampling.top_p) == (11, 0.3, 0.8)


def test_an_engine_that_dies_ends_a_stream_with_an_error(hermes: Fake) -> None:
    hermes.engine.says, hermes.engine.fails_after, hermes.engine.step = ["Hello there"], 2, 3
    with pytest.raises(openai.APIError, match="cannot be finished"):
        list(hermes.client.chat.completions.create(model="fake", messages=USER, stream=True))
    hermes.engine.fails_after = None


PLAIN = "{% for message in messages %}{{ message.role + message.content }}{% endfor %}"
EMPTY_REASONING = HERMES_TEMPLATE.replace(
    "{{- '<|' + message.role + '|>' }}",
    "{{- '<|' + message.role + '|>' }}{% if message.tool_calls %}<think>\n\n</think>\n\n{% endif %}",
)
XML = HERMES_TEMPLATE.replace('{"name": "{{', "<function={{")


def test_which_parser_fits_is_read_off_the_template(tmp_path_factory: pytest.TempPathFactory) -> None:
    for template, parser in (
        (HERMES_TEMPLATE, "hermes"),
        (EMPTY_REASONING, "hermes"),
        (LLAMA_TEMPLATE, "llama"),
        (PLAIN, None),
        (XML, None),
        (None, None),
    ):
        path = write_tokenizer(tmp_path_factory.mktemp("template"), template)
        assert TokenizerService(path).output_parsers.tool_call_parser == parser
    assert (
        TokenizerService(write_tokenizer(tmp_path_factory.mktemp("xml"), XML), "llama").output_parsers.tool_call_parser
        == "llama"
    )
    with pytest.raises(OptionError, match="needs a chat template that shows tools"):
        TokenizerService(write_tokenizer(tmp_path_factory.mktemp("plain"), PLAIN), "hermes")


@pytest.mark.parametrize(
    ("template", "body", "param", "said"),
    [
        (PLAIN, {"tools": TOOLS}, "tools", "shows no tools"),
        (XML, {"tools": TOOLS}, "tools", "--tool-call-parser hermes or llama"),
        (PLAIN, {"messages": [*USER, CALLED]}, "messages.1.tool_calls", "shows no tool calls"),
        (
            "{% for message in messages if message.role != 'tool' %}{{ message }}{% endfor %}",
            {"messages": [*USER, CALLED, {"role": "tool", "tool_call_id": "a", "content": "x"}]},
            "messages.2",
            "shows no tool results",
        ),
    ],
    ids=["no-tools", "unknown-form", "no-calls", "no-results"],
)
def test_what_a_template_would_leave_out_is_refused(
    tmp_path_factory: pytest.TempPathFactory, template: str, body: dict[str, Any], param: str, said: str
) -> None:
    with fake_server(write_tokenizer(tmp_path_factory.mktemp("template"), template)) as (url, _):
        answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": USER, **body})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param
    assert said in answer.json()["error"]["message"]
