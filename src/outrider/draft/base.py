"""The contract between a drafter and whatever runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from outrider.cache.layout import CacheLayout, LayerCache
from outrider.capability import Feature, Part
from outrider.core.option import option
from outrider.core.sizes import Sizes, check_whole
from outrider.layers.embedding import Embedding, Head
from outrider.layers.spec import LayerSpec
from outrider.load.checkpoint import Checkpoint
from outrider.tensors import Draft, Purpose, Slots, StepBatch, TargetOutput

MAX_DRAFTS = 32
"""The largest K: beyond it verification costs more than any acceptance returns."""


@dataclass(frozen=True, slots=True)
class DraftOptions:
    """The options of every method. A method with more options extends this record in its own file."""

    num_speculative_tokens: int = option(4, "tokens to draft a round (K)")
    max_model_len: int | None = option(None, "length at which drafting ends; left out: the engine's")
    checkpoint: Checkpoint | None = option(None, "the draft checkpoint, opened once", derived=True)
    description: object = option(None, "what the method read in it: `Match.description`", derived=True)

    def __post_init__(self) -> None:
        self.check_whole("num_speculative_tokens", 1, MAX_DRAFTS)
        if self.max_model_len is not None:
            self.check_whole("max_model_len", 1)

    def check_whole(self, name: str, lowest: int, highest: int | None = None) -> None:
        """OptionError unless the option is a whole number within bounds."""
        check_whole(name, getattr(self, name), lowest, highest)


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """What a drafter may know of the model it drafts for when it is built."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    sizes: Sizes
    device: torch.device
    dtype: torch.dtype  # of the weights
    checkpoint: Checkpoint | None = None  # the model's own, where methods such as MTP find their weights
    tokenizer: Path | None = None  # directory of the model's tokenizer


@dataclass(frozen=True, slots=True)
class TargetParts:
    """What a drafter may borrow of the loaded target."""

    embedding: Embedding
    head: Head


@dataclass(frozen=True, slots=True)
class Match:
    """A method's answer to a checkpoint that is its own."""

    kind: str  # what the checkpoint is, as a message names it: "Medusa head"
    options: Mapping[str, Any] = field(default_factory=dict)  # values it decides where the user gives none, such as K
    description: object = None  # what the method read in it, handed down as `DraftOptions.description`


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A method's answer to a checkpoint of its kind that is incomplete or contradicts itself."""

    reason: str


@dataclass(frozen=True, slots=True)
class AcceptancePattern:
    """How measured acceptance differs from what was recorded, from the first position that fell."""

    first: int  # that position; 1: every one fell
    collapsed: bool  # whether more than half was lost there; else acceptance merely declined
    share: float  # what is left at `first` of its ratio to the position before, from 0 to 1


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a drafter will hold on the device, in bytes, computed before any of it is allocated."""

    weights: int = 0
    per_block: int = 0  # of its own keys and values, in each block of the cache
    workspace: int = 0
    weights_read: int = 0  # of the weights, what drafting one round reads: those of K passes are counted K times
    layers: tuple[LayerSpec, ...] = ()  # its decoder layers, for the choice of what runs them
    num_positions: int | None = None  # that it has: it drafts nothing past them; None: as many as the target


@dataclass(slots=True)
class DraftContext:
    """All a drafter may look at. Read-only: a drafter writes only state of its own."""

    batch: StepBatch  # what the target has just run
    target: TargetOutput
    committed: Tensor  # [B] int32, how many of each row's query tokens are committed
    next_token: Tensor  # [B] int64, the token after them: sampled, or the prompt's next
    slots: Slots  # this step's tokens already committed
    noise: Purpose  # what to draw guesses with: the verifier's `draft_noise`


BUNDLED_MODEL, ANY_MODEL = "bundled model", "any model"
"""What a method may be the default for, where a command drafts and no method is named; see `Drafter.default_for`."""


class Drafter(ABC):
    """Guesses what comes next. One file per method; one method that matters.

    A drafter never sees the scheduler, the verifier or another request's state, and may be
    wrong at no cost but speed: the verifier keeps the output exact whatever it proposes.

    A drafter with weights also says which checkpoints are its own (`recognises`), which hidden states it reads
    (`aux_layer_ids`), which keys and values it keeps (`cache_layouts`) and how many bytes it takes (`footprint`).
    `prepare` then gives it all of that, once.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Feature]]
    Options: ClassVar[type[DraftOptions]] = DraftOptions
    default_for: ClassVar[str | None] = None
    """BUNDLED_MODEL or ANY_MODEL if this method is the default there."""
    wants: ClassVar[str | None] = None
    """What a checkpoint of this method holds, in a phrase for an error; None: the method reads no checkpoint."""
    manner: ClassVar[str] = ""
    """How the K tokens of a round come out, in a few words."""
    rerun: ClassVar[int] = 0
    """How many following tokens the draft keys and values of a position depend on: a prefix hit runs as many again."""
    writes_ahead: ClassVar[bool] = False
    """Whether `propose` writes cache positions past a row's last query token."""
    gives_logits: ClassVar[bool] = False
    """Whether `propose` returns the distribution that its drafts were drawn from."""

    num_drafts: int
    """K: the maximum number of drafts a row."""

    def __init__(self, options: DraftOptions, target: TargetFacts) -> None:
        """Reads no weights yet. `target.device` may be meta, to learn sizes."""
        self.num_drafts = options.num_speculative_tokens
        self.options, self.target = options, target

    @classmethod
    def part(cls) -> Part:
        """The drafter as the oracle sees it."""
        return Part(f"drafter {cls.name}", cls.needs)

    @classmethod
    def recognises(cls, checkpoint: Checkpoint) -> Match | Mismatch | None:
        """Whether the checkpoint named by the option `model` is of this method; None: it is not.

        Reads the config and the tensors' names, shapes and types, and no weights. A method that does not override this
        gets its `model` as the user gave it, unchecked.
        """
        return None

    @classmethod
    def also_means(cls, other: type[Drafter], given: Mapping[str, Any]) -> bool:
        """Whether `method: <this>` with the options `given` is a second spelling of another method."""
        return False

    @classmethod
    def reads_from_target(cls, name: str, target: TargetFacts) -> bool:
        """Whether a tensor of the target's own checkpoint is the drafter's, so that the target leaves it out."""
        return False

    @classmethod
    def describe(cls, options: DraftOptions, target: TargetFacts) -> Mapping[str, Any]:
        """What `outrider explain` prints of the draft checkpoint, as JSON values by name."""
        return {}

    @classmethod
    def diagnose(cls, pattern: AcceptancePattern) -> str | None:
        """The likeliest cause of a fall in acceptance, as a clause; None: the method knows no special one."""
        return None

    @classmethod
    def footprint(cls, options: DraftOptions, target: TargetFacts) -> Footprint:
        """What an instance will hold. By default the keys and values of `cache_layouts`, and no weights."""
        if cls.cache_layouts is Drafter.cache_layouts:
            return Footprint()
        drafter = cls(options, replace(target, device=torch.device("meta")))
        return Footprint(per_block=sum(layout.bytes_per_block for layout in drafter.cache_layouts()))

    def aux_layer_ids(self) -> tuple[int, ...]:
        """The target's layers whose input `context.target.features` is to hold, side by side in this order.

        A method that names any has `Feature.FEATURES` in `needs`.
        """
        return ()

    def cache_layouts(self) -> Sequence[CacheLayout]:
        """Key and value layers of its own: they lie in the target's blocks, under the same block tables.

        A method that names any has `Feature.DRAFT_CACHE` in `needs`.
        """
        return ()

    def prepare(  # noqa: B027 - a hook, not a duty
        self,
        target: TargetParts,
        caches: Sequence[Sequence[LayerCache]],  # those of each of `cache_layouts`, in that order
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
