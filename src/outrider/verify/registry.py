"""The verifiers by name. A new one adds its file and one line here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from outrider.errors import OptionError, nearest
from outrider.verify.base import Verifier
from outrider.verify.exact import Exact
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
