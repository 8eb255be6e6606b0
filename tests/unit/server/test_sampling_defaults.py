"""Requests take the checkpoint's sampling defaults, and what they say themselves before those."""

from __future__ import annotations

from pathlib import Path

import httpx
import msgspec
import pytest

import fake_engine
from fake_engine import fake_server, write_tokenizer


@pytest.mark.parametrize("kind", ["completions", "chat/completions", "responses"])
def test_requests_take_the_checkpoint_s_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    defaults = {"temperature": 0.6, "top_k": 20}
    monkeypatch.setattr(fake_engine, "FACTS", msgspec.structs.replace(fake_engine.FACTS, sampling_defaults=defaults))
    write_tokenizer(tmp_path, "{{ messages[0].content }}")
    content = {
        "completions": {"prompt": "hi"},
        "chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
        "responses": {"input": "hi"},
    }[kind]
    with fake_server(tmp_path) as (address, engine):
        engine.says = ["yes"]
        for given in ({}, {"temperature": 0.2}):
            httpx.post(f"{address}/v1/{kind}", json={**content, **given}).raise_for_status()
        first, second = (completion.sampling for completion in engine.asked)
    assert (first.temperature, first.top_k) == (0.6, 20)
    assert (second.temperature, second.top_k) == (0.2, 20)
