"""Random requests to the server: ones that must be answered, and ones that are damaged."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fuzz_server import MAX_BODY_BYTES, Sent
from outrider.server.openai.record import NOT_OFFERED
from outrider.server.openai.responses_schemas import ResponsesRequest
from outrider.server.openai.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

TEXT, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
RECORDS: dict[str, Any] = {
    TEXT: CompletionRequest,
    CHAT: ChatRequest,
    RESPONSES: ResponsesRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
GETS = ["/v1/models", "/v1/models/tiny", "/health", "/version", "/metrics", "/playground/state", "/openapi.json", "/"]
SPECIAL = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<|im_end|>", "<tool_response>"]
VOCAB_SIZE = 256 + len(SPECIAL) + 1  # with the end of text
MAX_LEN = 1024

ALPHABETS = [
    *(
        "abc ",
        "def main():\n    return x",
        "né à Zürich ß",
        "日本語のテキスト",
        "🙂👩‍👩‍👧🇨🇭",
        "\u0000\u0001\u001b\u007f",
    ),
    *("\u200b\u200d\ufeff\u2028", "שלוםمرحبا", "a\u0301e\u0300", "\ufffd\uffff\U0010ffff", "{}[]\"'\\/"),
]
HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 64, 1.5, -0.0, 1e-320, 1e308, -1e308, 10**30, -(10**30)),
    *(2**31, 2**31 - 1, 2**53 + 1, 2**63, 2**63 - 1, -(2**63), 2**64, "", " ", "x", "1", "0.5", "true", "null", "auto"),
    *("\x00", "\ud800", "a\udc00b", "<|im_end|>", "x" * 5000, "é" * 3000, [], [[]], [None], [1, "a"], [""], ["a", ""]),
    *([0], [-1], [10**9], [1.0], [True], [2**64], list(range(40)), ["ab"] * 300, {}, {"a": 1}, {"": ""}),
    *({"type": "text"}, {"type": "function"}, {"type": "json_object"}, {"enabled": False}, [{}], [{"type": "text"}]),
    *([{"role": "user"}], [{"role": "user", "content": "x"}], {"prompt": "x"}, {"prompt_token_ids": [1]}),
]
RAW = [
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e999",
    b"01",
    b"'a'",
    b"tru",
    b'"\xff"',
    b'"\\ud83d"',
    b"[" * 300,
    b"",
    b"1" * 5000,
]
METHODS = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "FOO"]
PATHS = ["/v1", "/v1/", "/v1/completions/", "/v1/models/%00", "/v1/models/x/y", "/..", "//", "/v1/chat", "/é"]
PATHS += [
    "/playground/app.js",
    "/playground/../serve.py",
    "/v1/embeddings",
    "/v1/models/" + "x" * 3000,
    "/docs",
    "/state",
]
HEADERS: list[tuple[bytes, bytes]] = [
    *((b"x-request-id", value) for value in (b"mine", b"", b"a b", b"\xff\xfe", b"x" * 5000, b"a\tb", "é".encode())),
    *(
        (b"x-request-timeout", value)
        for value in (b"0", b"-1", b"nan", b"inf", b"1e9", b"", b"x", b"0.001", b"30", b"\xff")
    ),
    *(
        (b"content-type", value)
        for value in (b"text/plain", b"", b"application/json; charset=latin-1", b"multipart/form-data")
    ),
    *((b"authorization", value) for value in (b"Bearer x", b"", b"\xff", b"Basic eDp4")),
    *((b"accept", value) for value in (b"text/event-stream", b"*/*", b"")),
    *((b"traceparent", value) for value in (b"00-x", b"00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-01", b"\xff")),
    *((b"content-length", value) for value in (b"5", b"99999999999999999999", b"-1", b"x", "²".encode())),
    *((b"transfer-encoding", b"chunked"), (b"origin", b"http://x"), (b"expect", b"100-continue")),
]


def hostile(rng: random.Random) -> Any:
    """One of them, for this case alone: what is damaged later may be inside it."""
    return copy.deepcopy(rng.choice(HOSTILE))


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that must be answered: its path and body."""

    path: str
    body: dict[str, Any]


def text(rng: random.Random, longest: int = 8) -> str:
    """Text of one or two alphabets, now and then with a special token; never empty."""
    made = "".join(rng.choice(rng.choice(ALPHABETS)) for _ in range(rng.randint(1, longest)))
    if rng.random() < 0.3:
        made = (made[:4] or "x") * rng.randint(2, 4)
    return made + rng.choice(SPECIAL) if rng.random() < 0.1 else made


def ids(rng: random.Random, longest: int = 30) -> list[int]:
    """Tokens with repeats, so that a look back finds something."""
    phrase = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 6))]
    return (phrase * longest)[: rng.randint(1, longest)]


def some(rng: random.Random, fields: dict[str, Callable[[], Any]], share: float) -> dict[str, Any]:
    return {name: make() for name, make in fields.items() if rng.random() < share}


def sampling(rng: random.Random) -> dict[str, Any]:
    """Fields that every kind of completion takes; the same seed always, so that asking twice gives the same."""
    given = some(
        rng,
        {
            "temperature": lambda: rng.choice([0, 0, 0.0, 1e-6, 0.5, 1, 1.7, 100, 1e6]),
            "top_p": lambda: rng.choice([1, 1.0, 0.9, 0.5, 0.01]),
            "top_k": lambda: rng.choice([-1, 0, 1, 3, 50, 10**6, 2**62]),
            "min_p": lambda: rng.choice([0, 0.0, 0.1, 1]),
            "stop": lambda: rng.choice([text(rng, 2), [text(rng, 1)], [text(rng, 3) for _ in range(4)], [], None]),
            "stop_token_ids": lambda: [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(0, 4))],
            "ignore_eos": lambda: rng.random() < 0.5,
            "include_stop_str_in_output": lambda: rng.random() < 0.5,
            "user": lambda: text(rng),
            "model": lambda: "tiny",
            "speculative": lambda: rng.choice(
                [{}, {"enabled": False}, {"enabled": True}, {"num_speculative_tokens": rng.randint(1, 3)}]
            ),
            "vllm_xargs": dict,
        },
        0.25,
    )
    return {**given, "seed": rng.choice([0, 1, 7, 2**31, 2**63 - 1, rng.randrange(2**40)])}


def choices(rng: random.Random) -> dict[str, Any]:
    """Fields of completions with choices."""
    given = some(rng, {"n": lambda: rng.randint(1, 3), "skip_special_tokens": lambda: False}, 0.2)
    longest = rng.randint(1, 20)
    if rng.random() < 0.2:
        given["min_tokens"] = rng.randint(0, longest)
    return {**sampling(rng), **given, "max_tokens": longest, "return_token_ids": True}


def content(rng: random.Random) -> Any:
    if rng.random() < 0.3:
        return [{"type": "text", "text": text(rng)} for _ in range(rng.randint(1, 3))]
    return text(rng)


def messages(rng: random.Random) -> list[dict[str, Any]]:
    """A conversation in which calls are answered."""
    made = [{"role": rng.choice(["system", "developer"]), "content": content(rng)}] if rng.random() < 0.4 else []
    made.append({"role": "user", "content": content(rng)})
    for turn in range(rng.choice([0, 0, 1, 2])):
        said: dict[str, Any] = {"role": "assistant", "content": content(rng)}
        if rng.random() < 0.3:
            said["reasoning_content"] = text(rng)
        made.append(said)
        if rng.random() < 0.4:
            call = {"name": "f", "arguments": json.dumps({"a": text(rng, 3)})}
            said["tool_calls"] = [{"id": f"call_{turn}", "type": "function", "function": call}]
            said["content"] = rng.choice([None, "", "x"])
            made.append({"role": "tool", "tool_call_id": f"call_{turn}", "content": content(rng)})
        made.append({"role": "user", "content": content(rng)})
    return made


def tools(rng: random.Random) -> list[dict[str, Any]]:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    kept = [{"name": "f", "parameters": schema, "description": text(rng)}, {"name": "g-2_x"}]
    return kept[: rng.randint(1, 2)]


def items(rng: random.Random) -> Any:
    """The input of a response."""
    if rng.random() < 0.4:
        return text(rng)
    made: list[dict[str, Any]] = [{"role": "user", "content": text(rng)}]
    if rng.random() < 0.4:
        made += [
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text(rng)}]},
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": text(rng)},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text(rng)}]},
        ]
    return made


def asked(rng: random.Random) -> Asked:
    """A request that must be answered with 200."""
    path = rng.choice([TEXT, TEXT, CHAT, CHAT, RESPONSES])
    if path == TEXT:
        prompt = rng.choice([text(rng, 20), ids(rng), [text(rng), text(rng)], [ids(rng), ids(rng, 5)], [text(rng)]])
        echo = {"echo": rng.random() < 0.7} if rng.random() < 0.3 else {}
        return Asked(path, {"prompt": prompt, **choices(rng), **echo})
    if path == CHAT:
        body = {"messages": messages(rng), **choices(rng)}
        body.pop("skip_special_tokens", None)
        if rng.random() < 0.3:
            body["tools"] = [{"type": "function", "function": tool} for tool in tools(rng)]
            body |= some(rng, {"tool_choice": lambda: rng.choice(["auto", "none"])}, 0.5)
            body |= some(rng, {"parallel_tool_calls": lambda: rng.random() < 0.5}, 0.3)
        if rng.random() < 0.3:
            body["chat_template_kwargs"] = {"thinking": rng.random() < 0.7}
        if rng.random() < 0.3:
            body["max_completion_tokens"] = body["max_tokens"]
        return Asked(path, body)
    body = {"input": items(rng), **sampling(rng), "max_output_tokens": rng.randint(1, 20)}
    body |= some(rng, {"instructions": lambda: text(rng), "metadata": lambda: {"a": text(rng)}}, 0.3)
    if rng.random() < 0.3:
        body["tools"] = [{"type": "function", **tool} for tool in tools(rng)]
    return Asked(path, body)


def other(rng: random.Random) -> Asked:
    """A body for `/tokenize` or `/detokenize` that must be answered."""
    if rng.random() < 0.4:
        return Asked("/detokenize", {"tokens": ids(rng)})
    body = {"messages": messages(rng)} if rng.random() < 0.5 else {"prompt": text(rng, 40)}
    return Asked("/tokenize", {**body, **some(rng, {"return_token_strs": lambda: True}, 0.4)})


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every place of a body: what holds it, and its key or index there."""
    found: list[tuple[Any, Any]] = []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        found += [(value, key), *_places(each)]
    return found


def damaged(rng: random.Random) -> Asked:
    """A body in which one to three things are otherwise than they should be."""
    made = rng.choice([asked, asked, asked, other])(rng)
    body = json.loads(json.dumps(made.body))
    names = [*RECORDS[made.path].model_fields, *NOT_OFFERED, *RECORDS[made.path].__dict__.get("not_offered", ())]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        way = rng.random()
        places = _places(body)
        if way < 0.45 or not places:
            body[rng.choice(names)] = hostile(rng)
        elif way < 0.8:
            holder, key = rng.choice(places)
            holder[key] = hostile(rng)
        elif way < 0.9:
            holder, key = rng.choice(places)
            del holder[key]
        elif way < 0.95:
            holder, _ = rng.choice(places)
            if isinstance(holder, dict):
                holder[rng.choice([text(rng), "x", "", "\ud800", "x" * 900, *names])] = hostile(rng)
            else:
                holder.insert(rng.randint(0, len(holder)), hostile(rng))
        else:
            holder, key = rng.choice(places)
            holder[key] = nested(rng.choice([5, 30, 63, 70, 200]))
    if rng.random() < 0.3:
        body["stream"] = True
    if made.path in (TEXT, CHAT) and rng.random() < 0.7 and not isinstance(body.get("max_tokens"), int):
        body.setdefault("max_tokens", 4)
    return Asked(made.path, body)


def nested(depth: int) -> Any:
    made: Any = 1
    for level in range(depth):
        made = [made] if level % 2 else {"a": made}
    return made


def encoded(rng: random.Random, body: Any) -> bytes:
    """A body as JSON; half of a surrogate pair is written as an escape."""
    try:
        written = json.dumps(body, ensure_ascii=rng.random() < 0.5)
        return written.encode()
    except UnicodeEncodeError:
        return json.dumps(body).encode()


def spoilt(rng: random.Random, body: bytes) -> bytes:
    """Bytes that may be no JSON any more."""
    way, place = rng.randrange(8), rng.randrange(len(body) + 1)
    if way == 0:
        return body[:place]
    if way == 1:
        return body[:place] + bytes([rng.randrange(256)]) + body[place + 1 :]
    if way == 2:
        return rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b" \n\t", b"\x00", b")]}'"]) + body
    if way == 3:
        return rng.choice([b"", b"null", b"5", b"[]", b'"x"', b"{}", b"{" * 100, b"[" * 100_000, body + body])
    if way == 4:  # a value that JSON does not have
        return body.replace(b": ", b": " + rng.choice(RAW) + b" ,", 1)
    if way == 5:
        start = body.find(b": ", place)
        return body if start < 0 else body[: start + 2] + rng.choice(RAW) + b"}"
    if way == 6:  # a key twice
        return body[:1] + b'"temperature": 0, "seed": 1, ' + body[1:]
    return b'{"prompt": "' + b"x" * (MAX_BODY_BYTES + rng.randint(-20, 20)) + b'"}'


def cuts(rng: random.Random, body: bytes) -> Sequence[int]:
    if rng.random() < 0.8:
        return ()
    return sorted(rng.randrange(len(body) + 1) for _ in range(rng.randint(1, 3)))


def odd(rng: random.Random) -> Sent:
    """A request of any method to any path, or with odd headers or a client that leaves."""
    headers = tuple(rng.choice(HEADERS) for _ in range(rng.choice([0, 0, 1, 2])))
    way = rng.random()
    if way < 0.25:
        return Sent("GET", rng.choice(GETS), headers=headers, stays=rng.choice([None, None, 0, 1]))
    if way < 0.45:
        path = rng.choice([*GETS, *PATHS, *RECORDS]) + rng.choice(["", "", "?a=b", "?stream=true&%ff"])
        return Sent(rng.choice(METHODS), path, b"{}" if rng.random() < 0.5 else b"", headers)
    made = rng.choice([asked, asked, damaged, other])(rng)
    body = encoded(rng, {**made.body, **({"stream": True} if made.path in (TEXT, CHAT, RESPONSES) else {})})
    if way < 0.7:
        return Sent("POST", made.path, body, headers, cuts(rng, body), stays=rng.randint(0, 12))
    if way < 0.8:
        return Sent("POST", made.path, body, headers, cuts(rng, body))
    return Sent("POST", made.path, spoilt(rng, encoded(rng, made.body)), headers)
