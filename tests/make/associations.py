"""Senders, receivers and doors on free loopback ports; data sets that are whole."""

from __future__ import annotations

import atexit
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from io import BytesIO
from pathlib import Path

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomIO
from pydicom.filewriter import write_dataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE
from pynetdicom.association import Association as Requestor
from pynetdicom.dimse_messages import C_STORE_RQ
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dul import DULServiceProvider
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ, P_DATA_TF
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    ImplementationClassUIDNotification,
    MaximumLengthNotification,
)
from pynetdicom.presentation import build_context

from dicom_xai.commitment import CommitmentReport, CommitmentRequest
from dicom_xai.config import Allowed, Listener, ReceiveConfig
from dicom_xai.errors import RefusedError
from dicom_xai.receive.association import Association
from dicom_xai.receive.storage_scp import Arrival, StorageSCP, TransferEnd
from dicom_xai.spool import Draft, Spool
from dicom_xai.study import Sender

HOST = "127.0.0.1"
UNKNOWN_TRANSACTION = "1.2.404"


def an_image(
    rows: int = 16, columns: int = 16, sop_class_uid: str = CTImageStorage, **attributes: object
) -> Dataset:
    """A small image of 16 bits with all that makes it whole; nobody's."""
    ds = Dataset()
    ds.SOPClassUID = sop_class_uid
    ds.SOPInstanceUID = generate_uid()
    ds.StudyDate = "20260102"
    ds.Modality = "CT"
    ds.PatientName = "Doe^Nobody"
    ds.PatientID = "none-1"
    ds.StudyInstanceUID = generate_uid()
    ds.SeriesInstanceUID = generate_uid()
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows, ds.Columns = rows, columns
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.PixelRepresentation = 0
    ds.PixelData = bytes(2 * rows * columns)
    ds["PixelData"].VR = "OW"
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
    return ds


def encoded(ds: Dataset, syntax: str = ExplicitVRLittleEndian) -> bytes:
    """The data set as it goes over the wire."""
    buffer = BytesIO()
    fp = DicomIO(buffer)
    fp.is_implicit_VR = UID(syntax).is_implicit_VR
    fp.is_little_endian = UID(syntax).is_little_endian
    write_dataset(fp, ds)
    return buffer.getvalue()


def ready_to_send(ds: Dataset, syntax: str = ExplicitVRLittleEndian) -> Dataset:
    """With the file meta that pynetdicom's sender wants."""
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    return ds


@cache
def _spool() -> Spool:
    """One for all shelves of the process, for making its folders takes longer than most tests."""
    folder = tempfile.mkdtemp(prefix="shelf-")
    atexit.register(shutil.rmtree, folder)
    return Spool(Path(folder))


class Shelf:
    """A door that keeps what comes and refuses what it is told to refuse.

    `data_sets` holds the bytes after each file's meta information.
    """

    def __init__(self, refusal: RefusedError | Exception | None = None) -> None:
        self.refusal = refusal
        self.arrivals: list[Arrival] = []
        self.data_sets: list[bytes] = []
        self.ends: list[tuple[int, TransferEnd]] = []
        self.refusals: list[tuple[str, Sender]] = []
        self.details: list[str] = []
        self.transfers = 0
        self.requests: list[tuple[CommitmentRequest, Sender]] = []
        self.reports: list[tuple[CommitmentReport, Sender]] = []
        self.answered: list[tuple[int, bool]] = []
        self.handed_over: list[int] = []
        self.is_reported_elsewhere = False
        self._changed = threading.Condition()

    def draft(self) -> AbstractContextManager[Draft]:
        """A new file."""
        return _spool().draft()

    def opened(self, sender: Sender) -> int:
        """A new number."""
        with self._changed:
            self.transfers += 1
            return self.transfers

    def accept(self, arrival: Arrival, transfer: int) -> Callable[[], None]:
        """Keep it, or raise what was asked for; nothing is left to do."""
        if self.refusal is not None:
            raise self.refusal
        with arrival.draft.mapped(0) as view:
            file = bytes(view)
        (meta_bytes,) = struct.unpack_from("<L", file, 140)
        with self._changed:
            self.arrivals.append(arrival)
            self.data_sets.append(file[144 + meta_bytes :])
            self._changed.notify_all()
        return lambda: None

    def closed(self, transfer: int, how: TransferEnd) -> None:
        """Note it."""
        with self._changed:
            self.ends.append((transfer, how))
            self._changed.notify_all()

    def promise(self, request: CommitmentRequest, sender: Sender) -> int:
        """A new number, or raise what was asked for."""
        if self.refusal is not None:
            raise self.refusal
        with self._changed:
            self.requests.append((request, sender))
            return len(self.requests)

    def report(self, number: int) -> CommitmentReport | None:
        """All that was asked for is here, unless the sender is at it."""
        if self.is_reported_elsewhere:
            return None
        request, _ = self.requests[number - 1]
        return CommitmentReport(request.transaction_uid, request.references, ())

    def reported(self, number: int, is_taken: bool) -> None:
        """Note it."""
        with self._changed:
            self.answered.append((number, is_taken))
            self._changed.notify_all()

    def unreported(self, numbers: list[int]) -> None:
        """Note it."""
        with self._changed:
            self.handed_over.extend(numbers)
            self._changed.notify_all()

    def take_report(self, report: CommitmentReport, sender: Sender) -> bool:
        """Keep it; about one transaction nothing is known."""
        with self._changed:
            self.reports.append((report, sender))
        return report.transaction_uid != UNKNOWN_TRANSACTION

    def refused(self, reason: str, sender: Sender, detail: str) -> None:
        """Note it."""
        with self._changed:
            self.refusals.append((reason, sender))
            self.details.append(detail)
            self._changed.notify_all()

    def reasons(self) -> list[str]:
        """The reasons of all refusals."""
        with self._changed:
            return [reason for reason, _ in self.refusals]

    def wait(self, what: str, count: int = 1, timeout_s: float = 10.0) -> None:
        """Until the list of that name has so many entries; AssertionError when it does not."""
        with self._changed:
            done = self._changed.wait_for(lambda: len(getattr(self, what)) >= count, timeout_s)
        assert done, f"{what}: {getattr(self, what)}, wanted {count}"


def a_config(**fields: object) -> ReceiveConfig:
    """One listener on a free port, open to loopback, with short timeouts."""
    values: dict[str, object] = {
        "listeners": (Listener(ae_title="DICOM_XAI", host=HOST, port=0),),
        "allow": (Allowed(ae_title="*", network="127.0.0.0/8"),),
        "acse_timeout_s": 5.0,  # of a loaded machine
        "dimse_timeout_s": 1.0,
        "network_timeout_s": 5.0,
    }
    return ReceiveConfig.model_validate(values | fields)


@contextmanager
def listening(
    door: Shelf, *, max_message_bytes: int = 10_000_000, **fields: object
) -> Iterator[StorageSCP]:
    """A receiver in front of that door, stopped at the end."""
    scp = StorageSCP(a_config(**fields), door, door.refused, max_message_bytes)
    scp.start()
    try:
        yield scp
    finally:
        scp.stop(grace_s=2.0)


@contextmanager
def associated(
    port: int,
    classes: Sequence[str] = (CTImageStorage,),
    syntaxes: Sequence[str] = (ExplicitVRLittleEndian,),
    calling: str = "SENDER",
    called: str = "DICOM_XAI",
) -> Iterator[object]:
    """A pynetdicom requestor; released at the end where it was established."""
    ae = AE(ae_title=calling)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 10
    for sop_class_uid in classes:
        ae.add_requested_context(sop_class_uid, list(syntaxes))
    assoc = ae.associate(HOST, port, ae_title=called)
    sock = assoc.dul.socket.socket
    try:
        yield assoc
    finally:
        if assoc.is_established:
            assoc.release()
        assoc.dul.join(timeout=5)
        # pynetdicom 3.0.4 leaves it open where the peer closed first
        if sock is not None:
            sock.close()


def store(port: int, *data_sets: Dataset, **how: object) -> list[int]:
    """Send over one association and give the statuses."""
    classes = tuple(dict.fromkeys(str(ds.SOPClassUID) for ds in data_sets))
    with associated(port, classes, **how) as assoc:  # type: ignore[arg-type]
        assert assoc.is_established  # type: ignore[attr-defined]
        return [
            assoc.send_c_store(ds if hasattr(ds, "file_meta") else ready_to_send(ds)).Status  # type: ignore[attr-defined]
            for ds in data_sets
        ]


def association_request(
    classes: Sequence[str] = (CTImageStorage,),
    calling: str = "RAW",
    called: str = "DICOM_XAI",
    syntax: str = ExplicitVRLittleEndian,
) -> bytes:
    """The bytes of an A-ASSOCIATE-RQ with one context for each class, ids 1, 3, ..."""
    primitive = A_ASSOCIATE()
    primitive.application_context_name = "1.2.840.10008.3.1.1.1"
    primitive.calling_ae_title, primitive.called_ae_title = calling, called
    contexts = []
    for number, sop_class_uid in enumerate(classes):
        context = build_context(sop_class_uid, syntax)
        context.context_id = 2 * number + 1
        contexts.append(context)
    primitive.presentation_context_definition_list = contexts
    length = MaximumLengthNotification()
    length.maximum_length_received = 16_384
    implementation = ImplementationClassUIDNotification()
    implementation.implementation_class_uid = "1.2.3"
    primitive.user_information = [length, implementation]
    return bytes(A_ASSOCIATE_RQ(primitive).encode())


def store_request(data_set: bytes, sop_class_uid: str, sop_instance_uid: str) -> bytes:
    """The bytes of a C-STORE-RQ on context 1, in PDUs of 16 kB."""
    request = C_STORE()
    request.MessageID = 1
    request.Priority = 0
    request.AffectedSOPClassUID = sop_class_uid
    request.AffectedSOPInstanceUID = sop_instance_uid
    request.DataSet = BytesIO(data_set)
    message = C_STORE_RQ()
    message.primitive_to_message(request)
    return b"".join(P_DATA_TF(each).encode() for each in message.encode_msg(1, 16_384))


def connected(port: int, *sent: bytes) -> socket.socket:
    """A bare TCP connection that has sent something and reads no answer."""
    sock = socket.create_connection((HOST, port), timeout=10)
    for each in sent:
        sock.sendall(each)
    return sock


def negotiated(port: int, **request: object) -> socket.socket:
    """A bare TCP connection with an association."""
    sock = connected(port, association_request(**request))  # type: ignore[arg-type]
    assert next_pdu(sock)[:1] == b"\x02"
    return sock


def rejection(port: int, **request: object) -> tuple[int, ...]:
    """Result, source and reason of the A-ASSOCIATE-RJ that a request is answered with.

    By a bare connection: pynetdicom's requestor may take a quick rejection for no connection.
    """
    with connected(port, association_request(**request)) as sock:  # type: ignore[arg-type]
        answer = next_pdu(sock)
    assert answer[:1] == b"\x03"
    return tuple(answer[7:10])


def next_pdu(sock: socket.socket) -> bytes:
    """One PDU, or nothing once the peer has closed."""
    try:
        header = sock.recv(6, socket.MSG_WAITALL)
        if len(header) < 6:
            return b""
        return header + sock.recv(int.from_bytes(header[2:], "big"), socket.MSG_WAITALL)
    except ConnectionError:
        return b""


def threads_of_associations() -> list[threading.Thread]:
    """The threads of connections that are alive."""
    return [
        each
        for each in threading.enumerate()
        if isinstance(each, (Association, Requestor, DULServiceProvider))
    ]


def wait_until_all_have_ended(timeout_s: float = 10.0) -> None:
    """Until no thread of any connection is alive; AssertionError when one stays."""
    deadline_s = time.monotonic() + timeout_s
    while alive := threads_of_associations():
        for each in alive:
            if each.ident is not None:  # else it is just being started
                each.join(timeout=0.1)
        assert time.monotonic() < deadline_s, alive


@contextmanager
def stubborn(behaviour: Callable[[socket.socket], None]) -> Iterator[int]:
    """A peer that does `behaviour` with the first connection and then holds it; gives its port."""
    listener = socket.create_server((HOST, 0))
    done = threading.Event()
    kept: list[socket.socket] = []

    def serve() -> None:
        while not done.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.settimeout(10)
            kept.append(connection)
            behaviour(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        done.set()
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(timeout=15)
        for each in kept:
            each.close()


def agree(connection: socket.socket, result: int = 0) -> None:
    """Answer an A-ASSOCIATE-RQ by accepting it, with this result for every context."""
    connection.sendall(acceptance(next_pdu(connection), result))


def acceptance(pdu: bytes, result: int) -> bytes:
    """An A-ASSOCIATE-AC with this result for every context of a request (PS3.8 9.3.3)."""
    request = A_ASSOCIATE_RQ()
    request.decode(pdu)
    primitive = request.to_primitive()
    contexts = primitive.presentation_context_definition_list
    for context in contexts:
        context.transfer_syntax = context.transfer_syntax[:1]
        context.result = result
    primitive.presentation_context_definition_results_list = contexts
    primitive.result = 0
    return bytes(A_ASSOCIATE_AC(primitive).encode())
