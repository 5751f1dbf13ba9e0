"""A registry with everything on it that a role shows."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from dicom_xai.telemetry import BuildCollector, LedgerCollector, LedgerState, Metrics

STATE = LedgerState(
    depths={"queued": 3},
    outbox_depths={"pacs": 2},
    oldest_waiting_s={"queued": 1.5},
    dead_letters={"pacs": 1},
    uncommitted={"pacs": 6},
    quarantined=4,
    free_bytes=500_000,
)


@pytest.fixture
def registry() -> CollectorRegistry:
    found = CollectorRegistry()
    Metrics(found)
    found.register(LedgerCollector(lambda: STATE))
    found.register(BuildCollector("1.0", lambda: "0" * 64))
    return found
