"""What EAGLE-3 and P-EAGLE share: the checkpoint, the cache, the rows of a step, and sampling a draft."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from outrider.cache.layout import CacheLayout, LayerCache
from outrider.capability import Feature
from outrider.core.option import option
from outrider.draft.base import (
    AcceptancePattern,
    DraftContext,
    Drafter,
    DraftOptions,
    Footprint,
    Match,
    Mismatch,
    TargetFacts,
    TargetParts,
)
from outrider.draft.eagle.checkpoint import (
    HeadConfig,
    canonical,
    dummy_vocabulary_map,
    head_type,
    proposed_drafts,
    read_head,
    vocabulary_map,
)
from outrider.draft.eagle.network import HeadNetwork
from outrider.errors import CheckpointError, OptionError, nearest
from outrider.kernels.draft_rows import DRAFT_ROWS
from outrider.kernels.gather_rows import GATHER_ROWS
from outrider.kernels.sample import GUMBEL_ARGMAX
from outrider.kernels.scale_hidden import SCALE_HIDDEN
from outrider.layers.parameter import Allocator
from outrider.load.checkpoint import Checkpoint, load_weights
from outrider.tensors import StepBatch

COUPLED, ARGMAX = "coupled", "argmax"


@dataclass(frozen=True, slots=True)
class HeadOptions(DraftOptions):
    """Where the head is and how it draws. Names as in vLLM where it has them."""

    num_speculative_tokens: int = option(4, "tokens to draft a round (K); left out: as the head says, or 4")
    model: str | None = option(None, "the draft head: a local directory or a Hugging Face id", compare=False)
    parallel_drafting: bool | None = option(
        None, "left out: as the checkpoint says; what contradicts it is refused", compare=False
    )
    draft_sample: str = option(
        COUPLED, f"{COUPLED}: guesses drawn with the noise that the verifier uses; {ARGMAX}: the likeliest"
    )

    def __post_init__(self) -> None:
        DraftOptions.__post_init__(self)
        if self.draft_sample not in (COUPLED, ARGMAX):
            raise OptionError(f"unknown draft_sample: {self.draft_sample} ({nearest('', (COUPLED, ARGMAX))})")


@dataclass(slots=True)
class HeadRows:
    """The head's query rows that follow a step of the target; see `kernels.draft_rows`."""

    batch: StepBatch  # the step's, with the rows' own positions, lengths and cache slots
    source: Tensor  # [rows] int64, the target's query token whose feature a row takes
    guesses: Tensor  # [B * K] int64, the rows that give the guesses
    slot: Tensor  # [B * K] int64, whose guess each is
    position: Tensor  # [B * K] int64, of the token guessed
    length: Tensor  # [B] int32, how many guesses the head has positions for; 0 inside a prompt


class HeadDrafter(Drafter):
    """A draft head with the target's auxiliary hidden states for input and a cache of its own."""

    needs: ClassVar[frozenset[Feature]] = frozenset({Feature.TOKEN_HISTORY, Feature.FEATURES, Feature.DRAFT_CACHE})
    Options: ClassVar[type[DraftOptions]] = HeadOptions
    # a row holds the token after its position
    rerun: ClassVar[int] = 1
    writes_ahead: ClassVar[bool] = True
    gives_logits: ClassVar[bool] = True
    parallel: ClassVar[bool]
    """Whether this is the method of heads that draft in parallel."""

    def __init__(self, options: DraftOptions, target: TargetFacts) -> None:
        """Raises CheckpointError if the head is not one for this target, OptionError if the options contradict it."""
        super().__init__(options, target)
        assert isinstance(options, HeadOptions)
        if options.checkpoint is None:
            raise OptionError(f'method {self.name} needs its draft head: give "model", a directory or Hugging Face id')
        assert isinstance(options.description, HeadConfig)
        self.checkpoint, self.config = options.checkpoint, options.description
        self._check(options)
        self.limit = min(target.sizes.max_model_len, self.config.layer.max_position_embeddings)
        if self.num_drafts > self.limit:
            raise OptionError(
                f"num_speculative_tokens {self.num_drafts} is more than the {self.limit} positions of the draft head "
                "and the engine: lower it"
            )
        self._argmax = options.draft_sample == ARGMAX
        self.network = HeadNetwork(self.config, self.limit, Allocator.on(target.device, target.dtype))
        self._draft_rows, self._gather = DRAFT_ROWS.on(target.device), GATHER_ROWS.on(target.device)
        self._scale_hidden, self._sample = SCALE_HIDDEN.on(target.device), GUMBEL_ARGMAX.on(target.device)
        self._cache: Sequence[LayerCache] = ()
        self._ids: Tensor | None = None  # [draft vocabulary] int64, the target's tokens; None: the same vocabulary

    @classmethod
    def recognises(cls, checkpoint: Checkpoint) -> Match | Mismatch | None:
        try:
            if head_type(checkpoint) != cls.parallel:
                return None
            head = read_head(checkpoint)
        except CheckpointError as error:
            return Mismatch(str(error))
        num_drafts = proposed_drafts(checkpoint.config)
        decided = {} if num_drafts is None else {"num_speculative_tokens": num_drafts}
        return Match(f"{head.layout} head", decided, head)

    @classmethod
    def describe(cls, options: DraftOptions, target: TargetFacts) -> Mapping[str, Any]:
        head = options.description
        assert isinstance(head, HeadConfig)
        return {
            "layout": head.layout,
            "parallel": head.parallel,
            "aux_layer_ids": list(head.aux_layers(target.num_layers)),
            "num_layers": head.layer.num_layers,
            "draft_vocab_size": head.draft_vocab_size,
            "max_position_embeddings": head.layer.max_position_embeddings,
            "own_embedding": head.own_embedding,
            "own_head": head.own_head,
        }

    def _check(self, options: HeadOptions) -> None:
        head, target = self.config, self.target
        where = f"{head.layout} head {self.checkpoint.directory}"
        if options.parallel_drafting is not None and options.parallel_drafting != head.parallel:
            kind = "drafts in parallel" if head.parallel else "drafts one token after another"
            raise OptionError(
                f"parallel_drafting is {options.parallel_drafting}, but the {where} {kind}: drop the flag"
            )
        for what, own, theirs in (
            ("hidden size", head.target_hidden_size, target.hidden_size),
            ("vocabulary", head.layer.vocab_size, target.vocab_size),
        ):
            if own != theirs:
                raise CheckpointError(f"the {where} is for a target with a {what} of {own}, not {theirs}")
        head.aux_layers(target.num_layers)
        if not head.own_embedding and head.layer.hidden_size != target.hidden_size:
            raise CheckpointError(
                f"the {where} has no embedding, and the target's is {target.hidden_size} wide, not "
                f"{head.layer.hidden_size}: the checkpoint is incomplete"
            )
        if not head.own_head and (head.layer.hidden_size, head.draft_vocab_size) != (
            target.hidden_size,
            target.vocab_size,
        ):
            raise CheckpointError(f"the {where} has no lm_head, and the target's does not fit: it is incomplete")
        columns, promised = head.fc_input_size, head.num_aux_layers * head.target_hidden_size
        if columns is not None and columns != promised and columns % head.target_hidden_size == 0:
            width = head.layer.hidden_size
            raise CheckpointError(
                f"eagle_aux_hidden_state_layer_ids must be {columns // head.target_hidden_size} layers: "
                f"{list(head.aux_layers(target.num_layers))}: fc.weight in {self.checkpoint.directory} has shape "
                f"{[width, columns]}, the config promises {[width, promised]}"
            )
        assert head.shift == 1, "the rows of a step are shifted by one token: see kernels.draft_rows"

    @classmethod
    def footprint(cls, options: DraftOptions, target: TargetFacts) -> Footprint:
        drafter = cls(options, replace(target, device=torch.device("meta")))
        layer, vocab = drafter.config.layer, drafter.config.draft_vocab_size
        seqs, drafts = target.sizes.max_num_seqs, options.num_speculative_tokens
        # the meta device's allocator would give other types
        allocator = Allocator.on(target.device, target.dtype)
        # the features, the first layer's input, then what any layer holds
        width = (
            2 * drafter.config.num_aux_layers * target.hidden_size
            + 8 * layer.hidden_size
            + 3 * layer.intermediate_size
            + 3 * layer.num_heads * layer.head_dim
        )
        rows = target.sizes.max_num_batched_tokens + seqs * drafts
        layouts = [replace(layout, dtype=allocator.cache_dtype) for layout in drafter.cache_layouts()]
        return Footprint(
            weights=sum(slot.nbytes for slot in drafter.network.slots().values()),
            per_block=sum(layout.bytes_per_block for layout in layouts),
            workspace=rows * width * allocator.activation_dtype.itemsize + 3 * seqs * drafts * vocab * 4,
            weights_read=drafter.network.weights_read(1 if cls.parallel else drafts),
            layers=tuple(layer.spec for layer in drafter.network.layers),
            num_positions=drafter.limit,
        )

    @classmethod
    def diagnose(cls, pattern: AcceptancePattern) -> str | None:
        if pattern.first > 2:
            return "they are deeper than the head was trained for, or past the positions it has"
        if pattern.first == 1 and not pattern.collapsed:
            return (
                "what guesses are conditioned on is a little off (features one layer off, a norm left out, "
                "keys that a prefix hit brought and nobody ran again)"
            )
        return None

    def aux_layer_ids(self) -> tuple[int, ...]:
        return self.config.aux_layers(self.target.num_layers)

    def cache_layouts(self) -> Sequence[CacheLayout]:
        return (self.network.cache_layout(self.target.sizes.block_size),)

    def prepare(
        self,
        target: TargetParts,
        caches: Sequence[Sequence[LayerCache]],
        dummy_seed: int | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        network = self.network
        if dummy_seed is not None:
            network.fill_dummy(dummy_seed)
            ids = dummy_vocabulary_map(self.config)
        else:
            load_weights(
                self.checkpoint.directory,
                network.slots(),
                ignores=lambda name: name in ("d2t", "t2d") or name.endswith(".rotary_emb.inv_freq"),
                progress=progress,
                rename=canonical,
                pickled=True,
            )
            ids = vocabulary_map(self.checkpoint, self.config)
        self._ids = None if ids is None else ids.to(self.target.device)
        network.borrow(target)
        (self._cache,) = caches

    def rows(self, context: DraftContext, num_masks: int) -> HeadRows:
        """The rows of every request: its committed tokens of this step, and after them `num_masks` mask rows."""
        batch = context.batch
        found = self._draft_rows(
            context.slots,
            batch,
            context.committed,
            self.num_drafts,
            num_masks,
            self.limit,
            self.config.mask_token_id or 0,
            self.target.sizes.block_size,
            self.config.shift,
        )
        own = replace(batch, input_ids=found.input_ids, rows=found.rows)
        return HeadRows(own, found.source, found.logits_index, found.draft_slot, found.draft_position, found.length)

    def hidden(self, context: DraftContext, rows: HeadRows, mask_row: Tensor | None = None) -> Tensor:
        """[rows, H], the projected features that each row takes; a mask row takes `mask_row` [1, H]."""
        features = context.target.features
        assert features is not None, "the runner gives the auxiliary hidden states that were asked for"
        return self._gather(self.network.project(features), mask_row, rows.source)

    def guess(
        self,
        normed: Tensor,  # [N, H]
        context: DraftContext,
        slot: Tensor,  # [N] int64
        position: Tensor,  # [N] int64, of the token guessed
    ) -> tuple[Tensor, Tensor | None]:
        """[N] int64, a token of the target's vocabulary for each row; and the draft logits [N, V], if they are kept.

        NO_TOKEN stands where the logits hold none: that draft and those after it are dropped.

        The noise is the context's. Under the default verifier it is what the target itself samples with at that
        position: the more alike both distributions, the likelier both give the same token (Daliri, Musco and Suresh,
        2024).
        """
        slots = context.slots
        scaled, temperature, seed = self._scale_hidden(normed, slots.temperature, slots.seed, slot, self._argmax)
        logits = self.network.logits(scaled)
        tokens = self._sample(logits, temperature, seed, position, context.noise, self._ids)
        return tokens, self._draft_logits(logits, tokens) if slots.draft_logits is not None else None

    def _draft_logits(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """[N, V], the draft distribution over the target's vocabulary.

        A token that the head does not have gets -inf. With argmax sampling every token but the guess gets -inf.
        """
        widened = logits.new_full((logits.shape[0], self.target.vocab_size), -torch.inf)
        if self._argmax:
            return widened.scatter_(1, tokens.clamp(min=0)[:, None], 0.0)
        return logits if self._ids is None else widened.index_copy_(1, self._ids, logits)
