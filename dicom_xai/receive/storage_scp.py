"""Associations in: C-ECHO and C-STORE, checked, guarded, answered only when durable.

The order for each object: whole? (`inspect`) -> durable? (`Door.accept`) -> 0x0000. Nothing else
happens on the association's thread. What stands behind the door is the service's matter: this
module knows neither spool nor ledger.

A peer is checked before anything is agreed with it: the called AE title, then calling AE title,
called AE title and source network together, then the limits. A peer that fails gets A-ASSOCIATE-RJ
with the reason (PS3.8 9.3.4).
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from pydicom import Dataset
from pynetdicom import AE, evt

from dicom_xai import uids
from dicom_xai.config import Listener, ReceiveConfig
from dicom_xai.dimse import (
    MAX_MESSAGE_BYTES,
    MAX_PDU_BYTES,
    Rejection,
    Status,
    acceptor_contexts,
    status_of,
    trace_of,
)
from dicom_xai.errors import DataSetMismatchError, RefusedError, TransientError
from dicom_xai.receive.guards import Gate, GuardedAssociation, GuardedServer, Hooks
from dicom_xai.receive.inspect import file_of, inspect
from dicom_xai.study import Sender

if TYPE_CHECKING:
    from pynetdicom.events import Event

log = logging.getLogger(__name__)


class TransferEnd(StrEnum):
    """How an association ended that stored something."""

    RELEASED = "released"  #: the sender says that this was all
    ABORTED = "aborted"  #: aborted by either side, lost, or cut by our shutdown


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """One object that came in whole, not stored yet.

    Attributes
    ----------
    header : Dataset
        Everything before the pixels.
    file : tuple of bytes
        Preamble with file meta, and the data set as received; in this order they are the file.
    data_set_sha256 : str
        Of the data set alone: the same object from another sender, or received by another version
        of ours, has another file meta and the same data set.
    received_s : float
        Monotonic clock, when the last byte had been read.
    """

    header: Dataset
    file: tuple[bytes, bytes]
    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    study_instance_uid: str
    transfer_syntax_uid: str
    sender: Sender
    data_set_sha256: str
    received_s: float

    @property
    def size_bytes(self) -> int:
        """Of the file."""
        return sum(len(part) for part in self.file)


class Door(Protocol):
    """What the service gives the receiver; called on the association's thread."""

    def opened(self, sender: Sender) -> int:
        """A transfer begins: the first object of an association is about to be stored.

        Gives the transfer's id; raises RefusedError. An association that stores nothing, a C-ECHO
        say, is no transfer.
        """

    def accept(self, arrival: Arrival, transfer: int) -> None:
        """Return when the object is durable; raise RefusedError with the reason when not."""

    def closed(self, transfer: int, how: TransferEnd) -> None:
        """No more objects will come; called once for each transfer, after its last `accept`."""


class StorageSCP:
    """The listeners of a configuration, with all that stands between a peer and the door.

    Started once and stopped once; a new configuration is a new `StorageSCP`.

    Parameters
    ----------
    config : ReceiveConfig
        Listeners that share host and port share the socket and differ in AE title.
    door : Door
        Where objects go.
    refused : callable
        Told of every refusal with a reason of a closed set, for metrics: those of `RefusedError`,
        and ``called-ae``, ``not-allowed``, ``association-limit``, ``source-limit``,
        ``connection-limit``, ``half-open``, ``no-association-request``, ``stalled``,
        ``idle``, ``pdu-too-long``, ``unknown-pdu``, ``malformed-pdu``, ``malformed-message``,
        ``message-too-long``, ``not-durable``, ``failed``.
    max_message_bytes : int
        The longest data set that is taken.
    """

    def __init__(
        self,
        config: ReceiveConfig,
        door: Door,
        refused: Callable[[str, Sender], None],
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self._config = config
        self._door = door
        self._on_refused = refused
        self._max_message_bytes = max_message_bytes
        self._gate = Gate(config.max_associations, config.max_per_source)
        self._allow = [
            (rule.ae_title, rule.called_ae_title, ipaddress.ip_network(rule.network))
            for rule in config.allow
        ]
        self._transfers: dict[GuardedAssociation, tuple[int, Sender]] = {}
        self._servers: list[GuardedServer] = []
        self._threads: list[threading.Thread] = []
        self._server_of: list[GuardedServer] = []  # one for each listener

    @property
    def ports(self) -> tuple[int, ...]:
        """The TCP port of each listener, in the order of the configuration."""
        return tuple(int(server.server_address[1]) for server in self._server_of)

    @property
    def associations(self) -> int:
        """How many associations are open now."""
        return self._gate.count

    def start(self) -> None:
        """Bind and listen; OSError when a port is taken, and then nothing listens."""
        contexts = acceptor_contexts(self._config.accept_and_ignore)
        sockets: dict[tuple[str, int], GuardedServer] = {}
        try:
            for listener in self._config.listeners:
                address = (listener.host, listener.port)
                server = sockets.get(address) if listener.port else None
                if server is None:
                    server = self._listen(listener, contexts)
                    sockets[address] = server
                    self._servers.append(server)
                self._server_of.append(server)
        except OSError:
            for server in self._servers:
                server.server_close()
            self._servers.clear()
            self._server_of.clear()
            raise
        for server in self._servers:
            thread = threading.Thread(
                target=server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def stop(self, grace_s: float) -> None:
        """Accept nobody, let open associations finish, abort them after `grace_s`.

        Returns within `grace_s` and about a second, even if a peer or the door hangs.
        """
        for server in self._servers:
            server.shutdown()
        for thread in self._threads:
            thread.join(timeout=1.0)
        aborted = self._gate.close(grace_s)
        if aborted:
            log.warning("shutdown aborted %d associations", aborted)
        self._servers.clear()
        self._threads.clear()

    def _listen(self, listener: Listener, contexts: list[object]) -> GuardedServer:
        ae = AE(ae_title=listener.ae_title)
        ae.maximum_pdu_size = MAX_PDU_BYTES
        ae.acse_timeout = self._config.acse_timeout_s
        ae.dimse_timeout = self._config.dimse_timeout_s
        ae.network_timeout = self._config.network_timeout_s
        # pynetdicom's own limit counts threads; ours is the gate's
        ae.maximum_associations = 1_000_000
        ae.implementation_class_uid = uids.IMPLEMENTATION_CLASS_UID
        ae.implementation_version_name = uids.IMPLEMENTATION_VERSION_NAME
        return GuardedServer(
            ae,
            (listener.host, listener.port),
            contexts,
            [(evt.EVT_C_STORE, self._store)],
            Hooks(self._admit, self._ended, self._noted),
            self._gate,
            self._max_message_bytes,
        )

    # -------------------------------------------------------------- may this peer come in?

    def _admit(self, association: GuardedAssociation) -> Rejection | None:
        sender = self._sender(association)
        titles = {
            listener.ae_title
            for listener, server in zip(self._config.listeners, self._server_of, strict=True)
            if server is association._server
        }
        if sender.called_ae_title not in titles:
            self._tell("called-ae", sender)
            return Rejection.CALLED_AE_TITLE
        if not self._is_allowed(sender):
            self._tell("not-allowed", sender)
            return Rejection.CALLING_AE_TITLE
        limit = self._gate.admit(association)
        if limit is not None:
            self._tell(limit, sender)
            return Rejection.LOCAL_LIMIT_EXCEEDED
        return None

    def _is_allowed(self, sender: Sender) -> bool:
        address = ipaddress.ip_address(sender.source_address)
        return any(
            calling in ("*", sender.calling_ae_title)
            and called in ("*", sender.called_ae_title)
            and address in network
            for calling, called, network in self._allow
        )

    def _sender(self, association: GuardedAssociation, priority: int = 0) -> Sender:
        host, port = association._server.server_address[:2]
        return Sender(
            calling_ae_title=association.calling_ae_title,
            called_ae_title=association.called_ae_title,
            source_address=_plain(association.source_address),
            priority=priority,
            listener=f"{host}:{port}",
        )

    def _noted(self, reason: str, source_address: str) -> None:
        self._tell(reason, Sender("", "", _plain(source_address)))

    def _tell(self, reason: str, sender: Sender) -> None:
        """Report a refusal; a listener must not end because nobody could count it."""
        try:
            self._on_refused(reason, sender)
        except Exception as error:  # noqa: BLE001 - logged, its message apart
            log.error("a refusal could not be reported: %s", trace_of(error))

    # -------------------------------------------------------------- one object

    def _store(self, event: Event) -> int | Dataset:
        """The answer to one C-STORE request: a status, with a comment where it is a refusal."""
        association: GuardedAssociation = event.assoc
        sender = self._sender(association, event.request.Priority)
        try:
            arrival = self._arrival(event, sender)
            self._door.accept(arrival, self._transfer(association, sender))
        except RefusedError as error:
            self._tell(error.reason, sender)
            log.warning("object refused: %s", error)
            return _refusal(error)
        except (TransientError, OSError) as error:
            # our ledger or disk, not the object: the sender should come back
            self._tell("not-durable", sender)
            log.error("object could not be made durable: %s", trace_of(error))
            return Status.OUT_OF_RESOURCES
        except Exception as error:  # noqa: BLE001 - logged, its message apart
            # our bug must not look like success, nor like the object's fault
            self._tell("failed", sender)
            log.error("object could not be handled: %s", trace_of(error))
            return Status.PROCESSING_FAILURE
        return Status.SUCCESS

    def _arrival(self, event: Event, sender: Sender) -> Arrival:
        received_s = time.monotonic()
        request = event.request
        sop_class_uid = str(request.AffectedSOPClassUID)
        sop_instance_uid = str(request.AffectedSOPInstanceUID)
        syntax = str(event.context.transfer_syntax)
        if sop_class_uid != event.context.abstract_syntax:
            raise DataSetMismatchError(
                f"C-STORE of SOP class {sop_class_uid} in a presentation context that was agreed "
                f"for {event.context.abstract_syntax}"
            )
        data_set = event.encoded_dataset(include_meta=False)
        header = inspect(data_set, syntax, sop_class_uid, sop_instance_uid)
        file = file_of(data_set, syntax, sop_class_uid, sop_instance_uid, sender.calling_ae_title)
        return Arrival(
            header=header,
            file=file,
            sop_class_uid=sop_class_uid,
            sop_instance_uid=sop_instance_uid,
            series_instance_uid=str(header.SeriesInstanceUID),
            study_instance_uid=str(header.StudyInstanceUID),
            transfer_syntax_uid=syntax,
            sender=sender,
            data_set_sha256=hashlib.sha256(data_set).hexdigest(),
            received_s=received_s,
        )

    # -------------------------------------------------------------- transfers

    def _transfer(self, association: GuardedAssociation, sender: Sender) -> int:
        """The transfer of this association, opened with its first object."""
        known = self._transfers.get(association)
        if known is None:
            known = self._transfers[association] = self._door.opened(sender), sender
        return known[0]

    def _ended(self, association: GuardedAssociation, released: bool) -> None:
        known = self._transfers.pop(association, None)
        if known is None:
            return
        try:
            self._door.closed(known[0], TransferEnd.RELEASED if released else TransferEnd.ABORTED)
        except Exception as error:  # noqa: BLE001 - logged, its message apart
            # the last word of an association has nobody to hear of it; the ledger's lease runs out
            log.error("the end of a transfer could not be noted: %s", trace_of(error))


def _plain(address: str) -> str:
    """An IPv4 address that came in by an IPv6 socket is written as IPv4."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None)
    return str(mapped or parsed)


def _refusal(error: RefusedError) -> Dataset:
    """Status and Error Comment of a refusal (PS3.7 9.1.1.1.9 and C.5; LO, 64 characters)."""
    answer = Dataset()
    answer.Status = int(status_of(error))
    text = str(error).encode("ascii", "replace").decode().replace("\\", "/")
    answer.ErrorComment = text[:64].rstrip()
    return answer
