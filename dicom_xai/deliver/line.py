"""Our side of one peer: an association that we ask for when it is needed, and how it ends.

Rule: one thread at a time; only `hang_up` is for another one.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from dicom_xai.deliver.requestor import Connection, Timeouts, associate, drop, why_not
from dicom_xai.errors import DestinationUnavailableError, NotReachedError
from dicom_xai.tls import Credentials, Rotation

if TYPE_CHECKING:
    from pynetdicom.association import Association
    from pynetdicom.events import EventHandlerType
    from pynetdicom.pdu_primitives import SCP_SCU_RoleSelectionNegotiation
    from pynetdicom.presentation import PresentationContext

    from dicom_xai.config import Destination


class Line:
    """At most one association with a peer.

    Parameters
    ----------
    name : str
        The peer's name, for errors and for who is told of its certificates.
    destination : Destination
        Where it is.
    timeouts : Timeouts, optional
    rotated : callable, optional
        Told when the files of the destination's `tls` changed on disk.

    Attributes
    ----------
    credentials : Credentials or None
        Of the destination's `tls`.

    Raises
    ------
    ConfigError
        The files of the destination's `tls` cannot be used.
    """

    #: What the peer is to us, the first words of an error about it.
    kind = "destination"

    def __init__(
        self,
        name: str,
        destination: Destination,
        timeouts: Timeouts | None = None,
        rotated: Callable[[Rotation], None] | None = None,
    ) -> None:
        self.name = name
        self._destination = destination
        self._timeouts = timeouts or Timeouts()
        files = destination.tls
        self.credentials = None if files is None else Credentials(name, files, rotated)
        self._association: Association | None = None
        self._socket: socket.socket | None = None
        self._wire: Connection | None = None  #: of the newest association, from before it stands
        self._is_hung_up = False

    @property
    def is_open(self) -> bool:
        """Whether an association stands, as far as one can know without asking."""
        return self._association is not None and bool(self._association.is_established)

    def close(self) -> None:
        """Release, or hang up where the peer does not answer; no-op when closed."""
        if self.is_open:
            assert self._association is not None
            self._association.release()
        self._drop()

    def hang_up(self) -> None:
        """Cut the connection under another thread, whose wait then ends; for good."""
        self._is_hung_up = True
        wire = self._wire
        if wire is not None and wire.socket is not None:
            with suppress(OSError):  # closed meanwhile
                wire.socket.shutdown(socket.SHUT_RDWR)

    def _associate(
        self,
        contexts: Sequence[PresentationContext],
        roles: Sequence[SCP_SCU_RoleSelectionNegotiation] = (),
        handlers: Sequence[EventHandlerType] = (),
        purpose: str = "",
    ) -> Association:
        """A new association, established.

        Parameters
        ----------
        contexts : sequence of PresentationContext
        roles : sequence of role selection items
            Where we are to be an SCP.
        handlers : sequence of event handlers
            For what the peer asks of us.
        purpose : str
            Added to the reason why there is none.

        Raises
        ------
        NotReachedError
            No connection, no answer, or a rejection.
        """
        self._drop()
        if self._is_hung_up:
            raise NotReachedError(self._say("was hung up on: the sender stops"))
        try:
            association = associate(
                self._destination,
                self._timeouts,
                contexts,
                self.credentials,
                self._note_wire,
                roles,
                handlers,
            )
        except OSError as error:  # the host's name has no address
            raise NotReachedError(self._say("has no address that can be found")) from error
        self._association = association
        self._socket = association.dul.socket.socket
        if not association.is_established:
            reason = why_not(association, self._timeouts, has_tls=self.credentials is not None)
            self._drop()
            raise NotReachedError(self._say(reason + purpose))
        return association

    def _note_wire(self, wire: Connection) -> None:
        self._wire = wire

    def _drop(self) -> None:
        association, sock = self._association, self._socket
        self._association = self._socket = None
        if association is not None:
            drop(association, sock)

    def _unavailable(self, what: str) -> DestinationUnavailableError:
        return DestinationUnavailableError(self._say(what))

    def _say(self, what: str) -> str:
        place = self._destination
        return f"{self.kind} {self.name!r} ({place.ae_title} at {place.host}:{place.port}) {what}"
