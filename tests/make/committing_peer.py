"""A PACS that is asked for storage commitment and reports as it is told: well, badly or never.

It says success to every object and forgets it: what it says it holds is up to the test. Real
associations each way, by pynetdicom.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from io import BytesIO

from pydicom import Dataset
from pydicom.filereader import read_dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.presentation import build_role

from dicom_xai.commitment import (
    PUSH_MODEL,
    PUSH_MODEL_INSTANCE,
    CommitmentReport,
    CommitmentRequest,
    Failure,
    read_report,
    read_request,
    written,
)
from dicom_xai.config import ClientTLS, ListenerTLS
from dicom_xai.deliver.storage_scu import RESULT_CONTEXTS
from dicom_xai.service.loop import Loop
from dicom_xai.tls import Credentials
from tests.make.associations import HOST, wait_until_all_have_ended
from tests.make.certificates import Authority


class Way(StrEnum):
    """How a request is answered and reported about."""

    SAME = "reports on the association of the request"
    SILENT = "takes the request and never reports"
    REFUSES = "answers the request with a failure"


class CommittingPeer:
    """Listens from `start` to `stop`.

    Attributes
    ----------
    stored : list of str
        SOP Instance UIDs of what was sent to it, resends included.
    requests : list of CommitmentRequest
        In the order in which they came.
    reports : list of (event type, CommitmentReport)
        What it was told about requests of its own.
    answers : list of int
        To its reports on the association of the request.
    lost : set of str
        SOP Instance UIDs that it says it does not hold.

    Parameters
    ----------
    *ways : Way
        How it answers its first requests; the later ones with `Way.SAME`.
    lost : set of str
    tls : pair of SSLContext, optional
        With which it listens, and with which it calls; plain without them.
    """

    ae_title = "PACS"

    def __init__(
        self,
        *ways: Way,
        lost: frozenset[str] = frozenset(),
        tls: tuple[ssl.SSLContext, ssl.SSLContext] | None = None,
    ) -> None:
        self.requests: list[CommitmentRequest] = []
        self.reports: list[tuple[int, CommitmentReport]] = []
        self.answers: list[int] = []
        self.port = 0
        self.lost = set(lost)
        self._ways = list(ways)
        self._listens_by, self._calls_by = tls or (None, None)
        self._changed = threading.Condition()
        self._ae = AE(ae_title=self.ae_title)
        self._ae.acse_timeout = self._ae.dimse_timeout = 10
        syntaxes = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
        self._ae.add_supported_context(PUSH_MODEL, syntaxes, scu_role=True, scp_role=True)
        for sop_class_uid, syntax in RESULT_CONTEXTS:
            self._ae.add_supported_context(sop_class_uid, syntax)
        self.stored: list[str] = []
        self._server: object | None = None
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> CommittingPeer:
        handlers = [
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_N_ACTION, self._take_request),
            (evt.EVT_N_EVENT_REPORT, self._take_report),
        ]
        self._server = self._ae.start_server(
            (HOST, 0), block=False, evt_handlers=handlers, ssl_context=self._listens_by
        )
        self.port = int(self._server.socket.getsockname()[1])  # type: ignore[attr-defined]
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join(15)
        self._ae.shutdown()

    def wait(self, what: str, count: int = 1, timeout_s: float = 20.0) -> None:
        """Until the list of that name has so many entries."""
        with self._changed:
            done = self._changed.wait_for(lambda: len(getattr(self, what)) >= count, timeout_s)
        assert done, f"{what}: {getattr(self, what)}, wanted {count}"

    def ask(self, port: int, request: CommitmentRequest) -> int:
        """Ask a listener for commitment, and hang up; gives the answer's status."""
        ae = AE(ae_title=self.ae_title)
        ae.acse_timeout = ae.dimse_timeout = 10
        ae.add_requested_context(PUSH_MODEL)
        assoc = ae.associate(HOST, port, ae_title="DICOM_XAI", tls_args=self._tls_args)
        sock = assoc.dul.socket.socket
        ds = read_dataset(BytesIO(written(request, ImplicitVRLittleEndian)), True, True)
        try:
            status, _ = assoc.send_n_action(ds, 1, PUSH_MODEL, PUSH_MODEL_INSTANCE)
        finally:
            assoc.release()
            assoc.dul.join(timeout=5)
            sock.close()
        return int(status.get("Status", -1))

    def about(self, request: CommitmentRequest) -> CommitmentReport:
        """All is held but what is lost."""
        held = tuple(r for r in request.references if r.sop_instance_uid not in self.lost)
        gone = tuple(r for r in request.references if r.sop_instance_uid in self.lost)
        return CommitmentReport(
            request.transaction_uid, held, tuple(Failure(each, 0x0112) for each in gone)
        )

    def report(self, port: int, report: CommitmentReport, calling: str = "PACS") -> int:
        """Report on an association of our own to a listener; gives the answer's status."""
        ae = AE(ae_title=calling)
        ae.acse_timeout = ae.dimse_timeout = 10
        ae.add_requested_context(PUSH_MODEL)
        assoc = ae.associate(
            HOST,
            port,
            ae_title="DICOM_XAI",
            ext_neg=[build_role(PUSH_MODEL, scp_role=True)],
            tls_args=self._tls_args,
        )
        sock = assoc.dul.socket.socket
        try:
            return self._say(assoc, report)
        finally:
            if assoc.is_established:
                assoc.release()
            assoc.dul.join(timeout=5)
            sock.close()

    @property
    def _tls_args(self) -> tuple[ssl.SSLContext, str] | None:
        return None if self._calls_by is None else (self._calls_by, HOST)

    def _store(self, event: evt.Event) -> int:
        with self._changed:
            self.stored.append(str(event.request.AffectedSOPInstanceUID))
            self._changed.notify_all()
        return 0x0000

    def _take_request(self, event: evt.Event) -> tuple[int, Dataset | None]:
        information = event.request.ActionInformation.getvalue()
        request = read_request(information, event.context.transfer_syntax)
        with self._changed:
            self.requests.append(request)
            way = self._ways.pop(0) if self._ways else Way.SAME
            self._changed.notify_all()
        if way is Way.REFUSES:
            return 0x0110, None
        if way is Way.SAME:
            thread = threading.Thread(
                target=self._say_soon, args=(event.assoc, self.about(request))
            )
            self._threads.append(thread)
            thread.start()
        return 0x0000, None

    def _say_soon(self, assoc: object, report: CommitmentReport) -> None:
        with suppress(RuntimeError, ValueError):  # the other side has hung up
            self.answers.append(self._say(assoc, report))

    def _say(self, assoc: object, report: CommitmentReport) -> int:
        ds = read_dataset(BytesIO(written(report, ImplicitVRLittleEndian)), True, True)
        status, _ = assoc.send_n_event_report(  # type: ignore[attr-defined]
            ds, report.event_type, PUSH_MODEL, PUSH_MODEL_INSTANCE
        )
        return int(status.get("Status", -1))

    def _take_report(self, event: evt.Event) -> tuple[int, None]:
        information = event.request.EventInformation.getvalue()
        report = read_report(information, event.context.transfer_syntax)
        with self._changed:
            self.reports.append((int(event.event_type), report))
            self._changed.notify_all()
        return 0x0000, None


def our_tls(authority: Authority) -> ClientTLS:
    """What we show a peer of that authority."""
    signed = authority.sign("us")
    return ClientTLS(
        ca=authority.ca, certificate=signed.certificate, private_key=signed.private_key
    )


def peer_tls(authority: Authority) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """With which a `CommittingPeer` listens, and calls."""
    signed = authority.sign("pacs")
    files = {"certificate": signed.certificate, "private_key": signed.private_key}
    listens = ListenerTLS(ca=authority.ca, **files)
    calls = ClientTLS(ca=authority.ca, **files)
    return Credentials("pacs", listens).context(), Credentials("pacs", calls).context()


@contextmanager
def running(loop: Loop) -> Iterator[None]:
    """A thread of the sender's at work, which ends well and leaves no association."""
    loop.start()
    try:
        yield
    finally:
        loop.ask_to_stop()
        assert loop.join(10)
        assert loop.failure is None
        wait_until_all_have_ended()
