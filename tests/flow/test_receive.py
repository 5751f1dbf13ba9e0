"""What a sender is told, what is kept, and what does not happen."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable

import pytest
from pydicom.uid import SegmentationStorage

from dicom_xai.demo.phantom import fresh_uid
from dicom_xai.demo.site import Site
from tests.flow.conftest import Hospital
from tests.make.books import (
    answers,
    deliveries_of,
    jobs_of,
    metric,
    rows,
    wait_for_jobs,
    wait_until,
)
from tests.make.command import Running, command
from tests.make.studies import a_head, a_radiograph, changed, study_of


def test_the_same_bytes_again_are_stored_once_and_make_no_new_job(site: Site) -> None:
    phantom = a_radiograph()
    assert site.send(phantom.files) == [0x0000]
    wait_for_jobs(site, study_of(phantom))
    counted = metric(site, "dicom_xai_instances_received_total", outcome="duplicate")
    received, unknown = site.pacs.received, _unknown_files(site)
    assert site.send([*phantom.files, *phantom.files]) == [0x0000, 0x0000]
    wait_until(
        lambda: (
            metric(site, "dicom_xai_instances_received_total", outcome="duplicate") == counted + 2
        ),
        "two duplicates counted",
    )
    [stored] = _instances(site, phantom.datasets[0].SOPInstanceUID)
    assert stored["duplicates"] == 2
    assert len(jobs_of(site, study_of(phantom))) == 1
    assert site.pacs.received == received
    assert _unknown_files(site) == unknown


@pytest.mark.promise("D3")
def test_a_forced_retry_sends_the_same_bytes_under_the_same_uids(site: Site) -> None:
    phantom = a_radiograph()
    site.send(phantom.files)
    [job] = wait_for_jobs(site, study_of(phantom))
    before = {item.file for item in answers(site.pacs, study_of(phantom))}
    received = site.pacs.received
    ran = command(site, "ledger", "retry", str(job["id"]))
    assert ran.returncode == 0, ran.stderr
    [again] = wait_for_jobs(site, study_of(phantom))
    assert again["state"] == "done"
    assert again["token"] == int(str(job["token"])) + 1
    assert site.pacs.received == received + 2
    assert {item.file for item in answers(site.pacs, study_of(phantom))} == before
    # the stand-in answers 0x0111 to other bytes under a UID it holds
    assert [row["status"] for row in deliveries_of(site, study_of(phantom))] == [0, 0]


def test_a_forced_retry_counts_as_delivered_where_the_pacs_refuses_uids_it_holds(
    hospital: Hospital,
) -> None:
    site, phantom = hospital.site, a_radiograph()
    site.send(phantom.files, calling="NARROW")
    [job] = wait_for_jobs(site, study_of(phantom))
    resent = hospital.narrow.resent
    assert command(site, "ledger", "retry", str(job["id"])).returncode == 0
    wait_for_jobs(site, study_of(phantom))
    assert hospital.narrow.resent == resent + 1
    [sc] = [row for row in deliveries_of(site, study_of(phantom)) if row["kind"] == "sc"]
    assert (sc["state"], sc["status"]) == ("sent", 0x0111)


def test_a_forced_retry_after_the_deadline_is_not_late_once_more(hospital: Hospital) -> None:
    site, phantom = hospital.site, a_radiograph()
    site.send(phantom.files, calling="FLAKY")
    [job] = wait_for_jobs(site, study_of(phantom))
    [offset] = rows(site.folder, "SELECT value FROM meta WHERE key = 'offset_s'")

    def is_past() -> bool:
        now = time.clock_gettime(time.CLOCK_BOOTTIME) + float(str(offset["value"]))
        return now > float(str(job["deadline_at"]))

    wait_until(is_past, "the deadline has passed")
    counted = metric(site, "dicom_xai_budget_exceeded_total", route="one-flaky")
    assert command(site, "ledger", "retry", str(job["id"])).returncode == 0
    wait_for_jobs(site, study_of(phantom))
    assert metric(site, "dicom_xai_budget_exceeded_total", route="one-flaky") == counted


@pytest.mark.promise("D8")
def test_other_content_under_a_known_uid_is_refused_and_kept_apart(site: Site) -> None:
    phantom = a_radiograph()
    site.send(phantom.files)
    wait_for_jobs(site, study_of(phantom))
    before = [item.file for item in answers(site.pacs, study_of(phantom))]
    quarantined = metric(site, "dicom_xai_quarantined_instances")
    other = changed(phantom.files[0], SeriesDescription="another content")
    assert site.send([other]) == [0x0111]
    assert metric(site, "dicom_xai_quarantined_instances") == quarantined + 1
    assert [row["disposition"] for row in _instances(site, phantom.datasets[0].SOPInstanceUID)] == [
        "routed",
        "quarantined",
    ]
    assert len(jobs_of(site, study_of(phantom))) == 1
    assert [item.file for item in answers(site.pacs, study_of(phantom))] == before
    # and again: still refused, kept once
    assert site.send([other]) == [0x0111]
    assert len(_instances(site, phantom.datasets[0].SOPInstanceUID)) == 2


def test_our_own_results_are_taken_and_never_routed(site: Site) -> None:
    phantom = a_radiograph()
    site.send(phantom.files)
    wait_for_jobs(site, study_of(phantom))
    ours = [item.file for item in answers(site.pacs, study_of(phantom))]
    copies = [changed(file, SOPInstanceUID=fresh_uid()) for file in ours]
    counted = metric(site, "dicom_xai_instances_received_total", outcome="own")
    assert site.send([*ours, *copies]) == [0x0000] * 4
    assert metric(site, "dicom_xai_instances_received_total", outcome="own") == counted + 4
    assert len(jobs_of(site, study_of(phantom))) == 1
    dispositions = rows(
        site.folder,
        "SELECT disposition FROM instance WHERE study_instance_uid = ? ORDER BY id",
        study_of(phantom),
    )
    assert [row["disposition"] for row in dispositions] == ["routed", *["own"] * 4]


@pytest.mark.parametrize(
    "sop_class_uid",
    [
        pytest.param("1.2.840.10008.5.1.4.1.1.88.11", id="SR"),
        pytest.param("1.2.840.10008.5.1.4.1.1.88.59", id="KO"),
        pytest.param("1.2.840.10008.5.1.4.1.1.11.1", id="PR"),
        pytest.param(str(SegmentationStorage), id="SEG"),
    ],
)
def test_kinds_to_be_ignored_are_taken_and_never_routed(site: Site, sop_class_uid: str) -> None:
    phantom = a_radiograph()
    counted = metric(site, "dicom_xai_instances_received_total", outcome="ignored")
    assert site.send([changed(phantom.files[0], SOPClassUID=sop_class_uid)]) == [0x0000]
    assert metric(site, "dicom_xai_instances_received_total", outcome="ignored") == counted + 1
    assert jobs_of(site, study_of(phantom)) == []


def test_an_image_that_no_route_wants_is_taken_and_the_ledger_says_why(site: Site) -> None:
    phantom = a_radiograph()
    hand = changed(phantom.files[0], BodyPartExamined="HAND")
    assert site.send([hand]) == [0x0000]
    said = command(site, "ledger", "why", str(phantom.datasets[0].SOPInstanceUID))
    assert said.returncode == 0
    assert "unrouted" in said.stdout
    assert "BodyPartExamined" in said.stdout
    assert "calling_ae_title" in said.stdout  # the clause by which `blind` did not match
    assert jobs_of(site, study_of(phantom)) == []


@pytest.mark.promise("D6")
@pytest.mark.parametrize("missing", [1, 1000, 100_000])
def test_a_truncated_data_set_is_never_acknowledged(site: Site, missing: int) -> None:
    phantom = a_radiograph()
    [status] = site.send([phantom.files[0][:-missing]])
    assert status & 0xF000 == 0xC000
    assert _instances(site, phantom.datasets[0].SOPInstanceUID) == []
    # whole, it is welcome
    assert site.send(phantom.files) == [0x0000]
    wait_for_jobs(site, study_of(phantom))


@pytest.mark.promise("D5")
def test_without_room_nothing_is_taken_until_a_reload_makes_some(
    new_site: Callable[..., Site],
) -> None:
    site = new_site()
    site.pacs.start()
    site.write_config()
    text = site.config.read_text()
    assert "min_free_bytes: 100000000\n" in text
    site.config.write_text(text.replace("min_free_bytes: 100000000", f"min_free_bytes: {10**15}"))
    receiver = Running(site, "receiver").wait_until_ready()
    try:
        phantom = a_head(2)
        assert site.send(phantom.files) == [0xA700, 0xA700]
        assert rows(site.folder, "SELECT * FROM instance") == []
        status, missing = site.http("readyz")
        assert status == 503
        assert re.match(rf"spool: \d+ bytes free, .* spool.min_free_bytes is {10**15}$", missing)
        site.config.write_text(text)
        receiver.process.send_signal(signal.SIGHUP)
        wait_until(
            lambda: sum('"config-loaded"' in line for line in receiver.lines) == 2, "reloaded"
        )
        assert site.send(phantom.files) == [0x0000, 0x0000]
        wait_until(lambda: site.http("readyz") == (200, "ready\n"), "ready")
    finally:
        receiver.stop()


@pytest.mark.promise("D5")
def test_a_full_quota_refuses_with_a700_until_a_reload_raises_it(
    new_site: Callable[..., Site],
) -> None:
    site = new_site()
    site.pacs.start()
    site.write_config()
    text = site.config.read_text()
    keep_free = "min_free_bytes: 100000000\n"
    site.config.write_text(text.replace(keep_free, f"{keep_free}  max_bytes: 1000\n"))
    receiver = Running(site, "receiver").wait_until_ready()
    try:
        phantom = a_head(3)
        assert site.send(phantom.files[:2]) == [0x0000, 0xA700]  # one is larger than the quota
        wait_until(lambda: any('"refusing"' in line for line in receiver.lines), "it is said")
        site.config.write_text(text)
        receiver.process.send_signal(signal.SIGHUP)
        wait_until(lambda: any('"taking"' in line for line in receiver.lines), "it is said too")
        assert site.send(phantom.files) == [0x0000] * 3
    finally:
        receiver.stop()


def _instances(site: Site, uid: object) -> list[dict[str, object]]:
    return rows(
        site.folder, "SELECT * FROM instance WHERE sop_instance_uid = ? ORDER BY id", str(uid)
    )


def _unknown_files(site: Site) -> list[str]:
    """Files in the spool that the ledger does not know."""
    known = {
        str(row["spool_key"])
        for row in rows(
            site.folder, "SELECT spool_key FROM instance UNION SELECT spool_key FROM result"
        )
    }
    files = {path.name for path in (site.folder / "spool").rglob("*") if path.is_file()}
    return sorted(files - known)
