"""How a request becomes a generation: what is refused before anything is made of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from starlette.requests import Request

from fake_engine import EOS, FACTS, HERMES_TEMPLATE, FakeClient, write_tokenizer
from outrider.core.output import AcceptanceTally, FinishReason, TokenDelta
from outrider.core.sampling import SamplingParams
from outrider.engine import generation
from outrider.errors import FieldError, InputError, PromptError
from outrider.server.app import _tokenize
from outrider.server.http.metrics import Metrics
from outrider.server.http.responses import ClientGoneError
from outrider.server.openai.completions import _prompts, complete
from outrider.server.openai.record import Asked, parse
from outrider.server.openai.schemas import CompletionRequest, TokenizeRequest
from outrider.server.service import Service
from outrider.server.tokenizer_service import TokenizerService

LENGTH = FACTS.max_model_len


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenizerService]:
    made = TokenizerService(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), HERMES_TEMPLATE, (EOS,)))
    yield made
    made.close()


@pytest.fixture
def service(tokenizer: TokenizerService) -> Service:
    client: Any = FakeClient(tokenizer)
    return Service(client, FACTS, tokenizer, Metrics(client, FACTS, "fake"), "fake", 8)


def asked(record: type[Asked] = CompletionRequest, **body: Any) -> tuple[Request, Asked]:  # type: ignore[assignment]
    """A request with this body, whose client waits."""
    content = msgspec.json.encode(body)
    messages = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        return await asyncio.Event().wait()

    return Request({"type": "http", "headers": [], "state": {"request_id": "1"}}, receive), parse(content, record)


@pytest.mark.parametrize("prompt", [[1] * LENGTH, [[1], [1] * LENGTH], "x" * LENGTH, ["a", "x" * LENGTH]])
def test_a_prompt_that_is_too_long_is_refused_before_it_is_copied(
    service: Service, prompt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "Completion", lambda *_, **__: pytest.fail("a completion was made"))
    request, _ = asked(prompt=prompt, n=8)
    with pytest.raises(PromptError, match=f"has {LENGTH} tokens, which leaves no room .* at most {LENGTH - 1}"):
        asyncio.run(complete(service, request))
    assert service._num_arriving == 0


def test_prompts_are_counted_before_they_are_encoded(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.tokenizer._encoder, "encode", lambda *_: pytest.fail("a prompt was encoded"))
    for body in ({"prompt": ["a"] * 17}, {"prompt": ["a"] * 6, "n": 3}):
        with pytest.raises(InputError, match="completions are asked for"):
            asyncio.run(complete(service, asked(**body)[0]))


def test_what_a_request_brings_is_not_worked_on_by_the_event_loop(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()

    def check(*_: Any) -> None:
        seen.add(threading.current_thread())

    monkeypatch.setattr("outrider.server.tokenizer_service.check_token_ids", check)

    async def main() -> None:
        assert await _prompts(service, asked(prompt=[[65], [66]], echo=True)[1], 0) == [
            (service.tokenizer.decoder.decode([one]), [one]) for one in (65, 66)
        ]
        await service.tokenizer.contexts([[1]], 300, True)
        await service.tokenizer.decode([65], 300)

    asyncio.run(main())
    assert len(seen) == 1 and threading.current_thread() not in seen


def test_a_client_that_goes_while_its_prompt_waits_is_not_served(service: Service) -> None:
    class Gone(SimpleNamespace):
        async def receive(self) -> Any:
            return {"type": "http.disconnect"}

        async def body(self) -> bytes:
            return b'{"prompt": "x"}'

    request: Any = Gone()
    with pytest.raises(ClientGoneError):
        asyncio.run(complete(service, request))
    assert service.client.num_in_flight == service._num_arriving == 0


def test_prompt_tokens_are_counted_when_a_completion_begins_to_come(service: Service) -> None:
    params = SamplingParams(n=2)
    made = generation.AsyncGeneration([(None, [1, 2, 3])], params, service.metrics, eos_token_ids=(), verifier="x")
    for _ in range(2):
        made.take(made.completions[1], TokenDelta("0-1", (65,), 0, None, None), AcceptanceTally(), 0)
    assert b'outrider:prompt_tokens_total{model_name="fake"} 3.0' in service.metrics.page()


def test_one_that_fails_is_counted_alone_and_the_others_gain_nothing_more(service: Service) -> None:
    params = SamplingParams(n=2)
    made = generation.AsyncGeneration([(None, [1, 2, 3])], params, service.metrics, eos_token_ids=(), verifier="x")
    failed = TokenDelta("0-0", (), 0, FinishReason.ERROR, None)
    assert made.take(made.completions[0], failed, AcceptanceTally(), 0)
    assert made.take(made.completions[1], TokenDelta("0-1", (65,), 0, FinishReason.STOP, None), AcceptanceTally(), 0)
    assert made.completions[1].output.finish_reason == "abort" and not made.completions[1].output.token_ids
    page = service.metrics.page()
    assert b'finished_reason="error",model_name="fake"} 1.0' in page and b'finished_reason="stop"' not in page


@pytest.mark.parametrize("given", [True, False])
def test_a_conversation_has_its_template_s_special_tokens(service: Service, given: bool) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "add_special_tokens": given}
    with pytest.raises(FieldError, match="leave it out") as refused:
        asyncio.run(_tokenize(service, asked(TokenizeRequest, **body)[0]))
    assert refused.value.field == "add_special_tokens"
