"""What a user may set about training. Nothing here imports torch. Flags and their help are made from the fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from outrider.core.option import option, wrong_types
from outrider.errors import OptionError

DECAYS = ("linear", "cosine")
LAYER_TYPES = ("llama", "qwen3")
OPTIMIZERS = ("adamw", "muon")
EXPORT_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class CommonOptions:
    """What every method takes. A method with more options extends this record.

    `TrainOptions` is all of them together, so no record may have slots.
    """

    model: str | None = option(None, "local directory or Hugging Face id of the target; left out: the bundled model")
    method: str | None = option(None, "what to train; a wrong name prints the list")
    data: Sequence[str] | None = option(
        None, "JSONL (text, messages or token_ids a line) or .txt, also .gz or .xz; repeat for more files"
    )
    out: str | None = option(None, "directory of the head, its log and its checkpoint")
    held_out: str | None = option(None, "file to evaluate on; left out: the last hundredth of the documents")
    max_length: int = option(1024, "tokens a packed row holds; documents that are longer are cut")
    batch_tokens: int = option(16384, "tokens a step, over all processes")
    steps: int | None = option(None, "stop after so many steps")
    epochs: float | None = option(None, "stop after so many passes over the data")
    minutes: float | None = option(None, "stop after so many minutes of training")
    lr: float = option(1e-4, "highest learning rate of AdamW")
    optimizer: str = option("adamw", "adamw, or muon: Muon for the layers' matrices, AdamW for all else")
    muon_lr: float = option(0.02, "highest learning rate of Muon")
    init: str | None = option(None, "head in the speculators format to start from; left out: random weights")
    lr_decay: str = option("linear", "linear or cosine, to zero at the end")
    warmup_steps: int = option(50, "steps over which the learning rate rises")
    weight_decay: float = option(0.0, "AdamW's decay of matrices")
    grad_clip: float = option(1.0, "largest norm of the gradient")
    seed: int = option(0, "of initial weights, order of documents and dropped elements")
    feature_layers: Sequence[int] | None = option(
        None, "three auxiliary layers, each read as the stream entering it; left out: 2, n//2, n-3 of n layers"
    )
    num_layers: int | None = option(None, "layers of the head; left out: 1, or 4 for a parallel head")
    num_attention_heads: int | None = option(None, "left out: the target's")
    num_key_value_heads: int | None = option(None, "left out: the target's")
    head_dim: int | None = option(None, "left out: the target's")
    intermediate_size: int | None = option(None, "width of the MLP; left out: the target's")
    layer_type: str | None = option(None, "llama, or qwen3 (norms of q and k); left out: the target's kind")
    norm_before_residual: bool = option(False, "the first layer's residual starts after its norm")
    norm_before_fc: bool = option(False, "one norm over the three features, before they are projected")
    fc_norm: bool = option(False, "one norm for each of the three features, before they are projected")
    norm_output: bool = option(False, "the next sequential step is fed the normed output")
    freeze_embedding: bool | None = option(None, "keep the target's embedding; left out: as the method's paper does")
    freeze_lm_head: bool = option(False, "keep the target's lm_head, of all tokens, and leave it out of the export")
    export_embedding: bool = option(False, "write the embedding even if it is the target's")
    draft_vocab_size: int | None = option(None, "most frequent tokens that are drafted; left out: all")
    num_speculative_tokens: int = option(5, "K that the head is meant to be served with")
    on_policy: int | None = option(None, "train on so many continuations that the target writes first")
    prompt_length: int = option(64, "on-policy: tokens of a document that are continued")
    continuation_length: int = option(256, "on-policy: most tokens of a continuation")
    on_policy_temperature: float = option(1.0, "on-policy: 0 takes the most likely token")
    generate_only: bool = option(False, "on-policy: write on_policy.jsonl, to be used as --data, and stop")
    log_every: int = option(10, "steps between lines of the log")
    eval_every: int | None = option(None, "steps between evaluations; left out: only at the end")
    save_every: int | None = option(None, "steps between checkpoints; left out: only at the end")
    resume: bool = option(False, "go on from the checkpoint in the output directory")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    compile: bool = option(True, "compile the network where there is a GPU")
    dtype: str = option("bfloat16", "of the exported weights: bfloat16, float16 or float32")

    def __post_init__(self) -> None:
        for name, value, wanted in wrong_types(self):
            raise OptionError(f"{name} must be {wanted}: {value!r}")
        self.check_counts(*_COUNTS)
        for name in ("lr", "muon_lr", "epochs", "minutes", "grad_clip"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise OptionError(f"{name} must be more than 0: {value}")
        for name in ("weight_decay", "on_policy_temperature", "warmup_steps", "seed"):
            if getattr(self, name) < 0:
                raise OptionError(f"{name} must be 0 or more: {getattr(self, name)}")
        choices = {"lr_decay": DECAYS, "layer_type": LAYER_TYPES, "dtype": EXPORT_DTYPES, "optimizer": OPTIMIZERS}
        for name, known in choices.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise OptionError(f"{name} is not known: {value} (known: {', '.join(known)})")
        if self.freeze_lm_head and self.draft_vocab_size is not None:
            raise OptionError("freeze_lm_head keeps the target's lm_head, whole: leave --draft-vocab-size out")
        if self.generate_only and self.on_policy is None:
            raise OptionError("generate_only writes what on_policy generates: give --on-policy a number of prompts")

    def check_counts(self, *names: str) -> None:
        """OptionError unless each option is 1 or more, or left out."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} must be 1 or more: {value}")

    def check_share(self, name: str) -> None:
        """OptionError unless the option is in (0, 1]."""
        if not 0 < getattr(self, name) <= 1:
            raise OptionError(f"{name} must be in (0, 1]: {getattr(self, name)}")


_COUNTS = (
    *("max_length", "batch_tokens", "steps", "num_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "draft_vocab_size", "num_speculative_tokens"),
    *("on_policy", "prompt_length", "continuation_length", "log_every", "eval_every", "save_every"),
)


@dataclass(frozen=True)
class Eagle3Options(CommonOptions):
    """What a sequential head's training takes besides."""

    ttt_steps: int = option(7, "eagle3: steps of the training-time test")
    step_decay: float = option(0.8, "eagle3: weight of a step's loss beside the last one's")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("ttt_steps")
        self.check_share("step_decay")


@dataclass(frozen=True)
class PEagleOptions(CommonOptions):
    """What a parallel head's training takes besides."""

    mask_token_id: int | None = option(None, "peagle: token of undrafted places; left out: <|mask|>")
    k_train: int = option(8, "peagle: positions trained, more than K")
    keep_rate: float = option(0.8, "peagle: share of a position's elements that the next one keeps")
    unreached_weight: float = option(
        1.0, "peagle: weight of the loss of drafts behind a wrong one, which no verifier comes to"
    )
    partitions: int = option(1, "peagle: segments a row is run in, to save memory")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("k_train", "partitions")
        self.check_share("keep_rate")
        if not 0 <= self.unreached_weight <= 1:
            raise OptionError(f"unreached_weight must be in [0, 1]: {self.unreached_weight}")


@dataclass(frozen=True)
class TrainOptions(PEagleOptions, Eagle3Options):
    """Everything `outrider train` takes."""
