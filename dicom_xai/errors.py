"""Every error this package raises, sorted by what happens next.

::

    DicomXaiError
    ├─ ConfigError                 an admin edits a file; the old config stays live
    │  ├─ RouteConfigError
    │  ├─ ModelCardError
    │  └─ UnsupportedOperatorError     the model's graph cannot be differentiated
    ├─ RefusedError                the peer is answered by ``.reason``
    │  ├─ OutOfResourcesError          0xA700: the peer may try again later
    │  ├─ DataSetMismatchError         0xA900: command and data set disagree
    │  ├─ CannotUnderstandError        0xC000: unreadable, truncated, or without UIDs
    │  └─ DuplicateInstanceError       0x0111: same UID, other content
    ├─ StudyError                  this study cannot be done; never retried; reason kept
    │  ├─ DecodeError
    │  ├─ GeometryError
    │  ├─ ModelInputError
    │  ├─ EncodeError
    │  └─ IdentityError                nothing is sent
    ├─ TransientError              retried with backoff
    │  ├─ DestinationUnavailableError
    │  │  ├─ NotReachedError             no association; nothing of the object went out
    │  │  └─ NotNowError                 one object; the destination serves others
    │  ├─ LedgerBusyError
    │  └─ DeviceBusyError
    └─ InvariantError              our bug; caught only at the top of a role

Messages name the thing, what was found, what was wanted and what to change.
They never hold patient data: no name, no identifier, no birth date.
"""

from __future__ import annotations


class DicomXaiError(Exception):
    """The root: catch it only at the top of a role or of a command."""


class ConfigError(DicomXaiError):
    """A file that an admin edits is wrong; whatever ran before goes on running."""


class RouteConfigError(ConfigError):
    """A route names something that does not exist or contradicts itself."""


class ModelCardError(ConfigError):
    """A model card and its model file do not fit each other."""


class UnsupportedOperatorError(ConfigError):
    """A model's graph holds an operator whose gradient cannot be written.

    Parameters
    ----------
    op_type, domain : str
        The operator.
    opset : int
        The opset version the model imports for `domain`.
    node : str
        The node's name, or its first output where it has none.
    remedy : str
        What the reader can do about it.
    """

    def __init__(self, op_type: str, domain: str, opset: int, node: str, remedy: str) -> None:
        self.op_type, self.domain, self.opset, self.node = op_type, domain, opset, node
        self.remedy = remedy
        name = f"{domain}.{op_type}" if domain else op_type
        super().__init__(
            f"operator {name} (opset {opset}) at node {node!r} cannot be differentiated: {remedy}"
        )


class RefusedError(DicomXaiError):
    """An object offered to us is not taken; the peer is told why.

    `reason` is a short closed word (a metric label); the DIMSE or HTTP face maps the class to a
    status code.
    """

    reason = "refused"

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        super().__init__(message)
        if reason is not None:
            self.reason = reason


class OutOfResourcesError(RefusedError):
    """There is no room for the object now (PS3.4 B.2.3, status 0xA700)."""

    reason = "out-of-resources"


class DataSetMismatchError(RefusedError):
    """Command set and data set name different objects (PS3.4 B.2.3, status 0xA900)."""

    reason = "data-set-mismatch"


class CannotUnderstandError(RefusedError):
    """The data set is unreadable, truncated or has no valid UIDs (PS3.4 B.2.3, 0xC000)."""

    reason = "cannot-understand"


class DuplicateInstanceError(RefusedError):
    """The SOP Instance UID is known with other content (PS3.7 C.5.6, status 0x0111)."""

    reason = "duplicate-conflict"


class StudyError(DicomXaiError):
    """This unit of work cannot be done, now or later; the reason is kept and shown."""


class DecodeError(StudyError):
    """Pixels cannot be turned into an array."""


class GeometryError(StudyError):
    """Frames do not form what the model needs."""


class ModelInputError(StudyError):
    """The decoded image does not fit the model's input."""


class EncodeError(StudyError):
    """A result object cannot be written."""


class IdentityError(StudyError):
    """Result and source, or the sources of one unit, differ in identity: nothing is sent."""


class TransientError(DicomXaiError):
    """It failed now and may work later; retried with backoff."""


class DestinationUnavailableError(TransientError):
    """A destination did not answer, or asked us to come back."""


class NotReachedError(DestinationUnavailableError):
    """No association with a destination could be had, so no object of ours can be the cause."""


class NotNowError(DestinationUnavailableError):
    """A destination answered that it cannot take this object now; others it may."""


class LedgerBusyError(TransientError):
    """The ledger's database is locked by somebody else for too long."""


class DeviceBusyError(TransientError):
    """The device has no room for this job now."""


class InvariantError(DicomXaiError):
    """Something that the code promises is not so: our bug."""
