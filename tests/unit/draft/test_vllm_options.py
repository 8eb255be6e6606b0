"""vLLM's spelling of `speculative_config`: taken where it means the same, else refused with what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from outrider import LLM, SamplingParams
from outrider.draft.registry import parse_speculative_config
from outrider.draft.vllm_options import INSTEAD
from outrider.errors import OptionError

NGRAM = {"method": "ngram", "num_speculative_tokens": 3}


@pytest.mark.parametrize("key", INSTEAD)
def test_keys_of_vllm(key: str) -> None:
    plain = parse_speculative_config(NGRAM)
    nothing, instead = INSTEAD[key]
    for value in nothing:
        assert parse_speculative_config({**NGRAM, key: value}) == plain
    for value in (7, "x", True, [1]):
        if value not in nothing:
            with pytest.raises(OptionError, match=f"{key} .* is not offered: ") as refused:
                parse_speculative_config({**NGRAM, key: value})
            assert instead in str(refused.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"draft_tensor_parallel_size": 2},
            "draft_tensor_parallel_size 2 is not offered: each rank runs the whole head",
        ),
        ({"draft_tensor_parallel_size": True}, "draft_tensor_parallel_size True is not offered"),
        ({"speculative_disable_by_batch_size": 4}, "speculative_disable_by_batch_size is called disable_by_batch_size"),
        ({"speculative_max_model_len": 4}, "speculative_max_model_len is called max_model_len here"),
        ({"max_model_len": 0}, "max_model_len must be a whole number of 1 or more: 0"),
        ({"max_model_len": "4"}, "max_model_len must be"),
        ({"lookup_max": 4}, r"no option lookup_max \(did you mean prompt_lookup_max\? known: max_model_len, num_spec"),
        ({"zzz": 4}, r"no option zzz \(known: max_model_len, num_speculative_tokens, prompt_lookup_max"),
        ({5: 4}, "a key must be text: 5"),
    ],
)
def test_what_is_refused(given: dict[Any, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        parse_speculative_config({**NGRAM, **given})


def test_drafting_ends_at_the_drafts_max_model_len(tiny: Callable[..., Path]) -> None:
    """The text stays the same; the drafts end where the option says."""
    prompt = [5, 6, 7, 8] * 4
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)

    def run(**more: Any) -> Any:
        config = {**NGRAM, "prompt_lookup_min": 1, **more}
        with LLM(str(tiny("qwen3")), speculative_config=config, max_model_len=96) as llm:
            (output,) = llm.generate({"prompt_token_ids": prompt}, params)
        return output

    free, same, none = run(), run(max_model_len=500), run(max_model_len=len(prompt))
    assert free.outputs[0].token_ids == none.outputs[0].token_ids
    assert free.acceptance == same.acceptance and free.acceptance.drafted > 0 == none.acceptance.drafted
    some = run(max_model_len=len(prompt) + 12)
    assert 0 < some.acceptance.drafted < free.acceptance.drafted
    assert some.outputs[0].token_ids == free.outputs[0].token_ids
    assert free.acceptance.drafting_ended is None
    assert none.acceptance.drafting_ended == "the prompt has 16 tokens, and speculative_config sets max_model_len 16"
    assert str(some.acceptance.drafting_ended).endswith("tokens, and speculative_config sets max_model_len 28")
