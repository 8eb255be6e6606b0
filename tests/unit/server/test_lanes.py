"""Large requests wait for each other, and small ones for none of them."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from fake_engine import EOS, HERMES_TEMPLATE, write_tokenizer
from outrider.errors import InputError, OverloadError
from outrider.server import lanes
from outrider.server.lanes import LARGE, SMALL, Lane, Lanes
from outrider.server.openai.record import parse
from outrider.server.openai.schemas import ChatRequest, CompletionRequest, DetokenizeRequest
from outrider.server.tokenizer_service import TokenizerService


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = TokenizerService(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), HERMES_TEMPLATE, (EOS,)))
    yield made
    made.close()


@pytest.mark.parametrize("size", [LARGE, LARGE + 1])
def test_a_small_prompt_does_not_wait_for_a_large_one(
    tokenizer: TokenizerService, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # bug 13
    begun, go_on = threading.Event(), threading.Event()
    encode = tokenizer._encoder.encode

    def held(text: str, *given: Any) -> list[int]:
        if len(text) > SMALL:
            begun.set()
            assert go_on.wait(10)
        return encode(text, *given)

    monkeypatch.setattr(tokenizer._encoder, "encode", held)

    async def main() -> None:
        large = asyncio.ensure_future(tokenizer.encode("x" * size))
        assert await asyncio.to_thread(begun.wait, 10)
        assert await tokenizer.encode("small") == encode("small")
        messages = [{"role": "user", "content": "x"}]
        assert await tokenizer.conversation(messages)
        assert not large.done()
        go_on.set()
        assert len(await large) == size

    asyncio.run(main())


def test_the_event_loop_goes_on_while_a_large_prompt_is_encoded(tokenizer: TokenizerService) -> None:
    async def main() -> tuple[int, int]:
        ticks = 0
        work = asyncio.ensure_future(tokenizer.encode("some text " * 100_000))
        while not work.done():
            await asyncio.sleep(0.001)
            ticks += 1
        return ticks, len(await work)

    ticks, count = asyncio.run(main())
    assert count == 1_000_000 and ticks > 20, "Python's lock was held"


def test_work_whose_client_has_gone_is_dropped() -> None:  # bug 13
    lane = Lane("test", 2)
    go_on, done = threading.Event(), []

    async def main() -> None:
        first = asyncio.ensure_future(lane.run(lambda: go_on.wait(10)))
        second = asyncio.ensure_future(lane.run(lambda: done.append(2)))
        await asyncio.sleep(0.01)
        with pytest.raises(OverloadError, match="2 other large requests wait"):
            await lane.run(lambda: done.append(3))
        second.cancel()
        await asyncio.sleep(0.01)
        third = asyncio.ensure_future(lane.run(lambda: done.append(4)))
        await asyncio.sleep(0.01)
        go_on.set()
        await asyncio.gather(first, third)

    asyncio.run(main())
    lane.close()
    assert done == [4]


def test_memory_of_a_large_prompt_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "TRIM_SECONDS", 0.05)
    tokenizer = TokenizerService(write_tokenizer(tmp_path, HERMES_TEMPLATE, (EOS,)))
    process = psutil.Process()

    async def grown(trims: bool) -> int:
        monkeypatch.setattr(lanes, "give_memory_back", given_back if trims else lambda: None)
        before = process.memory_info().rss
        await tokenizer.encode("some text " * 200_000)
        await asyncio.sleep(0.2)
        return process.memory_info().rss - before

    given_back = lanes.give_memory_back
    kept, left = asyncio.run(grown(False)), asyncio.run(grown(True))
    tokenizer.close()
    assert left < 0.5 * kept, f"{left >> 20} MB stay, {kept >> 20} MB without giving any back"


def test_a_lane_that_is_closed_gives_nothing_back_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "TRIM_SECONDS", 0.01)
    faults: list[object] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
        lane = Lane("test", 1, is_large=True)
        await lane.run(int)
        lane.close()
        await asyncio.sleep(0.05)

    asyncio.run(main())
    assert faults == []


def test_lanes_by_size() -> None:
    made = Lanes()
    assert len({made.encoding(size) for size in (0, SMALL, SMALL + 1, LARGE, LARGE + 1, 1 << 22)}) == 3
    made.close()


HUGE = {
    "stop ids": (CompletionRequest, b'{"prompt": "x", "stop_token_ids": [%s]}' % b",".join([b'"a"'] * 900_000)),
    "stop ids that are none": (
        CompletionRequest,
        b'{"prompt": "x", "stop_token_ids": [%s]}' % b",".join([b"-1"] * 10**6),
    ),
    "tokens": (DetokenizeRequest, b'{"tokens": [%s]}' % b",".join([b'"a"'] * 900_000)),
    "tools": (ChatRequest, b'{"messages": [], "tools": [%s]}' % b",".join([b"{}"] * 10**6)),
    "members of a tool": (
        ChatRequest,
        b'{"messages": [], "tools": [{"type": "function", "function": {%s}}]}'
        % b",".join(b'"%d":0' % number for number in range(400_000)),
    ),
    "fields": (CompletionRequest, b"{%s}" % b",".join(b'"%d":0' % number for number in range(400_000))),
    "a name": (CompletionRequest, b'{"%s": 0}' % (b"x" * (4 << 20))),
    "a number": (CompletionRequest, b'{"prompt": "x", "seed": %s}' % (b"1" * (4 << 20))),
    "a fraction": (CompletionRequest, b'{"prompt": "x", "top_p": 2.%s}' % (b"1" * (4 << 20))),
    "brackets": (CompletionRequest, b'{"prompt": %s%s}' % (b"[" * 200_000, b"]" * 200_000)),
    "brackets without an end": (CompletionRequest, b'{"prompt": ' + b"[" * (4 << 20)),
    "a list where text is meant": (CompletionRequest, b'{"prompt": "x", "model": [%s]}' % b",".join([b"1"] * 10**6)),
    "the same name": (CompletionRequest, b'{%s, "x": 1}' % b",".join([b'"prompt":"x"'] * 300_000)),
}


@pytest.mark.parametrize("what", HUGE)
def test_what_is_wrong_with_a_huge_body_costs_little_to_say(what: str) -> None:
    record, body = HUGE[what]
    plain = b'{"prompt": [%s]}' % b",".join([b"1"] * 10**6)
    start = time.process_time()
    parse(plain, CompletionRequest)
    allowed = 20 * (time.process_time() - start) + 0.2
    start = time.process_time()
    with pytest.raises(InputError) as refused:
        parse(body, record).sampling() if record is CompletionRequest else parse(body, record)
    assert time.process_time() - start < allowed
    assert len(str(refused.value)) < 1000


def test_a_conversation_costs_the_same_a_message_however_long_it_is(tokenizer: TokenizerService) -> None:
    def seconds(count: int) -> float:
        messages = [{"role": role, "content": "x"} for role in ("user", "assistant")] * (count // 2)
        start = time.process_time()
        asyncio.run(tokenizer.conversation(messages, num_bytes=SMALL + 1))
        return time.process_time() - start

    seconds(10)
    assert seconds(40_000) < 20 * 3 * min(seconds(2000) for _ in range(3))
