"""A destination that fails on command: raw sockets, so that it may break every rule.

It keeps what it gets, like a PACS, and counts what a PACS must never get: other bytes under a UID
that it holds. Each lie is used up by one attempt; without lies it is an honest storage SCP.
"""

from __future__ import annotations

import random
import select
import socket
import struct
import threading
from collections import deque
from contextlib import suppress
from enum import StrEnum
from io import BytesIO

from pydicom import Dataset
from pydicom.filereader import read_dataset
from pynetdicom.dimse_messages import C_STORE_RSP
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.pdu import P_DATA_TF

from tests.make.associations import HOST, acceptance, next_pdu

_ABORT = b"\x07\x00\x00\x00\x00\x04\x00\x00\x00\x00"  # PS3.8 9.3.8
_REJECT = b"\x03\x00\x00\x00\x00\x04\x00\x02\x03\x01"  # transient, temporary congestion, 9.3.4
_RELEASED = b"\x06\x00\x00\x00\x00\x04\x00\x00\x00\x00"  # PS3.8 9.3.7


class Lie(StrEnum):
    """What goes wrong in one attempt."""

    SILENT = "takes the connection and neither reads nor answers"
    NO_ANSWER = "reads the association request and never answers it"
    HALF_ACCEPT = "sends the first half of its acceptance, and no more"
    GARBAGE_ACCEPT = "answers the association request with random bytes"
    REJECT = "rejects the association for now"
    NO_CONTEXTS = "accepts the association and none of its contexts"
    ACCEPT_ABORT = "accepts, then aborts at once"
    STOPS_READING = "accepts, then never reads again"
    ABORT_IN_OBJECT = "aborts in the middle of an object"
    CLOSE_IN_OBJECT = "closes in the middle of an object"
    RESET_IN_OBJECT = "resets the connection in the middle of an object"
    MUTE = "reads an object and never answers"
    HALF_RESPONSE = "sends the first half of its response, and no more"
    GARBAGE_RESPONSE = "answers an object with a P-DATA of random bytes"
    GARBAGE_PDU = "answers an object with random bytes"
    OTHER_RESPONSE = "answers a message that was never sent"
    KEEP_AND_CLOSE = "keeps the object, then closes without an answer"
    KEEP_AND_ABORT = "keeps the object, then aborts without an answer"


#: Those that are about an object; the others are about an association.
OF_OBJECTS = frozenset(list(Lie)[list(Lie).index(Lie.STOPS_READING) :])
#: Those that a sender notices by a deadline alone.
STALLS = frozenset(
    [
        *(Lie.SILENT, Lie.NO_ANSWER, Lie.HALF_ACCEPT),
        *(Lie.STOPS_READING, Lie.MUTE, Lie.HALF_RESPONSE),
    ]
)


class ScriptedPeer:
    """Listens from `start` to `stop`.

    Attributes
    ----------
    kept : dict of str to bytes
        Data sets by SOP Instance UID.
    conflicts : list of str
        UIDs that came again with other bytes.
    received : int
        Whole objects, resends included.
    attempts : int
        Connections.
    """

    def __init__(self, seed: int = 0) -> None:
        self.kept: dict[str, bytes] = {}
        self.conflicts: list[str] = []
        self.received = 0
        self.attempts = 0
        self.port = 0
        self._rng = random.Random(seed)
        self._lies: deque[Lie] = deque()
        self._statuses: deque[int] = deque()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._listener: socket.socket | None = None
        self._threads: list[threading.Thread] = []

    def tell(self, *lies: Lie) -> None:
        """Lie so in the next attempts, one after the other, and in no other way."""
        with self._lock:
            self._lies = deque(lies)

    def answer(self, *statuses: int) -> None:
        """Answer the next objects with these; only those of success and warnings are kept."""
        with self._lock:
            self._statuses = deque(statuses)

    def start(self) -> ScriptedPeer:
        """Listen; on the port it had before, if any."""
        self._stopping = threading.Event()
        self._listener = socket.create_server((HOST, self.port), backlog=64)
        self.port = int(self._listener.getsockname()[1])
        thread = threading.Thread(target=self._listen, args=(self._listener, self._stopping))
        self._threads = [thread]
        thread.start()
        return self

    def stop(self) -> None:
        """Close everything."""
        self._stopping.set()
        if self._listener is not None:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for thread in list(self._threads):
            thread.join(10)
            assert not thread.is_alive()

    def __enter__(self) -> ScriptedPeer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _listen(self, listener: socket.socket, stopping: threading.Event) -> None:
        while not stopping.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            self.attempts += 1
            thread = threading.Thread(target=self._serve, args=(connection, stopping))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket, stopping: threading.Event) -> None:
        with connection:
            try:
                if self._associate(connection, stopping):
                    while self._take_message(connection, stopping):
                        pass
            except (ConnectionError, TimeoutError, struct.error):
                return  # the other side went first

    def _associate(self, connection: socket.socket, stopping: threading.Event) -> bool:
        lie = self._next(is_of_object=False)
        if lie is Lie.SILENT:
            return self._hold(connection, stopping)
        if not _readable(connection, stopping):
            return False
        pdu = next_pdu(connection)
        if pdu[:1] != b"\x01":
            return False
        accepted = acceptance(pdu, 3 if lie is Lie.NO_CONTEXTS else 0)
        if lie is Lie.NO_ANSWER:
            return self._hold(connection, stopping)
        if lie is Lie.HALF_ACCEPT:
            connection.sendall(accepted[: len(accepted) // 2])
            return self._hold(connection, stopping)
        if lie is Lie.GARBAGE_ACCEPT:
            connection.sendall(self._rng.randbytes(300))
            return False
        if lie is Lie.REJECT:
            connection.sendall(_REJECT)
            return False
        connection.sendall(accepted)
        if lie is Lie.ACCEPT_ABORT:
            connection.sendall(_ABORT)
        return lie is not Lie.ACCEPT_ABORT

    def _take_message(self, connection: socket.socket, stopping: threading.Event) -> bool:
        """One message, whatever it is; False when the connection is over."""
        command, data, context_id, lie = b"", bytearray(), 0, None
        while True:
            if not _readable(connection, stopping):
                return False
            if lie is None and (lie := self._next(is_of_object=True)) is Lie.STOPS_READING:
                return self._hold(connection, stopping)
            pdu = next_pdu(connection)
            if pdu[:1] == b"\x05":
                connection.sendall(_RELEASED)
            if pdu[:1] != b"\x04":
                self._put_back(lie)
                return False
            is_last = False
            for number, control, fragment in _values(pdu):
                context_id = number
                if control & 0x01:
                    command += fragment
                else:
                    data += fragment
                    is_last = bool(control & 0x02)
            if lie in (Lie.ABORT_IN_OBJECT, Lie.CLOSE_IN_OBJECT, Lie.RESET_IN_OBJECT):
                _break_off(connection, lie)
                return False
            if is_last:
                request = read_dataset(BytesIO(command), True, True)
                return self._answer(connection, stopping, lie, request, bytes(data), context_id)

    def _answer(
        self,
        connection: socket.socket,
        stopping: threading.Event,
        lie: Lie | None,
        request: Dataset,
        data: bytes,
        context_id: int,
    ) -> bool:
        uid = str(request.AffectedSOPInstanceUID)
        if lie in (None, Lie.KEEP_AND_CLOSE, Lie.KEEP_AND_ABORT):
            status = self._keep(uid, data)
        else:
            status = 0
        number = request.MessageID + (7 if lie is Lie.OTHER_RESPONSE else 0)
        response = _response(number, request, uid, status, context_id)
        if lie is Lie.MUTE:
            return self._hold(connection, stopping)
        if lie is Lie.HALF_RESPONSE:
            connection.sendall(response[: len(response) // 2])
            return self._hold(connection, stopping)
        if lie is Lie.KEEP_AND_CLOSE:
            return False
        if lie is Lie.KEEP_AND_ABORT:
            connection.sendall(_ABORT)
            return False
        if lie is Lie.GARBAGE_PDU:
            connection.sendall(self._rng.randbytes(500))
            return False
        if lie is Lie.GARBAGE_RESPONSE:
            noise = self._rng.randbytes(100)
            head = struct.pack(">BBLLBB", 4, 0, len(noise) + 6, len(noise) + 2, context_id, 0x03)
            connection.sendall(head + noise)
            return self._hold(connection, stopping)
        connection.sendall(response)
        return True

    def _keep(self, uid: str, data: bytes) -> int:
        with self._lock:
            self.received += 1
            status = self._statuses.popleft() if self._statuses else 0
            if status and status & 0xF000 != 0xB000:
                return status
            if uid not in self.kept:
                self.kept[uid] = data
            if self.kept[uid] != data:
                self.conflicts.append(uid)
                return 0x0111
        return status

    def _next(self, *, is_of_object: bool) -> Lie | None:
        with self._lock:
            if self._lies and (self._lies[0] in OF_OBJECTS) is is_of_object:
                return self._lies.popleft()
        return None

    def _put_back(self, lie: Lie | None) -> None:
        """What came was no object, so the lie is for the next one."""
        if lie is not None:
            with self._lock:
                self._lies.appendleft(lie)

    def _hold(self, connection: socket.socket, stopping: threading.Event) -> bool:
        """Do nothing until the other side gives up; False, for then it is over."""
        poller = select.poll()
        poller.register(connection, select.POLLRDHUP | select.POLLHUP | select.POLLERR)
        while not stopping.is_set() and not poller.poll(100):
            pass
        return False


def _readable(connection: socket.socket, stopping: threading.Event) -> bool:
    """Wait until something comes or the peer has closed; False when we are to stop first."""
    poller = select.poll()
    poller.register(connection, select.POLLIN)
    while not stopping.is_set():
        if poller.poll(100):
            return True
    return False


def _break_off(connection: socket.socket, lie: Lie) -> None:
    if lie is Lie.ABORT_IN_OBJECT:
        connection.sendall(_ABORT)
    if lie is Lie.RESET_IN_OBJECT:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _values(pdu: bytes) -> list[tuple[int, int, bytes]]:
    """Context id, control header and fragment of each PDV (PS3.8 9.3.5)."""
    found, at = [], 6
    while at < len(pdu):
        (length,) = struct.unpack_from(">L", pdu, at)
        found.append((pdu[at + 4], pdu[at + 5], pdu[at + 6 : at + 4 + length]))
        at += 4 + length
    return found


def _response(number: int, request: Dataset, uid: str, status: int, context_id: int) -> bytes:
    """A C-STORE-RSP (PS3.7 9.3.1.2)."""
    answer = C_STORE()
    answer.MessageIDBeingRespondedTo = number
    answer.AffectedSOPClassUID = request.AffectedSOPClassUID
    answer.AffectedSOPInstanceUID = uid
    answer.Status = status
    message = C_STORE_RSP()
    message.primitive_to_message(answer)
    return b"".join(P_DATA_TF(each).encode() for each in message.encode_msg(context_id, 16_384))
