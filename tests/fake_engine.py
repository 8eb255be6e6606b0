"""A server without a model: the real HTTP application over an engine that writes what a test tells it to."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from outrider.core.output import AcceptanceTally, FinishReason
from outrider.engine.completion import Completion
from outrider.engine.generation import AsyncGeneration
from outrider.engine.process.messages import Delta, Facts, Snapshot, WatchedRates
from outrider.errors import EngineDeadError
from outrider.server.app import build
from outrider.server.http.metrics import Metrics
from outrider.server.service import Service
from outrider.server.tokenizer_service import TokenizerService

EOS = "<eos>"

HERMES_TEMPLATE = """
{%- if tools %}<|system|>Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
{% endif %}
{%- for message in messages %}
{{- '<|' + message.role + '|>' }}
{%- if message.role == 'tool' %}<tool_response>{{ message.content }}</tool_response>
{%- else %}
{%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}{% endif %}
{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% if thinking %}<think>
{% endif %}{% endif %}"""
"""In the manner of Qwen's."""

LLAMA_TEMPLATE = """
{%- if tools %}Functions: {{ tools | tojson }}
{% endif %}
{%- for message in messages %}
{{- '<|' + message.role + '|>' }}
{%- if message.tool_calls %}
{%- if message.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
{%- else %}{{ message.content }}{% endif %}<|eot|>
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
"""In the manner of Llama 3.1's."""


def write_tokenizer(path: Path, template: str | None, special: tuple[str, ...] = ()) -> Path:
    """A tokenizer of bytes and these special tokens, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: token for token, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)
    wrapped.chat_template = template
    wrapped.save_pretrained(path)
    return path


class FakeClient:
    """An engine that answers each completion with the next of `says`, some tokens a step."""

    alive = True
    snapshot = Snapshot(
        num_running=1,
        num_waiting=2,
        cache_usage=0.25,
        prefix_queries=100,
        prefix_hits=25,
        num_preemptions=0,
        num_steps=50,
        acceptance=AcceptanceTally.of(20, (0, 4, 6)).report(),
        watched=(WatchedRates(0.0, (0.8, 0.6), (0.4, 0.1), True),),
    )

    def __init__(self, tokenizer: TokenizerService) -> None:
        self._tokenizer = tokenizer
        self._tasks: dict[AsyncGeneration, asyncio.Task[None]] = {}
        self.restarting = False
        self.says: list[str] = []
        """One a completion; the last is said again and again."""
        self.answers: Callable[[str], str] | None = None
        """What it says to a prompt, instead of the next of `says`."""
        self.step = 3
        """Tokens a step."""
        self.fails_after: int | None = None
        """Steps after which the engine dies."""
        self.asked: list[Completion] = []
        """Every completion it was to write, newest last."""
        self.prompts: list[str] = []
        """Their prompts as text, special tokens included."""

    @property
    def num_in_flight(self) -> int:
        """Completions that run."""
        return len(self._tasks)

    def check_alive(self) -> None:
        """It lives, until a test has it fail."""

    async def run(self, generation: AsyncGeneration) -> None:
        """Begins to write."""
        self._tasks[generation] = asyncio.get_running_loop().create_task(self._write(generation))

    def abort(self, generation: AsyncGeneration) -> None:
        """Writes no more."""
        task = self._tasks.pop(generation, None)
        if task is not None:
            task.cancel()

    async def _write(self, generation: AsyncGeneration) -> None:
        tokenizer = self._tokenizer.decoder
        eos = tokenizer.wrapped.eos_token_id
        for number, completion in enumerate(generation.completions):
            self.asked.append(completion)
            prompt = completion.parent.prompt_token_ids
            self.prompts.append(tokenizer.decode(prompt, skip_special_tokens=False))
            said = self.answers(self.prompts[-1]) if self.answers else self.says[min(number, len(self.says) - 1)]
            tokens = [*tokenizer.wrapped.encode(said, add_special_tokens=False), eos]
            most = completion.sampling.max_tokens or len(tokens)
            for start in range(0, len(tokens), self.step):
                await asyncio.sleep(0)
                if self.fails_after is not None and start // self.step >= self.fails_after:
                    generation.fail(EngineDeadError("the engine failed: the request cannot be finished"))
                    return
                delta = self._delta(number, tokens[:most], start, eos)
                stopped = generation.take(completion, delta.tokens_gained(), delta.tally(), delta.num_cached)
                if stopped or start + self.step >= most:
                    break

    def _delta(self, number: int, tokens: list[int], start: int, eos: int) -> Delta:
        end = start + self.step
        step, is_last = tuple(tokens[start:end]), end >= len(tokens)
        stops = is_last and tokens[-1] == eos
        reason = None if not is_last else FinishReason.STOP if stops else FinishReason.LENGTH
        rounds = (start // self.step + 1,)
        return Delta(f"0-{number}", step, len(step) - 1, reason, eos if stops else None, 0, start + len(step), rounds)


FACTS = Facts(
    max_model_len=4096,
    max_num_seqs=8,
    vocab_size=300,
    eos_token_ids=[],
    num_blocks=1,
    block_size=16,
    method="none",
    num_speculative_tokens=2,
    verifier="exact",
    faithful=True,
    dtype="float32",
    device="cpu",
    runner="fake",
    forced=False,
    passed_over=[],
)


@contextmanager
def fake_server(directory: Path, *parsers: str | None) -> Iterator[tuple[str, FakeClient]]:
    """The address of a server over a fake engine, and the engine. `parsers`: of calls and of reasoning."""
    tokenizer = TokenizerService(directory, *parsers)
    engine = FakeClient(tokenizer)
    client: Any = engine
    facts = msgspec.structs.replace(FACTS, eos_token_ids=[tokenizer.decoder.wrapped.eos_token_id])
    service = Service(client, facts, tokenizer, Metrics(client, facts, "fake"), "fake", 8)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(build(service, [], 1 << 20, ""), lifespan="off", log_config=None, access_log=False)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", engine
        finally:
            server.should_exit = True
            thread.join(20)
            tokenizer.close()
            assert not thread.is_alive()
