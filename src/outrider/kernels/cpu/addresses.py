"""Records of addresses and sizes, as kernels take them: numba knows no tensors."""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from outrider.kernels.cpu.emit import CACHES, KIND, LANES
from outrider.kernels.records import HeadNorms
from outrider.tensors import PagedRows, Slots


class Rows(NamedTuple):
    """`PagedRows`."""

    positions: int
    cache_slot: int
    block_table: int
    query_start: int
    seq_lens: int
    num_tokens: int
    num_rows: int
    max_blocks: int


class Heads(NamedTuple):
    """The shape of attention and of its cache."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    cache_kind: int


class Norms(NamedTuple):
    """`HeadNorms`, 0 for none."""

    q: int
    k: int
    kind: int
    eps: float


class Product(NamedTuple):
    """A weight [outputs, inputs] and a bias [outputs], 0 for none, of a stored kind."""

    weight: int
    bias: int
    inputs: int
    outputs: int
    kind: int


class SlotTables(NamedTuple):
    """Of `Slots`, what says which tokens a request has and where they lie."""

    tokens: int
    length: int
    computed: int
    block_table: int
    draft_tokens: int
    num_slots: int
    max_len: int
    max_blocks: int
    num_drafts: int


def address(tensor: Tensor | None) -> int:
    """Where a tensor lies, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def rows_of(rows: PagedRows) -> Rows:
    """The record of a step's rows."""
    positions, cache_slot, block_table, query_start, seq_lens = rows
    assert positions.dtype == cache_slot.dtype == torch.int64
    assert block_table.dtype == query_start.dtype == seq_lens.dtype == torch.int32
    # written out, since it is on the way of every step: a loop takes a microsecond more
    assert positions.is_contiguous() and cache_slot.is_contiguous() and block_table.is_contiguous()
    assert query_start.is_contiguous() and seq_lens.is_contiguous()
    num_rows, max_blocks = block_table.shape
    return Rows(
        positions.data_ptr(),
        cache_slot.data_ptr(),
        block_table.data_ptr(),
        query_start.data_ptr(),
        seq_lens.data_ptr(),
        positions.shape[0],
        num_rows,
        max_blocks,
    )


_slot_tables: WeakKeyDictionary[Slots, SlotTables] = WeakKeyDictionary()


def slots_of(slots: Slots) -> SlotTables:
    """The record of the slots' tables, made once: a step asks several times, and the tables stay where they are."""
    if (known := _slot_tables.get(slots)) is None:
        known = _slot_tables[slots] = _slots_of(slots)
    return known


def _slots_of(slots: Slots) -> SlotTables:
    tokens, block_table, draft_tokens = slots.tokens, slots.block_table, slots.draft_tokens
    assert tokens.is_contiguous() and block_table.is_contiguous() and draft_tokens.is_contiguous()
    num_slots, max_len = tokens.shape
    return SlotTables(
        tokens.data_ptr(),
        slots.length.data_ptr(),
        slots.computed.data_ptr(),
        block_table.data_ptr(),
        draft_tokens.data_ptr(),
        num_slots,
        max_len,
        block_table.shape[1],
        draft_tokens.shape[1],
    )


def norms_of(norms: HeadNorms) -> Norms:
    """The record of heads' norms."""
    assert (norms.q is None) == (norms.k is None)
    return Norms(address(norms.q), address(norms.k), 0 if norms.q is None else KIND[norms.q.dtype], norms.eps)


def heads_of(num_heads: int, keys: Tensor, values: Tensor) -> Heads:
    """The record of a cache that so many query heads read."""
    _, num_kv_heads, block_size, head_dim = keys.shape
    assert keys.dtype == values.dtype and keys.is_contiguous() and values.is_contiguous()
    assert KIND[keys.dtype] in CACHES, f"keys and values in {keys.dtype}"
    assert block_size % LANES == 0, f"the CPU kernel reads keys in sixteens: block_size {block_size}"
    return Heads(num_heads, num_kv_heads, head_dim, block_size, KIND[keys.dtype])
