"""Metrics without an engine, and the dashboard that shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from outrider.core.output import AcceptanceTally
from outrider.engine.process.messages import Facts, Snapshot, WatchedRates
from outrider.server.http.metrics import Metrics

DASHBOARD = Path(__file__).parents[4] / "examples" / "grafana_dashboard.json"
REASON = "it needs a CUDA device: run it on one"
FACTS = Facts(
    max_model_len=2048,
    max_num_seqs=8,
    vocab_size=100,
    eos_token_ids=[0],
    num_blocks=10,
    block_size=16,
    method="some",
    num_speculative_tokens=2,
    verifier="exact",
    faithful=True,
    dtype="float32",
    device="cpu",
    runner="eager",
    forced=False,
    passed_over=[{"runner": "graph", "part": "the device", "feature": "CUDA", "reason": REASON}],
)
SNAPSHOT = Snapshot(
    num_running=3,
    num_waiting=4,
    cache_usage=0.5,
    prefix_queries=100,
    prefix_hits=25,
    num_preemptions=1,
    num_steps=50,
    acceptance=AcceptanceTally.of(20, (0, 4, 6)).report(),
    watched=(WatchedRates(0.0, (0.8, 0.6), (0.4, 0.1), True), WatchedRates(1.0, (0.7, 0.5), (0.7, 0.5), False)),
)


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of the page by its name and labels."""
    found = {}
    for line in metrics.page().decode().splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            labels = frozenset(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', name))
            found[name.partition("{")[0], labels] = float(value)
    return found


@pytest.fixture
def metrics() -> Metrics:
    client: Any = SimpleNamespace(alive=True, snapshot=SNAPSHOT)
    made = Metrics(client, FACTS, "m")
    made.gained(1, 0.0, 0.5, True)
    made.gained(3, 0.5, 0.8, False)
    made.answered("POST", "/v1/completions", 200)
    made._ended.labels(finished_reason="stop", model_name="m").inc()
    return made


def test_speculation_and_the_watchdog(metrics: Metrics) -> None:
    found = samples(metrics)
    model = ("model_name", "m")

    def value(name: str, **labels: str) -> float:
        return found[f"outrider:{name}", frozenset({model, *labels.items()})]

    report = SNAPSHOT.acceptance
    assert value("spec_decode_num_drafts_total") == report.drafts == 10
    assert value("spec_decode_num_draft_tokens_total") == 20
    assert value("spec_decode_num_accepted_tokens_total") == report.accepted == 16
    for position, count in enumerate(report.per_position, start=1):
        assert value("spec_decode_num_accepted_tokens_per_pos_total", position=str(position)) == count
    assert value("watchdog_departed") == 1
    assert value("watchdog_measured_rate", temperature="0", position="2") == 0.1
    assert value("watchdog_expected_rate", temperature="1", position="1") == 0.7
    told = {"runner": "graph", "part": "the device", "feature": "CUDA", "reason": REASON}
    assert value("runner_passed_over_info", **told) == 1
    assert value("inter_token_latency_seconds_count") == 3 and value("time_to_first_token_seconds_count") == 1


def test_another_engine_is_counted_and_told_of(metrics: Metrics) -> None:
    metrics.restarted(facts_but(num_blocks=7))
    metrics.timed_out()
    found = samples(metrics)
    labels = frozenset({("model_name", "m")})
    assert found["outrider:engine_restarts_total", labels] == found["outrider:request_timeouts_total", labels] == 1
    assert ("outrider:cache_config_info", labels | {("block_size", "16"), ("num_gpu_blocks", "7")}) in found


def facts_but(**fields: Any) -> Facts:
    return Facts(**{name: getattr(FACTS, name) for name in FACTS.__struct_fields__} | fields)


def panels() -> list[dict[str, Any]]:
    return json.loads(DASHBOARD.read_text())["panels"]  # type: ignore[no-any-return]


def queries() -> list[tuple[str, str]]:
    """Each query of the dashboard and how its series are named."""
    targets = [target for panel in panels() for target in panel["targets"]]
    return [(target["expr"], target["legendFormat"]) for target in targets]


@pytest.mark.parametrize(("query", "legend"), queries())
def test_the_dashboard_asks_for_what_there_is(metrics: Metrics, query: str, legend: str) -> None:
    found = samples(metrics)
    names = re.findall(r"outrider:\w+", query)
    assert names
    labels: set[str] = set()
    for name in names:
        of_name = [labels_ for name_, labels_ in found if name_ == name]
        assert of_name, f"there is no metric {name}"
        labels |= {label for each in of_name for label, _ in each}
    asked = set(re.findall(r"{{(\w+)}}", legend)) | set(re.findall(r"(\w+)=\"", query))
    asked |= {label for group in re.findall(r"by \(([^)]*)\)", query) for label in re.split(r",\s*", group)}
    assert asked <= labels
    assert query.count("(") == query.count(")") and query.count("{") == query.count("}")


@pytest.mark.parametrize("query", [query for query, _ in queries() if "_info{" not in query])
def test_the_dashboard_puts_the_servers_of_one_model_together(query: str) -> None:
    of_model = re.findall(r"outrider:\w+({[^}]*})", query)
    assert of_model and set(of_model) == {'{model_name="$model"}'}
    aggregated = r"\b(?:sum|min|max)(?: by \([a-z_, ]+\))? ?\((?:rate\(|increase\()?outrider:"
    assert len(re.findall(aggregated, query)) == query.count("outrider:"), "a series an instance"


def test_the_dashboard_shows_every_metric(metrics: Metrics) -> None:
    names = {name for name, _ in samples(metrics) if not name.endswith("_created")}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}
    shown = {re.sub(r"_bucket$", "", name) for query, _ in queries() for name in re.findall(r"outrider:\w+", query)}
    assert families - shown == set()


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    document = json.loads(DASHBOARD.read_text())
    assert document["title"] and document["uid"] and document["schemaVersion"] >= 36
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24 and not cells & taken, f"{panel['title']} lies on another"
        taken |= cells
        assert panel["targets"] and panel["datasource"]["uid"] == "${datasource}"
    variables = {each["name"] for each in document["templating"]["list"]}
    assert {"datasource", "model"} == variables
