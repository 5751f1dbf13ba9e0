"""Who sent what, who was refused, who changed or retried something: all in the trail."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dicom_xai.audit.recorder import person
from dicom_xai.audit.trail import verify
from dicom_xai.demo.site import Site
from tests.make.associations import rejection
from tests.make.audit_schema import faults_of
from tests.make.books import jobs_of, wait_for_jobs, wait_until
from tests.make.certificates import Authority
from tests.make.collector import Collector
from tests.make.command import command
from tests.make.studies import a_radiograph, changed, study_of


def trail_of(site: Site) -> list[ElementTree.Element]:
    """All messages in the file, each one judged."""
    found = []
    for line in (site.folder / "audit/audit.log").read_text("utf-8").splitlines():
        message = json.loads(line)["message"]
        assert faults_of(message) == []
        found.append(ElementTree.fromstring(message))
    return found


def facts(message: ElementTree.Element) -> tuple[str, str, tuple[str, ...], tuple[str, ...]]:
    """Event, type, who and about what."""
    event = message.find("EventIdentification/EventID")
    kind = message.find("EventIdentification/EventTypeCode")
    assert event is not None
    who = tuple(str(each.get("UserID")) for each in message.iter("ActiveParticipant"))
    what = tuple(
        str(each.get("ParticipantObjectID"))
        for each in message.iter("ParticipantObjectIdentification")
    )
    return (
        str(event.get("originalText")),
        str("" if kind is None else kind.get("originalText")),
        who,
        what,
    )


@pytest.mark.slow
@pytest.mark.promise("K6")
def test_a_day_of_a_service_is_in_the_trail_and_at_the_collector(
    new_site: Callable[..., Site], tmp_path: Path
) -> None:
    with Collector(Authority(tmp_path / "tls")) as collector:
        tls = collector.tls
        syslog = (
            f"{{host: 127.0.0.1, port: {collector.port}, tls: {{ca: {tls.ca}, "
            f"certificate: {tls.certificate}, private_key: {tls.private_key}, "
            f"server_name: {tls.server_name}}}}}"
        )
        site = new_site(settings={"audit": f"  include_patient_id: true\n  syslog: {syslog}"})
        site.start()
        study = a_radiograph()
        [file] = [changed(each, PatientID="QX-17") for each in study.files]
        assert site.send([file]) == [0x0000]
        wait_for_jobs(site, study_of(study))
        assert rejection(site.port, calling="STRANGER", called="NOBODY") == (1, 1, 7)
        job = str(jobs_of(site, study_of(study))[0]["id"])
        assert command(site, "ledger", "retry", job).returncode == 0
        assert command(site, "ledger", "skip", "999").returncode == 1
        wait_until(
            lambda: sum("Transferred" in facts(each)[0] for each in trail_of(site)) >= 3, "resent"
        )
        (site.folder / "routes.yaml").write_text("routes: 7\n")
        site.reload()
        wait_until(
            lambda: any(facts(each)[1] == "Software Configuration" for each in trail_of(site)),
            "the refused config is in the trail",
        )
        site.stop()
        found = trail_of(site)
        # the collector has all but what was written while the last process ended
        collector.wait_for(len(found) - 2)
    uid, user = study_of(study), person().user_id
    said = [facts(each) for each in found]
    assert said[0][:2] == ("Application Activity", "Application Start")
    assert said[-1][:2] == ("Application Activity", "Application Stop")
    transferred = [each for each in said if each[0] == "DICOM Instances Transferred"]
    assert transferred[0] == (
        "DICOM Instances Transferred",
        "",
        ("MODALITY", "DICOM_XAI"),
        (uid, "QX-17"),
    )
    assert transferred[1][2:] == (("DICOM_XAI", "PACS"), (uid, "QX-17"))
    created = [each for each in said if each[0] == "DICOM Instances Accessed"]
    assert [each[3] for each in created] == [(uid, "QX-17")] * 2
    refused = [each for each in said if each[1] == "Node Authentication"]
    assert [each[2][1] for each in refused] == ["STRANGER"]
    verbs = [each for each in said if each[1] == "Use of Restricted Function"]
    assert [(each[2][0], each[3]) for each in verbs] == [
        (user, (f"job {job}",)),
        (user, ("delivery 999",)),
    ]
    assert verify(site.folder / "audit").problems == ()
    for path in (site.folder / "audit").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path.name
    first = collector.frames[0]
    assert b"Application Start" in first
    assert all(frame.startswith(b"<85>1 ") for frame in collector.frames)
