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


@dataclass(frozen=True, slots=True)
class Context:
    """An accepted presentation context: what may be sent in it, and how it is encoded."""

    abstract_syntax: str
    transfer_syntax: str


@dataclass(frozen=True, slots=True)
class Request:
    """An A-ASSOCIATE-RQ.

    `max_pdu_bytes` is the longest P-DATA-TF that the peer takes; 0 stands for any.
    """

    calling_ae_title: str
    called_ae_title: str
    max_pdu_bytes: int
    protocol_version: int
    primitive: A_ASSOCIATE


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
    try:
        decoded = A_ASSOCIATE_RQ()
        decoded.decode(pdu)
        primitive = decoded.to_primitive()
        return Request(
            calling_ae_title=str(primitive.calling_ae_title).strip(),
            called_ae_title=str(primitive.called_ae_title).strip(),
            max_pdu_bytes=int(primitive.maximum_length_received or 0),
            protocol_version=int(decoded.protocol_version),
            primitive=primitive,
        )
    except _MALFORMED:
        raise Breach("malformed-pdu") from None


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
