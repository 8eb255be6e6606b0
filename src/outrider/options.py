"""What a user may set about the engine.

`EngineOptions` is the one record from which keyword arguments, command-line flags and their help are generated.
Nothing here imports torch, so that help is printed at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from outrider.core.option import option, wrong_types
from outrider.core.reading import written_short
from outrider.errors import OptionError, nearest

AUTO = "auto"
"""The value of an option that outrider answers itself."""

EXECUTOR_BACKENDS = ("uni", "mp")
"""What may host the runner, by vLLM's names."""


def _example_of_drafting() -> Mapping[str, Any]:
    from outrider.draft.registry import METHODS

    return {"method": " | ".join(METHODS)}


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Everything `LLM` takes. Names follow vLLM where the meaning is the same."""

    model: str | None = option(None, "local directory or Hugging Face id; left out: the bundled model")
    model_class: str | None = option(None, "module:Class of a model family of your own; left out: the checkpoint's")
    speculative_config: Mapping[str, Any] | None = option(
        None, "drafting method and its options, as in vLLM", example=_example_of_drafting
    )
    runner: str = option(AUTO, "auto takes the fastest runner that can serve; a name is taken or refused")
    dtype: str = option(AUTO, "auto (the checkpoint's), float32, bfloat16 or float16")
    device: str = option(AUTO, "auto, cpu, cuda or cuda:N")
    max_model_len: int | None = option(
        None, "longest sequence, prompt and output; left out: the model's limit, or what fits"
    )
    max_num_seqs: int = option(128, "most sequences run at once")
    max_num_batched_tokens: int | None = option(None, "most tokens a step; left out: 2048 on a CPU, 8192 on a GPU")
    max_prefill_tokens_beside_decodes: int | None = option(
        None,
        "most prompt tokens of a step in which others decode, whose tokens wait for them; "
        "left out: 2048 on a GPU, on a CPU as max_num_batched_tokens",
    )
    kv_cache_memory: int | None = option(None, "bytes for keys and values; left out: what is free")
    gpu_memory_utilization: float = option(0.9, "share of a GPU's free memory to use")
    enable_prefix_caching: bool = option(True, "reuse keys and values of prompts that begin alike")
    tensor_parallel_size: int = option(1, "ranks that split each matrix")
    pipeline_parallel_size: int = option(1, "ranks that split the layers")
    distributed_executor_backend: str = option(
        "uni", "what hosts the runner: uni, the engine's own process; mp, a process of its own"
    )
    capture_sizes: Sequence[int] | None = option(
        None,
        "batch sizes the graph runner records, a step takes the next larger; left out: 1, 2, 3, 4, 6, 8 ...",
    )
    capture_drafts: Sequence[int] | None = option(
        None,
        "numbers of drafts, below num_speculative_tokens, for which the graph runner records programs too; a step "
        "whose rows verify no more takes the smaller program",
    )
    time_parts: bool = option(
        False, "time the parts of a step on the device, for benchmarks; only the graph runner can"
    )
    load_format: str = option(AUTO, "auto (safetensors), or dummy: random weights, for benchmarks")
    generation_config: str = option(
        AUTO, "auto: requests take the sampling defaults of the checkpoint's generation_config.json; none: they do not"
    )
    seed: int = option(0, "seed of requests that bring none")
    verifier: str = option("exact", "exact, rejection or synthetic; each one's file says what it promises")
    logits_processors: Sequence[str] | None = option(
        None, "logits processors of your own, each as module:Class; requests ask for them in extra_args"
    )
    synthetic_rates: Sequence[float] | None = option(None, "the synthetic verifier's acceptance per position")

    def __post_init__(self) -> None:
        for name, value, wanted in wrong_types(self):
            raise OptionError(f"{name} must be {wanted}: {written_short(value)}")

    @classmethod
    def from_kwargs(cls, **given: Any) -> EngineOptions:
        """The options; a path and a torch dtype will do. OptionError names an unknown one and the nearest known."""
        known = [known.name for known in fields(cls)]
        for name in given:
            if name not in known:
                raise OptionError(f"unknown option: {name} ({nearest(name, known)})")
        if isinstance(given.get("model"), os.PathLike):
            given["model"] = os.fspath(given["model"])
        if str(given.get("dtype")).startswith("torch."):  # as torch writes its own types
            given["dtype"] = str(given["dtype"]).removeprefix("torch.")
        return cls(**given)
