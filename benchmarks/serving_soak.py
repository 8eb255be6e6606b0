"""A long run of mixed traffic with a real server: nothing may leak, fail, or come out otherwise than the time before.

    python benchmarks/serving_soak.py --minutes 20 2> server.log

The bundled model with its own drafts, and a cache small enough to be evicted from and preempted in. Many clients send
streams and whole answers, go away in the middle, ask for more time than there is, disable speculation, send wrong and
oversize bodies. The traffic pauses now and then: then no block of the cache may be in use by the engine's own snapshot,
and the memory of both processes is read. Each text is compared with the first one of its prompt, sampling and seed.
Faults end the run with exit code 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import torch
from _server import served

from outrider.bench.prompts import HELD_OUT, read_prompts
from outrider.bench.provenance import provenance

BODY_LIMIT = 100_000
SERVER_FLAGS = (
    *("--max-body-bytes", str(BODY_LIMIT), "--request-timeout", "300", "--max-num-seqs", "16"),
    *("--kv-cache-memory", str(16 << 20)),
)
PROMPT_CHARACTERS = 600
MOST_TOKENS = 96
ENDLESS = {"max_tokens": 1500, "ignore_eos": True}
FAULTS_TOLD = 20

FLAT_SHARE = 0.03
"""Most that memory may grow from the second fifth of the run to the last."""
FLAT_BYTES = 8 << 20
"""Growth that is no matter, whatever share it is."""

BAD: tuple[tuple[str, Any, int], ...] = (
    ("/v1/completions", {"prompt": "x", "temperature": -1}, 400),
    ("/v1/completions", {"prompt": "x", "temprature": 0}, 400),
    ("/v1/completions", {"prompt": [10**9]}, 400),
    ("/v1/completions", {"prompt": "x", "n": 10**6}, 400),
    ("/v1/completions", {"prompt": [1] * 5000}, 400),
    ("/v1/chat/completions", {"messages": "hi"}, 400),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, 400),
    ("/detokenize", {"tokens": [-1]}, 400),
    ("/v1/completions", "{", 400),
    ("/v1/completions", {"prompt": "x", "model": "other"}, 404),
    ("/v1/nothing", {}, 404),
)


@dataclass(slots=True)
class Soak:
    """The traffic of one run and what came of it."""

    client: httpx.AsyncClient
    random: random.Random
    texts: list[str]
    sent: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)  # how those that were to be cut off ended
    firsts: dict[int | str, list[str]] = field(default_factory=dict)  # by the number of the request
    num_compared: int = 0
    slowest: float = 0.0  # seconds from a request to the end of its answer
    faults: list[str] = field(default_factory=list)

    def numbered(self, number: int) -> dict[str, Any]:
        """A request that is the same each time."""
        made = random.Random(number)
        text = self.texts[number % len(self.texts)][:PROMPT_CHARACTERS]
        sampling = [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9}, {"top_k": 12}, {"min_p": 0.05}]
        return {
            "prompt": [text, text[: len(text) // 2]] if number % 7 == 0 else text,
            "max_tokens": made.randint(8, MOST_TOKENS),
            "seed": number,
            "n": 2 if number % 5 == 0 else 1,
            **sampling[number % 4],
            **({"stop": ["\n\n", "self"]} if number % 3 == 0 else {}),
        }

    def fault(self, what: str) -> None:
        """One more thing that must not be."""
        if len(self.faults) < FAULTS_TOLD:
            self.faults.append(what)

    def answered(self, response: httpx.Response, *expected: int) -> bool:
        """Counts a status; whether it is one of those expected."""
        self.statuses[response.status_code] += 1
        if response.status_code not in expected:
            self.fault(f"{response.request.url.path} gave {response.status_code}, not {expected}")
        return response.status_code in expected

    def compare(self, number: int | str, texts: list[str], how: str) -> None:
        """Holds texts against those of the first time."""
        if number not in self.firsts:
            self.firsts[number] = texts
            return
        self.num_compared += 1
        if texts != self.firsts[number]:
            self.fault(f"request {number}, {how}: {texts!r} are not the first time's {self.firsts[number]!r}")

    async def stream(self) -> None:
        """A stream to its end."""
        number = self.random.randrange(120)
        body = {**self.numbered(number), "stream": True}
        texts: dict[int, str] = {}
        async with self.client.stream("POST", "/v1/completions", json=body) as response:
            if not self.answered(response, 200):
                return
            last = ""
            async for line in response.aiter_lines():
                last = line or last
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        self.fault(f"a stream ended with {chunk['error']}")
                        return
                    for choice in chunk["choices"]:
                        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        if last != "data: [DONE]":
            self.fault(f"a stream ended with {last!r}")
        self.compare(number, [texts[index] for index in sorted(texts)], "streamed")

    async def whole(self, **more: Any) -> None:
        """An answer in one piece."""
        number = self.random.randrange(120)
        response = await self.client.post("/v1/completions", json={**self.numbered(number), **more})
        if self.answered(response, 200):
            texts = [choice["text"] for choice in response.json()["choices"]]
            self.compare(number, texts, f"whole, {more}")

    async def undrafted(self) -> None:
        """The same with speculation disabled, or limited."""
        await self.whole(speculative=self.random.choice([{"enabled": False}, {"num_speculative_tokens": 1}]))

    async def chat(self) -> None:
        """A conversation."""
        text = self.random.choice(self.texts)[:PROMPT_CHARACTERS]
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 32}
        self.answered(await self.client.post("/v1/chat/completions", json=body), 200)

    async def respond(self) -> None:
        """The newest of OpenAI's APIs, streamed or whole."""
        number = self.random.randrange(120)
        text = self.texts[number % len(self.texts)][:PROMPT_CHARACTERS]
        body = {"input": text, "max_output_tokens": 32, "seed": number, "temperature": 0.8}
        if self.random.random() < 0.5:
            response = await self.client.post("/v1/responses", json=body)
            if not self.answered(response, 200):
                return
            told = response.json()
        else:
            response = await self.client.post("/v1/responses", json={**body, "stream": True})
            if not self.answered(response, 200):
                return
            told = json.loads(response.text.rstrip().rpartition("\ndata: ")[2])["response"]
        if told["status"] not in ("completed", "incomplete"):
            self.fault(f"a response ended {told['status']}: {told['error']}")
            return
        self.compare(
            f"{number} of responses", [part["text"] for item in told["output"] for part in item["content"]], ""
        )

    async def leave(self) -> None:
        """A client that goes in the middle of a stream."""
        body = {"prompt": self.random.choice(self.texts)[:PROMPT_CHARACTERS], "stream": True, "n": 2, **ENDLESS}
        num_lines = self.random.randrange(1, 30)
        async with self.client.stream("POST", "/v1/completions", json=body) as response:
            if not self.answered(response, 200):
                return
            async for _ in response.aiter_lines():
                num_lines -= 1
                if num_lines == 0:
                    self.ends["left"] += 1
                    return
        self.fault("a stream of many tokens ended before its client left")

    async def give_up(self) -> None:
        """A client that does not wait for a whole answer."""
        body = {"prompt": self.random.choice(self.texts)[:PROMPT_CHARACTERS], "n": 4, **ENDLESS}
        with contextlib.suppress(httpx.ReadTimeout):
            await self.client.post("/v1/completions", json=body, timeout=self.random.uniform(0.02, 0.5))
            self.fault("a long answer came at once")
        self.ends["gave up"] += 1

    async def run_out(self) -> None:
        """A request that asks for too little time."""
        body = {"prompt": self.random.choice(self.texts)[:PROMPT_CHARACTERS], "n": 2, **ENDLESS}
        headers = {"X-Request-Timeout": f"{self.random.uniform(0.01, 0.4):.3f}"}
        if self.random.random() < 0.5:
            self.answered(await self.client.post("/v1/completions", json=body, headers=headers), 408)
            return
        body["stream"] = True
        async with self.client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
            if self.answered(response, 200, 408) and response.status_code == 200:
                lines = [line async for line in response.aiter_lines() if line]
                if '"request_timeout"' not in lines[-1]:
                    self.fault(f"a stream over its time ended with {lines[-1][:200]!r}")
                self.ends["stream out of time"] += 1

    async def bad(self) -> None:
        """A wrong request."""
        path, body, status = self.random.choice(BAD)
        content = body if isinstance(body, str) else json.dumps(body)
        self.answered(await self.client.post(path, content=content), status)

    async def oversize(self) -> None:
        """A body over the limit, of stated length or not."""
        body = b'{"prompt": "' + b"x" * (BODY_LIMIT + self.random.randrange(BODY_LIMIT)) + b'"}'

        async def parts() -> Any:
            for start in range(0, len(body), 8192):
                yield body[start : start + 8192]

        content = body if self.random.random() < 0.5 else parts()
        self.answered(await self.client.post("/v1/completions", content=content), 413)

    async def look(self) -> None:
        """What watches a server asks for."""
        for path in ("/health", "/metrics", "/v1/models"):
            self.answered(await self.client.get(path), 200)
        text = self.random.choice(self.texts)
        told = await self.client.post("/tokenize", json={"prompt": text})
        back = await self.client.post("/detokenize", json={"tokens": told.json()["tokens"]})
        if self.answered(back, 200) and back.json()["prompt"] != text:
            self.fault(f"a text came back from its tokens as another: {text[:80]!r}")

    async def clients(self, num_clients: int, seconds: float) -> None:
        """So many clients for so long, each with one request at a time; until all are done."""
        end = time.monotonic() + seconds
        kinds: dict[str, tuple[Callable[[], Awaitable[None]], int]] = {
            "stream": (self.stream, 30),
            "whole": (self.whole, 12),
            "undrafted": (self.undrafted, 12),
            "chat": (self.chat, 6),
            "respond": (self.respond, 10),
            "leave": (self.leave, 10),
            "give up": (self.give_up, 6),
            "run out": (self.run_out, 8),
            "bad": (self.bad, 10),
            "oversize": (self.oversize, 3),
            "look": (self.look, 3),
        }
        names = list(kinds)
        weights = [weight for _, weight in kinds.values()]

        async def one() -> None:
            while time.monotonic() < end:
                (name,) = self.random.choices(names, weights)
                self.sent[name] += 1
                start = time.monotonic()
                try:
                    await kinds[name][0]()
                    self.slowest = max(self.slowest, time.monotonic() - start)
                except httpx.HTTPError as error:
                    self.fault(f"{name}: {error!r}")
                    return

        await asyncio.gather(*(one() for _ in range(num_clients)))


async def idle_cache_usage(client: httpx.AsyncClient, seconds: float = 30.0) -> float:
    """Share of the cache's blocks in use once the engine's own snapshot shows it idle. TimeoutError if it never is."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        told = {}
        for line in (await client.get("/metrics")).text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                told[name.partition("{")[0].removeprefix("outrider:")] = float(value)
        if told["num_requests_running"] == told["num_requests_waiting"] == 0:
            return told["kv_cache_usage_perc"]
        await asyncio.sleep(0.1)
    raise TimeoutError(f"the engine still has work after {seconds} seconds")


def growth(values: list[int]) -> dict[str, Any]:
    """How memory went, in bytes: the median of the second fifth of the run, of the last, and whether it is flat."""
    fifth = max(1, len(values) // 5)
    early, late = statistics.median(values[fifth : 2 * fifth] or values), statistics.median(values[-fifth:])
    grown = late - early
    flat = grown <= max(FLAT_BYTES, FLAT_SHARE * early)
    return {"first": values[0], "early": int(early), "late": int(late), "most": max(values), "flat": flat}


async def soak(url: str, pid: int, minutes: float, num_clients: int, seed: int, round_seconds: float) -> dict[str, Any]:
    """What so many minutes of traffic came to, for a server whose process is known."""
    server = psutil.Process(pid)
    (engine,) = [child for child in server.children() if "spawn_main" in " ".join(child.cmdline())]
    texts = list(read_prompts(HELD_OUT).texts)
    memory: dict[str, list[int]] = {"server": [], "engine": []}
    leaks, start = [], time.monotonic()
    limits = httpx.Limits(max_connections=2 * num_clients)
    async with httpx.AsyncClient(base_url=url, timeout=400.0, limits=limits) as client:
        traffic = Soak(client, random.Random(seed), texts)
        while time.monotonic() - start < 60 * minutes and not traffic.faults:
            await traffic.clients(num_clients, min(round_seconds, 60 * minutes - (time.monotonic() - start)))
            leaks.append(await idle_cache_usage(client))
            for name, process in (("server", server), ("engine", engine)):
                memory[name].append(process.memory_info().rss)
        healthy = (await client.get("/health")).status_code == 200
        page = (await client.get("/metrics")).text
    told = {
        line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in page.splitlines() if "outrider:" in line[:9]
    }
    return {
        "minutes": round((time.monotonic() - start) / 60, 2),
        "clients": num_clients,
        "seed": seed,
        "sent": dict(sorted(traffic.sent.items())),
        "statuses": dict(sorted(traffic.statuses.items())),
        "cut_off": dict(traffic.ends),
        "texts_compared": traffic.num_compared,
        "slowest_request_seconds": round(traffic.slowest, 1),
        "pauses": len(leaks),
        "most_cache_usage_when_idle": max(leaks),
        "generated_tokens": told["outrider:generation_tokens_total"],
        "preemptions": told["outrider:num_preemptions_total"],
        "memory_bytes": {name: growth(values) for name, values in memory.items()},
        "memory_mib_by_pause": {name: [round(value / 2**20, 1) for value in values] for name, values in memory.items()},
        "healthy_after": healthy,
        "faults": traffic.faults,
    }


def failed(found: dict[str, Any], minutes: float) -> bool:
    """Whether something was not as it must be; memory is judged in runs that are long enough to show it."""
    grew = minutes >= 5 and not all(each["flat"] for each in found["memory_bytes"].values())
    return bool(found["faults"] or found["most_cache_usage_when_idle"] or not found["healthy_after"] or grew)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--round-seconds", type=float, default=30.0, help="between two pauses")
    options = parser.parse_args()
    told = provenance(torch.device("cpu"))  # first: the checkout may change in so long a run
    with served(*SERVER_FLAGS) as server:
        found = asyncio.run(
            soak(server.url, server.pid, options.minutes, options.clients, options.seed, options.round_seconds)
        )
    found["server_exit_code"] = server.exit_code
    print(json.dumps({**told, **found}, indent=2))
    if failed(found, options.minutes) or server.exit_code:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
