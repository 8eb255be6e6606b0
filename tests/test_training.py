"""Training heads: right features and gradients, one curve whatever interrupts or shares it, and heads that learn.

Everything runs on tiny targets of random weights, but for the bundled model's tokenizer.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from checkpoints import Case, program, prompt, reference, write, write_tokenizer
from checkpoints import run as run_cases
from outrider import LLM, SamplingParams
from outrider.acceptance.records import read_records
from outrider.cli import main as cli
from outrider.draft.base import DraftContext
from outrider.errors import CheckpointError, OptionError
from outrider.tensors import Draft
from outrider.train import run
from outrider.train.export import export_head
from outrider.train.network import Head
from outrider.train.objective import Objective
from outrider.train.options import OPTIMIZERS, TrainOptions
from outrider.train.packing import EMPTY, Batch
from outrider.train.peagle import PEagle
from outrider.train.registry import OBJECTIVES
from outrider.train.run import head_config, train
from outrider.train.teacher import Teacher, Truth
from outrider.train.trainer import Trainer
from outrider.train.vocabulary import DraftVocabulary

CPU = torch.device("cpu")
LAYERS = 6  # the fewest whose default taps 2, 3, 3 are not three: tests name their own
TAPS = (1, 3, 6)
METHODS = sorted(OBJECTIVES)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on two, and much slower on two that others use."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of random weights, with a tokenizer."""
    return write_tokenizer(write(tmp_path_factory.mktemp("target"), num_hidden_layers=LAYERS))


def two_documents(vocab_size: int = 260) -> Batch:
    """One row: a document of 13 tokens, one of 8, and three empty places."""
    lengths = (13, 8)
    document = torch.tensor([0] * 13 + [1] * 8 + [EMPTY] * 3)
    position = torch.cat([torch.arange(n) for n in (*lengths, 3)])
    remaining = torch.cat([torch.arange(n).flip(0) for n in lengths] + [torch.zeros(3, dtype=torch.int64)])
    tokens = torch.randint(vocab_size, (24,), generator=torch.Generator().manual_seed(1))
    return Batch(*(x.unsqueeze(0) for x in (tokens, document, position, remaining, torch.zeros(24).long())))


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("taps", [TAPS, (0, 2, 5)])
def test_features_are_the_streams_that_transformers_gives(tmp_path: Path, family: str, taps: tuple[int, ...]) -> None:
    """For each document alone; tap i is the stream entering layer i, the last one that after the last layer."""
    path = write(tmp_path, family, num_hidden_layers=LAYERS, attention_bias=family == "llama")
    teacher, batch = Teacher(path, 24, taps, CPU, compiled=False), two_documents()
    vocabulary = torch.tensor([3, 5, 200, 259])
    truth, hidden = teacher.truth(batch, vocabulary), teacher.run(batch)[1]
    whole = teacher.truth(batch, None)
    model = reference(path, family)
    streams: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: streams.append(args[0])) for layer in model.model.layers]
    for span in (slice(0, 13), slice(13, 21)):
        streams.clear()
        norm: list[Tensor] = []
        hook = model.model.norm.register_forward_pre_hook(lambda _, args, seen=norm: seen.append(args[0]))
        with torch.no_grad():
            out = model(batch.tokens[:, span])
        hook.remove()
        theirs = [*streams, *norm]
        expected = torch.cat([theirs[tap] for tap in taps], dim=-1)
        torch.testing.assert_close(truth.features[:, span], expected, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(whole.logits[span], out.logits[0], atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(truth.logits[span], out.logits[0][:, vocabulary], atol=2e-5, rtol=2e-5)
        assert (truth.drafted[0, span] == torch.isin(out.logits[0].argmax(-1), vocabulary)).all()
        assert hidden[0, span].shape == (span.stop - span.start, 48)
    for hook in hooks:
        hook.remove()


def test_default_taps_are_the_papers(tmp_path: Path, target: Path) -> None:
    deep = write(tmp_path / "deep", num_hidden_layers=14)
    assert Teacher(deep, 16, None, CPU, compiled=False).aux_layer_ids == (2, 7, 11)
    for wrong in (None, (1, 2), (1, 2, LAYERS + 1)):
        with pytest.raises(OptionError, match=r"layers"):
            Teacher(target, 16, wrong, CPU, compiled=False)


OBJECTIVE_OPTIONS: dict[str, Any] = {"max_length": 24, "feature_layers": TAPS, "k_train": 5, "ttt_steps": 4}


def objective_of(
    method: str, target: Path, vocabulary: DraftVocabulary | None = None, stratum: int | None = None, **options: Any
) -> tuple[Objective, Teacher]:
    """A method's objective over a fresh head for the target."""
    asked = TrainOptions(method=method, **{**OBJECTIVE_OPTIONS, **options})
    kind = OBJECTIVES[method]
    teacher = Teacher(target, asked.max_length, asked.feature_layers, CPU, compiled=False)
    vocabulary = vocabulary or DraftVocabulary(torch.arange(260), 260)
    mask_token_id = 259 if kind.parallel else None
    head = Head(head_config(asked, kind, teacher, vocabulary, mask_token_id), vocabulary)
    head.initialise(teacher, vocabulary, seed=0)
    more = {} if stratum is None else {"stratum": stratum}
    return kind(head, asked, CPU, False, **more), teacher


def in_float64(truth: Truth) -> Truth:
    return Truth(truth.features.double(), truth.logits.double(), truth.drafted)


def gradients(objective: Objective, batch: Batch, truth: Truth) -> tuple[dict[str, Tensor], Tensor]:
    """By name, and the sums by depth."""
    objective.head.zero_grad()
    uniform = torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(3))
    elements = objective.elements(batch, truth, uniform)
    sums = objective.run(batch, truth, elements, objective.weights(elements.counts().double()), backward=True)
    found = {name: p.grad.clone() for name, p in objective.head.named_parameters() if p.grad is not None}
    return found, sums


@pytest.mark.parametrize("unreached_weight", [1.0, 0.25])
@pytest.mark.parametrize("num_segments", [2, 3, 6])
def test_partitioned_gradients_are_the_unpartitioned_ones(
    target: Path, num_segments: int, unreached_weight: float
) -> None:
    results = []
    for partitions in (1, num_segments):
        method = PEagle.name
        options = {"partitions": partitions, "unreached_weight": unreached_weight}
        objective, teacher = objective_of(method, target, stratum=4, num_layers=2, **options)
        objective.head.double()
        objective._rope = objective._rope.double()
        batch = two_documents()
        results.append(gradients(objective, batch, in_float64(teacher.truth(batch, None))))
    (whole, sums), (parts, part_sums) = results
    torch.testing.assert_close(part_sums, sums, atol=1e-12, rtol=1e-12)
    assert whole.keys() == parts.keys() >= {"mask_hidden", "embed_tokens.weight", "layers.1.mlp.up_proj.weight"}
    for name, gradient in whole.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(parts[name], gradient, atol=1e-13, rtol=1e-9, msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_the_plain_loss(target: Path, method: str) -> None:
    """Of KL(target || draft) as torch computes it over all elements at once, from the same outputs of the head."""
    vocabulary = DraftVocabulary(torch.arange(0, 260, 2), 260)
    objective, teacher = objective_of(method, target, vocabulary, num_layers=1)
    objective.head.double()
    objective._rope = objective._rope.double()
    batch = two_documents()
    truth = in_float64(teacher.truth(batch, vocabulary.tokens))
    ours, sums = gradients(objective, batch, truth)

    def plain(hidden: Tensor, truth: Truth, elements: Any, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        logits = objective.head.norm_output(hidden) @ objective.head.lm_head.weight.T
        wanted = truth.logits[elements.row[:, index]].log_softmax(-1)
        kl = torch.nn.functional.kl_div(logits.log_softmax(-1), wanted, reduction="none", log_target=True).sum(-1)
        kept = elements.trained[:, index]
        counted = torch.zeros(objective.num_depths, dtype=kl.dtype)
        counted.index_add_(0, elements.depth[:, index].flatten(), (kl * kept).flatten().detach())
        return (kl * kept * weights[elements.depth[:, index]]).sum(), counted.expand(3, -1)

    objective.loss = plain  # type: ignore[method-assign]
    theirs, their_sums = gradients(objective, batch, truth)
    torch.testing.assert_close(sums[0], their_sums[0], atol=1e-12, rtol=1e-12)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-12, rtol=1e-8, msg=name)


def test_drafts_behind_a_wrong_one_weigh_as_told(target: Path) -> None:
    objective, teacher = objective_of(PEagle.name, target, num_layers=1, unreached_weight=0.25)
    batch = two_documents()
    truth = teacher.truth(batch, None)
    elements = objective.elements(batch, truth, torch.rand(batch.tokens.shape))
    index = torch.arange(elements.start[-1])
    right = torch.rand(elements.anchor.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    objective.agreement = lambda *_: right  # type: ignore[method-assign]
    share = objective.share(torch.empty(0), truth, elements, index)
    assert share is not None
    for row in range(len(right)):
        wrong = set()
        for anchor, depth, agrees, found in zip(
            *(x[row].tolist() for x in (elements.anchor, elements.depth, right, share)), strict=True
        ):
            assert found == (0.25 if anchor in wrong else 1.0), (row, anchor, depth)
            if not agrees:
                wrong.add(anchor)
    assert {0.25, 1.0} <= set(share.flatten().tolist())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"norm_before_fc": True, "norm_output": True}, {"fc_norm": True}])
def test_a_half_precision_pass_stays_close(target: Path, method: str, options: dict[str, Any]) -> None:
    """On a GPU what flows is bfloat16: the same code with bfloat16 features, and a loss that agrees."""
    objective, teacher = objective_of(method, target, num_layers=2, **options)
    batch = two_documents()
    truth = teacher.truth(batch, None)
    _, sums = gradients(objective, batch, truth)
    found, rounded = gradients(objective, batch, Truth(truth.features.bfloat16(), truth.logits, truth.drafted))
    torch.testing.assert_close(rounded[0], sums[0], atol=0, rtol=0.05)
    assert all(gradient.isfinite().all() and gradient.dtype == torch.float32 for gradient in found.values())


def periodic(path: Path, documents: int = 24, length: int = 60, prompt: int | None = None) -> Path:
    """Counting in circles of 11: what comes next is certain, to a target that can count."""
    with open(path, "w") as file:
        for index in range(documents):
            record: dict[str, Any] = {"token_ids": [10 + (index + place) % 11 for place in range(length)]}
            if prompt is not None:
                record["prompt_length"] = prompt
            file.write(json.dumps(record) + "\n")
    return path


@pytest.fixture(scope="module")
def counting_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 that has learnt to count in circles of 11, so that its most likely token is that of the text."""
    from transformers import Qwen3ForCausalLM

    path = tmp_path_factory.mktemp("counting")
    write(path, num_hidden_layers=LAYERS, vocab_size=64)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3ForCausalLM.config_class.from_pretrained(path))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.tensor([[10 + (row + place) % 11 for place in range(32)] for row in range(11)])
    for _ in range(60):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.3
    model.save_pretrained(path)
    return path


def small(method: str, target: Path, data: Path, out: Path, **options: Any) -> TrainOptions:
    """A run of a few steps."""
    return TrainOptions(
        **{
            "model": str(target),
            "method": method,
            "data": [str(data)],
            "out": str(out),
            "held_out": str(data),
            "max_length": 64,
            "batch_tokens": 128,
            "steps": 6,
            "warmup_steps": 2,
            "lr": 3e-3,
            "feature_layers": TAPS,
            "num_layers": 1,
            "num_speculative_tokens": 4,
            **({"k_train": 5, "mask_token_id": 3} if OBJECTIVES[method].parallel else {"ttt_steps": 4}),
            "log_every": 1,
            "device": "cpu",
            **options,
        }
    )


SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "two layers": {"num_layers": 2},
    "norm_before_residual": {"norm_before_residual": True, "norm_before_fc": True},
    "3.1": {"fc_norm": True, "norm_output": True, "num_layers": 2},
    "llama": {"layer_type": "llama", "intermediate_size": 64, "num_attention_heads": 2, "head_dim": 24},
}


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("method", METHODS)
def test_the_engine_drafts_what_training_computes(target: Path, tmp_path: Path, method: str, switches: str) -> None:
    """A head of random weights, exported: its drafts behind a prompt are the likeliest tokens of training's pass over
    the prompt, the target's next token and those drafts."""
    drafts, length = 4, 17
    vocabulary = DraftVocabulary(torch.arange(1, 260, 2), 260)
    options = {"max_length": 24, "ttt_steps": drafts, "k_train": drafts, **SWITCHES[switches]}
    objective, teacher = objective_of(method, target, vocabulary, **options)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in objective.head.named_parameters():
            parameter.copy_(float("norm" in name) + 0.3 * torch.randn(parameter.shape, generator=generator))
    export_head(
        tmp_path,
        objective,
        target,
        target_name=str(target),
        num_speculative_tokens=drafts,
        with_embedding=True,
        with_lm_head=True,
        dtype="float32",
    )
    speculation = {"model": str(tmp_path), "num_speculative_tokens": drafts}
    with LLM(str(target), device="cpu", speculative_config=speculation) as llm:
        drafter, proposed = program(llm)._drafter, []
        propose = drafter.propose

        def record(context: DraftContext) -> Draft:
            proposed.append(propose(context))
            return proposed[-1]

        drafter.propose = record  # type: ignore[method-assign]
        (out,) = run_cases(llm, [Case.of(length, salt=3, temperature=0.0, max_tokens=2)])
    guessed = proposed[0].tokens[0].tolist()
    text = [*prompt(length, 3), out[0][0][0], *guessed]
    batch = one_document(torch.tensor([text + [0] * (24 - len(text))]), len(text))
    computed: dict[int, int] = {}

    def look(hidden: Tensor, truth: Truth, elements: Any, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        best = vocabulary.tokens[(objective.head.norm_output(hidden) @ objective.head.lm_head.weight.T)[0].argmax(-1)]
        for token, place in zip(best.tolist(), index.tolist(), strict=True):
            if elements.anchor[0, place] == length - 1:
                computed[int(elements.depth[0, place])] = token
        return hidden.sum(), torch.zeros(3, objective.num_depths)

    objective.loss = look  # type: ignore[method-assign]
    uniform = torch.ones(1, 24)
    uniform[0, length - 1] = 0  # kept at every depth
    with torch.no_grad():
        truth = teacher.truth(batch, vocabulary.tokens)
        elements = objective.elements(batch, truth, uniform)
        objective.run(batch, truth, elements, torch.ones(drafts), backward=False)
    assert [computed[depth] for depth in range(drafts)] == guessed
    assert len(set(guessed)) > 1, "nothing is told apart"


def one_document(tokens: Tensor, length: int) -> Batch:
    """A row [1, L] whose first `length` tokens are one document."""
    place = torch.arange(tokens.shape[1]).unsqueeze(0)
    inside = place < length
    remaining = torch.where(inside, length - 1 - place, 0)
    return Batch(tokens, torch.where(inside, 0, EMPTY), torch.where(inside, place, 0), remaining, 0 * place)


@pytest.mark.parametrize("method", METHODS)
def test_a_head_learns_what_is_certain_at_every_depth(counting_target: Path, tmp_path: Path, method: str) -> None:
    data = periodic(tmp_path / "data.jsonl")
    figures = train(small(method, counting_target, data, tmp_path / "head", steps=60, batch_tokens=256, lr=1e-2))
    assert min(figures["held_out"]["accuracy_by_depth"]) > 0.9, figures["held_out"]
    speculation = {"model": str(tmp_path / "head"), "num_speculative_tokens": 4}
    with LLM(str(counting_target), device="cpu", speculative_config=speculation) as llm:
        counted = [{"prompt_token_ids": [10 + (start + place) % 11 for place in range(14)]} for start in range(6)]
        llm.generate(counted, SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, detokenize=False))
        assert min(llm.acceptance().rates) > 0.8, llm.acceptance()


def test_depths_that_were_not_trained_are_not_learnt(counting_target: Path, tmp_path: Path) -> None:
    """The control: the same run with one depth trained, looked at as deep as the other."""
    data, method = periodic(tmp_path / "data.jsonl"), PEagle.name
    shallow = {"k_train": 1, "num_speculative_tokens": 1, "steps": 60, "batch_tokens": 256, "lr": 1e-2}
    train(small(method, counting_target, data, tmp_path / "head", **shallow))
    options = small(method, counting_target, data, tmp_path / "head")
    objective, teacher = objective_of(method, counting_target, full(64), **{**_sizes(options), "k_train": 5})
    weights = load_file(tmp_path / "head" / "model.safetensors")
    objective.head.load_state_dict({name: x.float() if x.is_floating_point() else x for name, x in weights.items()})
    objective._mask_token.fill_(3)  # type: ignore[attr-defined]
    trainer = Trainer(options, objective, teacher, None, run.World.join("cpu"))
    documents = run.Reader(counting_target, 64, None).read([data])
    accuracy = trainer.evaluate(documents).accuracy
    assert accuracy[0] > 0.9 and accuracy[3] < 0.6, accuracy


def full(vocab_size: int) -> DraftVocabulary:
    return DraftVocabulary(torch.arange(vocab_size), vocab_size)


def _sizes(options: TrainOptions) -> dict[str, Any]:
    return {"max_length": options.max_length, "num_layers": options.num_layers}


def curve(out: Path) -> list[tuple[int, float, list[float], float]]:
    """What a log says of the steps, but for times."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(one["step"], one["loss"], one["accuracy_by_depth"], one["lr"]) for one in records if "lr" in one]


class HaltError(Exception):
    """What ends a run that a test stops."""


@pytest.mark.parametrize(("method", "optimizer"), [*product(METHODS, OPTIMIZERS)])
def test_a_resumed_run_has_the_same_curve(target: Path, tmp_path: Path, method: str, optimizer: str) -> None:
    data = periodic(tmp_path / "data.jsonl", documents=9)
    train(small(method, target, data, tmp_path / "straight", optimizer=optimizer))

    def stop(share: float, figures: str) -> None:
        if share > 4 / 6:  # after the checkpoint of step 3, and steps that must be undone
            raise HaltError

    halted = small(method, target, data, tmp_path / "halves", save_every=3, optimizer=optimizer)
    with pytest.raises(HaltError):
        train(halted, stop)
    assert not (tmp_path / "halves" / "model.safetensors").exists()
    train(replace(halted, resume=True))
    assert curve(tmp_path / "halves") == curve(tmp_path / "straight")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("halves", "straight"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_run_can_start_from_a_head(target: Path, tmp_path: Path) -> None:
    data = periodic(tmp_path / "data.jsonl", documents=4)
    parent = small(PEagle.name, target, data, tmp_path / "parent", steps=4, dtype="float32")
    ended = train(parent)["held_out"]
    child = replace(parent, out=str(tmp_path / "child"), init=str(tmp_path / "parent"), steps=1, lr=1e-9)
    assert train(child)["held_out"]["loss_by_depth"] == pytest.approx(ended["loss_by_depth"], abs=1e-4)
    for other in (
        {"num_layers": 2},
        {"method": METHODS[0], "k_train": 8, "mask_token_id": None},
        {"draft_vocab_size": 20},
    ):
        with pytest.raises(CheckpointError, match="parent"):
            train(replace(child, **other))


def test_resuming_something_else_is_refused(target: Path, tmp_path: Path) -> None:
    data = periodic(tmp_path / "data.jsonl", documents=4)
    options = small(METHODS[0], target, data, tmp_path / "head", steps=1)
    with pytest.raises(CheckpointError, match="nothing to resume"):
        train(replace(options, resume=True))
    train(options)
    with pytest.raises(OptionError, match=r"made with lr 0\.003, not 0\.001"):
        train(replace(options, resume=True, lr=1e-3))


ONE_OF_TWO = """
import json, os, sys
from outrider.train.options import TrainOptions
from outrider.train.run import train
for port, options in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = port
    train(TrainOptions(**options))
"""


def free_port() -> str:
    """Each meeting has its own: the last one's may still be closing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_two_processes_do_what_one_does_with_the_same_batch(target: Path, tmp_path: Path) -> None:
    """Each method in turn, in processes that find one another as those that torchrun starts do."""
    data = periodic(tmp_path / "data.jsonl", documents=9)
    runs = {name: small(name, target, data, tmp_path / name, steps=3, batch_tokens=256) for name in METHODS}
    alone = {name: tmp_path / f"{name}-alone" for name in METHODS}
    meetings = [(free_port(), asdict(options)) for options in runs.values()]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = str(Path(run.__file__).parents[2])
    command = [sys.executable, "-c", ONE_OF_TWO, json.dumps(meetings)]
    processes = [
        subprocess.Popen(
            command, env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}, stdout=subprocess.PIPE
        )
        for rank in ("0", "1")
    ]
    for name, options in runs.items():
        train(replace(options, out=str(alone[name])))
    try:
        assert [process.wait(timeout=180) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    for name in METHODS:
        for one, other in zip(curve(tmp_path / name), curve(alone[name]), strict=True):
            assert one[0] == other[0] and one[1] == pytest.approx(other[1], rel=1e-5)
            assert one[2] == pytest.approx(other[2], abs=1e-4)
        ours, theirs = (torch.load(out / "checkpoint.pt")["head"] for out in (tmp_path / name, alone[name]))
        for weight, tensor in theirs.items():
            torch.testing.assert_close(ours[weight], tensor, atol=2e-5, rtol=2e-4, msg=f"{name} {weight}")
        assert json.loads((tmp_path / name / "metrics.json").read_text())["processes"] == 2


@pytest.mark.parametrize("method", METHODS)
def test_an_exported_head_says_everything(target: Path, tmp_path: Path, method: str) -> None:
    data, parallel = periodic(tmp_path / "data.jsonl", documents=4), OBJECTIVES[method].parallel
    shape = {"num_layers": 2, "draft_vocab_size": 9, "fc_norm": True, "norm_output": True, "steps": 1}
    train(small(method, target, data, tmp_path / "head", **shape))
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    layers = config.pop("transformer_layer_config")
    assert config == {
        "architectures": ["PEagleSpeculator" if parallel else "Eagle3Speculator"],
        "speculators_model_type": method,
        "speculators_config": {
            "algorithm": method,
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 4}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": str(target), "architectures": ["Qwen3ForCausalLM"]},
        },
        "draft_vocab_size": 9,
        "target_hidden_size": 48,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": True,
        "norm_output": True,
        "eagle_aux_hidden_state_layer_ids": list(TAPS),
        "embed_requires_grad": parallel,
        "dtype": "bfloat16",
        **({"mask_token_id": 3} if parallel else {}),
    }
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 260, "head_dim": 16}
    assert layers.items() >= {**sizes, "model_type": "qwen3", "max_position_embeddings": 256}.items()
    assert layers["rope_parameters"] == json.loads((target / "config.json").read_text())["rope_parameters"]

    weights = load_file(tmp_path / "head" / "model.safetensors")
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (48, 144), "norm.weight": (48,), "lm_head.weight": (9, 48)}
    shapes |= {"d2t": (9,), "t2d": (260,), **{f"fc_norm.{tap}.weight": (48,) for tap in range(3)}}
    shapes |= {"embed_tokens.weight": (260, 48), "mask_hidden": (1, 1, 144)} if parallel else {}
    for index, width in ((0, 96), (1, 48)):
        attention = {"q_proj": (64, width), "k_proj": (32, width), "v_proj": (32, width), "o_proj": (48, 64)}
        mlp = {"gate_proj": (80, 48), "up_proj": (80, 48), "down_proj": (48, 80)}
        norms = {"input_layernorm": (48,), "post_attention_layernorm": (48,)} | (
            {} if index else {"hidden_norm": (48,)}
        )
        attention |= {"q_norm": (16,), "k_norm": (16,)}
        for part, group in (("self_attn.", attention), ("mlp.", mlp), ("", norms)):
            shapes |= {f"layers.{index}.{part}{name}.weight": shape for name, shape in group.items()}
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == shapes
    expected = {"d2t": torch.int64, "t2d": torch.bool}
    assert all(tensor.dtype == expected.get(name, torch.bfloat16) for name, tensor in weights.items())
    assert (torch.arange(9) + weights["d2t"]).tolist() == weights["t2d"].nonzero().flatten().tolist()


def test_a_frozen_embedding_is_exported_when_asked(target: Path, tmp_path: Path) -> None:
    data = periodic(tmp_path / "data.jsonl", documents=4)
    asked = {"freeze_embedding": True, "export_embedding": True, "steps": 1, "dtype": "float32"}
    train(small(PEagle.name, target, data, tmp_path / "head", **asked))
    ours = load_file(tmp_path / "head" / "model.safetensors")["embed_tokens.weight"]
    assert torch.equal(ours, load_file(target / "model.safetensors")["model.embed_tokens.weight"])


def test_only_continuations_are_trained(target: Path, tmp_path: Path) -> None:
    """Continuations are the target's own, and prompts carry no loss: their tokens may be anything."""
    data = periodic(tmp_path / "data.jsonl", documents=12, length=20)
    asked = {"on_policy": 8, "prompt_length": 6, "continuation_length": 10, "on_policy_temperature": 0.0}
    options = small(METHODS[0], target, data, tmp_path / "head", held_out=None, generate_only=True, **asked)
    figures = train(options)
    lines = [json.loads(line) for line in (tmp_path / "head" / "on_policy.jsonl").read_text().splitlines()]
    assert figures["on_policy"].endswith("on_policy.jsonl") and not (tmp_path / "head" / "config.json").exists()
    assert len(lines) == 8 and all(line["prompt_length"] == 6 and len(line["token_ids"]) == 16 for line in lines)
    model = reference(target)
    for line in lines[:2]:
        with torch.no_grad():
            best = model(torch.tensor([line["token_ids"]])).logits[0].argmax(-1).tolist()
        assert best[5:-1] == line["token_ids"][6:]
    trained = train(replace(options, generate_only=False, steps=1))
    assert trained["training_tokens"] <= 8 * 16
    with pytest.raises(ValueError, match="more than the 12 documents"):
        train(replace(options, on_policy=13))


@pytest.mark.parametrize("method", METHODS)
def test_prompts_carry_no_loss(target: Path, method: str) -> None:
    objective, teacher = objective_of(method, target)
    batch = two_documents()
    prompt = Batch(batch.tokens, batch.document, batch.position, batch.remaining, (batch.remaining - 4).clamp(min=0))
    uniform = torch.rand(batch.tokens.shape)
    elements = objective.elements(prompt, teacher.truth(prompt, None), uniform)
    for index in range(elements.start[-1]):
        anchor, depth = int(elements.anchor[0, index]), int(elements.depth[0, index])
        ahead = depth + 2  # the token that is predicted
        inside = batch.document[0, anchor] != EMPTY and int(batch.remaining[0, anchor]) >= depth + 1
        in_prompt = ahead <= int(batch.remaining[0, anchor]) - 4
        assert bool(elements.trained[0, index]) == (bool(inside) and not in_prompt)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no method": ({"method": None}, "--method"),
    "unknown method": ({"method": "eagel3"}, r"unknown training method: eagel3 \(did you mean eagle3\?\)"),
    "no data": ({"data": None}, "--data"),
    "no place": ({"out": None}, "--out"),
    "no end": ({"steps": None}, "--steps, --epochs or --minutes"),
    "a batch that no row fits": ({"batch_tokens": 100}, "multiple of max_length 64"),
    "rows past the positions": ({"max_length": 512}, "at most 256"),
    "no such layer": ({"feature_layers": (1, 2, 9)}, "3 of 0 to 6"),
    "a token that is none": ({"mask_token_id": 260}, "outside the target's vocabulary of 260"),
    "no mask token": ({"mask_token_id": None}, "--mask-token-id"),
    "depths that are not trained": ({"k_train": 3}, "raise --k-train"),
    "too many segments": ({"partitions": 2}, "more than the 1 blocks"),
    "an option of another method": ({"ttt_steps": 5}, "ttt_steps 5 is an option of eagle3: leave it out for peagle"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "does not divide 4 attention heads"),
    "a vocabulary beyond the target's": ({"draft_vocab_size": 261}, "at most 260"),
    "no such device": ({"device": "tpu"}, "tpu"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_named_before_the_first_step(target: Path, tmp_path: Path, case: str) -> None:
    changes, message = WRONG[case]
    data = periodic(tmp_path / "data.jsonl", documents=4)
    with pytest.raises(OptionError, match=message):
        train(replace(small(PEagle.name, target, data, tmp_path / "head"), **changes))


def test_wrong_values_are_named() -> None:
    for wrong in (
        {"steps": 0},
        {"lr": 0.0},
        {"keep_rate": 1.5},
        {"unreached_weight": 1.5},
        {"lr_decay": "step"},
        {"generate_only": True},
    ):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            TrainOptions(**wrong)  # type: ignore[arg-type]


def test_the_command_trains_a_head_for_the_bundled_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def outrider(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["outrider", "train", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    data = periodic(tmp_path / "data.jsonl", documents=4)
    flags = ["--data", str(data), "--out", str(tmp_path / "head"), "--max-length", "64", "--batch-tokens", "64"]
    flags += [
        "--steps",
        "1",
        "--num-layers",
        "1",
        "--device",
        "cpu",
        "--draft-vocab-size",
        "32",
        "--accept-prompts",
        "0",
    ]
    code, out, _ = outrider("--method", PEagle.name, *flags, "--json")
    figures = json.loads(out)
    assert code == 0 and figures["steps"] == 1 and figures["tokens"] == 64
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    assert config["mask_token_id"] == 3 and config["eagle_aux_hidden_state_layer_ids"] == [2, 7, 11]
    code, _, err = outrider("--method", "peagel", *flags)
    assert code == 2 and "did you mean peagle?" in err


def test_documented_commands_know_today_s_flags() -> None:
    group = typer.main.get_command(cli.app)
    page = Path(__file__).parent.parent / "docs" / "guide" / "training.md"
    lines = re.findall(r"^outrider ((?:train|generate|accept) .*)$", page.read_text(), re.MULTILINE)
    assert len(lines) >= 6
    for line in lines:
        words = shlex.split(line.replace(" ... ", " ").split("#")[0])
        group.commands[words[0]].make_context(words[0], words[1:])  # type: ignore[attr-defined]


def test_acceptance_is_recorded_beside_the_finished_head(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"token_ids": [9 + i, *range(10, 130)]}) + "\n" for i in range(3)))
    head = tmp_path / "head"
    lengths = ["--max-length", "128", "--batch-tokens", "128", "--steps", "1"]
    common = ["--accept-prompts", "2", "--num-speculative-tokens", "2", "--ttt-steps", "2", "--device", "cpu", "--json"]
    asked = ["train", "--method", "eagle3", "--data", str(data), "--out", str(head), *lengths, *common]
    done = CliRunner().invoke(cli.app, asked, catch_exceptions=False)
    assert done.exit_code == 0
    (record,) = read_records(head / "acceptance.json")
    assert record.drafts == json.loads(done.stdout)["acceptance"]["drafts"] > 0
    again = ["accept", "--draft", str(head), "-k", "2", "--num-prompts", "2", "--json"]
    compared = CliRunner().invoke(cli.app, again, catch_exceptions=False)
    assert compared.exit_code == 0 and json.loads(compared.stdout)["passed"] is True
