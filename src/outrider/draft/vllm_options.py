"""vLLM's keys of `speculative_config` that mean nothing here, or are called otherwise: what to do instead of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outrider.core.reading import written_short
from outrider.errors import OptionError

_OFF: tuple[Any, ...] = (None, False)
_ITS_OWN = "vLLM sets it itself: leave it out"
_BY_LOAD = (
    "drafting by load is not offered yet: requests limit their drafts with speculative.num_speculative_tokens, and "
    "without speculative_config none are drafted"
)
_VERIFIER = "the option verifier says how drafts are verified: exact, rejection or synthetic"
_SYNTHETIC = "give the options verifier synthetic and synthetic_rates"
_SUFFIX = "the method suffix is not offered: ngram drafts from the text so far"
_CHOSEN = "the engine chooses what runs the head, and outrider explain says which: leave it out"
_REVISION = "download that revision, and give its directory as model"

INSTEAD: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "acceptance_method": ((None, "rejection_sampler"), _VERIFIER),
    "attention_backend": ((None,), _CHOSEN),
    "code_revision": ((None,), "no code of a checkpoint is run: leave it out"),
    "disable_by_batch_size": ((None,), _BY_LOAD),
    "disable_log_stats": (_OFF, "metrics are always kept: leave it out"),
    "disable_logprobs": ((None,), "log probabilities do not depend on drafts: leave it out"),
    "disable_mqa_scorer": (_OFF, _CHOSEN),
    "disable_padded_drafter_batch": (_OFF, "batches are never padded to one length: leave it out"),
    "draft_load_config": (
        (None,),
        "heads are read from safetensors, or are random with load_format dummy: leave it out",
    ),
    "draft_model_config": ((None,), _ITS_OWN),
    "draft_parallel_config": ((None,), _ITS_OWN),
    "draft_sample_method": ((None,), "give draft_sample: argmax for greedy, coupled for probabilistic"),
    "draft_tensor_parallel_size": ((None, 1), "each rank runs the whole head: give 1, or leave it out"),
    "dspark_draft_topk": ((None,), "the method dspark is not offered: leave it out"),
    "enable_adaptive_verification": (_OFF, _BY_LOAD),
    "enforce_eager": (_OFF, "give the option runner eager"),
    "index_share_for_mtp_iteration": (_OFF, "the method mtp is not offered: leave it out"),
    "kv_cache_dtype": ((None, "auto"), "the head's cache has the type of the target's: leave it out"),
    "moe_backend": ((None,), _CHOSEN),
    "ngram_prompt_lookup_max": ((None,), "it is called prompt_lookup_max"),
    "ngram_prompt_lookup_min": ((None,), "it is called prompt_lookup_min"),
    "num_speculative_tokens_per_batch_size": ((None,), _BY_LOAD),
    "posterior_alpha": ((None,), _VERIFIER),
    "posterior_threshold": ((None,), _VERIFIER),
    "quantization": ((None,), "heads run in the type of the target's weights: give one that is not quantized"),
    "rejection_sample_method": ((None, "standard"), _VERIFIER),
    "revision": ((None,), _REVISION),
    "suffix_decoding_max_cached_requests": ((None,), _SUFFIX),
    "suffix_decoding_max_spec_factor": ((None,), _SUFFIX),
    "suffix_decoding_max_tree_depth": ((None,), _SUFFIX),
    "suffix_decoding_min_token_prob": ((None,), _SUFFIX),
    "synthetic_acceptance_length": ((None,), _SYNTHETIC),
    "synthetic_acceptance_rates": ((None,), _SYNTHETIC),
    "target_model_config": ((None,), _ITS_OWN),
    "target_parallel_config": ((None,), _ITS_OWN),
    "tensor_parallel_size": ((None,), "it is called draft_tensor_parallel_size, and must be 1"),
    "use_heterogeneous_vocab": (_OFF, "a head shares the target's vocabulary: leave it out"),
    "use_local_argmax_reduction": (_OFF, _CHOSEN),
}
"""By key: the values that ask for nothing here, and what to do about others."""

PREFIX = "speculative_"
"""What vLLM's flags had before these keys were one option."""


def without_vllm_keys(given: Mapping[str, Any], known: list[str]) -> dict[str, Any]:
    """The options without vLLM's that ask for nothing here. OptionError for one that does, with what to do instead.

    `known`: the options of the method, which mean what they say there.
    """
    kept: dict[str, Any] = {}
    for key, value in given.items():
        if not isinstance(key, str):
            raise OptionError(f"speculative_config: a key must be text: {written_short(key)}")
        if key in known:
            kept[key] = value
            continue
        bare = key.removeprefix(PREFIX)
        if key != bare and bare in (*known, *INSTEAD):
            raise OptionError(f"speculative_config: {key} is called {bare} here")
        nothing, instead = INSTEAD.get(key, ((), ""))
        if any(value is one or (value == one and type(value) is type(one)) for one in nothing):
            continue
        if instead:
            raise OptionError(f"speculative_config: {key} {written_short(value)} is not offered: {instead}")
        kept[key] = value
    return kept
