"""One association from accept to close, on one thread: negotiate, serve, end.

The states of PS3.8 9.2 are the lines of `_converse`: what may come next is what is read next, and
anything else ends the association with A-ABORT. A message is served before more is read, so that
requests sent ahead wait in TCP's window (PS3.7 D.3.3.3: one operation at a time).
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dicom_xai.commitment import MAX_DATA_SET_BYTES, PUSH_MODEL, PUSH_MODEL_INSTANCE
from dicom_xai.dimse import Rejection, Status, trace_of
from dicom_xai.receive import negotiation
from dicom_xai.receive.command import (
    MAX_COMMAND_BYTES,
    Command,
    Field,
    event_report,
    in_pdus,
    read_command,
    response,
)
from dicom_xai.receive.negotiation import Context
from dicom_xai.receive.upper_layer import (
    ABORT,
    PDU,
    RELEASE_RP,
    Breach,
    Ended,
    Fragment,
    PeerGone,
    Wire,
)

if TYPE_CHECKING:
    from pynetdicom.presentation import PresentationContext

#: A data set is handed on in parts of this size.
PART_BYTES = 262_144
#: A message that comes more slowly than this, on the whole, is given up. A line of 64 kbit/s, the
#: slowest that images are sent over, is eight times as fast.
SLOWEST_BYTES_PER_S = 1_000
#: A peer that asked for commitment and is silent for so long waits for the report right here.
REPORT_AFTER_S = 0.5


@dataclass(frozen=True, slots=True)
class Reporting:
    """A report that is owed to the peer, in the syntax of the context in which it asked."""

    message_id: int
    context_id: int
    event_type: int
    data_set: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request is answered: a status, and why where it is no success.

    Attributes
    ----------
    then : callable, optional
        Called once the answer is sent, or cannot be.
    """

    status: Status
    comment: str = ""
    then: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the owner of a server decides and wants to know; called on the connection's thread."""

    #: May this peer associate? Called once, before anything is agreed.
    admit: Callable[[Association], Rejection | None]
    #: One C-STORE request. The parts of its data set are good until the next one is asked for, and
    #: need not all be taken; `Ended`, which taking one may raise, is to be passed on.
    store: Callable[[Association, Command, Context, Iterator[memoryview]], Answer]
    #: Called once for each admitted association; True after a normal release.
    ended: Callable[[Association, bool], None]
    #: One request of the storage commitment service, with its data set and its context's number.
    commit: Callable[[Association, Command, Context, int, bytes], Answer]
    #: Does the peer wait for a report?
    owes: Callable[[Association], bool]
    #: The report to send now, if it is still ours to send.
    report: Callable[[Association], Reporting | None]
    #: The peer answered the report; True when it took it.
    reported: Callable[[Association, bool], None]
    #: Something was turned away: a reason of a closed set, the peer's address, and what stands
    #: behind the reason.
    noted: Callable[[str, str, str], None]


@dataclass(frozen=True, slots=True)
class Terms:
    """What a server offers and demands; the same for all its associations.

    Attributes
    ----------
    contexts : list of PresentationContext
        Shared by all: nobody writes to it.
    acse_timeout_s : float
        The whole A-ASSOCIATE-RQ must be here by then.
    dimse_timeout_s : float
        A message's next PDU must begin, and each PDU be whole, within it; and the whole message
        within it and the time that its bytes take at `SLOWEST_BYTES_PER_S`.
    network_timeout_s : float
        An association without a request for so long is aborted.
    max_message_bytes : int
        The longest data set that is taken.
    """

    contexts: list[PresentationContext]
    acse_timeout_s: float
    dimse_timeout_s: float
    network_timeout_s: float
    max_message_bytes: int


class Association(threading.Thread):
    """A connection of a peer, and the association that it may become.

    Parameters
    ----------
    connection : socket
        Just accepted; owned from here on.
    source_address : str
    address : tuple of str and int
        Of the listener.
    terms : Terms
    hooks : Hooks
    left : callable
        Told as the last thing, when nothing is held any more.
    tls : SSLContext, optional
        Of a listener that speaks TLS; the handshake is made on the connection's own thread.
    """

    def __init__(
        self,
        connection: socket.socket,
        source_address: str,
        address: tuple[str, int],
        terms: Terms,
        hooks: Hooks,
        left: Callable[[Association], None],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(name=f"association-{source_address}", daemon=True)
        self.source_address = source_address
        self.address = address
        self.opened_s = time.monotonic()
        self.is_admitted = False
        self.calling_ae_title = ""
        self.called_ae_title = ""
        self._terms = terms
        self._hooks = hooks
        self._left = left
        #: What the peer's certificate names; nothing without TLS or without a certificate.
        self.certificate_names: tuple[str, ...] = ()
        self._wire = Wire(connection, terms.dimse_timeout_s, tls)
        self._contexts: Mapping[int, Context] = {}
        self._max_pdu_bytes = 0
        self._has_ended = False
        self._reporting: Reporting | None = None  #: sent, not answered yet
        self._part = memoryview(b"")

    @property
    def is_half_open(self) -> bool:
        """Connected and not admitted yet."""
        return not self.is_admitted and not self._has_ended

    @property
    def is_ending(self) -> bool:
        """Told to end; its thread may still be at it."""
        return self._wire.is_ending

    def note(self, reason: str, detail: str = "") -> None:
        """Tell the owner why this connection is turned away."""
        self._hooks.noted(reason, self.source_address, detail)

    def hang_up(self) -> None:
        """End at once."""
        self._wire.hang_up()

    def abort_soon(self) -> None:
        """Ask the connection's own thread to send A-ABORT and end."""
        self._wire.end_soon()

    def run(self) -> None:
        """Converse, and in any case close and say so."""
        try:
            self._converse()
        except Ended as end:
            self._part_ways(end, self._wire.tls_problem if end.reason == "tls" else "")
        except Exception as error:  # noqa: BLE001 - noted, its message apart
            # our bug, or hostile bytes that got past every check: this association ends, no other
            self._part_ways(Breach("failed"), trace_of(error))
        finally:
            try:
                self._end(released=False)
            finally:
                self._wire.close()
                self._left(self)

    def discard(self) -> None:
        """Give the connection back where no thread could be started for it."""
        self._wire.close()

    def _converse(self) -> None:
        if not self._negotiate():
            return
        while True:
            owes = self._reporting is None and self._hooks.owes(self)
            patience_s = self._terms.network_timeout_s
            if owes:
                patience_s = min(patience_s, REPORT_AFTER_S)
            try:
                kind, length = self._wire.next_pdu(time.monotonic() + patience_s)
            except TimeoutError:
                if not owes:
                    raise Breach("idle") from None
                self._report()
                continue
            if kind is PDU.P_DATA_TF:
                while self._wire.has_fragment:
                    self._serve()
            elif kind is PDU.RELEASE_RQ:
                self._wire.read(length)
                self._wire.send(RELEASE_RP)
                self._end(released=True)
                self._wire.linger()
                return
            elif kind is PDU.ABORT:
                return
            else:
                raise Breach("malformed-pdu")

    def _negotiate(self) -> bool:
        """Agree on an association; False where the peer was rejected."""
        deadline_s = self.opened_s + self._terms.acse_timeout_s
        self.certificate_names = self._wire.shake_hands(deadline_s)
        try:
            kind, length = self._wire.next_pdu(deadline_s, deadline_s)
            if kind is not PDU.ASSOCIATE_RQ:
                raise Breach("malformed-pdu")
            header = bytes((kind, 0)) + length.to_bytes(4, "big")
            pdu = header + self._wire.read(length)
        except (TimeoutError, PeerGone):
            raise PeerGone("" if self.is_ending else "no-association-request") from None
        # the rest of a request takes a thousand times as long to read: not for everybody
        caller = negotiation.read_caller(pdu)
        self.calling_ae_title = caller.calling_ae_title
        self.called_ae_title = caller.called_ae_title
        rejection = (
            self._hooks.admit(self)
            if caller.protocol_version & 1
            else Rejection.PROTOCOL_VERSION  # PS3.8 Table 9-11: bit 0, and no other is tested
        )
        if rejection is not None:
            self._wire.send(negotiation.reject(rejection))
            self._wire.linger()
            return False
        request = negotiation.read_request(pdu)
        answer, self._contexts = negotiation.accept(request, self._terms.contexts)
        self._max_pdu_bytes = request.max_pdu_bytes
        self._wire.send(answer)
        return True

    def _part_ways(self, end: Ended, detail: str) -> None:
        """Say A-ABORT where somebody may still hear it."""
        if end.reason:
            self.note(end.reason, detail)
        if isinstance(end, Breach) or self.is_ending or end.reason == "stalled":
            try:
                self._wire.send(ABORT)
            except PeerGone:
                return

    def _end(self, *, released: bool) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        if self.is_admitted:
            self.is_admitted = False
            self._hooks.ended(self, released)

    def _serve(self) -> None:
        """Read one request, do what it asks for, answer it."""
        fragment = self._wire.next_fragment()
        command = read_command(self._command_set(fragment))
        context = self._contexts.get(fragment.context_id)
        if command.field is Field.N_EVENT_REPORT_RSP:
            self._take_response(command, fragment.context_id)
            return
        wants_data_set = command.field is Field.C_STORE_RQ or command.field.is_commitment
        if context is None or command.has_data_set != wants_data_set:
            raise Breach("malformed-message")
        if command.field is Field.C_STORE_RQ:
            answer = self._store(command, context, fragment.context_id)
        elif command.field.is_commitment:
            data_set = self._small_data_set(fragment.context_id)
            answer = self._hooks.commit(self, command, context, fragment.context_id, data_set)
        elif command.field is Field.C_ECHO_RQ:
            answer = Answer(Status.SUCCESS)
        else:
            return
        command_set = response(command, answer.status, answer.comment)
        try:
            self._wire.send(in_pdus(command_set, fragment.context_id, self._max_pdu_bytes))
        finally:
            if answer.then is not None:
                answer.then()

    def _command_set(self, fragment: Fragment) -> bytes:
        context_id, parts, size = fragment.context_id, [], 0
        begun_s = time.monotonic()
        while True:
            size += fragment.length
            if not fragment.is_command or fragment.context_id != context_id:
                raise Breach("malformed-message")
            if size > MAX_COMMAND_BYTES:
                raise Breach("message-too-long")
            parts.append(self._wire.read(fragment.length))
            if fragment.is_last:
                return b"".join(parts)
            self._check_pace(begun_s, size)
            fragment = self._wire.next_fragment()

    def _store(self, command: Command, context: Context, context_id: int) -> Answer:
        parts = self._data_set(context_id)
        answer = self._hooks.store(self, command, context, parts)
        for _ in parts:
            pass  # refused early: the peer sends the rest before it listens to an answer
        return answer

    def _report(self) -> None:
        """Send the peer a report that it waits for on its own association (PS3.4 J.3.3)."""
        made = self._hooks.report(self)
        if made is None:
            return
        self._reporting = made
        command_set = event_report(
            made.message_id, PUSH_MODEL, PUSH_MODEL_INSTANCE, made.event_type
        )
        out = in_pdus(command_set, made.context_id, self._max_pdu_bytes)
        out += in_pdus(made.data_set, made.context_id, self._max_pdu_bytes, is_command=False)
        self._wire.send(out)

    def _take_response(self, command: Command, context_id: int) -> None:
        made, self._reporting = self._reporting, None
        if made is None or command.message_id != made.message_id:
            raise Breach("malformed-message")
        if command.has_data_set:
            self._small_data_set(context_id)
        self._hooks.reported(self, command.status == Status.SUCCESS)

    def _small_data_set(self, context_id: int) -> bytes:
        """The data set of a message that is no object."""
        content = bytearray()
        for part in self._data_set(context_id):
            content += part
            if len(content) > MAX_DATA_SET_BYTES:
                raise Breach("message-too-long")
        return bytes(content)

    def _data_set(self, context_id: int) -> Iterator[memoryview]:
        """The data set of the message that is being read, in parts that share their memory."""
        if not self._part:
            self._part = memoryview(bytearray(PART_BYTES))
        part, filled, size = self._part, 0, 0
        begun_s = time.monotonic()
        is_last = False
        while not is_last:
            self._check_pace(begun_s, size)
            _, is_command, is_last, left = fragment = self._wire.next_fragment()
            if is_command or fragment.context_id != context_id:
                raise Breach("malformed-message")
            size += left
            if size > self._terms.max_message_bytes:
                raise Breach("message-too-long")
            while left:
                if left > PART_BYTES - filled and filled:
                    yield part[:filled]  # a fragment of the usual size is not cut in two
                    filled = 0
                take = min(left, PART_BYTES)
                self._wire.read_into(part[filled : filled + take])
                filled += take
                left -= take
        if filled:
            yield part[:filled]

    def _check_pace(self, begun_s: float, size_bytes: int) -> None:
        """Give up a message that comes a byte at a time."""
        allowed_s = self._terms.dimse_timeout_s + size_bytes / SLOWEST_BYTES_PER_S
        if time.monotonic() - begun_s > allowed_s:
            raise PeerGone("stalled")
