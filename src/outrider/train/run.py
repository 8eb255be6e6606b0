"""One training run from options to files."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from outrider.draft.eagle.checkpoint import HeadConfig
from outrider.errors import CheckpointError, OptionError
from outrider.load.checkpoint import TensorFile, read_json, weight_files
from outrider.load.hub import locate
from outrider.load.tokenizer import Tokenizer
from outrider.models.config import ModelConfig
from outrider.models.registry import read_config
from outrider.train import on_policy
from outrider.train.attention import BLOCK
from outrider.train.data import Documents, Reader, split_held_out
from outrider.train.export import FAMILIES, export_head, write_json
from outrider.train.network import Head
from outrider.train.objective import Objective
from outrider.train.options import TrainOptions
from outrider.train.registry import find_objective, refuse_options_of_others
from outrider.train.teacher import Teacher, on_device
from outrider.train.trainer import LOG, Report, Trainer
from outrider.train.vocabulary import DraftVocabulary
from outrider.train.world import World

logger = logging.getLogger("outrider")

BUNDLED_NAME = "outrider-bundled"
"""What a head says its target is where that is the bundled model."""

MASK_TOKEN = "<|mask|>"
ON_POLICY, METRICS = "on_policy.jsonl", "metrics.json"

Counting = Callable[[int, int], None]


def train(
    options: TrainOptions,
    report: Report | None = None,
    generated: Counting | None = None,  # on-policy continuations finished, and in all
) -> dict[str, Any]:
    """Trains a head and writes it to `options.out`; returns the final figures.

    The directory receives config.json and model.safetensors (the head), log.jsonl, metrics.json, checkpoint.pt, with
    on-policy data on_policy.jsonl. Raises OptionError, CheckpointError or
    DataError before the first step, each naming the value and the remedy.
    """
    method = find_objective(options.method)
    refuse_options_of_others(method, options)
    method.check(options)
    if options.out is None:
        raise OptionError("say where the head goes with --out DIR")
    if not options.data:
        raise OptionError("say what to train on with --data FILE")
    world = World.join(options.device)
    try:
        return _train(options, method, world, report, generated)
    finally:
        world.leave()


def _train(
    options: TrainOptions,
    method: type[Objective],
    world: World,
    report: Report | None,
    generated: Counting | None,
) -> dict[str, Any]:
    assert options.out is not None
    out, directory = Path(options.out), locate(options.model)
    _, described = read_config(read_json(directory / "config.json"))
    mask_token_id = _mask_token(options, directory, described) if method.parallel else None
    if world.device.type == "cuda":
        if options.max_length % BLOCK:
            raise OptionError(f"max_length must be a multiple of {BLOCK} on a GPU: {options.max_length}")
        torch.set_float32_matmul_precision("high")
    if world.is_first:
        out.mkdir(parents=True, exist_ok=True)
    world.wait()
    documents, held_out = _documents(options, directory, described, world, generated)
    if options.generate_only:
        return {"on_policy": str(out / ON_POLICY), "documents": len(documents), "tokens": len(documents.tokens)}
    special = {*described.eos_token_ids, *_special_tokens(directory)}
    vocabulary = DraftVocabulary.by_frequency(documents, described.vocab_size, options.draft_vocab_size, special)
    compiled = options.compile and world.device.type == "cuda"
    teacher = Teacher(directory, options.max_length, options.feature_layers, world.device, compiled)
    head = Head(head_config(options, method, teacher, vocabulary, mask_token_id), vocabulary, compiled)
    head.initialise(teacher, vocabulary, options.seed)
    if options.init is not None:
        start_from(head, Path(options.init), with_lm_head=not options.freeze_lm_head)
    frozen = not method.trains_embedding if options.freeze_embedding is None else options.freeze_embedding
    head.embed_tokens.weight.requires_grad_(not frozen)
    head.lm_head.weight.requires_grad_(not options.freeze_lm_head)
    head.to(world.device)
    objective = method(head, options, world.device, compiled)
    if world.is_first and not options.resume:
        (out / LOG).write_text("", encoding="utf-8")
    trainer = Trainer(options, objective, teacher, on_device(vocabulary, world.device), world, report)
    figures = trainer.train(documents, held_out)
    if world.is_first:
        export_head(
            out,
            objective,
            directory,
            target_name=options.model or BUNDLED_NAME,
            num_speculative_tokens=options.num_speculative_tokens,
            with_embedding=not frozen or options.export_embedding,
            with_lm_head=not options.freeze_lm_head,
            dtype=options.dtype,
        )
        figures |= {
            "head": str(out),
            "method": method.name,
            "parameters": sum(parameter.numel() for parameter in head.parameters() if parameter.requires_grad),
            "documents": len(documents),
            "training_tokens": len(documents.tokens),
            "processes": world.size,
            "device": _device_name(world.device),
            "torch": torch.__version__,
            "options": asdict(options),
        }
        write_json(out / METRICS, figures)
    world.wait()
    return figures


def start_from(head: Head, directory: Path, with_lm_head: bool) -> None:
    """Fills a head from one in the speculators format; an embedding it lacks stays the target's, as does the lm_head.

    Raises CheckpointError for a head of another shape or method, or with another draft vocabulary.
    """
    vocabulary = {"d2t": head.d2t, "t2d": head.t2d}
    given = {name: TensorFile(file).read(name) for file in weight_files(directory) for name in TensorFile(file).names()}
    for name, own in vocabulary.items():
        if name in given and not torch.equal(given.pop(name).to(own), own):
            raise CheckpointError(f"{directory} drafts another vocabulary: give the same --draft-vocab-size and data")
    state = {name: parameter.detach() for name, parameter in head.named_parameters()}
    if not with_lm_head:
        given.pop("lm_head.weight", None)
    absent = sorted(set(state) - set(given) - {"embed_tokens.weight", *(() if with_lm_head else ("lm_head.weight",))})
    if absent or set(given) - set(state):
        raise CheckpointError(
            f"{directory} is not a head of this shape: it lacks {absent or 'nothing'} and holds besides "
            f"{sorted(set(given) - set(state)) or 'nothing'}; give the same method, --num-layers and norms"
        )
    for name, tensor in given.items():
        if state[name].shape != tensor.shape:
            raise CheckpointError(f"{name} in {directory} is {list(tensor.shape)}, not {list(state[name].shape)}")
        state[name].copy_(tensor)


def head_config(
    options: TrainOptions,
    method: type[Objective],
    teacher: Teacher,
    vocabulary: DraftVocabulary,
    mask_token_id: int | None,
) -> HeadConfig:
    """The head's sizes: what was asked for, else the target's. OptionError for heads that do not divide."""
    target = teacher.config
    heads, kv_heads = options.num_attention_heads or target.num_heads, options.num_key_value_heads
    kv_heads = kv_heads or (target.num_kv_heads if options.num_attention_heads is None else heads)
    head_dim = options.head_dim or target.head_dim
    if heads % kv_heads:
        raise OptionError(f"num_key_value_heads {kv_heads} does not divide {heads} attention heads")
    if head_dim % 2:
        raise OptionError(f"head_dim must be even to be rotated: {head_dim}")
    layer_type = options.layer_type or ("qwen3" if teacher.qk_norm else "llama")
    layer = replace(
        target,
        architecture=FAMILIES[layer_type],
        intermediate_size=options.intermediate_size or target.intermediate_size,
        num_layers=options.num_layers or method.num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
    )
    return HeadConfig(
        layout=f"speculators {method.name}",
        layer=layer,
        qk_norm=layer_type == "qwen3",
        target_hidden_size=target.hidden_size,
        draft_vocab_size=len(vocabulary.tokens),
        aux_layer_ids=teacher.aux_layer_ids,
        norm_before_residual=options.norm_before_residual,
        norm_before_fc=options.norm_before_fc,
        fc_norm=options.fc_norm,
        norm_output=options.norm_output,
        fc_bias=False,
        mask_token_id=mask_token_id,
        own_embedding=True,
        own_head=True,
    )


def _documents(
    options: TrainOptions, directory: Path, described: ModelConfig, world: World, generated: Counting | None
) -> tuple[Documents, Documents | None]:
    """What is trained on and what is evaluated on; on-policy text is generated by the first process."""
    eos = described.eos_token_ids[0] if described.eos_token_ids else None
    reader = Reader(directory, described.vocab_size, eos)
    documents = reader.read([Path(file) for file in options.data or ()])
    if options.on_policy is not None:
        path = Path(options.out or ".") / ON_POLICY
        if world.is_first and not options.resume:
            on_policy.generate(options, documents, str(world.device), path, generated)
            gc.collect()
        world.wait()
        documents = reader.read([path])
    if options.held_out is not None:
        return documents, reader.read([Path(options.held_out)])
    kept, held_out = split_held_out(documents)
    if held_out is None:
        logger.warning("there is one document only, so nothing is held out: name a file with --held-out")
    return kept, held_out


def _mask_token(options: TrainOptions, directory: Path, config: ModelConfig) -> int:
    """The token that stands where no draft is yet: the one named, or the tokenizer's own."""
    token = options.mask_token_id
    if token is not None:
        if not 0 <= token < config.vocab_size:
            raise OptionError(f"mask_token_id {token} is outside the target's vocabulary of {config.vocab_size}")
        return token
    remedy = "name a token that no text holds, such as a reserved one, with --mask-token-id"
    try:
        found: int | None = Tokenizer(directory).backend.token_to_id(MASK_TOKEN)
    except CheckpointError as error:
        raise OptionError(f"no {MASK_TOKEN} to mask with: {error}; {remedy}") from error
    if found is None or found >= config.vocab_size:
        raise OptionError(f"the target's tokenizer has no {MASK_TOKEN}: {remedy}")
    return found


def _special_tokens(directory: Path) -> list[int]:
    """Ids of the tokenizer's special tokens; none where there is no tokenizer."""
    try:
        ids: list[int] = list(Tokenizer(directory).wrapped.all_special_ids)
    except CheckpointError:
        return []
    return ids


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
