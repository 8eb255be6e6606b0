"""The HTTP application: which path is answered by what."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from outrider import __version__
from outrider.errors import FieldError
from outrider.server.http.access_log import REQUEST_ID, AccessLogMiddleware
from outrider.server.http.auth import AuthMiddleware
from outrider.server.http.deadline import HEADER, Deadline, seconds_asked
from outrider.server.http.metrics import CONTENT_TYPE
from outrider.server.http.responses import error_record, error_response, in_time, json_response, unless_gone
from outrider.server.openai import chat, completions, responses
from outrider.server.openai.base import naming
from outrider.server.openai.record import parse
from outrider.server.openai.responses_schemas import ResponsesRequest
from outrider.server.openai.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from outrider.server.playground import routes as playground
from outrider.server.service import Service

Answer = Callable[[Service, Request], Awaitable[Response]]


def build(
    service: Service, keys: Sequence[str], max_body_bytes: int, root_path: str, allowed_origins: Sequence[str] = ()
) -> FastAPI:
    """The application of one engine. `keys`: what clients must send one of; none lets everybody in.

    `allowed_origins`: whose pages may read answers in a browser; without any, no CORS header is sent.
    """
    app = FastAPI(
        title="outrider",
        version=__version__,
        docs_url=None,  # the page would load its code from elsewhere
        redoc_url=None,
    )
    app.add_middleware(AuthMiddleware, keys=keys, max_body_bytes=max_body_bytes)
    if allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=allowed_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=(REQUEST_ID, "retry-after"),
        )
    app.add_middleware(  # the outermost
        AccessLogMiddleware, counted=service.metrics.answered, tracing=service.tracing, root_path=root_path
    )
    app.add_exception_handler(HTTPException, _failed)
    posts: tuple[tuple[str, Answer, type[BaseModel]], ...] = (
        ("/v1/completions", completions.complete, CompletionRequest),
        ("/v1/chat/completions", chat.chat, ChatRequest),
        ("/v1/responses", responses.respond, ResponsesRequest),
        ("/tokenize", _tokenize, TokenizeRequest),
        ("/detokenize", _detokenize, DetokenizeRequest),
    )
    for path, answer, record in posts:
        _add(app, service, path, "POST", answer, _body_of(record))
    gets: tuple[tuple[str, Answer], ...] = (
        ("/v1/models", _models),
        ("/v1/models/{model:path}", _model),
        ("/health", _health),
        ("/version", _version),
        ("/metrics", _metrics),
        ("/playground/state", playground.state),
    )
    for path, answer in gets:
        _add(app, service, path, "GET", answer, {})
    playground.add_files(app)
    return app


def _add(app: FastAPI, service: Service, path: str, method: str, answer: Answer, extra: dict[str, Any]) -> None:
    async def route(request: Request) -> Response:
        try:
            seconds = seconds_asked(request.headers.get(HEADER), service.request_timeout)
            deadline = None if seconds is None else Deadline.after(seconds, service.metrics.timed_out)
            return await in_time(deadline, answer(service, request))
        except Exception as error:
            return error_response(error)

    app.add_api_route(
        path,
        route,
        methods=[method],
        name=answer.__name__.removeprefix("_"),
        summary=(answer.__doc__ or "").strip(),
        response_model=None,
        openapi_extra=extra,
        responses={400: {"description": "what is wrong, in OpenAI's shape of an error"}},
    )


def _body_of(record: type[BaseModel]) -> dict[str, Any]:
    """A request body for the OpenAPI document: requests are read by us, so that errors are in OpenAI's shape."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(record)}}}}


def _inlined(record: type[BaseModel]) -> dict[str, Any]:
    """The record's JSON schema with every definition where it is used."""
    schema = record.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolved(part: Any) -> Any:
        if isinstance(part, dict):
            if "$ref" in part:
                return resolved(definitions[part["$ref"].rpartition("/")[2]])
            return {name: resolved(value) for name, value in part.items()}
        return [resolved(each) for each in part] if isinstance(part, list) else part

    inlined: dict[str, Any] = resolved(schema)
    return inlined


async def _failed(request: Request, error: Exception) -> Response:
    """For what no route of ours caught: unknown paths and methods."""
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        said = f"there is no {request.method} {request.url.path[:80]} here"
        return json_response(error_record(error.status_code, said), error.status_code, dict(error.headers or {}))
    return error_response(error)


async def _tokenize(service: Service, request: Request) -> Response:
    """The token ids of a text, or of a conversation under the chat template."""
    asked = await service.read(request, lambda body: parse(body, TokenizeRequest))
    num_bytes = len(await request.body())
    service.check_model(asked.model)
    if (asked.prompt is None) == (asked.messages is None):
        raise FieldError("give either prompt or messages", "prompt")
    if asked.prompt is not None:
        with naming("prompt"):
            work = service.tokenizer.encode(asked.prompt, asked.add_special_tokens is not False)
            ids = await unless_gone(request, work)
    else:
        if asked.add_special_tokens is not None:
            said = "add_special_tokens is for a prompt, a conversation has its template's: leave it out"
            raise FieldError(said, "add_special_tokens")
        with naming("messages"):
            ids = await unless_gone(request, service.tokenizer.conversation(asked.messages, num_bytes=num_bytes))
    pieces = {"token_strs": await service.tokenizer.pieces(ids)} if asked.return_token_strs else {}
    record = {"count": len(ids), "max_model_len": service.facts.max_model_len, "tokens": ids, **pieces}
    return await service.tokenizer.read(num_bytes, lambda: json_response(record))


async def _detokenize(service: Service, request: Request) -> Response:
    """The text of token ids."""
    asked = await service.read(request, lambda body: parse(body, DetokenizeRequest))
    num_bytes = len(await request.body())
    service.check_model(asked.model)
    count, limit = len(asked.tokens), service.facts.max_model_len
    if count > limit:
        raise FieldError(f"tokens holds {count} ids, more than max_model_len {limit}: give them in parts", "tokens")
    with naming("tokens"):
        text = await unless_gone(request, service.tokenizer.decode(asked.tokens, service.facts.vocab_size))
    return await service.tokenizer.read(num_bytes, lambda: json_response({"prompt": text}))


async def _models(service: Service, request: Request) -> Response:
    """What is served, and by which runner."""
    return json_response({"object": "list", "data": [service.model_record()]})


async def _model(service: Service, request: Request) -> Response:
    """One model."""
    service.check_model(request.path_params["model"])
    return json_response(service.model_record())


async def _health(service: Service, request: Request) -> Response:
    """200 while requests are taken, 503 when the engine is dead or restarting, or the server is going down."""
    service.client.check_alive()
    if service.status == "draining":
        return json_response(error_record(503, "the server is going down", code="draining"), 503)
    return json_response({"status": "ok"})


async def _version(service: Service, request: Request) -> Response:
    """The version of outrider."""
    return json_response({"version": __version__})


async def _metrics(service: Service, request: Request) -> Response:
    """Prometheus metrics."""
    return Response(service.metrics.page(), media_type=CONTENT_TYPE)
