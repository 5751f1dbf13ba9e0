"""Storage commitment at a listener: asked, reported on the same association, and reported to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydicom import Dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.presentation import build_role

from dicom_xai import errors
from dicom_xai.commitment import (
    PUSH_MODEL,
    PUSH_MODEL_INSTANCE,
    CommitmentReport,
    CommitmentRequest,
)
from dicom_xai.config import ClientTLS, Listener, ListenerTLS
from dicom_xai.study import Reference
from dicom_xai.tls import Credentials
from tests.make.associations import (
    HOST,
    UNKNOWN_TRANSACTION,
    Shelf,
    an_image,
    listening,
    ready_to_send,
    wait_until_all_have_ended,
)
from tests.make.certificates import Authority
from tests.make.committing_peer import CommittingPeer

pytestmark = pytest.mark.promise("P4")


class Reports:
    """What came to a peer on its own association."""

    def __init__(self, status: int = 0) -> None:
        self.got: list[tuple[int, Dataset]] = []
        self._status = status
        self._came = threading.Event()

    def take(self, event: evt.Event) -> tuple[int, None]:
        self.got.append((event.event_type, event.event_information))
        self._came.set()
        return self._status, None

    def wait(self) -> None:
        assert self._came.wait(10)


@contextmanager
def peer(
    port: int, reports: Reports | None = None, *, as_scp: bool = False, syntax: str = ""
) -> Iterator[object]:
    ae = AE(ae_title="MODALITY")
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 10
    ae.add_requested_context(PUSH_MODEL, syntax or [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
    ae.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
    handlers = [(evt.EVT_N_EVENT_REPORT, (reports or Reports()).take)]
    roles = [build_role(PUSH_MODEL, scp_role=True)] if as_scp else []
    assoc = ae.associate(HOST, port, ae_title="DICOM_XAI", evt_handlers=handlers, ext_neg=roles)
    assert assoc.is_established
    sock = assoc.dul.socket.socket
    try:
        yield assoc
    finally:
        if assoc.is_established:
            assoc.release()
        assoc.dul.join(timeout=5)
        sock.close()


def action(*uids: str, transaction: str = "1.2.77") -> Dataset:
    ds = Dataset()
    ds.TransactionUID = transaction
    ds.ReferencedSOPSequence = []
    for uid in uids:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = CTImageStorage, uid
        ds.ReferencedSOPSequence.append(item)
    return ds


def ask(assoc: object, ds: Dataset, kind: int = 1, instance: str = PUSH_MODEL_INSTANCE) -> int:
    status, _ = assoc.send_n_action(ds, kind, PUSH_MODEL, instance)  # type: ignore[attr-defined]
    return int(status.Status)


def report(assoc: object, ds: Dataset, kind: int = 1) -> Dataset:
    status, _ = assoc.send_n_event_report(  # type: ignore[attr-defined]
        ds, kind, PUSH_MODEL, PUSH_MODEL_INSTANCE
    )
    return status


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_a_peer_that_waits_is_told_on_its_own_association(syntax: str) -> None:
    door, reports = Shelf(), Reports()
    with listening(door) as scp, peer(scp.ports[0], reports, syntax=syntax) as assoc:
        assert ask(assoc, action("1.2.3")) == 0x0000
        [(request, sender)] = door.requests
        assert request.transaction_uid == "1.2.77"
        assert (sender.calling_ae_title, sender.called_ae_title) == ("MODALITY", "DICOM_XAI")
        reports.wait()
        door.wait("answered")
        assert assoc.send_c_store(ready_to_send(an_image())).Status == 0  # it goes on
    [(kind, information)] = reports.got
    assert kind == 1
    assert information.TransactionUID == "1.2.77"
    assert information.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == "1.2.3"
    assert door.answered == [(1, True)]
    wait_until_all_have_ended()
    assert door.handed_over == []


def test_a_peer_that_refuses_the_report_has_not_got_it() -> None:
    door, reports = Shelf(), Reports(status=0x0110)
    with listening(door) as scp, peer(scp.ports[0], reports) as assoc:
        ask(assoc, action("1.2.3"))
        door.wait("answered")
    assert door.answered == [(1, False)]


def test_the_reports_of_a_peer_that_hangs_up_are_handed_over() -> None:
    door = Shelf()
    with listening(door) as scp:
        with peer(scp.ports[0]) as assoc:
            assert ask(assoc, action("1.2.3")) == 0
            assert ask(assoc, action("1.2.4", transaction="1.2.78")) == 0
        door.wait("handed_over", 2)
    assert door.handed_over == [1, 2]
    assert door.answered == []


def test_what_the_sender_reports_already_is_not_reported_twice() -> None:
    door, reports = Shelf(), Reports()
    door.is_reported_elsewhere = True
    with listening(door, network_timeout_s=1.0) as scp, peer(scp.ports[0], reports) as assoc:
        ask(assoc, action("1.2.3"))
        door.wait("refusals")  # idle: nothing is owed here any more
    assert door.reasons() == ["idle"]
    assert reports.got == []


def test_a_ledger_that_is_busy_when_a_report_is_due_ends_no_association() -> None:
    class Busy(Shelf):
        def report(self, number: int) -> CommitmentReport | None:
            with self._changed:
                self.answered.append((number, False))
                self._changed.notify_all()
            raise errors.LedgerBusyError("locked")

    door = Busy()
    with listening(door) as scp, peer(scp.ports[0]) as assoc:
        ask(assoc, action("1.2.3"))
        door.wait("answered")
        assert assoc.send_c_store(ready_to_send(an_image())).Status == 0


def test_a_request_that_cannot_be_kept_is_not_answered_with_success() -> None:
    for refusal, status in (
        (errors.LedgerBusyError("locked"), 0x0213),
        (OSError(28, "No space left on device"), 0x0213),
        (KeyError("ours"), 0x0110),
    ):
        door = Shelf(refusal)
        with listening(door) as scp, peer(scp.ports[0]) as assoc:
            assert ask(assoc, action("1.2.3")) == status


def test_what_is_no_request_is_refused_with_its_reason() -> None:
    door = Shelf()
    with listening(door) as scp, peer(scp.ports[0]) as assoc:
        assert ask(assoc, action()) == 0x0115
        assert ask(assoc, action("1.2.3", transaction="")) == 0x0115
        assert ask(assoc, action("1.2.3"), kind=2) == 0x0123
        assert ask(assoc, action("1.2.3"), instance="1.2.3") == 0x0112
        assert report(assoc, action("1.2.3"), kind=3).Status == 0x0113
        assert ask(assoc, action("1.2.3")) == 0x0000
    assert len(door.requests) == 1


def test_a_destination_reports_on_an_association_of_its_own() -> None:
    door = Shelf()
    with listening(door) as scp, peer(scp.ports[0], as_scp=True) as assoc:
        [context] = [cx for cx in assoc.accepted_contexts if cx.abstract_syntax == PUSH_MODEL]
        assert context.as_scp
        assert report(assoc, action("1.2.3")).Status == 0x0000
        unknown = report(assoc, action("1.2.3", transaction=UNKNOWN_TRANSACTION))
        assert unknown.Status == 0x0115
    assert [each.transaction_uid for each, _ in door.reports] == ["1.2.77", UNKNOWN_TRANSACTION]


def test_an_endless_request_is_aborted() -> None:
    door = Shelf()
    with listening(door) as scp, peer(scp.ports[0]) as assoc:
        long = action("1.2.3")
        long.RetrieveURI = "x" * 3_000_000
        status, _ = assoc.send_n_action(long, 1, PUSH_MODEL, PUSH_MODEL_INSTANCE)
        assert "Status" not in status
        door.wait("refusals")
    assert door.reasons() == ["message-too-long"]


@pytest.mark.promise("N10")
def test_by_mutual_tls_a_peer_asks_us_and_reports_to_us(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    signed = authority.sign("pacs")
    files = {"certificate": signed.certificate, "private_key": signed.private_key}
    listens = ListenerTLS(ca=authority.ca, ae_titles_by_certificate={"pacs": ("PACS",)}, **files)
    calls = Credentials("pacs", ClientTLS(ca=authority.ca, **files)).context()
    listeners = (Listener(ae_title="DICOM_XAI", host=HOST, port=0, tls=listens),)
    request = CommitmentRequest("1.2.77", (Reference(CTImageStorage, "1.2.1"),))
    door = Shelf()
    with (
        listening(door, listeners=listeners) as scp,
        CommittingPeer(tls=(Credentials("pacs", listens).context(), calls)) as peer,
    ):
        assert peer.ask(scp.ports[0], request) == 0x0000
        report = CommitmentReport("1.2.78", request.references, ())
        assert peer.report(scp.ports[0], report) == 0x0000
    assert [each.transaction_uid for each, _ in door.requests] == ["1.2.77"]
    assert [each for each, _ in door.reports] == [report]
    wait_until_all_have_ended()
