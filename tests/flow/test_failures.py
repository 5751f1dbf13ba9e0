"""A study that cannot be done is said to be so, at the PACS and in the books; never guessed."""

from __future__ import annotations

from io import BytesIO

import pytest
from pydicom import dcmread
from pydicom.uid import MPEG2MPML, RLELossless, SecondaryCaptureImageStorage

from dicom_xai import identity
from dicom_xai.demo.phantom import to_bytes
from dicom_xai.demo.site import Site
from tests.make.books import answers, jobs_of, metric, wait_for_jobs
from tests.make.studies import a_head, a_radiograph, changed, header_of, study_of


@pytest.mark.promise("C2")
def test_two_patients_in_one_series_get_no_result_but_a_note(site: Site) -> None:
    phantom = a_head(6)
    mixed = [
        *phantom.files[:3],
        *(changed(file, PatientID="PHANTOM-OTHER") for file in phantom.files[3:]),
    ]
    counted = metric(site, "dicom_xai_studies_total", route="head", outcome="IdentityError")
    assert set(site.send(mixed)) == {0x0000}
    [job] = wait_for_jobs(site, study_of(phantom))
    assert job["state"] == "failed"
    outcome = metric(site, "dicom_xai_studies_total", route="head", outcome="IdentityError")
    assert outcome == counted + 1
    [note] = answers(site.pacs, study_of(phantom))
    assert note.ds.SOPClassUID == SecondaryCaptureImageStorage
    assert "not performed" in _words(note.file)
    # it is the first image's, whole; nothing of the other patient is in it
    identity.compare(identity.read_block(mixed[0]), identity.read_block(note.file))
    strangers = [str(header_of(file).SOPInstanceUID) for file in mixed[3:]]
    assert not [word for word in ("PHANTOM-OTHER", *strangers) if word.encode() in note.file]
    assert "PHANTOM" not in str(job["note"])


@pytest.mark.promise("C2")
def test_a_patient_under_another_patients_study_is_no_amendment_of_the_first(site: Site) -> None:
    phantom = a_head(4)
    site.send(phantom.files[:3])
    wait_for_jobs(site, study_of(phantom))
    before = answers(site.pacs, study_of(phantom))
    site.send([changed(phantom.files[3], PatientID="PHANTOM-OTHER")])
    jobs = wait_for_jobs(site, study_of(phantom), 2)
    assert [job["state"] for job in jobs] == ["done", "failed"]
    [note] = answers(site.pacs, study_of(phantom))[len(before) :]
    assert "not performed" in _words(note.file)
    assert b"PHANTOM-OTHER" not in note.file
    identity.compare(identity.read_block(phantom.files[0]), identity.read_block(note.file))


@pytest.mark.promise("C4")
@pytest.mark.parametrize(
    "defect",
    [
        pytest.param({"BitsAllocated": 13}, id="a depth that nobody uses"),
        pytest.param({"PhotometricInterpretation": "PALETTE COLOR"}, id="a palette, and none"),
    ],
)
def test_an_image_that_cannot_be_decoded_gets_a_note_at_the_pacs(
    site: Site, defect: dict[str, object]
) -> None:
    phantom = a_radiograph()
    source = changed(phantom.files[0], **defect)
    failed = metric(site, "dicom_xai_studies_total", route="chest", outcome="DecodeError")
    assert site.send([source]) == [0x0000]
    [job] = wait_for_jobs(site, study_of(phantom))
    assert job["state"] == "failed"
    now_failed = metric(site, "dicom_xai_studies_total", route="chest", outcome="DecodeError")
    assert now_failed == failed + 1
    [note] = answers(site.pacs, study_of(phantom))
    assert note.ds.SOPClassUID == SecondaryCaptureImageStorage
    assert "not performed" in _words(note.file)
    identity.compare(identity.read_block(source), identity.read_block(note.file))


@pytest.mark.parametrize(
    "defect",
    [
        pytest.param({"PixelData": None}, id="no pixels"),
        pytest.param({"Columns": 9999}, id="fewer pixels than the header says"),
        pytest.param({"Rows": None}, id="no rows"),
    ],
)
def test_an_image_that_is_not_whole_is_refused_at_the_door(
    site: Site, defect: dict[str, object]
) -> None:
    phantom = a_radiograph()
    [status] = site.send([changed(phantom.files[0], **defect)])
    assert status & 0xF000 == 0xC000
    assert jobs_of(site, study_of(phantom)) == []


def test_a_silent_route_fails_without_a_word_to_the_pacs(site: Site) -> None:
    phantom = a_radiograph()
    site.send([changed(phantom.files[0], **_UNREADABLE)], calling="SILENT")
    [job] = wait_for_jobs(site, study_of(phantom))
    assert job["state"] == "failed"
    assert str(job["note"])
    assert answers(site.pacs, study_of(phantom)) == []


def test_a_video_is_not_agreed_to(site: Site) -> None:
    phantom = a_radiograph()
    ds = dcmread(BytesIO(phantom.files[0]))
    ds.compress(RLELossless, generate_instance_uid=False)
    ds.file_meta.TransferSyntaxUID = MPEG2MPML  # what is inside is not looked at
    [status] = site.send([to_bytes(ds)])
    assert status == 0x0122  # what our own sender says of a refused presentation context


#: What the receiver takes and decoding cannot: more bits stored than there are.
_UNREADABLE: dict[str, object] = {"BitsAllocated": 13}


def _words(file: bytes) -> str:
    """All text of an object but its pixels."""
    ds = dcmread(BytesIO(file), stop_before_pixels=True)
    return " ".join(str(element.value) for element in ds.iterall() if element.VR != "SQ")
