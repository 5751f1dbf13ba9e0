"""Results on their way to destinations that are down, slow or narrow-minded."""

from __future__ import annotations

import pytest

from dicom_xai.demo.phantom import Phantom
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
from tests.make.command import command
from tests.make.studies import a_radiograph, study_of


@pytest.mark.promise("P1")
@pytest.mark.promise("P5")
def test_a_dead_destination_keeps_nobody_waiting_and_loses_nothing(hospital: Hospital) -> None:
    site, flaky = hospital.site, hospital.flaky
    studies = [a_radiograph() for _ in range(3)]
    flaky.stop()
    try:
        for phantom in studies:
            assert site.send(phantom.files, calling="TWO") == [0x0000]
        for phantom in studies:
            # the live destination is the first that has all objects
            wait_until(lambda each=phantom: _is_triaged(site, each), "triaged meanwhile")
            assert len(answers(site.pacs, study_of(phantom))) == 1
            assert jobs_of(site, study_of(phantom))[0]["overdue_at"] is None
        wait_until(
            lambda: (
                metric(site, "dicom_xai_deliveries_total", destination="flaky", outcome="transient")
                >= 2
            ),
            "tried and tried again",
        )
        assert site.http("readyz")[0] == 200
        assert metric(site, "dicom_xai_outbox_depth_objects", destination="flaky") == 3
    finally:
        flaky.start()
    for phantom in studies:
        wait_for_jobs(site, study_of(phantom))
        [here], [there] = answers(flaky, study_of(phantom)), answers(site.pacs, study_of(phantom))
        assert here.ds == there.ds
    assert metric(site, "dicom_xai_outbox_depth_objects", destination="flaky") == 0


def test_a_budget_is_exceeded_when_its_deadline_passes_not_when_a_pacs_comes_back(
    hospital: Hospital,
) -> None:
    site, flaky, phantom = hospital.site, hospital.flaky, a_radiograph()
    counted = metric(site, "dicom_xai_budget_exceeded_total", route="one-flaky")
    flaky.stop()
    try:
        site.send(phantom.files, calling="FLAKY")
        wait_until(
            lambda: (
                metric(site, "dicom_xai_budget_exceeded_total", route="one-flaky") == counted + 1
            ),
            "counted while nothing is delivered",
        )
        assert jobs_of(site, study_of(phantom))[0]["triaged_at"] is None
    finally:
        flaky.start()
    wait_for_jobs(site, study_of(phantom))
    assert len(answers(flaky, study_of(phantom))) == 1
    assert metric(site, "dicom_xai_budget_exceeded_total", route="one-flaky") == counted + 1


@pytest.mark.promise("P3")
def test_a_refused_kind_is_a_dead_letter_with_a_reason_and_the_others_go_on(
    hospital: Hospital,
) -> None:
    site, phantom = hospital.site, a_radiograph()
    site.send(phantom.files, calling="NARROW")
    wait_for_jobs(site, study_of(phantom))
    sent = {str(row["kind"]): row for row in deliveries_of(site, study_of(phantom))}
    assert sent["sc"]["state"] == "sent"
    assert str(sent["sc"]["sop_instance_uid"]) in hospital.narrow.kept
    assert sent["seg"]["state"] == "dead"
    assert sent["seg"]["attempts"] == 1
    assert sent["seg"]["reason"]
    assert metric(site, "dicom_xai_dead_letters_objects", destination="narrow") >= 1

    number = str(sent["seg"]["id"])
    shown = command(site, "ledger", "deliveries", "--state", "dead")
    assert shown.returncode == 0
    assert any(
        number in line.split() and str(sent["seg"]["reason"]) in line
        for line in shown.stdout.splitlines()
    )
    assert command(site, "ledger", "requeue", number).returncode == 0
    wait_until(lambda: _delivery(site, number)["attempts"] == 2, "tried again")
    wait_until(lambda: _delivery(site, number)["state"] == "dead", "refused again")
    assert command(site, "ledger", "skip", number).returncode == 0
    assert _delivery(site, number)["state"] == "skipped"
    assert command(site, "ledger", "requeue", number).returncode == 1  # no dead letter any more


def _is_triaged(site: Site, phantom: Phantom) -> bool:
    return any(job["triaged_at"] is not None for job in jobs_of(site, study_of(phantom)))


def _delivery(site: Site, number: str) -> dict[str, object]:
    [row] = rows(site.folder, "SELECT * FROM delivery WHERE id = ?", number)
    return row
