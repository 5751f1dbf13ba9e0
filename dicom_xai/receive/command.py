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
_NO_DATA_SET, _HAS_DATA_SET = 0x0101, 0x0001
_IS_COMMAND, _IS_LAST = 0x01, 0x02  # message control header, PS3.8 E.2

_GROUP_LENGTH = 0x0000
_AFFECTED_SOP_CLASS_UID = 0x0002
_REQUESTED_SOP_CLASS_UID = 0x0003
_COMMAND_FIELD = 0x0100
_MESSAGE_ID = 0x0110
_MESSAGE_ID_RESPONDED_TO = 0x0120
_PRIORITY = 0x0700
_DATA_SET_TYPE = 0x0800
_STATUS = 0x0900
_ERROR_COMMENT = 0x0902
_AFFECTED_SOP_INSTANCE_UID = 0x1000
_REQUESTED_SOP_INSTANCE_UID = 0x1001
_EVENT_TYPE_ID = 0x1002
_ACTION_TYPE_ID = 0x1008


class Field(IntEnum):
    """Command Field (0000,0100): what is served (PS3.7 E.1)."""

    C_STORE_RQ = 0x0001
    C_ECHO_RQ = 0x0030
    N_EVENT_REPORT_RQ = 0x0100
    N_ACTION_RQ = 0x0130
    C_CANCEL_RQ = 0x0FFF
    N_EVENT_REPORT_RSP = 0x8100  #: to a report that we sent on a peer's association

    @property
    def is_commitment(self) -> bool:
        """A request of the storage commitment service."""
        return self in (Field.N_EVENT_REPORT_RQ, Field.N_ACTION_RQ)


#: The bit by which a response differs from its request.
_RESPONSE = 0x8000


@dataclass(frozen=True, slots=True)
class Command:
    """A request, or the response to a report.

    Attributes
    ----------
    message_id : int
        Its own; of a response, that of the request.
    sop_class_uid, sop_instance_uid : str
        Affected, or requested by an N-ACTION.
    priority : int
        0 medium, 1 high, 2 low (PS3.7 9.3.1.1); medium where a request has none.
    type_id : int
        Action or event type (PS3.7 10.3); 0 where there is none.
    status : int
        Of a response.
    """

    field: Field
    message_id: int
    has_data_set: bool
    sop_class_uid: str
    sop_instance_uid: str
    priority: int
    type_id: int = 0
    status: int = 0


def read_command(command_set: bytes) -> Command:
    """A command from its command set.

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
    is_response = field is Field.N_EVENT_REPORT_RSP
    is_action = field is Field.N_ACTION_RQ
    number = _MESSAGE_ID_RESPONDED_TO if is_response else _MESSAGE_ID
    type_id = _ACTION_TYPE_ID if is_action else _EVENT_TYPE_ID
    return Command(
        field=field,
        message_id=0 if is_cancel else _number(elements, number),
        has_data_set=_number(elements, _DATA_SET_TYPE) != _NO_DATA_SET,
        sop_class_uid=_uid(
            elements, _REQUESTED_SOP_CLASS_UID if is_action else _AFFECTED_SOP_CLASS_UID
        ),
        sop_instance_uid=_uid(
            elements, _REQUESTED_SOP_INSTANCE_UID if is_action else _AFFECTED_SOP_INSTANCE_UID
        ),
        priority=_number(elements, _PRIORITY) if _PRIORITY in elements else 0,
        type_id=_number(elements, type_id) if type_id in elements else 0,
        status=_number(elements, _STATUS) if is_response else 0,
    )


def response(command: Command, status: Status, comment: str = "") -> bytes:
    """The command set that answers a request (PS3.7 9.3.1.2, 9.3.5.2, 10.3.1.2 and 10.3.5.2).

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
    if command.field.is_commitment:
        is_action = command.field is Field.N_ACTION_RQ
        type_id = _ACTION_TYPE_ID if is_action else _EVENT_TYPE_ID
        elements.append(_short_element(type_id, command.type_id))
    return _command_set(elements)


def event_report(message_id: int, sop_class_uid: str, sop_instance_uid: str, event: int) -> bytes:
    """The command set of an N-EVENT-REPORT request (PS3.7 10.3.1.1); a data set follows it."""
    return _command_set(
        [
            _text_element(_AFFECTED_SOP_CLASS_UID, sop_class_uid, b"\0"),
            _short_element(_COMMAND_FIELD, Field.N_EVENT_REPORT_RQ),
            _short_element(_MESSAGE_ID, message_id),
            _short_element(_DATA_SET_TYPE, _HAS_DATA_SET),
            _text_element(_AFFECTED_SOP_INSTANCE_UID, sop_instance_uid, b"\0"),
            _short_element(_EVENT_TYPE_ID, event),
        ]
    )


def _command_set(elements: list[bytes]) -> bytes:
    body = b"".join(elements)
    return _HEADER.pack(0, _GROUP_LENGTH, 4) + struct.pack("<L", len(body)) + body


def in_pdus(
    content: bytes, context_id: int, max_pdu_bytes: int, *, is_command: bool = True
) -> bytes:
    """P-DATA-TF PDUs with a command or data set (PS3.8 9.3.5), none longer than the peer takes."""
    # below 8 bytes nothing fits beside the fragment's header; 0 is no limit
    room = max(max_pdu_bytes, 8) - 6 if max_pdu_bytes else len(content)
    pdus = bytearray()
    for start in range(0, len(content), room):
        part = content[start : start + room]
        is_last = start + room >= len(content)
        control = (_IS_COMMAND if is_command else 0) | (_IS_LAST if is_last else 0)
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
