"""Our reports of storage commitment, to a real peer that asked for them and hung up."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from pathlib import Path

import pytest

from dicom_xai.commitment import Failure
from dicom_xai.config import Requester
from dicom_xai.ledger import Disposition
from dicom_xai.service.reports import Debtor, drop_unaddressed
from dicom_xai.service.role import Context
from dicom_xai.service.sender import Sender
from dicom_xai.study import Reference
from tests.make.associations import HOST
from tests.make.books import wait_until
from tests.make.certificates import Authority
from tests.make.committing_peer import CommittingPeer, our_tls, peer_tls, running
from tests.make.ledger import CT, a_request, an_instance, receive, rows

pytestmark = pytest.mark.promise("P4")
ABSENT = "1.2.404"


def states(folder: Path) -> list[tuple[object, ...]]:
    return rows(folder, "SELECT state FROM commitment_report")


def test_a_peer_that_hung_up_is_told_on_an_association_of_ours(
    context: Context, tmp_path: Path
) -> None:
    here = an_instance(1)
    receive(context.ledger, here, disposition=Disposition.UNROUTED)
    a_request(context.ledger, here.sop_instance_uid, ABSENT)
    with CommittingPeer() as peer:
        debtor = Debtor(context, "MODALITY", Requester(host=HOST, port=peer.port), random.Random(1))
        with running(debtor):
            peer.wait("reports")
            wait_until(lambda: states(tmp_path) == [("reported",)], "noted")
    [(kind, report)] = peer.reports
    assert kind == 2
    assert report.committed == (Reference(CT, here.sop_instance_uid),)
    assert report.failed == (Failure(Reference(CT, ABSENT), 0x0112),)


def test_a_report_waits_for_a_peer_that_is_down(
    context: Context, tmp_path: Path, log: io.StringIO
) -> None:
    a_request(context.ledger, ABSENT)
    with CommittingPeer() as gone:
        port = gone.port
    debtor = Debtor(context, "MODALITY", Requester(host=HOST, port=port), random.Random(1))
    with running(debtor):
        wait_until(lambda: '"commitment-report-retried"' in log.getvalue(), "tried")
    assert states(tmp_path) == [("owed",)]


def test_without_an_address_nobody_is_told_and_the_log_says_so(
    context: Context, tmp_path: Path, log: io.StringIO
) -> None:
    a_request(context.ledger, ABSENT)
    drop_unaddressed(context, ["MODALITY"])
    assert states(tmp_path) == [("owed",)]
    drop_unaddressed(context, [])
    assert states(tmp_path) == [("dead",)]
    assert "receive.commitment" in log.getvalue()


@pytest.mark.promise("N10")
def test_a_peer_that_takes_reports_by_tls_is_told_by_it(context: Context, tmp_path: Path) -> None:
    a_request(context.ledger, ABSENT)
    authority = Authority(tmp_path / "tls")
    with CommittingPeer(tls=peer_tls(authority)) as peer:
        address = Requester(host=HOST, port=peer.port, tls=our_tls(authority))
        debtor = Debtor(context, "MODALITY", address, random.Random(1))
        with running(debtor):
            peer.wait("reports")
            wait_until(lambda: states(tmp_path) == [("reported",)], "noted")


@pytest.mark.promise("N10")
def test_the_certificate_towards_a_peer_that_takes_reports_is_watched_before_any_is_owed(
    context: Context, tmp_path: Path, log: io.StringIO
) -> None:
    authority = Authority(tmp_path / "tls")
    address = Requester(host=HOST, port=1, tls=our_tls(authority))
    receive_config = context.config.service.receive.model_copy(
        update={"commitment": {"MODALITY": address}}
    )
    service = context.config.service.model_copy(
        update={"receive": receive_config, "destinations": {}}
    )
    sender = Sender(replace(context, config=replace(context.config, service=service)))
    sender.start()
    try:
        sender.tick()
        ends_s = certificate_ends_s(context)
        authority.sign("us", last_day=20)
        sender.tick()
    finally:
        sender.stop(5.0)
    assert certificate_ends_s(context) > ends_s + 9 * 86400
    assert '"tls-renewed"' in log.getvalue()


def certificate_ends_s(context: Context) -> float:
    value = context.metrics.registry.get_sample_value(
        "dicom_xai_tls_certificate_expiry_seconds", {"use": "MODALITY"}
    )
    assert value is not None
    return value
