"""One connection's upper layer (PS3.8) with deadlines and bounds, and without polling.

pynetdicom's PDU classes and state machine stay; its reads, writes, timers and loop are replaced.
Why, and what each guard is for, is told in `guards`.

Threads: the connection's reader and writer (`GuardedDUL`) lives here. Another thread reaches it by
its queues and by `GuardedSocket.wake`, and may call `hang_up` at any time.
"""

from __future__ import annotations

import logging
import queue
import select
import socket
import struct
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dul import DULServiceProvider
from pynetdicom.fsm import TRANSITION_TABLE
from pynetdicom.pdu import A_ABORT_RQ
from pynetdicom.timer import Timer
from pynetdicom.transport import AssociationSocket

from dicom_xai.dimse import MAX_PDU_BYTES, acknowledge_now, make_eager, trace_of

if TYPE_CHECKING:
    from pynetdicom.pdu_primitives import P_DATA

    from dicom_xai.receive.guards import GuardedAssociation

log = logging.getLogger(__name__)

#: How long a thread sleeps at most before it looks at its timers, seconds.
TICK_S = 0.5
#: After the last PDU the peer closes the connection; we do so after this long, seconds.
LINGER_S = 0.5

_P_DATA_TF = 0x04
# PS3.8 9.3: an A-ASSOCIATE of 128 contexts with 45 syntaxes each takes 200 kB; the rest is fixed
_LONGEST_PDU = {
    0x01: 1_000_000,
    0x02: 1_000_000,
    0x03: 1_024,
    _P_DATA_TF: MAX_PDU_BYTES + 1_024,
    0x05: 1_024,
    0x06: 1_024,
    0x07: 1_024,
}
#: Events that announce a primitive of ours (PS3.8 Table 9-10): there is one in the queue for each.
_OURS = frozenset({"Evt1", "Evt7", "Evt8", "Evt9", "Evt11", "Evt14", "Evt15"})
#: What pynetdicom and pydicom raise on bytes that are no command set or no PDU.
_MALFORMED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
    Warning,  # where warnings are errors
    struct.error,
)


class MonotonicTimer(Timer):  # type: ignore[misc]
    """pynetdicom's timer on a clock that never jumps; one that was stopped never expires."""

    _start_time: float | None

    def start(self) -> None:
        """(Re)start from now."""
        self._start_time = time.monotonic()

    def stop(self) -> None:
        """Forget the start."""
        self._start_time = None

    @property
    def remaining(self) -> float:
        """Seconds left; negative once expired."""
        if self.timeout is None:
            return 1.0
        if self._start_time is None:
            return float(self.timeout)
        return float(self.timeout - (time.monotonic() - self._start_time))


class GuardedSocket(AssociationSocket):  # type: ignore[misc]
    """A connection whose reads and writes have deadlines, and on which another thread can knock."""

    def __init__(self, assoc: GuardedAssociation, connection: socket.socket, stall_s: float):
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._woken.setblocking(False)
        self._stall_s = stall_s
        make_eager(connection)
        super().__init__(assoc, client_socket=connection)

    @property
    def ready(self) -> bool:
        """Whether the peer has sent something, or has gone."""
        if self.socket is None or not self._is_connected:
            return False
        return self.wait(0.0, for_peer_only=True)

    def wait(self, timeout_s: float, *, for_peer_only: bool = False) -> bool:
        """Sleep until the peer sends (then True), `wake` is called, or the time is over."""
        poll = select.poll()  # unlike select.select, it takes descriptors above 1023
        peer = self.socket
        if peer is not None and peer.fileno() >= 0:
            poll.register(peer, select.POLLIN)
        if not for_peer_only:
            poll.register(self._woken, select.POLLIN)
        woken = self._woken.fileno()
        found = [fd for fd, _ in poll.poll(timeout_s * 1000)]
        if woken in found:
            with suppress(OSError):
                self._woken.recv(4096)
        return any(fd != woken for fd in found)

    def sleep(self, timeout_s: float) -> None:
        """Sleep until `wake` is called or the time is over, whatever the peer sends."""
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        if poll.poll(timeout_s * 1000):
            with suppress(OSError):
                self._woken.recv(4096)

    def wake(self) -> None:
        """End a `wait` or `sleep` of the thread that owns the connection."""
        with suppress(OSError):  # a full pipe wakes as well; a closed one has nobody to wake
            self._waker.send(b"\0")

    def read(self, count: int, deadline_s: float) -> bytearray | None:
        """Exactly `count` bytes, or None when the peer went away.

        Raises
        ------
        TimeoutError
            They are not all there at `deadline_s`.
        """
        peer = self.socket
        if peer is None:
            return None
        buffer = bytearray(count)
        view = memoryview(buffer)
        done = 0
        try:
            while done < count:
                remaining = deadline_s - time.monotonic()
                if remaining <= 0:
                    raise TimeoutError
                peer.settimeout(remaining)
                received = peer.recv_into(view[done:])
                if received == 0:
                    return None
                done += received
            acknowledge_now(peer)
        except TimeoutError:
            raise
        except OSError:
            return None
        return buffer

    def send(self, bytestream: bytes) -> None:
        """Send all, or end the association: a peer that stops reading gets `stall_s`."""
        peer = self.socket
        try:
            if peer is None:
                raise OSError("closed")
            peer.settimeout(self._stall_s)
            peer.sendall(bytestream)
        except OSError:
            self.event_queue.put("Evt17")

    def hang_up(self) -> None:
        """Close everything, from any thread; blocked reads and writes end at once."""
        peer = self.socket
        if peer is not None:
            with suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
        self.wake()

    def dispose(self) -> None:
        """Give all descriptors back; only when both threads of the connection are done."""
        for each in (self.socket, self._waker, self._woken):
            if each is not None:
                each.close()


class GuardedDUL(DULServiceProvider):  # type: ignore[misc]
    """The upper layer with deadlines, bounds and no polling."""

    assoc: GuardedAssociation
    socket: GuardedSocket

    def __init__(self, assoc: GuardedAssociation) -> None:
        super().__init__(assoc)
        self._idle_timer = MonotonicTimer(None)
        self.artim_timer = MonotonicTimer(None)
        self.daemon = True
        self._opened_s = time.monotonic()
        self._is_broken = False

    def send_pdu(self, primitive: object) -> None:
        """Queue a primitive for the peer and knock."""
        super().send_pdu(primitive)
        self.socket.wake()

    def kill_dul(self) -> None:
        """Ask the thread to end and knock."""
        super().kill_dul()
        self.socket.wake()

    def run_reactor(self) -> None:
        """Serve the state machine until the association is over; always hangs up in the end."""
        self._idle_timer.start()
        self.assoc._dul_ready.set()
        try:
            while not self._kill_thread:
                self._step()
        except Exception as error:  # noqa: BLE001 - logged, its message apart
            # hostile bytes that got past `_MALFORMED`, or our bug: this association ends, no other
            log.error("upper layer failed, association aborted: %s", trace_of(error))
            self._abort_unmannerly()
        finally:
            self.socket.hang_up()
            # wakes a service thread that still waits for a request
            self.to_user_queue.put(None)
            self.assoc.news.set()

    def _step(self) -> None:
        """One event of the state machine, or a sleep.

        Something new is looked for only when all events are done: `_process_recv_primitive` looks
        at its queue without taking, so a second look would announce the same primitive twice.
        """
        if self.event_queue.empty():
            if self.artim_timer.expired:
                self.event_queue.put("Evt18")
            elif not self._process_recv_primitive() and self._is_transport_event():
                self._idle_timer.restart()
        try:
            event = self.event_queue.get(block=False)
        except queue.Empty:
            if self._is_served_first():
                self.socket.sleep(TICK_S)
            else:
                self.socket.wait(TICK_S)
            return
        if (event, self.state_machine.current_state) in TRANSITION_TABLE:
            self.state_machine.do_action(event)
        elif event in _OURS:
            # the peer was faster: this answer belongs to a conversation that is over
            self.to_provider_queue.get(block=False)
        else:
            self._refuse("malformed-pdu")
        self.assoc.news.set()

    def _is_served_first(self) -> bool:
        """Whether a request waits already: no more is read until it is served (PS3.7 D.3.3.3)."""
        return not self.assoc.dimse.msg_queue.empty()

    def _is_transport_event(self) -> bool:
        if self.state_machine.current_state == "Sta13":
            # our last word is said; what still comes is of no interest
            if self._is_broken or not self.socket.wait(LINGER_S, for_peer_only=True):
                self.socket.close()
                return True
            self._read_pdu_data()
            return True
        if self._is_served_first() or not self.socket.ready:
            return False
        self._read_pdu_data()
        return True

    def _read_pdu_data(self) -> None:
        """Read one PDU, or say why not: Evt17 connection lost, Evt19 not acceptable."""
        if self.state_machine.current_state in ("Sta1", "Sta2"):
            deadline_s = self._opened_s + self.assoc.acse_timeout
        else:
            deadline_s = time.monotonic() + self.assoc.dimse_timeout
        try:
            header = self.socket.read(6, deadline_s)
            if header is None:
                self._lose("left")
                return
            kind, _, length = struct.unpack(">BBL", header)
            if length > _LONGEST_PDU.get(kind, -1):
                self._refuse("pdu-too-long" if kind in _LONGEST_PDU else "unknown-pdu")
                return
            body = self.socket.read(length, deadline_s)
            if body is None:
                self._lose("left")
                return
        except TimeoutError:
            self._lose("stalled")
            return
        try:
            pdu, event = self._decode_pdu(header + body)
            if kind != _P_DATA_TF:
                pdu.to_primitive()  # tried here, for the state machine would not survive it
        except _MALFORMED:
            self._refuse("malformed-pdu")
            return
        self._recv_pdu.put(pdu)
        self.event_queue.put(event)

    def _lose(self, reason: str) -> None:
        """The peer has gone, which is its right, or did not finish in time what it began."""
        if self.assoc.is_ending:
            pass  # told to, and noted by whoever told
        elif self.state_machine.current_state in ("Sta1", "Sta2"):
            self.assoc.note("no-association-request")
        elif reason == "stalled":
            self.assoc.note(reason)
        self.event_queue.put("Evt17")

    def _refuse(self, reason: str) -> None:
        """Not acceptable: A-ABORT, and nothing more is read."""
        self.assoc.note(reason)
        self._is_broken = True
        self.event_queue.put("Evt19")

    def _send(self, pdu: object) -> None:
        super()._send(pdu)
        # a peer that waits for a slow answer is not idle
        self._idle_timer.restart()

    def _abort_unmannerly(self) -> None:
        """A-ABORT past the state machine, which is in no known state."""
        pdu = A_ABORT_RQ()
        pdu.source = 0x02
        pdu.reason_diagnostic = 0x00
        self.socket.send(pdu.encode())
        self.assoc.is_aborted = True
        self.assoc.is_established = False
        self.assoc._kill = True


class GuardedDIMSE(DIMSEServiceProvider):  # type: ignore[misc]
    """Messages of bounded size; a malformed one ends the association and nothing else."""

    def __init__(self, assoc: GuardedAssociation) -> None:
        super().__init__(assoc)
        self._received_bytes = 0

    def receive_primitive(self, primitive: P_DATA) -> None:
        """Add fragments to the message under way."""
        for _, fragment in primitive.presentation_data_value_list:
            self._received_bytes += len(fragment)
        if self._received_bytes > self.assoc.max_message_bytes:
            self.message = None
            self.dul._refuse("message-too-long")
            return
        try:
            super().receive_primitive(primitive)
        except _MALFORMED:
            self.message = None
            self.dul._refuse("malformed-message")
        if self.message is None:
            self._received_bytes = 0
