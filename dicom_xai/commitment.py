"""Storage commitment: what is asked and reported (PS3.4 Annex J), to and from bytes.

Read and written by structure: a data set library makes an object of a kilobyte out of every item
of eight bytes, and who sends these items may be anybody.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from dicom_xai import uids
from dicom_xai.errors import CannotUnderstandError
from dicom_xai.study import Reference

#: Storage Commitment Push Model, and its one well-known instance (PS3.4 J.3.5).
PUSH_MODEL = "1.2.840.10008.1.20.1"
PUSH_MODEL_INSTANCE = "1.2.840.10008.1.20.1.1"
#: Request Storage Commitment, the only action type (PS3.4 Table J.3-1).
ACTION_TYPE = 1
#: How data sets of the service may be encoded.
SYNTAXES: tuple[str, ...] = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
#: The longest data set that is read: about 15,000 references.
MAX_DATA_SET_BYTES = 2_000_000

_TRANSACTION_UID = 0x00081195
_FAILED_SEQUENCE = 0x00081198
_REFERENCED_SEQUENCE = 0x00081199
_SOP_CLASS_UID = 0x00081150
_SOP_INSTANCE_UID = 0x00081155
_FAILURE_REASON = 0x00081197
_VALUES = frozenset([_TRANSACTION_UID, _SOP_CLASS_UID, _SOP_INSTANCE_UID, _FAILURE_REASON])

_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
_LONG_FORM = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())  # PS3.5 7.1.2
_MAX_DEPTH = 8


class EventType(IntEnum):
    """Of a report (PS3.4 Table J.3-3)."""

    COMMITTED = 1  #: all that was asked for
    FAILURES_EXIST = 2


class FailureReason(IntEnum):
    """Why an object is not committed (PS3.3 C.14.1.1)."""

    PROCESSING_FAILURE = 0x0110
    NO_SUCH_OBJECT_INSTANCE = 0x0112
    CLASS_INSTANCE_CONFLICT = 0x0119
    SOP_CLASS_NOT_SUPPORTED = 0x0122
    DUPLICATE_TRANSACTION_UID = 0x0131
    RESOURCE_LIMITATION = 0x0213


@dataclass(frozen=True, slots=True)
class CommitmentRequest:
    """The action information of an N-ACTION."""

    transaction_uid: str
    references: tuple[Reference, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """An object that is not committed; `reason` is a `FailureReason` or another number."""

    reference: Reference
    reason: int


@dataclass(frozen=True, slots=True)
class CommitmentReport:
    """The event information of an N-EVENT-REPORT."""

    transaction_uid: str
    committed: tuple[Reference, ...]
    failed: tuple[Failure, ...]

    @property
    def event_type(self) -> EventType:
        """What it is sent as."""
        return EventType.FAILURES_EXIST if self.failed else EventType.COMMITTED


def read_request(data_set: bytes, transfer_syntax: str) -> CommitmentRequest:
    """What an N-ACTION asks for (PS3.4 Table J.3-2).

    Raises
    ------
    CannotUnderstandError
        It is cut off or malformed, has no transaction UID, or names no object.
    """
    transaction_uid, references, _ = _read(data_set, transfer_syntax)
    if not references:
        raise CannotUnderstandError("the request names no object: ReferencedSOPSequence is empty")
    return CommitmentRequest(transaction_uid, references)


def read_report(data_set: bytes, transfer_syntax: str) -> CommitmentReport:
    """What an N-EVENT-REPORT says (PS3.4 Table J.3-4); its lists decide, not its event type.

    Raises
    ------
    CannotUnderstandError
        It is cut off or malformed, or has no transaction UID.
    """
    return CommitmentReport(*_read(data_set, transfer_syntax))


def written(content: CommitmentRequest | CommitmentReport, transfer_syntax: str) -> bytes:
    """The data set of a request or a report."""
    is_explicit = transfer_syntax != ImplicitVRLittleEndian
    if isinstance(content, CommitmentRequest):
        good = content.references
        bad: tuple[Failure, ...] = ()
    else:
        good, bad = content.committed, content.failed
    data_set = _element(_TRANSACTION_UID, b"UI", _ui(content.transaction_uid), is_explicit)
    if bad:
        failed = [_item(each.reference, is_explicit, each.reason) for each in bad]
        data_set += _element(_FAILED_SEQUENCE, b"SQ", b"".join(failed), is_explicit)
    if good:
        held = [_item(each, is_explicit) for each in good]
        data_set += _element(_REFERENCED_SEQUENCE, b"SQ", b"".join(held), is_explicit)
    return data_set


def _item(reference: Reference, is_explicit: bool, reason: int | None = None) -> bytes:
    body = _element(_SOP_CLASS_UID, b"UI", _ui(reference.sop_class_uid), is_explicit)
    body += _element(_SOP_INSTANCE_UID, b"UI", _ui(reference.sop_instance_uid), is_explicit)
    if reason is not None:
        body += _element(_FAILURE_REASON, b"US", struct.pack("<H", reason), is_explicit)
    return _tag(_ITEM) + struct.pack("<L", len(body)) + body


def _element(tag: int, vr: bytes, value: bytes, is_explicit: bool) -> bytes:
    if not is_explicit:
        return _tag(tag) + struct.pack("<L", len(value)) + value
    if vr in _LONG_FORM:
        return _tag(tag) + vr + struct.pack("<HL", 0, len(value)) + value
    return _tag(tag) + vr + struct.pack("<H", len(value)) + value


def _tag(tag: int) -> bytes:
    return struct.pack("<HH", tag >> 16, tag & 0xFFFF)


def _ui(uid: str) -> bytes:
    value = uid.encode("ascii")
    return value + b"\0" * (len(value) % 2)


def _read(
    data_set: bytes, transfer_syntax: str
) -> tuple[str, tuple[Reference, ...], tuple[Failure, ...]]:
    walker = _Walker(data_set, transfer_syntax != ImplicitVRLittleEndian)
    held: list[Reference] = []
    failed: list[Failure] = []
    wanted: dict[int, Callable[[dict[int, bytes]], None]] = {
        _REFERENCED_SEQUENCE: lambda item: held.append(_reference(item)),
        _FAILED_SEQUENCE: lambda item: failed.append(Failure(_reference(item), _reason(item))),
    }
    values = walker.elements(len(data_set), 0, wanted)
    return _uid_in(values, _TRANSACTION_UID), tuple(held), tuple(failed)


def _reference(item: dict[int, bytes]) -> Reference:
    return Reference(_uid_in(item, _SOP_CLASS_UID), _uid_in(item, _SOP_INSTANCE_UID))


def _reason(item: dict[int, bytes]) -> int:
    value = item.get(_FAILURE_REASON, b"")  # without a reason it has failed all the same
    return int.from_bytes(value, "little") if len(value) == 2 else FailureReason.PROCESSING_FAILURE


def _uid_in(values: dict[int, bytes], tag: int) -> str:
    uid = values.get(tag, b"").rstrip(b"\0 ").decode("ascii", "replace")
    if not uids.is_valid(uid):
        raise CannotUnderstandError(
            f"({tag >> 16:04X},{tag & 0xFFFF:04X}) is absent or no valid UID of PS3.5 9.1"
        )
    return uid


class _Walker:
    """Goes once over a little endian data set (PS3.5 7.1 and 7.5)."""

    def __init__(self, data: bytes, is_explicit: bool) -> None:
        self._data = data
        self._is_explicit = is_explicit
        self._at = 0

    def elements(
        self,
        end: int | None,
        depth: int,
        wanted: dict[int, Callable[[dict[int, bytes]], None]],
    ) -> dict[int, bytes]:
        """The values that matter up to `end`, or up to the delimiter where there is none.

        The items of the sequences in `wanted` are handed on as they are met.
        """
        values: dict[int, bytes] = {}
        while end is None or self._at < end:
            tag = self._tag()
            if tag == _ITEM_END and end is None:
                self._take(4)
                return values
            vr, length = self._length()
            take = wanted.get(tag)
            if take is not None or length == _UNDEFINED:
                if vr not in (b"SQ", b""):
                    raise _malformed()
                self._items(None if length == _UNDEFINED else self._at + length, depth + 1, take)
            elif tag in _VALUES:
                values[tag] = self._take(length)
            else:
                self._take(length)
        if self._at != end:
            raise _malformed()
        return values

    def _items(
        self, end: int | None, depth: int, take: Callable[[dict[int, bytes]], None] | None
    ) -> None:
        if depth > _MAX_DEPTH:
            raise _malformed()
        while end is None or self._at < end:
            tag = self._tag()
            (length,) = struct.unpack("<L", self._take(4))
            if tag == _SEQUENCE_END and end is None:
                return
            if tag != _ITEM:
                raise _malformed()
            item = self.elements(None if length == _UNDEFINED else self._at + length, depth, {})
            if take is not None:
                take(item)
        if self._at != end:
            raise _malformed()

    def _length(self) -> tuple[bytes, int]:
        if not self._is_explicit:
            return b"", int(struct.unpack("<L", self._take(4))[0])
        vr = self._take(2)
        if vr in _LONG_FORM:
            return vr, int(struct.unpack("<2xL", self._take(6))[0])
        return vr, int(struct.unpack("<H", self._take(2))[0])

    def _tag(self) -> int:
        group, element = struct.unpack("<HH", self._take(4))
        return int(group << 16 | element)

    def _take(self, length: int) -> bytes:
        part = self._data[self._at : self._at + length]
        if len(part) != length:
            raise _malformed()
        self._at += length
        return part


def _malformed() -> CannotUnderstandError:
    return CannotUnderstandError(
        "the data set is cut off or malformed: storage commitment (PS3.4 J.3) was wanted"
    )
