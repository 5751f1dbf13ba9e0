"""What the ledger tells at scrape time, and the sum over processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from dicom_xai.errors import LedgerBusyError
from dicom_xai.telemetry import LedgerCollector, LedgerState, Metrics, join_processes


def test_a_scrape_shows_what_the_ledger_knows(registry: CollectorRegistry) -> None:
    text = generate_latest(registry).decode()
    for line in (
        'dicom_xai_queue_depth_rows{queue="queued"} 3.0',
        'dicom_xai_outbox_depth_objects{destination="pacs"} 2.0',
        'dicom_xai_oldest_waiting_seconds{queue="queued"} 1.5',
        'dicom_xai_dead_letters_objects{destination="pacs"} 1.0',
        'dicom_xai_uncommitted_objects{destination="pacs"} 6.0',
        "dicom_xai_quarantined_instances 4.0",
        "dicom_xai_spool_free_bytes 500000.0",
        'dicom_xai_build_info{config="000000000000",version="1.0"} 1.0',
    ):
        assert line in text


def test_a_ledger_that_does_not_answer_leaves_the_other_metrics_on_the_page() -> None:
    def read() -> LedgerState:
        raise LedgerBusyError("the ledger cannot be read")

    registry = CollectorRegistry()
    Metrics(registry)
    registry.register(LedgerCollector(read))
    page = generate_latest(registry).decode()
    assert "dicom_xai_ledger_up 0.0" in page
    assert "dicom_xai_instances_received_total" in page


CHILD = """
import sys
from dicom_xai.telemetry import Metrics, Registry
metrics = Metrics(Registry())
metrics.results.labels("sc", "chest").inc(int(sys.argv[1]))
metrics.associations.set(int(sys.argv[1]))
metrics.triage_seconds.labels("chest", "stat").observe(1.9)
"""


def test_the_supervisor_shows_the_sum_of_all_processes(tmp_path: Path) -> None:
    for count in ("2", "5"):
        subprocess.run(
            [sys.executable, "-c", CHILD, count],
            check=True,
            env={"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PATH": ""},
        )
    registry = CollectorRegistry()
    join_processes(registry, str(tmp_path))
    text = generate_latest(registry).decode()
    assert 'dicom_xai_results_total{kind="sc",route="chest"} 7.0' in text
    bucket = 'dicom_xai_triage_seconds_bucket{le="2.0",priority="stat",route="chest"} 2.0'
    assert bucket in text
