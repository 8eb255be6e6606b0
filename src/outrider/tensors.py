"""Device records: all that one step reads and writes, and nothing that lives on the host.

Letters used in shapes, here and in every docstring of the package:
    B rows in the step     T query tokens in the step    L rows of logits in the step
    K max. drafts a row    V vocabulary                  H hidden size
    F feature width        S request slots               M blocks a slot may hold
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor


class Purpose(IntEnum):
    """What a random number is for. Part of its counter, so two purposes never share noise."""

    TARGET = 1  # the target's own token at a position
    ACCEPT = 2  # the test of a draft
    DRAFT = 3  # a drafter's guess


class PagedRows(NamedTuple):
    """The positions of a step's query tokens, and the cache blocks that hold the keys and values of their rows.

    Row b owns query tokens query_start[b]:query_start[b+1], the last of the seq_lens[b] tokens that it then holds.
    """

    positions: Tensor  # [T] int64
    cache_slot: Tensor  # [T] int64, block * block_size + offset where a token's key and value go; -1: nowhere
    block_table: Tensor  # [B, M] int32
    query_start: Tensor  # [B+1] int32
    seq_lens: Tensor  # [B] int32, this step's tokens included


@dataclass(slots=True)
class StepBatch:
    """One step's inputs.

    A row's last num_drafts[b] query tokens are drafts to verify. Rows that stop inside their
    prompt own no logits; every other row owns num_drafts[b] + 1 of them.
    """

    slot: Tensor  # [B] int64
    input_ids: Tensor  # [T] int64
    rows: PagedRows
    num_drafts: Tensor  # [B] int32
    draft_tokens: Tensor  # [B, K] int64, the slots' guesses; the first num_drafts[b] are among row b's query tokens
    logits_start: Tensor  # [B+1] int32, row b owns logits logits_start[b]:logits_start[b+1]
    logits_index: Tensor  # [L] int64, the query token each row of logits is read from
    logits_slot: Tensor  # [L] int64, the slot each row of logits belongs to
    logits_position: Tensor  # [L] int64, the position of the token each row of logits predicts


@dataclass(slots=True)
class TargetOutput:
    """What the target model computed for a step."""

    logits: Tensor  # [L, V] float32, after the step's processors, which work in place
    hidden: Tensor  # [T, H], after the final norm
    features: Tensor | None  # [T, F], the residual stream entering the drafter's auxiliary layers, side by side


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Slots:
    """Per-request device state. Every table is indexed by slot and outlives the step: written, never replaced."""

    tokens: Tensor  # [S, max_len] int64, committed tokens
    length: Tensor  # [S] int32, how many are committed
    computed: Tensor  # [S] int32, how many have their keys and values in the cache
    block_table: Tensor  # [S, M] int32
    temperature: Tensor  # [S] float32, 0 means greedy
    seed: Tensor  # [S] int64
    draft_tokens: Tensor  # [S, K] int64, the guesses to verify in the slot's next step
    draft_length: Tensor  # [S] int32, how many of them are meant
    draft_logits: Tensor | None  # [S, K, V] float32, kept only for a drafter that gives them


@dataclass(slots=True)
class Draft:
    """Guesses for the next tokens of each row, and the distribution they were drawn from."""

    tokens: Tensor  # [B, K] int64
    length: Tensor  # [B] int32, only the first length[b] of row b are meant
    logits: Tensor | None  # [B, K, V] float32, ready to be sampled from; None: each guess is a point mass


@dataclass(slots=True)
class Verdict:
    """What the verifier decided. tokens[b, :count[b]] is what row b gains this step."""

    tokens: Tensor  # [B, K+1] int64, accepted drafts, then one of the target's own, then -1
    count: Tensor  # [B] int32, from 1 to K+1; 0 where the row stopped inside its prompt
    invalid: Tensor  # [B] bool, whether the last of them is none: its logits hold NaN, +inf, or nothing but -inf


class Column(NamedTuple):
    """Values that a step reports to the host beside its tokens."""

    name: str
    width: int  # values a token
    dtype: torch.dtype  # int32, int64 or float32
