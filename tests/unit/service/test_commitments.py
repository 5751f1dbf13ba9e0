"""What destinations promise us, against a real peer that reports as it is told."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from pathlib import Path

import pytest

from dicom_xai.commitment import CommitmentReport, Failure
from dicom_xai.config import ClientTLS, Config, Destination
from dicom_xai.ledger import Ledger
from dicom_xai.service.commitments import Committer, take_report
from dicom_xai.service.role import Context
from dicom_xai.service.sender import Sender
from tests.make.associations import HOST, wait_until_all_have_ended
from tests.make.books import wait_until
from tests.make.certificates import Authority
from tests.make.committing_peer import CommittingPeer, Way, our_tls, peer_tls, running
from tests.make.ledger import a_job, a_result, outgoing, rows

pytestmark = pytest.mark.promise("P4")


def sent(ledger: Ledger, number: int = 1) -> str:
    """A unit of one object that a destination has; gives its UID."""
    job = a_job(ledger, number)
    ledger.jobs.finish(job, [a_result(job)])
    item = outgoing(ledger)
    ledger.deliveries.sent(item, 0, wants_commitment=True)
    return item.sop_instance_uid


def place(port: int, wait_s: float = 60.0, tls: ClientTLS | None = None) -> Destination:
    return Destination(
        tls=tls,
        type="dimse",
        ae_title="PACS",
        host=HOST,
        port=port,
        commitment=True,
        commitment_wait_s=wait_s,
    )


def states(folder: Path) -> list[tuple[object, ...]]:
    return rows(folder, "SELECT state, commitment FROM delivery ORDER BY id")


def counted(context: Context, outcome: str) -> float:
    value = context.metrics.registry.get_sample_value(
        "dicom_xai_commitments_total", {"destination": "pacs", "outcome": outcome}
    )
    return value or 0.0


def test_a_report_on_the_association_of_the_request_commits(
    context: Context, tmp_path: Path
) -> None:
    sent(context.ledger)
    with CommittingPeer() as pacs:
        committer = Committer(context, "pacs", place(pacs.port), random.Random(1))
        with running(committer):
            wait_until(lambda: states(tmp_path) == [("sent", "committed")], "committed")
            wait_until(lambda: pacs.answers == [0x0000], "the report is answered")
    assert counted(context, "asked") == counted(context, "committed") == 1


def test_several_units_share_an_association(context: Context, tmp_path: Path) -> None:
    for number in range(1, 4):
        sent(context.ledger, number)
    with CommittingPeer() as pacs:
        committer = Committer(context, "pacs", place(pacs.port), random.Random(1))
        with running(committer):
            wait_until(lambda: states(tmp_path) == [("sent", "committed")] * 3, "committed")
    assert len({each.transaction_uid for each in pacs.requests}) == 3


def test_what_a_report_denies_goes_back_to_the_queue(
    context: Context, tmp_path: Path, log: io.StringIO
) -> None:
    uid = sent(context.ledger)
    with CommittingPeer(lost=frozenset([uid])) as pacs:
        committer = Committer(context, "pacs", place(pacs.port), random.Random(1))
        with running(committer):
            wait_until(lambda: states(tmp_path) == [("pending", "none")], "to be sent again")
    assert counted(context, "lost") == 1
    assert '"commitment-lost"' in log.getvalue()


def test_a_silent_or_refusing_destination_is_asked_until_it_reports(
    context: Context, tmp_path: Path, log: io.StringIO
) -> None:
    sent(context.ledger)
    with CommittingPeer(Way.REFUSES, Way.SILENT) as pacs:
        committer = Committer(context, "pacs", place(pacs.port, 0.1), random.Random(1))
        with running(committer):
            wait_until(lambda: states(tmp_path) == [("sent", "committed")], "committed")
    assert len({each.transaction_uid for each in pacs.requests}) >= 3
    assert "answered 0x0110 to an N-ACTION" in log.getvalue()
    assert counted(context, "not-taken") == 1


def test_a_dead_destination_is_left_alone_between_requests(
    context: Context, tmp_path: Path, log: io.StringIO
) -> None:
    sent(context.ledger)
    with CommittingPeer() as pacs:
        port = pacs.port
    committer = Committer(context, "pacs", place(port), random.Random(1))
    with running(committer):
        wait_until(lambda: '"commitment-not-taken"' in log.getvalue(), "tried")
    assert states(tmp_path) == [("sent", "wanted")]
    assert rows(tmp_path, "SELECT state FROM commitment")[0] == ("failed",)


@pytest.mark.parametrize(
    ("lost", "outcome"), [(False, ("sent", "committed")), (True, ("pending", "none"))]
)
def test_a_report_that_comes_elsewhere_and_twice_is_applied_once(
    context: Context, tmp_path: Path, lost: bool, outcome: tuple[str, str]
) -> None:
    sent(context.ledger)
    asking = context.ledger.commitments.ask("pacs", lambda _: 60.0)
    assert asking is not None
    references = asking.request.references
    report = CommitmentReport(
        asking.request.transaction_uid,
        () if lost else references,
        tuple(Failure(each, 0x0112) for each in references) if lost else (),
    )
    for _ in range(2):
        assert take_report(context, report, ["pacs"])
        assert states(tmp_path) == [outcome]
    assert counted(context, "lost") == float(lost)
    assert not take_report(context, replace(report, transaction_uid="1.2.3"), ["pacs"])
    assert not take_report(context, report, [])


def test_a_reload_begins_and_ends_to_ask(context: Context, tmp_path: Path) -> None:
    sent(context.ledger)
    with CommittingPeer() as pacs:
        committing = with_destination(context.config, place(pacs.port))
        trusting = with_destination(
            context.config, place(pacs.port).model_copy(update={"commitment": False})
        )
        sender = Sender(replace(context, config=trusting), random.Random(1))
        sender.start()
        try:
            sender.tick()
            assert states(tmp_path) == [("sent", "none")]
            sender.use(committing)
            sent(context.ledger, 2)
            wait_until(lambda: states(tmp_path)[1] == ("sent", "committed"), "committed")
            sender.use(trusting)
            sent(context.ledger, 3)
            sender.tick()
            assert states(tmp_path)[2] == ("sent", "none")
            assert states(tmp_path)[1] == ("sent", "committed")
        finally:
            sender.stop(5.0)
    wait_until_all_have_ended()


def with_destination(config: Config, destination: Destination) -> Config:
    service = config.service.model_copy(update={"destinations": {"pacs": destination}})
    return replace(config, service=service)


@pytest.mark.promise("N10")
def test_a_destination_that_speaks_tls_is_asked_and_reports_by_it(
    context: Context, tmp_path: Path
) -> None:
    sent(context.ledger)
    authority = Authority(tmp_path / "tls")
    with CommittingPeer(tls=peer_tls(authority)) as pacs:
        asked = place(pacs.port, tls=our_tls(authority))
        committer = Committer(context, "pacs", asked, random.Random(1))
        with running(committer):
            wait_until(lambda: states(tmp_path) == [("sent", "committed")], "committed")
            wait_until(lambda: pacs.answers == [0x0000], "the report is answered")
            committer.watch_certificate()
    ends_s = context.metrics.registry.get_sample_value(
        "dicom_xai_tls_certificate_expiry_seconds", {"use": "pacs"}
    )
    assert ends_s is not None
    assert ends_s > 0


@pytest.mark.promise("N10")
def test_a_destination_of_another_authority_is_never_asked_and_the_log_says_why(
    context: Context, tmp_path: Path, log: io.StringIO
) -> None:
    sent(context.ledger)
    authority, stranger = Authority(tmp_path / "tls"), Authority(tmp_path / "stranger")
    with CommittingPeer(tls=peer_tls(stranger)) as pacs:
        asked = place(pacs.port, tls=our_tls(authority))
        committer = Committer(context, "pacs", asked, random.Random(1))
        with running(committer):
            wait_until(lambda: '"commitment-not-taken"' in log.getvalue(), "tried")
        assert pacs.requests == []
    assert "TLS failed" in log.getvalue()
    assert states(tmp_path) == [("sent", "wanted")]
