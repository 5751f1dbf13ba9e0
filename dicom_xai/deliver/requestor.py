"""Associations that we ask for: eager, bounded in every wait, and clear about why there is none."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pynetdicom import AE
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.transport import AssociationSocket

from dicom_xai import uids
from dicom_xai.dimse import MAX_PDU_BYTES, acknowledge_now, make_eager
from dicom_xai.tls import Credentials, TLSSocket

if TYPE_CHECKING:
    from ssl import SSLContext

    from pynetdicom.association import Association
    from pynetdicom.events import EventHandlerType
    from pynetdicom.pdu_primitives import P_DATA, SCP_SCU_RoleSelectionNegotiation
    from pynetdicom.presentation import PresentationContext
    from pynetdicom.transport import T_CONNECT, AddressInformation

    from dicom_xai.config import Destination


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long each step of a send may take, seconds."""

    connect_s: float = 5.0
    associate_s: float = 5.0  #: A-ASSOCIATE and A-RELEASE, request to answer
    answer_s: float = 30.0  #: last byte of a C-STORE request to its response
    stall_s: float = 10.0  #: the peer neither reads nor writes
    slowest_bytes_per_s: float = 1_000_000.0  #: a write may take its bytes' time and `answer_s`


def associate(
    destination: Destination,
    limits: Timeouts,
    contexts: Sequence[PresentationContext],
    credentials: Credentials | None,
    connecting: Callable[[Connection], None],
    roles: Sequence[SCP_SCU_RoleSelectionNegotiation] = (),
    handlers: Sequence[EventHandlerType] = (),
) -> Association:
    """Ask a destination for an association; `why_not` says why it is not established.

    Parameters
    ----------
    destination : Destination
    limits : Timeouts
    contexts : sequence of PresentationContext
    credentials : Credentials, optional
        Of the destination's `tls`; the newest context of them is used.
    connecting : callable
        Told of the connection before it is made, so that another thread can cut it.
    roles : sequence of role selection items
        Where we are to be an SCP.
    handlers : sequence of event handlers
        For what the destination asks of us on the association.

    Raises
    ------
    OSError
        The host's name has no address.
    """
    ae = Requestor(destination.calling_ae_title, limits.stall_s, connecting)
    ae.implementation_class_uid = uids.IMPLEMENTATION_CLASS_UID
    ae.implementation_version_name = uids.IMPLEMENTATION_VERSION_NAME
    ae.connection_timeout = limits.connect_s
    ae.acse_timeout = limits.associate_s
    ae.dimse_timeout = limits.answer_s
    ae.network_timeout = None  # measured on the wall clock; idling is ours to end
    tls_args = None
    if credentials is not None and destination.tls is not None:
        tls_args = credentials.context(), destination.tls.server_name or destination.host
    return ae.associate(
        destination.host,
        destination.port,
        contexts=list(contexts),
        ae_title=destination.ae_title,
        max_pdu=MAX_PDU_BYTES,
        ext_neg=list(roles),
        tls_args=tls_args,
        evt_handlers=list(handlers),
    )


def why_not(association: Association, limits: Timeouts, *, has_tls: bool) -> str:
    """Why `associate` gave no association, as the end of a sentence about the destination."""
    if problem := association.dul.socket.tls_problem:
        return f"was reached, but TLS failed: {problem}"
    if association.is_rejected:
        answer = association.acceptor.primitive
        return f"rejected the association: {answer.result_str}, {answer.reason_str}"
    if association.rejected_contexts:
        return "agreed to none of the presentation contexts"
    was_made = association.dul.socket.was_made
    if not was_made and has_tls:
        return (
            "refused the connection, or did not begin TLS in "
            f"{limits.connect_s:g} s; does it speak TLS on this port?"
        )
    if not was_made:
        return f"refused the connection or did not take it in {limits.connect_s:g} s"
    return f"took the connection and agreed to no association in {limits.associate_s:g} s"


def drop(association: Association, sock: socket.socket | None) -> None:
    """Forget an association, whatever state it is in; never blocks on the peer.

    The connection is shut first: the reader thread may sit in a write to a peer that does not
    read, and an A-ABORT would queue behind it.
    """
    if sock is not None:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
    association.kill()
    if association.is_alive():
        association.join(timeout=1.0)
    if sock is not None:
        sock.close()


class Connection(AssociationSocket):  # type: ignore[misc]
    """pynetdicom's connection: eager, never blocked for longer than `stall_s`, always closed.

    Without the limit a peer that stops reading holds a C-STORE for ever, whatever the other
    timeouts; without the closing a connection that never came about leaks its descriptor. And
    pynetdicom takes a connection that is closed again when it looks for one that was refused: a
    rejection may be that quick.
    """

    was_made = False  #: the peer took the connection, whatever became of it

    def __init__(
        self,
        assoc: Association,
        address: AddressInformation,
        stall_s: float,
        tls_args: tuple[SSLContext, str] | None,
    ) -> None:
        super().__init__(assoc, address=address)
        self.tls_args = tls_args
        self._stall_s = stall_s
        self._last: socket.socket | None = None

    @property
    def _is_connected(self) -> bool:
        return self.was_made

    @_is_connected.setter
    def _is_connected(self, is_connected: bool) -> None:
        self.was_made = self.was_made or is_connected

    @property
    def tls_problem(self) -> str:
        """Why TLS failed; empty when it did not."""
        last = self.socket or self._last
        return last.problem if isinstance(last, TLSSocket) else ""

    def connect(self, primitive: T_CONNECT) -> None:
        """Connect, and set the options before anything is sent."""
        super().connect(primitive)
        if self.socket is not None:
            with suppress(OSError):  # gone already; the first write says so
                self.socket.settimeout(self._stall_s)
                make_eager(self.socket)

    def recv(self, nr_bytes: int) -> bytearray:
        """Read so many bytes; what is there already is acknowledged first.

        A peer with Nagle's algorithm on sends the second half of its answer only then.
        """
        if self.socket is not None:
            with suppress(OSError):
                acknowledge_now(self.socket)
        return bytearray(super().recv(nr_bytes))

    def _shutdown_socket(self) -> None:
        if self.socket is not None:
            self._last = self.socket
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)
            self.socket.close()


class Requestor(AE):  # type: ignore[misc]
    """An AE whose associations have our connections and never keep the process alive."""

    def __init__(
        self, ae_title: str, stall_s: float, connecting: Callable[[Connection], None]
    ) -> None:
        super().__init__(ae_title)
        self._stall_s = stall_s
        self._connecting = connecting

    def _create_socket(
        self,
        assoc: Association,
        address: AddressInformation,
        tls_args: tuple[SSLContext, str] | None,
    ) -> Connection:
        assoc.dul.daemon = True
        assoc.dimse = Messages(assoc)
        made = Connection(assoc, address, self._stall_s, tls_args)
        self._connecting(made)
        return made


class Messages(DIMSEServiceProvider):  # type: ignore[misc]
    """pynetdicom's messages, which the association's thread leaves alone while we wait for one.

    pynetdicom asks that thread to pause and looks whether it has; a thread that was about to go on
    looks as if it had, and may take the answer for a request. And a message that pynetdicom cannot
    read does not end the reader thread.
    """

    is_nonsense = False  #: something came that is no message

    def __init__(self, assoc: Association) -> None:
        super().__init__(assoc)
        self._is_awaited = False
        self._taking = threading.Lock()

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """While an answer is awaited, only who waits is given messages."""
        with self._taking:
            self._is_awaited = True
        try:
            yield
        finally:
            with self._taking:
                self._is_awaited = False

    def get_msg(self, block: bool = False) -> tuple[int | None, object]:
        """The next message; the association's thread, which never waits, may get none."""
        if block:
            answer: tuple[int | None, object] = super().get_msg(block=True)
            return answer
        with self._taking:
            if self._is_awaited:
                return None, None
            waiting: tuple[int | None, object] = super().get_msg(block=False)
            return waiting

    def receive_primitive(self, primitive: P_DATA) -> None:
        """Collect a fragment; the last one gives a message."""
        try:
            super().receive_primitive(primitive)
        except Exception:  # noqa: BLE001  # whatever a library makes of a peer's random bytes
            self.is_nonsense = True
            self.msg_queue.put((None, None))
