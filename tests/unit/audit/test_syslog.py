"""To a collector: RFC 5424 messages, RFC 5425 frames, order, and a collector that is away."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from dicom_xai.audit import syslog
from dicom_xai.audit.syslog import Forwarder, framed, syslog_message
from dicom_xai.audit.trail import Record, Trail, rotated
from dicom_xai.config import SyslogConfig
from dicom_xai.telemetry import Log, Metrics
from tests.make.books import wait_until
from tests.make.certificates import Authority
from tests.make.collector import Collector


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[Collector]:
    made = Collector(Authority(tmp_path / "tls"))
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syslog, "POLL_S", 0.02)
    monkeypatch.setattr(syslog, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(syslog, "LONGEST_PAUSE_S", 0.1)


class Sending:
    """A forwarder with what it counts and says."""

    def __init__(self, folder: Path, collector: Collector, port: int | None = None) -> None:
        self.metrics = Metrics(CollectorRegistry())
        self.words = io.StringIO()
        config = SyslogConfig(host="127.0.0.1", port=port or collector.port, tls=collector.tls)
        self.forwarder = Forwarder(folder, config, self.metrics, Log(self.words))
        self.forwarder.start()

    def value(self, name: str) -> float:
        found = self.metrics.registry.get_sample_value(name)
        assert found is not None
        return found

    def __enter__(self) -> Sending:
        return self

    def __exit__(self, *_: object) -> None:
        self.forwarder.stop()


def fill(folder: Path, *texts: str, rotate_bytes: int = 10**9) -> Trail:
    trail = Trail(folder, rotate_bytes, 7.0)
    for text in texts:
        trail.append(lambda at, text=text: text)  # type: ignore[misc]
    return trail


@pytest.mark.promise("K6")
def test_a_message_is_rfc_5424_and_a_frame_is_octet_counted() -> None:
    record = Record(7, "2026-03-04T05:06:07.089+00:00", "", '<AuditMessage x="ü"/>')
    message = syslog_message(record, "ai-host", 4711)
    head, _, body = message.partition(b"\xef\xbb\xbf")
    assert head == b"<85>1 2026-03-04T05:06:07.089Z ai-host dicom-xai 4711 DICOM+RFC3881 - "
    assert body.decode("utf-8") == '<AuditMessage x="ü"/>'
    count, _, rest = framed(message).partition(b" ")
    assert int(count) == len(rest) == len(message)


@pytest.mark.promise("K6")
def test_what_the_file_gets_the_collector_gets_in_order(
    tmp_path: Path, collector: Collector
) -> None:
    trail = fill(tmp_path / "audit", *(f"<m{i}/>" for i in range(5)), rotate_bytes=500)
    with collector, Sending(tmp_path / "audit", collector) as sending:
        collector.wait_for(5)
        for i in range(5, 9):
            trail.append(lambda at, i=i: f"<m{i}/>")  # type: ignore[misc]
        frames = collector.wait_for(9)
        wait_until(lambda: sending.value("dicom_xai_audit_backlog_messages") == 0, "none is left")
    assert rotated(tmp_path / "audit")
    assert [frame[-5:] for frame in frames] == [b"<m%d/>" % i for i in range(9)]
    assert all(re.match(rb"<85>1 \S+ \S+ dicom-xai \d+ DICOM", frame) for frame in frames)
    assert sending.value("dicom_xai_audit_dropped_total") == 0


@pytest.mark.promise("K6")
def test_a_collector_that_was_away_gets_all_of_it_later(
    tmp_path: Path, collector: Collector
) -> None:
    with collector:
        pass  # it has a port now, and is gone again
    fill(tmp_path / "audit", "<a/>", "<b/>")
    with Sending(tmp_path / "audit", collector) as sending:
        wait_until(lambda: "audit-unreachable" in sending.words.getvalue(), "it was said")
        assert sending.value("dicom_xai_audit_backlog_messages") == 2
        with collector:
            frames = collector.wait_for(2)
    assert [frame[-4:] for frame in frames] == [b"<a/>", b"<b/>"]


@pytest.mark.promise("K6")
def test_what_a_broken_connection_may_have_lost_is_sent_again(
    tmp_path: Path, collector: Collector
) -> None:
    trail = fill(tmp_path / "audit", "<a/>")
    with Sending(tmp_path / "audit", collector.start()):
        collector.wait_for(1)
        collector.stop()
        trail.append(lambda at: "<b/>")
        with collector:
            wait_until(lambda: any(frame.endswith(b"<b/>") for frame in collector.frames), "b came")
    assert [frame[-4:] for frame in collector.frames] == [b"<a/>", b"<a/>", b"<b/>"]


@pytest.mark.promise("K6")
def test_a_later_process_goes_on_where_the_earlier_had_confirmed(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syslog, "CONFIRM_S", 0.0)
    trail = fill(tmp_path / "audit", "<a/>", "<b/>")
    sent = tmp_path / "audit/.sent"
    with collector:
        with Sending(tmp_path / "audit", collector):
            wait_until(lambda: sent.exists() and sent.read_text() == "2", "both are confirmed")
        trail.append(lambda at: "<c/>")
        with Sending(tmp_path / "audit", collector):
            frames = collector.wait_for(3)
    assert [frame[-4:] for frame in frames] == [b"<a/>", b"<b/>", b"<c/>"]


def test_one_process_forwards_at_a_time(tmp_path: Path, collector: Collector) -> None:
    trail = fill(tmp_path / "audit", "<a/>")
    with collector:
        first = Sending(tmp_path / "audit", collector)
        with Sending(tmp_path / "audit", collector):
            collector.wait_for(1)
            first.forwarder.stop()  # the second takes over, and is not sure of the first message
            trail.append(lambda at: "<b/>")
            wait_until(lambda: any(frame.endswith(b"<b/>") for frame in collector.frames), "b came")
    assert len(collector.frames) <= 3


@pytest.mark.promise("K6")
def test_messages_that_left_the_folder_unsent_are_counted(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "audit"
    fill(folder, *(f"<m{i}/>" for i in range(12)), rotate_bytes=500)
    (folder / ".sent").write_text("1")
    last, path = rotated(folder)[0]
    path.unlink()
    with collector, Sending(folder, collector) as sending:
        collector.wait_for(12 - last)
    assert sending.value("dicom_xai_audit_dropped_total") == last - 1


@pytest.mark.promise("K6")
def test_a_collector_with_another_name_gets_nothing(tmp_path: Path, collector: Collector) -> None:
    fill(tmp_path / "audit", "<a/>")
    collector.tls = collector.tls.model_copy(update={"server_name": "elsewhere"})
    with collector, Sending(tmp_path / "audit", collector) as sending:
        wait_until(lambda: "Hostname mismatch" in sending.words.getvalue(), "it was said")
    assert collector.frames == []
