"""When a series is complete: releases, aborts, waits that are too long, images that come late."""

from __future__ import annotations

from collections.abc import Sequence

from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from pynetdicom import AE

from dicom_xai.deliver.storage_scu import StorageSCU
from dicom_xai.demo.phantom import Phantom
from dicom_xai.demo.site import Site
from tests.make.books import answers, jobs_of, rows, wait_for_jobs, wait_until
from tests.make.studies import a_head, study_of


def test_a_late_slice_amends_the_answer_and_leaves_the_first_one_alone(site: Site) -> None:
    phantom = a_head(12)
    site.send(phantom.files[:-1])
    wait_for_jobs(site, study_of(phantom))
    first = answers(site.pacs, study_of(phantom))
    assert site.send(phantom.files[-1:]) == [0x0000]
    jobs = wait_for_jobs(site, study_of(phantom), 2)
    assert [job["purpose"] for job in jobs] == ["triage", "amendment"]
    both = answers(site.pacs, study_of(phantom))
    amended = both[len(first) :]
    assert [item.file for item in both[: len(first)]] == [item.file for item in first]
    assert len(amended) == len(first) == 4
    assert not _uids(amended) & _uids(first)
    assert all("AMENDED" not in item.ds.SeriesDescription for item in first)
    assert all("AMENDED 1" in item.ds.SeriesDescription for item in amended)
    for item in amended:
        named = {str(element.value) for element in item.ds.iterall() if element.VR == "UI"}
        assert named & _uids(first), "an amendment names what it amends"
    # the amendment is about all slices, the late one among them
    assert _members(site, jobs[1]) == 12


def test_an_abort_is_no_loss_what_came_is_triaged_after_a_silence(site: Site) -> None:
    phantom = a_head(8)
    _send_and_abort(site, phantom, phantom.files[:5])
    [job] = wait_for_jobs(site, study_of(phantom))
    assert _members(site, job) == 5
    [unit] = _units(site, phantom)
    assert (unit["state"], unit["fired"]) == ("ready", "quiet after abort")
    # the silence is the route's quiet_s, from the last sign of life on
    assert float(str(job["ready_at"])) - float(str(unit["last_at"])) >= 0.5


def test_the_rest_after_an_abort_joins_the_unit_that_still_waits(site: Site) -> None:
    phantom = a_head(6)
    _send_and_abort(site, phantom, phantom.files[:3])
    statuses = site.send(phantom.files)  # as a sender's retry does: from the start
    assert set(statuses) == {0x0000}
    wait_until(lambda: jobs_of(site, study_of(phantom)), "a job")
    wait_until(
        lambda: all(job["state"] == "done" for job in jobs_of(site, study_of(phantom))), "done"
    )
    jobs = jobs_of(site, study_of(phantom))
    assert _members(site, jobs[-1]) == 6


def test_an_incomplete_unit_is_held_and_a_further_image_resumes_it(site: Site) -> None:
    phantom = a_head(4)
    scu = StorageSCU("service", site.address(calling="HOLD"))
    try:
        assert scu.send(phantom.files[0]).status == 0x0000
        # the association stays open beyond the route's max_wait_s
        wait_until(lambda: _units(site, phantom)[0]["state"] == "held", "held")
        assert jobs_of(site, study_of(phantom)) == []
        for file in phantom.files[1:]:
            assert scu.send(file).status == 0x0000
    finally:
        scu.close()
    [job] = wait_for_jobs(site, study_of(phantom))
    assert (job["purpose"], _members(site, job)) == ("triage", 4)


def test_two_associations_of_one_series_are_waited_for_both(site: Site) -> None:
    phantom = a_head(6)
    slow = StorageSCU("service", site.address())
    try:
        assert slow.send(phantom.files[0]).status == 0x0000
        site.send(phantom.files[1:5])
        [unit] = _units(site, phantom)
        assert unit["state"] == "waiting"
        assert slow.send(phantom.files[5]).status == 0x0000
    finally:
        slow.close()
    [job] = wait_for_jobs(site, study_of(phantom))
    assert _members(site, job) == 6


def _send_and_abort(site: Site, phantom: Phantom, files: Sequence[bytes]) -> None:
    ae = AE(ae_title="MODALITY")
    ae.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
    association = ae.associate("127.0.0.1", site.port, ae_title="DICOM_XAI")
    assert association.is_established
    for ds in phantom.datasets[: len(files)]:
        assert association.send_c_store(ds).Status == 0x0000
    association.abort()


def _units(site: Site, phantom: Phantom) -> list[dict[str, object]]:
    return rows(
        site.folder,
        "SELECT * FROM candidate WHERE study_instance_uid = ? ORDER BY id",
        study_of(phantom),
    )


def _members(site: Site, job: dict[str, object]) -> int:
    [row] = rows(
        site.folder,
        "SELECT count(*) AS n FROM candidate_instance WHERE candidate_id = ?",
        job["candidate_id"],
    )
    return int(str(row["n"]))


def _uids(found: Sequence[object]) -> set[str]:
    return {str(item.ds.SOPInstanceUID) for item in found}  # type: ignore[attr-defined]
