"""Command sets beside pynetdicom's: what it encodes is read, what is written it decodes."""

from __future__ import annotations

import struct

import pytest
from pydicom.uid import CTImageStorage
from pynetdicom.dimse_messages import C_ECHO_RQ, C_STORE_RSP
from pynetdicom.dimse_primitives import C_ECHO, C_STORE
from pynetdicom.pdu import P_DATA_TF

from dicom_xai.dimse import Status
from dicom_xai.receive.command import Command, Field, in_pdus, read_command, response
from dicom_xai.receive.upper_layer import Breach
from tests.make.associations import an_image, encoded, store_request

STORE = Command(Field.C_STORE_RQ, 7, True, CTImageStorage, "1.2.3", 1)


def command_set(pdus: bytes) -> bytes:
    """The first fragment of the first PDU."""
    (length,) = struct.unpack_from(">L", pdus, 6)
    return pdus[12 : 10 + length]


def test_a_store_request_is_read() -> None:
    ds = an_image()
    request = store_request(encoded(ds), ds.SOPClassUID, ds.SOPInstanceUID)
    assert read_command(command_set(request)) == Command(
        field=Field.C_STORE_RQ,
        message_id=1,
        has_data_set=True,
        sop_class_uid=CTImageStorage,
        sop_instance_uid=ds.SOPInstanceUID,
        priority=0,
    )


def test_an_echo_request_is_read() -> None:
    echo = C_ECHO()
    echo.MessageID = 9
    echo.AffectedSOPClassUID = "1.2.840.10008.1.1"
    message = C_ECHO_RQ()
    message.primitive_to_message(echo)
    [pdv] = message.encode_msg(1, 16_384)
    read = read_command(command_set(bytes(P_DATA_TF(pdv).encode())))
    assert (read.field, read.message_id, read.has_data_set) == (Field.C_ECHO_RQ, 9, False)


@pytest.mark.parametrize("max_pdu_bytes", [0, 8, 9, 50, 16_384])
def test_a_response_is_what_pynetdicom_reads_in_pdus_that_the_peer_takes(
    max_pdu_bytes: int,
) -> None:
    pdus = in_pdus(response(STORE, Status.OUT_OF_RESOURCES, "no room"), 3, max_pdu_bytes)
    message = C_STORE_RSP()
    is_whole = False
    while pdus:
        assert not is_whole
        (length,) = struct.unpack_from(">L", pdus, 2)
        assert length <= max_pdu_bytes or max_pdu_bytes == 0
        pdu = P_DATA_TF()
        pdu.decode(pdus[: 6 + length])
        is_whole = message.decode_msg(pdu.to_primitive())
        pdus = pdus[6 + length :]
    assert is_whole
    answer: C_STORE = message.message_to_primitive()
    assert (answer.Status, answer.MessageIDBeingRespondedTo) == (0xA700, 7)
    assert answer.AffectedSOPClassUID == CTImageStorage
    assert answer.AffectedSOPInstanceUID == "1.2.3"
    assert answer.ErrorComment == "no room"


def test_a_comment_is_ascii_without_backslash_and_not_longer_than_64() -> None:
    written = response(STORE, Status.CANNOT_UNDERSTAND, "C:\\Größe " + "x" * 100)
    assert b"C:/Gr??e " + b"x" * 55 in written
    assert b"x" * 56 not in written


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-1],
        lambda whole: whole[:5],
        lambda whole: whole + whole[-10:],  # an element twice
        lambda whole: whole.replace(b"\0\0\0\x01\x02\0\0\0", b"\0\0\0\x01\xff\xff\xff\xff"),
        lambda whole: whole.replace(b"\x01\x80", b"\x99\x77"),  # no known command
        lambda whole: b"",
    ],
)
def test_what_is_no_command_set_is_a_breach(damage: object) -> None:
    whole = response(STORE, Status.SUCCESS)
    with pytest.raises(Breach):
        read_command(damage(whole))  # type: ignore[operator]


def test_a_response_is_no_request() -> None:
    with pytest.raises(Breach):
        read_command(response(STORE, Status.SUCCESS))
