"""Whose images are whose, when they come mixed: by one association, by several, under one UID.

Other content under the UID of an image that is here is refused and kept apart: `test_receive`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path

import pytest

from dicom_xai import identity
from dicom_xai.deliver.storage_scu import StorageSCU
from dicom_xai.demo.site import ROUTINE, Site
from tests.flow.conftest import ONE_THREAD
from tests.make.books import answers, left_lying, wait_for_jobs
from tests.make.results import patched
from tests.make.studies import a_head, changed, header_of, study_of

#: Whoever sends it; a series is whole when all who bring it have gone.
ROUTES = """
routes:
  - name: head
    when: {Modality: {equals: CT}}
    trigger: association_release
    quiet_s: 1
    model: phantom-ct-head
    explain: [grad-cam]
    findings: 1
    send: [{object: sc, to: [pacs], slices: 3}, {object: seg, to: [pacs]}]
    budget_s: 60
"""

pytestmark = pytest.mark.promise("C2")


@pytest.fixture(scope="module")
def site(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("patients")
    with Site(folder, routes=ROUTES, models=models, environment=ONE_THREAD) as each:
        yield each


def send_in_turn(site: Site, *sent: tuple[str, Sequence[bytes]]) -> None:
    """One association for each calling AE title, all open at once; an object of each in turn."""
    lines = [StorageSCU("service", site.address(ROUTINE, calling)) for calling, _ in sent]
    try:
        for turn in zip_longest(*(files for _, files in sent)):
            for line, file in zip(lines, turn, strict=True):
                assert file is None or line.send(file).status == 0x0000
    finally:
        for line in lines:
            line.close()


def interleaved(*studies: Sequence[bytes]) -> list[bytes]:
    return list(chain.from_iterable(zip(*studies, strict=True)))


def results_of(site: Site, files: Sequence[bytes]) -> list[str]:
    """SOP Instance UIDs of a study's results, each of which belongs to its patient."""
    study = str(header_of(files[0]).StudyInstanceUID)
    [job] = wait_for_jobs(site, study)
    assert job["state"] == "done", job["note"]
    made = answers(site.pacs, study)
    assert len(made) == 4
    for each in made:
        identity.compare(identity.read_block(files[0]), identity.read_block(each.file))
    return [str(each.ds.SOPInstanceUID) for each in made]


def two_patients() -> tuple[list[bytes], list[bytes]]:
    """One number, given to two people at two places."""
    here, there = a_head(4).files, a_head(4).files
    number: dict[str, object] = {"PatientID": "4711"}
    return (
        [changed(file, **number, PatientName="One", IssuerOfPatientID="HERE") for file in here],
        [changed(file, **number, PatientName="Two", IssuerOfPatientID="THERE") for file in there],
    )


def test_two_patients_in_turn_over_one_association_are_never_mixed(site: Site) -> None:
    one, two = two_patients()
    send_in_turn(site, ("MODALITY", interleaved(one, two)))
    assert not {*results_of(site, one)} & {*results_of(site, two)}


def test_two_patients_in_turn_over_two_associations_are_never_mixed(site: Site) -> None:
    one, two = two_patients()
    send_in_turn(site, ("CT1", one), ("CT2", two))
    assert not {*results_of(site, one)} & {*results_of(site, two)}


def test_two_studies_whose_series_have_one_uid_are_two_units(site: Site) -> None:
    one, two = two_patients()
    series = str(header_of(one[0]).SeriesInstanceUID)
    two = [changed(file, SeriesInstanceUID=series) for file in two]
    send_in_turn(site, ("CT1", interleaved(one, two)))
    assert not {*results_of(site, one)} & {*results_of(site, two)}


def test_one_study_from_two_senders_is_one_unit(site: Site) -> None:
    phantom = a_head(6)
    send_in_turn(site, ("CT1", phantom.files[::2]), ("CT2", phantom.files[1::2]))
    results_of(site, phantom.files)
    [job] = wait_for_jobs(site, study_of(phantom))
    assert job["note"] == ""  # nothing is missing


@pytest.mark.parametrize(
    "other",
    [{"PatientID": "OTHER"}, {"IssuerOfPatientID": "THERE"}, {"PatientName": "Else^Somebody"}],
    ids=["another number", "another issuer", "another name"],
)
def test_one_study_of_two_patients_from_two_senders_is_stopped(
    site: Site, other: dict[str, object]
) -> None:
    phantom = a_head(4)
    files = [changed(file, IssuerOfPatientID="HERE") for file in phantom.files]
    send_in_turn(site, ("CT1", files[:2]), ("CT2", [changed(file, **other) for file in files[2:]]))
    [job] = wait_for_jobs(site, study_of(phantom))
    assert job["state"] == "failed"
    assert job["note"] == f"4 instances of one unit differ in {next(iter(other))}"
    assert len(answers(site.pacs, study_of(phantom))) == 1  # the note


def test_a_name_in_capitals_is_a_warning_that_names_no_patient(site: Site) -> None:
    phantom = a_head(4)
    forms = (b"Doe^Jane", b"DOE^JANE", b"Doe^Jane", b"doe^jane^^")
    files = [
        patched(file, PatientName=form, PatientBirthDate=b"19330707")
        for file, form in zip(phantom.files, forms, strict=True)
    ]
    assert set(site.send(files)) == {0x0000}
    [job] = wait_for_jobs(site, study_of(phantom))
    assert (job["state"], job["note"]) == ("done", "images differ in the formatting of PatientName")
    sources = {str(header_of(file).SOPInstanceUID): identity.read_block(file) for file in files}
    made = answers(site.pacs, study_of(phantom))
    assert len(made) == 4
    for each in (each for each in made if not each.is_seg):
        [source] = each.ds.SourceImageSequence
        identity.compare(sources[source.ReferencedSOPInstanceUID], identity.read_block(each.file))
    [line] = [line for line in site.log.read_text().splitlines() if "patient-reformatted" in line]
    assert '"level": "warning"' in line
    assert "PatientName" in line
    assert "doe" not in line.lower()
    assert left_lying(site.folder) == []
