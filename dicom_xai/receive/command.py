"""Command sets (PS3.7 6.3 and 9.3): requests in, responses out.

A command set is a handful of elements in implicit VR little endian, one for each object; read and
written here by structure, because a data set library takes longer for it than the disk for a slice.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from dicom_xai.dimse import Status
from dicom_xai.receive.upper_layer import PDU, Breach

#: A command set has about 150 bytes; a longer one than this is not read.
MAX_COMMAND_BYTES = 16_384

_HEADER = struct.Struct("<HHL")
_PDV = struct.Struct(">BxLLBB")
_NO_DATA_SET = 0x0101
_COMMAND, _LAST_COMMAND = 0x01, 0x03  # message control header, PS3.8 E.2

_GROUP_LENGTH = 0x0000
_AFFECTED_SOP_CLASS_UID = 0x0002
_COMMAND_FIELD = 0x0100
_MESSAGE_ID = 0x0110
_MESSAGE_ID_RESPONDED_TO = 0x0120
_PRIORITY = 0x0700
_DATA_SET_TYPE = 0x0800
_STATUS = 0x0900
_ERROR_COMMENT = 0x0902
_AFFECTED_SOP_INSTANCE_UID = 0x1000


class Field(IntEnum):
    """Command Field (0000,0100): what is served (PS3.7 E.1)."""

    C_STORE_RQ = 0x0001
    C_ECHO_RQ = 0x0030
    C_CANCEL_RQ = 0x0FFF


#: The bit by which a response differs from its request.
_RESPONSE = 0x8000


@dataclass(frozen=True, slots=True)
class Command:
    """A request.

    `priority` is 0 medium, 1 high, 2 low (PS3.7 9.3.1.1); medium where a request has none.
    """

    field: Field
    message_id: int
    has_data_set: bool
    sop_class_uid: str
    sop_instance_uid: str
    priority: int


def read_command(command_set: bytes) -> Command:
    """A request from its command set.

    Raises
    ------
    Breach
        It is malformed, or of a kind that is not served.
    """
    elements = _elements(command_set)
    try:
        field = Field(_number(elements, _COMMAND_FIELD))
    except ValueError:
        raise Breach("malformed-message") from None
    # a cancel names the request that it cancels, and all that we serve is done by then
    is_cancel = field is Field.C_CANCEL_RQ
    return Command(
        field=field,
        message_id=0 if is_cancel else _number(elements, _MESSAGE_ID),
        has_data_set=_number(elements, _DATA_SET_TYPE) != _NO_DATA_SET,
        sop_class_uid=_uid(elements, _AFFECTED_SOP_CLASS_UID),
        sop_instance_uid=_uid(elements, _AFFECTED_SOP_INSTANCE_UID),
        priority=_number(elements, _PRIORITY) if _PRIORITY in elements else 0,
    )


def response(command: Command, status: Status, comment: str = "") -> bytes:
    """The command set that answers a request (PS3.7 9.3.1.2 and 9.3.5.2).

    `comment` tells why a status is no success: ASCII, cut at 64 characters (PS3.7 C.5.0, LO).
    """
    elements = [
        _text_element(_AFFECTED_SOP_CLASS_UID, command.sop_class_uid, b"\0"),
        _short_element(_COMMAND_FIELD, command.field | _RESPONSE),
        _short_element(_MESSAGE_ID_RESPONDED_TO, command.message_id),
        _short_element(_DATA_SET_TYPE, _NO_DATA_SET),
        _short_element(_STATUS, status),
    ]
    if comment:
        text = comment.encode("ascii", "replace").decode().replace("\\", "/")
        elements.append(_text_element(_ERROR_COMMENT, text[:64].rstrip(), b" "))
    if command.sop_instance_uid:
        elements.append(_text_element(_AFFECTED_SOP_INSTANCE_UID, command.sop_instance_uid, b"\0"))
    body = b"".join(elements)
    return _HEADER.pack(0, _GROUP_LENGTH, 4) + struct.pack("<L", len(body)) + body


def in_pdus(command_set: bytes, context_id: int, max_pdu_bytes: int) -> bytes:
    """P-DATA-TF PDUs with a command set (PS3.8 9.3.5), none longer than the peer takes."""
    # below 8 bytes nothing fits beside the fragment's header; 0 is no limit
    room = max(max_pdu_bytes, 8) - 6 if max_pdu_bytes else len(command_set)
    pdus = bytearray()
    for start in range(0, len(command_set), room):
        part = command_set[start : start + room]
        control = _LAST_COMMAND if start + room >= len(command_set) else _COMMAND
        pdus += _PDV.pack(PDU.P_DATA_TF, len(part) + 6, len(part) + 2, context_id, control) + part
    return bytes(pdus)


def _elements(command_set: bytes) -> dict[int, bytes]:
    elements: dict[int, bytes] = {}
    position = 0
    while position < len(command_set):
        if position + _HEADER.size > len(command_set):
            raise Breach("malformed-message")
        group, element, length = _HEADER.unpack_from(command_set, position)
        position += _HEADER.size
        if group != 0 or element in elements or length > len(command_set) - position:
            raise Breach("malformed-message")
        elements[element] = command_set[position : position + length]
        position += length
    return elements


def _number(elements: dict[int, bytes], element: int) -> int:
    value = elements.get(element, b"")
    if len(value) != 2:
        raise Breach("malformed-message")
    return int.from_bytes(value, "little")


def _uid(elements: dict[int, bytes], element: int) -> str:
    try:
        return elements.get(element, b"").rstrip(b"\0 ").decode("ascii")
    except UnicodeDecodeError:
        raise Breach("malformed-message") from None


def _short_element(element: int, value: int) -> bytes:
    return _HEADER.pack(0, element, 2) + value.to_bytes(2, "little")


def _text_element(element: int, text: str, padding: bytes) -> bytes:
    value = text.encode("ascii")
    value += padding * (len(value) % 2)
    return _HEADER.pack(0, element, len(value)) + value
