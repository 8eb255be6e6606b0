"""The target's logits are transformers' own, on every path a token can take through the engine.

Logits are taken where the verifier of the running program gets them, and filed under the tokens they
follow. Whatever a request went through - chunks, shared prefixes, drafts, a preemption - those after
each prefix of its sequence must be transformers' for that prefix, computed in one plain pass. The
last tests break one thing at a time: the same comparison must fail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from checkpoints import Knowing, Sometimes, cache_bytes, plugin, program, prompt, reference, write
from outrider import LLM, SamplingParams
from outrider.layers.rope import Rope
from outrider.layers.weight import dense_tensor
from outrider.load.checkpoint import read_json
from outrider.models.config import ModelConfig
from outrider.tensors import Draft, Slots, StepBatch, Verdict
from outrider.verify.exact import Exact

TOLERANCE = 2e-5
"""Largest error over the largest logit. Both sides add up float32 in different orders; two layers of sums over
80 terms round to about 1e-6, and every mutation below is off by more than 1e-3."""

FEW_ROWS = 16
"""Steps of more tokens may round what meets weights of 16 bits; see `kernels.linear`."""

ROUNDED = 3e-2
"""TOLERANCE there: activations of 8 bits, rounded some 20 times on their way."""

STORED = 1e-3
"""TOLERANCE beside bfloat16 weights: a key or value that lies between two bfloat16 may be stored as either."""

MAX_LEN = 96
OUTPUT = 24
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.5}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-bias": ("qwen3", {"attention_bias": True}),
    "qwen3-a-kv-head-each": ("qwen3", {"num_key_value_heads": 4}),
    "qwen3-one-kv-head": ("qwen3", {"num_key_value_heads": 1}),
    "qwen3-wide-heads": ("qwen3", {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    "qwen3-bfloat16": ("qwen3", {"dtype": torch.bfloat16}),
    "llama": ("llama", {"rms_norm_eps": 1e-2}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-attention-bias": ("llama", {"attention_bias": True}),
    "llama-mlp-bias": ("llama", {"mlp_bias": True}),
    "llama-rope-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-rope-linear": ("llama", {"rope_parameters": LINEAR}),
    "llama-sharded": ("llama", {"shards": "40KB"}),
}

NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 1}
WAYS: dict[str, dict[str, Any]] = {
    "batched": {},
    "chunked": {"max_num_batched_tokens": 7, "max_num_seqs": 3},
    "ngram": {"speculative_config": NGRAM},
    "drafts": {"speculative_config": plugin(Sometimes, 5)},
    "prefixes": {},
    "preempted": {"kv_cache_memory": 6, "speculative_config": plugin(Sometimes, 3)},  # in blocks
    "everything": {"kv_cache_memory": 6, "speculative_config": NGRAM, "max_num_batched_tokens": 12, "max_num_seqs": 4},
}


@dataclass(frozen=True, slots=True)
class Subject:
    """A checkpoint, and what transformers makes of it."""

    path: Path
    model: PreTrainedModel
    followed: list[list[int]]  # the prompts with transformers' own greedy continuations

    @classmethod
    def make(cls, path: Path, name: str) -> Subject:
        family, config = MODELS[name]
        write(path, family, **config)
        model = reference(path, family, rounded="bfloat16" in name)
        return cls(path, model, [follow(model, text) for text in prompts()])


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    made: dict[str, Subject] = {}
    return lambda name: made.get(name) or made.setdefault(name, Subject.make(tmp_path_factory.mktemp(name), name))


class Recorder(Exact):
    """The exact verifier, filing each row of logits under the tokens before it."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, logits: Tensor, batch: StepBatch, draft: Draft, slots: Slots) -> Verdict:
        for row, slot in enumerate(batch.slot.tolist()):
            start, stop = batch.logits_start[row : row + 2].tolist()
            length = int(slots.length[slot])
            for place in range(stop - start):
                before = slots.tokens[slot, :length].tolist() + draft.tokens[row, :place].tolist()
                assert int(batch.logits_position[start + place]) == len(before)
                self.seen[tuple(before)] = logits[start + place].clone()
        return super().__call__(logits, batch, draft, slots)


def prompts() -> list[list[int]]:
    """Of several lengths, the last three alike for two blocks."""
    shared = prompt(32, salt=1)
    ends = (prompt(3, 2), prompt(9, 3), [5])
    return [prompt(13), prompt(14), prompt(1), prompt(15), prompt(48), *(shared + end for end in ends)]


def serve(path: Path, mutate: Callable[[LLM], None] | None = None, **options: Any) -> tuple[LLM, Recorder]:
    """An engine whose logits are recorded."""
    if blocks := options.pop("kv_cache_memory", None):
        config = ModelConfig.from_dict(read_json(path / "config.json"))
        sizes = {"num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim}
        options["kv_cache_memory"] = cache_bytes(blocks, config.dtype, **sizes)
    llm = LLM(str(path), max_model_len=MAX_LEN, **{"max_num_seqs": 16, **options})
    if mutate is not None:
        mutate(llm)
    recorder = Recorder()
    program(llm)._verifier = recorder
    return llm, recorder


def complete(llm: LLM, texts: Sequence[Sequence[int]], output: int = OUTPUT) -> list[list[int]]:
    """Greedy sequences, prompt and output."""
    greedy = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": list(text)} for text in texts], greedy)
    return [one.prompt_token_ids + one.outputs[0].token_ids for one in outputs]


def check(
    model: PreTrainedModel,
    recorder: Recorder,
    texts: Sequence[Sequence[int]],
    whole: list[list[int]],
    tolerance: float = TOLERANCE,
) -> None:
    """Every prefix from the prompt on was seen, and its logits are the model's."""
    for text, sequence in zip(texts, whole, strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([sequence])).logits[0]
        for end in range(len(text), len(sequence)):
            seen = recorder.seen[tuple(sequence[:end])]
            error = ((seen - expected[end - 1]).abs().max() / expected[end - 1].abs().max()).item()
            assert error <= tolerance, f"logits after {end} tokens of a prompt of {len(text)} are off by {error:.1e}"


def follow(model: PreTrainedModel, text: Sequence[int], output: int = OUTPUT) -> list[int]:
    """transformers' own greedy continuation."""
    ids = torch.tensor([list(text)])
    mask = torch.ones_like(ids)  # left out, it would hide tokens that equal the padding
    found = model.generate(ids, attention_mask=mask, max_new_tokens=output, do_sample=False, pad_token_id=0)
    return found[0].tolist()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens_are_those_of_transformers(
    name: str, way: str, subject: Callable[[str], Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    of, texts = subject(name), prompts()
    monkeypatch.setattr(Knowing, "known", of.followed)
    options = {"max_num_batched_tokens": FEW_ROWS, **WAYS[way]} if "bfloat16" in name else WAYS[way]
    llm, recorder = serve(of.path, **options)
    if way == "prefixes":
        complete(llm, texts, output=1)
        recorder.seen.clear()
    whole = complete(llm, texts)
    assert whole == of.followed
    check(of.model, recorder, texts, whole, STORED if "bfloat16" in name else TOLERANCE)
    scheduler = llm.engine._scheduler
    assert (scheduler.num_preemptions > 0) == (way in ("preempted", "everything")), "the way was not taken"
    assert scheduler.cache.num_hit > 0 or way != "prefixes"
    assert llm.acceptance().accepted > 0 or way not in ("ngram", "drafts", "preempted", "everything")
    scheduler.check_idle()


def test_positions_up_to_the_last_are_right(subject: Callable[[str], Subject]) -> None:
    of = subject("qwen3")
    llm, recorder = serve(of.path, speculative_config=NGRAM)
    texts = [prompt(MAX_LEN - 1), prompt(MAX_LEN - 6)]
    whole = complete(llm, texts, output=50)
    assert [len(sequence) for sequence in whole] == [MAX_LEN, MAX_LEN]
    check(of.model, recorder, texts, whole)


def test_long_steps_with_bfloat16_weights_stay_close(subject: Callable[[str], Subject]) -> None:
    of, texts = subject("qwen3-bfloat16"), prompts()
    llm, recorder = serve(of.path)
    check(of.model, recorder, texts, complete(llm, texts), ROUNDED)


def shift_later_positions(llm: LLM) -> None:
    # all of them shifted alike would change nothing: rotation tells only how far apart two tokens are
    rope = program(llm)._model.rope
    rope[8:] = rope[7:-1].clone()


def drop_head_norms(llm: LLM) -> None:
    attention = program(llm)._model.layers[1].attention
    attention.q_norm = attention.k_norm = None


def forget_q_norm(llm: LLM) -> None:
    program(llm)._model.layers[1].attention.q_norm.weight.fill_(1.0)


def drop_bias(llm: LLM) -> None:
    program(llm)._model.layers[0].attention.out.bias = None


def drop_rope_scaling(llm: LLM) -> None:
    model = program(llm)._model
    model.rope = Rope(model.config.rope.theta).table(MAX_LEN, model.config.head_dim, model.rope.device)


def take_default_epsilon(llm: LLM) -> None:
    for layer in program(llm)._model.layers:
        layer.spec = replace(layer.spec, eps=1e-6)


def swap_key_heads(llm: LLM) -> None:
    qkv = dense_tensor(program(llm)._model.layers[0].attention.qkv.weight)
    start, width = 4 * 16, 16
    key = qkv[start : start + 2 * width].clone()
    qkv[start : start + 2 * width] = key.roll(width, 0)


MUTATIONS = [
    ("qwen3", shift_later_positions),
    ("qwen3", drop_head_norms),
    ("qwen3", forget_q_norm),
    ("qwen3", swap_key_heads),
    ("qwen3-bias", drop_bias),
    ("llama", take_default_epsilon),
    ("llama-rope-llama3", drop_rope_scaling),
    ("llama-rope-linear", drop_rope_scaling),
]


@pytest.mark.parametrize(("name", "mutate"), MUTATIONS)
def test_the_comparison_notices_a_wrong_model(
    name: str, mutate: Callable[[LLM], None], subject: Callable[[str], Subject]
) -> None:
    of = subject(name)
    llm, recorder = serve(of.path, mutate)
    texts = [prompt(17)]
    whole = complete(llm, texts)
    with pytest.raises(AssertionError, match="are off by"):
        check(of.model, recorder, texts, whole)


def test_the_comparison_notices_cached_keys_of_another_text(subject: Callable[[str], Subject]) -> None:
    of = subject("qwen3")
    llm, recorder = serve(of.path)
    texts = [prompt(40)]
    complete(llm, texts)
    program(llm)._cache[1].key.neg_()
    recorder.seen.clear()
    whole = complete(llm, texts)
    assert llm.engine._scheduler.cache.num_hit > 0
    with pytest.raises(AssertionError, match="are off by"):
        check(of.model, recorder, texts, whole)
