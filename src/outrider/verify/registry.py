"""The verifiers and the logits processors. A new one adds its file and one line here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from outrider.core.plugin import import_class
from outrider.core.sampling_fields import FIELDS, SamplingField
from outrider.errors import OptionError, nearest
from outrider.verify.base import LogitsProcessor, Verifier
from outrider.verify.exact import Exact
from outrider.verify.processors.min_tokens import MinTokens
from outrider.verify.processors.temperature import Temperature
from outrider.verify.processors.truncation import Truncation
from outrider.verify.rejection import Rejection
from outrider.verify.synthetic import Synthetic

VERIFIERS: dict[str, Callable[..., Verifier]] = {
    Exact.name: Exact,
    Rejection.name: Rejection,
    Synthetic.name: Synthetic,
}

DEFAULT_VERIFIER = Exact.name
"""The one that keeps every token as it would be without drafts."""


def build_verifier(name: str, **options: Any) -> Verifier:
    """The verifier `name`; an option that is None was not given. OptionError for an unknown name or option."""
    if name not in VERIFIERS:
        raise OptionError(f"unknown verifier: {name} ({nearest(name, VERIFIERS)})")
    made_by = VERIFIERS[name]
    given = {option: value for option, value in options.items() if value is not None}
    known = inspect.signature(made_by).parameters
    for option in given:
        if option not in known:
            raise OptionError(f"verifier {name} has no option {option}: drop it")
    for option in known:
        if option not in given:
            raise OptionError(f"verifier {name} needs {option}: give them, or take the verifier exact")
    return made_by(**given)


PROCESSORS: tuple[LogitsProcessor, ...] = (MinTokens(), Temperature(), Truncation())
"""The logits processors of this package, in the order in which they are applied."""


def build_processors(own: Sequence[str] = ()) -> tuple[LogitsProcessor, ...]:
    """All logits processors in order: a user's `own`, each a `module:Class`, come before the temperature.

    OptionError for one that cannot be had, or that takes the name of another processor or the field of another.
    """
    made = [
        import_class("logits processor", name, LogitsProcessor, "outrider.LogitsProcessor", ("name",))()  # type: ignore[type-abstract]
        for name in own
    ]
    names = {processor.name for processor in PROCESSORS}
    fields = {field.name for field in FIELDS}
    for processor in made:
        if processor.name in names:
            raise OptionError(f"logits processor {processor.name} has the name of another: name it apart")
        names.add(processor.name)
        for field in processor.fields:
            if field.name in fields:
                raise OptionError(f"logits processor {processor.name} declares {field.name}, which another reads")
            fields.add(field.name)
    return tuple(sorted((*PROCESSORS, *made), key=_order))


def own_fields(processors: Sequence[LogitsProcessor]) -> dict[str, SamplingField]:
    """The fields that requests give in `extra_args`, by name."""
    return {field.name: field for processor in processors for field in processor.fields if field not in FIELDS}


def _order(processor: LogitsProcessor) -> int:
    """The least length first, then a user's own, then what the likeliest tokens are cut by."""
    of_package = [known.name for known in PROCESSORS]
    return 2 * of_package.index(processor.name) if processor.name in of_package else 1
