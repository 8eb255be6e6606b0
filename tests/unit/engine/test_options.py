"""What the engine was asked to be, and cannot: refused with the value, and the nearest that is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints import Case, cache_bytes, run
from outrider import LLM, CapacityError, OptionError
from outrider.config import resolve
from outrider.options import EngineOptions

MAX_LEN = 64
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}


@pytest.fixture
def path(tiny: Callable[..., Path]) -> Path:
    return tiny("qwen3")


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"max_model_length": 5}, "unknown option: max_model_length .*did you mean max_model_len"),
    "backend": (
        {"distributed_executor_backend": "ray"},
        "unknown distributed_executor_backend: ray .*known: mp, uni",
    ),
    "runner": ({"runner": "eagre"}, "unknown runner: eagre .*did you mean eager"),
    "dtype": ({"dtype": "float23"}, "unknown dtype: float23 .*did you mean float32"),
    "device": ({"device": "warp"}, "unknown device: warp"),
    "no-such-gpu": ({"device": "cuda:77"}, "no such device: cuda:77"),
    "load-format": ({"load_format": "gguf"}, "unknown load_format: gguf"),
    "verifier": ({"verifier": "exakt"}, "unknown verifier: exakt .*did you mean exact"),
    "rates-of-another": ({"synthetic_rates": [0.5]}, "synthetic_rates"),
    "no-rates": ({"verifier": "synthetic"}, "needs synthetic_rates"),
    "zero-length": ({"max_model_len": 0}, "max_model_len must be.*: 0"),
    "length-of-text": ({"max_model_len": "64"}, "max_model_len must be.*'64'"),
    "past-the-positions": ({"max_model_len": 257}, "max_model_len 257.*at most 256"),
    "no-sequences": ({"max_num_seqs": 0}, "max_num_seqs must be.*: 0"),
    "no-memory": ({"kv_cache_memory": -1}, "kv_cache_memory must be.*: -1"),
    "utilization": ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization.*1.5"),
    "ranks": ({"tensor_parallel_size": 0}, "tensor_parallel_size.*0"),
    "narrow-steps": ({"max_num_batched_tokens": 3, "max_num_seqs": 4}, "max_num_batched_tokens 3"),
    "no-prompts": ({"max_prefill_tokens_beside_decodes": 0}, "max_prefill_tokens_beside_decodes must be.*1 or more: 0"),
    "prompts-of-text": ({"max_prefill_tokens_beside_decodes": "9"}, "max_prefill_tokens_beside_decodes must be.*'9'"),
    "steps-of-drafts": (
        {"max_num_batched_tokens": 3, "max_num_seqs": 1, "speculative_config": NGRAM},
        "tokens 3 .* 3 d",
    ),
    "no-method": ({"speculative_config": {"num_speculative_tokens": 3}}, "needs a method: None"),
    "method": ({"speculative_config": {"method": "ngrm"}}, "unknown drafting method: ngrm .*did you mean ngram"),
    "no-module": ({"speculative_config": {"method": "nowhere:Class"}}, "cannot import drafter nowhere:Class"),
    "no-class": ({"speculative_config": {"method": "checkpoints:Nobody"}}, "cannot import drafter.*Nobody"),
    "no-drafter": ({"speculative_config": {"method": "checkpoints:Case"}}, "must be a subclass of outrider.Drafter"),
    "key": ({"speculative_config": {**NGRAM, "lookup_max": 3}}, "ngram has no option lookup_max .*prompt_lookup_max"),
    "many-drafts": ({"speculative_config": {**NGRAM, "num_speculative_tokens": 33}}, "from 1 to 32: 33"),
    "no-drafts": ({"speculative_config": {**NGRAM, "num_speculative_tokens": 0}}, "from 1 to 32: 0"),
    "drafts-of-none": ({"speculative_config": {"method": "none", "num_speculative_tokens": 2}}, "drafts nothing.*2"),
    "drafts-of-text": ({"speculative_config": {**NGRAM, "num_speculative_tokens": "4"}}, "num_speculative_tokens.*'4'"),
    "broken-drafts": ({"speculative_config": {**NGRAM, "num_speculative_tokens": 2.5}}, "num_speculative_tokens.*2.5"),
    "lookup": ({"speculative_config": {**NGRAM, "prompt_lookup_min": 4, "prompt_lookup_max": 3}}, "3 is less than 4"),
    "lookup-of-text": ({"speculative_config": {**NGRAM, "prompt_lookup_min": "2"}}, "prompt_lookup_min.*'2'"),
    "config-of-text": (
        {"speculative_config": "ngram"},
        r"""^speculative_config must be a record of names and values or None, as {"method": ".*ngram.*"}: 'ngram'$""",
    ),
    "sizes-of-text": ({"capture_sizes": "8"}, "^capture_sizes must be a list of whole numbers or None: '8'$"),
    "too-many-sequences": ({"max_num_seqs": 10**30}, "max_num_seqs is too large: 1000.*; give less"),
    "too-large-a-seed": ({"seed": 10**5000}, "seed is too large: int, too large to be written"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options(path: Path, name: str) -> None:
    given, message = BAD_OPTIONS[name]
    with pytest.raises(OptionError, match=message):
        LLM(str(path), **given)


def test_prompt_tokens_beside_decodes(path: Path, fake_gpu: Callable[..., None]) -> None:
    """On a CPU the whole step, on a GPU 2048 of its 8192; what is said is done, up to the step's own limit."""

    def bound(**options: Any) -> int:
        return resolve(EngineOptions(model=str(path), **options)).scheduler.max_prefill_tokens_beside_decodes

    assert bound() == 2048 and bound(max_num_batched_tokens=4096) == 4096
    assert bound(max_prefill_tokens_beside_decodes=5) == 5
    assert bound(max_prefill_tokens_beside_decodes=9999) == 2048
    fake_gpu()
    on_gpu: dict[str, Any] = {"device": "cuda", "kv_cache_memory": 1 << 24}
    assert bound(**on_gpu) == 2048 and bound(**on_gpu, max_prefill_tokens_beside_decodes=4096) == 4096
    assert bound(**on_gpu, max_num_batched_tokens=512) == 512


def test_no_memory_for_one_sequence(path: Path) -> None:
    with pytest.raises(CapacityError, match=r"max_model_len 64 needs 0\.0 MiB|lower max_model_len"):
        LLM(str(path), max_model_len=MAX_LEN, kv_cache_memory=cache_bytes(3))
    with LLM(str(path), max_model_len=MAX_LEN, kv_cache_memory=cache_bytes(4)) as llm:
        assert len(run(llm, [Case.of(60, 1, max_tokens=None)])[0][0][0]) == 4
