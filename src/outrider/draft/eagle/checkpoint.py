"""Draft heads of the EAGLE-3 family as they are published, normalised to one record.

Three layouts are read. What a checkpoint holds says which it is:

- speculators (`speculators_model_type` eagle3 or peagle): the draft layers' config nested under
  `transformer_layer_config`, tensors `layers.{i}.*`, `d2t` and `t2d`; P-EAGLE adds `mask_hidden` and `mask_token_id`;
- EAGLE-3 (SafeAILab, yuhuili): a flat llama config with `draft_vocab_size`, the one layer named `midlayer`, often
  `pytorch_model.bin`, mostly without an embedding;
- P-EAGLE as AWS publishes it: the same with `mask_hidden`, `ptd_token_id` and further `layers.1` to `layers.3`.

Whatever differs between them is settled here and nowhere else.
In all three an auxiliary layer id names the residual stream ENTERING that layer.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from outrider.core.reading import Reader, written_short
from outrider.errors import CheckpointError, shortened
from outrider.load.checkpoint import Checkpoint
from outrider.models.config import ModelConfig

logger = logging.getLogger("outrider")

SPECULATORS = {"eagle3": False, "peagle": True}
"""The `speculators_model_type` of the family's heads, and whether such a head drafts in parallel."""

MASK_TOKEN_KEYS = ("mask_token_id", "dspark_noise_token_id", "pard_token", "ptd_token_id")
"""Keys under which configs name the mask token, in the order they are looked up."""

NUM_DEFAULT_AUX_LAYERS = 3
"""Auxiliary layers of a head whose config names none: EAGLE-3's early, middle and late layer."""


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """A draft head, whichever layout it was published in."""

    layout: str
    """Where it comes from, as a message names it."""
    layer: ModelConfig
    """Sizes of the draft layers; `vocab_size` is the target's."""
    qk_norm: bool
    target_hidden_size: int
    draft_vocab_size: int
    aux_layer_ids: tuple[int, ...] | None
    """Target layers whose input it reads; None: EAGLE-3's default."""
    norm_before_residual: bool
    """Whether the first layer's residual is its normed input."""
    norm_before_fc: bool
    """Whether one norm over all auxiliary hidden states precedes the projection `fc`."""
    fc_norm: bool
    """Whether each auxiliary hidden state has a norm of its own (EAGLE-3.1)."""
    norm_output: bool
    """Whether the next step of a sequence is fed the normed output (EAGLE-3.1)."""
    fc_bias: bool
    mask_token_id: int | None
    """The token of the mask rows; None: the head drafts one token after another."""
    own_embedding: bool
    """False: the target's embedding is used."""
    own_head: bool
    shift: int = 1
    """How many positions the token of a row is ahead of the hidden state beside it."""
    fc_input_size: int | None = None
    """Columns of `fc.weight` as the file has it; None: the file is not there."""

    @property
    def parallel(self) -> bool:
        """Whether all drafts come out of one pass (P-EAGLE), or one after another (EAGLE-3)."""
        return self.mask_token_id is not None

    @property
    def num_aux_layers(self) -> int:
        """How many auxiliary hidden states lie side by side in the input of `fc`."""
        return NUM_DEFAULT_AUX_LAYERS if self.aux_layer_ids is None else len(self.aux_layer_ids)

    def aux_layers(self, num_target_layers: int) -> tuple[int, ...]:
        """The auxiliary layers on a target of `num_target_layers`. CheckpointError if it has fewer."""
        layers = self.aux_layer_ids
        if layers is None:
            layers = default_aux_layers(num_target_layers)
        wrong = [layer for layer in layers if not 0 <= layer <= num_target_layers]
        if wrong:
            raise CheckpointError(
                f"the draft head reads layer {wrong[0]} of a target that has {num_target_layers}, by "
                "eagle_aux_hidden_state_layer_ids in its config.json: it was made for another target"
            )
        return layers


def default_aux_layers(num_target_layers: int) -> tuple[int, ...]:
    """EAGLE-3's choice: an early, a middle and a late layer."""
    return (2, num_target_layers // 2, num_target_layers - 3)


def head_type(checkpoint: Checkpoint) -> bool | None:
    """Whether a checkpoint of this family drafts in parallel; None: it is not of this family.

    Raises CheckpointError if it is, but incomplete, or if its config and its tensors contradict each other.
    """
    config, said = checkpoint.config, Reader(checkpoint.config, f"{checkpoint.directory}/config.json")
    kind = said.text("speculators_model_type") if said.has("speculators_model_type") else None
    if kind is not None and kind not in SPECULATORS:
        return None
    names = {canonical(name) for name in checkpoint.tensors}
    named = any("eagle" in name.lower() for name in said.texts("architectures"))
    if kind is None and not named and "draft_vocab_size" not in config and "fc.weight" not in names:
        return None
    if kind is None and "layers.0.hidden_norm.weight" not in names:
        raise CheckpointError(
            f"{checkpoint.directory} holds no layers.0.hidden_norm.weight (or midlayer.*): it is no EAGLE-3 or P-EAGLE "
            "head (EAGLE-1 heads are not supported), or it is truncated"
        )
    return _is_parallel(checkpoint, names)


def read_head(checkpoint: Checkpoint) -> HeadConfig:
    """The head in a checkpoint of this family; reads the config, and of the tensors names and shapes.

    Raises CheckpointError if it is of a kind not supported, or if config and tensors contradict each other.
    """
    try:
        return _read_head(checkpoint)
    except CheckpointError as error:
        if str(checkpoint.directory) in str(error):
            raise
        raise CheckpointError(f"draft head {checkpoint.directory}: {error}") from error


def _read_head(checkpoint: Checkpoint) -> HeadConfig:
    config, directory = checkpoint.config, checkpoint.directory
    said = Reader(config, f"{directory}/config.json")
    parallel = head_type(checkpoint)
    if parallel is None:
        raise CheckpointError(f"{directory} is no draft head of the EAGLE family: {checkpoint.summary()}")
    kind = config.get("speculators_model_type")
    tensors = {canonical(name): info for name, info in checkpoint.tensors.items()}
    nested = config.get("transformer_layer_config") if kind is not None else config
    if not isinstance(nested, Mapping):
        raise CheckpointError(f"{directory}/config.json lacks transformer_layer_config")
    quantised = nested.get("quantization_config") or config.get("quantization_config")
    layer = ModelConfig.from_dict(
        {**nested, "architectures": [_architecture(nested)], "quantization_config": quantised} | _dtype(config, nested)
    )
    fc = tensors.get("fc.weight")
    return HeadConfig(
        layout=f"speculators {kind}" if kind is not None else ("AWS P-EAGLE" if parallel else "EAGLE-3"),
        layer=layer,
        qk_norm="layers.0.self_attn.q_norm.weight" in tensors,
        target_hidden_size=said.whole("target_hidden_size", layer.hidden_size),
        draft_vocab_size=said.whole("draft_vocab_size", layer.vocab_size),
        aux_layer_ids=_aux_layer_ids(config),
        norm_before_residual=_norm_before_residual(config, kind),
        norm_before_fc=_said_and_held(config, "norm_before_fc", "input_norm.weight", tensors),
        fc_norm=_said_and_held(config, "fc_norm", "fc_norm.0.weight", tensors),
        norm_output=bool(_flag(config, "norm_output")),
        fc_bias="fc.bias" in tensors,
        mask_token_id=_mask_token_id(config, layer.vocab_size) if parallel else None,
        own_embedding="embed_tokens.weight" in tensors,
        own_head="lm_head.weight" in tensors,
        fc_input_size=None if fc is None or fc.shape is None else fc.shape[-1],
    )


def proposed_drafts(config: Mapping[str, Any]) -> int | None:
    """K as a speculators config proposes it; None: it proposes none."""
    said = config.get("speculators_config")
    methods = said.get("proposal_methods") if isinstance(said, Mapping) else None
    first = methods[0] if isinstance(methods, list) and methods else None
    value = first.get("speculative_tokens") if isinstance(first, Mapping) else None
    return value if type(value) is int and value > 0 else None


def canonical(name: str) -> str:
    """A tensor's name as the speculators layout has it."""
    name = name.removeprefix("model.")
    return f"layers.0.{name.removeprefix('midlayer.')}" if name.startswith("midlayer.") else name


def vocabulary_map(checkpoint: Checkpoint, config: HeadConfig) -> Tensor | None:
    """[draft vocabulary] int64, the target's token for each of the head's own; None if they are the same.

    `d2t` holds offsets (target = draft + d2t[draft]); `t2d`, where there is one, must mark exactly these tokens.
    """
    directory = checkpoint.directory
    found = {canonical(name): checkpoint.read(name) for name in checkpoint.tensors if canonical(name) in ("d2t", "t2d")}
    size, vocab_size = config.draft_vocab_size, config.layer.vocab_size
    if "d2t" not in found:
        if size != vocab_size:
            raise CheckpointError(
                f"{directory} has a vocabulary of {size} for a target's of {vocab_size} and holds no d2t: "
                "which tokens it means cannot be known"
            )
        return None
    offset = found["d2t"]
    if offset.shape != (size,) or offset.is_floating_point():
        raise CheckpointError(f"d2t in {directory} must hold {size} whole numbers: {list(offset.shape)} {offset.dtype}")
    targets = torch.arange(size) + offset.long()
    if targets.min() < 0 or targets.max() >= vocab_size:
        raise CheckpointError(f"d2t in {directory} names tokens outside the target's vocabulary of {vocab_size}")
    if len(torch.unique(targets)) != size:
        raise CheckpointError(f"d2t in {directory} names a token twice: it must hold offsets from the draft's own ids")
    marked = found.get("t2d")
    if marked is not None:
        named = torch.zeros(vocab_size, dtype=torch.bool)
        named[targets] = True
        if marked.shape != named.shape or not torch.equal(marked.bool(), named):
            raise CheckpointError(f"t2d in {directory} does not mark the tokens that d2t names: one of them is wrong")
    return None if torch.equal(targets, torch.arange(vocab_size)) else targets


def dummy_vocabulary_map(config: HeadConfig) -> Tensor | None:
    """As `vocabulary_map`, for random weights: as many of the target's tokens, evenly spaced. Reads no file."""
    size, vocab_size = config.draft_vocab_size, config.layer.vocab_size
    return None if size == vocab_size else torch.arange(size) * vocab_size // size


def _architecture(layer: Mapping[str, Any]) -> str:
    kind = layer.get("model_type", "llama")
    if kind not in ("llama", "qwen3"):
        raise CheckpointError(f"draft layers of type {shortened(str(kind))} are not supported (known: llama, qwen3)")
    return str(kind)


def _dtype(config: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    dtypes = (each.get(key) for each in (layer, config) for key in ("dtype", "torch_dtype"))
    return {"dtype": next((dtype for dtype in dtypes if dtype), None)}


def _is_parallel(checkpoint: Checkpoint, names: set[str]) -> bool:
    """Config and tensors must agree: run the wrong way, a head's acceptance collapses and nothing fails."""
    config, directory = checkpoint.config, checkpoint.directory
    kind, held = config.get("speculators_model_type"), "mask_hidden" in names
    flag = _flag(config, "parallel_drafting")
    said = SPECULATORS[kind] if kind is not None else flag
    if kind is not None and flag is not None and flag != said:
        raise CheckpointError(
            f"{directory}/config.json says parallel_drafting: {flag}, but speculators_model_type: {kind}: "
            "one of them is wrong"
        )
    if said is None:
        said = held or any(config.get(key) is not None for key in MASK_TOKEN_KEYS)
    if said and not held:
        raise CheckpointError(
            f"{directory} is a P-EAGLE head by its config.json but holds no mask_hidden: it cannot draft in parallel; "
            "the checkpoint is incomplete"
        )
    if held and not said:
        raise CheckpointError(
            f"{directory} holds mask_hidden, which only a P-EAGLE head has, but its config.json says EAGLE-3: "
            "correct speculators_model_type (or parallel_drafting)"
        )
    return bool(said)


def _flag(config: Mapping[str, Any], key: str) -> bool | None:
    said = Reader(config)
    return said.flag(key, False) if said.has(key) else None


def _aux_layer_ids(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    nested = config.get("eagle_config")
    given = config.get("eagle_aux_hidden_state_layer_ids")
    if given is None and isinstance(nested, Mapping):
        given = nested.get("eagle_aux_hidden_state_layer_ids")
    if given in (None, []):
        return None
    if not isinstance(given, list) or not all(type(layer) is int for layer in given):
        raise CheckpointError(f"eagle_aux_hidden_state_layer_ids must be a list of layers: {written_short(given)}")
    return tuple(given)


def _norm_before_residual(config: Mapping[str, Any], kind: str | None) -> bool:
    """Absent means false: so speculators defaults, and so the network published with EAGLE-3 computes.

    Another engine reads a speculators head without the key as true, so that case is not passed over in silence.
    """
    said = _flag(config, "norm_before_residual")
    if said is None and kind is not None:
        logger.warning("the draft head's config.json lacks norm_before_residual: taken as false; acceptance will show")
    return bool(said)


def _said_and_held(config: Mapping[str, Any], key: str, tensor: str, tensors: Collection[str]) -> bool:
    said, held = _flag(config, key), tensor in tensors
    if said is not None and said != held:
        raise CheckpointError(f"config.json says {key}: {said}, but {tensor} is {'there' if held else 'missing'}")
    return held


def _mask_token_id(config: Mapping[str, Any], vocab_size: int) -> int:
    nested = config.get("dflash_config")
    sources = [(nested, "mask_token_id")] if isinstance(nested, Mapping) else []
    for source, key in (*sources, *((config, key) for key in MASK_TOKEN_KEYS)):
        value = source.get(key)
        if value is not None:
            token = int(value) if str(value).isdecimal() else -1
            if not 0 <= token < vocab_size:
                raise CheckpointError(
                    f"config.json: {key} is not a token of the vocabulary of {vocab_size}: {written_short(value)}"
                )
            return token
    raise CheckpointError(
        f"a P-EAGLE head must name the token that stands for unknown ones: config.json has none of "
        f"{', '.join(MASK_TOKEN_KEYS)}"
    )
