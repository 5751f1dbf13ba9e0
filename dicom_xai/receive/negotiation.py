"""A-ASSOCIATE: what a peer asks for, and what it is answered (PS3.8 7.1 and 9.3.2 to 9.3.4).

pynetdicom's PDU classes read and write it, and its negotiation chooses the transfer syntaxes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RJ, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    ImplementationClassUIDNotification,
    ImplementationVersionNameNotification,
    MaximumLengthNotification,
    SCP_SCU_RoleSelectionNegotiation,
)
from pynetdicom.presentation import PresentationContext, negotiate_as_acceptor

from dicom_xai import uids
from dicom_xai.dimse import MAX_PDU_BYTES, Rejection
from dicom_xai.receive.upper_layer import Breach

#: What pynetdicom and pydicom raise on bytes that are no A-ASSOCIATE-RQ.
_MALFORMED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
    Warning,  # where warnings are errors
    struct.error,
)
_ACCEPTED = 0x00

# PS3.8 Table 9-11: header, protocol version, reserved, called and calling AE title, reserved
_FIXED = struct.Struct(">6xH2x16s16s")
_ITEMS_AT = 74
_ITEM = struct.Struct(">BxH")
_PRESENTATION_CONTEXT, _USER_INFORMATION = 0x20, 0x50
_MOST_CONTEXTS = 128
#: Of 128 contexts with 60 transfer syntaxes each; there are 45.
_MOST_ITEMS = 8_192


@dataclass(frozen=True, slots=True)
class Context:
    """An accepted presentation context: what may be sent in it, and how it is encoded."""

    abstract_syntax: str
    transfer_syntax: str


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends an A-ASSOCIATE-RQ, and to whom: the part of it that has a fixed form."""

    calling_ae_title: str
    called_ae_title: str
    protocol_version: int


@dataclass(frozen=True, slots=True)
class Request:
    """What an A-ASSOCIATE-RQ asks for.

    `max_pdu_bytes` is the longest P-DATA-TF that the peer takes; 0 stands for any.
    """

    max_pdu_bytes: int
    primitive: A_ASSOCIATE


def read_caller(pdu: bytes) -> Caller:
    """Who asks, in microseconds and whatever follows (PS3.8 Table 9-11).

    Parameters
    ----------
    pdu : bytes
        A whole A-ASSOCIATE-RQ, header included.

    Raises
    ------
    Breach
        It is none.
    """
    if len(pdu) < _ITEMS_AT:
        raise Breach("malformed-pdu")
    version, called, calling = _FIXED.unpack_from(pdu)
    try:
        return Caller(calling.decode("ascii").strip(), called.decode("ascii").strip(), version)
    except UnicodeDecodeError:
        raise Breach("malformed-pdu") from None


def read_request(pdu: bytes) -> Request:
    """What the peer asks for.

    Parameters
    ----------
    pdu : bytes
        A whole A-ASSOCIATE-RQ, header included.

    Raises
    ------
    Breach
        It is none.
    """
    _check_items(pdu)
    try:
        decoded = A_ASSOCIATE_RQ()
        decoded.decode(pdu)
        primitive = decoded.to_primitive()
        return Request(int(primitive.maximum_length_received or 0), primitive)
    except _MALFORMED:
        raise Breach("malformed-pdu") from None


def _check_items(pdu: bytes) -> None:
    """Refuse what pynetdicom would take seconds to read, or would read as something else.

    Items must fill their PDU, and there is room for no more of them than anybody has a use for:
    context identifiers are odd and below 256 (PS3.8 9.3.2.2), hence 128 contexts at most.
    """
    at, contexts, items = _ITEMS_AT, 0, 0
    while at < len(pdu):
        kind, end = _item(pdu, at, len(pdu))
        contexts += kind == _PRESENTATION_CONTEXT
        # a context has four bytes of its own before its items
        inner = at + _ITEM.size + (4 if kind == _PRESENTATION_CONTEXT else 0)
        at = end
        items += 1
        while kind in (_PRESENTATION_CONTEXT, _USER_INFORMATION) and inner < end:
            _, inner = _item(pdu, inner, end)
            items += 1
        if contexts > _MOST_CONTEXTS or items > _MOST_ITEMS:
            raise Breach("malformed-pdu")


def _item(pdu: bytes, at: int, limit: int) -> tuple[int, int]:
    """Kind and end of the item that starts there."""
    if at + _ITEM.size > limit:
        raise Breach("malformed-pdu")
    kind, length = _ITEM.unpack_from(pdu, at)
    end = at + _ITEM.size + length
    if end > limit:
        raise Breach("malformed-pdu")
    return kind, end


def accept(
    request: Request, supported: list[PresentationContext]
) -> tuple[bytes, Mapping[int, Context]]:
    """The A-ASSOCIATE-AC, and the accepted contexts by their ids.

    A context that is not supported is refused in the answer; the association stands even when none
    is left (PS3.8 9.3.3.2).
    """
    asked = request.primitive
    try:
        roles = {
            item.sop_class_uid: (item.scu_role, item.scp_role)
            for item in asked.user_information
            if isinstance(item, SCP_SCU_RoleSelectionNegotiation)
        }
        answers, agreed_roles = negotiate_as_acceptor(
            asked.presentation_context_definition_list, supported, roles
        )
        answer = A_ASSOCIATE()
        answer.application_context_name = asked.application_context_name
        # PS3.8 Table 9-17: as received, and not to be tested
        answer.calling_ae_title = asked.calling_ae_title
        answer.called_ae_title = asked.called_ae_title
        answer.result, answer.result_source = _ACCEPTED, 0x01
        answer.presentation_context_definition_results_list = answers
        answer.user_information = [*_user_information(), *agreed_roles]
        pdu = bytes(A_ASSOCIATE_AC(answer).encode())
    except _MALFORMED:
        raise Breach("malformed-pdu") from None
    contexts = {
        int(each.context_id): Context(str(each.abstract_syntax), str(each.transfer_syntax[0]))
        for each in answers
        if each.result == _ACCEPTED
    }
    return pdu, contexts


def reject(rejection: Rejection) -> bytes:
    """The A-ASSOCIATE-RJ with that reason."""
    answer = A_ASSOCIATE()
    answer.result, answer.result_source, answer.diagnostic = rejection.value
    return bytes(A_ASSOCIATE_RJ(answer).encode())


def _user_information() -> list[object]:
    """Maximum length and implementation (PS3.7 D.3.3.1 and D.3.3.2)."""
    length = MaximumLengthNotification()
    length.maximum_length_received = MAX_PDU_BYTES
    implementation = ImplementationClassUIDNotification()
    implementation.implementation_class_uid = uids.IMPLEMENTATION_CLASS_UID
    version = ImplementationVersionNameNotification()
    version.implementation_version_name = uids.IMPLEMENTATION_VERSION_NAME
    return [length, implementation, version]
