"""What many senders at once, and one very large object, cost the receiver's memory."""

from __future__ import annotations

import socket
import struct
from contextlib import ExitStack

import psutil
import pytest

from dicom_xai import errors
from dicom_xai.receive.upper_layer import PDU
from tests.make.associations import (
    HOST,
    Shelf,
    an_image,
    association_request,
    encoded,
    listening,
    next_pdu,
    store_request,
)

SOURCES = [f"127.0.0.{number}" for number in range(1, 6)]
EACH = 20
MOST_BYTES = 64_000_000  #: whatever one association brings
MOST_EACH_BYTES = 1_000_000  #: of many: their threads, and a part of 256 kB
TWO_GB = 2**31


def resident_bytes() -> int:
    """What this process, receiver and senders, holds now."""
    return int(psutil.Process().memory_info().rss)


def asking(port: int, source: str) -> tuple[socket.socket, bytes]:
    """A connection from that address, and the answer to its association request."""
    sock = socket.create_connection((HOST, port), timeout=30, source_address=(source, 0))
    sock.sendall(association_request(calling=f"WARD{source[-1]}"))
    return sock, next_pdu(sock)


@pytest.mark.promise("N3")
@pytest.mark.promise("N12")
def test_a_hundred_associations_of_five_sources_are_all_served_in_bounded_memory() -> None:
    door = Shelf(errors.OutOfResourcesError("not kept"))
    ds = an_image(rows=1024, columns=1024)  # 2 MB
    request = store_request(encoded(ds), ds.SOPClassUID, ds.SOPInstanceUID)
    middle = len(request) // 2
    limits = {"max_associations": 120, "max_per_source": EACH}
    patience = {"dimse_timeout_s": 60, "network_timeout_s": 60}
    with (
        listening(door, **limits, **patience) as scp,
        ExitStack() as opened,
    ):
        port, before, held = scp.ports[0], resident_bytes(), []
        for source in SOURCES * EACH:
            sock, answer = asking(port, source)
            held.append(opened.enter_context(sock))
            assert answer[:1] == bytes([PDU.ASSOCIATE_AC])
        # there is room for more, but not for these
        for source in SOURCES:
            sock, answer = asking(port, source)
            opened.enter_context(sock)
            assert tuple(answer[7:10]) == (2, 3, 2)  # transient, presentation, local limit
        assert scp.associations == len(SOURCES) * EACH
        for sock in held:
            sock.sendall(request[:middle])
        halfway = resident_bytes()
        for sock in held:
            sock.sendall(request[middle:])
        answers = [next_pdu(sock) for sock in held]
        assert max(halfway, resident_bytes()) - before < len(held) * MOST_EACH_BYTES
    assert {answer[:1] for answer in answers} == {bytes([PDU.P_DATA_TF])}
    assert door.reasons().count("source-limit") == len(SOURCES)
    assert len(door.reasons()) == len(SOURCES) * (EACH + 1)


def begun(ds_bytes: bytes, sop_class_uid: str, sop_instance_uid: str) -> bytes:
    """A C-STORE-RQ whose data set goes on after these bytes."""
    whole = bytearray(store_request(ds_bytes, sop_class_uid, sop_instance_uid))
    last = len(whole) - 12 - len(ds_bytes)  # its PDU and fragment headers before it
    assert whole[last + 11] == 0x02
    whole[last + 11] = 0x00
    return bytes(whole)


def fragment(size_bytes: int, control: int) -> bytes:
    """A P-DATA-TF of so many zeros of a data set."""
    head = struct.pack(">BxLLBB", PDU.P_DATA_TF, size_bytes + 6, size_bytes + 2, 1, control)
    return head + bytes(size_bytes)


@pytest.mark.slow
@pytest.mark.promise("N3")
def test_an_object_of_two_gigabytes_goes_through_in_bounded_memory() -> None:
    door = Shelf(errors.OutOfResourcesError("not kept"))
    ds = an_image(rows=32_768, columns=32_768)
    del ds.PixelData
    head = encoded(ds) + struct.pack("<HH2sxxL", 0x7FE0, 0x0010, b"OW", TWO_GB)
    part = fragment(65_536, 0x00) * 16
    with listening(door, max_message_bytes=TWO_GB + 10_000, dimse_timeout_s=30) as scp:
        sock, answer = asking(scp.ports[0], HOST)
        with sock:
            assert answer[:1] == bytes([PDU.ASSOCIATE_AC])
            sock.sendall(begun(head, ds.SOPClassUID, ds.SOPInstanceUID))
            before, most = resident_bytes(), 0
            for _ in range(TWO_GB // (16 * 65_536)):
                sock.sendall(part)
                most = max(most, resident_bytes())
            sock.sendall(fragment(0, 0x02))
            sock.settimeout(120)
            answer = next_pdu(sock)
            most = max(most, resident_bytes())
    assert b"\x00\x00\x00\x09\x02\x00\x00\x00\x00\xa7" in answer
    assert most - before < MOST_BYTES
