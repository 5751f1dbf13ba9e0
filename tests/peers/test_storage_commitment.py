"""Storage commitment with an Orthanc, both ways, through a whole service."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dicom_xai.demo.site import ROUTINE, Site
from tests.make.books import deliveries_of, metric, rows, wait_for_jobs, wait_until
from tests.make.command import command
from tests.make.orthanc import Orthanc
from tests.make.studies import a_radiograph, study_of

pytestmark = [pytest.mark.peers("Orthanc"), pytest.mark.slow, pytest.mark.promise("P4")]

ROUTES = """
routes:
  - name: chest
    when: {Modality: {in: [CR, DX]}}
    trigger: instance
    model: phantom-cxr
    explain: [grad-cam]
    send: [{object: sc, to: [pacs]}, {object: seg, to: [pacs]}]
    budget_s: 60
"""


@dataclass(frozen=True, slots=True)
class Pair:
    site: Site
    orthanc: Orthanc


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, seeing_models: Path) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("commitment")
    orthanc = Orthanc(folder / "orthanc")
    at = f"host: 127.0.0.1, port: {orthanc.port}"
    site = Site(
        folder / "site",
        routes=ROUTES,
        models=seeing_models,
        settings={
            "destinations": f"  pacs: {{type: dimse, ae_title: ORTHANC, {at}, commitment: true}}",
        },
        receive=f"  commitment: {{ORTHANC: {{{at}}}}}",
        environment={"OMP_NUM_THREADS": "1"},
    )
    orthanc.service_port = site.port
    with orthanc, site:
        yield Pair(site, orthanc)


def states(site: Site, study: str) -> set[tuple[object, object]]:
    return {(row["state"], row["commitment"]) for row in deliveries_of(site, study)}


def test_an_orthanc_commits_to_what_it_was_sent(pair: Pair) -> None:
    site, phantom = pair.site, a_radiograph()
    site.send(phantom.files)
    wait_for_jobs(site, study_of(phantom))
    wait_until(
        lambda: states(site, study_of(phantom)) == {("sent", "committed")}, "both are committed"
    )
    assert metric(site, "dicom_xai_commitments_total", destination="pacs", outcome="committed") >= 2
    assert metric(site, "dicom_xai_uncommitted_objects", destination="pacs") == 0
    shown = command(site, "ledger", "deliveries").stdout
    assert "committed" in shown
    assert "reported" in command(site, "ledger", "commitments").stdout


def test_what_an_orthanc_lost_before_it_was_asked_is_sent_again(pair: Pair) -> None:
    site, orthanc, phantom = pair.site, pair.orthanc, a_radiograph()
    lost = metric(site, "dicom_xai_commitments_total", destination="pacs", outcome="lost")
    site.send(phantom.files)
    wait_for_jobs(site, study_of(phantom))
    wait_until(
        lambda: states(site, study_of(phantom)) == {("sent", "committed")}, "both are committed"
    )
    gone = deliveries_of(site, study_of(phantom))[0]
    uid = str(gone["sop_instance_uid"])
    orthanc.delete(f"instances/{orthanc.identifier(uid)}")
    with_ledger = site.ledger()
    try:
        # as if it had not been asked yet
        ask_again(site, int(str(gone["id"])))
        with_ledger.ring("sender")
    finally:
        with_ledger.close()
    wait_until(lambda: orthanc.identifier(uid) is not None, "it is back under its UID")
    wait_until(
        lambda: states(site, study_of(phantom)) == {("sent", "committed")}, "committed in the end"
    )
    assert (
        metric(site, "dicom_xai_commitments_total", destination="pacs", outcome="lost") == lost + 1
    )


def ask_again(site: Site, delivery: int) -> None:
    """Change the ledger behind the service's back."""
    connection = sqlite3.connect(site.folder / "ledger.db", timeout=10)
    try:
        with connection:
            connection.execute(
                "UPDATE delivery SET commitment = 'wanted', ask_at = 0 WHERE id = ?", (delivery,)
            )
    finally:
        connection.close()


def test_an_orthanc_that_asks_is_told_what_is_here_and_what_is_not(pair: Pair) -> None:
    site, orthanc, phantom = pair.site, pair.orthanc, a_radiograph()
    site.send(phantom.files)
    wait_for_jobs(site, study_of(phantom))
    [here] = rows(
        site.folder,
        "SELECT sop_class_uid, sop_instance_uid FROM instance WHERE study_instance_uid = ?",
        study_of(phantom),
    )
    known = {
        "SOPClassUID": here["sop_class_uid"],
        "SOPInstanceUID": here["sop_instance_uid"],
    }
    assert commitment_of(orthanc, [known])["Status"] == "Success"
    told = commitment_of(orthanc, [known, {**known, "SOPInstanceUID": "1.2.404"}])
    assert told["Status"] == "Failure"
    [failure] = told["Failures"]
    assert (failure["SOPInstanceUID"], failure["FailureReason"]) == ("1.2.404", 0x0112)
    wait_until(
        lambda: metric(site, "dicom_xai_commitment_reports_total", outcome="reported") == 2,
        "both reports are counted",
    )


def commitment_of(orthanc: Orthanc, instances: list[dict[str, object]]) -> dict[str, object]:
    """What an Orthanc makes of our report."""
    asked = json.loads(
        orthanc.post("modalities/service/storage-commitment", {"DicomInstances": instances})
    )
    told: dict[str, object] = {}

    def is_told() -> bool:
        told.update(json.loads(orthanc.get(f"storage-commitment/{asked['ID']}")))
        return told["Status"] != "Pending"

    wait_until(is_told, "reported")
    assert told["RemoteAET"] == ROUTINE
    return told
