"""pynetdicom's acceptor, made safe for a hospital network by subclassing.

pynetdicom 3.0.4 keeps its PDU classes, its state machine (PS3.8 9.2) and its services. Replaced is
what stands around them, because a bare server can be stopped by anybody who reaches its port:

===================================================  =============================================
a bare server                                        here
===================================================  =============================================
half a PDU holds two threads for ever                every PDU has a deadline: `GuardedDUL`
a header claiming 4 GiB fills the memory             refused on the header: `_LONGEST_PDU`
a data set without end fills the memory              cut at `MAX_MESSAGE_BYTES`: `GuardedDIMSE`
requests sent ahead are all queued                   one waits, the rest stays in TCP's window
a bad command set kills a thread                     answered with A-ABORT, one log line
each connection copies 120 x 45 contexts             the list is shared: nobody writes to it
connections without end, three threads each          capped before a thread starts: `Gate`
a flood of half-open connections locks all out       the greediest address makes room
a backlog of 5                                       256
an idle association polls a thousand times a second  threads sleep until something happens
timers on the wall clock                             `MonotonicTimer`
reader threads keep the process alive                daemons, closed in `finally`
===================================================  =============================================

Threads: one accept loop for each server; for each connection one thread reads and writes (`dul`)
and one serves (`GuardedAssociation`). Only `Gate` is shared between connections.
"""

from __future__ import annotations

import errno
import logging
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from pynetdicom import evt
from pynetdicom._globals import MODE_ACCEPTOR
from pynetdicom.acse import ACSE
from pynetdicom.ae import ApplicationEntity
from pynetdicom.association import Association
from pynetdicom.pdu_primitives import A_ASSOCIATE
from pynetdicom.presentation import PresentationContext
from pynetdicom.transport import AddressInformation, AssociationServer

from dicom_xai.dimse import MAX_MESSAGE_BYTES, MAX_PDU_BYTES, Rejection, trace_of
from dicom_xai.receive.upper_layer import (
    LINGER_S,
    TICK_S,
    GuardedDIMSE,
    GuardedDUL,
    GuardedSocket,
)

log = logging.getLogger(__name__)

#: A half-open connection younger than this is not closed for the sake of another, seconds.
YOUNG_S = 1.0
#: How many connections may still be closing above the limit.
DYING = 64
#: The accept loop's pause when the process has no descriptor left, seconds.
OUT_OF_DESCRIPTORS_S = 0.05


class GuardedACSE(ACSE):  # type: ignore[misc]
    """Negotiation that asks first whether this peer may associate at all."""

    def _negotiate_as_acceptor(self) -> None:
        request: A_ASSOCIATE = self.requestor.primitive
        self.requestor.ae_title = request.calling_ae_title
        rejection = self.assoc.hooks.admit(self.assoc)
        if rejection is None:
            super()._negotiate_as_acceptor()
            return
        self.send_reject(*rejection.value)
        self.assoc.is_rejected = True
        self.assoc.kill()


@dataclass(frozen=True)
class Hooks:
    """What the owner of a server decides and wants to know; called on the connection's thread."""

    #: May this peer associate? Called once, before anything is agreed.
    admit: Callable[[GuardedAssociation], Rejection | None]
    #: Called once for each admitted association; True after a normal release.
    ended: Callable[[GuardedAssociation, bool], None]
    #: Something was turned away: a reason of a closed set, and the peer's address.
    noted: Callable[[str, str], None]


class GuardedAssociation(Association):  # type: ignore[misc]
    """One connection of a peer, from accept to close."""

    dul: GuardedDUL
    is_established: bool

    def __init__(
        self,
        server: GuardedServer,
        connection: socket.socket,
        client_address: tuple[str, int],
    ) -> None:
        super().__init__(server.ae, MODE_ACCEPTOR)
        self.hooks = server.hooks
        self.gate = server.gate
        self.max_message_bytes = server.max_message_bytes
        self.news = threading.Event()
        self.source_address = str(client_address[0])
        self.opened_s = time.monotonic()
        self.is_admitted = False
        self._has_ended = False
        self._server = server
        self.name = f"AcceptorThread@{client_address[0]}:{client_address[1]}"

        self.dul = GuardedDUL(self)
        self.dimse = GuardedDIMSE(self)
        self.acse = GuardedACSE(self)
        # again: these setters reach through to the timers of the new upper layer
        self.acse_timeout = server.ae.acse_timeout
        self.network_timeout = server.ae.network_timeout
        self.set_socket(GuardedSocket(self, connection, server.ae.dimse_timeout))

        self.acceptor.maximum_length = MAX_PDU_BYTES
        self.acceptor.ae_title = server.ae_title
        self.acceptor.address_info = AddressInformation.from_tuple(server.server_address)
        self.acceptor.implementation_class_uid = server.ae.implementation_class_uid
        self.acceptor.implementation_version_name = server.ae.implementation_version_name
        self.acceptor.supported_contexts = server.contexts
        self.requestor.address_info = AddressInformation.from_tuple(client_address)
        self._handlers = server.handlers

    def _bind_defaults(self) -> None:
        """Nothing: the handlers are the server's."""

    @property
    def calling_ae_title(self) -> str:
        """As the peer says."""
        return str(self.requestor.primitive.calling_ae_title).strip()

    @property
    def called_ae_title(self) -> str:
        """Whom the peer means to call."""
        return str(self.requestor.primitive.called_ae_title).strip()

    @property
    def is_half_open(self) -> bool:
        """Connected and not admitted yet."""
        return not self.is_admitted

    @property
    def is_ending(self) -> bool:
        """Told to end; its threads may still be at it."""
        return bool(self._kill)

    def note(self, reason: str) -> None:
        """Tell the owner why this connection is turned away."""
        self.hooks.noted(reason, self.source_address)

    def hang_up(self) -> None:
        """End at once, from any thread."""
        self._kill = True
        self.dul.socket.hang_up()
        self.news.set()

    def abort_soon(self) -> None:
        """Ask the connection's own threads to send A-ABORT and end, from any thread."""
        self.acse.send_abort(0x00)
        self._kill = True
        self.news.set()

    def run_reactor(self) -> None:
        """Negotiate, serve, and in any case close and say so."""
        try:
            super().run_reactor()
        except Exception as error:  # noqa: BLE001 - logged, its message apart
            # our bug or pynetdicom's: this association ends, no other
            log.error("association failed: %s", trace_of(error))
        finally:
            try:
                self._end(self.is_released)
            finally:
                self.dul.kill_dul()
                if self._started_dul:
                    self.dul.join()
                self.dul.socket.dispose()
                self.gate.leave(self)

    def _end(self, released: bool) -> None:
        if self.is_admitted and not self._has_ended:
            self._has_ended = True
            self.hooks.ended(self, released)

    def _run_reactor(self) -> None:
        """Serve requests as they come; woken by the upper layer, never polling."""
        self._is_paused = False
        while not self._kill:
            self.news.wait(TICK_S)
            self.news.clear()
            while not self._kill and not self.dimse.msg_queue.empty():
                context_id, message = self.dimse.get_msg(block=False)
                self.dul.socket.wake()
                if message is not None:
                    self._serve_request(message, context_id)
            if self.is_established and self.acse.is_release_requested():
                self.acse.send_release(is_response=True)
                self.is_released = True
                self.is_established = False
                self._end(True)
                self.kill()
                return
            if self.acse.is_aborted():
                self.is_aborted = True
                self.is_established = False
                self.kill()
                return
            if not self.dul.is_alive():
                self.kill()
                return
            if self.dul.idle_timer_expired():
                self.note("idle")
                self.abort()
                self.kill()
                return


class Gate:
    """How many connections there are, from where, and who may come in.

    Connections are capped at twice the associations and some more: enough for every peer above the
    limit to get a proper rejection, few enough that threads and descriptors stay bounded.
    """

    def __init__(self, max_associations: int, max_per_source: int) -> None:
        self._max_associations = max_associations
        self._max_per_source = max_per_source
        self._most_connections = 2 * max_associations + 32
        self._most_of_one_source = 2 * max_per_source + 32
        self._lock = threading.Condition()
        self._inside: dict[GuardedAssociation, None] = {}  # in order of arrival
        self._is_closed = False

    @property
    def count(self) -> int:
        """Associations that are admitted now."""
        with self._lock:
            return sum(each.is_admitted for each in self._inside)

    def has_room(self, source_address: str) -> bool:
        """Whether one more connection may come; a half-open one may be closed to make room.

        From one address: the oldest, unless it is younger than `YOUNG_S` and may yet associate.
        In a full house: the oldest of the address that holds the most, if it holds more than the
        newcomer's. So a flood, from however many addresses, does not keep a good peer out.
        """
        with self._lock:
            if self._is_closed or len(self._inside) >= self._most_connections + DYING:
                return False
            alive = [each for each in self._inside if not each.is_ending]
            same = [each for each in alive if each.source_address == source_address]
            if len(same) >= self._most_of_one_source:
                return self._make_room(same, born_before=time.monotonic() - YOUNG_S)
            if len(alive) < self._most_connections:
                return True
            held = Counter(each.source_address for each in alive if each.is_half_open)
            greediest, count = held.most_common(1)[0] if held else ("", 0)
            if count > len(same):
                theirs = [each for each in alive if each.source_address == greediest]
                return self._make_room(theirs, born_before=time.monotonic())
            return self._make_room(alive, born_before=time.monotonic() - YOUNG_S)

    def _make_room(self, among: list[GuardedAssociation], born_before: float) -> bool:
        for each in among:
            if each.is_half_open and each.opened_s <= born_before:
                each.note("half-open")
                each.hang_up()
                return True
        return False

    def enter(self, association: GuardedAssociation) -> None:
        """Count a connection; before its threads start."""
        with self._lock:
            self._inside[association] = None

    def admit(self, association: GuardedAssociation) -> str | None:
        """Count an association, or give the limit that forbids it."""
        with self._lock:
            admitted = [each for each in self._inside if each.is_admitted]
            if len(admitted) >= self._max_associations:
                return "association-limit"
            same = sum(each.source_address == association.source_address for each in admitted)
            if same >= self._max_per_source:
                return "source-limit"
            association.is_admitted = True
            return None

    def leave(self, association: GuardedAssociation) -> None:
        """Forget a connection; its threads are done."""
        with self._lock:
            self._inside.pop(association, None)
            self._lock.notify_all()

    def close(self, grace_s: float) -> int:
        """Let nobody in; give the admitted `grace_s`, then abort. Gives how many were aborted.

        Returns within `grace_s` and `2 * LINGER_S`, whatever the peers and the handlers do.
        """
        with self._lock:
            self._is_closed = True
            for each in self._inside:
                if each.is_half_open:
                    each.hang_up()
            self._lock.wait_for(lambda: not self._inside, timeout=grace_s)
            left = list(self._inside)
            for each in left:
                each.abort_soon()
            self._lock.wait_for(lambda: not self._inside, timeout=LINGER_S)
            for each in self._inside:
                each.hang_up()
            self._lock.wait_for(lambda: not self._inside, timeout=LINGER_S)
        return len(left)


class GuardedServer(AssociationServer):  # type: ignore[misc]
    """One listening socket; connections are counted before anything is spent on them."""

    request_queue_size = 256

    def __init__(
        self,
        ae: ApplicationEntity,
        address: tuple[str, int],
        contexts: list[PresentationContext],
        handlers: list[tuple[object, Callable[..., object]]],
        hooks: Hooks,
        gate: Gate,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self.hooks, self.gate, self.max_message_bytes = hooks, gate, max_message_bytes
        super().__init__(ae, address, ae.ae_title, contexts, evt_handlers=handlers)

    def _bind_defaults(self) -> None:
        """The answers pynetdicom gives by itself; none of its log handlers, which print headers."""
        for event in evt._INTERVENTION_EVENTS:
            self.bind(event, evt.get_default_handler(event))

    @property
    def handlers(self) -> dict[object, object]:
        """The event handlers, shared by all associations of this server."""
        return dict(self._handlers)

    def verify_request(self, request: socket.socket, client_address: tuple[str, int]) -> bool:
        """Whether a connection is worth a thread."""
        if self.gate.has_room(client_address[0]):
            return True
        self.hooks.noted("connection-limit", client_address[0])
        return False

    def process_request(self, request: socket.socket, client_address: tuple[str, int]) -> None:
        """Start the threads of one connection."""
        association = GuardedAssociation(self, request, client_address)
        self.gate.enter(association)
        try:
            association.start()
        except RuntimeError:  # no more threads
            self.gate.leave(association)
            association.dul.socket.dispose()
            self.hooks.noted("connection-limit", client_address[0])

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        """Accept; without descriptors left, wait a little, for the socket stays readable."""
        try:
            connection, address = self.socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self.hooks.noted("connection-limit", "0.0.0.0")
                time.sleep(OUT_OF_DESCRIPTORS_S)
            raise
        return connection, address

    def handle_error(self, request: object, client_address: object) -> None:
        """A connection that could not be set up; the listener goes on."""
        error = sys.exc_info()[1]
        log.error("a connection could not be set up: %s", trace_of(error) if error else "")

    def service_actions(self) -> None:
        """Nothing: pynetdicom collects garbage here, which stops all associations for a while."""

    def shutdown(self) -> None:
        """Stop accepting and close the listening socket."""
        super(AssociationServer, self).shutdown()
        self.server_close()
