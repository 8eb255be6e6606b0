"""A short run of the fuzz of requests, and that it notices what it looks for."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

import fuzz_requests
from fuzz_bodies import CHAT, RESPONSES, TEXT
from fuzz_server import Reply, Sent, ask, served
from outrider.server.openai.base import ResponseBuilder


def check(count: int, first: int = 0) -> None:
    report = asyncio.run(fuzz_requests.fuzz(0, first, count))
    assert not report.failures, "\n".join(report.failures[:20])
    assert report.requests > 1.4 * count and {"200", "400", "404", "405"} <= report.statuses.keys()
    assert all(report.compared[path] > count // 50 for path in (TEXT, CHAT, RESPONSES))


def test_random_requests() -> None:
    check(350)


@pytest.mark.slow
def test_many_random_requests() -> None:
    check(6000, first=350)


def test_another_text_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = ResponseBuilder.chunks
    monkeypatch.setattr(ResponseBuilder, "chunks", lambda *given: chunks(*given)[1:])
    report = asyncio.run(fuzz_requests.fuzz(0, 0, 30, ["ngram"]))
    assert any("streamed it is" in failure for failure in report.failures), report.failures


SMALL: dict[str, tuple[str, bytes, str | None, str]] = {
    "a conversation of none": ("/tokenize", b'{"messages": []}', "messages", "conversation is empty"),
    "a message that is none": ("/tokenize", b'{"messages": [5]}', "messages", "a message must be a record"),
    "a token past the vocabulary": ("/detokenize", b'{"tokens": [0, 9999]}', "tokens", "token id 9999 is outside"),
    "no UTF-8": (TEXT, b'{"prompt": "\xff"}', None, "the body is not JSON: no UTF-8 from byte 0 on"),
    "deep": (TEXT, b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", None, "the body is nested more than 64 deep"),
    "too many tokens of a chat": (
        CHAT,
        b'{"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 9223372036854775808}',
        "max_completion_tokens",
        "max_completion_tokens is too large",
    ),
    "too many tokens of a response": (
        RESPONSES,
        b'{"input": "x", "max_output_tokens": 9223372036854775808}',
        "max_output_tokens",
        "max_output_tokens is too large",
    ),
    "a parameter that nothing reads": (TEXT, b'{"prompt": "x", "vllm_xargs": {"type": 1}}', "vllm_xargs.type", "type"),
}


def test_what_the_fuzz_found(tmp_path: Path) -> None:
    async def ask_all() -> dict[str, Reply]:
        fuzz_requests.write_model(tmp_path)
        async with served(tmp_path / "tiny") as server:
            return {name: await ask(server.app, Sent("POST", path, body)) for name, (path, body, *_) in SMALL.items()}

    for name, reply in asyncio.run(ask_all()).items():
        error = json.loads(reply.body)["error"]
        *_, param, said = SMALL[name]
        assert reply.status == 400 and error["param"] == param and said in error["message"], (name, error)


ERROR = {"message": "the body is not JSON", "type": "invalid_request_error", "param": None, "code": None}
SENT = Sent("POST", TEXT, b'{"prompt": "x", "temperature": -1}')
REFUSALS: dict[str, tuple[dict[str, Any], str | None]] = {
    "of the body": ({}, None),
    "of a field": ({"message": "temperature must be less", "param": "temperature"}, None),
    "of no field": ({"message": "something is too low"}, "names no field"),
    "of a field that was not sent": ({"message": "what is too low", "param": "low"}, "low is no field"),
    "in Python's words": ({"message": "'int' object is not iterable", "param": "prompt"}, "not our words"),
    "in its library's": ({"message": "Input should be a valid string", "param": "prompt"}, "not our words"),
    "too long": ({"message": "x" * 501, "param": "prompt"}, "xxx"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_that_says_too_little_is_noticed(name: str) -> None:
    changed, fault = REFUSALS[name]
    reply = Reply(400, {}, [json.dumps({"error": {**ERROR, **changed}}).encode()], True)
    if fault is None:
        fuzz_requests.check_error(SENT, reply)
        return
    with pytest.raises(AssertionError, match=fault):
        fuzz_requests.check_error(SENT, reply)


@pytest.mark.parametrize("body", [b'data: {"a": 1}\n\n', b'data: {"a": 1}\n\ndata: [DONE]\n', b"data: [DONE"])
def test_a_stream_without_its_end_is_noticed(body: bytes) -> None:
    with pytest.raises((AssertionError, KeyError)):
        fuzz_requests.check_stream(TEXT, Reply(200, {}, [body], True))
