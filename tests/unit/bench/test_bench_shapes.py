"""The configs of `benchmarks/shapes`: as large as the models they stand for, and served without weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from heads import read_head, tiny_head
from outrider import LLM, SamplingParams
from outrider.core.sizes import Sizes
from outrider.draft.base import TargetFacts
from outrider.draft.eagle.checkpoint import dummy_vocabulary_map
from outrider.draft.registry import METHODS, parse_speculative_config, resolve_options
from outrider.errors import CheckpointError
from outrider.layers.parameter import Allocator
from outrider.load.checkpoint import INDEX, read_json
from outrider.models.config import ModelConfig
from outrider.models.registry import find_model

SHAPES = Path(__file__).parents[3] / "benchmarks" / "shapes"
SIZES = {"qwen3-0.6b": 0.596e9, "qwen3-1.7b": 1.721e9, "qwen3-4b": 4.022e9, "qwen3-8b": 8.191e9}
HEADS = [f"{model}-{kind}" for model in (*SIZES, "tiny") for kind in ("eagle3", "peagle")]
CPU = torch.device("cpu")


def config_of(name: str) -> ModelConfig:
    return ModelConfig.from_dict(read_json(SHAPES / name / "config.json"))


def facts_of(name: str) -> TargetFacts:
    config = config_of(name)
    sizes = Sizes(1024, 8, 2048, 16)
    return TargetFacts(config.vocab_size, config.hidden_size, config.num_layers, sizes, CPU, config.dtype)


@pytest.mark.parametrize("name", SIZES)
def test_models_have_their_public_size(name: str) -> None:
    config = config_of(name)
    model = find_model(config.architecture)(config, 64, Allocator.on(torch.device("meta"), config.dtype))
    assert model.num_parameters == pytest.approx(SIZES[name], rel=1e-3)


def read(name: str, head: str, count: int) -> float:
    """Gigabytes of a head that a round of drafts reads."""
    drafter, options = parse_speculative_config(
        {"model": str(SHAPES / f"{name}-{head}"), "num_speculative_tokens": count}
    )
    return drafter.footprint(options, facts_of(name)).weights_read / 1e9


def test_what_a_round_of_drafts_reads() -> None:
    """The figures that issue 4 counts with; a sequential head is read again in every pass, its projection once."""
    assert read("qwen3-8b", "peagle", 7) == pytest.approx(0.80, rel=0.01)
    assert read("qwen3-0.6b", "peagle", 7) == pytest.approx(0.11, rel=0.02)
    fc = 3 * 4096 * 4096 * 2 / 1e9
    once = read("qwen3-8b", "eagle3", 1)
    assert once == pytest.approx(0.80, rel=0.01)
    assert read("qwen3-8b", "eagle3", 7) == pytest.approx(fc + 7 * (once - fc))


def test_a_borrowed_head_is_read_too() -> None:
    """What a head does not hold itself, it reads all the same."""
    drafter, options = parse_speculative_config({"model": tiny_head(True), "num_speculative_tokens": 3})
    network = drafter(options, TargetFacts(260, 48, 2, Sizes(64, 2, 64, 16), CPU, torch.float32)).network
    whole = network.weights_read(1)
    network.head = None
    assert network.weights_read(1) == whole


@pytest.mark.parametrize("name", HEADS)
def test_heads_fit_their_model(name: str) -> None:
    model, kind = name.rsplit("-", 1)
    drafter, options = resolve_options(METHODS[kind], {"model": str(SHAPES / name)})
    assert drafter is METHODS[kind]
    facts = replace(facts_of(model), device=torch.device("meta"))
    drafter(options, facts)  # raises if it is not
    head, target = read_head(SHAPES / name).layer, config_of(model)
    for what in ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size"):
        assert getattr(head, what) == getattr(target, what), what


def test_a_made_up_vocabulary_names_each_token_once_and_none_outside() -> None:
    for name in ("qwen3-8b-peagle", "tiny-eagle3"):
        head = read_head(SHAPES / name)
        ids = dummy_vocabulary_map(head)
        assert ids is not None and len(ids) == head.draft_vocab_size == len(ids.unique())
        assert ids[0] == 0 and head.layer.vocab_size // 2 < ids[-1] < head.layer.vocab_size
    assert dummy_vocabulary_map(read_head(Path(tiny_head(True)))) is None, "the same vocabulary needs no map"


@pytest.mark.parametrize("kind", ["eagle3", "peagle"])
def test_random_weights_are_served_at_the_acceptance_asked_for(kind: str) -> None:
    rates = [0.75, 0.60, 0.48, 0.38, 0.30, 0.24, 0.19]
    drafting = {"model": str(SHAPES / f"tiny-{kind}"), "num_speculative_tokens": 7}
    made_up: dict[str, Any] = {"verifier": "synthetic", "synthetic_rates": rates, "speculative_config": drafting}
    sampling = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True, detokenize=False)
    with LLM(str(SHAPES / "tiny"), load_format="dummy", device="cpu", max_num_seqs=8, **made_up) as llm:
        outputs = llm.generate([{"prompt_token_ids": [index + 2] * 5} for index in range(8)], sampling)
        report = llm.engine.acceptance()
    assert all(len(output.outputs[0].token_ids) == 200 for output in outputs)
    assert report.length == pytest.approx(1 + sum(rates), rel=0.1)


def test_weights_that_are_not_there_are_missed_when_they_are_loaded(tmp_path: Path) -> None:
    shape = SHAPES / "tiny-peagle"
    with pytest.raises(CheckpointError, match=r"missing weight file: .*tiny/model\.safetensors"):
        LLM(str(SHAPES / "tiny"), device="cpu")
    for file in shape.iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / INDEX).unlink()
    with pytest.raises(CheckpointError, match="missing weight file"):
        read_head(tmp_path)


def test_a_head_of_which_a_part_is_missing_is_refused_at_once(tmp_path: Path) -> None:
    shape = SHAPES / "tiny-peagle"
    (tmp_path / "config.json").write_text((shape / "config.json").read_text())
    index = (shape / INDEX).read_text().replace('"norm.weight": "model.safetensors"', '"norm.weight": "b.safetensors"')
    (tmp_path / INDEX).write_text(index)
    assert read_head(tmp_path).parallel
    (tmp_path / "b.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"missing weight file: .*model\.safetensors"):
        read_head(tmp_path)
