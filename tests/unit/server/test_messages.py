"""What a request's author is told that the engine's own words would not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from fake_engine import fake_server, write_tokenizer

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("chat/completions", CHAT, "no chat template: send a plain prompt to /v1/completions, or start"),
        ("responses", {"input": "hi"}, "no chat template: send a plain prompt to /v1/completions, or start"),
        ("completions", {"prompt": "hi", "max_tokens": 10**30}, "max_tokens is too large: 1000"),
        ("completions", {"prompt": "hi", "seed": 10**30}, "seed is too large: 1000"),
    ],
    ids=["chat", "responses", "max_tokens", "seed"],
)
def test_messages(tmp_path: Path, path: str, body: dict[str, Any], message: str) -> None:
    write_tokenizer(tmp_path, None)
    with fake_server(tmp_path) as (address, _):
        answer = httpx.post(f"{address}/v1/{path}", json=body)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]
