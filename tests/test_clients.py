"""Frameworks as their users call them, each through a loop with a tool: `make test-clients`, with its own extra."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from fake_engine import HERMES_TEMPLATE, fake_server, write_tokenizer

pytestmark = pytest.mark.clients

CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'


def answer(prompt: str) -> str:
    """A call where tools are shown, and a sentence once there is a result."""
    if "<tool_response>" in prompt:
        return f"It says {prompt.rpartition('<tool_response>')[2].partition('</tool_response>')[0]}."
    return CALL if "get_weather" in prompt else "Hello there."


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with fake_server(write_tokenizer(tmp_path_factory.mktemp("clients"), HERMES_TEMPLATE), "hermes") as (
        address,
        engine,
    ):
        engine.answers = answer
        yield f"{address}/v1"


def get_weather(city: str) -> str:
    """Tells the weather of a city."""
    return f"rain in {city}"


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_openai_agents(url: str, api: str) -> None:
    agents = pytest.importorskip("agents")
    import openai

    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=url, api_key="any")
    kinds = {"chat": agents.OpenAIChatCompletionsModel, "responses": agents.OpenAIResponsesModel}
    model = kinds[api](model="fake", openai_client=client)
    agent = agents.Agent(name="a", instructions="Terse.", model=model, tools=[agents.function_tool(get_weather)])

    async def run() -> tuple[str, str]:
        whole = await agents.Runner.run(agent, "Weather?")
        streamed = agents.Runner.run_streamed(agent, "Weather?")
        async for _ in streamed.stream_events():
            pass
        return whole.final_output, streamed.final_output

    assert asyncio.run(run()) == ("It says rain in Paris.",) * 2


@pytest.mark.parametrize("api", ["OpenAIChatModel", "OpenAIResponsesModel"])
def test_pydantic_ai(url: str, api: str) -> None:
    pydantic_ai = pytest.importorskip("pydantic_ai")
    from pydantic_ai.models import openai as models
    from pydantic_ai.providers.openai import OpenAIProvider

    model = getattr(models, api)("fake", provider=OpenAIProvider(base_url=url, api_key="any"))
    agent = pydantic_ai.Agent(model, instructions="Terse.", tools=[get_weather])
    first = agent.run_sync("Weather?")
    assert first.output == "It says rain in Paris."
    assert "It says" in agent.run_sync("And now?", message_history=first.all_messages()).output


def test_autogen(url: str) -> None:
    pytest.importorskip("autogen_ext.models.openai")
    from autogen_agentchat.agents import AssistantAgent
    from autogen_ext.models.openai import OpenAIChatCompletionClient

    info: Any = {
        "vision": False,
        "function_calling": True,
        "json_output": False,
        "family": "unknown",
        "structured_output": False,
    }
    client = OpenAIChatCompletionClient(model="fake", base_url=url, api_key="any", model_info=info)
    agent = AssistantAgent("a", client, tools=[get_weather], reflect_on_tool_use=True)

    async def run() -> Any:
        return await agent.run(task="Weather?")

    assert asyncio.run(run()).messages[-1].content == "It says rain in Paris."


@pytest.mark.parametrize("stream", [False, True])
def test_litellm(url: str, stream: bool) -> None:
    litellm = pytest.importorskip("litellm")
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": parameters, "strict": True}}]
    how: dict[str, Any] = {"model": "openai/fake", "api_base": url, "api_key": "any", "tools": tools}
    messages: list[Any] = [{"role": "user", "content": "Weather?"}]

    def ask() -> Any:
        found = litellm.completion(messages=messages, stream=stream, **how)
        return litellm.stream_chunk_builder(list(found), messages=messages) if stream else found

    message = ask().choices[0].message
    messages.append(message.model_dump())
    for call in message.tool_calls:
        result = get_weather(**json.loads(call.function.arguments))
        messages.append({"role": "tool", "name": call.function.name, "tool_call_id": call.id, "content": result})
    assert ask().choices[0].message.content == "It says rain in Paris."
