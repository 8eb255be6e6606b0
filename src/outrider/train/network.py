"""The drafter's own head network with parameters that are trained: its state_dict is the checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from outrider.draft.eagle.checkpoint import HeadConfig
from outrider.draft.eagle.network import HeadNetwork
from outrider.layers.weight import TensorSlot
from outrider.train.functional import compiler, rms_norm
from outrider.train.layer import Layer, after, before
from outrider.train.teacher import Teacher
from outrider.train.vocabulary import DraftVocabulary
from outrider.train.weight import TrainingAllocator

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Layer, q [B, Hq, N, D], k and v [B, Hkv, N, D] -> [B, Hq, N, D]."""

ORDER = ("mask_hidden", "embed_tokens", "input_norm", "fc_norm", "fc", "layers", "norm", "lm_head")
"""In which parameters are drawn and kept by the optimizer; checkpoints of interrupted runs depend on it."""


class Folder(nn.Module):
    """A part of a parameter's name."""

    weight: nn.Parameter


class Head(nn.Module):
    """A draft head, called piecewise, since the methods differ in what they feed it.

    `embed` and `project` make the first layer's inputs, `run` the last layer's stream, `norm_output` what logits are
    read off by `lm_head`.
    """

    embed_tokens: Folder
    lm_head: Folder
    mask_hidden: Tensor | None
    d2t: Tensor  # [draft V] int64, target token = draft token + d2t
    t2d: Tensor  # [V] bool

    def __init__(self, config: HeadConfig, vocabulary: DraftVocabulary, compiled: bool = False) -> None:
        """Weights are NaN until `initialise`. A parallel head has a hidden state for rows without a feature."""
        super().__init__()
        self.config = config
        self.network = HeadNetwork(config, 1, TrainingAllocator.new())
        slots = self.network.slots()
        for name in sorted(slots, key=lambda name: ORDER.index(name.partition(".")[0])):
            slot = slots[name]
            assert isinstance(slot, TensorSlot) and isinstance(slot.tensor, nn.Parameter)
            _register(self, name.split("."), slot.tensor)
        if not config.parallel:
            self.mask_hidden = None
        self.register_buffer("d2t", vocabulary.offset)
        self.register_buffer("t2d", vocabulary.contains)
        self._layers = [Layer.of(layer) for layer in self.network.layers]
        wrap = compiler(compiled)
        self._join, self._before, self._after = wrap(_join), wrap(before), wrap(after)

    def initialise(self, teacher: Teacher, vocabulary: DraftVocabulary, seed: int) -> None:
        """Random matrices from a seed; embedding, final norm and lm_head are the target's. Call it on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() > 1:
                    last = name.endswith(("o_proj.weight", "down_proj.weight"))
                    scale = (2 * len(self._layers)) ** -0.5 if last else 1
                    std = 1.0 if name == "mask_hidden" else 0.02 * scale
                    parameter.normal_(0.0, std, generator=generator)
                else:
                    parameter.fill_(1.0)
            self.embed_tokens.weight.copy_(teacher.embedding)
            self.network.norm.weight.copy_(teacher.norm)
            self.lm_head.weight.copy_(teacher.head.cpu()[vocabulary.tokens])

    def embed(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """[...] int64 of the target's tokens -> [..., H]."""
        return F.embedding(tokens, self.embed_tokens.weight).to(dtype)

    def project(self, features: Tensor) -> Tensor:
        """[B, N, 3H] -> [B, N, H]."""
        return self.network.project(features)

    def norm_output(self, x: Tensor) -> Tensor:
        """[B, N, H] -> [B, N, H], the final norm."""
        return self.network.norm(x)

    def run(self, embeds: Tensor, hidden: Tensor, angles: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """[B, N, H] embeddings and projected features -> [B, N, H] after the last layer, not normed."""
        first = self.network.layers[0]
        assert first.hidden_norm is not None
        norms = first.input_norm.weight, first.hidden_norm.weight, first.hidden_norm.eps
        x: Tensor | None
        residual: Tensor
        x, residual = self._join(embeds, hidden, *norms, self.config.norm_before_residual)
        for index, layer in enumerate(self._layers):
            residual, q, k, v = self._before(layer, x, residual, *angles)
            x, residual = None, self._after(layer, attend(index, q, k, v), residual)
        return residual


def _join(
    embeds: Tensor, hidden: Tensor, token_norm: Tensor, hidden_norm: Tensor, eps: float, norm_before_residual: bool
) -> tuple[Tensor, Tensor]:
    """What the first layer reads [B, N, 2H], and the residual stream [B, N, H]: `kernels.join_input` for autograd."""
    normed = rms_norm(hidden, hidden_norm, eps)
    joined = torch.cat((rms_norm(embeds, token_norm, eps), normed), dim=-1)
    return joined, normed if norm_before_residual else hidden


def _register(module: nn.Module, path: list[str], parameter: nn.Parameter) -> None:
    """Gives the parameter the name that its path spells."""
    *folders, name = path
    for folder in folders:
        if not hasattr(module, folder):
            module.add_module(folder, Folder())
        module = getattr(module, folder)
    module.register_parameter(name, parameter)
