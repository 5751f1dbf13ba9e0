"""Associations in: C-ECHO, C-STORE, storage commitment; guarded, answered only when durable.

The order for each object: room? (`Door.draft`) -> its parts into the draft as they come, never held
whole -> whole? (`inspect`) -> durable? (`Door.accept`) -> 0x0000 -> who has to know is told.
Nothing else happens on the association's thread. What stands behind the door is the service's
matter: of the spool this module knows the draft that it is handed, of the ledger nothing.

A peer is checked before anything is agreed with it: its certificate where the listener speaks TLS,
the called AE title, whether the certificate may use the calling AE title, then calling AE title,
called AE title and source network together, then the limits. A peer that fails gets A-ASSOCIATE-RJ
with the reason (PS3.8 9.3.4).
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from pydicom.uid import DeflatedExplicitVRLittleEndian

from dicom_xai import uids
from dicom_xai.commitment import (
    ACTION_TYPE,
    PUSH_MODEL,
    PUSH_MODEL_INSTANCE,
    CommitmentReport,
    CommitmentRequest,
    EventType,
    read_report,
    read_request,
    written,
)
from dicom_xai.config import ReceiveConfig
from dicom_xai.deflate import inflated
from dicom_xai.dimse import (
    MAX_MESSAGE_BYTES,
    Rejection,
    Status,
    acceptor_contexts,
    status_of,
    trace_of,
)
from dicom_xai.errors import (
    CannotUnderstandError,
    ConfigError,
    DataSetMismatchError,
    RefusedError,
    TransientError,
)
from dicom_xai.receive.association import Answer, Association, Hooks, Reporting, Terms
from dicom_xai.receive.command import Command, Field
from dicom_xai.receive.guards import Gate, Server
from dicom_xai.receive.inspect import (
    SERIES_INSTANCE_UID,
    STUDY_INSTANCE_UID,
    Header,
    file_meta,
    inspect,
)
from dicom_xai.receive.negotiation import Context
from dicom_xai.receive.upper_layer import Ended
from dicom_xai.spool import Draft
from dicom_xai.study import Sender
from dicom_xai.tls import Credentials, Rotation

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
    header : Header
        Everything before the pixels.
    draft : Draft
        The file: preamble with file meta, then the data set as received. Not durable yet.
    data_set_sha256 : str
        Of the data set alone: the same object from another sender, or received by another version
        of ours, has another file meta and the same data set.
    received_s : float
        Monotonic clock, when the last byte had been read.
    """

    header: Header
    draft: Draft
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
        return self.draft.size_bytes


class Door(Protocol):
    """What the service gives the receiver; called on the association's thread."""

    def draft(self) -> AbstractContextManager[Draft]:
        """Where an object may be written that is about to be read; RefusedError without room."""

    def opened(self, sender: Sender) -> int:
        """A transfer begins: the first object of an association is about to be stored.

        Gives the transfer's id; raises RefusedError. An association that stores nothing, a C-ECHO
        say, is no transfer.
        """

    def accept(self, arrival: Arrival, transfer: int) -> Callable[[], None]:
        """Keep the draft and return when the object is durable; raise RefusedError when not.

        Gives what is to be called once the peer has its answer.
        """

    def closed(self, transfer: int, how: TransferEnd) -> None:
        """No more objects will come; called once for each transfer, after its last `accept`."""

    def promise(self, request: CommitmentRequest, sender: Sender) -> int:
        """Storage commitment was asked of us: return when that is durable, with its number."""

    def report(self, number: int) -> CommitmentReport | None:
        """What to report about a request now, on its own association; None where somebody did."""

    def reported(self, number: int, is_taken: bool) -> None:
        """A report of `report` was answered, or cannot be any more."""

    def unreported(self, numbers: list[int]) -> None:
        """The association of these requests is over, and nothing was reported on it."""

    def take_report(self, report: CommitmentReport, sender: Sender) -> bool:
        """A peer reports about a request of ours; False where it was none, else durable."""


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
        Told of every refusal: a reason of a closed set, the peer as far as it is known, and what
        stands behind the reason, for a log. Reasons are those of `RefusedError`, and
        ``called-ae``, ``not-allowed``, ``association-limit``, ``source-limit``,
        ``connection-limit``, ``half-open``, ``no-association-request``, ``stalled``, ``idle``,
        ``pdu-too-long``, ``unknown-pdu``, ``malformed-pdu``, ``malformed-message``,
        ``message-too-long``, ``not-durable``, ``failed``, ``tls``, ``certificate``.
    max_message_bytes : int
        The longest data set that is taken.
    rotated : callable
        Told when the files of a listener's `tls` changed on disk.

    Raises
    ------
    ConfigError
        The files of a listener's `tls` cannot be used.
    """

    def __init__(
        self,
        config: ReceiveConfig,
        door: Door,
        refused: Callable[[str, Sender, str], None],
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        rotated: Callable[[Rotation], None] | None = None,
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
        #: One for each listener; None where it speaks plain.
        self.credentials = [
            None if each.tls is None else Credentials(each.ae_title, each.tls, rotated)
            for each in config.listeners
        ]
        self._transfers: dict[Association, tuple[int, Sender]] = {}
        self._owed: dict[Association, list[_Owed]] = {}
        self._reporting: dict[Association, int] = {}
        self._servers: list[Server] = []
        self._server_of: list[Server] = []  # one for each listener

    @property
    def ports(self) -> tuple[int, ...]:
        """The TCP port of each listener, in the order of the configuration."""
        return tuple(server.address[1] for server in self._server_of)

    @property
    def associations(self) -> int:
        """How many associations are open now."""
        return self._gate.count

    def start(self) -> None:
        """Bind and listen; ConfigError when a port is taken, and then nothing listens."""
        config = self._config
        terms = Terms(
            contexts=acceptor_contexts(config.accept_and_ignore),
            acse_timeout_s=config.acse_timeout_s,
            dimse_timeout_s=config.dimse_timeout_s,
            network_timeout_s=config.network_timeout_s,
            max_message_bytes=self._max_message_bytes,
        )
        hooks = Hooks(
            admit=self._admit,
            store=self._store,
            ended=self._ended,
            commit=self._commit,
            owes=self._owed.__contains__,
            report=self._report,
            reported=self._reported,
            noted=self._noted,
        )
        sockets: dict[tuple[str, int], Server] = {}
        try:
            for listener, credentials in zip(config.listeners, self.credentials, strict=True):
                address = (listener.host, listener.port)
                server = sockets.get(address) if listener.port else None
                if server is None:
                    server = Server(*address, terms, hooks, self._gate, credentials)
                    sockets[address] = server
                    self._servers.append(server)
                self._server_of.append(server)
        except ConfigError:
            self._close_servers()
            self._server_of.clear()
            raise
        for server in self._servers:
            server.start()

    def stop(self, grace_s: float) -> None:
        """Accept nobody, let open associations finish, abort them after `grace_s`.

        Returns within `grace_s` and about a second, even if a peer or the door hangs.
        """
        self._close_servers()
        aborted = self._gate.close(grace_s)
        if aborted:
            log.warning("shutdown aborted %d associations", aborted)

    def _close_servers(self) -> None:
        for server in self._servers:
            server.close()
        self._servers.clear()

    def _admit(self, association: Association) -> Rejection | None:
        sender = self._sender(association)
        listeners = {
            listener.ae_title: listener
            for listener, server in zip(self._config.listeners, self._server_of, strict=True)
            if server.address == association.address
        }
        called = listeners.get(sender.called_ae_title)
        if called is None:
            self._tell("called-ae", sender)
            return Rejection.CALLED_AE_TITLE
        names = association.certificate_names
        if called.tls is not None and not called.tls.allows(names, sender.calling_ae_title):
            self._tell("certificate", sender)
            return Rejection.CALLING_AE_TITLE
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

    def _sender(self, association: Association, priority: int = 0) -> Sender:
        host, port = association.address
        return Sender(
            calling_ae_title=association.calling_ae_title,
            called_ae_title=association.called_ae_title,
            source_address=_plain(association.source_address),
            priority=priority,
            listener=f"{host}:{port}",
        )

    def _noted(self, reason: str, source_address: str, detail: str) -> None:
        self._tell(reason, Sender("", "", _plain(source_address)), detail)

    def _tell(self, reason: str, sender: Sender, detail: str = "") -> None:
        """Report a refusal; a listener must not end because nobody could count it."""
        try:
            self._on_refused(reason, sender, detail)
        except Exception as error:  # noqa: BLE001 - logged, its message apart
            log.error("a refusal could not be reported: %s", trace_of(error))

    def _store(
        self,
        association: Association,
        request: Command,
        context: Context,
        parts: Iterator[memoryview],
    ) -> Answer:
        """The answer to one C-STORE request; where it is a refusal, with the reason."""
        sender = self._sender(association, request.priority)
        try:
            self._check(request, context)
            with self._door.draft() as draft:
                arrival = self._receive(request, context, parts, sender, draft)
                then = self._door.accept(arrival, self._transfer(association, sender))
        except Ended:
            raise
        except RefusedError as error:
            self._tell(error.reason, sender, str(error))
            return Answer(status_of(error), str(error))
        except (TransientError, OSError) as error:
            # our ledger or disk, not the object: the sender should come back
            self._tell("not-durable", sender, trace_of(error))
            return Answer(Status.OUT_OF_RESOURCES)
        except Exception as error:  # noqa: BLE001 - noted, its message apart
            # our bug must not look like success, nor like the object's fault
            self._tell("failed", sender, trace_of(error))
            return Answer(Status.PROCESSING_FAILURE)
        return Answer(Status.SUCCESS, then=then)

    def _check(self, request: Command, context: Context) -> None:
        """Refuse what no data set could mend."""
        if request.sop_class_uid != context.abstract_syntax:
            raise DataSetMismatchError(
                f"C-STORE of SOP class {request.sop_class_uid[:64]} in a presentation context that "
                f"was agreed for {context.abstract_syntax}"
            )
        if not uids.is_valid(request.sop_instance_uid):
            raise CannotUnderstandError(
                "the command set's Affected SOPInstanceUID is no valid UID of PS3.5 9.1"
            )

    def _receive(
        self,
        request: Command,
        context: Context,
        parts: Iterator[memoryview],
        sender: Sender,
        draft: Draft,
    ) -> Arrival:
        """Write the object into its draft as it comes, and see whether it is whole."""
        names = (context.transfer_syntax, request.sop_class_uid, request.sop_instance_uid)
        draft.write(file_meta(*names, sender.calling_ae_title))
        start = draft.size_bytes
        digest = hashlib.sha256()
        for part in parts:
            draft.write(part)
            digest.update(part)
        draft.settle()
        received_s = time.monotonic()
        with self._plain(context.transfer_syntax, draft, start) as data_set:
            header = inspect(data_set, *names)
        return Arrival(
            header=header,
            draft=draft,
            sop_class_uid=request.sop_class_uid,
            sop_instance_uid=request.sop_instance_uid,
            series_instance_uid=header.text(SERIES_INSTANCE_UID),
            study_instance_uid=header.text(STUDY_INSTANCE_UID),
            transfer_syntax_uid=context.transfer_syntax,
            sender=sender,
            data_set_sha256=digest.hexdigest(),
            received_s=received_s,
        )

    @contextmanager
    def _plain(self, transfer_syntax: str, draft: Draft, start: int) -> Iterator[memoryview]:
        """The data set as it can be walked; inflated onto the disk, for memory is everybody's."""
        with draft.mapped(start) as data_set:
            if transfer_syntax != DeflatedExplicitVRLittleEndian:
                yield data_set
                return
            with self._door.draft() as plain:
                try:
                    for part in inflated(data_set):
                        plain.write(part)
                except zlib.error as error:
                    raise CannotUnderstandError(
                        f"the deflated data set cannot be read: {error}"
                    ) from error
                if not plain.size_bytes:
                    raise CannotUnderstandError("the deflated data set is empty")
                with plain.mapped(0) as walked:
                    yield walked

    def _commit(
        self,
        association: Association,
        command: Command,
        context: Context,
        context_id: int,
        data_set: bytes,
    ) -> Answer:
        """The answer to an N-ACTION, or to an N-EVENT-REPORT (PS3.4 J.3.2 and J.3.3)."""
        problem = _not_served(command, context)
        if problem is not None:
            return problem
        sender = self._sender(association)
        try:
            if command.field is Field.N_ACTION_RQ:
                request = read_request(data_set, context.transfer_syntax)
                number = self._door.promise(request, sender)
                owed = _Owed(number, context_id, context.transfer_syntax)
                self._owed.setdefault(association, []).append(owed)
                return Answer(Status.SUCCESS)
            report = read_report(data_set, context.transfer_syntax)
            if self._door.take_report(report, sender):
                return Answer(Status.SUCCESS)
            return Answer(Status.INVALID_ARGUMENT_VALUE, "no such transaction")
        except CannotUnderstandError as error:
            self._tell(error.reason, sender, str(error))
            return Answer(Status.INVALID_ARGUMENT_VALUE, str(error))
        except (TransientError, OSError) as error:
            self._tell("not-durable", sender, trace_of(error))
            return Answer(Status.RESOURCE_LIMITATION)
        except Exception as error:  # noqa: BLE001 - noted, its message apart
            self._tell("failed", sender, trace_of(error))
            return Answer(Status.PROCESSING_FAILURE)

    def _report(self, association: Association) -> Reporting | None:
        """The next report that the association waits for."""
        owed = self._next_owed(association)
        try:
            report = self._door.report(owed.number)
        except TransientError as error:
            log.error("a report waits for the sender: %s", trace_of(error))
            return None
        if report is None:
            return None
        # a message id has 16 bits; one report at a time is under way
        data_set = written(report, owed.transfer_syntax)
        self._reporting[association] = owed.number
        return Reporting(owed.number % 0xFFFF + 1, owed.context_id, report.event_type, data_set)

    def _reported(self, association: Association, is_taken: bool) -> None:
        try:
            self._door.reported(self._reporting.pop(association), is_taken)
        except TransientError as error:
            # its claim runs out, and the peer hears it twice
            log.error("a report's answer could not be noted: %s", trace_of(error))

    def _next_owed(self, association: Association) -> _Owed:
        waiting = self._owed[association]
        owed = waiting.pop(0)
        if not waiting:
            del self._owed[association]
        return owed

    def _transfer(self, association: Association, sender: Sender) -> int:
        """The transfer of this association, opened with its first object."""
        known = self._transfers.get(association)
        if known is None:
            known = self._transfers[association] = self._door.opened(sender), sender
        return known[0]

    def _ended(self, association: Association, released: bool) -> None:
        known = self._transfers.pop(association, None)
        unreported = [each.number for each in self._owed.pop(association, [])]
        unanswered = self._reporting.pop(association, None)
        try:
            if known is not None:
                how = TransferEnd.RELEASED if released else TransferEnd.ABORTED
                self._door.closed(known[0], how)
            if unanswered is not None:
                self._door.reported(unanswered, False)
            if unreported:
                self._door.unreported(unreported)
        except Exception as error:  # noqa: BLE001 - logged, its message apart
            # the last word of an association has nobody to hear of it; the ledger's lease runs out
            log.error("the end of a transfer could not be noted: %s", trace_of(error))


@dataclass(frozen=True, slots=True)
class _Owed:
    """A report that a peer waits for on its association."""

    number: int
    context_id: int
    transfer_syntax: str


def _not_served(command: Command, context: Context) -> Answer | None:
    """Why a request of the storage commitment service is refused by its command set alone."""
    if not command.sop_class_uid == context.abstract_syntax == PUSH_MODEL:
        return Answer(Status.SOP_CLASS_NOT_SUPPORTED)
    if command.sop_instance_uid != PUSH_MODEL_INSTANCE:
        return Answer(Status.NO_SUCH_SOP_INSTANCE)
    if command.field is Field.N_ACTION_RQ and command.type_id != ACTION_TYPE:
        return Answer(Status.NO_SUCH_ACTION)
    if command.field is Field.N_EVENT_REPORT_RQ and command.type_id not in list(EventType):
        return Answer(Status.NO_SUCH_EVENT_TYPE)
    return None


def _plain(address: str) -> str:
    """An IPv4 address that came in by an IPv6 socket is written as IPv4."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None)
    return str(mapped or parsed)
