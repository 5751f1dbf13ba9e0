"""What the ledger tells at scrape time, and the sum over processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from dicom_xai.errors import LedgerBusyError
from dicom_xai.telemetry import LedgerCollector, LedgerState, Metrics, ProcessesCollector


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
    text = page_of(ProcessesCollector(tmp_path, CollectorRegistry()))
    assert 'dicom_xai_results_total{kind="sc",route="chest"} 7.0' in text
    bucket = 'dicom_xai_triage_seconds_bucket{le="2.0",priority="stat",route="chest"} 2.0'
    assert bucket in text


ROLE = """
import sys, time
from dicom_xai.telemetry import Metrics, Registry
metrics = Metrics(Registry())
metrics.results.labels("sc", "chest").inc()
metrics.triage_seconds.labels("chest", "stat").observe(1.9)
metrics.associations.set(4)
metrics.back_pressure.labels("no-space").set(int(sys.argv[1]))
metrics.certificate_expiry.labels("listener").set(1000 + int(sys.argv[2]))
metrics.device.labels("cxr", sys.argv[3], "CPUExecutionProvider").set(1)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.promise("K5")
def test_a_role_that_was_killed_often_leaves_what_it_counted_and_nothing_else(
    tmp_path: Path,
) -> None:
    counted = ProcessesCollector(tmp_path, CollectorRegistry())
    before = []
    for number in range(3):
        with a_role(tmp_path, is_full=1, ends=number, device="cpu") as role:
            page = page_of(counted)
        before += series_of(page)
        (tmp_path / f"counter_{number}.db").touch()  # killed as it began
        counted.end(number)
        counted.end(role.pid)
        assert list(tmp_path.iterdir()) == []
        assert f'dicom_xai_results_total{{kind="sc",route="chest"}} {number + 1}.0' in page_of(
            counted
        )
    with a_role(tmp_path, is_full=0, ends=99, device="cuda:0"):
        page = page_of(counted)
    for line in (
        'dicom_xai_results_total{kind="sc",route="chest"} 4.0',
        'dicom_xai_triage_seconds_bucket{le="1.75",priority="stat",route="chest"} 0.0',
        'dicom_xai_triage_seconds_bucket{le="2.0",priority="stat",route="chest"} 4.0',
        'dicom_xai_triage_seconds_count{priority="stat",route="chest"} 4.0',
        "dicom_xai_open_associations 4.0",
        'dicom_xai_back_pressure_info{reason="no-space"} 0.0',
        'dicom_xai_tls_certificate_expiry_seconds{use="listener"} 1099.0',
    ):
        assert line in page
    devices = [line for line in page.splitlines() if line.startswith("dicom_xai_device_info")]
    assert devices == [
        'dicom_xai_device_info{device="cuda:0",model="cxr",provider="CPUExecutionProvider"} 1.0'
    ]
    assert len(series_of(page)) == len(set(before))


@contextmanager
def a_role(
    folder: Path, *, is_full: int, ends: int, device: str
) -> Iterator[subprocess.Popen[str]]:
    """A process that has counted and then is killed."""
    words = (str(is_full), str(ends), device)
    role = subprocess.Popen(
        [sys.executable, "-c", ROLE, *words],
        stdout=subprocess.PIPE,
        text=True,
        env={"PROMETHEUS_MULTIPROC_DIR": str(folder), "PATH": ""},
    )
    assert role.stdout is not None
    try:
        assert role.stdout.readline() == "ready\n"
        yield role
    finally:
        role.kill()
        role.wait()
        role.stdout.close()


def series_of(page: str) -> list[str]:
    return [line.rpartition(" ")[0] for line in page.splitlines() if not line.startswith("#")]


def page_of(counted: ProcessesCollector) -> str:
    registry = CollectorRegistry()
    registry.register(counted)
    return generate_latest(registry).decode()
