"""The promises again on a CUDA device, against the CPU and against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoints
from heads import drafting, tiny_head
from outrider import LLM, DraftContext, SamplingParams
from outrider.draft.registry import METHODS
from outrider.tensors import Draft

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

PROMPTS = [[int(token) for token in torch.randint(256, (length,), generator=torch.Generator().manual_seed(length))]
           for length in (3, 17, 50, 120)]  # fmt: skip
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1}
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, detokenize=False),
    "sampled": SamplingParams(
        temperature=0.9, top_p=0.95, top_k=50, min_p=0.01, seed=5, max_tokens=40, detokenize=False
    ),
}


@pytest.fixture(autouse=True)
def full_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def tokens(path: Path, sampling: SamplingParams, **options: Any) -> list[list[int]]:
    with LLM(str(path), max_num_seqs=8, kv_cache_memory=1 << 24, **options) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, sampling)]


@pytest.mark.parametrize("family", sorted(checkpoints.FAMILIES))
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("method", METHODS)
def test_same_tokens_as_on_the_cpu(tiny: Callable[..., Path], family: str, sampling: str, method: str) -> None:
    path, params = tiny(family), SAMPLINGS[sampling]
    config = drafting(method, 4)
    on_gpu = tokens(path, params, device="cuda", speculative_config=config, max_num_batched_tokens=64)
    assert on_gpu == tokens(path, params, device="cpu")


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
def test_a_head_drafts_the_same_as_on_the_cpu(tiny: Callable[..., Path], parallel: bool) -> None:
    """The same rounds with the same verdicts, which only the same drafts give; most fall, so rates are forced."""
    config = {"model": tiny_head(parallel), "num_speculative_tokens": 4}
    drafts: dict[str, list[list[list[int]]]] = {"cpu": [], "cuda": []}
    for device, found in drafts.items():
        forced = {"verifier": "synthetic", "synthetic_rates": [0.8, 0.6, 0.5, 0.4]}
        with LLM(str(tiny("qwen3")), device=device, speculative_config=config, max_num_seqs=8, **forced) as llm:
            drafter = checkpoints.program(llm)._drafter
            propose = drafter.propose

            def look(
                context: DraftContext,
                propose: Callable[[DraftContext], Draft] = propose,
                found: list[list[list[int]]] = found,
            ) -> Draft:
                draft = propose(context)
                found.append(draft.tokens[draft.length > 0].tolist())
                return draft

            drafter.propose = look  # type: ignore[method-assign]
            llm.generate(PROMPTS, SAMPLINGS["greedy"])
    assert drafts["cpu"] == drafts["cuda"]


def test_bfloat16_and_memory_planned_from_the_device(tiny: Callable[..., Path]) -> None:
    with LLM(str(tiny("qwen3")), device="cuda", dtype="bfloat16", speculative_config=NGRAM) as llm:
        outputs = llm.generate(PROMPTS, SAMPLINGS["greedy"])
        assert all(len(output.outputs[0].token_ids) == 40 for output in outputs)
        assert llm.engine.resolved.runner.memory.num_tokens >= 256


def test_bundled_model_writes_the_same_text_with_drafts() -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=64)
    texts = []
    for config in (None, NGRAM):
        with LLM(device="cuda", dtype="float32", speculative_config=config) as llm:
            texts.append(
                [output.outputs[0].text for output in llm.generate(["def main():\n", "import os\n"], sampling)]
            )
    assert texts[0] == texts[1]
