"""Any bytes on a DICOM port: answered by whole PDUs, closed, and no error of ours."""

from __future__ import annotations

import logging
import socket
import struct
from contextlib import suppress

import pytest
from pydicom.uid import CTImageStorage
from pynetdicom.sop_class import Verification

from dicom_xai.receive.upper_layer import PDU
from tests.make.associations import (
    Shelf,
    an_image,
    association_request,
    connected,
    encoded,
    listening,
    store,
    store_request,
    wait_until_all_have_ended,
)
from tests.make.fuzzing import Fuzz, spoilt

RELEASE_RQ = bytes((PDU.RELEASE_RQ, 0, 0, 0, 0, 4, 0, 0, 0, 0))
ABORT = bytes((PDU.ABORT, 0, 0, 0, 0, 4, 0, 0, 0, 0))
OURS_TO_SEND = {PDU.ASSOCIATE_AC, PDU.ASSOCIATE_RJ, PDU.P_DATA_TF, PDU.RELEASE_RP, PDU.ABORT}


def echo_request(context_id: int) -> bytes:
    elements = [
        (0x0002, Verification.encode() + b"\0"),
        (0x0100, struct.pack("<H", 0x0030)),
        (0x0110, struct.pack("<H", 7)),
        (0x0800, struct.pack("<H", 0x0101)),
    ]
    body = b"".join(struct.pack("<HHL", 0, tag, len(v)) + v for tag, v in elements)
    command = struct.pack("<HHLL", 0, 0, 4, len(body)) + body
    length = len(command)
    return struct.pack(">BBLLBB", 4, 0, length + 6, length + 2, context_id, 3) + command


def conversations() -> list[bytes]:
    """What a good peer says from start to end."""
    image = an_image(rows=4, columns=4)
    stored = store_request(encoded(image), image.SOPClassUID, image.SOPInstanceUID)
    request = association_request([CTImageStorage, Verification])
    return [
        request + echo_request(3) + RELEASE_RQ,
        request + stored + RELEASE_RQ,
        request + stored + echo_request(3) + ABORT,
        association_request([CTImageStorage] * 20) + RELEASE_RQ,
    ]


@pytest.mark.promise("N7")
def test_no_stream_of_bytes_gets_through_the_receive_loop(
    fuzz: Fuzz, caplog: pytest.LogCaptureFixture
) -> None:
    door = Shelf()
    with listening(door, acse_timeout_s=1.0, dimse_timeout_s=1.0, network_timeout_s=1.0) as scp:

        def trial(data: bytes) -> None:
            with connected(scp.ports[0]) as sock:
                with suppress(OSError):  # it may have hung up on the first bytes
                    sock.sendall(data)
                    sock.shutdown(socket.SHUT_WR)
                answer = _all_of(sock)
            assert _kinds(answer) <= OURS_TO_SEND
            ours = [each for each in caplog.records if each.name.startswith("dicom_xai")]
            assert [each for each in ours if each.levelno >= logging.ERROR] == []
            assert "failed" not in door.reasons()
            door.refusals.clear()
            caplog.clear()

        fuzz.run("pdus", trial, spoilt(conversations()), 1200)
        fuzz.run_many("pdus", trial, conversations(), 8800)
        wait_until_all_have_ended()
        assert store(scp.ports[0], an_image()) == [0x0000]


def _all_of(sock: socket.socket) -> bytes:
    parts = []
    with suppress(ConnectionError):
        while part := sock.recv(65536):
            parts.append(part)
    return b"".join(parts)


def _kinds(stream: bytes) -> set[int]:
    """The kinds of PDU in it; AssertionError where one is not whole."""
    kinds, at = set(), 0
    while at < len(stream):
        kind, length = struct.unpack_from(">BxL", stream, at)
        at += 6 + length
        assert at <= len(stream), "half a PDU"
        kinds.add(kind)
    return kinds
