"""Traces of a real engine's requests, through the SDK's in-memory exporter."""

from __future__ import annotations

import asyncio
import gzip
import json
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from outrider.engine.process.client import EngineClient
from outrider.errors import OptionError
from outrider.options import EngineOptions
from outrider.server.app import build
from outrider.server.http.metrics import Metrics
from outrider.server.http.tracing import Tracing
from outrider.server.service import Service
from outrider.server.tokenizer_service import TokenizerService

TEXT = "/v1/completions"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
ENDLESS = {"max_tokens": 3000, "ignore_eos": True, "n": 32}
STREAMED = {"max_tokens": 40, "n": 2, "temperature": 0.0, "stream": True, "stream_options": {"include_usage": True}}
MARKER = "Zanzibar"


@pytest.fixture(scope="module")
def traced(tiny: Callable[..., Path]) -> dict[str, tuple[httpx.Response, ReadableSpan | None]]:
    """Answers and spans of some requests, by name, of an application in this process."""
    directory = tiny("qwen3", max_position_embeddings=4096)
    asked: dict[str, tuple[str, str, dict[str, Any], dict[str, str]]] = {
        "whole": (
            "POST",
            TEXT,
            {"prompt": MARKER, "max_tokens": 6, "temperature": 0.5, "seed": 4},
            {"traceparent": PARENT},
        ),
        "streamed": ("POST", TEXT, {"prompt": [1, 2, 1, 2, 1, 2], **STREAMED}, {}),
        "refused": ("POST", TEXT, {"prompt": MARKER, "temperature": -1}, {}),
        "late": ("POST", TEXT, {"prompt": [1, 2], **ENDLESS}, {"X-Request-Timeout": "0.5"}),
        "models": ("GET", "/v1/models", {}, {}),
        "probe": ("GET", "/health", {}, {}),
        "probe behind a proxy": ("GET", "/api/health", {}, {}),
    }
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    async def main() -> dict[str, tuple[httpx.Response, ReadableSpan | None]]:
        options = EngineOptions(
            model=str(directory), speculative_config={"method": "ngram", "num_speculative_tokens": 2}
        )
        client = EngineClient(options, 120.0)
        try:
            facts = await client.start()
            tokenizer, metrics = TokenizerService(directory), Metrics(client, facts, "tiny")
            service = Service(client, facts, tokenizer, metrics, "tiny", 256, tracing=Tracing(provider, "tiny"))
            transport = httpx.ASGITransport(app=build(service, (), 1 << 20, "/api"))
            found = {}
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60.0) as http:
                for name, (method, path, body, headers) in asked.items():
                    exporter.clear()
                    answer = await http.request(method, path, json=body or None, headers=headers)
                    spans = exporter.get_finished_spans()
                    assert len(spans) <= 1
                    found[name] = (answer, spans[0] if spans else None)
            tokenizer.close()
            return found
        finally:
            await client.close()

    return asyncio.run(main())


def test_a_request_is_a_span_of_the_conventions(traced: Any) -> None:
    answer, span = traced["whole"]
    usage = answer.json()["usage"]
    assert span.name == "text_completion tiny" and span.kind is SpanKind.SERVER
    told = dict(span.attributes)
    assert told.pop("gen_ai.server.time_to_first_token") > 0
    assert told.pop("outrider.speculative.acceptance_length") == usage["speculative"]["acceptance_length"]
    expected = {
        "http.request.method": "POST",
        "http.route": TEXT,
        "http.response.status_code": 200,
        "outrider.request.id": answer.headers["x-request-id"],
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "outrider",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.max_tokens": 6,
        "gen_ai.request.seed": 4,
        "gen_ai.response.finish_reasons": (answer.json()["choices"][0]["finish_reason"],),
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 0,
        **{f"outrider.speculative.{name}": usage["speculative"][name] for name in ("drafts", "drafted", "accepted")},
    }
    assert {name: told.get(name) for name in expected} == expected
    assert told.keys() - expected.keys() <= {"gen_ai.request.top_k"}


def test_a_span_continues_the_client_s_trace(traced: Any) -> None:
    span = traced["whole"][1]
    assert f"{span.context.trace_id:032x}-{span.parent.span_id:016x}" in PARENT
    assert traced["streamed"][1].parent is None


def test_a_stream_is_told_of_whole(traced: Any) -> None:
    answer, span = traced["streamed"]
    told = span.attributes
    assert len(told["gen_ai.response.finish_reasons"]) == 2 == told["gen_ai.request.choice.count"]
    usage = json.loads(answer.text.removesuffix("\n\ndata: [DONE]\n\n").rpartition("data: ")[2])["usage"]
    assert told["gen_ai.usage.output_tokens"] == usage["completion_tokens"] > 0
    assert told["gen_ai.usage.input_tokens"] == usage["prompt_tokens"] == 6
    for name in ("drafts", "drafted", "accepted"):
        assert told[f"outrider.speculative.{name}"] == usage["speculative"][name] > 0


def test_requests_without_an_answer(traced: Any) -> None:
    refused, late = traced["refused"][1], traced["late"][1]
    assert refused.attributes["http.response.status_code"] == 400
    assert "gen_ai.usage.input_tokens" not in refused.attributes
    assert late.attributes["http.response.status_code"] == 408 and late.attributes["error.type"] == "408"
    assert late.attributes["gen_ai.usage.input_tokens"] == 2
    assert refused.status.status_code is late.status.status_code is StatusCode.UNSET, "the server did not fail"
    assert traced["models"][1].name == "GET /v1/models" and traced["probe"][1] is None
    assert traced["probe behind a proxy"][0].status_code == 200 and traced["probe behind a proxy"][1] is None


def test_nothing_of_a_prompt_is_told(traced: Any) -> None:
    assert all(MARKER not in span.to_json() for _, span in traced.values() if span is not None)


def test_the_extra_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(OptionError, match="outrider doctor says how to get it"):
        Tracing.to("http://localhost:4318/v1/traces", "tiny")


def test_a_collector_is_sent_to() -> None:
    got: list[tuple[str, str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            got.append((self.path, self.headers["content-type"], body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        tracing = Tracing.to(f"http://127.0.0.1:{collector.server_port}/v1/traces", "tiny")
        span = tracing.begin("POST", TEXT, {})
        assert span is not None
        tracing.end(span, "POST", TEXT, 200, "an-id")
        tracing.close()
        collector.shutdown()
        thread.join()
    ((path, kind, body),) = got
    assert (path, kind) == ("/v1/traces", "application/x-protobuf")
    assert b"text_completion tiny" in body or gzip.decompress(body).find(b"text_completion tiny") >= 0
