"""Storage commitment through whole roles that are killed between its steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dicom_xai.commitment import CommitmentRequest
from dicom_xai.demo.site import Site
from dicom_xai.study import Reference
from tests.make.books import deliveries_of, rows, wait_until
from tests.make.command import Running
from tests.make.committing_peer import CommittingPeer, Way
from tests.make.studies import a_radiograph, study_of

pytestmark = pytest.mark.promise("P4")

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


class Ward:
    """Three roles, each started alone, and a PACS that reports when the test says so."""

    def __init__(self, folder: Path, models: Path, pacs: CommittingPeer) -> None:
        at = f"host: 127.0.0.1, port: {pacs.port}"
        self.pacs = pacs
        self.site = Site(
            folder,
            models=models,
            routes=ROUTES,
            settings={
                "destinations": f"  pacs: {{type: dimse, ae_title: PACS, {at}, commitment: true}}"
            },
            receive=f"  commitment: {{PACS: {{{at}}}}}",
        )
        self.site.pacs.start()  # the site's own, of which no route knows
        self.site.write_config()
        self.roles = {role: Running(self.site, role) for role in ("receiver", "worker", "sender")}
        for role in self.roles.values():
            role.wait_until_ready()

    def kill(self, role: str) -> None:
        process = self.roles[role].process
        process.kill()
        process.wait()

    def start(self, role: str) -> None:
        self.roles[role] = Running(self.site, role).wait_until_ready()

    def states(self, study: str) -> set[tuple[object, object]]:
        return {(row["state"], row["commitment"]) for row in deliveries_of(self.site, study)}


@pytest.fixture
def ward(models: Path, tmp_path: Path) -> Iterator[Ward]:
    with CommittingPeer(Way.SILENT) as pacs:
        made = Ward(tmp_path / "site", models, pacs)
        try:
            yield made
        finally:
            for role in made.roles.values():
                role.stop()
            made.site.pacs.stop()


@pytest.mark.slow
def test_a_report_finds_its_request_after_everybody_died(ward: Ward) -> None:
    pacs, phantom = ward.pacs, a_radiograph()
    ward.site.send(phantom.files)
    pacs.wait("requests", timeout_s=60.0)
    [request] = pacs.requests
    for role in ("sender", "worker", "receiver"):
        ward.kill(role)
    ward.start("receiver")
    study = study_of(phantom)
    assert ward.states(study) == {("sent", "wanted")}
    # somebody else cannot speak for the PACS, and the PACS not about what it was never asked
    good = pacs.about(request)
    assert pacs.report(ward.site.port, good, calling="OTHER") == 0x0115
    unknown = CommitmentRequest("1.2.404", request.references)
    assert pacs.report(ward.site.port, pacs.about(unknown)) == 0x0115
    assert ward.states(study) == {("sent", "wanted")}
    pacs.lost.add(request.references[0].sop_instance_uid)
    for _ in range(2):  # late, negative about one, and twice
        assert pacs.report(ward.site.port, pacs.about(request)) == 0x0000
    assert ward.states(study) == {("pending", "none"), ("sent", "committed")}
    pacs.lost.clear()
    ward.start("sender")
    wait_until(lambda: ward.states(study) == {("sent", "committed")}, "sent again and committed")
    assert pacs.stored.count(request.references[0].sop_instance_uid) == 2
    assert pacs.stored.count(request.references[1].sop_instance_uid) == 1
    assert [each.references for each in pacs.requests[1:]] == [request.references[:1]]


@pytest.mark.slow
def test_a_request_that_we_acknowledged_is_reported_about_after_everybody_died(
    ward: Ward,
) -> None:
    pacs, phantom = ward.pacs, a_radiograph()
    ward.site.send(phantom.files)
    [here] = rows(ward.site.folder, "SELECT sop_class_uid, sop_instance_uid FROM instance")
    reference = Reference(str(here["sop_class_uid"]), str(here["sop_instance_uid"]))
    ward.kill("sender")
    request = CommitmentRequest("1.2.77", (reference, Reference(reference.sop_class_uid, "1.2.4")))
    assert pacs.ask(ward.site.port, request) == 0x0000
    ward.kill("receiver")
    ward.start("sender")
    pacs.wait("reports", timeout_s=60.0)
    [(kind, report)] = pacs.reports
    assert (kind, report.transaction_uid) == (2, "1.2.77")
    assert report.committed == (reference,)
    assert [each.reason for each in report.failed] == [0x0112]
    wait_until(
        lambda: (
            rows(ward.site.folder, "SELECT state FROM commitment_report") == [{"state": "reported"}]
        ),
        "noted",
    )
