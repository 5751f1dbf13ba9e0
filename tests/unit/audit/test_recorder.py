"""What roles speak to: never raises, never waits for a collector, makes one line of a flood."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from dicom_xai.audit import Participant, Recorder, messages, recorder
from dicom_xai.audit.recorder import person
from dicom_xai.audit.trail import Follower
from dicom_xai.config import AuditConfig
from dicom_xai.telemetry import Log, Metrics
from dicom_xai.telemetry.gathered import MOST_KINDS
from tests.make.audit_schema import faults_of
from tests.make.books import wait_until

NODE = Participant("STRANGER", address="10.1.2.3")


class Desk:
    """A recorder with what it counts and says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics = Metrics(CollectorRegistry())
        self.words = io.StringIO()
        config = AuditConfig(directory=folder, source_id="ai-host", site_id="Example Hospital")
        self.recorder = Recorder(config, "receiver", self.metrics, Log(self.words))

    def written(self) -> list[str]:
        follower = Follower(self.folder, 0)
        found = []
        while (record := follower.next()) is not None:
            found.append(record.message)
        follower.close()
        return found

    def count(self, outcome: str) -> float | None:
        name = "dicom_xai_audit_messages_total"
        return self.metrics.registry.get_sample_value(name, {"outcome": outcome})


@pytest.mark.promise("K6")
def test_a_message_is_on_disk_when_record_returns(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "audit")
    desk.recorder.record(messages.application_stopped(desk.recorder.process))
    (message,) = desk.written()
    assert faults_of(message) == []
    assert 'AuditEnterpriseSiteID="Example Hospital"' in message
    assert 'UserID="dicom-xai receiver"' in message
    assert desk.count("written") == 1


@pytest.mark.promise("K6")
def test_a_trail_that_cannot_be_written_is_counted_and_said_and_stops_nobody(
    tmp_path: Path,
) -> None:
    (tmp_path / "audit").write_text("a file where the folder should be")
    desk = Desk(tmp_path / "audit")
    desk.recorder.record(messages.application_stopped(desk.recorder.process))
    assert desk.count("lost") == 1
    assert '"audit-lost"' in desk.words.getvalue()


@pytest.mark.promise("K6")
def test_a_flood_of_refusals_is_a_few_lines_that_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "FIRST_GATHER_S", 30.0)  # ended by `stop`, not by waiting
    desk = Desk(tmp_path)
    desk.recorder.start()
    for _ in range(1000):
        desk.recorder.refused("not-allowed", NODE)
    for i in range(1000):
        desk.recorder.refused("called-ae", Participant(f"PROBE{i}", address="10.6.6.6"))
    desk.recorder.stop()
    found = desk.written()
    assert len(found) == MOST_KINDS + 1
    assert all(faults_of(message) == [] for message in found)
    assert "MTAwMA==" in found[0]  # 1000, in base64
    assert sum("others" in message for message in found) == 1


def test_refusals_of_one_kind_after_the_other_are_written_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "FIRST_GATHER_S", 0.01)
    desk = Desk(tmp_path)
    desk.recorder.start()
    for _ in range(2):
        before = len(desk.written())
        desk.recorder.refused("tls", NODE)
        wait_until(lambda before=before: len(desk.written()) > before, "it is written")
    desk.recorder.stop()


def test_a_person_is_who_the_system_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "somebody-else")
    monkeypatch.setenv("LOGNAME", "somebody-else")
    monkeypatch.setenv("SSH_CONNECTION", "10.9.8.7 50000 10.0.0.1 22")
    found = person()
    assert "somebody-else" not in (found.user_id, found.alternative_id)
    assert found.address == "10.9.8.7"
    assert found.is_requestor
