"""Is this data set whole? A strict walk over its bytes, and the header for routing.

pydicom reads as far as it can: a data set cut in the middle parses without a word, and a server
built on that answers Success to half an image. So every element is walked here, to the last byte,
before anything is stored; compressed pixels fragment by fragment. Pixels are never decoded and
never copied.

What a walk cannot see: a data set that ends exactly between two elements and holds all that its
SOP class needs. For image classes that is impossible before PixelData, the last element of use.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from functools import cache, cached_property
from io import BytesIO
from typing import NamedTuple

from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException
from pydicom.filereader import read_dataset
from pydicom.uid import UID

from dicom_xai import uids
from dicom_xai.dimse import PIXEL_CLASSES
from dicom_xai.errors import CannotUnderstandError, DataSetMismatchError

#: Sequences in sequences; real objects stay below 10, pydicom's recursion ends near 249.
MAX_DEPTH = 32
#: Elements in one data set, nested ones included; an enhanced object of 5000 frames has 400,000.
MAX_ELEMENTS = 500_000
#: A header's element or sequence longer than this is left out of what `inspect` gives: no route
#: asks for it, and it may be a document of hundreds of megabytes, or a million empty items.
LONGEST_VALUE_BYTES = 32_768
#: All elements of a header that are shorter than that; real ones stay below 200 kB. As a data set
#: of pydicom's it takes up to 80 times as much memory.
MAX_HEADER_BYTES = 640_000

_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_PIXEL_DATA = 0x7FE00010
_PIXEL_GROUP = 0x7FE0
STUDY_INSTANCE_UID, SERIES_INSTANCE_UID = 0x0020000D, 0x0020000E
_UIDS = {
    "SOPClassUID": 0x00080016,
    "SOPInstanceUID": 0x00080018,
    "StudyInstanceUID": STUDY_INSTANCE_UID,
    "SeriesInstanceUID": SERIES_INSTANCE_UID,
}
_SAMPLES_PER_PIXEL, _PHOTOMETRIC_INTERPRETATION = 0x00280002, 0x00280004
_NUMBER_OF_FRAMES, _ROWS, _COLUMNS = 0x00280008, 0x00280010, 0x00280011
_BITS_ALLOCATED = 0x00280100
#: What pydicom raises on a header that is whole and makes no sense, a character set of floats say.
_UNREADABLE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    OSError,  # a sequence that is none; there is no file to fail
    NotImplementedError,
    BytesLengthException,
    struct.error,
)
_BULK = {0x7FE00008, 0x7FE00009, _PIXEL_DATA}
_FIRST_DATA_GROUP = 0x0008

# PS3.5 7.1.2: VRs with two reserved bytes and a 32-bit length, and those with a 16-bit length
_LONG_VRS = frozenset(
    vr.encode() for vr in ("OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR")
) | {b"UT", b"UV"}
_SHORT_VRS = frozenset(
    vr.encode()
    for vr in ("AE", "AS", "AT", "CS", "DA", "DS", "DT", "FL", "FD", "IS", "LO", "LT", "PN")
) | {b"SH", b"SL", b"SS", b"ST", b"TM", b"UI", b"UL", b"US"}


class Header:
    """What stands before the pixels: as it was encoded, and as a data set once somebody asks.

    pydicom takes five times as long to read a header as the walk over it, and the slices of a
    series differ in little that anybody asks about.

    Parameters
    ----------
    elements : mapping of int to (bytes, int)
        By tag, in ascending order: an element as encoded, and where in it the value starts.
    is_implicit, is_little : bool
        How they are encoded.
    """

    def __init__(
        self, elements: Mapping[int, tuple[bytes, int]], is_implicit: bool, is_little: bool
    ) -> None:
        self._elements = elements
        self._is_implicit = is_implicit
        self.is_little = is_little

    def element(self, tag: int) -> bytes:
        """A whole element as encoded, tag and length with it; empty where it is absent."""
        return self._elements.get(tag, (b"", 0))[0]

    def value(self, tag: int) -> bytes:
        """The received bytes of a value; empty where it is absent or of undefined length."""
        encoded, start = self._elements.get(tag, (b"", 0))
        return encoded[start:]

    def text(self, tag: int) -> str:
        """A value of ASCII without its padding."""
        return self.value(tag).strip(b" \0").decode("ascii", "replace")

    @cached_property
    def data_set(self) -> Dataset:
        """All of it.

        Raises
        ------
        CannotUnderstandError
            It is whole, and pydicom makes no sense of it.
        """
        encoded = b"".join([element for element, _ in self._elements.values()])
        try:
            return read_dataset(BytesIO(encoded), self._is_implicit, self.is_little)
        except _UNREADABLE as error:
            raise CannotUnderstandError("whole, but no reader makes sense of its header") from error


def inspect(
    data_set: bytes | memoryview,
    transfer_syntax_uid: str,
    sop_class_uid: str,
    sop_instance_uid: str,
) -> Header:
    """The header of a whole and consistent data set.

    Parameters
    ----------
    data_set : bytes or memoryview
        As received, but inflated: no preamble, no file meta. A view is let go of, and mostly not
        looked at.
    transfer_syntax_uid : str
        Of the accepted presentation context.
    sop_class_uid, sop_instance_uid : str
        From the command set.

    Returns
    -------
    Header
        The elements before group 7FE0, but for values above `LONGEST_VALUE_BYTES`; the pixels stay
        where they are.

    Raises
    ------
    CannotUnderstandError
        Not whole, not well formed, too deep, or without valid UIDs; the peer gets 0xC000.
    DataSetMismatchError
        Command and data set name different objects; the peer gets 0xA900.
    """
    little, implicit, encapsulated = _form_of(transfer_syntax_uid)
    walked = _walk(data_set, implicit, little, encapsulated)
    header = Header(_copied(data_set, walked.places), implicit, little)
    if walked.has_open_sequence:
        header.data_set  # noqa: B018  # what is nested there, pydicom reads at once or not at all
    _check_uids(header, sop_class_uid, sop_instance_uid)
    if sop_class_uid in PIXEL_CLASSES:
        _check_pixels(header, walked.pixels, encapsulated)
    return header


@cache
def _form_of(transfer_syntax_uid: str) -> tuple[bool, bool, bool]:
    """Is it little endian, of implicit VR, with encapsulated pixels?"""
    syntax = UID(transfer_syntax_uid)
    return syntax.is_little_endian, syntax.is_implicit_VR, syntax.is_encapsulated


def file_meta(
    transfer_syntax_uid: str, sop_class_uid: str, sop_instance_uid: str, calling_ae_title: str
) -> bytes:
    """What stands before the data set in a stored file: preamble and file meta (PS3.10 7.1)."""
    elements = b"".join(
        (
            _meta_element(0x0001, b"OB", b"\x00\x01"),
            _meta_element(0x0002, b"UI", sop_class_uid.encode("ascii")),
            _meta_element(0x0003, b"UI", sop_instance_uid.encode("ascii")),
            _meta_element(0x0010, b"UI", transfer_syntax_uid.encode("ascii")),
            _meta_element(0x0012, b"UI", uids.IMPLEMENTATION_CLASS_UID.encode("ascii")),
            _meta_element(0x0013, b"SH", uids.IMPLEMENTATION_VERSION_NAME.encode("ascii")),
            _meta_element(0x0016, b"AE", calling_ae_title.encode("ascii", "replace")),
        )
    )
    length = _meta_element(0x0000, b"UL", struct.pack("<L", len(elements)))
    return b"\x00" * 128 + b"DICM" + length + elements


def _meta_element(element: int, vr: bytes, value: bytes) -> bytes:
    if len(value) % 2:
        value += b"\x00" if vr in (b"UI", b"OB") else b" "
    if vr in _LONG_VRS:
        return struct.pack("<HH2sHL", 2, element, vr, 0, len(value)) + value
    return struct.pack("<HH2sH", 2, element, vr, len(value)) + value


class _Walked(NamedTuple):
    """What a walk saw.

    `places` is by tag where each element of the header starts, where its value does, and where it
    ends; without those that are too long. `pixels` counts PixelData in bytes, or in fragments where
    it is encapsulated; None where there is none.
    """

    places: dict[int, tuple[int, int, int]]
    pixels: int | None
    has_open_sequence: bool  #: of undefined length, in the header


def _copied(
    data: bytes | memoryview, places: Mapping[int, tuple[int, int, int]]
) -> dict[int, tuple[bytes, int]]:
    """The elements of the header by tag, each with where its value starts."""
    size = sum(stop - start for start, _, stop in places.values())
    if size > MAX_HEADER_BYTES:
        raise _too_long(size)
    return {
        tag: (bytes(data[start:stop]), value - start)
        for tag, (start, value, stop) in places.items()
    }


def _walk(data: bytes | memoryview, implicit: bool, little: bool, encapsulated: bool) -> _Walked:
    """Every element to the last byte.

    One pass without recursion. A container is ``(end, limit, is_sequence, implicit)``: its end
    where the length is defined, else None; and the nearest end that encloses it.
    """
    size = len(data)
    order = "<" if little else ">"
    tag_and_length = struct.Struct(order + "HHL").unpack_from
    tag_vr_length = struct.Struct(order + "HH2sH").unpack_from
    long_length = struct.Struct(order + "L").unpack_from
    stack: list[tuple[int | None, int, bool, bool]] = []
    end: int | None = size
    limit, is_sequence = size, False
    position = elements = root = 0
    is_header, has_open_sequence = True, False
    pixels: int | None = None
    seen: set[int] = set()
    places: dict[int, tuple[int, int, int]] = {}

    while True:
        while position == end:
            if not stack:
                return _Walked(places, pixels, has_open_sequence)
            end, limit, is_sequence, implicit = stack.pop()
        start = position
        if limit - position < 8:
            raise _not_whole(start, "an element's tag and length", 8, limit - position)
        elements += 1  # items too: a million empty ones are a million objects to a reader
        if elements > MAX_ELEMENTS:
            raise CannotUnderstandError(
                f"more than {MAX_ELEMENTS} elements, at most so many are read"
            )

        if is_sequence:
            group, element, length = tag_and_length(data, position)
            position += 8
            tag = group << 16 | element
            if tag == _ITEM:
                stack.append((end, limit, is_sequence, implicit))
                end = None if length == _UNDEFINED else position + length
                if end is not None:
                    if end > limit:
                        raise _not_whole(start, "a sequence item", length, limit - position)
                    limit = end
                is_sequence = False
            elif tag == _SEQUENCE_END and end is None and length == 0:
                end, limit, is_sequence, implicit = stack.pop()
                if not stack and is_header:
                    root_start = places[root][0]
                    places[root] = (root_start, position, position)
                    if position - root_start > LONGEST_VALUE_BYTES:
                        del places[root]
            else:
                raise CannotUnderstandError(
                    f"byte {start}: found {_name(tag)} where a sequence item was wanted"
                )
            continue

        if implicit:
            group, element, length = tag_and_length(data, position)
            vr = b""
            position += 8
        else:
            group, element, vr, length = tag_vr_length(data, position)
            position += 8
            if vr in _LONG_VRS:
                if limit - position < 4:
                    raise _not_whole(start, "an element's length", 4, limit - position)
                (length,) = long_length(data, position)
                position += 4
            elif vr not in _SHORT_VRS:
                # item delimiters carry no VR, whatever the transfer syntax (PS3.5 7.5)
                if group != 0xFFFE:
                    raise CannotUnderstandError(
                        f"byte {start}: {_name(group << 16 | element)} has no known VR, "
                        "a two-letter VR of PS3.5 6.2 was wanted"
                    )
                (length,) = long_length(data, position - 4)
        tag = group << 16 | element

        if group == 0xFFFE:
            if tag != _ITEM_END or not stack or end is not None or length:
                raise CannotUnderstandError(f"byte {start}: {_name(tag)} stands outside a sequence")
            end, limit, is_sequence, implicit = stack.pop()
            continue

        if not stack:
            if group < _FIRST_DATA_GROUP:
                raise CannotUnderstandError(
                    f"byte {start}: {_name(tag)} belongs to a command or a file, not to a data set"
                )
            if tag in seen or (not is_header and group < _PIXEL_GROUP):
                raise CannotUnderstandError(
                    f"byte {start}: {_name(tag)} comes twice or after the pixels, "
                    "elements in ascending order were wanted"
                )
            seen.add(tag)
            is_header = is_header and group < _PIXEL_GROUP
            if is_header:
                root = tag
                places[tag] = (start, position, position + length)
                if 8 * len(places) > MAX_HEADER_BYTES:  # the shortest element has 8 bytes
                    raise _too_long(position)
            if tag in _BULK:
                pixels = length
                if encapsulated and (tag != _PIXEL_DATA or length != _UNDEFINED):
                    raise CannotUnderstandError(
                        f"byte {start}: {_name(tag)} has a defined length, fragments were wanted "
                        "in a compressed transfer syntax"
                    )

        if length == _UNDEFINED:
            if tag == _PIXEL_DATA and encapsulated:
                # an icon's may be encapsulated too, inside its sequence (PS3.5 A.4)
                position, fragments = _fragments(data, position, limit)
                if not stack:
                    pixels = fragments
                elements += fragments
                continue
            if tag in _BULK or (vr and vr not in (b"SQ", b"UN")):
                raise CannotUnderstandError(
                    f"byte {start}: {_name(tag)} has no defined length, which an uncompressed "
                    "transfer syntax does not allow"
                )
            opens, new_end = True, None
            has_open_sequence = has_open_sequence or (is_header and not stack)
        else:
            new_end = position + length
            if new_end > limit:
                raise _not_whole(start, _name(tag), length, limit - position)
            opens = vr == b"SQ" or (not vr and length > 0 and _is_sequence(tag))
            if length > LONGEST_VALUE_BYTES and not stack and is_header:
                del places[tag]
        if not opens:
            position += length
            continue
        if len(stack) >= 2 * MAX_DEPTH:
            raise CannotUnderstandError(f"sequences nested deeper than {MAX_DEPTH} levels")
        stack.append((end, limit, is_sequence, implicit))
        # UN with undefined length holds implicit VR whatever surrounds it (PS3.5 6.2.2)
        implicit = implicit or vr == b"UN"
        end, is_sequence = new_end, True
        limit = limit if end is None else end


def _fragments(data: bytes | memoryview, position: int, limit: int) -> tuple[int, int]:
    """Where encapsulated pixel data ends, and how many fragments it has (PS3.5 A.4)."""
    items = 0
    while True:
        if limit - position < 8:
            raise _not_whole(position, "a fragment's tag and length", 8, limit - position)
        group, element, length = struct.unpack_from("<HHL", data, position)
        tag = group << 16 | element
        position += 8
        if tag == _SEQUENCE_END and length == 0:
            # the first item is the basic offset table
            return position, max(0, items - 1)
        if tag != _ITEM:
            raise CannotUnderstandError(
                f"byte {position - 8}: found {_name(tag)} where a fragment was wanted"
            )
        if length > limit - position:
            raise _not_whole(position - 8, "a fragment", length, limit - position)
        position += length
        items += 1


def _is_sequence(tag: int) -> bool:
    try:
        return bool(dictionary_VR(tag) == "SQ")
    except KeyError:
        return False


def _not_whole(position: int, what: str, wanted: int, found: int) -> CannotUnderstandError:
    return CannotUnderstandError(
        f"byte {position}: {what} claims {wanted} bytes, {max(found, 0)} are there: "
        "the data set is truncated or its lengths are wrong"
    )


def _too_long(size: int) -> CannotUnderstandError:
    return CannotUnderstandError(
        f"the header has {size} bytes, at most {MAX_HEADER_BYTES} are read"
    )


def _name(tag: int) -> str:
    return f"({tag >> 16:04X},{tag & 0xFFFF:04X})"


def _check_uids(header: Header, sop_class_uid: str, sop_instance_uid: str) -> None:
    found: dict[str, str] = {}
    for keyword, tag in _UIDS.items():
        value = header.text(tag)
        if not uids.is_valid(value):
            raise CannotUnderstandError(
                f"{keyword} is {'absent' if not value else 'no valid UID'}, "
                "a UID of PS3.5 9.1 was wanted"
            )
        found[keyword] = value
    for keyword, wanted in (("SOPClassUID", sop_class_uid), ("SOPInstanceUID", sop_instance_uid)):
        if not uids.is_valid(wanted):
            raise CannotUnderstandError(f"the command set's Affected {keyword} is no valid UID")
        if found[keyword] != wanted:
            raise DataSetMismatchError(
                f"{keyword} is {found[keyword]} in the data set and {wanted} in the command set"
            )


def _check_pixels(header: Header, pixels: int | None, encapsulated: bool) -> None:
    """PixelData holds at least what the header promises (PS3.3 C.7.6.3, PS3.5 8.1 and A.4).

    More is let through: some senders pad. `pixels` counts bytes, or fragments: of those every
    frame has one at least.
    """
    if pixels is None:
        raise CannotUnderstandError("an image without PixelData: the data set is truncated")
    rows, columns, samples, bits = (
        _unsigned_short(header, tag)
        for tag in (_ROWS, _COLUMNS, _SAMPLES_PER_PIXEL, _BITS_ALLOCATED)
    )
    frames_text = header.text(_NUMBER_OF_FRAMES) or "1"
    if not re.fullmatch(r"[0-9]{1,9}", frames_text):
        raise CannotUnderstandError("NumberOfFrames is no number (PS3.5 6.2, IS)")
    frames = int(frames_text)
    if encapsulated:
        if pixels < frames:
            raise CannotUnderstandError(
                f"PixelData has {pixels} fragments, at least {frames} are wanted for as many frames"
            )
        return
    if header.text(_PHOTOMETRIC_INTERPRETATION) in ("YBR_FULL_422", "YBR_PARTIAL_422"):
        samples = min(samples, 2)
    wanted = (rows * columns * samples * frames * bits + 7) // 8
    if pixels < wanted:
        raise CannotUnderstandError(
            f"PixelData has {pixels} bytes, {wanted} are wanted for {frames} frames of "
            f"{rows} x {columns} with {samples} samples of {bits} bits"
        )


def _unsigned_short(header: Header, tag: int) -> int:
    value = header.value(tag)
    if len(value) != 2:
        raise CannotUnderstandError(
            f"{_name(tag)} has {len(value)} bytes, 2 are wanted for a US (PS3.5 6.2)"
        )
    return int.from_bytes(value, "little" if header.is_little else "big")
