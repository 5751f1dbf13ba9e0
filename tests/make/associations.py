"""Senders, receivers and doors on free loopback ports; data sets that are whole."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomIO
from pydicom.filewriter import write_dataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE

from dicom_xai.config import Allowed, Listener, ReceiveConfig
from dicom_xai.errors import RefusedError
from dicom_xai.receive.storage_scp import Arrival, StorageSCP, TransferEnd
from dicom_xai.study import Sender

HOST = "127.0.0.1"


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


class Shelf:
    """A door that keeps what comes in memory and refuses what it is told to refuse."""

    def __init__(self, refusal: RefusedError | Exception | None = None) -> None:
        self.refusal = refusal
        self.arrivals: list[Arrival] = []
        self.ends: list[tuple[int, TransferEnd]] = []
        self.refusals: list[tuple[str, Sender]] = []
        self.transfers = 0
        self._changed = threading.Condition()

    def opened(self, sender: Sender) -> int:
        """A new number."""
        with self._changed:
            self.transfers += 1
            return self.transfers

    def accept(self, arrival: Arrival, transfer: int) -> None:
        """Keep it, or raise what was asked for."""
        if self.refusal is not None:
            raise self.refusal
        with self._changed:
            self.arrivals.append(arrival)
            self._changed.notify_all()

    def closed(self, transfer: int, how: TransferEnd) -> None:
        """Note it."""
        with self._changed:
            self.ends.append((transfer, how))
            self._changed.notify_all()

    def refused(self, reason: str, sender: Sender) -> None:
        """Note it."""
        with self._changed:
            self.refusals.append((reason, sender))
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
        "acse_timeout_s": 1.0,
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
    try:
        yield assoc
    finally:
        if assoc.is_established:
            assoc.release()


def store(port: int, *data_sets: Dataset, **how: object) -> list[int]:
    """Send over one association and give the statuses."""
    classes = tuple(dict.fromkeys(str(ds.SOPClassUID) for ds in data_sets))
    with associated(port, classes, **how) as assoc:  # type: ignore[arg-type]
        assert assoc.is_established  # type: ignore[attr-defined]
        return [
            assoc.send_c_store(ds if hasattr(ds, "file_meta") else ready_to_send(ds)).Status  # type: ignore[attr-defined]
            for ds in data_sets
        ]


def connected(port: int) -> socket.socket:
    """A bare TCP connection to a listener."""
    return socket.create_connection((HOST, port), timeout=10)
