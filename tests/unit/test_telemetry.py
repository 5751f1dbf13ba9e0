"""Metrics, log lines that cannot hold a patient, and the HTTP face."""

from __future__ import annotations

import io
import json
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from dicom_xai.errors import (
    ConfigError,
    DecodeError,
    InvariantError,
    LedgerBusyError,
    StudyError,
)
from dicom_xai.stages import Stage
from dicom_xai.telemetry import (
    FIELDS,
    STAGE_BUCKETS,
    TRIAGE_BUCKETS,
    BuildCollector,
    Event,
    HTTPFace,
    LedgerCollector,
    LedgerState,
    Log,
    Metrics,
    describe,
    join_processes,
)

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


# ------------------------------------------------------------------ metrics


@pytest.mark.parametrize("buckets", [STAGE_BUCKETS, TRIAGE_BUCKETS])
def test_buckets_rise_and_hold_the_budget_itself(buckets: tuple[float, ...]) -> None:
    assert 2.0 in buckets
    assert list(buckets) == sorted(set(buckets))
    assert len([bound for bound in buckets if 0.5 <= bound <= 5]) >= 5


def test_the_budgets_boundary_stands_in_the_exposition_as_2_0() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.triage_seconds.labels("chest", "routine").observe(2.0)
    text = generate_latest(registry).decode()
    line = 'dicom_xai_triage_seconds_bucket{le="2.0",priority="routine",route="chest"} 1.0'
    assert line in text


def test_every_metric_is_ours_and_named_after_noun_and_unit(registry: CollectorRegistry) -> None:
    names = set()
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        names.add(family.name)
        assert family.documentation.endswith(".") or ":" in family.documentation
    units = re.compile(r"dicom_xai_[a-z_]+_(seconds|bytes|count|info|total)|dicom_xai_[a-z_]+")
    assert all(units.fullmatch(name) for name in names)
    promised = {
        "dicom_xai_stage_seconds",
        "dicom_xai_triage_seconds",
        "dicom_xai_budget_exceeded",
        "dicom_xai_instances_received",
        "dicom_xai_instances_refused",
        "dicom_xai_studies",
        "dicom_xai_results",
        "dicom_xai_deliveries",
        "dicom_xai_queue_depth_rows",
        "dicom_xai_oldest_waiting_seconds",
        "dicom_xai_device_info",
    }
    assert promised <= names


@pytest.mark.promise("K5")
def test_no_label_can_hold_what_a_sender_says(registry: CollectorRegistry) -> None:
    metrics = vars(Metrics(CollectorRegistry())).values()
    labels = {label for metric in metrics for label in getattr(metric, "_labelnames", ())}
    closed = {"stage", "model", "route", "priority", "how", "outcome", "reason", "kind", "use"}
    assert labels <= closed | {"destination", "role", "device", "provider", "explainer"}


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


def test_stages_in_metrics_are_the_stages_of_the_flow_in_their_order() -> None:
    assert [str(stage) for stage in Stage] == (
        "receive route queue decode infer explain encode outbox deliver".split()
    )


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


# ------------------------------------------------------------------ logs


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_one_json_object_with_event_level_and_time() -> None:
    stream = io.StringIO()
    log = Log(stream, role="receiver").bind(port=11112)
    log.info(Event.LISTENING, ae_title="DICOM_XAI")
    log.warning(Event.SWEPT, count=3)
    log.error(Event.ROLE_CRASHED)
    first, second, third = lines(stream)
    assert {key: first[key] for key in ("event", "level", "role", "port", "ae_title")} == {
        "event": "listening",
        "level": "info",
        "role": "receiver",
        "port": 11112,
        "ae_title": "DICOM_XAI",
    }
    assert (second["level"], third["level"]) == ("warning", "error")
    assert str(first["timestamp"]).endswith("Z")


@pytest.mark.promise("C1")
def test_a_value_cannot_break_out_of_its_line() -> None:
    stream = io.StringIO()
    Log(stream).info(Event.JOB_DONE, reason="a\n{")
    assert len(lines(stream)) == 1


@pytest.mark.parametrize("field", ["patient_name", "patient_id", "birth_date", "name", "path"])
def test_a_field_outside_the_closed_set_is_refused(field: str) -> None:
    stream = io.StringIO()
    log = Log(stream)
    with pytest.raises(InvariantError, match=rf"{field}.*telemetry\.FIELDS"):
        log.info(Event.JOB_DONE, **{field: "Doe"})
    with pytest.raises(InvariantError):
        log.bind(**{field: "Doe"})
    with pytest.raises(InvariantError):
        Log(stream, **{field: "Doe"})
    assert stream.getvalue() == ""


def test_no_field_is_made_for_a_person() -> None:
    assert not [
        field for field in FIELDS for word in ("patient", "birth", "person", "sex") if word in field
    ]


def a_failure() -> BaseException:
    try:
        try:
            raise ValueError("PatientName 'Doe^Jane' is too long")
        except ValueError as cause:
            raise DecodeError("frame 3 cannot be decoded") from cause
    except DecodeError as error:
        return error


def test_an_error_is_described_without_what_libraries_say() -> None:
    text = describe(a_failure())
    assert "DecodeError: frame 3 cannot be decoded" in text
    assert "ValueError" in text
    assert "Doe" not in text
    assert re.search(r"test_telemetry\.py:\d+ a_failure", text)


def raised_while_handling(is_hidden: bool) -> BaseException:
    try:
        try:
            raise KeyError("Doe^Jane")
        except KeyError:
            if is_hidden:
                raise StudyError("second") from None
            raise StudyError("second")  # noqa: B904  # the context is the point
    except StudyError as error:
        return error


@pytest.mark.parametrize("is_hidden", [False, True])
def test_an_error_while_handling_another_names_both_unless_told_otherwise(is_hidden: bool) -> None:
    text = describe(raised_while_handling(is_hidden))
    assert ("KeyError" in text) is not is_hidden
    assert "Doe" not in text


def test_an_exception_is_logged_as_an_error_of_one_line() -> None:
    stream = io.StringIO()
    Log(stream).exception(Event.JOB_FAILED, a_failure(), job=1)
    (line,) = lines(stream)
    assert (line["level"], line["job"]) == ("error", 1)
    assert "Doe" not in stream.getvalue()


LOUD = """
import logging, sys, warnings
if sys.argv[1] == "quiet":
    from dicom_xai.telemetry import quiet_libraries
    quiet_libraries()
for name in ("pydicom", "pynetdicom.acse", "highdicom.sc"):
    logging.getLogger(name).error("PatientName Doe^Jane")
warnings.warn("Invalid value for VR DA: '19551224x'")
"""


@pytest.mark.parametrize(("how", "is_heard"), [("loud", True), ("quiet", False)])
def test_libraries_that_quote_data_sets_are_not_heard(how: str, is_heard: bool) -> None:
    done = subprocess.run([sys.executable, "-c", LOUD, how], capture_output=True, text=True)
    assert done.returncode == 0
    assert ("Doe" in done.stderr) is is_heard
    assert ("19551224" in done.stderr) is is_heard


# ------------------------------------------------------------------ the HTTP face


class Probe:
    def __init__(self) -> None:
        self.missing: list[str] = []
        self.alive = True

    def is_alive(self) -> bool:
        return self.alive

    def why_not_ready(self) -> list[str]:
        return self.missing


def get(port: int, path: str) -> tuple[int, str, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode(), answer.headers["content-type"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), error.headers["content-type"]


@pytest.fixture
def probe() -> Probe:
    return Probe()


@pytest.fixture
def face(registry: CollectorRegistry, probe: Probe) -> Iterator[HTTPFace]:
    made = HTTPFace("127.0.0.1", 0, registry, probe)
    made.start()
    yield made
    made.stop()


def test_the_face_answers_metrics_and_probes(face: HTTPFace, probe: Probe) -> None:
    status, text, kind = get(face.port, "/metrics")
    assert status == 200
    assert kind.startswith("text/plain; version=")
    assert "dicom_xai_queue_depth_rows" in text
    assert get(face.port, "/livez")[:2] == (200, "alive\n")
    assert get(face.port, "/readyz")[:2] == (200, "ready\n")
    probe.missing = ["model phantom-cxr is loading", "ledger: locked"]
    probe.alive = False
    assert get(face.port, "/livez")[:2] == (503, "stuck\n")
    assert get(face.port, "/readyz")[:2] == (
        503,
        "model phantom-cxr is loading\nledger: locked\n",
    )
    assert get(face.port, "/elsewhere")[0] == 404


def test_a_taken_port_is_a_config_error_that_names_it(face: HTTPFace, probe: Probe) -> None:
    with pytest.raises(ConfigError, match=rf"telemetry: .*127\.0\.0\.1:{face.port}"):
        HTTPFace("127.0.0.1", face.port, CollectorRegistry(), probe)


def test_a_stopped_face_gives_its_port_back(registry: CollectorRegistry, probe: Probe) -> None:
    face = HTTPFace("127.0.0.1", 0, registry, probe)
    face.start()
    get(face.port, "/livez")
    face.stop()
    with socket.create_server(("127.0.0.1", face.port)):
        pass


class Broken(Collector):
    def collect(self) -> Iterator[object]:  # type: ignore[override]
        raise RuntimeError("PatientName Doe^Jane")


def test_a_scrape_that_fails_shows_nothing_of_the_cause(
    registry: CollectorRegistry, probe: Probe, capfd: pytest.CaptureFixture[str]
) -> None:
    face = HTTPFace("127.0.0.1", 0, registry, probe)
    registry._collector_to_names[Broken()] = []
    face.start()
    status, text, _ = get(face.port, "/metrics")
    face.stop()
    assert (status, "Doe" in text) == (500, False)
    assert "Doe" not in "".join(capfd.readouterr())


def test_a_ledger_that_does_not_answer_leaves_the_other_metrics_on_the_page() -> None:
    def read() -> LedgerState:
        raise LedgerBusyError("the ledger cannot be read")

    registry = CollectorRegistry()
    Metrics(registry)
    registry.register(LedgerCollector(read))
    page = generate_latest(registry).decode()
    assert "dicom_xai_ledger_up 0.0" in page
    assert "dicom_xai_instances_received_total" in page
