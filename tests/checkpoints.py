"""What the suite runs on: tiny checkpoints of random weights, and drafters that know the answer."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from outrider import LLM, HostDrafter, SamplingParams
from outrider.draft.eagle.network import HeadNetwork
from outrider.layers.weight import TensorSlot
from outrider.models.decoder import Decoder
from outrider.runner.step import StepProgram

FAMILIES = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
EOS = 256
"""The end-of-text token of a checkpoint with a tokenizer: 256 bytes come first, so any tokens are some text."""

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def write(
    path: Path, family: str = "qwen3", *, dtype: torch.dtype = torch.float32, shards: str = "1GB", **config: Any
) -> Path:
    """A checkpoint as transformers writes it. Norms and biases are drawn too: leaving one out must show."""
    make_config, make_model = FAMILIES[family]
    model = make_model(make_config(**{**SIZES, **config}))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale, mean = (0.15, 0.0) if parameter.dim() > 1 else (0.3, float("norm" in name))
            parameter.copy_(mean + scale * torch.randn(parameter.shape, generator=generator))
    model.to(dtype).save_pretrained(path, max_shard_size=shards)
    return path


def write_tokenizer(path: Path, **more: Any) -> Path:
    """A byte-level tokenizer beside the weights: token i is a byte, or past them one that ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: token for token, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", **more).save_pretrained(path)
    return path


def reference(path: Path, family: str = "qwen3", rounded: bool = False) -> PreTrainedModel:
    """The same weights in transformers, in float32: what flows between outrider's layers on a CPU is float32 too.

    `rounded`: keys and values pass through bfloat16, as they do in outrider's cache beside weights of it.
    """
    model: PreTrainedModel = FAMILIES[family][1].from_pretrained(path, dtype=torch.float32)
    if rounded:
        AttentionInterface.register("rounded", _attend_rounded)
        AttentionMaskInterface.register("rounded", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        model.set_attn_implementation("rounded")
    return model.eval()


def _attend_rounded(module: Any, query: Tensor, key: Tensor, value: Tensor, *given: Any, **named: Any) -> Any:
    key, value = (each.bfloat16().float() for each in (key, value))
    return sdpa_attention_forward(module, query, key, value, *given, **named)


def cache_bytes(num_blocks: int, weights: torch.dtype = torch.float32, **config: Any) -> int:
    """`kv_cache_memory` for so many blocks of 16 tokens, on a CPU."""
    sizes, width = {**SIZES, **config}, 2 if weights == torch.bfloat16 else 4
    return num_blocks * 2 * 16 * width * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * sizes["head_dim"]


def program(llm: LLM) -> StepProgram:
    """What the engine runs, to look into it or to break it."""
    running: StepProgram = llm.engine._worker._runner._bound.program  # type: ignore[union-attr]
    return running


def parameters(model: Decoder | HeadNetwork) -> dict[str, Tensor]:
    """Every parameter by its name in the checkpoint."""
    slots = model.slots()
    assert all(isinstance(slot, TensorSlot) for slot in slots.values())
    return {name: slot.tensor for name, slot in slots.items()}  # type: ignore[attr-defined]


def prompt(length: int, salt: int = 0, vocab_size: int = 256) -> list[int]:
    """Distinct, repeatable token ids with repeats in them, so that looking back finds something."""
    generator = torch.Generator().manual_seed(1000 * salt + length)
    phrase = torch.randint(0, vocab_size, (max(3, length // 2),), generator=generator).tolist()
    return (phrase * 3)[:length]


@dataclass(frozen=True, slots=True)
class Case:
    """One request."""

    prompt: Sequence[int]
    sampling: SamplingParams

    @classmethod
    def of(cls, length: int, salt: int = 0, **sampling: Any) -> Case:
        """Sampled with a seed of its own unless told otherwise; tokens only, unless asked for text."""
        plain = {"ignore_eos": True, "detokenize": False, "seed": salt, "max_tokens": 24}
        return cls(prompt(length, salt), SamplingParams(**{**plain, **sampling}))


Result = tuple[list[int], str, str | None, int | str | None]
"""All of a completion that speculation must not change."""


def run(llm: LLM, cases: Sequence[Case]) -> list[list[Result]]:
    """Every completion of every case, as one call."""
    prompts = [{"prompt_token_ids": list(case.prompt)} for case in cases]
    outputs = llm.generate(prompts, [case.sampling for case in cases])
    return [
        [(one.token_ids, one.text, one.finish_reason, one.stop_reason) for one in output.outputs] for output in outputs
    ]


def tokens(llm: LLM, case: Case) -> list[int]:
    """The tokens of a case run alone."""
    return run(llm, [case])[0][0][0]


@contextmanager
def drafter_failures() -> Iterator[list[str]]:
    """What drafters of this process, or of its workers, fail with meanwhile: it is logged, and harms no request."""
    failures: list[str] = []

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if hasattr(record, "failed_drafter"):
                failures.append(logging.Formatter().format(record))

    watch, logger = Watch(), logging.getLogger("outrider")
    logger.addHandler(watch)
    try:
        yield failures
    finally:
        logger.removeHandler(watch)


class Knowing(HostDrafter):
    """Knows what will come out: whole sequences, prompt and output, that a test has told it."""

    name = "knowing"
    known: Sequence[Sequence[int]] = ()

    def truth(self, tokens: list[int]) -> list[int]:
        """The next K tokens, fewer near the end of what is known."""
        end = len(tokens)
        for sequence in Knowing.known:
            if list(sequence[:end]) == tokens:
                return list(sequence[end : end + self.num_drafts])
        return []

    def corrupt(self, guesses: list[int], at: int) -> list[int]:
        """Guesses with the one there, if any, wrong."""
        return [(token + (place == at)) % self.target.vocab_size for place, token in enumerate(guesses)]

    def guess(self, slot: int, tokens: list[int]) -> list[int]:
        return self.truth(tokens)


class Right(Knowing):
    """Always right."""

    name = "right"


class Wrong(Knowing):
    """Always wrong, from the first draft."""

    name = "wrong"

    def guess(self, slot: int, tokens: list[int]) -> list[int]:
        return self.corrupt(self.truth(tokens), at=0)


class Sometimes(Knowing):
    """Right up to a place that the history decides, wrong there; now and then fewer guesses, or none."""

    name = "sometimes"

    def guess(self, slot: int, tokens: list[int]) -> list[int]:
        luck = hash(tuple(tokens))
        guesses = self.corrupt(self.truth(tokens), at=luck % (self.num_drafts + 2))
        return guesses[: luck // 64 % (self.num_drafts + 1)]


def plugin(drafter: type[HostDrafter], num_drafts: int = 4) -> dict[str, Any]:
    """`speculative_config` that names a class of one's own."""
    return {"method": f"{drafter.__module__}:{drafter.__name__}", "num_speculative_tokens": num_drafts}
