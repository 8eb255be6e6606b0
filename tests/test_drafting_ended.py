"""Where drafts end before the text does, or never begin, the request's acceptance and the log say why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints import Case, plugin, prompt, run
from emulated import Emulated
from heads import drafting, tiny_head
from outrider import LLM, HostDrafter, SamplingParams
from outrider import config as config_module
from outrider.core.output import AcceptanceReport, AcceptanceTally
from outrider.engine.process.messages import Delta
from outrider.runner.eager import EagerRunner


@pytest.mark.parametrize("runner", [EagerRunner, Emulated], ids=["eager", "graph"])
@pytest.mark.parametrize("method", ["peagle", "eagle3"])
def test_a_head_whose_positions_end_says_so_once(
    tiny: Callable[..., Path],
    tmp_path: Path,
    runner: type[Any],
    method: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By a sequence that grows past them, and by a prompt that is longer; the text of all stays the same."""
    monkeypatch.setattr(config_module, "RUNNERS", (runner,))
    head = Path(shutil.copytree(tiny_head(method == "peagle"), tmp_path / "head"))
    said = json.loads((head / "config.json").read_text())
    said["transformer_layer_config"]["max_position_embeddings"] = 40
    (head / "config.json").write_text(json.dumps(said))
    cases = [Case.of(5, 1, max_tokens=20), Case.of(30, 2, max_tokens=30), Case.of(41, 3), Case.of(40, 4, max_tokens=9)]
    with LLM(str(tiny("qwen3")), device="cpu") as llm:
        expected = run(llm, cases)
    own = {"model": str(head), "num_speculative_tokens": 3}
    with LLM(str(tiny("qwen3")), device="cpu", speculative_config=own) as llm, caplog.at_level("WARNING"):
        outputs = llm.generate(
            [{"prompt_token_ids": list(case.prompt)} for case in cases], [case.sampling for case in cases]
        )
    assert [output.outputs[0].token_ids for output in outputs] == [one[0][0] for one in expected]
    short, grown, long, just = (output.acceptance for output in outputs)
    assert short.drafts > 0 and short.drafting_ended is None and "drafting_ended" not in short.to_dict()
    assert grown.drafts > 0 and f"drafter {method} has 40 positions" in str(grown.drafting_ended)
    assert (
        long.drafts == 0 and long.drafting_ended == f"the prompt has 41 tokens, and drafter {method} has 40 positions"
    )
    assert just.drafts == 1, "the token after the prompt gets the last draft"
    assert sum("goes on without drafts" in line for line in caplog.messages) == 1


def test_a_request_that_asks_for_no_drafts_says_so(tiny: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    with LLM(str(tiny("qwen3")), device="cpu", speculative_config=drafting("ngram", 3)) as llm:
        none, some = (
            llm.engine.add(name, prompt(20, 1), SamplingParams(max_tokens=4), max_drafts)
            for name, max_drafts in (("none", 0), ("some", 1))
        )
        while llm.engine.has_work:
            llm.engine.step()
    assert none.acceptance.report().drafting_ended == "the request asks for no drafts"
    assert some.acceptance.report().drafting_ended is None
    assert not [line for line in caplog.messages if "without drafts" in line]
    with LLM(str(tiny("qwen3")), device="cpu") as llm:
        assert llm.engine.add("a", [1], SamplingParams(max_tokens=1), 0).acceptance.report().drafting_ended is None


def test_the_reason_crosses_processes_and_adds_up() -> None:
    delta = Delta("a", (1,), 0, None, None, 0, 3, (1, 0), "why")
    assert delta.tally().report() == AcceptanceReport(1, 3, 0, (0,), "why")
    assert (AcceptanceReport() + delta.tally().report()).drafting_ended == "why"
    assert delta.tally().report().to_dict()["drafting_ended"] == "why"
    assert AcceptanceTally.of(3, (1, 0)).report().drafting_ended is None


class Failing(HostDrafter):
    """A user's drafter with a fault of its own."""

    name = "failing"

    def guess(self, tokens: list[int]) -> list[int]:
        raise ValueError("a fault of its own")


@pytest.mark.failing_drafter
def test_a_drafter_that_was_stopped_is_the_reason(tiny: Callable[..., Path]) -> None:
    with LLM(str(tiny("qwen3")), device="cpu", speculative_config=plugin(Failing)) as llm:
        plain = SamplingParams(max_tokens=12, ignore_eos=True, detokenize=False)
        during, after = (llm.generate([prompt(9, 1)], plain)[0] for _ in range(2))
    for output in (during, after):
        assert output.acceptance.drafting_ended == "drafter failing has stopped after 3 failures: see the log"
