"""One destination: a warm association, C-STORE of stored bytes, an answer within a deadline.

The data set is sent as it lies in the file, never decoded and encoded again, so that a resend is
byte-equal. Therefore an object needs a presentation context with exactly its transfer syntax; each
pair of SOP class and transfer syntax is proposed in a context of its own, and a pair that the peer
refuses is permanent for that object while the others go on.

What a send gives:

- a `Receipt`, when the destination has answered for good; `dimse.answer_of(receipt.status)` says
  whether it holds the object. A refused context is a receipt with 0x0122.
- `DestinationUnavailableError`, when it did not answer: nothing is lost, `backoff.Breaker` says
  when to try again. `NotNowError`, when it asked to come back with this object.

Rule: one thread at a time for each `StorageSCU`; only `hang_up` is for another one.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from typing import TYPE_CHECKING

from pydicom import uid
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_dataset, read_preamble
from pynetdicom.dimse_messages import C_STORE_RQ
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dsutils import encode
from pynetdicom.presentation import build_context
from pynetdicom.sop_class import Verification

from dicom_xai import uids
from dicom_xai.deliver.line import Line
from dicom_xai.deliver.requestor import Timeouts
from dicom_xai.dimse import (
    MAX_PDU_BYTES,
    Answer,
    Status,
    acknowledge_now,
    answer_of,
)
from dicom_xai.errors import (
    CannotUnderstandError,
    NotNowError,
    NotReachedError,
)
from dicom_xai.study import Receipt
from dicom_xai.tls import Rotation

if TYPE_CHECKING:
    from dicom_xai.config import Destination

#: SOP class and transfer syntax, as one presentation context.
Context = tuple[str, str]

#: What our results need; proposed on every association so that it can be opened early.
RESULT_CONTEXTS: tuple[Context, ...] = (
    (uid.SecondaryCaptureImageStorage, uid.ExplicitVRLittleEndian),
    (uid.SecondaryCaptureImageStorage, uid.RLELossless),
    (uid.SecondaryCaptureImageStorage, uid.JPEGBaseline8Bit),
    (uid.MultiFrameTrueColorSecondaryCaptureImageStorage, uid.ExplicitVRLittleEndian),
    (uid.MultiFrameTrueColorSecondaryCaptureImageStorage, uid.RLELossless),
    (uid.MultiFrameTrueColorSecondaryCaptureImageStorage, uid.JPEGBaseline8Bit),
    (uid.SegmentationStorage, uid.ExplicitVRLittleEndian),
    (uid.SegmentationStorage, uid.RLELossless),
    (uids.LABEL_MAP_SEGMENTATION_STORAGE, uid.ExplicitVRLittleEndian),
    (uids.LABEL_MAP_SEGMENTATION_STORAGE, uid.RLELossless),
)

#: How much is handed to the kernel at once.
WRITE_BYTES = 1_000_000

#: A context's id is odd and below 256 (PS3.8 9.3.2.2); one is Verification's.
MAX_CONTEXTS = 127


@dataclass(frozen=True, slots=True)
class EchoTiming:
    """How long a destination took, seconds."""

    associate_s: float
    echo_s: float


@dataclass(frozen=True, slots=True)
class StoredObject:
    """What the file meta says, and where the data set begins (PS3.10 7.1)."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    data_set_at: int

    @property
    def context(self) -> Context:
        """The presentation context that it needs."""
        return self.sop_class_uid, self.transfer_syntax_uid


class _LostError(Exception):
    """The connection was closed before an answer came."""


class StorageSCU(Line):
    """The sender's side of one destination.

    Parameters
    ----------
    name : str
        The destination's name in the configuration.
    destination : Destination
        Where it is.
    contexts : sequence of (SOP class UID, transfer syntax UID)
        Proposed on every association; what else is sent is added when it comes.
    timeouts : Timeouts
    clock : callable
        Monotonic seconds.
    rotated : callable
        Told when the files of the destination's `tls` changed on disk.

    Raises
    ------
    ConfigError
        The files of the destination's `tls` cannot be used.
    """

    def __init__(
        self,
        name: str,
        destination: Destination,
        contexts: Iterable[Context] = RESULT_CONTEXTS,
        timeouts: Timeouts | None = None,
        clock: Callable[[], float] = time.monotonic,
        rotated: Callable[[Rotation], None] | None = None,
    ) -> None:
        super().__init__(name, destination, timeouts, rotated)
        self._contexts = dict.fromkeys(contexts)
        self._clock = clock
        self._accepted: dict[Context, int] = {}  #: of the newest association
        self._message_id = 0
        self._used_s = clock()

    def open(self) -> None:
        """Associate now, so that the first send need not; no-op when open.

        Raises
        ------
        DestinationUnavailableError
            No connection, no answer, or a rejection.
        """
        if self.is_open:
            return
        contexts = [build_context(Verification, uid.ImplicitVRLittleEndian)]
        contexts += [build_context(sop_class, syntax) for sop_class, syntax in self._contexts]
        association = self._associate(contexts)
        self._accepted = {
            (str(cx.abstract_syntax), str(cx.transfer_syntax[0])): cx.context_id
            for cx in association.accepted_contexts
        }
        self._used_s = self._clock()

    def send(self, file: bytes) -> Receipt:
        """Store one file at the destination.

        Parameters
        ----------
        file : bytes
            Part 10: preamble, file meta, data set.

        Returns
        -------
        Receipt
            The destination's final answer, also where that is a failure.

        Raises
        ------
        NotNowError
            It answered that it cannot take the object now (0xA7xx, 0x0110): try later.
        DestinationUnavailableError
            It did not answer in time.
        CannotUnderstandError
            The file is no Part 10 file.
        """
        stored = parse(file)
        self._propose(stored.context)
        was_open = self.is_open
        self.open()
        try:
            try:
                receipt = self._store(stored, file)
            except _LostError:
                if not was_open or self._is_hung_up:
                    raise
                # it was closed while idle, as peers do; this says nothing about the destination,
                # which may have got the object all the same
                self._drop()
                try:
                    self.open()
                except NotReachedError as error:  # the object did go out, and may be the cause
                    raise self._unavailable("closed the connection, and is away") from error
                receipt = replace(self._store(stored, file), sends=2)
        except _LostError as error:
            self._drop()
            raise self._unavailable("closed the connection before it answered") from error
        self._used_s = self._clock()
        if answer_of(receipt.status) is Answer.TRANSIENT:
            raise NotNowError(self._say(f"answered 0x{receipt.status:04X} to a C-STORE"))
        return receipt

    def echo(self) -> EchoTiming:
        """Associate anew and C-ECHO.

        Raises
        ------
        DestinationUnavailableError
            One of the two failed.
        """
        self.close()
        start = self._clock()
        self.open()
        associated = self._clock()
        association = self._association
        assert association is not None
        if not any(cx.abstract_syntax == Verification for cx in association.accepted_contexts):
            raise self._unavailable("accepts no Verification, so nothing but a store can test it")
        with association.dimse.awaited():
            status = association.send_c_echo().get("Status")
        answered = self._clock()
        if status != Status.SUCCESS:
            self._drop()
            found = "nothing" if status is None else f"0x{status:04X}"
            raise self._unavailable(f"answered {found} to a C-ECHO")
        return EchoTiming(associated - start, answered - associated)

    def close_if_idle(self) -> bool:
        """Release an association that nobody used for `keep_open_s`; True when it did."""
        if not self.is_open or self._clock() - self._used_s < self._destination.keep_open_s:
            return False
        self.close()
        return True

    def _propose(self, context: Context) -> None:
        """Make sure that the association in use, or the next one, was asked for this context."""
        if context in self._contexts:
            return
        self.close()
        if len(self._contexts) >= MAX_CONTEXTS:
            self._contexts.clear()
        self._contexts[context] = None

    def _store(self, stored: StoredObject, file: bytes) -> Receipt:
        association = self._association
        assert association is not None
        context_id = self._accepted.get(stored.context)
        if context_id is None:
            return Receipt(
                self.name,
                stored.sop_instance_uid,
                int(Status.SOP_CLASS_NOT_SUPPORTED),
                "presentation context refused",
            )
        limits = self._timeouts
        deadline_s = self._clock() + limits.answer_s + len(file) / limits.slowest_bytes_per_s
        request = self._request(stored)
        data_set = memoryview(file)[stored.data_set_at :]
        longest = association.acceptor.maximum_length or MAX_PDU_BYTES

        # as in pynetdicom's own `send_c_store`: the association's thread must rest, or it would
        # take the answer for a request
        association._reactor_checkpoint.clear()
        while not association._is_paused and association.is_alive():
            time.sleep(0.0001)
        try:
            with association.dimse.awaited():
                self._write(_pdus(request, data_set, context_id, longest), deadline_s)
                _, response = association.dimse.get_msg(block=True)
        except TimeoutError:
            self._drop()
            raise self._unavailable(
                f"stopped reading in the middle of a C-STORE of {len(file)} bytes"
            ) from None
        except OSError as error:
            raise _LostError from error
        finally:
            association._reactor_checkpoint.set()
        if response is None:
            if association.dimse.is_nonsense:
                self._drop()
                raise self._unavailable("answered a C-STORE with bytes that are no message")
            if association.acse.is_aborted() or not association.dul.is_alive():
                raise _LostError
            self._drop()
            raise self._unavailable(f"did not answer a C-STORE in {limits.answer_s:g} s")
        is_ours = isinstance(response, C_STORE) and response.is_valid_response
        if not is_ours or response.MessageIDBeingRespondedTo != self._message_id:
            self._drop()
            raise self._unavailable("answered a C-STORE with something else")
        comment = str(response.ErrorComment or "")
        return Receipt(self.name, stored.sop_instance_uid, int(response.Status), comment)

    def _request(self, stored: StoredObject) -> bytes:
        """The command set of a C-STORE-RQ (PS3.7 9.3.1.1)."""
        self._message_id = self._message_id % 0xFFFF + 1
        request = C_STORE()
        request.MessageID = self._message_id
        request.Priority = 0
        request.AffectedSOPClassUID = stored.sop_class_uid
        request.AffectedSOPInstanceUID = stored.sop_instance_uid
        request.DataSet = BytesIO(b"announced; written by `_pdus`")
        message = C_STORE_RQ()
        message.primitive_to_message(request)
        return bytes(encode(message.command_set, True, True))

    def _write(self, batches: Iterator[bytes], deadline_s: float) -> None:
        """Write past pynetdicom's queue, which copies every PDU four times and cannot be cut off.

        The state machine misses nothing: sending data leaves it where it is (PS3.8 9.2.2, DT-1).
        """
        sock = self._socket
        if sock is None:
            raise ConnectionAbortedError  # aborted as soon as it was accepted
        for batch in batches:
            left = memoryview(batch)
            while left:
                if self._clock() > deadline_s:
                    raise TimeoutError
                left = left[sock.send(left) :]
            acknowledge_now(sock)


def _pdus(command: bytes, data_set: memoryview, context_id: int, longest: int) -> Iterator[bytes]:
    """A message as P-DATA-TF PDUs, joined to writes of about 1 MB (PS3.8 9.3.5, Annex E).

    The command goes out in one write with the first data: two writes would wait for each other in
    a peer that delays acknowledgements.
    """
    room = longest - 6  # a PDV's length, context id and control header
    parts: list[bytes | memoryview] = []
    size = 0
    for control, message in ((0x01, memoryview(command)), (0x00, data_set)):
        for start in range(0, len(message), room):
            fragment = message[start : start + room]
            is_last = start + room >= len(message)
            parts.append(
                struct.pack(
                    ">BBLLBB",
                    0x04,
                    0,
                    len(fragment) + 6,
                    len(fragment) + 2,
                    context_id,
                    control | (0x02 if is_last else 0),
                )
            )
            parts.append(fragment)
            size += len(fragment)
            if size >= WRITE_BYTES:
                yield b"".join(parts)
                parts, size = [], 0
    yield b"".join(parts)


def parse(file: bytes) -> StoredObject:
    """Read the file meta of a Part 10 file.

    Raises
    ------
    CannotUnderstandError
        No preamble, or no SOP class, SOP instance or transfer syntax in the file meta.
    """
    stream = BytesIO(file)
    try:
        read_preamble(stream, force=False)
    except InvalidDicomError as error:
        raise CannotUnderstandError(
            "no 'DICM' after 128 bytes: a DICOM file (PS3.10 7.1) was wanted"
        ) from error
    meta = read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
    found: list[str] = []
    for keyword in ("MediaStorageSOPClassUID", "MediaStorageSOPInstanceUID", "TransferSyntaxUID"):
        value = str(meta.get(keyword, ""))
        if not uids.is_valid(value):
            raise CannotUnderstandError(f"the file meta has no valid {keyword} (PS3.10 7.1)")
        found.append(value)
    sop_class_uid, sop_instance_uid, transfer_syntax_uid = found
    return StoredObject(sop_class_uid, sop_instance_uid, transfer_syntax_uid, stream.tell())
