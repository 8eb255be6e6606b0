"""Random requests to the real application in this process: what is answered is right, and what is refused is said.

    PYTHONPATH=src python tests/fuzz_requests.py --count 50000 --seed 0

A case is one request, or one that is asked in several ways whose answers must agree: whole, as a stream, and from an
engine without drafts. Every failure is printed with the line that repeats it. Exit code 1 if there is one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checkpoints
import fake_engine
import heads
from fuzz_bodies import (
    MAX_LEN,
    RECORDS,
    RESPONSES,
    SPECIAL,
    TEXT,
    VOCAB_SIZE,
    Asked,
    asked,
    damaged,
    encoded,
    odd,
    other,
)
from fuzz_server import Reply, Sent, Served, ask, served

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
DRAFTERS = ("ngram", "eagle3", "peagle")
AT_ONCE = 8
"""Cases that run beside each other."""

SECONDS = 60.0
"""A request that takes longer hangs."""

BARE = re.compile(
    r"Traceback|has no attribute|object is not|unsupported operand|index out of range|KeyError|TypeError|ValueError"
    r"|AttributeError|NoneType|unhashable|positional argument|codec can't|invalid literal|maximum recursion|<.* at 0x"
    r"|not supported between|argument of type|cannot unpack|Any\]|Input should|Error\(|\^ *'[^']*'$"
)
"""What Python and its libraries say of their own errors, and no message of ours may."""


@dataclass
class Report:
    """What came of a run."""

    statuses: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    compared: Counter[str] = field(default_factory=Counter)
    slowest: list[tuple[float, int]] = field(default_factory=list)
    requests: int = 0


@dataclass
class Fuzz:
    """One run of cases against an engine with drafts and one without."""

    seed: int
    report: Report
    drafting: Served
    plain: Served
    drafter: str

    async def case(self, number: int) -> None:
        """Runs one case; whatever is wrong is kept."""
        rng = random.Random(f"{self.seed}:{number}")
        begun = time.perf_counter()
        try:
            async with asyncio.timeout(SECONDS):
                way = rng.random()
                if way < 0.35:
                    await self.agree(rng)
                elif way < 0.75:
                    await self.answered(damaged(rng), rng)
                elif way < 0.8:
                    await self.taken(other(rng), rng)
                else:
                    sent = odd(rng)
                    self.check(sent, await self.ask(self.drafting, sent))
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            self.report.failures.append(f"case {number} with {self.drafter}: {said}\n  {repeats(self.seed, number)}")
        self.report.slowest.append((time.perf_counter() - begun, number))

    async def ask(self, server: Served, sent: Sent) -> Reply:
        """The answer, counted."""
        reply = await ask(server.app, sent)
        self.report.requests += 1
        left = " left" if sent.stays is not None else ""
        self.report.statuses[f"{reply.status or 'none'}{left}"] += 1
        return reply

    async def taken(self, given: Asked, rng: random.Random) -> Reply:
        """A request that must be answered with 200."""
        sent = Sent("POST", given.path, encoded(rng, given.body))
        reply = await self.ask(self.drafting, sent)
        self.check(sent, reply)
        assert reply.status == 200, f"refused: {reply.body[:300]!r}\n  of {given}"
        return reply

    async def answered(self, given: Asked, rng: random.Random) -> None:
        """A damaged body: whatever is answered is well-formed, and if it is taken, a stream says the same."""
        sent = Sent("POST", given.path, encoded(rng, given.body))
        reply = await self.ask(self.drafting, sent)
        self.check(sent, reply)
        body = given.body
        seeded = isinstance(body.get("seed"), int) and body["seed"] >= 0 and not body.get("stream")
        if reply.status != 200 or not seeded:
            return
        if given.path == RESPONSES:
            streamed = {**body, "stream": True}
        elif body.get("return_token_ids") is True:
            streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
        else:
            return
        again = await self.ask(self.drafting, Sent("POST", given.path, encoded(rng, streamed)))
        if again.status == 429:
            return
        assert again.status == 200, f"only the stream is refused: {again.body[:300]!r}\n  of {given}"
        found, expected = read(given.path, again), read(given.path, reply)
        assert found == expected, f"streamed it is {found}\n  and not {expected}\n  of {given}"

    async def agree(self, rng: random.Random) -> None:
        """Whole, as a stream and without drafts: the same."""
        given = asked(rng)
        streamed = {**given.body, "stream": True}
        if given.path != RESPONSES:
            streamed["stream_options"] = {"include_usage": True}
        without = {name: value for name, value in rng.choice([given.body, streamed]).items() if name != "speculative"}
        sent = [Sent("POST", given.path, encoded(rng, body)) for body in (given.body, streamed, without)]
        ways = [(self.drafting, sent[0]), (self.drafting, sent[1]), (self.plain, sent[2])]
        replies = await asyncio.gather(*(self.ask(*way) for way in ways))
        for (_, each), reply in zip(ways, replies, strict=True):
            self.check(each, reply)
        if any(reply.status == 429 for reply in replies):
            return
        for reply in replies:
            assert reply.status == 200, f"refused: {reply.body[:300]!r}\n  of {given}"
        first, *rest = (read(given.path, reply) for reply in replies)
        for name, one in zip(("streamed", "without drafts"), rest, strict=True):
            assert one == first, f"{name} it is {one}\n  and not {first}\n  of {given}"
        check_usage(given, first)
        self.report.compared[given.path] += 1

    def check(self, sent: Sent, reply: Reply) -> None:
        """What holds of every answer."""
        if sent.stays is not None:
            assert reply.status < 500, f"{reply.status} {reply.body!r}"
            return
        assert reply.is_whole, "no end"
        assert reply.status < 500, f"{reply.status} {reply.body[:300]!r} of {sent}"
        assert "x-request-id" in reply.headers, reply.headers
        if reply.status == 200 or sent.method == "HEAD":
            if reply.headers.get("content-type", "").startswith("text/event-stream"):
                check_stream(sent.path, reply)
            return
        assert reply.status in (307, 400, 404, 405, 408, 413, 429), reply.status
        if reply.status != 307:  # to the path without its last slash
            check_error(sent, reply)


def check_error(sent: Sent, reply: Reply) -> None:
    """A refusal is in OpenAI's shape, in our words, and names what of the request is at fault."""
    body = json.loads(reply.body)
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}, body
    said, param = body["error"]["message"], body["error"]["param"]
    assert isinstance(said, str) and 5 < len(said) <= 500, said
    assert not BARE.search(said), f"not our words: {said}"
    if reply.status != 400:
        return
    if param is None:
        assert "the body" in said, f"names no field: {said}"
        return
    root = param.partition(".")[0]
    try:
        given = json.loads(sent.body.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        given = {}
    given = given if isinstance(given, dict) else {}
    record = RECORDS.get(sent.path.partition("?")[0])
    known = {*given, *(record.model_fields if record is not None else ()), "X-Request-Timeout", "n"}
    begins = param.removesuffix("...")
    is_cut = begins != param and any(name.startswith(begins) for name in known)
    is_known = root in known or param in known or is_cut
    assert is_known, f"{param} is no field of the request: {said}"


def events(reply: Reply) -> list[Any]:
    """The events of a stream that ends as it should."""
    blocks = reply.body.decode().split("\n\n")
    assert blocks.pop() == "", "the last event is cut"
    made = []
    for block in blocks:
        *_, line = block.split("\n")
        assert line.startswith("data: "), block
        made.append("[DONE]" if line == "data: [DONE]" else json.loads(line.removeprefix("data: ")))
    return made


def check_stream(path: str, reply: Reply) -> None:
    """It ends as its kind of stream does, or with an error in OpenAI's shape."""
    *before, last = events(reply)
    if path == RESPONSES:
        assert last["type"] in ("response.completed", "response.incomplete") or "seconds" in str(last), last
        assert [one["sequence_number"] for one in (*before, last)] == list(range(len(before) + 1))
    elif last != "[DONE]":
        assert last["error"]["code"] == "request_timeout", last


def read(path: str, reply: Reply) -> dict[str, Any]:
    """What an answer says, whole or streamed, without what differs from one to the next."""
    is_stream = reply.headers["content-type"].startswith("text/event-stream")
    if path == RESPONSES:
        return _response(events(reply) if is_stream else [{"response": json.loads(reply.body)}])
    if not is_stream:
        body = json.loads(reply.body)
        return {"choices": [_choice(one) for one in body["choices"]], "usage": _usage(body["usage"])}
    found: dict[int, dict[str, Any]] = {}
    *chunks, last = events(reply)
    assert last == "[DONE]"
    for chunk in chunks[:-1]:
        assert chunk["usage"] is None
        for one in chunk["choices"]:
            held = found.setdefault(one["index"], {"text": "", "reasoning": "", "calls": [], "ids": [], "finish": None})
            assert held["finish"] is None, "something after the end"
            delta = one.get("delta", one)
            held["text"] += delta.get("text") or delta.get("content") or ""
            held["reasoning"] += delta.get("reasoning") or ""
            for call in delta.get("tool_calls", ()):
                if call["index"] == len(held["calls"]):
                    held["calls"].append([call["function"]["name"], ""])
                held["calls"][call["index"]][1] += call["function"]["arguments"]
            held["ids"] += one.get("token_ids", [])
            held["finish"] = one["finish_reason"] and [one["finish_reason"], one["stop_reason"]]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"], chunks[-1]
    return {"choices": [found[index] for index in sorted(found)], "usage": _usage(chunks[-1]["usage"])}


def _choice(one: dict[str, Any]) -> dict[str, Any]:
    said = one.get("message", one)
    calls = [[call["function"]["name"], call["function"]["arguments"]] for call in said.get("tool_calls", ())]
    return {
        "text": said.get("text") or said.get("content") or "",
        "reasoning": said.get("reasoning") or "",
        "calls": calls,
        "ids": one["token_ids"],
        "finish": [one["finish_reason"], one["stop_reason"]],
    }


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    return {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}


def _response(told: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last event's response, which the events before it must have told."""
    response = told[-1]["response"]
    items = [
        {name: value for name, value in item.items() if name not in ("id", "call_id")} for item in response["output"]
    ]
    if len(told) > 1:
        texts = {"output_text": "", "reasoning_text": ""}
        for one in told:
            kind = one["type"].removeprefix("response.").removesuffix(".delta")
            if kind in texts and one["type"].endswith(".delta"):
                texts[kind] += one["delta"]
        parts = [part for item in items for part in item.get("content", ())]
        assert texts == {name: "".join(part["text"] for part in parts if part["type"] == name) for name in texts}
    usage = response["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    counts = {"prompt_tokens": usage["input_tokens"], "completion_tokens": usage["output_tokens"]}
    return {"items": items, "status": response["status"], "usage": counts}


def check_usage(given: Asked, found: dict[str, Any]) -> None:
    """Tokens are of the vocabulary, as many as `usage` says, and no more than were asked for."""
    usage, longest = found["usage"], given.body.get("max_tokens", given.body.get("max_output_tokens"))
    assert usage["prompt_tokens"] > 0
    if given.path == RESPONSES:
        assert 0 < usage["completion_tokens"] <= longest
        assert (found["status"] == "incomplete") <= (usage["completion_tokens"] <= longest)
        return
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] == sum(len(one["ids"]) for one in found["choices"])
    for one in found["choices"]:
        assert all(0 <= token < VOCAB_SIZE for token in one["ids"]) and 0 < len(one["ids"]) <= longest
        reason, stop = one["finish"]
        assert reason in ("stop", "length", "tool_calls")
        assert reason != "length" or len(one["ids"]) in (longest, MAX_LEN) or usage["prompt_tokens"] > MAX_LEN - longest
        stop_ids = given.body.get("stop_token_ids") or ()
        assert not isinstance(stop, int) or stop in (*stop_ids, VOCAB_SIZE - 1, 256 + len(SPECIAL))


def repeats(seed: int, number: int) -> str:
    """The line that runs one case alone."""
    return f"PYTHONPATH=src python tests/fuzz_requests.py --seed {seed} --first {number} --count 1"


def write_model(path: Path) -> dict[str, dict[str, Any]]:
    """A tiny model with a tokenizer, and the `speculative_config` of each drafter."""
    checkpoints.write(path / "tiny", "qwen3", max_position_embeddings=MAX_LEN, **SIZES)
    fake_engine.write_tokenizer(path / "tiny", fake_engine.HERMES_TEMPLATE, tuple(SPECIAL))
    configs: dict[str, dict[str, Any]] = {"ngram": {"method": "ngram", "prompt_lookup_min": 1}}
    for parallel, name in ((False, "eagle3"), (True, "peagle")):
        sizes = {**SIZES, "max_position_embeddings": MAX_LEN}
        heads.write_head(path / name, parallel, num_layers=1, sizes=sizes, config=HEAD)
        configs[name] = {"method": name, "model": str(path / name)}
    return {name: {**config, "num_speculative_tokens": 3} for name, config in configs.items()}


HEAD = {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}
KNOWN = Asked(TEXT, {"prompt": "def main():\n", "temperature": 0, "max_tokens": 12, "return_token_ids": True})


async def fuzz(seed: int, first: int, count: int, drafters: Sequence[str] = DRAFTERS) -> Report:
    """Runs cases `first` to `first + count`, the drafters in turn."""
    report = Report()
    caught: list[str] = []
    handler = _Caught(caught)
    logging.getLogger("outrider").addHandler(handler)
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: caught.append(str(context)))
    with tempfile.TemporaryDirectory() as folder:
        configs = write_model(Path(folder))
        blocks = checkpoints.cache_bytes(80, **SIZES)
        options: dict[str, Any] = {"max_model_len": MAX_LEN, "max_num_seqs": 6, "kv_cache_memory": blocks}
        model = Path(folder) / "tiny"
        for turn, drafter in enumerate(drafters):
            of_drafter = {**options, "speculative_config": configs[drafter], "kv_cache_memory": 3 * blocks}
            start, stop = (first + count * (turn + more) // len(drafters) for more in (0, 1))
            if start == stop:
                continue
            async with (
                served(model, "hermes", "think", **of_drafter) as drafting,
                served(model, "hermes", "think", max_num_batched_tokens=64, **options) as plain,
            ):
                run = Fuzz(seed, report, drafting, plain, drafter)
                known = [read(TEXT, await run.taken(KNOWN, random.Random(0)))]
                for begin in range(start, stop, AT_ONCE):
                    await asyncio.gather(*(run.case(number) for number in range(begin, min(begin + AT_ONCE, stop))))
                    if caught:
                        where = f"cases {begin} to {begin + AT_ONCE - 1} with {drafter}"
                        report.failures += [f"{where}: {one}" for one in caught]
                        caught.clear()
                for _ in range(50):  # what clients that left had asked for ends with the next steps
                    await asyncio.sleep(0.002)
                known.append(read(TEXT, await run.taken(KNOWN, random.Random(0))))
                try:
                    assert known[0] == known[1], known
                    for server in (drafting, plain):
                        server.check_idle()
                except AssertionError as error:
                    report.failures.append(f"after cases {start} to {stop - 1} with {drafter}: {error}")
    logging.getLogger("outrider").removeHandler(handler)
    return report


class _Caught(logging.Handler):
    """Errors that the server logs."""

    def __init__(self, caught: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._caught = caught

    def emit(self, record: logging.LogRecord) -> None:
        cause = record.exc_info[1] if record.exc_info else None
        self._caught.append(f"logged: {record.getMessage()} {cause!r}")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="cases; each is one to three requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--drafter", action="append", choices=DRAFTERS, help="left out: all in turn")
    given = parser.parse_args()
    begun = time.perf_counter()
    report = asyncio.run(fuzz(given.seed, given.first, given.count, given.drafter or DRAFTERS))
    print(f"{report.requests} requests of {given.count} cases in {time.perf_counter() - begun:.0f} s")
    print("statuses:", dict(sorted(report.statuses.items())))
    print("compared whole, streamed and without drafts:", dict(report.compared))
    print("slowest cases:", [f"{number}: {seconds:.2f} s" for seconds, number in sorted(report.slowest)[:-6:-1]])
    for failure in report.failures:
        print("FAILED", failure)
    print(f"{len(report.failures)} failures")
    return 1 if report.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
