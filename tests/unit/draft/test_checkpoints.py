"""Which method a draft checkpoint is of: every method is asked, nobody guesses, and it is read once a start."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file

from heads import tiny_head, write_head
from outrider import LLM, CheckpointError, DraftOptions, HostDrafter, OptionError, SamplingParams
from outrider.cli import main as cli
from outrider.core.option import option
from outrider.draft.base import ANY_MODEL, BUNDLED_MODEL, Drafter, Match, Mismatch
from outrider.draft.eagle import base, checkpoint
from outrider.draft.registry import METHODS, default_method, parse_speculative_config
from outrider.load.checkpoint import Checkpoint
from outrider.load.hub import BUNDLED_HEADS


@dataclass(frozen=True, slots=True)
class OwnOptions(DraftOptions):
    """With weights under the name that heads use too."""

    model: str | None = option(None, "a directory of my own")


class Own(HostDrafter):
    """Does not say which checkpoints are its own."""

    Options: ClassVar[type[DraftOptions]] = OwnOptions

    def guess(self, slot: int, tokens: list[int]) -> list[int]:
        return tokens[-1:]


class Known(Own):
    """Says it."""

    name: ClassVar[str] = "known"
    wants: ClassVar[str | None] = "known.weight"

    @classmethod
    def recognises(cls, checkpoint: Checkpoint) -> Match | Mismatch | None:
        info = checkpoint.tensors.get("known.weight")
        if info is None:
            return None
        if info.shape != (2, 3):
            return Mismatch(f"known.weight of {checkpoint.directory} has shape {info.shape}, not (2, 3)")
        return Match("known head", {"num_speculative_tokens": 6}, info)


def write(path: Path, shape: tuple[int, ...] | None = None, config: dict[str, Any] | None = None) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config or {}))
    save_file(
        {"other.weight" if shape is None else "known.weight": torch.zeros(shape or (1,))}, path / "model.safetensors"
    )
    return str(path)


def parse(method: type[Drafter], **given: Any) -> tuple[type[Drafter], DraftOptions]:
    return parse_speculative_config({"method": f"{method.__module__}:{method.__name__}", **given})


def test_a_class_that_recognises_nothing_gets_its_model_as_given() -> None:
    for model in ("no/such/place", tiny_head(True), "anything at all"):
        drafter, options = parse(Own, model=model)
        assert drafter is Own and options == OwnOptions(model=model) and options.checkpoint is None


def test_a_class_of_one_s_own_recognises_its_checkpoint(tmp_path: Path) -> None:
    directory = write(tmp_path / "known", (2, 3))
    drafter, options = parse(Known, model=directory)
    assert drafter is Known and options.num_speculative_tokens == 6
    assert options.checkpoint is not None and options.checkpoint.directory == Path(directory)
    assert options.description == options.checkpoint.tensors["known.weight"]
    assert parse(Known, model=directory, num_speculative_tokens=2)[1].num_speculative_tokens == 2
    with pytest.raises(CheckpointError, match=r"known.weight of .* has shape \(5,\), not"):
        parse(Known, model=write(tmp_path / "broken", (5,)))
    with pytest.raises(OptionError, match=r"method known is not what .* was made for: it is a speculators peagle head"):
        parse(Known, model=tiny_head(True))


def test_a_checkpoint_of_no_method_says_what_was_found_and_wanted(tmp_path: Path) -> None:
    directory = write(tmp_path / "other", config={"architectures": ["MedusaModel"], "model_type": "medusa"})
    with pytest.raises(CheckpointError) as refused:
        parse_speculative_config({"model": directory})
    message = str(refused.value)
    for part in (directory, "MedusaModel", "model_type medusa", "other.weight", "peagle wants ", "eagle3 wants "):
        assert part in message
    with pytest.raises(CheckpointError, match=r"known wants known\.weight"):
        parse(Known, model=directory)


def test_a_checkpoint_of_two_methods_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Twin(Known):
        name: ClassVar[str] = "twin"

    directory = write(tmp_path / "known", (2, 3))
    monkeypatch.setitem(METHODS, "known", Known)
    assert parse_speculative_config({"model": directory})[0] is Known
    monkeypatch.setitem(METHODS, "twin", Twin)
    with pytest.raises(OptionError, match="several methods, known and twin: name the method"):
        parse_speculative_config({"model": directory})
    assert parse_speculative_config({"model": directory, "method": "twin"})[0] is Twin


def test_users_do_not_set_what_is_derived() -> None:
    for name in ("checkpoint", "description"):
        with pytest.raises(OptionError, match=f"has no option {name}"):
            parse_speculative_config({"model": tiny_head(True), name: None})


def test_each_default_is_of_one_method() -> None:
    assert METHODS[default_method(BUNDLED_MODEL)].wants is not None
    assert METHODS[default_method(ANY_MODEL)].wants is None


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The directories of heads whose description was parsed, and of checkpoints opened or looked through."""
    found: list[Path] = []
    read, opened = checkpoint.read_head, Checkpoint.open

    def counted(head: Checkpoint) -> checkpoint.HeadConfig:
        found.append(head.directory)
        return read(head)

    def count_opened(directory: Path) -> Checkpoint:
        if directory.parent == BUNDLED_HEADS:
            found.append(directory / "config.json")
        return opened(directory)

    for module in (checkpoint, base):
        monkeypatch.setattr(module, "read_head", counted)
    monkeypatch.setattr(Checkpoint, "open", staticmethod(count_opened))
    yield found


def test_a_head_is_read_once_a_start(reads: list[Path]) -> None:
    with LLM(speculative_config={"method": "peagle"}, max_model_len=64, max_num_seqs=2) as llm:
        llm.generate("a", SamplingParams(max_tokens=2))
    assert reads == [BUNDLED_HEADS / "peagle" / "config.json", BUNDLED_HEADS / "peagle"]


@pytest.mark.parametrize(
    "command",
    [["generate", "--prompt", "a", "--max-tokens", "2"], ["explain", "--draft", "peagle"]],
    ids=lambda each: each[0],
)
def test_a_head_is_read_once_by_the_command_line(
    command: list[str], reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["outrider", *command, "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    assert reads == [BUNDLED_HEADS / "peagle" / "config.json", BUNDLED_HEADS / "peagle"]


# Checkpoint.


def test_a_checkpoint_knows_its_tensors_without_reading_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Callable[..., Path]
) -> None:
    formats = [write_head(tmp_path / layout, True, layout=layout) for layout in ("speculators", "flat-pickled")]
    seen = []
    for path in (*formats, tiny("qwen3")):
        held = Checkpoint.open(path)
        seen.append({name: info.shape for name, info in held.tensors.items()})
        for name, info in held.tensors.items():
            tensor = held.read(name)
            assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype)
        with pytest.raises(CheckpointError, match=r"lacks nothing\.weight"):
            held.read("nothing.weight")
    assert seen[0]["mask_hidden"] == seen[1]["mask_hidden"] == (1, 1, 144)
    (tmp_path / "speculators" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing weight file"):
        _ = Checkpoint.open(tmp_path / "speculators").tensors
