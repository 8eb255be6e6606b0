"""Drafters of a user's own, each one file that imports what is public: the text stays the target's.

`examples/medusa_drafter.py` has weights of its own and runs on both runners; `eagle1_drafter` and `mtp_drafter` stand
for formats that the engine does not know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import SIZES, Case, Result, program, run
from eagle1_drafter import Eagle1
from emulated import Emulated
from mtp_drafter import Mtp
from outrider import LLM, CheckpointError, OptionError
from outrider import config as config_module
from outrider.config import resolve
from outrider.draft.registry import METHODS
from outrider.drafting import Draft, DraftContext, Drafter, DraftOptions, Feature, Footprint, TargetFacts
from outrider.options import EngineOptions
from outrider.runner.eager import EagerRunner

EXAMPLES = Path(__file__).parent.parent / "examples"
MEDUSA = "medusa_drafter:Medusa"
HIDDEN, K = SIZES["hidden_size"], 3
CASES = [
    *(Case.of(length, salt, temperature=0.0, max_tokens=24) for salt, length in enumerate((1, 9, 40))),
    *(Case.of(length, salt, temperature=0.8, max_tokens=24) for salt, length in enumerate((5, 20), start=3)),
]


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


def serve(path: Path, **options: Any) -> LLM:
    return LLM(str(path), **{"max_model_len": 96, "max_num_seqs": 3, "max_num_batched_tokens": 48, **options})


class Listener(Drafter):
    """Drafts nothing, and keeps the hidden states of every token that is run."""

    name = "listener"
    needs = frozenset({Feature.HOST_CODE})
    heard: ClassVar[list[Tensor]] = []

    def __init__(self, options: DraftOptions, target: TargetFacts) -> None:
        super().__init__(options, target)
        self.heard.clear()

    def propose(self, context: DraftContext) -> Draft:
        self.heard.append(context.target.hidden.clone())
        rows = len(context.next_token)
        nothing = context.next_token.new_zeros((rows, self.num_drafts))
        return Draft(nothing, torch.zeros(rows, dtype=torch.int32), None)


def fitted(path: Path, cases: Sequence[Case], directory: Path) -> Path:
    """Medusa blocks that know some texts of the target: trained on the hidden states that wrote them."""
    hidden, following = [], []
    for case in cases:
        with serve(path, speculative_config={"method": f"{__name__}:Listener"}) as llm:
            text = [*case.prompt, *run(llm, [case])[0][0][0]]
            head = program(llm)._model.head.weight.tensor.clone()
        states = torch.cat(Listener.heard)
        assert len(states) == len(text) - 1
        for place in range(len(case.prompt) - 1, len(text) - K - 1):
            hidden.append(states[place])
            following.append(text[place + 2 : place + 2 + K])
    inputs, labels = torch.stack(hidden), torch.tensor(following)
    blocks = torch.zeros(K, HIDDEN, HIDDEN, requires_grad=True)
    optimizer = torch.optim.Adam([blocks], lr=0.05)
    for _ in range(150):
        streams = inputs[:, None] + torch.nn.functional.silu(inputs @ blocks).transpose(0, 1)
        loss = torch.nn.functional.cross_entropy((streams @ head.T).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    directory.mkdir(parents=True)
    save_file({"blocks": blocks.detach()}, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def target(
    tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, list[list[Result]]]:
    """A model, Medusa's weights for it, and what the model writes without drafts."""
    path = tiny("qwen3")
    with serve(path) as llm:
        expected = run(llm, CASES)
    greedy = [case for case in CASES if case.sampling.greedy]
    return path, fitted(path, greedy, tmp_path_factory.mktemp("medusa") / "fitted"), expected


def medusa(directory: Path) -> dict[str, Any]:
    return {"method": MEDUSA, "model": str(directory), "num_speculative_tokens": K}


@pytest.mark.parametrize("runner", [EagerRunner, Emulated], ids=lambda runner: runner.name)
def test_medusa_is_lossless_on_both_runners(runner: Any, target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, directory, expected = target
    monkeypatch.setattr(config_module, "RUNNERS", (runner,))
    with serve(path, speculative_config=medusa(directory)) as llm:
        assert isinstance(llm.engine._worker._runner, runner)
        assert run(llm, CASES) == expected
        report = llm.acceptance()
        llm.engine._scheduler.check_idle()
    assert report.drafted > 0
    assert report.accepted > 0.2 * report.drafted, "the weights are the ones that were fitted"


def test_medusa_with_other_weights_changes_speed_only(target: Any, tmp_path: Path) -> None:
    path, directory, expected = target
    blocks = load_file(directory / "model.safetensors")["blocks"]
    save_file({"blocks": blocks.flip(0).contiguous()}, tmp_path / "model.safetensors")
    accepted = []
    for weights in (directory, tmp_path):
        with serve(path, speculative_config=medusa(weights)) as llm:
            assert run(llm, CASES) == expected
            accepted.append(llm.acceptance().accepted)
    assert accepted[1] < accepted[0]


def test_medusa_s_weights_are_in_the_memory_plan(target: Any) -> None:
    path, directory, _ = target

    def planned(config: dict[str, Any] | None) -> int:
        return resolve(EngineOptions(str(path), speculative_config=config, max_model_len=64)).runner.memory.weights

    blocks = load_file(directory / "model.safetensors")["blocks"]
    assert planned(medusa(directory)) - planned(None) == blocks.nbytes


def test_medusa_is_one_short_file_of_public_names() -> None:
    assert len((EXAMPLES / "medusa_drafter.py").read_text().splitlines()) <= 45


HERE = Path(__file__).parent
FILES = (EXAMPLES / "medusa_drafter.py", HERE / "eagle1_drafter.py", HERE / "mtp_drafter.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_they_import_what_is_public(file: Path) -> None:
    names = re.findall(r"^(?:from|import) (outrider[\w.]*)", file.read_text(), re.MULTILINE)
    assert set(names) == {"outrider.drafting"}


# Another format of head.


def write_eagle1(path: Path, width: int = 2 * HIDDEN) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN}))
    generator = torch.Generator().manual_seed(5)
    tensors = {
        "fc.weight": torch.randn((HIDDEN, width), generator=generator),
        "layers.0.mlp.up_proj.weight": torch.ones(1),
    }
    torch.save(tensors, path / "pytorch_model.bin")
    return path


@pytest.mark.parametrize("given", [{}, {"num_speculative_tokens": 4}], ids=["its own K", "another K"])
def test_a_head_of_another_format_is_read_by_a_class_of_one_s_own(
    given: dict[str, Any], target: Any, tmp_path: Path
) -> None:
    path, _, expected = target
    config = {"method": "eagle1_drafter:Eagle1", "model": write_eagle1(tmp_path / "head"), **given}
    with serve(path, speculative_config=config) as llm:
        assert run(llm, CASES) == expected
        assert llm.acceptance().drafted > 0
        assert program(llm)._drafter.num_drafts == given.get("num_speculative_tokens", 2)


def test_a_method_that_is_registered_is_found_by_its_checkpoint(
    target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, head = target[0], write_eagle1(tmp_path / "head")
    with pytest.raises(CheckpointError, match="EAGLE-1 heads are not supported"):
        serve(path, speculative_config={"model": head})
    monkeypatch.setitem(METHODS, "eagle1", Eagle1)
    with serve(path, speculative_config={"model": head}) as llm:
        assert llm.engine.resolved.method == "eagle1"
    with pytest.raises(CheckpointError, match=r"fc.weight of .* has shape \(48, 50\)"):
        serve(path, speculative_config={"method": "eagle1", "model": write_eagle1(tmp_path / "broken", 50)})


# Weights in the target's own checkpoint.


def with_modules(path: Path, into: Path, count: int) -> Path:
    """The target with modules that predict further tokens."""
    into.mkdir()
    for file in path.iterdir():
        (into / file.name).write_bytes(file.read_bytes())
    generator, layers = torch.Generator().manual_seed(6), SIZES["num_hidden_layers"]
    modules = {
        f"model.layers.{layers + index}.eh_proj.weight": torch.randn((HIDDEN, 2 * HIDDEN), generator=generator)
        for index in range(count)
    }
    save_file({**load_file(path / "model.safetensors"), **modules}, into / "model.safetensors", {"format": "pt"})
    return into


def test_weights_and_caches_of_a_drafter_whose_checkpoint_is_the_target_s(target: Any, tmp_path: Path) -> None:
    path, _, expected = target
    config = {"method": "mtp_drafter:Mtp", "num_speculative_tokens": 3}
    both = with_modules(path, tmp_path / "both", 3)
    with pytest.raises(CheckpointError, match=r"weights the model does not have: model\.layers\.2\.eh_proj\.weight"):
        serve(both)
    with pytest.raises(CheckpointError, match=r"mtp needs model\.layers\.2\.eh_proj\.weight"):
        serve(path, speculative_config=config)
    alone = resolve(EngineOptions(str(path), max_model_len=96)).runner.memory
    with serve(both, speculative_config=config) as llm:
        assert run(llm, CASES) == expected
        assert llm.acceptance().drafted > 0
        caches, memory = program(llm)._drafter.caches, llm.engine.resolved.runner.memory
    assert [tuple(layer.key.shape[1:]) for layer in caches] == [(heads, 16, HIDDEN // heads) for heads in (1, 2, 3)]
    assert memory.bytes_per_block - alone.bytes_per_block == 3 * 2 * 16 * HIDDEN * 4
    assert all(len(layer.key) == memory.num_blocks for layer in caches)


def test_a_cache_that_the_footprint_leaves_out_is_refused(
    target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mtp, "footprint", lambda options, facts: Footprint(weights=1))
    config = {"method": "mtp_drafter:Mtp", "num_speculative_tokens": 1}
    with pytest.raises(OptionError, match=r"keeps 6144 bytes in each block .* its footprint says per_block=0"):
        serve(with_modules(target[0], tmp_path / "both", 1), speculative_config=config)


def test_a_cache_that_needs_do_not_name_is_refused(
    target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mtp, "needs", frozenset({Feature.HOST_CODE}))
    config = {"method": "mtp_drafter:Mtp", "num_speculative_tokens": 1}
    with pytest.raises(OptionError, match="drafter mtp asks for DRAFT_CACHE: its needs must name that feature"):
        serve(with_modules(target[0], tmp_path / "both", 1), speculative_config=config)
