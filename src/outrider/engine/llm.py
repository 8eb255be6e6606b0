"""The Python API: prompts in, texts out, shaped so that a vLLM user changes one import."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

from outrider.acceptance.watchdog import WatchState
from outrider.config import EngineOptions
from outrider.core.output import AcceptanceReport, FinishReason, TokenDelta
from outrider.core.request import Request
from outrider.core.sampling import SamplingParams
from outrider.engine.build import build_engine
from outrider.engine.completion import Completion, Inbox
from outrider.engine.detokenize import Detokenizer
from outrider.engine.engine import Engine
from outrider.engine.outputs import CompletionOutput, RequestOutput
from outrider.engine.prompts import (
    Messages,
    Prompt,
    as_conversations,
    as_prompts,
    as_template_arguments,
    as_token_ids,
    one_each,
)
from outrider.engine.stream import Stream
from outrider.errors import PromptError
from outrider.load.tokenizer import Tokenizer
from outrider.oracle import Choice

Progress = Callable[[int, int], None]
"""Told how much is done, and how much there is."""


class LLM:
    """A loaded model that completes prompts in batches.

    Keyword arguments are the fields of `outrider.config.EngineOptions`; an unknown one raises
    OptionError naming the nearest. Usable as a context manager; `close` frees the memory.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        progress: Progress | None = None,
        recording: Progress | None = None,
        **options: Any,
    ) -> None:
        """`progress` is told the bytes of weights loaded so far and in all; `recording` the programs recorded."""
        self._open(EngineOptions.from_kwargs(model=model, **options), progress, recording)

    @classmethod
    def from_options(
        cls, options: EngineOptions, progress: Progress | None = None, recording: Progress | None = None
    ) -> Self:
        """From a record of options instead of keyword arguments."""
        llm = cls.__new__(cls)
        llm._open(options, progress, recording)
        return llm

    def _open(self, options: EngineOptions, progress: Progress | None, recording: Progress | None) -> None:
        self._engine = build_engine(options, progress, recording)
        self._tokenizer: Tokenizer | None = None
        self._num_requests = 0
        self._completions: dict[str, Completion] = {}  # under way, whoever waits for them
        self._gained: deque[tuple[TokenDelta, Request]] = deque()  # of the last step, not yet handed out
        self._released: deque[str] = deque()  # let go while the engine was busy: to be aborted
        self._num_dropped = 0  # requests that we dropped ourselves, or have taken note of

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

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer, as vLLM gives it."""
        return self.tokenizer.wrapped

    def acceptance(self) -> AcceptanceReport:
        """How drafts fared over the life of this LLM."""
        return self._engine.acceptance()

    def watchdog(self) -> WatchState:
        """Whether acceptance is what is on record for the draft head: expected, measured, and what has fallen."""
        return self._engine.watchdog.state()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        progress: Progress | None = None,  # finished completions, completions in all
    ) -> list[RequestOutput]:
        """Completes every prompt; outputs are in the prompts' order.

        Every prompt is checked before any runs, so an InputError leaves nothing half done. What goes
        wrong with one completion alone, in its text say, is raised, and the others are aborted.
        """
        many = as_prompts(prompts)
        sampling = one_each(sampling_params, len(many))
        encoded = [self._encode(prompt) for prompt in many]
        inbox = Inbox(keeps_pieces=False)
        outputs, completions = self._start(encoded, sampling, inbox)
        num_ended = 0
        try:
            with _bar(len(completions), use_tqdm) as advance_bar:
                while num_ended < len(completions):
                    self._advance()
                    while inbox.ended:
                        ended = inbox.ended.popleft()
                        if ended.error is not None:
                            raise ended.error
                        num_ended += 1
                        advance_bar()
                        if progress is not None:
                            progress(num_ended, len(completions))
        finally:
            self._abort(completions)
        return outputs

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or several, rendered by the checkpoint's chat template."""
        conversations = as_conversations(messages)
        arguments = as_template_arguments(chat_template_kwargs)
        rendered = [self.tokenizer.render_chat(conversation, **arguments) for conversation in conversations]
        return self.generate([{"prompt_token_ids": ids} for ids in rendered], sampling_params, use_tqdm=use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Stream:
        """Completes one prompt, token by token as they come; closing or dropping the stream aborts it."""
        sampling = one_each(sampling_params, 1)
        inbox = Inbox(keeps_pieces=True)
        outputs, completions = self._start([self._encode(prompt)], sampling, inbox)
        return Stream(outputs[0], inbox, completions, self._advance, self._release)

    def _advance(self) -> None:
        """Runs one step, and hands every completion under way what it gained.

        An error of one completion is its owner's to hear, and keeps nothing from the others; an
        interrupt leaves what is not handed out for the next call. A completion whose request the
        engine no longer knows ends as aborted, so that nobody waits for ever.
        """
        self._abort_released()
        if not self._gained:
            self._gained.extend(self._engine.step())
            self._abort_released()
        while self._gained:
            delta, _ = self._gained.popleft()
            completion = self._completions.get(delta.request_id)
            if completion is not None:  # else a request of somebody who drives the engine beside us
                self._hand_out(completion, delta)
        if self._engine.num_dropped != self._num_dropped or not self._engine.has_work:
            self._num_dropped = self._engine.num_dropped
            for completion in list(self._completions.values()):
                if not self._engine.knows(completion.request.id):
                    self._drop(completion)

    def _hand_out(self, completion: Completion, delta: TokenDelta) -> None:
        try:
            if completion.take(delta):
                self._finish(completion.request.id, FinishReason.STOP)
        except Exception as error:
            self._drop(completion, error)
        except BaseException:
            self._drop(completion)
            raise
        if completion.ended:
            self._completions.pop(completion.request.id, None)

    def _finish(self, request_id: str, reason: FinishReason) -> None:
        self._num_dropped += self._engine.finish(request_id, reason)

    def _drop(self, completion: Completion, error: Exception | None = None) -> None:
        """Ends a completion and its request, if that is not over."""
        self._completions.pop(completion.request.id, None)
        self._finish(completion.request.id, FinishReason.ABORT)
        completion.abort(error)

    def _abort(self, request_ids: Iterable[str]) -> None:
        """Drops those that are still under way."""
        for request_id in request_ids:
            completion = self._completions.get(request_id)
            if completion is not None:
                self._drop(completion)

    def _release(self, request_ids: Iterable[str]) -> None:
        """As `_abort`, but safe anywhere: a finalizer may run in the middle of a step, and must not disturb it."""
        if self._engine.busy:
            self._released.extend(request_ids)
        else:
            self._abort(request_ids)

    def _abort_released(self) -> None:
        while self._released:
            self._abort([self._released.popleft()])

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            unknown = set(prompt) - {"prompt", "prompt_token_ids"}
            if unknown or not prompt:
                raise PromptError(f"a prompt record holds prompt or prompt_token_ids: {sorted(prompt)}")
            if "prompt_token_ids" not in prompt:
                return self._encode(prompt["prompt"])
            return prompt.get("prompt"), as_token_ids(prompt["prompt_token_ids"])
        if isinstance(prompt, str):
            return prompt, self.tokenizer.encode(prompt)
        return None, as_token_ids(prompt)

    def _start(
        self, encoded: Sequence[tuple[str | None, list[int]]], sampling: Sequence[SamplingParams], inbox: Inbox
    ) -> tuple[list[RequestOutput], dict[str, Completion]]:
        """Queues every completion of every prompt, or none."""
        self._abort_released()
        outputs: list[RequestOutput] = []
        completions: dict[str, Completion] = {}
        verifier, eos = self._engine.resolved.runner.verifier.name, self._engine.resolved.eos_token_ids
        try:
            for (text, ids), params in zip(encoded, sampling, strict=True):
                number, self._num_requests = self._num_requests, self._num_requests + 1
                parent = RequestOutput(str(number), text, ids, [], verifier)
                outputs.append(parent)
                for index in range(params.n):
                    request_id = f"{number}-{index}"
                    request = self._engine.add(request_id, ids, params.of_completion(index))
                    output = CompletionOutput(index, "", [])
                    completion = Completion(request, parent, output, inbox, eos)
                    completions[request_id] = self._completions[request_id] = completion
                    completion.detokenizer = self._detokenizer(ids, params)
                    parent.outputs.append(output)
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

    def close(self) -> None:
        """Frees the model and the cache. Idempotent."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[], object]]:
    """A progress bar in vLLM's manner; what is given moves it by one."""
    if not shown:
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="Processed prompts") as bar:
        yield bar.update
