"""The server, through real sockets and real clients: the offline API's tokens, and manners under load and in faults."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from outrider import LLM, RequestOutput, SamplingParams
from outrider.draft.base import BUNDLED_MODEL
from outrider.draft.registry import default_method
from outrider.server.http.responses import MAX_MESSAGE_LENGTH
from servers import Server, events, serving

NUM_STREAMS = 64
PROMPTS = ["def fibonacci(n):\n", "class Stack:\n", "import os\n", "for line in open(path):\n    ", "# né à Zürich\n"]
ENDLESS = {"max_tokens": 1900, "ignore_eos": True, "temperature": 0.0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The bundled model with its own drafts, and a small limit for bodies."""
    with serving(tmp_path_factory.mktemp("server") / "log", "--max-body-bytes", "100000") as server:
        yield server


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """The same, offline."""
    with LLM(speculative_config={"method": default_method(BUNDLED_MODEL)}) as llm:
        yield llm


def offline(llm: LLM, prompt: Any, **sampling: Any) -> RequestOutput:
    return llm.generate(prompt, SamplingParams(**sampling))[0]


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_openai_client(server: Server, client: openai.OpenAI, llm: LLM) -> None:
    assert [model.id for model in client.models.list()] == [server.model]
    text = client.completions.create(model=server.model, prompt=PROMPTS[0], temperature=0, max_tokens=24)
    expected = offline(llm, PROMPTS[0], temperature=0.0, max_tokens=24)
    assert text.choices[0].text == expected.outputs[0].text
    assert text.choices[0].finish_reason == expected.outputs[0].finish_reason == "length"
    assert text.usage is not None and text.usage.completion_tokens == 24
    assert text.usage.prompt_tokens == len(expected.prompt_token_ids)
    messages = [{"role": "system", "content": "Terse."}, {"role": "user", "content": "Add two numbers."}]
    said = client.chat.completions.create(
        model=server.model,
        messages=messages,
        temperature=0,
        max_completion_tokens=24,  # type: ignore[arg-type]
    )
    answer = llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=24))[0].outputs[0]  # type: ignore[arg-type]
    assert said.choices[0].message.role == "assistant" and said.choices[0].message.content == answer.text
    assert said.choices[0].finish_reason == answer.finish_reason


def test_openai_client_streams(server: Server, client: openai.OpenAI, llm: LLM) -> None:
    stream = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": [{"type": "text", "text": "Reverse "}, {"type": "text", "text": "it."}]}],
        temperature=0,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    answer = llm.chat([{"role": "user", "content": "Reverse it."}], SamplingParams(temperature=0.0, max_tokens=24))[0]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.outputs[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, answer.outputs[0].finish_reason]
    assert len({chunk.id for chunk in [*chunks, last]}) == 1
    assert last.choices == [] and last.usage is not None
    assert last.usage.completion_tokens == len(answer.outputs[0].token_ids)
    assert all(chunk.usage is None for chunk in chunks)


def test_async_openai_client(server: Server, llm: LLM) -> None:
    async def one(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(
            model=server.model, prompt=prompt, seed=5, max_tokens=24, stream=True, extra_body={"top_k": 20}
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
            return await asyncio.gather(*(one(client, prompt) for prompt in PROMPTS))

    expected = [offline(llm, prompt, seed=5, max_tokens=24, top_k=20).outputs[0].text for prompt in PROMPTS]
    assert asyncio.run(all_()) == expected


def test_errors_are_what_openai_s_client_expects(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature must be") as bad:
        client.completions.create(model=server.model, prompt="x", temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="gpt-17", prompt="x")


def mixed(index: int) -> dict[str, Any]:
    """Sampling of the stream of this number: greedy and sampled, long and short, with and without stops."""
    sampling: dict[str, Any] = {"max_tokens": 16 + 5 * (index % 7), "seed": index}
    sampling |= [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9}, {"top_k": 12}, {"min_p": 0.05}][index % 4]
    if index % 3 == 0:
        sampling |= {"stop": ["\n\n", "self"]}
    if index % 5 == 0:
        sampling |= {"ignore_eos": True, "min_tokens": 8}
    return sampling


def test_many_concurrent_streams_are_the_offline_api_s(server: Server, llm: LLM) -> None:
    prompts = [f"{PROMPTS[index % len(PROMPTS)]}# {index // 7}\n" for index in range(NUM_STREAMS)]
    expected = llm.generate(prompts, [SamplingParams(**mixed(index)) for index in range(NUM_STREAMS)])

    async def one(client: httpx.AsyncClient, index: int) -> tuple[list[int], str, str | None, dict[str, Any]]:
        body = {"prompt": prompts[index], "stream": True, "return_token_ids": True, **mixed(index)}
        tokens, text, finish, usage = [], "", None, {}
        async with client.stream(
            "POST", "/v1/completions", json={**body, "stream_options": {"include_usage": True}}
        ) as response:
            assert response.status_code == 200, await response.aread()
            lines = [line async for line in response.aiter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        for line in lines[:-1]:
            chunk = json.loads(line.removeprefix("data: "))
            usage = chunk["usage"] or usage
            for choice in chunk["choices"]:
                assert finish is None, "something came after the end"
                tokens += choice["token_ids"]
                text += choice["text"]
                finish = choice["finish_reason"]
        return tokens, text, finish, usage

    async def all_() -> list[Any]:
        limits = httpx.Limits(max_connections=NUM_STREAMS)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=60.0) as client:
            return await asyncio.gather(*(one(client, index) for index in range(NUM_STREAMS)))

    got = asyncio.run(all_())
    for index, (tokens, text, finish, usage) in enumerate(got):
        output = expected[index].outputs[0]
        assert (index, tokens, text, finish) == (index, output.token_ids, output.text, output.finish_reason)
        assert usage["completion_tokens"] == len(output.token_ids)
        assert usage["speculative"]["per_position"] and usage["speculative"]["drafts"] > 0
    assert {finish for _, _, finish, _ in got} == {"stop", "length"}


def test_n_prompts_and_echo(server: Server, llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPTS[1])
    sampling = {"n": 2, "seed": 9, "max_tokens": 12}
    expected = [output.text for request in llm.generate([PROMPTS[0], PROMPTS[1]], SamplingParams(**sampling))
                for output in request.outputs]  # fmt: skip
    assert len(set(expected)) == 4
    for prompt in ([PROMPTS[0], PROMPTS[1]], [llm.tokenizer.encode(PROMPTS[0]), ids]):
        got = server.post("/v1/completions", prompt=prompt, **sampling).json()
        assert [choice["text"] for choice in got["choices"]] == expected
        assert [choice["index"] for choice in got["choices"]] == [0, 1, 2, 3]
    whole = server.post("/v1/completions", prompt=ids, echo=True, return_token_ids=True, **sampling).json()
    assert [choice["text"] for choice in whole["choices"]] == [PROMPTS[1] + text for text in expected[2:]]
    assert whole["choices"][0]["prompt_token_ids"] == ids and len(whole["choices"][0]["token_ids"]) == 12
    body = {"prompt": PROMPTS, "echo": True, "stream": True, "temperature": 0.0, "max_tokens": 6}
    texts = [""] * len(PROMPTS)
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        for chunk in events(response):
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == [prompt + offline(llm, prompt, temperature=0.0, max_tokens=6).outputs[0].text for prompt in PROMPTS]


def test_stop_strings(server: Server, llm: LLM) -> None:
    text = offline(llm, PROMPTS[0], temperature=0.0, max_tokens=40).outputs[0].text
    stop = text[8:11]
    for kept in (False, True):
        asked = {
            "stop": ["never there", stop],
            "temperature": 0.0,
            "max_tokens": 40,
            "include_stop_str_in_output": kept,
        }
        expected = offline(llm, PROMPTS[0], **asked)
        assert expected.outputs[0].finish_reason == "stop"
        got = server.post("/v1/completions", prompt=PROMPTS[0], **asked).json()
        (choice,) = got["choices"]
        assert (choice["text"], choice["finish_reason"]) == (expected.outputs[0].text, "stop")
        assert choice["stop_reason"] == stop
        assert got["usage"]["completion_tokens"] == len(expected.outputs[0].token_ids)
        assert got["usage"]["speculative"] == expected.acceptance.to_dict(), "counted up to the stop, as offline"
    before = server.metrics()["outrider:engine_steps_total"]
    server.post("/v1/completions", prompt=PROMPTS[0], stop=stop, **ENDLESS)
    server.until("outrider:num_requests_running", 0.0)
    assert server.metrics()["outrider:engine_steps_total"] - before < 100, "the engine was not told of the stop"


def test_speculation_of_one_request(server: Server, llm: LLM) -> None:
    k = server.http.get("/v1/models").json()["data"][0]["num_speculative_tokens"]
    asked: dict[str, Any] = {"prompt": PROMPTS[0], "max_tokens": 40, "seed": 3, "temperature": 0.7}
    found = {}
    for name, speculative in (
        ("left out", None),
        ("enabled", {"enabled": True}),
        ("off", {"enabled": False}),
        ("one", {"num_speculative_tokens": 1}),
        ("all", {"num_speculative_tokens": k}),
    ):
        got = server.post("/v1/completions", **asked, speculative=speculative, return_token_ids=True).json()
        found[name] = (got["choices"][0]["token_ids"], got["usage"]["speculative"])
    assert len({tuple(tokens) for tokens, _ in found.values()}) == 1
    assert found["off"][1]["drafts"] == 0 and found["off"][1]["acceptance_length"] == 1.0
    one = found["one"][1]
    assert one["drafted"] == one["drafts"] > 0 and sum(one["per_position"][1:]) == 0
    assert found["left out"][1]["drafted"] > found["left out"][1]["drafts"]
    assert found["all"][1] == found["enabled"][1] == found["left out"][1]
    refused = server.post("/v1/completions", **asked, speculative={"num_speculative_tokens": k + 1})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "speculative.num_speculative_tokens"


def test_usage_tells_of_the_prefix_cache(server: Server) -> None:
    asked = {"prompt": "# a prompt of this test alone\n" * 20, "max_tokens": 2}
    first, second = (server.post("/v1/completions", **asked).json()["usage"] for _ in range(2))
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert 0 < second["prompt_tokens_details"]["cached_tokens"] < second["prompt_tokens"]


def test_tokenize_and_detokenize(server: Server, llm: LLM) -> None:
    got = server.post("/tokenize", prompt=PROMPTS[4], return_token_strs=True).json()
    assert got["tokens"] == llm.tokenizer.encode(PROMPTS[4]) and got["count"] == len(got["tokens"])
    assert len(got["token_strs"]) == got["count"] and got["max_model_len"] == 2048
    assert server.post("/detokenize", tokens=got["tokens"]).json() == {"prompt": PROMPTS[4]}
    messages = [{"role": "user", "content": "hi"}]
    assert server.post("/tokenize", messages=messages).json()["tokens"] == llm.encode_conversation(messages)


def test_what_is_told_of_the_server(server: Server, llm: LLM) -> None:
    assert server.http.get("/health").status_code == 200
    assert server.http.get("/version").json().keys() == {"version"}
    (model,) = server.http.get("/v1/models").json()["data"]
    resolved = llm.engine.resolved
    assert (model["runner"], model["passed_over"]) == (llm.choice.runner.name, llm.choice.to_dict()["passed_over"])
    assert model["method"] == resolved.method
    assert model["num_speculative_tokens"] == resolved.runner.draft_options.num_speculative_tokens
    assert server.http.get(f"/v1/models/{model['id']}").json() == model
    assert "/" not in json.dumps(model), "a path of the server's machine"
    assert "/v1/completions" in server.http.get("/openapi.json").json()["paths"]


def test_request_ids(server: Server) -> None:
    asked = {"prompt": "x", "max_tokens": 1}
    named = server.http.post("/v1/completions", json=asked, headers={"X-Request-Id": "mine-1"})
    assert named.headers["x-request-id"] == "mine-1" and named.json()["id"] == "cmpl-mine-1"
    odd = server.http.post("/v1/completions", json=asked, headers={"X-Request-Id": "a b\tc"})
    assert re.fullmatch(r"[0-9a-f]{32}", odd.headers["x-request-id"])


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f"}}
BAD: dict[str, tuple[str, Any, str | None, str]] = {
    "not-json": (TEXT, b"{", None, "not JSON"),
    "not-utf8": (TEXT, b'{"prompt": "\xff"}', None, "not JSON"),
    "nan": (TEXT, b'{"prompt": "x", "temperature": NaN}', None, "not JSON"),
    "deep": (TEXT, b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", None, ""),
    "half-surrogate": (TEXT, b'{"prompt": "\\ud800"}', None, ""),
    "list": (TEXT, b"[]", None, "JSON object"),
    "no-prompt": (TEXT, {}, "prompt", "prompt is missing"),
    "empty-prompt": (TEXT, {"prompt": ""}, "prompt", "prompt is empty"),
    "empty-list": (TEXT, {"prompt": []}, "prompt", "prompt is empty"),
    "number-prompt": (TEXT, {"prompt": 5}, "prompt", "5"),
    "record-prompt": (TEXT, {"prompt": {"prompt": "x"}}, "prompt", "text, token ids"),
    "mixed-prompt": (TEXT, {"prompt": [1, "a"]}, "prompt", ""),
    "id-past-the-vocabulary": (TEXT, {"prompt": [1, 10**6]}, "prompt", "1000000 is outside"),
    "id-past-64-bits": (TEXT, {"prompt": [2**70]}, "prompt", "outside the vocabulary"),
    "too-long": (TEXT, {"prompt": [1] * 3000}, "prompt", "at most 2047"),
    "one-bad-of-two": (TEXT, {"prompt": [[1], [-1]]}, "prompt", "token id -1"),
    "unknown": (TEXT, {"prompt": "x", "temprature": 0}, "temprature", "did you mean temperature?"),
    "long-unknown": (TEXT, {"prompt": "x", "y" * 5000: 0}, "y" * 77 + "...", "unknown field"),
    "logprobs": (TEXT, {"prompt": "x", "logprobs": 0}, "logprobs", "not offered"),
    "penalty": (TEXT, {"prompt": "x", "presence_penalty": 0.5}, "presence_penalty", "not offered"),
    "suffix": (TEXT, {"prompt": "x", "suffix": "y"}, "suffix", "not offered"),
    "bias": (CHAT, {"messages": USER, "logit_bias": {"5": 1}}, "logit_bias", "not offered"),
    "tools": (CHAT, {"messages": USER, "tools": [TOOL]}, "tools", "shows no tools"),
    "json-mode": (
        CHAT,
        {"messages": USER, "response_format": {"type": "json_object"}},
        "response_format",
        "not offered",
    ),
    "temperature": (TEXT, {"prompt": "x", "temperature": -1}, "temperature", "-1"),
    "temperature-text": (TEXT, {"prompt": "x", "temperature": "0"}, "temperature", "number"),
    "temperature-huge": (TEXT, {"prompt": "x", "temperature": 1e9}, "temperature", "1000000000"),
    "n": (TEXT, {"prompt": "x", "n": 0}, "n", "0"),
    "n-fraction": (TEXT, {"prompt": "x", "n": 1.5}, "n", "whole number"),
    "n-too-many": (TEXT, {"prompt": "x", "n": 100000}, "n", "at most"),
    "top-p": (TEXT, {"prompt": "x", "top_p": -0.5}, "top_p", "0"),
    "max-tokens": (TEXT, {"prompt": "x", "max_tokens": 0}, "max_tokens", "0"),
    "min-over-max": (TEXT, {"prompt": "x", "min_tokens": 9, "max_tokens": 3}, "min_tokens", "more than max_tokens 3"),
    "seed": (TEXT, {"prompt": "x", "seed": -(2**64)}, "seed", "at least -2**63"),
    "seed-past-64-bits": (TEXT, {"prompt": "x", "seed": 2**70}, "seed", ""),
    "stop-empty": (TEXT, {"prompt": "x", "stop": ""}, "stop", "non-empty"),
    "stop-number": (TEXT, {"prompt": "x", "stop": 5}, "stop", "5"),
    "stop-id": (TEXT, {"prompt": "x", "stop_token_ids": [10**6]}, "stop_token_ids", "1000000"),
    "stop-id-past-64-bits": (TEXT, {"prompt": "x", "stop_token_ids": [2**70]}, "stop_token_ids", ""),
    "stream-options": (TEXT, {"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options", "streams"),
    "stream-option": (
        TEXT,
        {"prompt": "x", "stream": True, "stream_options": {"continuous_stats": True}},
        "stream_options.continuous_stats",
        "unknown field",
    ),
    "speculative": (TEXT, {"prompt": "x", "speculative": {"k": 1}}, "speculative.k", "unknown field"),
    "speculative-both": (
        TEXT,
        {"prompt": "x", "speculative": {"enabled": False, "num_speculative_tokens": 1}},
        "speculative.num_speculative_tokens",
        "contradicts",
    ),
    "no-messages": (CHAT, {}, "messages", "missing"),
    "empty-messages": (CHAT, {"messages": []}, "messages", "empty"),
    "text-messages": (CHAT, {"messages": "hi"}, "messages", "list"),
    "nested-messages": (CHAT, {"messages": [USER]}, "messages", "one conversation"),
    "role": (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id", "not empty"),
    "no-content": (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content", "text"),
    "image": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages.0.content.0",
        "text",
    ),
    "two-limits": (CHAT, {"messages": USER, "max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "4"),
    "template": (
        CHAT,
        {"messages": USER, "chat_template_kwargs": {"tokenize": True}},
        "chat_template_kwargs",
        "tokenize",
    ),
    "detokenize": ("/detokenize", {"tokens": [10**6]}, "tokens", "outside the vocabulary"),
    "tokenize-both": ("/tokenize", {"prompt": "x", "messages": USER}, "prompt", "either"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(server: Server, name: str) -> None:
    path, body, param, said = BAD[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = server.http.post(path, content=content)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    if not isinstance(body, bytes):
        assert error["param"] == param
    assert said in error["message"] and len(error["message"]) <= MAX_MESSAGE_LENGTH
    assert "Traceback" not in answer.text and "/outrider" not in answer.text


def test_fields_that_ask_for_nothing_are_taken(server: Server) -> None:
    nothing = {"presence_penalty": 0.0, "frequency_penalty": 0, "logprobs": False, "tools": [], "logit_bias": {}}
    nothing |= {"response_format": {"type": "text"}, "user": "me", "stop": None, "seed": None, "temperature": None}
    assert server.post(CHAT, messages=USER, max_tokens=2, **nothing).status_code == 200
    nothing = {"best_of": 1, "suffix": None, "repetition_penalty": 1.0, "logprobs": None, "top_k": -1, "echo": False}
    assert server.post(TEXT, prompt="x", max_tokens=2, **nothing).status_code == 200


def test_unknown_paths_methods_and_large_bodies(server: Server) -> None:
    for answer, status in (
        (server.http.get("/v1/nothing"), 404),
        (server.http.get("/v1/models/other"), 404),
        (server.http.get(TEXT), 405),
        (server.http.post(TEXT, content=b'{"prompt": "' + b"x" * 200_000 + b'"}'), 413),
        (server.http.post(TEXT, content=(b"x" * 10_000 for _ in range(20))), 413),
    ):
        assert answer.status_code == status, answer.text
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


METRICS = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "engine_up",
    "watchdog_departed",
    "drafter_failures_total",
    "drafting_stopped",
    "engine_steps_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
    'spec_decode_num_accepted_tokens_per_pos_total{position="1"}',
    'request_success_total{finished_reason="length"}',
    "time_to_first_token_seconds_count",
    "inter_token_latency_seconds_count",
    "e2e_request_latency_seconds_count",
    "request_prompt_tokens_count",
    "request_generation_tokens_count",
]


def test_metrics(server: Server, llm: LLM) -> None:
    before = server.metrics()
    asked = {"prompt": "def main():\n", "max_tokens": 30, "ignore_eos": True, "temperature": 0.0}
    usage = server.post(TEXT, **asked).json()["usage"]
    after = server.metrics()
    gained = {name: after[f"outrider:{name}"] - before.get(f"outrider:{name}", 0.0) for name in METRICS}
    assert gained["generation_tokens_total"] == 30 == gained["inter_token_latency_seconds_count"] + 1
    assert gained["prompt_tokens_total"] == usage["prompt_tokens"] == gained["prefix_cache_queries_total"]
    assert gained["time_to_first_token_seconds_count"] == gained["e2e_request_latency_seconds_count"] == 1
    assert gained['request_success_total{finished_reason="length"}'] == 1
    told = usage["speculative"]
    assert gained["spec_decode_num_drafts_total"] == told["drafts"] > 0
    assert gained["spec_decode_num_draft_tokens_total"] == told["drafted"]
    assert gained["spec_decode_num_accepted_tokens_total"] == told["accepted"] > 0
    first = gained['spec_decode_num_accepted_tokens_per_pos_total{position="1"}']
    assert first == told["per_position"][0]
    assert after["outrider:num_requests_running"] == 0 == after["outrider:kv_cache_usage_perc"]
    assert after["outrider:engine_up"] == 1
    (info,) = [name for name in after if name.startswith("outrider:runner_info")]
    model = server.http.get("/v1/models").json()["data"][0]
    for fact in ("runner", "method", "num_speculative_tokens", "verifier"):
        assert f'{fact}="{model[fact]}"' in info
    on_record = bool(llm.watchdog().watched)
    assert any(name.startswith("outrider:watchdog_expected_rate") for name in after) == on_record


def test_a_client_that_goes_is_not_served_on(server: Server) -> None:
    for stream in (True, False):
        body = {"prompt": "import re\n", "n": 3, "stream": stream, **ENDLESS}
        before = server.metrics()
        if stream:
            with server.http.stream("POST", TEXT, json=body) as response:
                coming = events(response)  # letting it go would close the connection
                next(coming)
                server.until("outrider:num_requests_running", 3.0)
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{server.url}{TEXT}", json=body, timeout=0.5)
        server.until("outrider:num_requests_running", 0.0, seconds=3.0)
        after = server.metrics()
        wasted = after["outrider:generation_tokens_total"] - before["outrider:generation_tokens_total"]
        assert 0 < wasted < 3 * ENDLESS["max_tokens"]
        assert after["outrider:kv_cache_usage_perc"] == 0.0


def test_nothing_of_a_prompt_or_answer_is_logged(server: Server) -> None:
    marker = "Zanzibar"
    server.post(TEXT, prompt=marker, echo=True, max_tokens=1)
    server.post(CHAT, messages=[{"role": "user", "content": marker}], max_tokens=1)
    server.post(TEXT, prompt=marker, temperature=-1)
    server.http.post(TEXT, content=f'{{"prompt": "{marker}'.encode())
    log = server.log.read_text()
    assert "route=/v1/completions status=200" in log and "status=400" in log
    assert marker not in log


def endless(server: Server, **asked: Any) -> list[dict[str, Any]]:
    with server.http.stream("POST", TEXT, json={"prompt": [1, 2], "stream": True, **ENDLESS, **asked}) as response:
        return list(events(response))


def broken_off(server: Server) -> dict[str, Any]:
    """The error at the end of a stream that takes a tiny model longer than any of these tests."""
    last = endless(server, max_tokens=60_000)[-1]
    assert "error" in last, f"it came to its end: {last}"
    return last["error"]  # type: ignore[no-any-return]


@pytest.fixture
def small(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    """`small(*flags)`: a server of a tiny model that runs one sequence at a time, and lets one wait."""
    model = str(tiny("qwen3", max_position_embeddings=65536))
    flags = ("--max-num-seqs", "1", "--max-waiting", "1", "--draft", "ngram")
    return lambda *more: serving(tmp_path / "log", model, *flags, *more)


def test_overload_then_a_killed_engine(small: Callable[..., Any]) -> None:
    with small("--api-key", "secret") as server, ThreadPoolExecutor(4) as pool:
        assert server.post(TEXT, prompt="x").status_code == 401
        assert server.http.get("/health").status_code == 200
        server.http.headers["authorization"] = "Bearer secret"
        streams = [pool.submit(broken_off, server) for _ in range(2)]
        server.until("outrider:num_requests_waiting", 1.0)
        refused = server.post(TEXT, prompt="x")
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert server.post(TEXT, prompt="x", n=3).status_code == 400, "which could never be run"
        server.engine.kill()
        for stream in streams:
            assert stream.result(20)["code"] == "engine_dead"
        assert server.http.get("/health").status_code == 503
        late = server.post(TEXT, prompt="x")
        assert late.status_code == 503 and late.json()["error"]["code"] == "engine_dead"
        assert server.metrics()["outrider:engine_up"] == 0.0
        assert server.exit_code() == 1
        assert "killed by signal 9" in server.log.read_text()


def test_a_hung_engine(small: Callable[..., Any]) -> None:
    with small("--engine-timeout", "4") as server, ThreadPoolExecutor(1) as pool:
        stream = pool.submit(broken_off, server)
        server.until("outrider:num_requests_running", 1.0)
        engine = server.engine
        engine.suspend()
        start = time.monotonic()
        assert stream.result(30)["code"] == "engine_dead"
        assert 1.0 < time.monotonic() - start < 15.0
        assert server.http.get("/health").status_code == 503
        assert server.exit_code() == 1 and not engine.is_running()
        assert "it hangs" in server.log.read_text()


def until_nothing_listens(server: Server, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            httpx.get(f"{server.url}/health")
        except httpx.TransportError:  # refused, or let go of in the middle
            return
        assert time.monotonic() < end, f"it still listens after {seconds} seconds"
        time.sleep(0.02)


def test_sigterm_drains(small: Callable[..., Any]) -> None:
    with small() as server, ThreadPoolExecutor(1) as pool:
        stream = pool.submit(endless, server)
        server.until("outrider:num_requests_running", 1.0)
        engine = server.engine
        engine.suspend()  # so that it does not end before it is to be waited for
        server.process.send_signal(signal.SIGTERM)
        until_nothing_listens(server)
        assert not stream.done() and server.process.poll() is None
        engine.resume()
        last = stream.result(30)[-1]
        assert last["choices"][0]["finish_reason"] == "length"
        assert server.exit_code() == 0


def test_draining_has_an_end(small: Callable[..., Any]) -> None:
    with small("--drain-timeout", "0.3") as server, ThreadPoolExecutor(1) as pool:
        stream = pool.submit(broken_off, server)
        server.until("outrider:num_requests_running", 1.0)
        server.process.send_signal(signal.SIGTERM)
        assert "went down" in stream.result(20)["message"]
        assert server.exit_code() == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "70000"], "port must be"),
        (["--max-waiting", "-1"], "max_waiting must be"),
        (["--host", "256.1.1.1"], "cannot listen on 256.1.1.1"),
        (["--api-key-file", "/no/such/file"], "api_key_file"),
        (["/no/such/model"], "no model directory"),
        (["--runner", "graf"], "graf"),
    ],
)
def test_a_server_that_cannot_be(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_cli import run

    code, _, err = run(["serve", *arguments], capsys, monkeypatch)
    assert code == 2 and said in err.replace("\n", " ") and "Traceback" not in err


def test_an_engine_outlives_no_server(server: Server) -> None:
    """The last of this file: it kills the server of all the others."""
    engine = server.engine
    server.process.kill()
    engine.wait(5)
