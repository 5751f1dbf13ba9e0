"""Alert rules, dashboard and runbook speak of what the code measures, and of each other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from dicom_xai.telemetry import (
    STAGE_BUCKETS,
    TRIAGE_BUCKETS,
    BuildCollector,
    LedgerCollector,
    LedgerState,
    Metrics,
)

DEPLOY = Path(__file__).parents[3] / "deploy"
RULES = DEPLOY / "prometheus/rules.yaml"

#: What a metric of each type is called in the exposition.
ENDINGS = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_count", "_sum"),
    "info": ("_info",),
}


@pytest.fixture(scope="module")
def declared() -> set[str]:
    registry = CollectorRegistry()
    Metrics(registry)
    state = LedgerState({}, {}, {}, {}, {}, quarantined=0, free_bytes=0)
    registry.register(LedgerCollector(lambda: state))
    registry.register(BuildCollector("1.0", lambda: "0" * 64))
    return {
        family.name + ending for family in registry.collect() for ending in ENDINGS[family.type]
    }


@pytest.fixture(scope="module")
def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


@pytest.fixture(scope="module")
def dashboard() -> Any:
    return json.loads((DEPLOY / "grafana/dicom-xai.json").read_text("utf-8"))


def metrics_in(expression: str) -> set[str]:
    """Names of our metrics in a PromQL expression, recorded ones (with colons) too."""
    return set(re.findall(r"\bdicom_xai[a-zA-Z0-9_:]*", expression))


def panels_of(dashboard: Any) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def test_every_metric_in_the_rules_is_declared(
    rules: list[dict[str, Any]], declared: set[str]
) -> None:
    recorded = {rule["record"] for rule in rules if "record" in rule}
    used = set().union(*(metrics_in(rule["expr"]) for rule in rules))
    assert used
    assert used - recorded - declared == set()


def test_every_metric_in_the_rule_tests_is_declared(declared: set[str]) -> None:
    cases = yaml.safe_load((DEPLOY / "prometheus/rules.test.yaml").read_text("utf-8"))["tests"]
    series = [item["series"] for case in cases for item in case["input_series"]]
    used = {name.partition("{")[0] for name in series}
    assert used - declared == {"up", "probe_success"}


def test_every_metric_on_the_dashboard_is_declared_or_recorded(
    dashboard: Any, rules: list[dict[str, Any]], declared: set[str]
) -> None:
    recorded = {rule["record"] for rule in rules if "record" in rule}
    variables = [item["definition"] for item in dashboard["templating"]["list"][1:]]
    queries = [target["expr"] for panel in panels_of(dashboard) for target in panel["targets"]]
    used = set().union(*map(metrics_in, queries + variables))
    assert used - recorded - declared == set()


def test_every_declared_metric_is_on_the_dashboard(dashboard: Any, declared: set[str]) -> None:
    queries = "\n".join(
        target["expr"] for panel in panels_of(dashboard) for target in panel["targets"]
    )
    shown = {re.sub(r"_(bucket|count|sum)$", "", name) for name in metrics_in(queries)}
    stems = {re.sub(r"_(bucket|count|sum)$", "", name) for name in declared}
    assert stems - shown == set()


def test_the_budget_is_a_bucket_boundary() -> None:
    """`le="2.0"` makes the objective a plain ratio of counters."""
    assert 2.0 in TRIAGE_BUCKETS
    assert 2.0 in STAGE_BUCKETS


def test_every_alert_says_how_bad_it_is_and_where_to_read_on(rules: list[dict[str, Any]]) -> None:
    text = (DEPLOY / "runbook.md").read_text("utf-8")
    sections = {title.lower() for title in re.findall(r"^### (\w+)", text, re.MULTILINE)}
    alerts = [rule for rule in rules if "alert" in rule]
    assert alerts
    for alert in alerts:
        assert alert["labels"]["severity"] in ("page", "ticket")
        path, _, anchor = alert["annotations"]["runbook"].partition("#")
        assert path == "deploy/runbook.md"
        assert anchor in sections, f"{alert['alert']} has no section in the runbook"
    anchors = {alert["annotations"]["runbook"].partition("#")[2] for alert in alerts}
    assert sections - anchors == set(), "the runbook has a section that no alert points to"


def test_every_alert_has_a_case_in_which_it_fires(rules: list[dict[str, Any]]) -> None:
    text = (DEPLOY / "prometheus/rules.test.yaml").read_text("utf-8")
    fired = set(re.findall(r'alertname="(\w+)"', text))
    assert {rule["alert"] for rule in rules if "alert" in rule} == fired


def test_dashboard_has_a_fixed_identity(dashboard: Any) -> None:
    assert (dashboard["uid"], dashboard["id"]) == ("dicom-xai", None)
    assert dashboard["schemaVersion"] == 41


def test_every_query_goes_to_the_chosen_datasource(dashboard: Any) -> None:
    first = dashboard["templating"]["list"][0]
    assert (first["name"], first["type"]) == ("datasource", "datasource")
    for panel in panels_of(dashboard):
        for item in (panel, *panel["targets"]):
            assert item["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_panels_have_their_own_id_and_place(dashboard: Any) -> None:
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    cells = [
        (x, y)
        for panel in dashboard["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert max(x for x, _ in cells) < 24
