"""The promise: whatever lacks HOST_CODE in its needs can be recorded.

Every op's reference, verifier, processor and drafter is traced under fake tensors, which have shapes
and no values: a host read or a shape that depends on data has nothing to read, and raises. What was
traced is then replayed on real tensors and must give what the part itself gives. A kernel is one
opaque launch, so its reference stands in for it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from heads import write_head
from kernel_examples import examples
from kernel_examples.steps import example_slots
from outrider.bench.kernels import all_ops
from outrider.cache.layout import LayerCache
from outrider.capability import Feature
from outrider.core.plan import Admission
from outrider.core.sampling import SamplingParams
from outrider.core.sizes import Sizes
from outrider.draft.base import DraftContext, Drafter, TargetFacts, TargetParts
from outrider.draft.eagle.base import HeadDrafter
from outrider.draft.host import HostDrafter
from outrider.draft.registry import METHODS, resolve_options
from outrider.kernels.commit import commit_reference
from outrider.kernels.op import Op
from outrider.kernels.step_inputs import assemble_reference, load_draft
from outrider.layers.embedding import Embedding, Head
from outrider.layers.parameter import Allocator
from outrider.runner.processor_tables import ProcessorTables
from outrider.tensors import Slots, StepBatch, TargetOutput
from outrider.verify.registry import PROCESSORS, VERIFIERS, build_verifier

CPU = torch.device("cpu")
VOCAB, WIDTH = 11, 3
HOST_READ = (DataDependentOutputException, DynamicOutputShapeException, RuntimeError)
VERIFIER_OPTIONS = {"synthetic": {"synthetic_rates": [0.5, 0.2, 0.1]}}


def leaves(value: Any) -> list[Tensor]:
    """The tensors in a value, in a fixed order."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value) and not isinstance(value, type):
        return [leaf for field in fields(value) for leaf in leaves(getattr(value, field.name))]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in leaves(item)]
    return []


def rebuilt(value: Any, tensors: list[Tensor]) -> Any:
    """The value with its tensors taken, in that order, from the front of a list."""
    if isinstance(value, Tensor):
        return tensors.pop(0)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{field.name: rebuilt(getattr(value, field.name), tensors) for field in fields(value)})
    if isinstance(value, dict):
        return {key: rebuilt(item, tensors) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(rebuilt(item, tensors) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(rebuilt(item, tensors) for item in value)
    return value


def record(function: Callable[..., Any], arguments: dict[str, Any], own_tensors: bool = False) -> None:
    """Trace a call without values, replay it on real ones, and compare with the call itself.

    `own_tensors`: whether the function has some that are no arguments, weights say; they too are seen without values.
    """

    def flat(*tensors: Tensor) -> list[Tensor]:
        given = rebuilt(arguments, list(tensors))
        return leaves(function(**given)) + leaves(given)

    mode = FakeTensorMode(
        allow_non_fake_inputs=own_tensors
    )  # not make_fx's own, which would record a host read as a symbol and go on
    with mode:
        graph = make_fx(flat)(*(mode.from_tensor(tensor) for tensor in leaves(arguments)))
    replayed = graph(*leaves(copy.deepcopy(arguments)))
    expected = flat(*leaves(copy.deepcopy(arguments)))
    for ours, theirs in zip(replayed, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.fixture(autouse=True)
def references_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Op, "on", lambda op, device: op.reference)


def step() -> tuple[Slots, StepBatch, Tensor]:
    """Two decode rows with drafts, one with none and one inside its prompt; every processor has work."""
    slots = example_slots(torch.Generator().manual_seed(0), CPU, 5, 32, WIDTH)
    slots.tokens.remainder_(VOCAB)
    slots.draft_tokens.remainder_(VOCAB)
    draft_logits = torch.randn((5, WIDTH, VOCAB), generator=torch.Generator().manual_seed(1))
    slots = replace(slots, draft_logits=draft_logits, temperature=torch.tensor([0.0, 1.0, 0.7, 2.0, 1.0]))
    slots.computed[4] -= 4
    rows = torch.tensor([[1, 4, 3, 1], [0, 3, 2, 1], [3, 1, 0, 1], [4, 3, 0, 0]])
    batch = assemble_reference(slots, rows, 11, 8, 4)
    return slots, batch, torch.randn((8, VOCAB), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("op", all_ops(), ids=lambda op: op.name)
def test_op(op: Op[..., Any]) -> None:
    for example in islice(examples(op, torch.Generator().manual_seed(0), CPU, True), 3):
        record(op.reference, dict(example))


@pytest.mark.parametrize("with_logits", [True, False])
@pytest.mark.parametrize("name", VERIFIERS)
def test_verifier(name: str, with_logits: bool) -> None:
    verifier = build_verifier(name, **VERIFIER_OPTIONS.get(name, {}))
    assert Feature.HOST_CODE not in verifier.needs
    slots, batch, logits = step()
    if not with_logits:
        slots = replace(slots, draft_logits=None)
    given = {"logits": logits, "batch": batch, "draft": load_draft(slots, batch), "slots": slots}
    record(verifier, given, own_tensors=True)  # the chances of drafts accepted by decree


@pytest.mark.parametrize("processor", PROCESSORS, ids=lambda processor: processor.name)
def test_processor(processor: Any) -> None:
    assert Feature.HOST_CODE not in processor.needs
    slots, batch, logits = step()
    tables = ProcessorTables(processor, 5, VOCAB, CPU)
    given = {"top_k": 5, "top_p": 0.9, "min_p": 0.05, "min_tokens": 31, "temperature": 0.7, "max_tokens": None}
    extra = {field.name: 2.0 for field in processor.fields if field.name not in given}
    sampling = SamplingParams(**given, extra_args=extra)
    admissions = [Admission(slot, (1, 2), 1, 0, sampling, 0, (4,)) for slot in range(5)]
    wanting = [one for one in admissions if tables.processor.wanted(one.sampling)]
    tables.write({name: torch.from_numpy(column) for name, column in tables.columns(admissions, wanting).items()})
    state = tables.active.state
    before = logits.clone()
    assert not torch.equal(processor(logits.clone(), batch, slots, state), before), "the example must give it work"
    record(processor, {"logits": logits, "batch": batch, "slots": slots, "state": state})
    verdict = build_verifier("exact")(logits, batch, load_draft(slots, batch), slots)
    record(processor.commit, {"batch": batch, "verdict": verdict, "state": state})


def context() -> DraftContext:
    slots, batch, logits = step()
    verifier = build_verifier("exact")
    verdict = verifier(logits, batch, load_draft(slots, batch), slots)
    committed, next_token = commit_reference(slots, batch, verdict)
    hidden = torch.randn((11, 6), generator=torch.Generator().manual_seed(3))
    features = torch.randn((11, 18), generator=torch.Generator().manual_seed(4))
    target = TargetOutput(logits, hidden, features)
    return DraftContext(batch, target, committed, next_token, slots, verifier.draft_noise)


FACTS = TargetFacts(VOCAB, 6, 2, Sizes(32, 5, 64, 4), CPU, torch.float32)
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 6,
    "intermediate_size": 10,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 32,
}


def drafter_of(method: type[Drafter], directory: Path) -> Drafter:
    """A drafter ready to propose, with a tiny head if it reads one."""
    if not issubclass(method, HeadDrafter):
        return method(method.Options(), FACTS)
    head = write_head(directory, method.parallel, draft_vocab_size=7, sizes=TINY)
    _, options = resolve_options(method, {"num_speculative_tokens": WIDTH, "model": str(head)})
    drafter = method(options, FACTS)
    allocator = Allocator.on(CPU, torch.float32)
    embedding = Embedding(VOCAB, 6, allocator)
    (layout,) = drafter.cache_layouts()
    cache = [LayerCache(layer.key.zero_(), layer.value.zero_()) for layer in layout.allocate(50, CPU)]
    drafter.prepare(TargetParts(embedding, Head(VOCAB, 6, allocator, embedding)), [cache], None, None)
    return drafter


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if Feature.HOST_CODE not in method.needs])
def test_drafter(name: str, tmp_path: Path) -> None:
    drafter = drafter_of(METHODS[name], tmp_path)
    record(drafter.propose, {"context": context()}, own_tensors=True)


class Parrot(HostDrafter):
    name: ClassVar[str] = "parrot"

    def guess(self, slot: int, tokens: list[int]) -> list[int]:
        return tokens[-1:]


def test_a_drafter_that_reads_the_host_cannot_be_recorded() -> None:
    drafter = Parrot(HostDrafter.Options(), FACTS)
    assert Feature.HOST_CODE in drafter.needs
    drafter.propose(context())
    with pytest.raises(HOST_READ):
        record(drafter.propose, {"context": context()})


PLANTED: dict[str, Callable[[Tensor], Tensor]] = {
    "item": lambda x: x * x.sum().item(),
    "branch": lambda x: x if x.sum() > 0 else -x,
    "list": lambda x: x.new_tensor(x.tolist()),
    "shape": lambda x: x[x > 0].sum(),
    "numpy": lambda x: torch.from_numpy(x.numpy() + 1),
    "one-hot": lambda x: torch.nn.functional.one_hot(x.abs().long()).sum(),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_host_read_is_caught(name: str) -> None:
    planted = PLANTED[name]
    planted(torch.tensor([3.0, -1.0]))
    with pytest.raises(HOST_READ):
        record(planted, {"x": torch.tensor([3.0, -1.0])})
