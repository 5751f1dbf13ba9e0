"""Who gets a thread: listening sockets, and the gate that counts connections.

What a hospital network brings to a DICOM port, and what is done about it here and beside:

===================================================  =============================================
what a bare server suffers from                      here
===================================================  =============================================
half a PDU holds threads for ever                    every PDU has a deadline: `upper_layer.Wire`
a header claiming 4 GiB fills the memory             refused on the header: `upper_layer`
a data set without end fills memory or disk          cut at `max_message_bytes`: `association`
a large data set is held in memory                   handed on in parts: `association`
requests sent ahead are all queued                   one is served; 256 kB, then TCP's window
a bad command set kills a thread                     answered with A-ABORT: `command`
connections without end, threads for each            capped before a thread starts: `Gate`
a flood of half-open connections locks all out       the greediest address makes room: `Gate`
a silent TLS client stops the accept loop            shaken hands with in its own thread
a backlog of 5                                       256
an idle association polls                            its thread sleeps in the kernel
timers on the wall clock                             all are on the monotonic clock
threads keep the process alive                       daemons, ended by `Gate.close`
===================================================  =============================================

Threads: one accept loop for each `Server`, one thread for each connection. Only `Gate` is shared.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections import Counter
from contextlib import suppress

from dicom_xai.dimse import trace_of
from dicom_xai.errors import ConfigError
from dicom_xai.receive.association import Association, Hooks, Terms
from dicom_xai.receive.upper_layer import LINGER_S
from dicom_xai.tls import Credentials

#: A half-open connection younger than this is not closed for the sake of another, seconds.
YOUNG_S = 1.0
#: How many connections may still be closing above the limit.
DYING = 64
#: Connections that the kernel holds for us until we accept them.
BACKLOG = 256
#: The address of a peer that was not accepted yet.
NOBODY = "0.0.0.0"
#: The accept loop's pause when the process has no descriptor left, seconds.
OUT_OF_DESCRIPTORS_S = 0.05


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
        self._inside: dict[Association, None] = {}  # in order of arrival
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
            among, born_before = alive, time.monotonic() - YOUNG_S
            if len(same) >= self._most_of_one_source:
                among = same
            elif len(alive) < self._most_connections:
                return True
            else:
                held = Counter(each.source_address for each in alive if each.is_half_open)
                greediest, count = held.most_common(1)[0] if held else ("", 0)
                if count > len(same):
                    among = [each for each in alive if each.source_address == greediest]
                    born_before = time.monotonic()
            closed = _close_oldest(among, born_before)
        if closed is not None:
            closed.note("half-open")  # whoever takes the note may take long; nobody waits for it
        return closed is not None

    def enter(self, association: Association) -> None:
        """Count a connection; before its threads start."""
        with self._lock:
            self._inside[association] = None

    def admit(self, association: Association) -> str | None:
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

    def leave(self, association: Association) -> None:
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


def _close_oldest(among: list[Association], born_before: float) -> Association | None:
    """Hang up one that is half-open and old enough, and give it."""
    for each in among:
        if each.is_half_open and each.opened_s <= born_before:
            each.hang_up()
            return each
    return None


class Server:
    """One listening socket; connections are counted before anything is spent on them.

    Parameters
    ----------
    host : str
    port : int
        0 takes a free one; `address` tells which.
    terms : Terms
    hooks : Hooks
    gate : Gate
    credentials : Credentials, optional
        TLS is spoken with them, as they are when a connection comes.

    Raises
    ------
    ConfigError
        The address cannot be listened on.
    """

    def __init__(
        self,
        host: str,
        port: int,
        terms: Terms,
        hooks: Hooks,
        gate: Gate,
        credentials: Credentials | None = None,
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server(
                (host, port),
                family=family,
                backlog=BACKLOG,
                dualstack_ipv6=host == "::" and socket.has_dualstack_ipv6(),
            )
        except OSError as error:
            number = error.errno or 0
            words = os.strerror(number) if number > 0 else error.strerror  # of the name's lookup
            raise ConfigError(
                f"receive.listeners: {host}:{port} cannot be listened on ({words}); "
                "change host or port there, or end what holds it"
            ) from error
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        self._terms = terms
        self._hooks = hooks
        self._gate = gate
        self._credentials = credentials
        self._is_closed = False
        self._thread = threading.Thread(target=self._serve, name="acceptor", daemon=True)

    def start(self) -> None:
        """Accept connections from now on."""
        self._thread.start()

    def close(self) -> None:
        """Accept no more and close the listening socket."""
        self._is_closed = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the accept loop
        if self._thread.is_alive():
            self._thread.join(timeout=1.0)
        self._socket.close()

    def _serve(self) -> None:
        while not self._is_closed:
            try:
                connection, address = self._socket.accept()
            except OSError as error:
                if not self._is_closed:
                    self._pause_after(error)
                continue
            try:
                self._take(connection, address[0])
            except Exception as error:  # noqa: BLE001 - noted, its message apart
                # a connection that could not be set up; the listener goes on
                connection.close()
                self._hooks.noted("failed", address[0], trace_of(error))

    def _pause_after(self, error: OSError) -> None:
        """Without descriptors the socket stays readable: do not spin."""
        if error.errno in (errno.EMFILE, errno.ENFILE):
            self._hooks.noted("connection-limit", NOBODY, "no file descriptor is left")
        elif error.errno != errno.ECONNABORTED:
            self._hooks.noted("failed", NOBODY, trace_of(error))
        time.sleep(OUT_OF_DESCRIPTORS_S)

    def _take(self, connection: socket.socket, source_address: str) -> None:
        """Start the thread of one connection, if it is worth one."""
        if not self._gate.has_room(source_address):
            connection.close()
            self._hooks.noted("connection-limit", source_address, "there are too many already")
            return
        tls = None if self._credentials is None else self._credentials.context()
        association = Association(
            connection,
            source_address,
            self.address,
            self._terms,
            self._hooks,
            self._gate.leave,
            tls,
        )
        self._gate.enter(association)
        try:
            association.start()
        except RuntimeError:  # no more threads
            self._gate.leave(association)
            association.discard()
            self._hooks.noted("connection-limit", source_address, "no thread is left")
