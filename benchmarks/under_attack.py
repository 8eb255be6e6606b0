"""What eight hostile clients cost fifty-six others: time to first token without them and with them, on one server.

    python benchmarks/under_attack.py --seconds 60 2> server.log

The bundled model with its own drafts. The others send short prompts at random times, at a rate that leaves the machine
half idle: server, engine, clients and attackers share its cores. Each attacker has a kind of its own, and begins anew
`--pause` seconds after it has its answer. Exit code 1 if the others' p99 grows more than `--limit` times, or one fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import torch
from _server import served

from outrider.bench.prompts import HELD_OUT, read_prompts
from outrider.bench.provenance import provenance

NUM_OTHERS = 56
SETTLE_SECONDS = 3.0
"""How long the server must do nothing after the attack, before memory is read."""

Sender = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[str]]


def request(path: str, body: bytes | dict[str, Any]) -> bytes:
    """A request as it goes over the wire."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(content)}\r\n\r\n"
    return head.encode() + content


async def status(reader: asyncio.StreamReader) -> str:
    """The status of an answer that is read to its end."""
    line = await reader.readline()
    while await reader.read(1 << 16):
        pass
    return line[9:12].decode() or "closed"


def sending(*payloads: bytes) -> Sender:
    """An attacker that sends one after another, and reads the answers."""
    turns = itertools.cycle(payloads)

    async def attack(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        writer.write(next(turns))
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        return await status(reader)

    return attack


async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
    """Half a request, byte by byte."""
    for byte in itertools.chain(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\na: ", itertools.repeat(65)):
        writer.write(bytes([byte]))
        await asyncio.sleep(0.05)
        if reader.at_eof() or writer.is_closing():
            return "closed"
    return ""


async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
    """A long stream of which nothing is read."""
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    body = {"prompt": "import os", "stream": True, "max_tokens": 500, "ignore_eos": True, "return_token_ids": True}
    writer.write(request("/v1/completions", body))
    await asyncio.sleep(10)
    return "left unread"


async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
    """Streams that are begun and left."""
    body = {"prompt": "import os", "stream": True, "max_tokens": 500, "ignore_eos": True, "n": 4}
    writer.write(request("/v1/completions", body))
    await reader.readline()
    return "left"


def attackers() -> dict[str, Sender]:
    """Every kind."""
    huge = 3_500_000  # below the limit of bodies as JSON
    letters = "".join(random.Random(0).choices("abcdefgh  ij\nkl", k=huge))
    stops = [f"{random.Random(number).random():.8f}" for number in range(100_000)]
    asked = {"prompt": "import os", "max_tokens": 60, "ignore_eos": True}
    messages = [{"role": "user", "content": "x"}] * 100_000
    return {
        "stops": sending(
            request("/v1/completions", {**asked, "stop": stops[:4000]}),
            request("/v1/completions", {**asked, "stop": stops}),
        ),
        "prompts": sending(
            request("/v1/completions", {"prompt": letters}),
            request("/v1/chat/completions", {"messages": [{"role": "user", "content": letters}]}),
            request("/v1/completions", {"prompt": letters[:100_000]}),
        ),
        "tokenize": sending(request("/tokenize", {"prompt": letters[: huge // 2]})),
        "bodies": sending(
            request("/v1/chat/completions", {"messages": messages}),
            request("/v1/completions", b'{"prompt": "x", "stop_token_ids": [%s]}' % b",".join([b"1"] * 10**6)),
            request("/v1/completions", b'{"prompt": %s}' % (b"[" * 200_000)),
        ),
        "heads": sending(b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * (5 << 20), b"GET / HTTP/1.1\r\na: " + b"b" * (32 << 20)),
        "half": half,
        "slow": slow,
        "leave": leave,
    }


async def _attack(
    senders: dict[str, Sender], host: str, port: int, seconds: float, pause: float
) -> dict[str, dict[str, int]]:
    found: dict[str, Counter[str]] = {}

    async def one(kind: str, sender: Sender) -> None:
        counts = found[kind] = Counter()
        while True:
            try:
                reader, writer = await asyncio.open_connection(host, port)
                try:
                    counts[await sender(reader, writer)] += 1
                finally:
                    writer.transport.abort()
            except OSError as error:
                counts[type(error).__name__] += 1
            await asyncio.sleep(pause)

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await asyncio.gather(*(one(kind, sender) for kind, sender in senders.items()))
    return {kind: dict(counts) for kind, counts in found.items()}


def attack(host: str, port: int, seconds: float, pause: float, results: Any) -> None:
    """The attackers' process."""
    senders = attackers()
    results.put("ready")
    results.put(asyncio.run(_attack(senders, host, port, seconds, pause)))


async def others(url: str, seconds: float, rate: float) -> dict[str, Any]:
    """The others for so long: seconds to the first token of each request, and those that failed."""
    texts = [text[:300] for text in read_prompts(HELD_OUT).texts]
    firsts: list[float] = []
    failed: Counter[str] = Counter()
    end = time.monotonic() + seconds

    async def one(client: httpx.AsyncClient, number: int) -> None:
        made = random.Random(number)
        while (now := time.monotonic()) < end:
            await asyncio.sleep(min(made.expovariate(rate / NUM_OTHERS), end - now))
            body = {"prompt": made.choice(texts), "max_tokens": 16, "ignore_eos": True, "stream": True}
            start = time.perf_counter()
            try:
                async with client.stream("POST", "/v1/completions", json=body) as response:
                    lines = response.aiter_lines()
                    first = await anext(lines)
                    if response.status_code != 200 or first.startswith('data: {"error"'):
                        failed[str(response.status_code)] += 1
                        continue
                    firsts.append(time.perf_counter() - start)
                    async for _ in lines:
                        pass
            except (httpx.HTTPError, StopAsyncIteration) as error:
                failed[type(error).__name__] += 1

    async with httpx.AsyncClient(base_url=url, timeout=120.0, limits=httpx.Limits(max_connections=None)) as client:
        await asyncio.gather(*(one(client, number) for number in range(NUM_OTHERS)))
    firsts.sort()
    at = [1e3 * firsts[min(len(firsts) - 1, int(share * len(firsts)))] for share in (0.5, 0.99)]
    return {"requests": len(firsts), "failed": dict(failed), "p50_ms": round(at[0], 1), "p99_ms": round(at[1], 1)}


def phase(url: str, pid: int, seconds: float, rate: float) -> dict[str, Any]:
    """The others, and what the server and its engine took of the machine meanwhile."""
    family = [psutil.Process(pid), *psutil.Process(pid).children()]
    before = [sum(process.cpu_times()[:2]) for process in family]
    found = asyncio.run(others(url, seconds, rate))
    cpu = [sum(process.cpu_times()[:2]) - start for process, start in zip(family, before, strict=True)]
    return {**found, "cores_of_server": round(cpu[0] / seconds, 2), "cores_of_engine": round(sum(cpu[1:]) / seconds, 2)}


def settle(pid: int) -> None:
    """Waits until the server does nothing any more, a minute at most."""
    process, end = psutil.Process(pid), time.monotonic() + 60.0
    while process.cpu_percent(SETTLE_SECONDS) > 5.0 and time.monotonic() < end:
        pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each phase")
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second of all the others together")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between two requests of an attacker")
    parser.add_argument("--limit", type=float, default=3.0, help="most that p99 may grow, as a factor")
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with served() as server:
        at = urlsplit(server.url)
        asyncio.run(others(server.url, 5.0, options.rate))  # kernels are compiled, texts cached
        memory = [psutil.Process(server.pid).memory_info().rss >> 20]
        calm = phase(server.url, server.pid, options.seconds, options.rate)
        results = spawn.Queue()
        seconds = options.seconds + 2.0
        attacker = spawn.Process(target=attack, args=(at.hostname, at.port, seconds, options.pause, results))
        attacker.start()
        results.get()
        attacked = phase(server.url, server.pid, options.seconds, options.rate)
        attacks = results.get()
        attacker.join()
        settle(server.pid)
        memory.append(psutil.Process(server.pid).memory_info().rss >> 20)
    ratios = {name: round(attacked[f"{name}_ms"] / calm[f"{name}_ms"], 2) for name in ("p50", "p99")}
    holds = ratios["p99"] <= options.limit and not attacked["failed"] and server.exit_code == 0
    report = {
        "rate": f"{options.rate:g} requests a second of 16 tokens, far below what the machine bears",
        "pause": options.pause,
        "first_token": {"calm": calm, "attacked": attacked, "ratios": ratios},
        "attacks": attacks,
        "server_mb": {"before": memory[0], "after": memory[1]},
        "holds": holds,
        "provenance": provenance(torch.device("cpu")),
    }
    print(json.dumps(report, indent=2))
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
