"""Odd requests to a real server: none may be answered 5xx, and every error must be in OpenAI's shape.

    python benchmarks/serving_fuzz.py --requests 10000 2> server.log

Bodies are made by schemathesis from the server's own OpenAPI document, those it allows and those it forbids, and by
hypothesis from the names of its fields; then bytes are cut out of valid ones, and headers, methods and paths are odd.
The server is one of the bundled model with its own drafts. At the end nothing may be left in its cache. Faults end the
run with exit code 1; their seed finds them again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import schemathesis
import torch
from _server import served
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from outrider.bench.provenance import provenance

BATCH = 250
"""Examples that hypothesis makes from one seed."""

BRIEF = {"X-Request-Timeout": "0.25"}
"""What an endless completion is cut off with: 408 is a fair answer."""

VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "import os", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/responses": {"input": "hi", "max_output_tokens": 2},
    "/tokenize": {"prompt": "import os"},
    "/detokenize": {"tokens": [1, 2]},
}
"""A body of each path that takes one."""

GOOD: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0.0, 2.0),
    "top_p": st.floats(0.1, 1.0),
    "top_k": st.integers(1, 50),
    "seed": st.integers(0, 2**31),
    "stop": st.text(min_size=1, max_size=3),
    "stream": st.booleans(),
    "echo": st.booleans(),
}
"""Values that a field allows."""

SHORT = {
    "/v1/completions": {"max_tokens": 4},
    "/v1/chat/completions": {"max_tokens": 4},
    "/v1/responses": {"max_output_tokens": 4},
}
"""What keeps an answer short."""

BODY_LIMIT = 100_000
SERVER_FLAGS = ("--max-body-bytes", str(BODY_LIMIT), "--max-waiting", "16", "--request-timeout", "2")
FAULTS_TOLD = 20

OUT_OF_TIME = "was not finished within its"
"""In the message of a request that ran out of time."""

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-2, 5),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "\x00", "é", "\ud800", "<|endoftext|>", "a" * 3000, "auto", "none", "user", "system"]),
    st.just([1] * 3000),
)
"""Values that a field may not expect; floats may be NaN, which JSON lacks and Python writes all the same."""


def names_in(schema: Any) -> set[str]:
    """Every field name of a JSON schema."""
    if isinstance(schema, list):
        return {name for each in schema for name in names_in(each)}
    if not isinstance(schema, dict):
        return set()
    return set(schema.get("properties", {})) | {name for each in schema.values() for name in names_in(each)}


def posts(document: dict[str, Any]) -> dict[str, list[str]]:
    """The field names of the body of each path that takes one."""
    bodies = {path: methods["post"]["requestBody"] for path, methods in document["paths"].items() if "post" in methods}
    return {path: sorted(names_in(body)) for path, body in bodies.items()}


def of_the_document(document: dict[str, Any]) -> st.SearchStrategy[httpx.Request]:
    """What schemathesis makes of the server's own description, allowed and forbidden."""
    schema = schemathesis.openapi.from_dict(document)
    operations = [each.ok() for each in schema.get_all_operations()]
    modes = list(schemathesis.GenerationMode)
    with_body = [each.as_strategy(generation_mode=mode) for each in operations if each.body for mode in modes]
    without = [each.as_strategy() for each in operations if not each.body]
    cases = st.one_of(*with_body, *with_body, *without)

    def request(case: Any, served: bool) -> httpx.Request:
        made = case.as_transport_kwargs(base_url="http://server")
        body = made.get("json")
        if served and isinstance(body, dict):  # else few would get past the name of the model, or leave the engine soon
            left_out = ("model", "stream_options", "speculative", "min_tokens", "max_completion_tokens")
            body = {name: value for name, value in body.items() if name not in left_out}
            whole = {name for name, value in body.items() if isinstance(value, float) and value.is_integer()}
            body |= {name: int(body[name]) for name in whole} | SHORT.get(case.operation.path, {})
        content = json.dumps(body) if "json" in made else made.get("data")
        if isinstance(content, dict):
            content = json.dumps(content)
        headers = {name: value for name, value in dict(made["headers"] or {}).items() if value.isascii()}
        return httpx.Request(made["method"], made["url"], content=content, headers={**headers, **BRIEF})

    return st.builds(request, cases, st.booleans())


def of_field_names(fields: dict[str, list[str]]) -> st.SearchStrategy[httpx.Request]:
    """Bodies of known names with unexpected values, nested in each other."""
    every = sorted({name for names in fields.values() for name in names})
    values = st.recursive(
        ODD,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(every), inner, max_size=4),
        max_leaves=6,
    )
    bodies = st.dictionaries(st.sampled_from(every) | st.text(max_size=6), values, max_size=6)

    def request(path: str, body: dict[str, Any], base: dict[str, Any]) -> httpx.Request:
        return httpx.Request("POST", f"http://server{path}", content=json.dumps({**base, **body}), headers=BRIEF)

    def onto(path: str) -> st.SearchStrategy[httpx.Request]:
        own = st.dictionaries(st.sampled_from(fields[path]), values, max_size=2)
        bases = st.just(VALID[path]) | st.sampled_from([*VALID.values(), {}])
        good = st.fixed_dictionaries({}, optional={name: GOOD[name] for name in fields[path] if name in GOOD})
        return st.one_of(
            st.builds(request, st.just(path), bodies, bases),
            st.builds(request, st.just(path), own, bases),
            st.builds(request, st.just(path), good, st.just(VALID[path])),
        )

    return st.sampled_from(sorted(fields)).flatmap(onto)


def of_bytes(fields: dict[str, list[str]]) -> st.SearchStrategy[httpx.Request]:
    """Bodies that were valid until bytes were cut out or put in, with odd headers, methods and paths."""
    valid = (
        b'{"prompt": ["def f(x):", "\\u00e9"], "max_tokens": 3, "seed": 7, "stop": ["\\n"], "stream": true}',
        b'{"input": [{"role": "user", "content": "\\u00e9"}], "max_output_tokens": 3, "seed": 7, "stream": true}',
    )
    places = st.integers(0, max(map(len, valid)))

    def spoilt(body: bytes, start: int, end: int, put: bytes) -> bytes:
        return body[:start] + put + body[max(start, end) :]

    plain = st.sampled_from(sorted(fields))
    paths = (
        plain
        | plain
        | st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="?#%"), max_size=9)
    )
    methods = st.sampled_from(["POST"] * 6 + ["GET", "PUT", "DELETE", "OPTIONS", "PATCH", "HEAD"])
    values = st.binary(max_size=12).map(lambda value: value.translate(None, bytes(range(32)) + b"\x7f").strip())
    names = ["content-type", "content-encoding", "x-request-id", "x-request-timeout", "authorization", "traceparent"]
    headers = st.dictionaries(st.sampled_from([*names, "origin", "accept"]), values, max_size=3)

    def request(path: str, method: str, body: bytes, given: dict[str, bytes]) -> httpx.Request:
        url = f"http://server/{path.lstrip('/')}"
        return httpx.Request(method, url, content=body, headers=[*BRIEF.items()] if not given else [*given.items()])

    bodies = st.builds(spoilt, st.sampled_from(valid), places, places, st.binary(max_size=6)) | st.binary(max_size=40)
    bodies |= st.sampled_from(
        [b"[" * 50_000, b"1" * BODY_LIMIT, b"0" * (BODY_LIMIT + 1), b'{"prompt":"' + b"a " * 40_000 + b'"}']
    )
    return st.builds(request, paths, methods, bodies, headers)


def ended_well(stream: str) -> bool:
    """Whether the last event of a stream is one that may be: its end, or the end of its time."""
    last = stream.rstrip("\n").rpartition("\n")[2].removeprefix("data: ")
    if not stream.endswith("\n\n") or last == "[DONE]":
        return last == "[DONE]"
    try:
        told = json.loads(last)
    except ValueError:
        return False
    if told.get("type") == "response.failed":  # whose codes are OpenAI's, and none of them is of time
        return OUT_OF_TIME in told["response"]["error"]["message"]
    if "error" in told:
        return bool(told["error"]["code"] == "request_timeout")
    return told.get("type") in ("response.completed", "response.incomplete")


def fault_of(answer: httpx.Response) -> str | None:
    """What is wrong with an answer, if anything is."""
    if answer.status_code >= 500:
        return f"status {answer.status_code}"
    if "x-request-id" not in answer.headers:
        return "no request id"
    if answer.request.method == "HEAD" or answer.status_code < 400:
        streams = answer.headers.get("content-type", "").startswith("text/event-stream")
        return "a stream that ended before its time" if streams and not ended_well(answer.text) else None
    try:
        error = answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        return "an error in no shape of ours"
    if error.keys() != {"message", "type", "param", "code"} or not error["message"]:
        return "an error in another shape"
    if len(error["message"]) > 500 or "Traceback" in error["message"]:
        return "an error that tells too much"
    return None


def examples(source: st.SearchStrategy[httpx.Request], count: int, number: int, send: Callable[..., None]) -> None:
    """Sends so many requests that hypothesis makes from a seed."""
    quiet = list(HealthCheck)

    @seed(number)
    @settings(max_examples=count, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=quiet)
    @given(request=source)
    def batch(request: httpx.Request) -> None:
        send(request)

    batch()


def fuzz(url: str, num_requests: int, first_seed: int = 0) -> dict[str, Any]:
    """What so many requests to a server came to."""
    client = httpx.Client(base_url=url, timeout=60.0)
    document = client.get("/openapi.json").json()
    fields = posts(document)
    sources = {
        "document": of_the_document(document),
        "field names": of_field_names(fields),
        "bytes": of_bytes(fields),
    }
    statuses: dict[str, Counter[int]] = {name: Counter() for name in sources}
    answered: Counter[str] = Counter()
    faults: list[dict[str, Any]] = []
    num_sent, number = 0, first_seed

    def send(name: str, request: httpx.Request) -> None:
        nonlocal num_sent
        num_sent += 1
        request.url = request.url.copy_with(
            scheme=client.base_url.scheme, host=client.base_url.host, port=client.base_url.port
        )
        request.headers["host"] = client.base_url.netloc.decode()
        body = request.content[:2000].decode(errors="backslashreplace")
        sent = {"method": request.method, "path": request.url.path, "headers": dict(request.headers), "body": body}
        try:
            answer = client.send(request)
        except httpx.TransportError as error:
            faults.append({"fault": repr(error), "seed": number, **sent})
            return
        statuses[name][answer.status_code] += 1
        answered[request.url.path] += answer.status_code == 200
        if (fault := fault_of(answer)) is not None:
            faults.append({"fault": fault, "seed": number, **sent, "answer": answer.text[:2000]})

    start = time.perf_counter()
    while num_sent < num_requests and len(faults) < FAULTS_TOLD:
        for name, source in sources.items():
            count = min(BATCH, -(-num_requests // len(sources)), num_requests - num_sent)
            if count <= 0:
                break
            examples(source, count, number, lambda request, name=name: send(name, request))
        number += 1
    seconds = time.perf_counter() - start
    return {
        "requests": num_sent,
        "seeds": [first_seed, number - 1],
        "seconds": round(seconds, 1),
        "statuses": {name: dict(sorted(found.items())) for name, found in statuses.items()},
        "answered_200": dict(sorted((+answered).items())),
        "cache_usage_after": idle_cache_usage(client),
        "healthy_after": client.get("/health").status_code == 200,
        "faults": faults,
    }


def idle_cache_usage(client: httpx.Client, seconds: float = 30.0) -> float:
    """Share of the cache's blocks in use once the engine's own snapshot shows it idle. TimeoutError if it never is."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        told = {}
        for line in client.get("/metrics").text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                told[name.partition("{")[0].removeprefix("outrider:")] = float(value)
        if told["num_requests_running"] == told["num_requests_waiting"] == 0:
            return told["kv_cache_usage_perc"]
        time.sleep(0.2)
    raise TimeoutError(f"the engine still has work after {seconds} seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    told = provenance(torch.device("cpu"))  # first: the checkout may change in so long a run
    with served(*SERVER_FLAGS) as server:
        found = fuzz(server.url, options.requests, options.seed)
    found["server_exit_code"] = server.exit_code
    print(json.dumps({**told, **found}, indent=2))
    if found["faults"] or found["cache_usage_after"] or not found["healthy_after"] or server.exit_code:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
