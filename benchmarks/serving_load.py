"""What a server adds to the engine: 64 streams at once through HTTP beside the same prompts offline, and one alone.

    python benchmarks/serving_load.py

The bundled model with its own drafts, greedy; server, engine and clients share the machine's cores. Figures: tokens a
second, time to first token, and the server process's own CPU time a streamed token. A load that the machine bears has
no error; a stream whose tokens are not the offline API's ends the run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from typing import Any

import httpx
import psutil
import torch
from _server import served

from outrider import LLM, SamplingParams
from outrider.bench.prompts import HELD_OUT, read_prompts
from outrider.bench.provenance import provenance
from outrider.draft.base import BUNDLED_MODEL
from outrider.draft.registry import default_method


async def stream(client: httpx.AsyncClient, ids: list[int], max_tokens: int) -> tuple[float, list[int]]:
    """Seconds to the first token, and all tokens."""
    body = {"prompt": ids, "temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True}
    start, first, tokens = time.perf_counter(), 0.0, []
    asked = client.stream("POST", "/v1/completions", json={**body, "stream": True, "return_token_ids": True})
    async with asked as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - start
                tokens += json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"]
    return first, tokens


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def load(url: str, pid: int, prompts: list[list[int]], max_tokens: int, at_once: int) -> dict[str, Any]:
    """All prompts, so many at a time."""
    process = psutil.Process(pid)
    before, places = process.cpu_times(), asyncio.Semaphore(at_once)
    limits = httpx.Limits(max_connections=at_once)

    async def one(client: httpx.AsyncClient, ids: list[int]) -> tuple[float, list[int]]:
        async with places:
            return await stream(client, ids, max_tokens)

    async with httpx.AsyncClient(base_url=url, timeout=300.0, limits=limits) as client:
        start = time.perf_counter()
        done = await asyncio.gather(*(one(client, ids) for ids in prompts))
        seconds = time.perf_counter() - start
    after = process.cpu_times()
    num_tokens = sum(len(tokens) for _, tokens in done)
    firsts = [1e3 * first for first, _ in done]
    return {
        "at_once": at_once,
        "tokens": [tokens for _, tokens in done],
        "tokens_per_second": num_tokens / seconds,
        "first_token_ms": {"p50": percentile(firsts, 0.5), "p99": percentile(firsts, 0.99)},
        "server_cpu_us_per_token": 1e6 * (after.user + after.system - before.user - before.system) / num_tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128)
    options = parser.parse_args()
    with LLM(speculative_config={"method": default_method(BUNDLED_MODEL)}, enable_prefix_caching=False) as llm:
        texts = read_prompts(HELD_OUT).texts[: options.streams]
        prompts = [llm.tokenizer.encode(text)[:256] for text in texts]
        sampling = SamplingParams(temperature=0.0, max_tokens=options.max_tokens, ignore_eos=True)
        llm.generate(prompts[:2], sampling)
        start = time.perf_counter()
        expected = [request.outputs[0].token_ids for request in llm.generate(prompts, sampling)]
        offline = sum(map(len, expected)) / (time.perf_counter() - start)
    with served("--no-enable-prefix-caching") as server:
        rows = []
        for at_once in (1, options.streams):
            asyncio.run(load(server.url, server.pid, prompts[:2], options.max_tokens, at_once))
            rows.append(asyncio.run(load(server.url, server.pid, prompts, options.max_tokens, at_once)))
            assert rows[-1].pop("tokens") == expected, "the server's tokens are not the offline API's"
    print(
        json.dumps(
            {
                **provenance(torch.device("cpu")),
                "offline_tokens_per_second": offline,
                "served_share_of_offline": rows[-1]["tokens_per_second"] / offline,
                "rows": rows,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
