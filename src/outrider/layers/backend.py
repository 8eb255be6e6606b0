"""Which backend runs a model's layers: the first that declines nothing, with every reason of those passed over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, Protocol

import torch

from outrider.cache.layout import LayerCache
from outrider.capability import Feature, Gap
from outrider.kernels import op
from outrider.kernels.decoder_layer import DECODER_LAYER, layer_stack
from outrider.kernels.records import LayerStack, LayerWeights
from outrider.layers.by_ops import layers_by_ops
from outrider.layers.layer import DecoderLayer
from outrider.layers.mlp import GatedMLP, GatedMlpSpec
from outrider.layers.parameter import dense
from outrider.layers.spec import LayerFeature, LayerSpec
from outrider.layers.weight import dense_tensor

BoundLayers = tuple[int, int, LayerStack]
"""First layer, end, and these layers with the caches that they write to."""


class Backend(Protocol):
    """One way to run layers. `lacks` gives a reason, with its remedy, for each feature that it cannot do."""

    name: ClassVar[str]
    note: ClassVar[str]  # what it does differently by the size of a step
    devices: ClassVar[frozenset[str]]
    lacks: ClassVar[Mapping[LayerFeature, str]]

    @classmethod
    def bind(cls, layers: Sequence[DecoderLayer], caches: Sequence[LayerCache]) -> list[BoundLayers]:
        """The layers on a cache, one stack for each run of them. Parameters may be written afterwards, not replaced."""


def declines(backend: type[Backend], specs: Sequence[LayerSpec], device: torch.device) -> list[Gap]:
    """Why a backend cannot run these layers on a device; nothing if it can."""
    if backend is not ByOps and DECODER_LAYER.on(device) is DECODER_LAYER.reference:
        feature, remedy = (
            (Feature.OLD_CUDA, "it takes a GPU of compute capability 8.0 or higher")
            if op.HAS_TRITON
            else (Feature.WITHOUT_TRITON, "pip install triton")
        )
        return [Gap(f"device {device}", feature, f"{backend.name} has no kernel for it; {remedy}")]
    needed = {feature: part for spec in specs for feature, part in needs(spec).items()}
    return [
        Gap(part, feature, backend.lacks[feature])
        for feature, part in sorted(needed.items(), key=lambda entry: entry[0].name)
        if feature in backend.lacks
    ]


def needs(spec: LayerSpec) -> dict[LayerFeature, str]:
    """What a layer needs of a backend, and the part of it that does."""
    found = {}
    if spec.attention.out_bias:
        found[LayerFeature.OUT_BIAS] = "attention"
    # A subclass may compute something else, so the type must be this one.
    if type(spec.mlp) is not GatedMlpSpec:
        found[LayerFeature.OTHER_MLP] = type(spec.mlp).__name__
    elif spec.mlp.bias:
        found[LayerFeature.MLP_BIAS] = "mlp"
    if spec.form not in (None, dense):
        found[LayerFeature.OTHER_WEIGHTS] = getattr(spec.form, "__name__", "weights")
    return found


class ByOps:
    """Each layer as a sequence of ops. It runs any layer, on any device."""

    name: ClassVar[str] = "by_ops"
    note: ClassVar[str] = "several calls a layer"
    devices: ClassVar[frozenset[str]] = frozenset({"cpu", "cuda"})
    lacks: ClassVar[Mapping[LayerFeature, str]] = {}

    @classmethod
    def bind(cls, layers: Sequence[DecoderLayer], caches: Sequence[LayerCache]) -> list[BoundLayers]:
        return [(0, len(layers), layers_by_ops(layers, caches))]


class _Fused:
    """What the fused backends share: layers of one shape behind one another are one call."""

    lacks: ClassVar[Mapping[LayerFeature, str]] = {
        LayerFeature.OUT_BIAS: "its kernel adds no bias to attention's output; layers without one run fused",
        LayerFeature.MLP_BIAS: "its kernel adds no biases in the MLP; layers without them run fused",
        LayerFeature.OTHER_MLP: "its kernel knows the gated MLP with silu only; other MLPs run by ops",
        LayerFeature.OTHER_WEIGHTS: "its kernel multiplies with dense matrices only; other forms run by ops",
    }

    @classmethod
    def bind(cls, layers: Sequence[DecoderLayer], caches: Sequence[LayerCache]) -> list[BoundLayers]:
        return list(_kernel_stacks(layers, caches))


class FusedCpu(_Fused):
    """All layers in one launch of a compiled kernel."""

    name: ClassVar[str] = "fused_cpu"
    note: ClassVar[str] = (
        "all layers in one launch; steps of many tokens run by ops where the matrix unit does not serve every product"
    )
    devices: ClassVar[frozenset[str]] = frozenset({"cpu"})


class FusedGpu(_Fused):
    """Five to seven Triton kernels a layer for few tokens; cuBLAS and the smaller ops for many."""

    name: ClassVar[str] = "fused_gpu"
    note: ClassVar[str] = "five to seven kernels a layer for few tokens; steps of many tokens run by ops with cuBLAS"
    devices: ClassVar[frozenset[str]] = frozenset({"cuda"})


def _kernel_stacks(layers: Sequence[DecoderLayer], caches: Sequence[LayerCache]) -> Iterator[BoundLayers]:
    """A stack for each run of layers of one shape."""
    start = 0
    for spec, group in groupby(layers, key=lambda layer: layer.spec):
        weights = [_fused_weights(layer) for layer in group]
        end = start + len(weights)
        yield start, end, layer_stack(weights, caches[start:end], spec.eps, spec.attention.scale)
        start = end


def _fused_weights(layer: DecoderLayer) -> LayerWeights:
    """A layer's parameters as the kernels take them, which know no biases but those of q, k and v."""
    given, mlp = layer.parameters(), layer.mlp
    assert given.out_bias is None and isinstance(mlp, GatedMLP) and mlp.down.bias is None
    qkv, out, gate_up, down = (
        dense_tensor(weight) for weight in (given.qkv, given.out, mlp.gate_up.weight, mlp.down.weight)
    )
    norms = given.q_norm, given.k_norm
    return LayerWeights(given.input_norm, qkv, given.qkv_bias, *norms, out, given.post_norm, gate_up, down)


BACKENDS: tuple[type[Backend], ...] = (FusedCpu, FusedGpu, ByOps)
"""Fastest first; the last declines nothing."""


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """The backend taken for a model's layers, and why not the faster ones of the device."""

    backend: type[Backend]
    passed_over: tuple[tuple[type[Backend], Gap], ...] = ()

    def reasons(self) -> list[str]:
        """A sentence for each reason against a faster backend."""
        return [f"not {backend.name}: {gap}" for backend, gap in self.passed_over]

    def to_dict(self) -> dict[str, Any]:
        """As `explain --json` prints it."""
        return {
            "backend": self.backend.name,
            "note": self.backend.note,
            "passed_over": [
                {"backend": backend.name, "part": gap.part, "feature": gap.feature.name.lower(), "reason": gap.reason}
                for backend, gap in self.passed_over
            ],
        }


def choose_backend(specs: Sequence[LayerSpec], device: torch.device) -> LayerChoice:
    """The first backend of the device that declines nothing."""
    passed_over: list[tuple[type[Backend], Gap]] = []
    for backend in BACKENDS:
        if device.type in backend.devices:
            gaps = declines(backend, specs, device)
            if not gaps:
                return LayerChoice(backend, tuple(passed_over))
            passed_over += [(backend, gap) for gap in gaps]
    return LayerChoice(ByOps, tuple(passed_over))
