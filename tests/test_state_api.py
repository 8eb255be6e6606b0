"""What the playground polls, over an engine that says what a test tells it to."""

from __future__ import annotations

from pathlib import Path

import httpx

from fake_engine import FakeClient, fake_server, write_tokenizer


def test_the_state_is_that_of_the_engine(tmp_path: Path) -> None:
    with fake_server(write_tokenizer(tmp_path, None, special=("<eos>",))) as (url, _):
        state = httpx.get(f"{url}/playground/state").json()
        snapshot = FakeClient.snapshot
        assert state["status"] == "ok" and state["model"] == httpx.get(f"{url}/v1/models").json()["data"][0]
        assert (state["running"], state["waiting"], state["cache_usage"]) == (1, 2, 0.25)
        assert state["acceptance"] == snapshot.acceptance.to_dict() and state["acceptance"]["drafts"] == 10
        watched = {"temperature": 0.0, "expected": [0.8, 0.6], "measured": [0.4, 0.1], "departed": True}
        assert state["watched"] == [watched]
        metrics = httpx.get(f"{url}/metrics").text
        assert 'outrider:watchdog_departed{model_name="fake"} 1.0' in metrics
