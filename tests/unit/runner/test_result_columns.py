"""Columns that a processor or a verifier declares arrive with each token, by one parser, from both runners."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from emulated import Emulated
from heads import drafting
from outrider import LLM, SamplingParams
from outrider import config as config_module
from outrider.core.plan import StepResult
from outrider.kernels.step_inputs import locate
from outrider.runner.eager import EagerRunner
from outrider.runner.results import ResultLayout
from outrider.runner.step import StepOutput
from outrider.schedule.scheduler import Scheduler
from outrider.tensors import Column, Draft, StepBatch, Verdict
from outrider.verify.processors.min_tokens import MinTokens
from outrider.verify.registry import PROCESSORS

CPU = torch.device("cpu")
SCORE, LIKELIEST = Column("score", 1, torch.float32), Column("likeliest", 2, torch.int64)


class Scores(MinTokens):
    """Reports, of every token, the logit it was chosen by and the two likeliest tokens."""

    name: ClassVar[str] = "scores"
    columns: ClassVar[tuple[Column, ...]] = (SCORE, LIKELIEST)

    def wanted(self, sampling: SamplingParams) -> bool:
        return True

    def report(self, logits: Tensor, batch: StepBatch, verdict: Verdict) -> Mapping[str, Tensor]:
        rows, width = verdict.tokens.shape
        row, place = locate(batch.logits_start, len(logits))
        score = logits.new_zeros(rows, width)
        best = verdict.tokens.new_zeros(rows, width, 2)
        own = verdict.tokens[row, place.clamp(max=width - 1)].clamp(min=0)
        score[row, place.clamp(max=width - 1)] = logits.gather(1, own[:, None])[:, 0]
        best[row, place.clamp(max=width - 1)] = logits.topk(2, dim=1).indices
        return {"score": score[:, :, None], "likeliest": best}


def test_packed_columns_are_read_as_unpacked_ones() -> None:
    layout = ResultLayout(2, (SCORE, LIKELIEST), CPU)
    tokens = torch.tensor([[5, 6, -1], [7, -1, -1], [-1, -1, -1]])
    invalid = torch.tensor([False, True, False])
    verdict = Verdict(tokens, torch.tensor([2, 1, 0], dtype=torch.int32), invalid)
    draft = Draft(torch.zeros(3, 2, dtype=torch.int64), torch.tensor([2, 1, 0], dtype=torch.int32), None)
    values = {"score": torch.randn(3, 3, 1), "likeliest": torch.arange(18).view(3, 3, 2) - 2**40}
    output = StepOutput(verdict, draft, values)
    table = layout.table(3, CPU)
    layout.pack(output, table)
    found = layout.read(4, layout.unpack(table))
    assert found == layout.read(4, layout.columns(output))
    assert found.tokens == ((5, 6), (7,), ()) and found.num_drafted == (2, 1, 0)
    assert found.invalid == (1,)
    score = values["score"][:, :, 0].tolist()
    assert found.values["score"] == (((score[0][0],), (score[0][1],)), ((score[1][0],),), ())
    assert found.values["likeliest"][1] == (tuple(values["likeliest"][1, 0].tolist()),)


def test_two_parts_cannot_report_columns_of_one_name() -> None:
    with pytest.raises(AssertionError, match="column named score"):
        ResultLayout(2, (SCORE, SCORE), CPU)
    with pytest.raises(AssertionError, match="column named count"):
        ResultLayout(2, (SCORE._replace(name="count"),), CPU)


@pytest.mark.parametrize("runner", [EagerRunner, Emulated], ids=["eager", "graph"])
def test_every_token_comes_with_the_values_that_a_processor_reports(
    runner: type[Any], tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    results: list[StepResult] = []
    apply = Scheduler.apply

    def look(self: Any, plan: Any, result: StepResult) -> Any:
        results.append(result)
        return apply(self, plan, result)

    monkeypatch.setattr(Scheduler, "apply", look)
    monkeypatch.setattr(config_module, "RUNNERS", (runner,))
    monkeypatch.setattr(config_module, "build_processors", lambda own: (Scores(), *PROCESSORS))
    scores = []
    for options in ({}, {"speculative_config": drafting("peagle", 3)}):
        results.clear()
        with LLM(str(tiny("qwen3")), device="cpu", max_model_len=64, max_num_seqs=2, **options) as llm:
            sampling = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
            out = llm.generate([[1, 2, 3]], sampling)[0].outputs[0].token_ids
        tokens = [token for result in results for row in result.tokens for token in row]
        assert tokens[: len(out)] == list(out)
        for name in ("score", "likeliest"):
            assert [len(row) for r in results for row in r.values[name]] == [
                len(row) for r in results for row in r.tokens
            ]
        likeliest = [pair for result in results for row in result.values["likeliest"] for pair in row]
        assert [int(pair[0]) for pair in likeliest] == tokens and all(len(pair) == 2 for pair in likeliest)
        scores.append([one[0] for result in results for row in result.values["score"] for one in row][:9])
    assert scores[0] == pytest.approx(scores[1], abs=1e-4) and len(set(scores[0])) > 1
