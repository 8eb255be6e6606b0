"""The Python API: prompts in, texts out, shaped so that a vLLM user changes one import."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from outrider.config import EngineOptions
from outrider.core.output import AcceptanceReport, FinishReason, TokenDelta
from outrider.core.request import Request
from outrider.core.sampling import SamplingParams
from outrider.engine.detokenize import Detokenizer
from outrider.engine.engine import Engine
from outrider.engine.outputs import CompletionOutput, Piece, RequestOutput
from outrider.errors import PromptError
from outrider.load.tokenizer import Tokenizer
from outrider.oracle import Choice

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or {"prompt": text} / {"prompt_token_ids": ids} as in vLLM."""

Messages = Sequence[dict[str, Any]]
"""A conversation: [{"role": "user", "content": ...}, ...]."""


@dataclass(slots=True)
class _Completion:
    """One completion under way."""

    request_id: str
    parent: RequestOutput
    output: CompletionOutput
    detokenizer: Detokenizer | None = None
    pieces: deque[Piece] | None = None  # where a stream waits for them


class Stream(Iterator[Piece]):
    """A completion as it comes. `output` grows with it, and holds the acceptance once it has ended.

    Closing it, or letting it go, aborts what is not finished.
    """

    def __init__(self, llm: LLM, output: RequestOutput, completions: dict[str, _Completion]) -> None:
        """`LLM.stream` makes it."""
        self.output = output
        self._llm, self._completions = llm, completions
        self._pieces: deque[Piece] = deque()
        for completion in completions.values():
            completion.pieces = self._pieces

    def __next__(self) -> Piece:
        while not self._pieces:
            if self.output.finished:
                raise StopIteration
            self._llm._advance()
        return self._pieces.popleft()

    def close(self) -> None:
        """Aborts what is not finished. Idempotent."""
        self._llm._abort(self._completions)

    def __del__(self) -> None:
        self.close()


class LLM:
    """A loaded model that completes prompts in batches.

    Keyword arguments are the fields of `outrider.config.EngineOptions`; an unknown one raises
    OptionError naming the nearest. Usable as a context manager; `close` frees the memory.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> None:
        """`progress` is told the bytes of weights loaded so far and in all."""
        self._open(EngineOptions.from_kwargs(model=model, **options), progress)

    @classmethod
    def from_options(cls, options: EngineOptions, progress: Callable[[int, int], None] | None = None) -> Self:
        """From a record of options instead of keyword arguments."""
        llm = cls.__new__(cls)
        llm._open(options, progress)
        return llm

    def _open(self, options: EngineOptions, progress: Callable[[int, int], None] | None) -> None:
        self._engine = Engine(options, progress)
        self._tokenizer: Tokenizer | None = None
        self._num_requests = 0
        self._completions: dict[str, _Completion] = {}  # under way, whoever waits for them

    @property
    def choice(self) -> Choice:
        """The oracle's verdict: the runner that serves, and why not the others."""
        return self._engine.choice

    @property
    def engine(self) -> Engine:
        """The loop underneath, for callers who drive it themselves."""
        return self._engine

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, loaded at first use."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self._engine.resolved.directory)
        return self._tokenizer

    def acceptance(self) -> AcceptanceReport:
        """How drafts fared over the life of this LLM."""
        return self._engine.acceptance()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,  # finished completions, completions in all
    ) -> list[RequestOutput]:
        """Completes every prompt; outputs are in the prompts' order.

        Every prompt is checked before any runs, so an InputError leaves nothing half done.
        """
        many = _as_prompts(prompts)
        sampling = _one_each(sampling_params, len(many))
        encoded = [self._encode(prompt) for prompt in many]
        outputs, completions = self._start(encoded, sampling)
        left = set(completions)
        try:
            while left:
                for request_id in left.intersection(self._advance()):
                    left.remove(request_id)
                    if progress is not None:
                        progress(len(completions) - len(left), len(completions))
        finally:
            self._abort(completions)
        return outputs

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or several, rendered by the checkpoint's chat template."""
        if not messages:
            raise PromptError("the conversation is empty: give at least one message")
        conversations = [messages] if isinstance(messages[0], Mapping) else list(messages)
        arguments = dict(chat_template_kwargs or {})
        rendered = [self.tokenizer.render_chat(conversation, **arguments) for conversation in conversations]  # type: ignore[arg-type]
        return self.generate([{"prompt_token_ids": ids} for ids in rendered], sampling_params)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Stream:
        """Completes one prompt, token by token as they come; closing or dropping the stream aborts it."""
        sampling = sampling_params or SamplingParams()
        outputs, completions = self._start([self._encode(prompt)], [sampling])
        return Stream(self, outputs[0], completions)

    def _advance(self) -> list[str]:
        """Runs one step, and hands every completion under way what it gained. Returns those that ended."""
        ended = []
        for delta, request in self._engine.step():
            completion = self._completions.get(delta.request_id)
            if completion is None:  # a request of somebody who drives the engine beside us
                continue
            pieces = self._take(completion, delta, request)
            if completion.pieces is not None:
                completion.pieces.extend(pieces)
            if completion.output.finish_reason is not None:
                del self._completions[delta.request_id]
                ended.append(delta.request_id)
        return ended

    def _abort(self, completions: Iterable[str]) -> None:
        """Drops those that are still under way."""
        for request_id in completions:
            if self._completions.pop(request_id, None) is not None:
                self._engine.abort(request_id)

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            unknown = set(prompt) - {"prompt", "prompt_token_ids"}
            if unknown or not prompt:
                raise PromptError(f"a prompt record holds prompt or prompt_token_ids: {sorted(prompt)}")
            if "prompt_token_ids" not in prompt:
                return self._encode(prompt["prompt"])
            return prompt.get("prompt"), _token_ids(prompt["prompt_token_ids"])
        if isinstance(prompt, str):
            return prompt, self.tokenizer.encode(prompt)
        return None, _token_ids(prompt)

    def _start(
        self, encoded: Sequence[tuple[str | None, list[int]]], sampling: Sequence[SamplingParams]
    ) -> tuple[list[RequestOutput], dict[str, _Completion]]:
        outputs: list[RequestOutput] = []
        completions: dict[str, _Completion] = {}
        try:
            for (text, ids), params in zip(encoded, sampling, strict=True):
                parent = RequestOutput(text, ids, [])
                outputs.append(parent)
                for index in range(params.n):
                    request_id = f"{self._num_requests}-{index}"
                    own = params if params.seed is None else replace(params, seed=(params.seed + index) % 2**63)
                    output = CompletionOutput(index, "", [])
                    self._engine.add(request_id, ids, own)
                    completion = _Completion(request_id, parent, output)
                    completions[request_id] = self._completions[request_id] = completion
                    completion.detokenizer = self._detokenizer(ids, params)
                    parent.outputs.append(output)
                self._num_requests += 1
        except BaseException:
            self._abort(completions)
            raise
        return outputs, completions

    def _detokenizer(self, prompt: Sequence[int], params: SamplingParams) -> Detokenizer | None:
        if not params.detokenize:
            return None
        assert isinstance(params.stop, tuple)
        return Detokenizer(
            self.tokenizer, prompt, params.stop, params.include_stop_str_in_output, params.skip_special_tokens
        )

    def _take(self, completion: _Completion, delta: TokenDelta, request: Request) -> list[Piece]:
        """Adds a step's tokens to a completion; ends its request if they complete a stop string."""
        output, detokenizer = completion.output, completion.detokenizer
        taken: list[tuple[int, str]] = []
        reason = delta.finish_reason
        for token in delta.tokens:
            output.token_ids.append(token)
            stopped = False
            # a token that ended the request is no part of its text
            if detokenizer is not None and not (token == delta.stop_token and reason is FinishReason.STOP):
                stopped = detokenizer.append(token, len(output.token_ids) > request.sampling.min_tokens)
            taken.append((token, detokenizer.stream(finished=stopped) if detokenizer else ""))
            if stopped:
                assert detokenizer is not None
                reason, output.stop_reason = FinishReason.STOP, detokenizer.stop_reason
                self._engine.finish(completion.request_id, reason)
                break
        if reason is not None:
            self._end(completion, request, delta, reason)
            if detokenizer is not None and taken:
                taken[-1] = (taken[-1][0], taken[-1][1] + detokenizer.stream(finished=True))
        if detokenizer is not None:
            output.text = detokenizer.text
        last = len(taken) - 1
        return [
            Piece(
                output.index,
                token,
                text,
                place if place < delta.num_accepted else None,
                output.finish_reason if place == last else None,
            )
            for place, (token, text) in enumerate(taken)
        ]

    def _end(self, completion: _Completion, request: Request, delta: TokenDelta, reason: FinishReason) -> None:
        output, parent = completion.output, completion.parent
        if completion.detokenizer is not None:
            completion.detokenizer.finish()
        output.finish_reason = reason.value
        eos = (None, *self._engine.resolved.eos_token_ids)
        if output.stop_reason is None and delta.stop_token not in eos:  # a stop string found before it is the reason
            output.stop_reason = delta.stop_token
        parent.acceptance += request.acceptance.report()
        parent.num_cached_tokens = max(parent.num_cached_tokens, request.num_cached)

    def close(self) -> None:
        """Frees the model and the cache. Idempotent."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several: a list of numbers is one."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if all(isinstance(item, int) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _one_each(given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if given is None:
        return [SamplingParams()] * count
    if isinstance(given, SamplingParams):
        return [given] * count
    if len(given) != count:
        raise PromptError(f"{len(given)} sampling params for {count} prompts: give one, or one each")
    return list(given)


def _token_ids(ids: Any) -> list[int]:
    listed = isinstance(ids, Sequence) and not isinstance(ids, (str, bytes))
    if not listed or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise PromptError(f"token ids must be whole numbers: {ids!r}")
    return list(ids)
