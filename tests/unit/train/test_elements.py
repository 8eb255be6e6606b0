"""Which elements are trained, what each sees, and what each is to match: against loops that spell it out."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from outrider.train.attention import BLOCK, Attention, Mask, block_mask, build_mask, join_chain
from outrider.train.data import Documents
from outrider.train.elements import Elements, drop, every_anchor, kept, label, segment_bounds
from outrider.train.packing import EMPTY, Batch, pack

CPU = torch.device("cpu")
RATE, DEPTHS = 0.8, 6


def packed(lengths: list[int], row: int, prompts: list[int] | None = None) -> Batch:
    """Documents of distinct tokens in rows."""
    start = np.concatenate(([0], np.cumsum(lengths)))
    prompt = np.array(prompts or [0] * len(lengths), dtype=np.int32)
    packing = pack(Documents(np.arange(start[-1], dtype=np.int32), start, prompt), row, seed=0, epoch=0)
    return Batch.of(packing.rows(0, len(packing)), CPU)


def sampled(batch: Batch, width: int, depths: int = DEPTHS, salt: int = 0) -> Elements:
    uniform = torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(salt))
    drafted = torch.ones_like(batch.tokens, dtype=torch.bool)
    return label(batch, drafted, drop(batch, uniform, RATE, depths, width))


def may_attend(query: tuple[int, int, int], key: tuple[int, int, int]) -> bool:
    """The rule in words: the same document; the context up to the anchor, or the element's own chain."""
    (document, anchor, depth), (key_document, key_anchor, key_depth) = query, key
    if document != key_document:
        return False
    if key_depth == 0:
        return key_anchor <= anchor
    return key_anchor == anchor and key_depth <= depth


def allowed(elements: Elements) -> Tensor:
    """[B, N, N] by brute force."""
    labels = torch.stack((elements.document, elements.anchor, elements.depth), dim=-1).tolist()
    return torch.tensor([[[may_attend(q, k) for k in row] for q in row] for row in labels])


def test_the_mask_is_the_rule() -> None:
    elements = sampled(packed([7, 20, 3, 16, 9], 32), width=8, depths=4)
    mask = build_mask(elements.document, elements.anchor, elements.depth)
    assert mask.dense is not None
    assert (mask.dense[:, 0] == allowed(elements)).all()


def test_blocks_miss_no_pair_and_whole_ones_need_no_rule() -> None:
    batch = packed([300, 40, 500, 77, 512, 120], 512)
    elements = sampled(batch, BLOCK, depths=8)
    lacking = -elements.anchor.shape[1] % BLOCK
    labels = [
        torch.nn.functional.pad(x, (0, lacking), value=dead)
        for x, dead in ((elements.document, EMPTY + 1), (elements.anchor, 0), (elements.depth, 0))
    ]
    dense = build_mask(*labels).dense
    assert dense is not None
    rows, size = len(dense), dense.shape[-1] // BLOCK
    pairs = dense.view(rows, size, BLOCK, size, BLOCK).permute(0, 1, 3, 2, 4).flatten(3)
    blocks = block_mask(*labels)
    partial, whole = torch.zeros(2, rows, size, size, dtype=torch.bool)
    for chosen, counts, indices in (
        (partial, blocks.kv_num_blocks, blocks.kv_indices),
        (whole, blocks.full_kv_num_blocks, blocks.full_kv_indices),
    ):
        for row, query in np.ndindex(rows, size):
            chosen[row, query, indices[row, 0, query, : counts[row, 0, query]].long()] = True
    assert not (pairs.any(-1) & ~partial & ~whole).any(), "a block with an allowed pair is skipped"
    assert not (whole & ~pairs.all(-1)).any(), "a block is run whole that is not"
    assert not (whole & partial).any()
    assert whole.any() and partial.sum() < 0.7 * rows * size * size, "hardly anything is skipped"


def test_flex_attention_gives_what_the_dense_mask_gives() -> None:
    """Uncompiled it runs the rule itself, by the same labels that the compiled kernel reads."""
    elements = sampled(packed([100, 28, 90], 128), BLOCK, depths=2)
    lacking = -elements.anchor.shape[1] % BLOCK
    labels = [torch.nn.functional.pad(x, (0, lacking)) for x in (elements.document, elements.anchor, elements.depth)]
    rows, size = labels[0].shape
    q, k, v = torch.randn(rows, 4, size, 16), torch.randn(rows, 2, size, 16), torch.randn(rows, 2, size, 16)
    dense = Attention(CPU)
    flex = Attention(CPU)
    flex._flex = torch.nn.attention.flex_attention.flex_attention
    masks = build_mask(*labels), Mask(None, block_mask(*labels))
    torch.testing.assert_close(flex(q, k, v, masks[1]), dense(q, k, v, masks[0]), atol=1e-5, rtol=1e-5)
    for one, other in zip(flex.with_weight(q, k, v, masks[1]), dense.with_weight(q, k, v, masks[0]), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_chains_joined_to_the_context_are_one_softmax() -> None:
    """The training-time test's attention equals plain attention over all steps under the rule."""
    batch, steps = packed([11, 5, 16], 16), 3
    place = every_anchor(batch)
    labels = [x.repeat(1, steps) for x in (batch.document, place)]
    depth = torch.arange(steps).repeat_interleave(16).expand_as(labels[0])
    rows = len(place)
    q, k, v = (torch.randn(rows, heads, 16 * steps, 8, dtype=torch.float64) for heads in (4, 2, 2))
    attention = Attention(CPU)
    expected = attention(q, k, v, build_mask(*labels, depth))
    context = build_mask(batch.document, place, torch.zeros_like(place))
    parts = [[x[:, :, 16 * step : 16 * (step + 1)] for step in range(steps)] for x in (q, k, v)]
    for step in range(1, steps):
        out, weight = attention.with_weight(parts[0][step], parts[1][0], parts[2][0], context)
        keys, values = (torch.stack(x[1 : step + 1]) for x in parts[1:])
        joined = join_chain(parts[0][step], out, weight, keys, values)
        torch.testing.assert_close(joined, expected[:, :, 16 * step : 16 * (step + 1)], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("row", "width"), [(32, 8), (32, 32), (256, BLOCK)])
def test_dropped_anchors_are_nested_and_counted(row: int, width: int) -> None:
    batch = packed([row - 5, row, 3, row // 2], row)
    anchors = drop(batch, torch.rand(batch.tokens.shape), RATE, DEPTHS, width)
    assert (anchors[0] == every_anchor(batch)).all()
    for depth, chosen in enumerate(anchors):
        assert chosen.shape[1] == row // width * kept(width, RATE, DEPTHS)[depth]
        assert chosen.shape[1] == pytest.approx(row * RATE**depth, abs=row // width)
        assert (chosen >= 0).all() and (chosen < row).all() and (chosen.diff(dim=1) > 0).all()
        for shallower, deeper in zip(anchors[depth - 1].tolist(), chosen.tolist(), strict=True):
            assert depth == 0 or set(deeper) <= set(shallower)


def test_dropping_is_by_chance_and_spares_no_place() -> None:
    batch = packed([64], 64)
    seen = torch.zeros(64)
    for salt in range(200):
        anchors = drop(batch, torch.rand(1, 64, generator=torch.Generator().manual_seed(salt)), RATE, 4, 16)
        seen[anchors[3][0]] += 1
    share = seen[:-2] / 200  # the last two have nothing to learn at that depth, and come last
    assert share.min() > 0.3 and share.max() < 0.8


def test_targets_stay_in_the_document_and_behind_the_prompt() -> None:
    prompts = [4, 0, 9, 2, 0]
    batch = packed([7, 20, 13, 16, 1], 32, prompts)
    elements = sampled(batch, 8)
    length, tokens = batch.tokens.shape[1], batch.tokens.flatten()
    starts = np.cumsum([0, 7, 20, 13, 16, 1])
    for row, index in np.ndindex(*elements.anchor.shape):
        anchor, depth = int(elements.anchor[row, index]), int(elements.depth[row, index])
        assert anchor >= 0
        if batch.document[row, anchor] == EMPTY:
            assert not elements.trained[row, index]
            continue
        token = int(batch.tokens[row, anchor])
        document = int(np.searchsorted(starts, token, side="right")) - 1
        place = token - starts[document]
        matched = place + depth + 1  # whose distribution, over the token after it
        exists = matched < starts[document + 1] - starts[document]
        assert bool(elements.trained[row, index]) == (exists and matched + 1 >= prompts[document])
        assert elements.position[row, index] == place + depth
        if elements.trained[row, index]:
            assert tokens[elements.row[row, index]] == token + depth + 1
            assert elements.row[row, index] // length == row
    assert elements.trained[elements.anchor == 0].any(), "the first place of a row is trained too"


def test_a_target_that_cannot_be_drafted_is_not_trained() -> None:
    batch = packed([32], 32)
    drafted = torch.ones_like(batch.tokens, dtype=torch.bool)
    drafted[0, 10] = False
    elements = label(batch, drafted, [every_anchor(batch)] * 3)
    lost = [(int(a), int(d)) for a, d in zip(elements.anchor[0], elements.depth[0], strict=True) if a + d + 1 == 10]
    assert len(lost) == 3
    for index, pair in enumerate(zip(elements.anchor[0].tolist(), elements.depth[0].tolist(), strict=True)):
        assert bool(elements.trained[0, index]) == (pair not in lost and sum(pair) + 1 < 32)


@pytest.mark.parametrize("num_segments", [1, 2, 3, 8])
def test_segments_hold_about_as_many_elements(num_segments: int) -> None:
    deeper, strata = 3.2, 512
    bounds = segment_bounds(strata, num_segments, deeper)
    assert bounds[0] == 0 and bounds[-1] == strata and (np.diff(bounds) > 0).all()
    sizes = [right + deeper * (right - left) for left, right in pairwise(bounds)]
    assert max(sizes) / min(sizes) < 1.05
    assert segment_bounds(4, 4, deeper) == [0, 1, 2, 3, 4]
