"""Draft heads as they are published: the same weights in any layout draft the same, and what is wrong is refused.

A refusal is a named error, raised before the first token, that says what was found and what to do.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import SIZES, Case, parameters, program, run
from heads import LAYOUTS, MASK_TOKEN, TAPS, head_tensors, read_head, vocabulary_map, write_head
from outrider import LLM, CheckpointError, OptionError
from outrider.cli import main as cli
from outrider.config import resolve
from outrider.draft.eagle.base import HeadDrafter, HeadOptions
from outrider.options import EngineOptions

HIDDEN, VOCAB = SIZES["hidden_size"], SIZES["vocab_size"]
METHODS = {"eagle3": False, "peagle": True}
CASES = [Case.of(9, 1, temperature=0.0, max_tokens=6), Case.of(20, 2, temperature=0.8, max_tokens=6)]


def serve(path: Path, head: Path | str, num_drafts: int | None = 3, **options: Any) -> LLM:
    drafting = {"model": str(head), "num_speculative_tokens": num_drafts, **options.pop("drafting", {})}
    return LLM(str(path), **{"max_model_len": 64, "max_num_seqs": 4, "speculative_config": drafting, **options})


def all_logits(path: Path, head: Path, **options: Any) -> list[Tensor]:
    """Everything that a head's lm_head gives while two requests run."""
    with serve(path, head, **options) as llm:
        network, found = program(llm)._drafter.network, []
        plain = network.logits
        network.logits = lambda normed: found.append(plain(normed).clone()) or found[-1]
        run(llm, CASES)
        return found


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


# Layouts.


@pytest.mark.parametrize("reduced", [None, 100], ids=["whole", "reduced"])
@pytest.mark.parametrize("method", METHODS)
def test_the_same_weights_in_any_layout_draft_the_same(
    method: str, reduced: int | None, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    path, parallel = tiny("qwen3"), METHODS[method]
    found = {}
    for layout in LAYOUTS:
        head = write_head(tmp_path / layout, parallel, layout=layout, num_layers=3, draft_vocab_size=reduced)
        assert read_head(head).parallel == parallel
        found[layout] = all_logits(path, head)
    expected = found.pop("speculators")
    assert expected and all(same(logits, expected) for logits in found.values())
    # one weight, anywhere, that went elsewhere would show
    for name, tensor in head_tensors(parallel, num_layers=3, draft_vocab_size=reduced).items():
        if name not in ("d2t", "t2d"):
            other = write_head(
                tmp_path / "other", parallel, num_layers=3, draft_vocab_size=reduced, tensors={name: tensor * 1.5 + 0.1}
            )
            assert not same(all_logits(path, other), expected), name


def test_aws_heads_map_their_vocabulary_to_itself(tiny: Callable[..., Path], tmp_path: Path) -> None:
    identity = {"d2t": torch.zeros(VOCAB, dtype=torch.int64), "t2d": torch.ones(VOCAB, dtype=torch.bool)}
    aws = write_head(tmp_path / "aws", True, layout="flat", num_layers=4, tensors=identity)
    assert vocabulary_map(aws, read_head(aws)) is None
    plain = write_head(tmp_path / "plain", True, num_layers=4)
    assert same(all_logits(tiny("qwen3"), aws), all_logits(tiny("qwen3"), plain))
    assert read_head(aws).layout == "AWS P-EAGLE" and read_head(plain).layout == "speculators peagle"


def test_what_a_head_lacks_is_the_target_s(tiny: Callable[..., Path], tmp_path: Path) -> None:
    for tied in (False, True):
        path = tiny("llama", tie_word_embeddings=tied)
        head = write_head(tmp_path / f"{tied}", True, tensors={"embed_tokens.weight": None, "lm_head.weight": None})
        with serve(path, head) as llm:
            running = program(llm)
            network = running._drafter.network
            assert network.embedding is running._model.embedding and network.head is running._model.head
    with serve(path, write_head(tmp_path / "own", True)) as llm:
        running = program(llm)
        network = running._drafter.network
        assert network.embedding is not running._model.embedding and network.head is not running._model.head


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_is_filled_in_the_engine_s_type(method: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    head = write_head(tmp_path / "head", METHODS[method], norms=["input_norm", "fc_norm"], bias=True, qk_norm=True)
    for dtype in (torch.float32, torch.bfloat16):
        seen: list[tuple[int, int]] = []
        with serve(tiny("qwen3"), head, dtype=dtype, progress=lambda *done, seen=seen: seen.append(done)) as llm:
            weights = parameters(program(llm)._drafter.network)
        stored = load_file(head / "model.safetensors")
        assert weights.keys() == stored.keys()
        assert all(torch.equal(weight, stored[name].to(dtype)) for name, weight in weights.items())
        assert seen[-1][0] == seen[-1][1], "progress counts the head's bytes"


# What a config says, and what it means when it does not say it.


def test_taps(tiny: Callable[..., Path], tmp_path: Path) -> None:
    silent = {"eagle_aux_hidden_state_layer_ids": None, "eagle_config": None}
    for layout in LAYOUTS:
        head = read_head(write_head(tmp_path / f"silent-{layout}", True, layout=layout, config=silent))
        assert [head.aux_layers(layers) for layers in (6, 28, 36, 61)] == [
            (2, 3, 3),
            (2, 14, 25),
            (2, 18, 33),
            (2, 30, 58),
        ]
        assert read_head(write_head(tmp_path / f"said-{layout}", True, layout=layout)).aux_layers(36) == tuple(TAPS)
    listed = {"eagle_aux_hidden_state_layer_ids": [3, 1, 4], "eagle_config": None}
    path = tiny("qwen3", num_hidden_layers=4)
    with serve(path, write_head(tmp_path / "listed", False, layout="flat", config=listed)) as llm:
        assert program(llm)._aux_layer_ids == (3, 1, 4), "in the order given, the last being what the final norm reads"


def test_norm_before_residual(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def said(layout: str, value: bool | None) -> bool:
        head = write_head(tmp_path / f"{layout}-{value}", False, layout=layout, config={"norm_before_residual": value})
        caplog.clear()
        return read_head(head).norm_before_residual

    with caplog.at_level(logging.WARNING, "outrider"):
        for layout in ("speculators", "flat"):
            assert said(layout, True) is True and not caplog.records
            assert said(layout, False) is False and not caplog.records
        assert said("flat", None) is False and not caplog.records, "as EAGLE-3's own network"
        assert said("speculators", None) is False and "norm_before_residual" in caplog.text, "readers differ"


MASKS: dict[str, tuple[dict[str, Any], int]] = {
    "dflash_config": ({"dflash_config": {"mask_token_id": 1}, "mask_token_id": 2, "ptd_token_id": 5}, 1),
    "mask_token_id": ({"dspark_noise_token_id": 3, "mask_token_id": 2, "ptd_token_id": 5}, 2),
    "dspark_noise_token_id": ({"pard_token": 4, "dspark_noise_token_id": 3, "ptd_token_id": 5}, 3),
    "pard_token": ({"ptd_token_id": 5, "pard_token": 4}, 4),
    "ptd_token_id": ({"dflash_config": {"block_size": 8}, "ptd_token_id": 5}, 5),
    "zero": ({"mask_token_id": 0, "ptd_token_id": 5}, 0),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("layout", ["speculators", "flat"])
def test_the_mask_token_is_looked_up_in_this_order(layout: str, name: str, tmp_path: Path) -> None:
    said, token = MASKS[name]
    config = {"mask_token_id": None, "ptd_token_id": None, **said}
    assert read_head(write_head(tmp_path / "head", True, layout=layout, config=config)).mask_token_id == token


def test_offsets_of_a_reduced_vocabulary(tmp_path: Path) -> None:
    head = write_head(tmp_path / "head", False, draft_vocab_size=50)
    marked = head_tensors(False, draft_vocab_size=50)["t2d"]
    assert torch.equal(vocabulary_map(head, read_head(head)), marked.nonzero()[:, 0])
    unmarked = write_head(tmp_path / "unmarked", False, draft_vocab_size=50, tensors={"t2d": None})
    assert torch.equal(vocabulary_map(unmarked, read_head(unmarked)), marked.nonzero()[:, 0])


def test_rope_of_either_spelling(tmp_path: Path) -> None:
    for layout in ("speculators", "speculators-rope", "flat"):
        head = write_head(tmp_path / layout, False, layout=layout, layer={"rope_theta": 777.0})
        assert read_head(head).layer.rope.theta == 777.0


PROPOSES = {"speculators_config": {"proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 6}]}}


def test_the_number_of_drafts_is_the_checkpoint_s_where_none_is_given(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    head = write_head(tmp_path / "head", True, config=PROPOSES)
    for given, expected in ((None, 6), (2, 2)):
        for method in ({}, {"method": "peagle"}):
            with serve(tiny("qwen3"), head, given, drafting=method) as llm:
                assert program(llm)._drafter.num_drafts == expected
    with serve(tiny("qwen3"), write_head(tmp_path / "silent", True), None) as llm:
        assert program(llm)._drafter.num_drafts == HeadOptions().num_speculative_tokens


def test_the_method_is_the_checkpoint_s(tiny: Callable[..., Path], tmp_path: Path) -> None:
    heads = {parallel: write_head(tmp_path / f"{parallel}", parallel) for parallel in (False, True)}
    accepted = [
        (False, {}),
        (False, {"method": "eagle3"}),
        (False, {"parallel_drafting": False}),
        (False, {"method": "eagle3", "parallel_drafting": False}),
        (True, {}),
        (True, {"method": "peagle"}),
        (True, {"parallel_drafting": True}),
        (True, {"method": "peagle", "parallel_drafting": True}),
        (True, {"method": "eagle3", "parallel_drafting": True}),  # as vLLM spells it
    ]
    for parallel, given in accepted:
        options = {"model": heads[parallel], **given}
        resolved = resolve(EngineOptions.from_kwargs(model=tiny("qwen3"), speculative_config=options))
        assert resolved.method == ("peagle" if parallel else "eagle3"), given
    refused = [
        (False, {"method": "peagle"}),
        (False, {"parallel_drafting": True}),
        (False, {"method": "peagle", "parallel_drafting": True}),
        (False, {"method": "peagle", "parallel_drafting": False}),
        (False, {"method": "eagle3", "parallel_drafting": True}),
        (True, {"method": "eagle3"}),
        (True, {"parallel_drafting": False}),
        (True, {"method": "eagle3", "parallel_drafting": False}),
        (True, {"method": "peagle", "parallel_drafting": False}),
    ]
    for parallel, given in refused:
        with pytest.raises(OptionError, match=r"speculators (peagle|eagle3) head.*drop"):
            serve(tiny("qwen3"), heads[parallel], drafting=given)


# What is refused.

SOME = torch.zeros(3)
CONFIGS: dict[str, tuple[bool, dict[str, Any], str]] = {  # parallel, as write_head takes it, the message
    "other-hidden-size": (True, {"config": {"target_hidden_size": 64}}, "target with a hidden size of 64, not 48"),
    "other-vocabulary": (True, {"layer": {"vocab_size": 300}}, "target with a vocabulary of 300, not 260"),
    "too-few-layers": (
        False,
        {"config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 9]}},
        "reads layer 9 of a target that has 2, by eagle_aux_hidden_state_layer_ids in its config.json: it was made",
    ),
    "too-few-layers-for-the-default": (
        False,
        {"config": {"eagle_aux_hidden_state_layer_ids": None}},
        "reads layer -1 of a target that has 2",
    ),
    "two-taps": (False, {"config": {"eagle_aux_hidden_state_layer_ids": [0, 1]}}, r"must be 3 layers: \[0, 1\]"),
    "no-mask-hidden": (True, {"tensors": {"mask_hidden": None}}, "holds no mask_hidden.*incomplete"),
    "no-mask-hidden-flat": (True, {"tensors": {"mask_hidden": None}, "layout": "flat"}, "holds no mask_hidden"),
    "no-mask-hidden-nemo": (True, {"tensors": {"mask_hidden": None}, "layout": "nemo"}, "holds no mask_hidden"),
    "no-mask-token": (True, {"config": {"mask_token_id": None}}, "none of mask_token_id, .*ptd_token_id"),
    "no-mask-token-flat": (True, {"config": {"ptd_token_id": None}, "layout": "flat"}, "none of mask_token_id"),
    "mask-token-out-of-range": (True, {"config": {"mask_token_id": 260}}, "mask_token_id is not a token .*260: 260"),
    "mask-token-is-text": (True, {"config": {"mask_token_id": "<mask>"}}, "mask_token_id is not a token .*<mask>"),
    "eagle3-with-mask-hidden": (
        True,
        {"config": {"speculators_model_type": "eagle3"}},
        "holds mask_hidden, which only a P-EAGLE head has.*correct speculators_model_type",
    ),
    "flag-against-mask-hidden": (
        True,
        {"config": {"parallel_drafting": False}, "layout": "flat"},
        "holds mask_hidden, which only a P-EAGLE head has.*correct .*parallel_drafting",
    ),
    "flag-without-mask-hidden": (
        False,
        {"config": {"parallel_drafting": True}, "layout": "flat"},
        "P-EAGLE head by its config.json but holds no mask_hidden",
    ),
    "flag-against-the-type": (
        True,
        {"config": {"parallel_drafting": False}},
        "parallel_drafting: False, but speculators_model_type: peagle",
    ),
    "dflash": (True, {"config": {"speculators_model_type": "dflash"}}, "type dflash are not supported.*eagle3, peagle"),
    "mtp": (True, {"config": {"speculators_model_type": "mtp"}}, "type mtp are not supported.*eagle3, peagle"),
    "typo": (True, {"config": {"speculators_model_type": "peagel"}}, r"type peagel .*did you mean peagle\?"),
    "not-nested": (True, {"config": {"transformer_layer_config": None}}, "lacks transformer_layer_config"),
    "gpt2-layers": (False, {"layer": {"model_type": "gpt2"}}, "draft layers of type gpt2 .*llama, qwen3"),
    "hidden-act": (False, {"layer": {"hidden_act": "gelu"}}, "hidden_act is not supported: gelu"),
    "sizes-that-are-none": (False, {"config": {"draft_vocab_size": -1}}, "draft_vocab_size must be .*: -1"),
    "quantised-config": (False, {"config": {"quantization_config": {"quant_method": "fp8"}}}, "quantised .*fp8"),
    "quantised-layers": (False, {"layer": {"quantization_config": {"quant_method": "awq"}}}, "quantised .*awq"),
    "norm-said-not-held": (False, {"config": {"norm_before_fc": True}}, "says norm_before_fc: True, but input_norm"),
    "norm-held-not-said": (
        False,
        {"norms": ["fc_norm"], "config": {"fc_norm": False}},
        r"says fc_norm: False, but fc_norm.0.weight is there",
    ),
    "no-embedding-and-narrower": (
        False,
        {"sizes": {"hidden_size": 32}, "tensors": {"embed_tokens.weight": None}, "config": {"target_hidden_size": 48}},
        "has no embedding, and the target's is 48 wide, not 32",
    ),
    "no-lm-head-and-reduced": (
        False,
        {"draft_vocab_size": 50, "tensors": {"lm_head.weight": None}},
        "has no lm_head, and the target's does not fit",
    ),
    "no-d2t": (False, {"draft_vocab_size": 50, "tensors": {"d2t": None}}, "vocabulary of 50 .*260 and holds no d2t"),
    "d2t-out-of-range": (
        False,
        {"draft_vocab_size": 50, "tensors": {"d2t": torch.full((50,), 230)}},
        "names tokens outside the target's vocabulary of 260",
    ),
    "d2t-negative": (False, {"draft_vocab_size": 50, "tensors": {"d2t": torch.full((50,), -1)}}, "outside the target"),
    "d2t-twice": (
        False,
        {"draft_vocab_size": 50, "tensors": {"d2t": -torch.arange(50)}},
        "names a token twice: it must hold offsets",
    ),
    "d2t-absolute": (
        False,
        {"draft_vocab_size": 50, "tensors": {"d2t": head_tensors(False, draft_vocab_size=50)["t2d"].nonzero()[:, 0]}},
        "outside the target's vocabulary|does not mark",
    ),
    "d2t-absolute-of-the-first": (
        False,
        {"draft_vocab_size": 50, "tensors": {"d2t": torch.arange(50), "t2d": torch.arange(VOCAB) < 50}},
        "t2d .*does not mark the tokens that d2t names",
    ),
    "d2t-of-another-size": (
        False,
        {"draft_vocab_size": 50, "tensors": {"d2t": torch.zeros(49).long()}},
        "must hold 50",
    ),
    "d2t-of-floats": (False, {"draft_vocab_size": 50, "tensors": {"d2t": torch.zeros(50)}}, "50 whole .*float32"),
    "t2d-disagrees": (
        False,
        {"draft_vocab_size": 50, "tensors": {"t2d": torch.arange(VOCAB) >= 210}},
        "t2d .*does not mark the tokens that d2t names",
    ),
    "missing-tensor": (False, {"tensors": {"layers.1.mlp.up_proj.weight": None}}, "lacks layers.1.mlp.up_proj.weight"),
    "missing-first-layer": (
        False,
        {"tensors": {"layers.0.hidden_norm.weight": None}, "layout": "flat"},
        r"no layers.0.hidden_norm.weight \(or midlayer.*EAGLE-1 heads are not supported.*truncated",
    ),
    "missing-layer": (True, {"layer": {"num_hidden_layers": 3}}, r"lacks layers.2.input_layernorm.weight.* and 1 more"),
    "unexpected-layer": (True, {"layer": {"num_hidden_layers": 1}}, "weights the model does not have: layers.1"),
    "unexpected-tensor": (False, {"tensors": {"layers.0.extra.weight": SOME}}, "does not have: layers.0.extra.weight"),
    "named-twice": (False, {"tensors": {"midlayer.hidden_norm.weight": torch.ones(HIDDEN)}}, "twice, once as"),
    "wrong-shape": (
        False,
        {"tensors": {"fc.weight": torch.ones(HIDDEN, 2 * HIDDEN)}},
        r"fc.weight .* has shape \[48, 96\], the config promises \[48, 144\]",
    ),
    "wrong-mask-shape": (True, {"tensors": {"mask_hidden": torch.ones(1, 1, HIDDEN)}}, r"mask_hidden .*\[1, 1, 48\]"),
    "quantised-tensor": (
        False,
        {"tensors": {"fc.weight": torch.ones((HIDDEN, 3 * HIDDEN), dtype=torch.int8)}},
        "fc.weight .* is torch.int8: quantised weights are not supported",
    ),
    "quantised-tensor-of-bytes": (
        False,
        {
            "tensors": {
                "fc.weight": torch.ones((HIDDEN, 3 * HIDDEN)).to(torch.float8_e4m3fn),
                "fc.weight_scale": torch.ones(1),
            }
        },
        "does not have: fc.weight_scale",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_head_that_is_wrong_is_refused(name: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    parallel, given, message = CONFIGS[name]
    head = write_head(tmp_path / "head", parallel, **given)
    with pytest.raises(CheckpointError, match=message):
        serve(tiny("qwen3"), head)


@pytest.mark.parametrize("layout", ["speculators", "flat", "flat-pickled"])
@pytest.mark.parametrize("kept", [0, 5, 0.5, 0.99])
def test_a_truncated_head_is_refused(layout: str, kept: float, tiny: Callable[..., Path], tmp_path: Path) -> None:
    head = write_head(tmp_path / "head", True, layout=layout)
    (file,) = [each for each in head.iterdir() if each.name != "config.json"]
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if kept < 1 else int(kept)])
    with pytest.raises(CheckpointError, match=rf"cannot read .*{file.name}: .*is it complete\?"):
        serve(tiny("qwen3"), head)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_head_without_a_file_is_refused(file: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    head = write_head(tmp_path / "head", True)
    (head / file).unlink()
    with pytest.raises(CheckpointError, match=f"missing .*{file}"):
        serve(tiny("qwen3"), head)


class Code:
    """Runs something when it is unpickled."""

    def __reduce__(self) -> Any:
        return (exec, ("import outrider; outrider.was_run = True",))


@pytest.mark.parametrize("nested", [False, True])
def test_a_pickle_with_code_is_refused_and_not_run(nested: bool, tiny: Callable[..., Path], tmp_path: Path) -> None:
    head = write_head(tmp_path / "head", True, layout="flat-pickled")
    file = head / "pytorch_model.bin"
    if nested:
        torch.save({**torch.load(file, weights_only=True), "extra": Code()}, file)
    else:
        file.write_bytes(pickle.dumps(Code()))
    with pytest.raises(CheckpointError, match=r"cannot read .*pytorch_model.bin"):
        serve(tiny("qwen3"), head)
    assert not hasattr(sys.modules["outrider"], "was_run")


@pytest.mark.parametrize("what", [["a list"], {"fc.weight": 5}, {"state_dict": {}}, torch.ones(3)], ids=str)
def test_a_pickle_of_something_else_is_refused(what: Any, tiny: Callable[..., Path], tmp_path: Path) -> None:
    head = write_head(tmp_path / "head", False, layout="flat-pickled")
    file = head / "pytorch_model.bin"
    torch.save({**torch.load(file, weights_only=True), **what} if isinstance(what, dict) else what, file)
    with pytest.raises(CheckpointError, match=r"cannot read .*pytorch_model.bin"):
        serve(tiny("qwen3"), head)


@pytest.mark.parametrize("pickled", [False, True])
def test_an_eagle_1_head_is_refused_by_name(pickled: bool, tiny: Callable[..., Path], tmp_path: Path) -> None:
    head = write_head(tmp_path / "head", False, num_layers=1, layout="flat")
    tensors = {
        name.replace("midlayer.", "layers.0."): tensor
        for name, tensor in load_file(head / "model.safetensors").items()
        if "layernorm" not in name and "norm.weight" not in name and "lm_head" not in name
    }
    tensors["fc.weight"] = torch.ones(HIDDEN, 2 * HIDDEN)
    config = json.loads((head / "config.json").read_text())
    config |= {"architectures": ["LlamaForCausalLM"]}
    del config["draft_vocab_size"], config["eagle_config"]
    (head / "config.json").write_text(json.dumps(config))
    (head / "model.safetensors").unlink()
    if pickled:
        torch.save(tensors, head / "pytorch_model.bin")
    else:
        save_file(tensors, head / "model.safetensors")
    with pytest.raises(CheckpointError, match="EAGLE-1 heads are not supported"):
        serve(tiny("qwen3"), head)


@pytest.mark.parametrize("method", [None, "eagle3", "peagle"])
def test_a_language_model_is_no_head(method: str | None, tiny: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"is not a draft head: its config.json is a language model's"):
        serve(tiny("qwen3"), tiny("llama"), drafting={"method": method} if method else {})


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no-model": ({"method": "peagle"}, 'needs its draft head: give "model"'),
    "no-method-nor-model": ({"num_speculative_tokens": 3}, "needs a method.*or the model of a draft head"),
    "no-such-method": ({"method": "pegale", "model": "HEAD"}, r"method: pegale \(did you mean peagle\?"),
    "no-such-option": ({"model": "HEAD", "num_speculative_token": 3}, "peagle has no option num_speculative_token .*"
                       r"did you mean num_speculative_tokens\?"),
    "parallel": ({"model": "HEAD", "parallel_draftin": True}, r"did you mean parallel_drafting\?"),
    "type": ({"model": "HEAD", "parallel_drafting": "yes"}, "parallel_drafting must be .*'yes'"),
    "sample": ({"model": "HEAD", "draft_sample": "greedy"}, "unknown draft_sample: greedy .*argmax, coupled"),
    "no-drafts": ({"model": "HEAD", "num_speculative_tokens": 0}, "num_speculative_tokens must be .*from 1 to 32: 0"),
    "many-drafts": ({"model": "HEAD", "num_speculative_tokens": 33}, "num_speculative_tokens must be .*to 32: 33"),
    "more-drafts-than-positions": (
        {"model": "HEAD", "num_speculative_tokens": 25},
        "num_speculative_tokens 25 is more than the 20 positions of the draft head .*lower it",
    ),
    "ngram": ({"method": "ngram", "model": "HEAD"}, "ngram has no option model"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_are_wrong_are_refused(name: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    config, message = OPTIONS[name]
    head = write_head(tmp_path / "head", True, layer={"max_position_embeddings": 20})
    given = {key: str(head) if value == "HEAD" else value for key, value in config.items()}
    with pytest.raises(OptionError, match=message):
        LLM(str(tiny("qwen3")), max_model_len=64, speculative_config=given)


def test_no_such_head(tiny: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"no model directory: \./nowhere"):
        serve(tiny("qwen3"), "./nowhere")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"tensors": {"mask_hidden": None}}, "holds no mask_hidden"),
        ({"layer": {"vocab_size": 300}}, "vocabulary of 300, not 260"),
        ({"tensors": {"fc.weight": None}}, "lacks fc.weight"),
    ],
    ids=["incomplete", "for-another-target", "half-loaded"],
)
def test_the_command_line_says_so_in_one_line(
    head: dict[str, Any],
    message: str,
    tiny: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = json.dumps({"model": str(write_head(tmp_path / "head", True, **head))})
    drafting = ["--draft", "peagle", "--speculative-config", config]
    monkeypatch.setattr(sys, "argv", ["outrider", "generate", str(tiny("qwen3")), "--prompt", "x", *drafting])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    assert ended.value.code == 2 and not captured.out
    (line,) = captured.err.strip().splitlines()
    assert re.search(message, line)


# The memory plan.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_the_memory_plan_counts_the_head(
    method: str, dtype: torch.dtype, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    path = tiny("qwen3")
    head = write_head(tmp_path / "head", METHODS[method], num_layers=3, draft_vocab_size=50)

    def plan(**options: Any) -> Any:
        return resolve(EngineOptions.from_kwargs(model=path, max_model_len=64, dtype=dtype, **options)).runner.memory

    config = {"model": head, "num_speculative_tokens": 5}
    alone, ours, wider = plan(), plan(speculative_config=config), plan(speculative_config=config, max_num_seqs=256)
    stored = load_file(head / "model.safetensors")
    assert ours.weights - alone.weights == sum(
        tensor.numel() * dtype.itemsize for name, tensor in stored.items() if name not in ("d2t", "t2d")
    )
    # 3 layers of keys and values, 16 tokens, 2 heads of 16 numbers, as wide as the weights
    assert ours.bytes_per_block - alone.bytes_per_block == 3 * 2 * 16 * 2 * 16 * dtype.itemsize
    assert ours.workspace > alone.workspace and wider.workspace > ours.workspace
    with serve(path, head, 5, dtype=dtype, kv_cache_memory=8 * ours.bytes_per_block) as llm:
        running = program(llm)
        layers = [*running._cache, *running._drafter._cache]
        held = sum(each.nbytes for layer in layers for each in (layer.key, layer.value))
        assert llm.engine.resolved.runner.memory.num_blocks == 8 and held == 8 * ours.bytes_per_block
        weights = {
            **parameters(running._model),
            **{f"head.{k}": v for k, v in parameters(running._drafter.network).items()},
        }
        storages = {
            weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in weights.values()
        }
        assert sum(storages.values()) == ours.weights


def test_a_head_on_the_bundled_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = resolve(EngineOptions()).runner
    model = target.model_config
    sizes = {name: getattr(model, name) for name in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")}
    sizes |= {"num_attention_heads": model.num_heads, "num_key_value_heads": model.num_kv_heads}
    sizes |= {"max_position_embeddings": model.max_position_embeddings}
    head = write_head(tmp_path / "head", True, sizes=sizes)
    drafting = ["--draft", "peagle", "-k", "7", "--speculative-config", json.dumps({"model": str(head)})]
    monkeypatch.setattr(sys, "argv", ["outrider", "explain", *drafting, "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    said = json.loads(capsys.readouterr().out)
    size = target.dtype.itemsize
    assert said["method"] == "peagle" and said["num_speculative_tokens"] == 7
    numbers = sum(tensor.numel() for tensor in load_file(head / "model.safetensors").values())
    assert said["memory"]["weights"] - target.memory.weights == size * numbers
    per_layer = target.memory.bytes_per_block // model.num_layers
    assert said["memory"]["bytes_per_block"] - target.memory.bytes_per_block == 2 * per_layer
    drafter = next(part for part in said["parts"] if part["part"] == "drafter peagle")
    assert drafter["needs"] == ["draft_cache", "features", "token_history"]
    with LLM(speculative_config={"model": head, "num_speculative_tokens": 7}, max_model_len=128) as llm:
        case = Case.of(9, 1, temperature=0.0, max_tokens=8)
        found = run(llm, [case])
        assert llm.acceptance().drafted > 0
    with LLM(max_model_len=128) as llm:
        assert run(llm, [case]) == found
    assert issubclass(HeadDrafter, object) and model.vocab_size > MASK_TOKEN
