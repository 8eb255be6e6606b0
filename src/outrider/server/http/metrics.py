"""Prometheus metrics. Names are vLLM's where the meaning is the same, with the prefix `outrider:`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from http import HTTPMethod
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from outrider import __version__
from outrider.engine.completion import Completion
from outrider.engine.process.client import EngineClient, retry_seconds
from outrider.engine.process.messages import Facts, Snapshot

PREFIX = "outrider:"
CONTENT_TYPE = CONTENT_TYPE_LATEST

METHODS = frozenset(method.value for method in HTTPMethod)

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SLOW = (*_FAST[5:], 20.0, 40.0, 80.0, 160.0, 320.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Metrics:
    """All that is counted in the server's process, and a view of the engine's newest snapshot."""

    def __init__(self, client: EngineClient, facts: Facts, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._engine = _EngineCollector(client, facts, model_name)
        self._registry.register(self._engine)
        self._labels = {"model_name": model_name}
        self._typical_seconds = 1.0
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of completions that began to come.")
        self._generation_tokens = self._counter("generation_tokens", "Generated tokens.")
        self._first = self._histogram("time_to_first_token_seconds", "From a request's arrival to its first token.")
        self._inter_token = self._histogram(
            "inter_token_latency_seconds",
            "Between tokens: tokens that one step brought share the time since those before.",
            _FAST,
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "From a request's arrival to its end.")
        self._prompt_sizes = self._histogram("request_prompt_tokens", "Prompt tokens of ended completions.", _TOKENS)
        self._output_sizes = self._histogram(
            "request_generation_tokens", "Generated tokens of ended completions.", _TOKENS
        )
        self._restarts = self._counter("engine_restarts", "Engines that took the place of one that failed.")
        self._timeouts = self._counter("request_timeouts", "Requests that were not finished by their deadline.")
        self._ended = Counter(
            PREFIX + "request_success",
            "Completions that ended by themselves.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._http = Counter(
            PREFIX + "http_requests",
            "Answered requests.",
            ["model_name", "method", "handler", "status"],
            registry=self._registry,
        )

    def _counter(self, name: str, help_: str) -> Any:
        return Counter(PREFIX + name, help_, ["model_name"], registry=self._registry).labels(**self._labels)

    def _histogram(self, name: str, help_: str, buckets: Sequence[float] = _SLOW) -> Any:
        made = Histogram(PREFIX + name, help_, ["model_name"], buckets=buckets, registry=self._registry)
        return made.labels(**self._labels)

    def began(self, completion: Completion) -> None:
        """A completion got its first tokens."""
        self._prompt_tokens.inc(len(completion.parent.prompt_token_ids))

    def gained(self, num_tokens: int, since: float, now: float, first: bool) -> None:
        """A completion gained tokens at `now`, having waited from `since`: its last ones, or its arrival."""
        self._generation_tokens.inc(num_tokens)
        if first:
            self._first.observe(now - since)
            return
        for _ in range(num_tokens):
            self._inter_token.observe((now - since) / num_tokens)

    def ended(self, completion: Completion, arrival: float, now: float) -> None:
        """A completion is finished."""
        seconds, output = now - arrival, completion.output
        self._e2e.observe(seconds)
        self._typical_seconds += 0.1 * (seconds - self._typical_seconds)
        self._prompt_sizes.observe(len(completion.parent.prompt_token_ids))
        self._output_sizes.observe(len(output.token_ids))
        self._ended.labels(finished_reason=output.finish_reason, **self._labels).inc()

    def answered(self, method: str, handler: str, status: int) -> None:
        """A request was answered."""
        method = method if method in METHODS else "other"  # a client may write any, and each would be a series
        self._http.labels(method=method, handler=handler, status=str(status), **self._labels).inc()

    def restarted(self, facts: Facts) -> None:
        """Another engine has replaced one that failed."""
        self._restarts.inc()
        self._engine.facts = facts

    def timed_out(self) -> None:
        """A request was not finished by its deadline."""
        self._timeouts.inc()

    def retry_after(self) -> int:
        """Seconds after which the queue may have room: as long as recent requests took."""
        return retry_seconds(self._typical_seconds)

    def page(self) -> bytes:
        """In Prometheus' text format."""
        page: bytes = generate_latest(self._registry)
        return page


class _EngineCollector(Collector):
    """The engine's own figures, from its newest snapshot."""

    def __init__(self, client: EngineClient, facts: Facts, model_name: str) -> None:
        self._client, self.facts, self._model_name = client, facts, model_name

    def collect(self) -> Iterator[Any]:
        """Every family, once there is a snapshot of the engine."""
        yield self._gauge("engine_up", "1 while the engine's process lives and answers.", float(self._client.alive))
        yield from self._info()
        snapshot = self._client.snapshot
        if snapshot is not None:
            yield from self._load(snapshot)
            yield from self._speculation(snapshot)
            yield from self._watchdog(snapshot)

    def _load(self, snapshot: Snapshot) -> Iterator[Any]:
        yield self._gauge("num_requests_running", "Completions that hold a slot.", snapshot.num_running)
        yield self._gauge("num_requests_waiting", "Completions that wait for a slot.", snapshot.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of key/value blocks in use, 0 to 1.", snapshot.cache_usage)
        yield self._count("prefix_cache_queries", "Prompt tokens looked up.", snapshot.prefix_queries)
        yield self._count("prefix_cache_hits", "Prompt tokens found in the cache.", snapshot.prefix_hits)
        yield self._count("num_preemptions", "Completions put back for lack of blocks.", snapshot.num_preemptions)
        yield self._count("engine_steps", "Steps of the engine.", snapshot.num_steps)

    def _speculation(self, snapshot: Snapshot) -> Iterator[Any]:
        report = snapshot.acceptance
        yield self._count("spec_decode_num_drafts", "Rounds that verified drafts.", report.drafts)
        yield self._count("spec_decode_num_draft_tokens", "Drafts verified.", report.drafted)
        yield self._count("spec_decode_num_accepted_tokens", "Accepted drafts.", report.accepted)
        positions = CounterMetricFamily(
            PREFIX + "spec_decode_num_accepted_tokens_per_pos",
            "Accepted drafts, by their position in the round, from 1.",
            labels=["model_name", "position"],
        )
        for position, count in enumerate(report.per_position, start=1):
            positions.add_metric([self._model_name, str(position)], count)
        yield positions
        yield self._count("drafter_failures", "Errors of the drafter; they cost drafts.", snapshot.drafter_failures)
        yield self._gauge(
            "drafting_stopped",
            "1 once the drafter has failed too often and is left out.",
            float(snapshot.drafting_stopped),
        )

    def _watchdog(self, snapshot: Snapshot) -> Iterator[Any]:
        yield self._gauge(
            "watchdog_departed",
            "1 while acceptance has fallen under what is on record.",
            float(any(one.departed for one in snapshot.watched)),
        )
        labels = ["model_name", "temperature", "position"]
        expected = GaugeMetricFamily(PREFIX + "watchdog_expected_rate", "Acceptance rate on record.", labels=labels)
        measured = GaugeMetricFamily(PREFIX + "watchdog_measured_rate", "Recent acceptance rate.", labels=labels)
        for one in snapshot.watched:
            for family, rates in ((expected, one.expected), (measured, one.measured)):
                for position, rate in enumerate(rates, start=1):
                    family.add_metric([self._model_name, f"{one.temperature:g}", str(position)], rate)
        yield from (expected, measured)

    def _info(self) -> Iterator[Any]:
        facts = self.facts
        chosen = {
            "version": __version__,
            "runner": facts.runner,
            "forced": str(facts.forced).lower(),
            "method": facts.method,
            "num_speculative_tokens": str(facts.num_speculative_tokens),
            "verifier": facts.verifier,
        }
        yield self._labelled("runner_info", "What serves.", [chosen])
        yield self._labelled(
            "runner_passed_over_info",
            "A faster runner that does not serve, and why.",
            facts.passed_over,
            ("runner", "part", "feature", "reason"),
        )
        cache = {"block_size": str(facts.block_size), "num_gpu_blocks": str(facts.num_blocks)}
        yield self._labelled("cache_config_info", "The key/value cache.", [cache])

    def _labelled(
        self, name: str, help_: str, records: Iterable[dict[str, str]], names: Sequence[str] | None = None
    ) -> GaugeMetricFamily:
        """A gauge of 1 for each record, with the record as its labels."""
        records = list(records)
        known = list(names or records[0])
        family = GaugeMetricFamily(PREFIX + name, help_, labels=["model_name", *known])
        for record in records:
            family.add_metric([self._model_name, *(record[label] for label in known)], 1.0)
        return family

    def _gauge(self, name: str, help_: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(PREFIX + name, help_, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _count(self, name: str, help_: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(PREFIX + name, help_, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family
