"""One connection's PDUs (PS3.8 9.3): read with deadlines and bounds, written whole.

Everything but `hang_up` and `end_soon` belongs to the connection's own thread. It sleeps in the
kernel until the peer sends or a deadline passes; nothing here polls.

What has come is read in large pieces, headers and data of several PDUs together: each call into the
kernel hands the interpreter to another connection's thread, and it has to be waited for again. A
data set goes from there into the caller's memory; no PDU is ever an object.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import time
from contextlib import suppress
from enum import IntEnum
from typing import NamedTuple

from dicom_xai.dimse import MAX_PDU_BYTES, acknowledge_now, make_eager
from dicom_xai.tls import TLSSocket, names_in

#: As much as is read at once; what a peer sends beyond it waits in TCP's window.
AHEAD_BYTES = 262_144
#: After the last PDU the peer closes the connection; we do so after this long, seconds.
LINGER_S = 0.5

_PDU_HEADER = struct.Struct(">BxL").unpack
_FRAGMENT_HEADER = struct.Struct(">LBB").unpack
_FRAGMENT_HEADER_BYTES = 6
_IS_COMMAND, _IS_LAST = 0x01, 0x02  # message control header, PS3.8 E.2


class PDU(IntEnum):
    """Kinds of PDU (PS3.8 9.3.1)."""

    ASSOCIATE_RQ = 0x01
    ASSOCIATE_AC = 0x02
    ASSOCIATE_RJ = 0x03
    P_DATA_TF = 0x04
    RELEASE_RQ = 0x05
    RELEASE_RP = 0x06
    ABORT = 0x07


# PS3.8 9.3: an A-ASSOCIATE of 128 contexts with 45 syntaxes each takes 200 kB; the rest is fixed
_LONGEST = dict.fromkeys(PDU, 1_024) | {
    PDU.ASSOCIATE_RQ: 262_144,
    PDU.ASSOCIATE_AC: 262_144,
    PDU.P_DATA_TF: MAX_PDU_BYTES + 1_024,
}

RELEASE_RP = bytes((PDU.RELEASE_RP, 0, 0, 0, 0, 4, 0, 0, 0, 0))  # PS3.8 Table 9-25
ABORT = bytes((PDU.ABORT, 0, 0, 0, 0, 4, 0, 0, 2, 0))  # PS3.8 Table 9-26: by the service provider


class Ended(Exception):
    """The conversation is over, and nothing that it was about can be finished.

    Parameters
    ----------
    reason : str
        Of the closed set that `storage_scp.StorageSCP` lists; empty where nothing is to be noted.
    """

    def __init__(self, reason: str = "") -> None:
        self.reason = reason
        super().__init__(reason)


class PeerGone(Ended):
    """The peer closed, vanished, or did not finish in time what it began."""


class Breach(Ended):
    """The peer sent what cannot be served; it is told by A-ABORT, and nothing more is read."""


class Fragment(NamedTuple):
    """One presentation data value (PS3.8 9.3.5.1), before its `length` bytes are read."""

    context_id: int
    is_command: bool
    is_last: bool
    length: int


class Wire:
    """A connection to one peer.

    Parameters
    ----------
    connection : socket
        Owned from here on.
    stall_s : float
        A PDU that began must be whole after so long; a peer that stops reading gets as long.
    tls : SSLContext, optional
        TLS is spoken with it, from `shake_hands` on.
    """

    def __init__(
        self, connection: socket.socket, stall_s: float, tls: ssl.SSLContext | None = None
    ) -> None:
        make_eager(connection)
        self._socket = connection
        if tls is not None:
            self._socket = tls.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        self._stall_s = stall_s
        self._header = memoryview(bytearray(6))
        self._ahead = memoryview(bytearray(AHEAD_BYTES))  # read and not asked for yet
        self._first = self._end = 0  # of the bytes in it
        self._finish_by_s = 0.0
        self._left = 0  # of the P-DATA-TF that is being read
        self.is_ending = False

    def shake_hands(self, until_s: float) -> tuple[str, ...]:
        """Begin TLS, where the connection speaks it; gives the names in the peer's certificate.

        Raises
        ------
        PeerGone
            The peer is silent, speaks no TLS, or shows no certificate that is taken.
        """
        if not isinstance(self._socket, TLSSocket):
            return ()
        try:
            self._socket.settimeout(max(0.001, until_s - time.monotonic()))
            self._socket.do_handshake()
        except TimeoutError:
            raise PeerGone("no-association-request") from None
        except OSError:
            raise PeerGone("" if self.is_ending else "tls") from None
        return names_in(self._socket.getpeercert())

    @property
    def tls_problem(self) -> str:
        """Why TLS failed, in OpenSSL's words; empty where it did not."""
        return self._socket.problem if isinstance(self._socket, TLSSocket) else ""

    def next_pdu(self, begin_by_s: float, finish_by_s: float | None = None) -> tuple[PDU, int]:
        """Kind and length of the next PDU, of which nothing more is read yet.

        Parameters
        ----------
        begin_by_s : float
            On the monotonic clock.
        finish_by_s : float, optional
            When the whole PDU must be here; without it, `stall_s` after its first byte.

        Raises
        ------
        TimeoutError
            Nothing came until `begin_by_s`.
        Ended
            The peer left or stalled, or the PDU is of no known kind or too long.
        """
        if self.is_ending:
            raise PeerGone
        self._finish_by_s = begin_by_s
        if self._first == self._end:
            self._read_ahead()
        self._finish_by_s = finish_by_s or time.monotonic() + self._stall_s
        self.read_into(self._header)
        kind, length = _PDU_HEADER(self._header)
        if length > _LONGEST.get(kind, -1):
            raise Breach("pdu-too-long" if kind in _LONGEST else "unknown-pdu")
        self._left = length if kind == PDU.P_DATA_TF else 0
        if kind == PDU.P_DATA_TF and length < _FRAGMENT_HEADER_BYTES:
            raise Breach("malformed-pdu")  # it would keep an idle association alive
        return PDU(kind), length

    def next_fragment(self) -> Fragment:
        """The next fragment of a message that is under way.

        Raises
        ------
        Ended
            The peer left, stalled, or broke the message off.
        """
        if self._left == 0:
            try:
                kind, _ = self.next_pdu(time.monotonic() + self._stall_s)
            except TimeoutError:
                raise PeerGone("stalled") from None
            if kind is PDU.ABORT:
                raise PeerGone
            if kind is not PDU.P_DATA_TF:
                raise Breach("malformed-message")
        if self._left < _FRAGMENT_HEADER_BYTES:
            raise Breach("malformed-pdu")
        self.read_into(self._header)
        item_length, context_id, control = _FRAGMENT_HEADER(self._header)
        length = item_length - 2  # the item's length counts context id and control header
        self._left -= _FRAGMENT_HEADER_BYTES + length
        is_last = bool(control & _IS_LAST)
        # without bytes a message grows for ever and never reaches its limit; some end it so
        if length < 0 or self._left < 0 or (length == 0 and not is_last):
            raise Breach("malformed-pdu")
        return Fragment(context_id, bool(control & _IS_COMMAND), is_last, length)

    @property
    def has_fragment(self) -> bool:
        """Whether the PDU that was read last holds another fragment."""
        return self._left > 0

    def read_into(self, into: memoryview) -> None:
        """Fill `into` with bytes of the PDU that is being read."""
        filled = 0
        while filled < len(into):
            if self._first == self._end:
                try:
                    self._read_ahead()
                except TimeoutError:
                    raise PeerGone("stalled") from None
            take = min(len(into) - filled, self._end - self._first)
            into[filled : filled + take] = self._ahead[self._first : self._first + take]
            self._first += take
            filled += take

    def read(self, count: int) -> bytes:
        """As `read_into`, for what is small."""
        into = bytearray(count)
        self.read_into(memoryview(into))
        return bytes(into)

    def _read_ahead(self) -> None:
        self._first, self._end = 0, self._receive(self._ahead)
        acknowledge_now(self._socket)

    def _receive(self, into: memoryview) -> int:
        remaining_s = self._finish_by_s - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError
        try:
            received = self._read_within(remaining_s, into)
        except TimeoutError:
            raise
        except OSError:
            raise PeerGone from None
        if received == 0:
            raise PeerGone
        return received

    def _read_within(self, remaining_s: float, into: memoryview) -> int:
        if isinstance(self._socket, TLSSocket):
            self._socket.settimeout(remaining_s)
            return self._socket.recv_into(into)
        while True:
            # mostly it is there, and a timeout would cost two more calls
            with suppress(BlockingIOError):
                return self._socket.recv_into(into, 0, socket.MSG_DONTWAIT)
            readable = select.poll()
            readable.register(self._socket, select.POLLIN)
            if not readable.poll(1000 * remaining_s):
                raise TimeoutError

    def send(self, pdu: bytes) -> None:
        """Send all of it.

        Raises
        ------
        PeerGone
            The peer left, or did not read for `stall_s`.
        """
        try:
            self._socket.settimeout(self._stall_s)
            self._socket.sendall(pdu)
            self._socket.settimeout(None)
            acknowledge_now(self._socket)
        except OSError:
            raise PeerGone from None

    def linger(self) -> None:
        """Give the peer `LINGER_S` to close first, as PS3.8 9.2 (Sta13) wants it."""
        self._finish_by_s = time.monotonic() + LINGER_S
        rest = memoryview(bytearray(4096))
        with suppress(TimeoutError, PeerGone):
            while True:
                self._receive(rest)

    def end_soon(self) -> None:
        """Let the connection's thread find the peer gone; from any thread."""
        self.is_ending = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)

    def hang_up(self) -> None:
        """End blocked reads and writes at once; from any thread."""
        self.is_ending = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the descriptor back; by the connection's own thread, as its last word."""
        self._socket.close()
