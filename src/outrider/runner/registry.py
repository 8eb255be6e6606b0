"""The runners there are, fastest first: the order in which the oracle tries them."""

from __future__ import annotations

from outrider.runner.base import Runner
from outrider.runner.eager import EagerRunner
from outrider.runner.graph import GraphRunner

RUNNERS: tuple[type[Runner], ...] = (GraphRunner, EagerRunner)
