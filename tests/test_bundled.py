"""The bundled model is what its records say, and a drafter that goes wrong on it is caught."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from outrider import LLM, AcceptanceReport, SamplingParams
from outrider.acceptance.bands import departures
from outrider.acceptance.diagnosis import suspect
from outrider.acceptance.records import RECORDS, Expectation, read_records
from outrider.bench.acceptance import measure
from outrider.bench.prompts import HELD_OUT, PromptSet, read_prompts
from outrider.draft.base import DraftContext
from outrider.draft.ngram import Ngram
from outrider.load.checkpoint import fingerprint
from outrider.load.hub import BUNDLED, BUNDLED_HEADS
from outrider.tensors import Draft

RECORDED = next(
    record for record in read_records(BUNDLED / "acceptance" / "ngram.json") if record.setting.temperature == 0.0
)
ROOT = Path(__file__).parent.parent


class Collapsing(Ngram):
    """Right at the first position, wrong after it: what a parallel head run one token at a time looks like."""

    name = "collapsing"

    def propose(self, context: DraftContext) -> Draft:
        draft = super().propose(context)
        draft.tokens[:, 1:] = 5  # a reserved token that no text holds
        return draft


class Shifted(Ngram):
    """Guesses for the position after the one that is verified."""

    name = "shifted"

    def propose(self, context: DraftContext) -> Draft:
        draft = super().propose(context)
        draft.tokens[:, :-1] = draft.tokens[:, 1:].clone()
        return draft


def acceptance(method: str, num_prompts: int | None = None) -> AcceptanceReport:
    prompts = read_prompts(HELD_OUT)
    assert prompts.hash == RECORDED.setting.prompts, "the prompts changed: record acceptance anew"
    prompts = prompts.first(num_prompts)
    drafting = {"method": method, "num_speculative_tokens": RECORDED.setting.draft_options["num_speculative_tokens"]}
    with LLM(device="cpu", speculative_config=drafting) as llm:
        sampling = SamplingParams(temperature=RECORDED.setting.temperature, max_tokens=RECORDED.setting.max_tokens)
        return measure(llm, prompts, sampling)


FIRST = Path(__file__).parent / "recorded" / "first_64_prompts.json"
"""Acceptance of the n-gram drafter and of both heads on the first 64 held-out prompts, K=4, greedy.

Recorded anew by `outrider accept --draft METHOD -k 4 --num-prompts 64 --record` with this file.
"""


@pytest.mark.parametrize("method", ["ngram", "peagle", "eagle3"])
def test_acceptance_on_the_first_prompts_is_as_recorded(method: str) -> None:
    expected = next(record for record in read_records(FIRST) if record.setting.method == method)
    prompts = read_prompts(HELD_OUT).first(64)
    assert prompts.hash == expected.setting.prompts, "the prompts changed: record acceptance anew"
    with LLM(device="cpu", speculative_config={"method": method, **expected.setting.draft_options}) as llm:
        report = measure(llm, prompts, SamplingParams(temperature=0.0, max_tokens=expected.setting.max_tokens))
    assert departures(expected, report) == []


@pytest.mark.slow
def test_ngram_acceptance_is_as_recorded() -> None:
    assert departures(RECORDED, acceptance("ngram")) == []


@pytest.mark.parametrize("method", ["peagle", "eagle3"])
def test_records_are_of_the_bundled_weights(method: str) -> None:
    head = BUNDLED_HEADS / method
    for records in (read_records(head / RECORDS), [r for r in read_records(FIRST) if r.setting.method == method]):
        assert {record.setting.head for record in records} == {fingerprint(head)}, "another head: record anew"
        assert {record.setting.model for record in records} == {fingerprint(BUNDLED / "model")}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["peagle", "eagle3"])
def test_head_acceptance_is_as_recorded(method: str) -> None:
    """Of each head at the K of its record, greedy; the other temperatures on record are read and no more."""
    records = read_records(BUNDLED_HEADS / method / RECORDS)
    expected = next(record for record in records if record.setting.temperature == 0.0)
    prompts, setting = read_prompts(HELD_OUT), expected.setting
    assert prompts.hash == setting.prompts, "the prompts changed: record acceptance anew"
    drafting = {"method": method, **setting.draft_options}
    with LLM(device="cpu", dtype=setting.dtype, speculative_config=drafting) as llm:
        report = measure(llm, prompts, SamplingParams(temperature=0.0, max_tokens=setting.max_tokens))
    assert departures(expected, report) == []


@pytest.fixture(scope="module")
def healthy() -> Expectation:
    """What n-gram drafts reach on the first 32 prompts: the wrong drafters are held to it on the same ones."""
    return Expectation.of(RECORDED.setting, acceptance("ngram", 32))


@pytest.mark.parametrize(("wrong", "first"), [("Collapsing", 2), ("Shifted", 1)])
def test_a_drafter_gone_wrong_departs(wrong: str, first: int, healthy: Expectation) -> None:
    report = acceptance(f"{__name__}:{wrong}", 32)
    found = departures(healthy, report)
    assert min(departure.position for departure in found if departure.measured < departure.expected) == first
    assert ("every position fell" in suspect(found, healthy, report)) == (first == 1)


@pytest.mark.slow
@pytest.mark.parametrize(("wrong", "first"), [("Collapsing", 2), ("Shifted", 1)])
def test_a_drafter_gone_wrong_departs_from_the_record(wrong: str, first: int) -> None:
    """The same on every prompt, against the record that `outrider accept` reads."""
    report = acceptance(f"{__name__}:{wrong}")
    found = departures(RECORDED, report)
    assert min(departure.position for departure in found if departure.measured < departure.expected) == first


def test_it_writes_python() -> None:
    """Of functions continued from their signature, most parse as far as they are complete."""
    prompts = ["def read_json(path):\n", "def main(argv=None):\n", "def is_empty(items):\n", "def to_list(value):\n"]
    with LLM(device="cpu") as llm:
        outputs = llm.generate(
            prompts, SamplingParams(temperature=0.0, max_tokens=200, stop=["\ndef ", "\nclass ", "\n@"])
        )
    parsed = sum(parses(prompt + output.outputs[0].text) for prompt, output in zip(prompts, outputs, strict=True))
    assert parsed >= 3


def parses(text: str) -> bool:
    lines = text.splitlines()
    for end in range(len(lines), 1, -1):  # the last lines may be cut short
        try:
            ast.parse("\n".join(lines[:end]))
        except SyntaxError:
            continue
        return end >= 0.5 * len(lines)
    return False


def test_transformers_loads_it_unchanged_and_agrees() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = BUNDLED / "model"
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    prompt: Sequence[int] = AutoTokenizer.from_pretrained(path).encode("class Node:\n    def __init__(self")
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=48, do_sample=False)[0, len(prompt) :].tolist()
    with LLM(device="cpu", dtype="float32") as llm:
        got = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=48))[0].outputs[0].token_ids
    assert got == expected[: len(got)]


def test_chat_edits_code() -> None:
    body = "    total = 0.0\n    for value in values:\n        total += value\n    return total / len(values)\n"
    code = f"```python\ndef average(values):\n{body}```"
    with LLM(device="cpu") as llm:
        messages = [{"role": "user", "content": f"Add a docstring to this function.\n\n{code}"}]
        answer = llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=160))[0].outputs[0].text
    assert "def average(values):" in answer and '"""' in answer and body in answer


def test_prompts_name_their_sources_and_licences() -> None:
    for line in HELD_OUT.read_text().splitlines():
        assert json.loads(line)["source"].keys() >= {"package", "version", "licence", "path"}
    assert isinstance(read_prompts(HELD_OUT), PromptSet)
