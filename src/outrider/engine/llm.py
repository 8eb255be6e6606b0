"""The Python API: prompts in, texts out, shaped so that a vLLM user changes one import."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from outrider.acceptance.watchdog import WatchState
from outrider.core.output import AcceptanceReport
from outrider.core.sampling import SamplingParams
from outrider.engine.build import build_engine
from outrider.engine.conversation import encode_conversation
from outrider.engine.detokenize import Detokenizer
from outrider.engine.engine import Engine
from outrider.engine.generation import Generation
from outrider.engine.inproc import InprocClient
from outrider.engine.outputs import RequestOutput
from outrider.engine.prompts import (
    Messages,
    Prompt,
    as_conversations,
    as_prompts,
    as_token_ids,
    one_each,
)
from outrider.engine.stream import Stream
from outrider.errors import OptionError, PromptError
from outrider.load.hub import locate
from outrider.load.tokenizer import Tokenizer
from outrider.options import EngineOptions
from outrider.oracle import Choice

if TYPE_CHECKING:
    from outrider.engine.process.sync import SyncEngineClient

CHAT_REMEDY = "give LLM.chat a chat_template of your own, or LLM.generate a plain prompt"
"""What a caller of `LLM` can do where no chat template serves."""

Progress = Callable[[int, int], None]
"""Called with how much is done, and how much there is."""


class LLM:
    """A loaded model that completes prompts in batches.

    Keyword arguments are the fields of `outrider.options.EngineOptions`; an unknown one raises
    OptionError naming the nearest. Usable as a context manager; `close` frees the memory, and later calls raise
    EngineClosedError.

    Threads may share one: their requests run together, and each call returns its own. A process forked from this one
    may not: calls raise EngineForkedError there.

    With `enable_multiprocessing` the engine runs in a process of its own, as vLLM's does unless its
    VLLM_ENABLE_V1_MULTIPROCESSING is 0. The process is spawned, so a script must guard its
    start with `if __name__ == "__main__"`.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        progress: Progress | None = None,
        recording: Progress | None = None,
        enable_multiprocessing: bool = False,
        **options: Any,
    ) -> None:
        """`progress` is called with the bytes of weights loaded and in all; `recording` with the programs recorded."""
        self._open(EngineOptions.from_kwargs(model=model, **options), progress, recording, enable_multiprocessing)

    @classmethod
    def from_options(
        cls,
        options: EngineOptions,
        progress: Progress | None = None,
        recording: Progress | None = None,
        *,
        enable_multiprocessing: bool = False,
    ) -> Self:
        """From a record of options instead of keyword arguments."""
        llm = cls.__new__(cls)
        llm._open(options, progress, recording, enable_multiprocessing)
        return llm

    def _open(
        self, options: EngineOptions, progress: Progress | None, recording: Progress | None, multiprocessing: bool
    ) -> None:
        self._client: InprocClient | SyncEngineClient
        if multiprocessing:
            self._client = _client_of_a_process()(options, progress, recording)
            self._directory = locate(options.model)
        else:
            engine = build_engine(options, progress, recording)
            self._client, self._directory = InprocClient(engine), engine.resolved.directory
        self._sampling_defaults = SamplingParams(**self._client.sampling_defaults)
        self._tokenizer: Tokenizer | None = None
        self._num_prompts, self._numbering = 0, threading.Lock()

    @property
    def choice(self) -> Choice:
        """The oracle's verdict: the runner that serves, and why not the others."""
        return self._client.choice

    @property
    def engine(self) -> Engine:
        """The loop underneath, for callers who drive it themselves. OptionError if another process has it."""
        return self._client.engine

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, loaded at first use."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self._directory)
        return self._tokenizer

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer, as vLLM gives it."""
        return self.tokenizer.wrapped

    def get_default_sampling_params(self) -> SamplingParams:
        """What is used where none are given: those of the checkpoint's generation_config.json, as in vLLM."""
        return self._sampling_defaults

    def acceptance(self) -> AcceptanceReport:
        """How drafts fared over the life of this LLM."""
        return self._client.acceptance()

    def watchdog(self) -> WatchState:
        """Whether acceptance is what is on record for the draft head: expected, measured, and what has fallen."""
        return self._client.watchdog()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        progress: Progress | None = None,  # finished completions, completions in all
    ) -> list[RequestOutput]:
        """Completes every prompt; outputs are in the prompts' order.

        Every prompt is checked before any runs, so an InputError leaves nothing half done. An error of
        one completion alone, such as of its detokenizer, is raised, and the others are aborted. A completion
        whose logits hold no token ends with the finish reason "error" and its `error`, and the others go on.
        """
        self._client.check_usable()
        many = as_prompts(prompts)
        sampling = one_each(sampling_params, len(many), self._sampling_defaults)
        encoded = [self._encode(prompt) for prompt in many]
        generation = self._start(encoded, sampling, keeps_pieces=False)
        num_ended, count = 0, len(generation.completions)
        try:
            with _bar(count, use_tqdm) as advance_bar:
                while num_ended < count:
                    self._client.step(generation)
                    for _ in generation.ended():
                        num_ended += 1
                        advance_bar()
                        if progress is not None:
                            progress(num_ended, count)
        finally:
            self._client.abort(generation.completions)
        return generation.outputs

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or several, written by the checkpoint's chat template or the one given.

        `chat_template` is a template, a file of one, or the name of one of the checkpoint's. `tools` are shown to the
        model; its calls stay text. PromptError for what the template would leave out or refuses.
        """
        self._client.check_usable()
        prompts = [
            self.encode_conversation(
                conversation,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools or (),
                arguments=chat_template_kwargs,
            )
            for conversation in as_conversations(messages)
        ]
        return self.generate([{"prompt_token_ids": ids} for ids in prompts], sampling_params, use_tqdm=use_tqdm)

    def encode_conversation(self, messages: Messages, **how: Any) -> list[int]:
        """Token ids of one conversation, as `chat` takes it; `how` is of `engine.conversation.encode_conversation`."""
        conversations = as_conversations(messages)
        if len(conversations) != 1:
            raise PromptError(f"encode_conversation takes one conversation: {len(conversations)} are given")
        return encode_conversation(self.tokenizer, conversations[0], remedy=CHAT_REMEDY, takes_records=True, **how)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Stream:
        """Completes one prompt, token by token as they come; closing or dropping the stream aborts it."""
        self._client.check_usable()
        sampling = one_each(sampling_params, 1, self._sampling_defaults)
        generation = self._start([self._encode(prompt)], sampling, keeps_pieces=True)
        return Stream(generation, self._client.step, self._client.release)

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
        self,
        encoded: Sequence[tuple[str | None, list[int]]],
        sampling: Sequence[SamplingParams],
        keeps_pieces: bool,
    ) -> Generation:
        """Queues every completion of every prompt, or none."""
        client, count = self._client, len(encoded)
        with self._numbering:
            first_number, self._num_prompts = self._num_prompts, self._num_prompts + count
        generation = Generation(
            encoded,
            [self._with_stop_ids(params) for params in sampling],
            eos_token_ids=client.eos_token_ids,
            verifier=client.verifier,
            keeps_pieces=keeps_pieces,
            first_number=first_number,
        )
        client.add(generation, self._detokenizer)
        return generation

    def _with_stop_ids(self, params: SamplingParams) -> SamplingParams:
        return params.stopping_at(self.tokenizer.special_tokens, self._client.vocab_size) if params.stop else params

    def _detokenizer(self, prompt: Sequence[int], params: SamplingParams) -> Detokenizer | None:
        return Detokenizer.of(self.tokenizer, prompt, params) if params.detokenize else None

    def close(self) -> None:
        """Frees the model and the cache. Idempotent."""
        self._client.close()

    def __reduce__(self) -> Any:
        raise TypeError("an LLM cannot be copied or sent to another process: build one there")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _client_of_a_process() -> type[SyncEngineClient]:
    try:
        from outrider.engine.process.sync import SyncEngineClient
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "outrider":
            raise
        message = f"enable_multiprocessing needs {error.name}: outrider doctor says how to get it"
        raise OptionError(message) from None
    return SyncEngineClient


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[], object]]:
    """A progress bar in vLLM's manner; what is given moves it by one."""
    if not shown:
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="Processed prompts") as bar:
        yield bar.update
