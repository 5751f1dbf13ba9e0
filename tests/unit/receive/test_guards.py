"""Peers that would stop a bare pynetdicom server: each is dropped, and a good peer is served."""

from __future__ import annotations

import os
import random
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import pytest
from pydicom.uid import CTImageStorage
from pynetdicom.sop_class import Verification

from dicom_xai.dimse import MAX_PDU_BYTES
from dicom_xai.receive.negotiation import read_request
from dicom_xai.receive.upper_layer import Breach
from dicom_xai.study import Sender
from tests.make.associations import (
    HOST,
    Shelf,
    an_image,
    associated,
    association_request,
    connected,
    encoded,
    listening,
    negotiated,
    next_pdu,
    store,
    store_request,
    threads_of_associations,
    wait_until_all_have_ended,
)

A_ABORT = b"\x07"


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    yield
    wait_until_all_have_ended()


def is_served(port: int) -> bool:
    with associated(port, [Verification]) as assoc:
        return assoc.is_established and assoc.send_c_echo().Status == 0x0000


def whole_store() -> bytes:
    ds = an_image()
    return store_request(encoded(ds), ds.SOPClassUID, ds.SOPInstanceUID)


def command_of(request: bytes) -> bytes:
    """Its first PDU."""
    return request[: 6 + int.from_bytes(request[2:6], "big")]


def is_closed(sock: socket.socket) -> bool:
    """Whether the peer closes; waits as long as the socket's timeout."""
    while pdu := next_pdu(sock):
        assert pdu[:1] == A_ABORT
    return True


@pytest.mark.promise("N1")
@pytest.mark.parametrize(
    "beginning",
    [
        b"",
        b"\x01\x00\x00",
        association_request()[:-1],
        association_request()[:40],
    ],
    ids=["silent", "half a header", "a request less one byte", "half a request"],
)
def test_half_open_connections_end_by_deadline_and_a_good_peer_is_served(beginning: bytes) -> None:
    door = Shelf()
    with listening(door, acse_timeout_s=0.5) as scp, ExitStack() as opened:
        port = scp.ports[0]
        bad = [opened.enter_context(connected(port, beginning)) for _ in range(12)]
        assert is_served(port)
        assert all(is_closed(sock) for sock in bad)
    assert set(door.reasons()) <= {"no-association-request"}


@pytest.mark.promise("N1")
def test_half_a_data_pdu_ends_by_deadline_and_its_transfer_is_aborted() -> None:
    door = Shelf()
    request = whole_store()
    with listening(door, dimse_timeout_s=0.5) as scp, ExitStack() as opened:
        port = scp.ports[0]
        bad = [opened.enter_context(negotiated(port)) for _ in range(12)]
        for sock in bad:
            sock.sendall(request)
            assert next_pdu(sock)[:1] == b"\x04"
            sock.sendall(request[:10])
        assert is_served(port)
        assert all(is_closed(sock) for sock in bad)
        door.wait("ends", 12)
    assert {how for _, how in door.ends} == {"aborted"}
    assert door.reasons() == ["stalled"] * 12


@pytest.mark.promise("N6")
def test_an_idle_association_is_aborted_at_the_network_timeout() -> None:
    door = Shelf()
    with listening(door, network_timeout_s=0.5) as scp, negotiated(scp.ports[0]) as sock:
        assert next_pdu(sock)[:1] == A_ABORT
        assert is_closed(sock)
    assert door.reasons() == ["idle"]


@pytest.mark.promise("N3")
@pytest.mark.promise("N4")
@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (struct.pack(">BBL", 1, 0, 0xFFFFFFFF), "pdu-too-long"),
        (struct.pack(">BBL", 7, 0, 1_000_000), "pdu-too-long"),
        (struct.pack(">BBL", 9, 0, 4), "unknown-pdu"),
        (b"GET / HTTP/1.1\r\n\r\n", "unknown-pdu"),
    ],
)
def test_a_header_is_refused_before_anything_is_read_for_it(header: bytes, reason: str) -> None:
    door = Shelf()
    with listening(door) as scp, connected(scp.ports[0], header) as sock:
        assert is_closed(sock)
    assert door.reasons() == [reason]


@pytest.mark.promise("N4")
def test_a_data_pdu_longer_than_agreed_is_refused_on_its_header() -> None:
    door = Shelf()
    with listening(door) as scp, negotiated(scp.ports[0]) as sock:
        sock.sendall(struct.pack(">BBL", 4, 0, 2 * MAX_PDU_BYTES))
        assert next_pdu(sock)[:1] == A_ABORT
        assert is_closed(sock)
    assert door.reasons() == ["pdu-too-long"]


@pytest.mark.promise("N1")
@pytest.mark.promise("N3")
@pytest.mark.parametrize(
    "pdu",
    [
        pytest.param(struct.pack(">BBL", 4, 0, 0), id="a PDU without a fragment"),
        pytest.param(struct.pack(">BBLLBB", 4, 0, 6, 2, 1, 1), id="a command without bytes"),
        pytest.param(
            command_of(whole_store()) + struct.pack(">BBLLBB", 4, 0, 6, 2, 1, 0),
            id="a data set without bytes",
        ),
    ],
)
def test_what_brings_nothing_forward_is_a_breach(pdu: bytes) -> None:
    """Repeated, it would hold an association for ever, and a list of nothings would grow."""
    door = Shelf()
    with listening(door) as scp, negotiated(scp.ports[0]) as sock:
        sock.sendall(pdu)
        assert next_pdu(sock)[:1] == A_ABORT
        assert is_closed(sock)
    assert door.reasons() == ["malformed-pdu"]


@pytest.mark.promise("N1")
@pytest.mark.parametrize("kind", [1, 0], ids=["a command", "a data set"])
def test_a_message_that_comes_two_bytes_at_a_time_is_given_up(kind: int) -> None:
    door = Shelf()
    request = whole_store()
    with listening(door, dimse_timeout_s=0.4) as scp, negotiated(scp.ports[0]) as sock:
        sock.settimeout(0.1)  # how often two bytes are sent
        if kind == 0:
            sock.sendall(command_of(request))
        began = time.monotonic()
        answer = b""
        while not answer:
            assert time.monotonic() - began < 10
            sock.sendall(struct.pack(">BBLLBB", 4, 0, 8, 4, 1, kind) + b"\x08\x00")
            with suppress(TimeoutError):
                answer = sock.recv(1)
        assert answer == A_ABORT
    assert door.reasons() == ["stalled"]


@pytest.mark.promise("N3")
@pytest.mark.promise("N4")
def test_a_data_set_without_end_is_cut_at_the_limit() -> None:
    door = Shelf()
    ds = an_image(rows=512, columns=512)
    request = store_request(encoded(ds), ds.SOPClassUID, ds.SOPInstanceUID)
    with (
        listening(door, max_message_bytes=100_000) as scp,
        negotiated(scp.ports[0]) as sock,
    ):
        with pytest.raises(ConnectionError):
            sock.sendall(request * 100)
        assert is_served(scp.ports[0])
    assert door.reasons() == ["message-too-long"]
    assert door.arrivals == []


def test_requests_sent_ahead_stay_on_the_wire() -> None:
    hold = threading.Event()

    class Slow(Shelf):
        def accept(self, arrival: object, transfer: int) -> Callable[[], None]:
            hold.wait(30)
            return super().accept(arrival, transfer)  # type: ignore[arg-type]

    door = Slow()
    ds = an_image(rows=512, columns=512)
    request = store_request(encoded(ds), ds.SOPClassUID, ds.SOPInstanceUID)
    with (
        listening(door, dimse_timeout_s=30, network_timeout_s=30) as scp,
        negotiated(scp.ports[0]) as sock,
    ):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 100_000)
        sock.settimeout(0.5)
        sent = 0
        with suppress(TimeoutError):
            while sent < 200:  # 105 MB, were they all taken
                sock.sendall(request)
                sent += 1
        assert sent < 40  # what kernel buffers hold (about 6 MB each way) and two in our hands
        grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown_kb < 50_000
        hold.set()


def test_a_malformed_command_set_ends_in_an_abort_and_no_traceback() -> None:
    door = Shelf()
    fragments = [b"", b"\x03", b"\x03" + b"\xff" * 20, b"\x03" + bytes(8)]
    with listening(door) as scp:
        for fragment in fragments:
            pdv = struct.pack(">LB", len(fragment) + 1, 1) + fragment
            with negotiated(scp.ports[0]) as sock:
                sock.sendall(struct.pack(">BBL", 4, 0, len(pdv)) + pdv)
                assert next_pdu(sock)[:1] == A_ABORT
                assert is_closed(sock)
        assert is_served(scp.ports[0])
    assert set(door.reasons()) <= {"malformed-message", "malformed-pdu"}
    assert door.details == [""] * len(fragments)


@pytest.mark.promise("N7")
def test_damaged_messages_end_their_own_association_only() -> None:
    door = Shelf()
    rng = random.Random(3)
    request, data = association_request([CTImageStorage, Verification]), whole_store()
    with listening(door, acse_timeout_s=0.2, dimse_timeout_s=0.2, network_timeout_s=0.3) as scp:
        port = scp.ports[0]
        for _ in range(120):
            damaged = bytearray(request + data)
            for _ in range(rng.randint(1, 6)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            with connected(port, bytes(damaged)) as sock:
                with suppress(OSError):  # the server may have hung up on the first bytes already
                    sock.shutdown(socket.SHUT_WR)
                while next_pdu(sock):
                    pass
        assert is_served(port)
    assert "failed" not in door.reasons()


def item(kind: int, value: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(value)) + value


#: What seconds of a core would be spent on, were it read: most of 256 kB in items.
COSTLY = {
    "contexts": item(0x20, b"\1\0\0\0") * 30_000,
    "transfer syntaxes": item(0x20, b"\1\0\0\0" + item(0x40, b"1") * 10_000) * 4,
    "user information": item(0x50, item(0x54, b"\0\1" + b"1" + b"\0\0") * 6_000) * 4,
    "an item beyond its PDU": struct.pack(">BBH", 0x20, 0, 60_000),
    "an item beyond its item": item(0x50, struct.pack(">BBH", 0x51, 0, 60_000)),
    "half an item": item(0x20, b"\1\0\0\0\x40"),
}


@pytest.mark.promise("N2")
@pytest.mark.promise("N7")
@pytest.mark.parametrize("items", COSTLY.values(), ids=COSTLY)
def test_a_request_of_ten_thousand_items_is_refused_before_it_is_read(items: bytes) -> None:
    body = association_request()[6:] + items
    began_s = time.thread_time()
    with pytest.raises(Breach, match="malformed-pdu"):
        read_request(struct.pack(">BBL", 1, 0, len(body)) + body)
    # 8,192 headers of items in a loop: 5 ms here; pynetdicom takes up to 2.6 s for 1 MB of them
    assert time.thread_time() - began_s < 0.5


@pytest.mark.promise("N11")
def test_a_stranger_is_rejected_whatever_follows_its_name() -> None:
    door = Shelf()
    body = association_request(called="NOBODY")[6:] + COSTLY["contexts"]
    request = struct.pack(">BBL", 1, 0, len(body)) + body
    with listening(door) as scp, connected(scp.ports[0], request) as sock:
        assert next_pdu(sock)[:1] == b"\x03"
    assert door.reasons() == ["called-ae"]


def test_a_peer_that_resets_at_once_is_no_error() -> None:
    door = Shelf()
    with listening(door) as scp:
        for _ in range(100):
            sock = connected(scp.ports[0])
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        assert is_served(scp.ports[0])
    assert "failed" not in door.reasons()


def burst_s(count: int) -> float:
    """Seconds until so many associations, asked for at once, are all answered."""
    with listening(Shelf(), max_associations=20, max_per_source=20) as scp, ExitStack() as opened:
        started = time.monotonic()
        socks = [
            opened.enter_context(connected(scp.ports[0], association_request()))
            for _ in range(count)
        ]
        answers = [next_pdu(sock)[:1] for sock in socks]
        elapsed_s = time.monotonic() - started
    assert answers.count(b"\x02") == 20
    assert answers.count(b"\x03") == count - 20
    return elapsed_s


@pytest.mark.promise("N5")
def test_a_burst_of_connections_is_answered_to_the_last_within_two_seconds() -> None:
    assert any(burst_s(60) < 2.0 for _ in range(5))  # a machine may have other things to do


@pytest.mark.promise("N2")
def test_a_note_that_takes_long_keeps_no_other_connection_waiting() -> None:
    class Slow(Shelf):
        is_heard = threading.Event()

        def refused(self, reason: str, sender: Sender, detail: str) -> None:
            super().refused(reason, sender, detail)
            if reason == "half-open":
                self.is_heard.wait(20)

    door = Slow()
    with (
        listening(door, acse_timeout_s=60, max_per_source=1) as scp,
        ExitStack() as opened,
    ):
        opened.callback(door.is_heard.set)
        port = scp.ports[0]
        served = opened.enter_context(connected(port, association_request()))
        assert next_pdu(served)[:1] == b"\x02"
        for _ in range(33):
            opened.enter_context(connected(port, b"\x01\x00"))
        while "half-open" not in door.reasons():  # refused while all the others are young
            opened.enter_context(connected(port, b"\x01\x00"))
        started = time.monotonic()
        assert scp.associations == 1
        assert time.monotonic() - started < 10


def test_a_house_full_of_half_open_connections_makes_room_for_a_good_peer() -> None:
    door = Shelf()
    with (
        listening(door, acse_timeout_s=60, max_per_source=1) as scp,
        ExitStack() as opened,
    ):
        port = scp.ports[0]
        bad = [opened.enter_context(connected(port, b"\x01\x00")) for _ in range(34)]
        started = time.monotonic()
        while not is_served(port):  # refused while all the others are young
            assert time.monotonic() - started < 20
        assert "half-open" in door.reasons()
        assert "connection-limit" in door.reasons()
        assert is_closed(bad[0])


@pytest.mark.promise("N2")
def test_a_flood_from_many_addresses_does_not_keep_a_good_peer_out() -> None:
    door = Shelf()
    with (
        listening(door, acse_timeout_s=60, max_associations=10, max_per_source=5) as scp,
        ExitStack() as opened,
    ):
        port = scp.ports[0]
        for number in range(200):
            flood = opened.enter_context(socket.socket())
            flood.bind((f"127.0.0.{2 + number % 20}", 0))
            flood.connect((HOST, port))
            if number % 20 == 19:
                assert is_served(port)
        assert len(threads_of_associations()) <= 2 * (2 * 10 + 32 + 64)


def cpu_s(threads: set[threading.Thread]) -> float:
    """CPU seconds that these threads have used: no other thread of the test run counts."""
    clocks = [time.pthread_getcpuclockid(each.ident) for each in threads if each.ident]
    return sum(map(time.clock_gettime, clocks))


def test_idle_associations_cost_next_to_nothing() -> None:
    door = Shelf()
    others = set(threading.enumerate())
    with (
        listening(door, network_timeout_s=30, max_per_source=30) as scp,
        ExitStack() as opened,
    ):
        socks = [opened.enter_context(negotiated(scp.ports[0])) for _ in range(20)]
        assert all(socks)
        ours = set(threading.enumerate()) - others
        assert len(ours) > 20
        before = cpu_s(ours)
        socks[0].settimeout(1.0)
        with pytest.raises(TimeoutError):
            socks[0].recv(1)
        # a bare server takes 3 to 5 % of a core for each; a fiftieth of that is allowed here
        assert cpu_s(ours) - before < 0.1


def test_a_connection_that_only_looks_in_is_forgotten_at_once() -> None:
    door = Shelf()
    with listening(door, acse_timeout_s=60) as scp:
        for _ in range(100):
            connected(scp.ports[0]).close()
        wait_until_all_have_ended()
        assert store(scp.ports[0], an_image()) == [0x0000]


def test_associations_released_and_aborted_leave_nothing_behind() -> None:
    door = Shelf()
    with listening(door) as scp:
        calm = len(os.listdir("/proc/self/fd"))
        for number in range(200):
            with negotiated(scp.ports[0]) as sock:
                if number % 2:
                    sock.sendall(struct.pack(">BBLL", 5, 0, 4, 0))
                    assert next_pdu(sock)[:1] == b"\x06"
                else:
                    sock.sendall(struct.pack(">BBLL", 7, 0, 4, 0))
        wait_until_all_have_ended()
        assert scp.associations == 0
        assert len(os.listdir("/proc/self/fd")) <= calm
        assert store(scp.ports[0], an_image()) == [0x0000]
