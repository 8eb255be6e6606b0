"""Logits processors that leave no token to draw, and the check that only their requests end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from checkpoints import prompt
from outrider import LLM, LogitsProcessor, SamplingParams
from outrider.core.plan import Admission
from outrider.processing import SamplingField, Slots, State, StepBatch, Table

SPOILERS = {"nan": math.nan, "-nan": -math.nan, "inf": math.inf, "masked": -math.inf}
FEW = (200, 7, 31)
NUM_GOOD = 11
"""Tokens of a spoilt request before the first that cannot be drawn."""


class Spoil(LogitsProcessor):
    """Spoils the logits of one position of a request's output: of every token, or of all its tokens but the first."""

    name: ClassVar[str] = "spoil"
    fields: ClassVar[tuple[SamplingField, ...]] = (
        SamplingField("spoil_at", int, 0, "the output token, from 1"),
        SamplingField("spoiler", int, 0, "which of SPOILERS"),
    )
    tables: ClassVar[tuple[Table, ...]] = (
        Table("at", torch.int64, fill=-1),
        Table("spoiler", torch.float32),
        Table("first", torch.int64),
    )

    def admit(self, admission: Admission) -> dict[str, float]:
        at, which = (field.read(admission.sampling) for field in self.fields)
        value = list(SPOILERS.values())[which]
        return {"at": admission.num_prompt + at - 1, "spoiler": value, "first": 0 if value == -math.inf else 200}

    def __call__(self, logits: Tensor, batch: StepBatch, slots: Slots, state: State) -> Tensor:
        spoilt = state["at"][batch.logits_slot] == batch.logits_position
        column = torch.arange(logits.shape[1], device=logits.device)
        chosen = spoilt[:, None] & (column >= state["first"][batch.logits_slot][:, None])
        return torch.where(chosen, state["spoiler"][batch.logits_slot][:, None], logits)


class Few(Spoil):
    """Leaves the requests that ask for it no tokens but `FEW`."""

    def __call__(self, logits: Tensor, batch: StepBatch, slots: Slots, state: State) -> Tensor:
        masked = torch.full_like(logits, -math.inf)
        masked[:, FEW] = logits[:, FEW]
        return torch.where((state["at"][batch.logits_slot] >= 0)[:, None], masked, logits)


PLAIN: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True, "detokenize": False}
GOOD = [
    SamplingParams(temperature=0.0, **PLAIN),
    SamplingParams(temperature=0.9, seed=3, **PLAIN),
    SamplingParams(temperature=0.9, seed=4, top_k=9, top_p=0.8, min_p=0.02, **PLAIN),
]
PROMPTS = [prompt(5 + index, index) for index in range(2 * len(GOOD))]


def spoilt(good: SamplingParams, spoiler: str) -> SamplingParams:
    extra = {"spoil_at": NUM_GOOD + 1, "spoiler": list(SPOILERS).index(spoiler)}
    kept = {"temperature": good.temperature, "top_k": good.top_k, "top_p": good.top_p, "min_p": good.min_p}
    return SamplingParams(**PLAIN, **kept, seed=good.seed, extra_args=extra)


def completions(llm: LLM, sampling: list[SamplingParams]) -> list[Any]:
    return [output.outputs[0] for output in llm.generate(PROMPTS[: len(sampling)], sampling)]


def check_spoilt_beside_good(path: Path, golden: list[list[int]], spoiler: str, **options: Any) -> None:
    exact = options.get("verifier") != "rejection"
    own = {"device": "cpu", "logits_processors": ["spoilers:Spoil"], **options}
    with LLM(str(path), **own) as llm:
        for _ in range(2):  # the second time beside what the first left in the cache
            found = completions(llm, [*GOOD, *(spoilt(good, spoiler) for good in GOOD)])
            for place, (one, expected) in enumerate(zip(found, golden, strict=True)):
                num_good = len(expected) if place < len(GOOD) else NUM_GOOD
                assert len(one.token_ids) == num_good
                if exact or GOOD[place % len(GOOD)].greedy:
                    assert one.token_ids == expected[:num_good]
                assert one.finish_reason == ("length" if place < len(GOOD) else "error")
            assert all(f"output token {NUM_GOOD + 1} " in one.error for one in found[len(GOOD) :])
        llm.engine._scheduler.check_idle()
