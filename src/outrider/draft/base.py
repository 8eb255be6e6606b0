"""The contract between a drafter and whatever runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from outrider.cache.layout import CacheLayout, LayerCache
from outrider.capability import Feature, Part
from outrider.core.option import option
from outrider.draft.eagle.checkpoint import HeadConfig
from outrider.errors import OptionError
from outrider.layers.embedding import Embedding, Head
from outrider.layers.spec import LayerSpec
from outrider.tensors import Draft, Purpose, Slots, StepBatch, TargetOutput

MAX_DRAFTS = 32
"""Most tokens a round may draft: beyond it verification costs more than any acceptance returns."""


@dataclass(frozen=True, slots=True)
class DraftOptions:
    """What every method can be told. A method with more to tell extends this record in its own file."""

    num_speculative_tokens: int = option(4, "tokens to draft a round (K)")

    def __post_init__(self) -> None:
        self.check_whole("num_speculative_tokens", 1, MAX_DRAFTS)

    def check_whole(self, name: str, least: int, most: int | None = None) -> None:
        """OptionError unless the option is a whole number within bounds."""
        value = getattr(self, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < least or (most is not None and value > most):
            bounds = f"{least} or more" if most is None else f"from {least} to {most}"
            raise OptionError(f"{name} must be a whole number, {bounds}: {value!r}")


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """What a drafter may know of the model it drafts for when it is built."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int  # tokens a key/value block holds
    device: torch.device
    dtype: torch.dtype  # of the weights


@dataclass(frozen=True, slots=True)
class TargetParts:
    """What a drafter may borrow of the loaded target."""

    embedding: Embedding
    head: Head


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a drafter will hold on the device, in bytes, told before any of it is made."""

    weights: int = 0
    per_block: int = 0  # of its own keys and values, in each block of the cache
    workspace: int = 0
    weights_read: int = 0  # of the weights, what drafting one round reads: those of K passes are counted K times
    layers: tuple[LayerSpec, ...] = ()  # its decoder layers, for the choice of what runs them


@dataclass(slots=True)
class DraftContext:
    """All a drafter may look at. Read-only: a drafter writes only state of its own."""

    batch: StepBatch  # what the target has just run
    target: TargetOutput
    committed: Tensor  # [B] int32, how many of each row's query tokens now stand
    next_token: Tensor  # [B] int64, the token after them: sampled, or the prompt's next
    slots: Slots  # this step's tokens already committed
    noise: Purpose  # what to draw guesses with: the verifier's `draft_noise`


class Drafter(ABC):
    """Guesses what comes next. One file per method; one method that matters.

    A drafter never sees the scheduler, the verifier or another request's state, and may be
    wrong at no cost but speed: the verifier keeps the output exact whatever it proposes.

    One with weights of its own also says which hidden states it reads (`aux_layer_ids`), which key and value
    layers it wants (`layers`) and what that takes (`footprint`), and is given it all once, by `prepare`.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Feature]]
    Options: ClassVar[type[DraftOptions]] = DraftOptions
    rerun: ClassVar[int] = 0  # tokens after a token on which what the drafter keeps for it depends; prefix hits heed it
    writes_ahead: ClassVar[bool] = False  # whether `propose` writes cache positions past a row's last query token
    gives_logits: ClassVar[bool] = False  # whether `propose` says what its guesses were drawn from

    num_drafts: int
    """K: most guesses a row."""

    def __init__(self, options: DraftOptions, target: TargetFacts) -> None:
        """Reads no weights yet. `target.device` may be meta, to learn sizes."""
        self.num_drafts = options.num_speculative_tokens
        self.target = target

    @classmethod
    def part(cls) -> Part:
        """The drafter as the oracle sees it."""
        return Part(f"drafter {cls.name}", cls.needs)

    @classmethod
    def serves(cls, head: HeadConfig) -> bool:
        """Whether this is the method that a draft head was made for: how a checkpoint finds its method."""
        return False

    @classmethod
    def footprint(cls, options: DraftOptions, target: TargetFacts) -> Footprint:
        """What an instance would hold; by default nothing worth counting."""
        return Footprint()

    def aux_layer_ids(self) -> tuple[int, ...]:
        """The target's layers whose input `context.target.features` is to hold, side by side in this order."""
        return ()

    def layers(self) -> CacheLayout | None:
        """Key and value layers of its own: they lie in the target's blocks, under the same block tables."""
        return None

    def prepare(  # noqa: B027 - a hook, not a duty
        self,
        target: TargetParts,
        cache: Sequence[LayerCache],  # as `layers` asked; empty if it asked for none
        dummy_seed: int | None,  # None: load the checkpoint; else random weights, for benchmarks
        progress: Callable[[int], None] | None,  # called with the bytes of each weight loaded
    ) -> None:
        """Load what there is to load. Called once, when the target is loaded, before the first step."""

    @abstractmethod
    def propose(self, context: DraftContext) -> Draft:
        """Guess up to K more tokens for every row; rows inside their prompt get a length of 0.

        Called after every step, those inside prompts too, so that a drafter with a cache can fill it.
        Unless HOST_CODE is in `needs`, it may not read a tensor on the host nor make a shape depend on
        one, so that a runner can record it.
        """

    def admit(self, slot: int, tokens: Sequence[int]) -> None:  # noqa: B027 - a hook, not a duty
        """A request took `slot`. Slots are reused, so forget whatever the last one left."""

    def release(self, slot: int) -> None:  # noqa: B027
        """The request in `slot` is gone."""
