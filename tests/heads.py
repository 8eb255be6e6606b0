"""Tiny draft heads of random weights for the tiny targets of `checkpoints`, in every layout that is read."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoints import SIZES
from outrider.draft.base import TargetFacts, TargetParts
from outrider.draft.eagle import checkpoint
from outrider.draft.eagle.base import HeadDrafter
from outrider.draft.eagle.checkpoint import HeadConfig
from outrider.draft.none import NoDrafter
from outrider.draft.registry import METHODS, resolve_options
from outrider.layers.embedding import Embedding, Head
from outrider.layers.parameter import Allocator
from outrider.load.checkpoint import Checkpoint

MASK_TOKEN = 7
TAPS = [0, 1, 2]
NUM_LAYERS = 2


def head_tensors(
    parallel: bool,
    *,
    num_layers: int = NUM_LAYERS,
    draft_vocab_size: int | None = None,
    qk_norm: bool = False,
    norms: Sequence[str] = (),  # of "input_norm" and "fc_norm"
    bias: bool = False,  # of attention and fc
    **sizes: Any,
) -> dict[str, Tensor]:
    """Every tensor of a head, by the speculators layout's names. Norms are drawn too: leaving one out must show."""
    size = {**SIZES, **sizes}
    hidden, vocab, wide = size["hidden_size"], size["vocab_size"], 3 * size["hidden_size"]
    head_dim = size["head_dim"]
    query, key = size["num_attention_heads"] * head_dim, size["num_key_value_heads"] * head_dim
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> Tensor:
        return 0.15 * torch.randn(shape, generator=generator)

    def norm(width: int) -> Tensor:
        return 1 + 0.3 * torch.randn(width, generator=generator)

    own_vocab = draft_vocab_size or vocab
    tensors = {
        "embed_tokens.weight": draw(vocab, hidden),
        "fc.weight": draw(hidden, wide),
        "layers.0.hidden_norm.weight": norm(hidden),
        "norm.weight": norm(hidden),
        "lm_head.weight": draw(own_vocab, hidden),
    }
    for index in range(num_layers):
        layer, width = f"layers.{index}.", hidden if index else 2 * hidden
        tensors |= {
            f"{layer}input_layernorm.weight": norm(hidden),
            f"{layer}self_attn.q_proj.weight": draw(query, width),
            f"{layer}self_attn.k_proj.weight": draw(key, width),
            f"{layer}self_attn.v_proj.weight": draw(key, width),
            f"{layer}self_attn.o_proj.weight": draw(hidden, query),
            f"{layer}post_attention_layernorm.weight": norm(hidden),
            f"{layer}mlp.gate_proj.weight": draw(size["intermediate_size"], hidden),
            f"{layer}mlp.up_proj.weight": draw(size["intermediate_size"], hidden),
            f"{layer}mlp.down_proj.weight": draw(hidden, size["intermediate_size"]),
        }
        if qk_norm:
            tensors |= {f"{layer}self_attn.{part}_norm.weight": norm(head_dim) for part in "qk"}
        if bias:
            widths = {"q": query, "k": key, "v": key, "o": hidden}
            tensors |= {f"{layer}self_attn.{part}_proj.bias": draw(width) for part, width in widths.items()}
    if bias:
        tensors["fc.bias"] = draw(hidden)
    if "input_norm" in norms:
        tensors["input_norm.weight"] = norm(wide)
    if "fc_norm" in norms:
        tensors |= {f"fc_norm.{tap}.weight": norm(hidden) for tap in range(3)}
    if own_vocab != vocab:
        ids = torch.randperm(vocab, generator=generator)[:own_vocab].sort().values
        marked = torch.zeros(vocab, dtype=torch.bool)
        marked[ids] = True
        tensors |= {"d2t": ids - torch.arange(own_vocab), "t2d": marked}
    if parallel:
        tensors["mask_hidden"] = draw(1, 1, wide)
    return tensors


def layer_config(num_layers: int, qk_norm: bool, **sizes: Any) -> dict[str, Any]:
    """The draft layers' own config, as transformers would write it."""
    size = {**SIZES, **sizes}
    kept = {name: value for name, value in size.items() if not name.endswith("token_id")}
    return {
        **kept,
        "num_hidden_layers": num_layers,
        "model_type": "qwen3" if qk_norm else "llama",
        "rms_norm_eps": 1e-6,
    }


def speculators_config(parallel: bool, layer: dict[str, Any], draft_vocab_size: int) -> dict[str, Any]:
    """As the speculators library writes it: the draft layers' config nested."""
    return {
        "speculators_model_type": "peagle" if parallel else "eagle3",
        "architectures": ["PEagleSpeculator" if parallel else "Eagle3Speculator"],
        "transformer_layer_config": layer,
        "draft_vocab_size": draft_vocab_size,
        "target_hidden_size": layer["hidden_size"],
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": TAPS,
        "mask_token_id": MASK_TOKEN if parallel else None,
    }


def flat_config(parallel: bool, layer: dict[str, Any], draft_vocab_size: int) -> dict[str, Any]:
    """A llama config with more keys in it: SafeAILab's EAGLE-3, and AWS's P-EAGLE with its name for the mask token."""
    return {
        **layer,
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": draft_vocab_size,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": TAPS},
        "ptd_token_id": MASK_TOKEN if parallel else None,
    }


def nemo_config(parallel: bool, layer: dict[str, Any], draft_vocab_size: int) -> dict[str, Any]:
    """The flat one, with the flag."""
    flat = flat_config(parallel, layer, draft_vocab_size)
    return {**flat, "ptd_token_id": None, "parallel_drafting": parallel, "mask_token_id": MASK_TOKEN}


def rope_parameters(parallel: bool, layer: dict[str, Any], draft_vocab_size: int) -> dict[str, Any]:
    """The nested one as transformers 5 writes rotary embedding."""
    given = dict(layer)
    rope = {"rope_type": "default", "rope_theta": given.pop("rope_theta", 10_000.0)}
    return speculators_config(parallel, given | {"rope_parameters": rope}, draft_vocab_size)


def midlayer(name: str) -> str:
    """SafeAILab's and AWS's name of a tensor: the first layer has one of its own."""
    return name.replace("layers.0.", "midlayer.")


def prefixed(name: str) -> str:
    """NeMo's name of a tensor."""
    return name if name.startswith(("lm_head", "d2t", "t2d")) else f"model.{name}"


class Layout(NamedTuple):
    """How one publisher writes a head."""

    config: Callable[[bool, dict[str, Any], int], dict[str, Any]]
    name: Callable[[str], str] = lambda name: name
    pickled: bool = False


LAYOUTS = {
    "speculators": Layout(speculators_config),
    "speculators-rope": Layout(rope_parameters),
    "flat": Layout(flat_config, midlayer),
    "flat-pickled": Layout(flat_config, midlayer, pickled=True),
    "nemo": Layout(nemo_config, prefixed),
}


def write_head(
    path: Path,
    parallel: bool,
    *,
    layout: str = "speculators",
    num_layers: int = NUM_LAYERS,
    draft_vocab_size: int | None = None,
    qk_norm: bool = False,
    norms: Sequence[str] = (),
    bias: bool = False,
    layer: dict[str, Any] | None = None,  # of the draft layers' config, what to say otherwise
    config: dict[str, Any] | None = None,  # what to say otherwise; None leaves a key out
    tensors: dict[str, Tensor | None] | None = None,  # what to hold otherwise; None leaves one out
    sizes: dict[str, Any] | None = None,  # of target and head, where not those of `checkpoints`
) -> Path:
    """A head, in the speculators layout unless told otherwise."""
    size, publisher = {**SIZES, **(sizes or {})}, LAYOUTS[layout]
    drawn = head_tensors(
        parallel,
        num_layers=num_layers,
        draft_vocab_size=draft_vocab_size,
        qk_norm=qk_norm,
        norms=norms,
        bias=bias,
        **(sizes or {}),
    )
    described = layer_config(num_layers, qk_norm, **(sizes or {})) | {"attention_bias": bias} | (layer or {})
    said = publisher.config(parallel, described, draft_vocab_size or size["vocab_size"]) | (config or {})
    held = {name: tensor for name, tensor in {**drawn, **(tensors or {})}.items() if tensor is not None}
    named = {publisher.name(name): tensor for name, tensor in held.items()}
    path.mkdir(parents=True, exist_ok=True)
    if publisher.pickled:
        torch.save(named, path / "pytorch_model.bin")
    else:
        save_file(named, path / "model.safetensors")
    kept = {name: value for name, value in said.items() if value is not None}
    (path / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    return path


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="outrider-heads-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def tiny_head(parallel: bool) -> str:
    """The directory of a head for the tiny Qwen3 and Llama, written once a process."""
    return str(write_head(_folder() / f"parallel-{parallel}", parallel))


def read_head(path: Path) -> HeadConfig:
    """What a head's directory says it is."""
    return checkpoint.read_head(Checkpoint.open(path))


def vocabulary_map(path: Path, config: HeadConfig) -> Tensor | None:
    """The target's token for each of the head's own."""
    return checkpoint.vocabulary_map(Checkpoint.open(path), config)


def standalone(
    method: type[HeadDrafter], directory: Path, facts: TargetFacts, num_blocks: int, **options: Any
) -> HeadDrafter:
    """The drafter of a head written to `directory`, ready to propose without an engine: it borrows nothing."""
    _, resolved = resolve_options(method, {"model": str(directory), **options})
    drafter = method(resolved, facts)
    allocator = Allocator.on(facts.device, facts.dtype)
    embedding = Embedding(facts.vocab_size, facts.hidden_size, allocator)
    parts = TargetParts(embedding, Head(facts.vocab_size, facts.hidden_size, allocator, embedding))
    caches = [layout.allocate(num_blocks, facts.device) for layout in drafter.cache_layouts()]
    drafter.prepare(parts, caches, None, None)
    return drafter


def drafting(method: str, num_drafts: int = 3) -> dict[str, Any]:
    """`speculative_config` of a method, with a tiny head if it reads one."""
    if method == NoDrafter.name:
        return {"method": method}
    config: dict[str, Any] = {"method": method, "num_speculative_tokens": num_drafts}
    drafter = METHODS[method]
    return {**config, "model": tiny_head(drafter.parallel)} if issubclass(drafter, HeadDrafter) else config
