"""How a user's options become a configuration with nothing left open.

`resolve` reads the checkpoint's config and answers every "auto"; it loads nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from outrider import env
from outrider.capability import Feature, Part
from outrider.core.reading import Fact
from outrider.core.sizes import Sizes, check_whole
from outrider.device import device_part, find_device
from outrider.draft.base import Drafter, Footprint, TargetFacts
from outrider.draft.registry import parse_speculative_config
from outrider.errors import CapacityError, OptionError, nearest
from outrider.layers.backend import choose_backend
from outrider.load.checkpoint import Checkpoint
from outrider.load.facts import end_of_text, sampling_defaults, weights
from outrider.load.hub import BUNDLED_HEADS, locate
from outrider.load.target import read_target
from outrider.models.config import DTYPES, ModelConfig
from outrider.models.decoder import Decoder
from outrider.options import AUTO, EXECUTOR_BACKENDS, EngineOptions
from outrider.oracle import Choice, RefusedError, choose
from outrider.parallel.mesh import Mesh
from outrider.runner.base import RunnerConfig
from outrider.runner.capture import CaptureOptions
from outrider.runner.memory import Demand, MemoryPlan, plan_memory
from outrider.runner.registry import RUNNERS
from outrider.schedule.options import SchedulerOptions
from outrider.verify.base import LogitsProcessor, Verifier
from outrider.verify.registry import build_processors, build_verifier

logger = logging.getLogger("outrider")

BLOCK_SIZE = 16
"""Tokens a key/value block holds."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """An answered configuration: what the runner is built from, what the oracle was asked and what it said."""

    options: EngineOptions
    directory: Path  # of the checkpoint, where the tokenizer is too
    runner: RunnerConfig
    scheduler: SchedulerOptions  # at depth 1; the runner chosen may allow more
    mesh: Mesh
    parts: tuple[Part, ...]
    verdict: Choice | RefusedError
    eos_token_ids: tuple[int, ...]
    sampling_defaults: Mapping[str, Any]
    """What requests take that do not say otherwise."""
    facts: tuple[Fact, ...]
    """What was taken where several places of the checkpoint may say a thing."""
    draft_positions: int | None = None
    """Positions that the drafter has; None: as many as there are."""

    def served_by(self) -> Choice:
        """The runner that serves, and why not the others. RefusedError, with every reason, if none does."""
        if isinstance(self.verdict, RefusedError):
            raise self.verdict
        return replace(self.verdict, distributed_executor_backend=self.options.distributed_executor_backend)

    @property
    def method(self) -> str:
        """The drafting method's name."""
        return self.runner.drafter.name


def resolve(options: EngineOptions, progress: Callable[[int, int], None] | None = None) -> Resolved:
    """Reads the checkpoint's config, checks the options against it, asks the oracle, and sizes the memory.

    Raises OptionError, CheckpointError or CapacityError, each naming the value and the remedy. What the oracle
    refuses is resolved too, so that it can be explained; then memory is planned without a runner's own.
    `progress` is called with the bytes loaded so far and in all when the runner is built.
    """
    _check_values(options)
    checkpoint = Checkpoint.open(locate(options.model))
    directory = checkpoint.directory
    model, model_config = read_target(checkpoint, options.model_class, dummy=options.load_format == "dummy")
    eos_token_ids, ends = end_of_text(directory, checkpoint.config, model_config.vocab_size)
    defaults, fact_of_defaults = sampling_defaults(directory, used=options.generation_config == AUTO)
    drafter, draft_options = parse_speculative_config(
        options.speculative_config, BUNDLED_HEADS if options.model is None else None
    )
    verifier = build_verifier(options.verifier, synthetic_rates=options.synthetic_rates)
    mesh = Mesh(options.tensor_parallel_size, options.pipeline_parallel_size)
    target = _target(options, checkpoint, model_config, draft_options.num_speculative_tokens)
    processors = build_processors(options.logits_processors or ())
    parts = _parts(target.device, model, drafter, verifier, processors, mesh)
    verdict = _ask(options.runner, parts)
    capture = _capture(options, target.sizes)
    footprint = drafter.footprint(draft_options, target)
    demand = Demand(
        model=model,
        config=model_config,
        target=target,
        may_shorten=options.max_model_len is None,
        keeps_draft_logits=drafter.gives_logits and Feature.DRAFT_LOGITS in verifier.needs,
        weighs_probabilities=Feature.DRAFT_LOGITS in verifier.needs,
        drafter=footprint,
        processors=processors,
        programs=verdict.runner.footprint(capture) if isinstance(verdict, Choice) else 0,
        inplace=parts[0].needs == {Feature.CUDA},
        cache_bytes=options.kv_cache_memory,
        utilization=options.gpu_memory_utilization,
    )
    memory = _plan(demand, verdict)
    runner = RunnerConfig(
        model=model,
        model_config=model_config,
        target=replace(target, sizes=replace(target.sizes, max_model_len=memory.max_model_len)),
        directory=None if options.load_format == "dummy" else directory,
        drafter=drafter,
        draft_options=draft_options,
        verifier=verifier,
        processors=processors,
        memory=memory,
        capture=capture,
        seed=options.seed,
        progress=progress,
    )
    answers = runner, _scheduler_options(runner, options), mesh, parts, _with_layers(verdict, runner, footprint)
    held = () if options.load_format == "dummy" else weights(checkpoint, model_config.tie_word_embeddings)
    facts = *model_config.facts, ends, fact_of_defaults, *held
    _say(facts, model_config.rope.note(memory.max_model_len))
    positions = footprint.num_positions
    draft_positions = None if positions is None or positions >= memory.max_model_len else positions
    return Resolved(options, directory, *answers, eos_token_ids, defaults, facts, draft_positions)


def _say(facts: Sequence[Fact], rope: str | None) -> None:
    """Logs what a user should know of how the checkpoint was read."""
    for fact in facts:
        if fact.note is not None:
            logger.warning("%s: %s", fact.name, fact.note)
    if rope is not None:
        logger.warning("rope: %s", rope)


def _target(options: EngineOptions, checkpoint: Checkpoint, config: ModelConfig, num_drafts: int) -> TargetFacts:
    """The target with every "auto" of its sizes, its device and its type answered."""
    device = find_device(options.device)
    sizes = Sizes(
        max_model_len=_max_model_len(options.max_model_len, config),
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=_budget(options, device, num_drafts),
        block_size=BLOCK_SIZE,
        num_drafts=num_drafts,
    )
    dtype = config.dtype if options.dtype == AUTO else DTYPES[options.dtype]
    widths = config.vocab_size, config.hidden_size, config.num_layers
    return TargetFacts(*widths, sizes, device, dtype, checkpoint, tokenizer=checkpoint.directory)


def _capture(options: EngineOptions, sizes: Sizes) -> CaptureOptions:
    wanted = options.capture_sizes, options.capture_drafts
    return CaptureOptions.resolve(*wanted, options.time_parts, sizes.max_num_seqs, sizes.num_drafts)


def _with_layers(verdict: Choice | RefusedError, runner: RunnerConfig, drafter: Footprint) -> Choice | RefusedError:
    """The verdict with what runs the layers; a refusal stays as it is."""
    if isinstance(verdict, RefusedError):
        return verdict
    layers = choose_backend(runner.model.layer_specs(runner.model_config), runner.device)
    draft_layers = choose_backend(drafter.layers, runner.device) if drafter.layers else None
    return replace(verdict, layers=layers, draft_layers=draft_layers)


def _scheduler_options(runner: RunnerConfig, options: EngineOptions) -> SchedulerOptions:
    drafter, sizes = runner.drafter, runner.sizes
    budget = sizes.max_num_batched_tokens
    beside = options.max_prefill_tokens_beside_decodes or (budget if runner.device.type == "cpu" else 2048)
    return SchedulerOptions(
        sizes=sizes,
        num_blocks=runner.memory.num_blocks,
        max_prefill_tokens_beside_decodes=min(beside, budget),
        enable_prefix_caching=options.enable_prefix_caching,
        lookahead=sizes.num_drafts if drafter.writes_ahead else 0,
        rerun=drafter.rerun,
        draft_cache=Feature.DRAFT_CACHE in drafter.needs,
        draft_limit=runner.draft_options.max_model_len,
    )


def _ask(runner: str, parts: Sequence[Part]) -> Choice | RefusedError:
    """The oracle's verdict; the option wins over the environment."""
    asked = (runner, None) if runner != AUTO else (env.runner() or AUTO, env.RUNNER)
    try:
        return choose(RUNNERS, parts, *asked)
    except RefusedError as refusal:
        return refusal


def _plan(demand: Demand, verdict: Choice | RefusedError) -> MemoryPlan:
    """The memory plan. What no runner serves is refused for that, and not for lack of memory."""
    try:
        plan = plan_memory(demand)
    except CapacityError as error:
        if isinstance(verdict, RefusedError):
            raise verdict from error
        raise
    asked, fits = demand.target.sizes.max_model_len, plan.max_model_len
    if fits < asked:
        logger.warning("max_model_len is lowered from %d to %d, which fits in memory", asked, fits)
    return plan


def _budget(options: EngineOptions, device: torch.device, num_drafts: int) -> int:
    """Most tokens a step."""
    budget = options.max_num_batched_tokens or (2048 if device.type == "cpu" else 8192)
    if budget < num_drafts + 1:
        raise OptionError(
            f"max_num_batched_tokens {budget} cannot hold one row of {num_drafts} drafts and a token: raise it"
        )
    return budget


def _parts(
    device: torch.device,
    model: type[Decoder],
    drafter: type[Drafter],
    verifier: Verifier,
    processors: Sequence[LogitsProcessor],
    mesh: Mesh,
) -> tuple[Part, ...]:
    """Everything the oracle has to place, the device first."""
    return (
        device_part(device),
        model.part(),
        drafter.part(),
        Part(f"verifier {verifier.name}", verifier.needs),
        *(Part(f"processor {processor.name}", processor.needs) for processor in processors),
        *mesh.parts(),
    )


def _check_values(options: EngineOptions) -> None:
    counts = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_prefill_tokens_beside_decodes")
    for name in (*counts, "kv_cache_memory"):
        value = getattr(options, name)
        if value is not None:
            check_whole(name, value, 1)
    if not 0.0 < options.gpu_memory_utilization <= 1.0:
        raise OptionError(f"gpu_memory_utilization must be in (0, 1]: {options.gpu_memory_utilization}")
    check_whole("seed", options.seed, 0)
    if options.dtype != AUTO and options.dtype not in DTYPES:
        raise OptionError(f"unknown dtype: {options.dtype} ({nearest(options.dtype, [AUTO, *DTYPES])})")
    backend = options.distributed_executor_backend
    if backend not in EXECUTOR_BACKENDS:
        raise OptionError(f"unknown distributed_executor_backend: {backend} ({nearest(backend, EXECUTOR_BACKENDS)})")
    if options.generation_config not in (AUTO, "none"):
        raise OptionError(f"unknown generation_config: {options.generation_config} (known: auto, none)")
    if options.load_format not in (AUTO, "dummy"):
        raise OptionError(f"unknown load_format: {options.load_format} (known: auto, dummy)")


def _max_model_len(wanted: int | None, config: ModelConfig) -> int:
    if wanted is None:
        return config.max_position_embeddings
    if wanted > config.longest:
        raise OptionError(f"max_model_len {wanted} is more than the model's positions: at most {config.longest}")
    return wanted
