"""One layer of a pre-norm decoder with grouped-query attention and a gated MLP, in one launch on a CPU.

x [T, H] is the block before's output, not yet added to the residual stream, or None for the first layer; residual
[T, H] is updated in place. Returns this layer's MLP output [T, H], not yet added: the hidden state after the layer is
residual + what is returned. Without input_norm x [T, I] is what q, k and v are made of, normed already, and nothing is
added to the residual stream before: so a draft head's first layer reads more than the stream. A kernel may add all to
the residual stream itself and return None, nothing left to add. qkv, qkv_bias, out,
gate_up and down are weights as `linear` takes them; input_norm and post_norm as `rms_norm`; the other arguments as
`rope_store` and `paged_attention` take them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from outrider.kernels import activation, attention, linear, norm, rope
from outrider.kernels.layer_by_ops import Attend, BoundLayer, GatedMlp, LayerOps, LayerParameters, LayersByOps
from outrider.kernels.op import Example, Op
from outrider.kernels.records import HeadNorms, LayerStack, LayerWeights
from outrider.tensors import PagedRows

On = Callable[[Op[..., Any]], Callable[..., Any]]
"""Which implementation of an op to take."""


def layer_ops(on: On, multiply: Callable[[Tensor, Any, Tensor | None], Tensor] | None = None) -> LayerOps:
    """The smaller ops for weights that are tensors, or for those that `multiply` understands.

    They write the residual stream in place.
    """
    product = multiply or on(linear.LINEAR)
    rms_norm, add_rms_norm = on(norm.RMS_NORM), on(norm.ADD_RMS_NORM)

    def project(x: Tensor, weight: Any, bias: Tensor | None, residual: Tensor) -> Tensor:
        return product(x, weight, bias)

    def normalise(x: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed = rms_norm(residual, weight, eps) if x is None else add_rms_norm(x, residual, weight, eps)
        return residual, normed

    return LayerOps(product, project, normalise, on(activation.SILU_MUL))


def attend_by_ops(on: On) -> Attend:
    """Attention over the paged cache in two ops."""
    rope_store, paged_attention = on(rope.ROPE_STORE), on(attention.PAGED_ATTENTION)

    def attend(heads: Tensor, layer: BoundLayer, rope: Tensor, rows: PagedRows) -> Tensor:
        norms = HeadNorms(layer.parameters.q_norm, layer.parameters.k_norm, layer.eps)
        query = rope_store(heads, norms, rope, rows, *layer.cache)
        mixed: Tensor = paged_attention(query, *layer.cache, rows, layer.scale)
        return mixed.flatten(1)

    return attend


def bind(weights: LayerWeights, cache: tuple[Tensor, Tensor], eps: float, scale: float) -> BoundLayer:
    """A layer of dense weights with its cache."""
    _, _, _, _, _, out, post_norm, gate_up, down = weights
    parameters = LayerParameters(*weights[:5], out, None, post_norm)
    return BoundLayer(parameters, GatedMlp(gate_up, None, down, None), cache, eps, scale)


def layers_by_ops(
    on: On,
    layers: Sequence[LayerWeights],
    caches: Sequence[tuple[Tensor, Tensor]],  # keys and values
    eps: float,
    scale: float,
) -> LayersByOps:
    """Layers of dense weights as sequences of ops, each as `on` gives it."""
    bound = [bind(weights, cache, eps, scale) for weights, cache in zip(layers, caches, strict=True)]
    return LayersByOps(bound, layer_ops(on), attend_by_ops(on))


def decoder_layer_reference(
    x: Tensor | None,
    residual: Tensor,
    weights: LayerWeights,
    eps: float,
    rope: Tensor,
    rows: PagedRows,
    key_cache: Tensor,
    value_cache: Tensor,
    scale: float,
) -> Tensor | None:
    layer = layers_by_ops(lambda op: op.reference, [weights], [(key_cache, value_cache)], eps, scale)
    return layer(0, 1, x, residual, rope, rows)


def _examples(generator: torch.Generator, device: torch.device, wide: bool) -> Iterator[Example]:
    shapes = (
        (96, 160, 4, 2, 64, torch.bfloat16),
        (64, 67, 4, 4, 64, torch.float32),
        (128, 96, 8, 2, 32, torch.bfloat16),
        (64, 72, 2, 1, 80, torch.bfloat16),
        (64, 96, 3, 1, 128, torch.float32),
    )
    for hidden, width, num_heads, num_kv_heads, head_dim, dtype in shapes:
        activation_type = torch.float32 if wide else dtype

        def draw(*shape: int, dtype: torch.dtype = dtype, centre: float = 0.0, spread: float = 1.0) -> Tensor:
            return (centre + spread * torch.randn(shape, generator=generator)).to(device, dtype)

        for lengths in (((1, 30),), ((1, 17), (5, 21), (2, 530)), ((40, 40), (1, 3))):
            tokens = sum(count for count, _ in lengths)
            heads = (num_heads + 2 * num_kv_heads) * head_dim
            starts = torch.tensor([0, *(count for count, _ in lengths)]).cumsum(0)
            blocks = [-(-length // 16) for _, length in lengths]
            table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
            position: list[int] = []
            slot: list[int] = []
            for row, (count, length) in enumerate(lengths):
                table[row, : blocks[row]] = torch.arange(blocks[row]) + sum(blocks[:row])
                position += range(length - count, length)
                slot += [sum(blocks[:row]) * 16 + place for place in range(length - count, length)]
            angles = torch.rand(max(position) + 1, head_dim // 2, generator=generator) * 7
            rows = PagedRows(
                positions=torch.tensor(position, device=device),
                cache_slot=torch.tensor(slot, device=device),
                block_table=table.to(device),
                query_start=starts.to(device, torch.int32),
                seq_lens=torch.tensor([length for _, length in lengths], device=device, dtype=torch.int32),
            )
            example: dict[str, Any] = {
                "x": draw(tokens, hidden, dtype=activation_type) if width != 67 else None,
                "residual": draw(tokens, hidden, dtype=activation_type),
                "weights": LayerWeights(
                    input_norm=draw(hidden, centre=1.0),
                    qkv=draw(heads, hidden, spread=hidden**-0.5),
                    qkv_bias=draw(heads) if width == 96 else None,
                    q_norm=None if width == 96 else draw(head_dim, centre=1.0),
                    k_norm=None if width == 96 else draw(head_dim, centre=1.0),
                    out=draw(hidden, num_heads * head_dim, spread=hidden**-0.5),
                    post_norm=draw(hidden, centre=1.0),
                    gate_up=draw(2 * width, hidden, spread=hidden**-0.5),
                    down=draw(hidden, width, spread=width**-0.5),
                ),
                "eps": 1e-6,
                "rope": torch.cat((angles.cos(), angles.sin()), dim=-1).to(device),
                "rows": rows,
                "key_cache": draw(sum(blocks), num_kv_heads, 16, head_dim),
                "value_cache": draw(sum(blocks), num_kv_heads, 16, head_dim),
                "scale": head_dim**-0.5,
            }
            yield example
            if width == 160:
                joined = draw(tokens, 2 * hidden, dtype=activation_type)
                wide_qkv = draw(heads, 2 * hidden, spread=hidden**-0.5)
                yield {**example, "x": joined, "weights": example["weights"]._replace(input_norm=None, qkv=wide_qkv)}


DECODER_LAYER = Op(
    "decoder_layer",
    decoder_layer_reference,
    examples=_examples,
    outputs=("residual", "key_cache", "value_cache"),
    tolerance=1e-3,
    narrow=2e-2,
    why="four products deep, a key between two bfloat16 may be rounded to either, and the interpreter cuts some off",
)


def layer_stack(
    layers: Sequence[LayerWeights], caches: Sequence[tuple[Tensor, Tensor]], eps: float, scale: float
) -> LayerStack:
    """Layers with their caches of keys and values as the stack of the device that they are on."""
    file = DECODER_LAYER.module(caches[0][0].device.type)
    stack: LayerStack = file.DeviceLayerStack(layers, caches, eps, scale)
    return stack
