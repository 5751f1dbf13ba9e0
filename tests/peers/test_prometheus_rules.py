"""What Prometheus itself says of the rules, their tests, the scrape example and our metrics."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from dicom_xai.telemetry import BuildCollector, LedgerCollector, LedgerState, Metrics

FOLDER = Path(__file__).parents[2] / "deploy/prometheus"

pytestmark = pytest.mark.peers("promtool")


def promtool(*words: str) -> None:
    done = subprocess.run(["promtool", *words], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_are_valid() -> None:
    promtool("check", "rules", "rules.yaml")


def test_scrape_example_is_valid() -> None:
    promtool("check", "config", "prometheus.yaml")


@pytest.mark.slow
@pytest.mark.promise("P1")
def test_rules_fire_when_they_should_and_only_then() -> None:
    promtool("test", "rules", "rules.test.yaml")


def test_metrics_are_named_as_prometheus_wants() -> None:
    """All but one rule of its linter: our plain numbers end in the unit `count`."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.triage_seconds.labels("chest-x-ray", "routine").observe(0.3)
    metrics.stage_seconds.labels("infer", "phantom-cxr").observe(0.1)
    metrics.budget_exceeded.labels("chest-x-ray", "infer").inc()
    state = LedgerState({"queued": 1}, {"pacs": 1}, {"queued": 1.0}, {"pacs": 0}, {}, 0, 10**10)
    registry.register(LedgerCollector(lambda: state))
    registry.register(BuildCollector("1.0", lambda: "0" * 64))
    exposition = generate_latest(registry).decode()
    command = ["promtool", "check", "metrics"]
    done = subprocess.run(command, input=exposition, capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if line.strip()]
    house_rule = 'non-histogram and non-summary metrics should not have "_count" suffix'
    assert [line for line in complaints if not line.endswith(house_rule)] == []
