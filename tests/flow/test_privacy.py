"""No name, identifier or birth date leaves by logs, metrics, commands or the ledger."""

from __future__ import annotations

import json
import re

import pytest
from pydicom.uid import SegmentationStorage

from dicom_xai.demo.phantom import fresh_uid
from dicom_xai.demo.site import Site
from tests.make.books import answers, jobs_of, rows, wait_for_jobs, wait_until
from tests.make.command import command
from tests.make.studies import a_head, a_radiograph, changed, study_of

_KANJI = "\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B"  # ISO 2022 IR 87, as in PS3.5 Annex H
_WHO: dict[str, object] = {
    "PatientName": f"ZEBRAFINCH^QUAGGA={_KANJI}",
    "PatientID": "QX-QUOKKA-ID",
    "PatientBirthDate": "19010203",
    "AccessionNumber": "ACCQUOKKA",
    "OtherPatientIDs": "OTHER-QUOKKA",
    "ReferringPhysicianName": "REFERRING^ZEBRAFINCH",
    "StudyDescription": "ZEBRAFINCH was hereXX[31mred",
    "SeriesDescription": "for QX-QUOKKA-IDXnext line",
}
#: The birth date not as a part of a longer number, which a UID may well have.
_SECRETS = re.compile(
    r"ZEBRAFINCH|QUAGGA|QUOKKA|(?<!\d)19010203(?!\d)|\x1b|\$B;3ED|山田|\\u5c71", re.IGNORECASE
)


@pytest.mark.promise("C1")
@pytest.mark.promise("K5")
def test_nothing_that_names_a_patient_is_logged_counted_printed_or_kept_in_the_ledger(
    site: Site,
) -> None:
    since = site.log.stat().st_size
    fine, odd, torn, twice, mixed, hand = (
        *(a_radiograph() for _ in range(4)),
        a_head(4),
        a_radiograph(),
    )
    [known] = [_named(file) for file in fine.files]
    assert site.send([known]) == [0x0000]
    assert site.send([known]) == [0x0000]  # again
    assert site.send([_named(odd.files[0], BitsAllocated=13)]) == [0x0000]  # fails
    assert site.send([_named(torn.files[0])[:-500]])[0] & 0xF000 == 0xC000
    assert site.send([_named(twice.files[0])], calling="NARROW") == [0x0000]  # a dead letter
    assert site.send([_named(twice.files[0], SeriesNumber=77)]) == [0x0111]
    assert site.send([_named(hand.files[0], BodyPartExamined="HAND")]) == [0x0000]
    strangers = [_named(file) for file in mixed.files[:2]]
    assert set(site.send([*strangers, *mixed.files[2:]])) == {0x0000}  # of two patients
    for study in (fine, odd, twice, mixed):
        wait_for_jobs(site, study_of(study))
    site.send([answer.file for answer in answers(site.pacs, study_of(fine))])  # our own
    site.send([_named(hand.files[0], SOPClassUID=SegmentationStorage, SOPInstanceUID=fresh_uid())])

    jobs = [job for study in (fine, odd, twice, mixed) for job in jobs_of(site, study_of(study))]
    assert [job["state"] for job in jobs] == ["done", "failed", "done", "failed"]
    assert command(site, "ledger", "retry", str(jobs[1]["id"])).returncode == 0
    wait_until(lambda: jobs_of(site, study_of(odd))[0]["state"] == "failed", "it failed once more")
    said = {"metrics": site.http("metrics")[1], "log": _log(site, since)}
    for words in (
        ("check",),
        ("doctor",),
        ("ledger", "jobs"),
        ("ledger", "deliveries"),
        ("ledger", "events", "--limit", "500"),
        *(("ledger", "why", study_of(study)) for study in (fine, odd, twice, mixed, hand)),
    ):
        ran = command(site, *words)
        said[" ".join(words)] = ran.stdout + ran.stderr
    events = rows(site.folder, "SELECT kind, subject, detail FROM event")
    said["audit"] = (site.folder / "audit/audit.log").read_text("utf-8")
    said["events"] = "\n".join(str(event) for event in events)
    for name, text in said.items():
        assert text.strip(), name
        assert _SECRETS.findall(text) == [], name
    for path in site.folder.glob("ledger.db*"):
        if path.is_file():
            assert not re.search(rb"ZEBRAFINCH|QUAGGA|QUOKKA", path.read_bytes()), path.name


def _named(file: bytes, **attributes: object) -> bytes:
    """The file as somebody conspicuous, with control characters where text is free."""
    charset = ["", "ISO 2022 IR 87"]
    named = changed(file, SpecificCharacterSet=charset, **_WHO, **attributes)
    # what a data set may not hold and a sender may send all the same
    return named.replace(b"hereXX[31m", b"here\n\x1b[31m").replace(b"IDXnext", b"ID\nnext")


def _log(site: Site, since: int) -> str:
    """What was logged, each line one JSON object."""
    with site.log.open("rb") as log:
        log.seek(since)
        text = log.read().decode()
    for line in text.splitlines():
        assert isinstance(json.loads(line), dict), line
    return text
