"""The words of DIMSE that both faces share: status codes, what is served, socket options.

No association lives here: the receiver's are in `receive.association`, the sender's in
`deliver.requestor`. What is served is data, so that the conformance statement and the tests read
the same tables as the wire does.
"""

from __future__ import annotations

import socket
import traceback
from collections.abc import Iterable
from enum import Enum, IntEnum, StrEnum
from typing import TYPE_CHECKING

from pydicom import uid
from pynetdicom.presentation import build_context
from pynetdicom.sop_class import Verification

from dicom_xai import commitment, uids
from dicom_xai.errors import (
    CannotUnderstandError,
    DataSetMismatchError,
    DuplicateInstanceError,
    OutOfResourcesError,
    RefusedError,
)

if TYPE_CHECKING:
    from pynetdicom.presentation import PresentationContext

#: The longest P-DATA-TF that we ask for and take (PS3.8 D.1). More gains nothing measurable.
MAX_PDU_BYTES = 131_072
#: The longest data set that we take: a value length below 0xFFFFFFFF could claim 4 GB.
MAX_MESSAGE_BYTES = 2_000_000_000


class Status(IntEnum):
    """Response statuses that we send or understand (PS3.4 B.2.3, PS3.7 Annex C).

    The storage service's own failures are ranges: A7xx, A9xx and Cxxx.
    """

    SUCCESS = 0x0000
    OPTIONAL_ATTRIBUTES_UNSUPPORTED = 0x0001
    ATTRIBUTE_LIST_ERROR = 0x0107
    PROCESSING_FAILURE = 0x0110
    DUPLICATE_SOP_INSTANCE = 0x0111
    NO_SUCH_SOP_INSTANCE = 0x0112
    NO_SUCH_EVENT_TYPE = 0x0113
    INVALID_ARGUMENT_VALUE = 0x0115
    ATTRIBUTE_VALUE_OUT_OF_RANGE = 0x0116
    SOP_CLASS_NOT_SUPPORTED = 0x0122
    NO_SUCH_ACTION = 0x0123
    NOT_AUTHORIZED = 0x0124
    RESOURCE_LIMITATION = 0x0213
    OUT_OF_RESOURCES = 0xA700
    DATA_SET_MISMATCH = 0xA900
    COERCION_OF_DATA_ELEMENTS = 0xB000
    ELEMENTS_DISCARDED = 0xB006
    DATA_SET_MISMATCH_WARNING = 0xB007
    CANNOT_UNDERSTAND = 0xC000


_GENERAL_WARNINGS = (
    Status.OPTIONAL_ATTRIBUTES_UNSUPPORTED,
    Status.ATTRIBUTE_LIST_ERROR,
    Status.ATTRIBUTE_VALUE_OUT_OF_RANGE,
)
_GENERAL_TRANSIENT = (Status.PROCESSING_FAILURE, Status.RESOURCE_LIMITATION)
_STATUS_OF: tuple[tuple[type[RefusedError], Status], ...] = (
    (OutOfResourcesError, Status.OUT_OF_RESOURCES),
    (DataSetMismatchError, Status.DATA_SET_MISMATCH),
    (CannotUnderstandError, Status.CANNOT_UNDERSTAND),
    (DuplicateInstanceError, Status.DUPLICATE_SOP_INSTANCE),
)


def status_of(error: RefusedError) -> Status:
    """The status by which a peer is told about a refusal; 0x0110 for one without its own."""
    for kind, status in _STATUS_OF:
        if isinstance(error, kind):
            return status
    return Status.PROCESSING_FAILURE


class Answer(StrEnum):
    """What a destination's status means for the object that we sent."""

    DELIVERED = "delivered"
    WARNING = "warning"  #: stored, with a remark: delivered
    TRANSIENT = "transient"  #: send it again later
    PERMANENT = "permanent"  #: sending it again changes nothing

    @property
    def is_delivered(self) -> bool:
        """Whether the destination holds the object."""
        return self in (Answer.DELIVERED, Answer.WARNING)


def answer_of(status: int, *, is_resend: bool = False) -> Answer:
    """Classify a C-STORE response (PS3.4 Table B.2-1, PS3.7 Annex C).

    Parameters
    ----------
    status : int
        Of the response.
    is_resend : bool
        We sent these bytes before, perhaps without seeing the answer: 0x0111 then says that they
        arrived.

    Notes
    -----
    A failure that names the object or our right to send it is permanent. Everything else, codes
    that nobody defined too, is tried again: giving up on an unknown word would lose a result.
    """
    if status == Status.SUCCESS:
        return Answer.DELIVERED
    if status & 0xF000 == 0xB000 or status in _GENERAL_WARNINGS:
        return Answer.WARNING
    if status == Status.DUPLICATE_SOP_INSTANCE:
        return Answer.DELIVERED if is_resend else Answer.PERMANENT
    if status & 0xF000 == 0xC000 or status & 0xFF00 == 0xA900:
        return Answer.PERMANENT
    if status & 0xFF00 in (0x0100, 0x0200) and status not in _GENERAL_TRANSIENT:
        return Answer.PERMANENT
    return Answer.TRANSIENT


class Rejection(Enum):
    """A-ASSOCIATE-RJ: result, source, reason (PS3.8 Table 9-21)."""

    CALLING_AE_TITLE = (1, 1, 3)  #: permanent, service user, calling AE title not recognised
    CALLED_AE_TITLE = (1, 1, 7)  #: permanent, service user, called AE title not recognised
    PROTOCOL_VERSION = (1, 2, 2)  #: permanent, service provider (ACSE), version not supported
    TEMPORARY_CONGESTION = (2, 3, 1)  #: transient, presentation
    LOCAL_LIMIT_EXCEEDED = (2, 3, 2)  #: transient, presentation


#: Of objects without pixels too. Big endian is retired but archives still send it.
UNCOMPRESSED: tuple[str, ...] = (
    uid.ExplicitVRLittleEndian,
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
)
#: Taken in this order, whatever a peer's: what is cheapest to decode first, lossless before lossy.
#: Milliseconds for a 512 x 512 CT slice stand behind each, one core.
TRANSFER_SYNTAXES: tuple[str, ...] = (
    *UNCOMPRESSED,
    uid.RLELossless,  # 0.8
    uid.DeflatedExplicitVRLittleEndian,  # 1.9
    uid.JPEGLosslessSV1,  # 2.1
    uid.JPEGLossless,
    uid.HTJ2KLossless,  # 2.9
    uid.HTJ2KLosslessRPCL,
    uid.JPEGLSLossless,  # 4.4
    uid.JPEG2000Lossless,  # 22
    uid.JPEGBaseline8Bit,  # 0.4
    uid.JPEGExtended12Bit,  # 1.0
    uid.HTJ2K,
    uid.JPEGLSNearLossless,
    uid.JPEG2000,
)

#: Where nothing could be compressed but the data set itself.
WITHOUT_PIXELS: tuple[str, ...] = (*UNCOMPRESSED, uid.DeflatedExplicitVRLittleEndian)

#: Images that routes can match.
IMAGE_CLASSES: tuple[str, ...] = (
    uid.ComputedRadiographyImageStorage,
    uid.DigitalXRayImageStorageForPresentation,
    uid.DigitalXRayImageStorageForProcessing,
    uid.DigitalMammographyXRayImageStorageForPresentation,
    uid.DigitalMammographyXRayImageStorageForProcessing,
    uid.CTImageStorage,
    uid.EnhancedCTImageStorage,
    uid.MRImageStorage,
    uid.EnhancedMRImageStorage,
    uid.UltrasoundImageStorage,
    uid.UltrasoundMultiFrameImageStorage,
    uid.SecondaryCaptureImageStorage,
    uid.MultiFrameSingleBitSecondaryCaptureImageStorage,
    uid.MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    uid.MultiFrameTrueColorSecondaryCaptureImageStorage,
)

_STORAGE = "1.2.840.10008.5.1.4.1.1"

#: Kinds of `receive.accept_and_ignore`, with the SOP classes that each stands for (PS3.4 B.5).
IGNORED_CLASSES: dict[str, tuple[str, ...]] = {
    "SR": tuple(
        f"{_STORAGE}.88.{leaf}"
        for leaf in (11, 22, 33, 34, 35, 40, 50, 65, 67, 68, 69, 70, 71, 72, 73, 74, 75, 76)
    ),
    "PR": tuple(f"{_STORAGE}.11.{leaf}" for leaf in range(1, 13)),
    "KO": (f"{_STORAGE}.88.59",),
    "SEG": (f"{_STORAGE}.66.4", f"{_STORAGE}.66.5", uids.LABEL_MAP_SEGMENTATION_STORAGE),
    "DOC": tuple(f"{_STORAGE}.104.{leaf}" for leaf in range(1, 6)),
}

#: Classes whose objects hold (7FE0,0010): without it one of these is not whole.
PIXEL_CLASSES = frozenset(IMAGE_CLASSES) | {
    f"{_STORAGE}.66.4",
    uids.LABEL_MAP_SEGMENTATION_STORAGE,
}


def ignored_kind(sop_class_uid: str) -> str | None:
    """The kind of `accept_and_ignore` to which a SOP class belongs, or None for an image."""
    for kind, classes in IGNORED_CLASSES.items():
        if sop_class_uid in classes:
            return kind
    return None


def acceptor_contexts(ignored_kinds: Iterable[str]) -> list[PresentationContext]:
    """What a listener agrees to: Verification, storage commitment, images, and kinds kept unrouted.

    Few contexts on purpose: 120 classes with 45 syntaxes cost 48 ms of CPU for each connection.
    """
    ignored = [abstract for kind in ignored_kinds for abstract in IGNORED_CLASSES[kind]]
    syntaxes = {
        abstract: TRANSFER_SYNTAXES if abstract in PIXEL_CLASSES else WITHOUT_PIXELS
        for abstract in (*IMAGE_CLASSES, *ignored)
    }
    contexts = [build_context(abstract, list(taken)) for abstract, taken in syntaxes.items()]
    return [build_context(Verification, list(UNCOMPRESSED)), commitment_context(), *contexts]


def commitment_context() -> PresentationContext:
    """Storage commitment in both roles: peers ask us, and report to us (PS3.4 J.3, PS3.7 D.3.3.4).

    Who opens an association only to report is its SCP and says so by role selection.
    """
    context = build_context(commitment.PUSH_MODEL, list(commitment.SYNTAXES))
    context.scu_role = context.scp_role = True
    return context


def trace_of(error: BaseException) -> str:
    """Where an unforeseen error came from, for logs: its class and its stack, not its message.

    The message of somebody else's exception may quote the value that it stumbled over, and that
    value may be a patient's name.
    """
    stack = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    return f"{type(error).__name__}\n{stack}"


def make_eager(sock: socket.socket) -> None:
    """Send small writes at once, acknowledge at once.

    DCMTK and Orthanc write a message in two parts with Nagle's algorithm on, so each part waits
    for a delayed acknowledgement: 40 ms an object, more than inference. Ours to prevent:
    TCP_NODELAY for what we write, TCP_QUICKACK for what they wait for. The kernel clears the
    latter by itself, therefore it is set again after each transfer.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    acknowledge_now(sock)


def acknowledge_now(sock: socket.socket) -> None:
    """Set TCP_QUICKACK where the system has it (Linux)."""
    if hasattr(socket, "TCP_QUICKACK"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
