"""Encapsulated Pixel Data: which bytes belong to which frame (PS3.5 A.4).

Rules: a length is believed only when the bytes are there; a table that points beside a fragment is
an error, because frames would be mixed up without anybody noticing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from dicom_xai.errors import DecodeError

_ITEM, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
_END_OF_IMAGE = b"\xff\xd9"


@dataclass(frozen=True, slots=True)
class OffsetTable:
    """Extended Offset Table and its lengths (PS3.3 C.7.6.3.1.8): little endian, 8 bytes each."""

    offsets: bytes
    lengths: bytes


@dataclass(frozen=True, slots=True)
class _Fragment:
    """One item: where its header starts, counted from the first fragment's; and its value."""

    place: int
    value: memoryview


def frames(
    data: bytes, offset: int, count: int, table: OffsetTable | None
) -> Iterator[bytes | memoryview]:
    """The compressed bytes of each frame, in order; one fragment is not copied.

    Frames are told apart by the extended table, else by the basic one; without a table they are
    the fragments, if there are as many, or all fragments are the only frame, or a frame ends with
    each fragment that ends with an end-of-image marker (JPEG, JPEG-LS, JPEG 2000).

    Parameters
    ----------
    data : bytes
        That hold the value of Pixel Data.
    offset : int
        Where the first item, the basic offset table, starts.
    count : int
        Number of frames by the header.
    table : OffsetTable or None
        The extended one, if the header has it.

    Raises
    ------
    DecodeError
        Cut off, no fragments, another number of frames than the header says, or a table that
        points beside the fragments.
    """
    basic, fragments = _parse(memoryview(data), offset)
    if not fragments:
        raise DecodeError("PixelData: no fragments")
    if table is not None:
        groups = _by_extended_table(fragments, table, count)
    elif basic:
        groups = _by_basic_table(fragments, basic, count)
    else:
        groups = _without_table(fragments, count)
    for group in groups:
        values = [fragment.value for fragment in group]
        yield values[0] if len(values) == 1 else b"".join(values)


def _parse(data: memoryview, offset: int) -> tuple[memoryview, list[_Fragment]]:
    """The basic offset table's value, and the fragments up to the sequence delimiter."""
    items: list[memoryview] = []
    places: list[int] = []
    while True:
        if len(data) - offset < 8:
            raise DecodeError("PixelData: cut off before its sequence delimiter")
        group, element, length = struct.unpack_from("<HHL", data, offset)
        tag = group << 16 | element
        if tag == _SEQUENCE_END:
            break
        if tag != _ITEM or length == _UNDEFINED:
            raise DecodeError(f"PixelData: ({group:04X},{element:04X}) where an item was wanted")
        start = offset + 8
        if length > len(data) - start:
            there = len(data) - start
            raise DecodeError(f"PixelData: a fragment claims {length} bytes, {there} are there")
        items.append(data[start : start + length])
        places.append(offset)
        offset = start + length
    if not items:
        raise DecodeError("PixelData: no basic offset table")
    first = places[1] if len(places) > 1 else 0
    pairs = zip(places[1:], items[1:], strict=True)
    return items[0], [_Fragment(place - first, value) for place, value in pairs]


def _by_extended_table(
    fragments: list[_Fragment], table: OffsetTable, count: int
) -> list[list[_Fragment]]:
    """One fragment is one frame wherever this table stands (PS3.3 C.7.6.3.1.8)."""
    if len(table.offsets) != 8 * count or len(table.lengths) != 8 * count:
        found = len(table.offsets) // 8, len(table.lengths) // 8
        raise DecodeError(
            f"ExtendedOffsetTable and its lengths have {found[0]} and {found[1]} values, "
            f"NumberOfFrames is {count}"
        )
    at = {fragment.place: fragment for fragment in fragments}
    groups = []
    offsets = struct.unpack(f"<{count}Q", table.offsets)
    lengths = struct.unpack(f"<{count}Q", table.lengths)
    for number, (offset, length) in enumerate(zip(offsets, lengths, strict=True), 1):
        fragment = at.get(offset)
        # a table may give a frame's length with or without the pad byte of its fragment
        if fragment is None or not 0 <= len(fragment.value) - length <= 1:
            raise DecodeError(f"ExtendedOffsetTable: no such fragment for frame {number}")
        groups.append([fragment])
    return groups


def _by_basic_table(
    fragments: list[_Fragment], basic: memoryview, count: int
) -> list[list[_Fragment]]:
    if len(basic) != 4 * count:
        raise DecodeError(
            f"PixelData: its basic offset table has {len(basic)} bytes, {4 * count} are wanted "
            f"for NumberOfFrames {count}"
        )
    offsets = struct.unpack(f"<{count}L", basic)
    starts = {fragment.place: index for index, fragment in enumerate(fragments)}
    indices = [starts.get(offset, -1) for offset in offsets]
    rises = all(low < high for low, high in pairwise(indices))
    if indices[0] != 0 or not rises:
        raise DecodeError("PixelData: its basic offset table points beside the fragments")
    ends = [*indices[1:], len(fragments)]
    return [fragments[start:end] for start, end in zip(indices, ends, strict=True)]


def _without_table(fragments: list[_Fragment], count: int) -> list[list[_Fragment]]:
    if count == 1:
        return [fragments]
    if len(fragments) == count:
        return [[fragment] for fragment in fragments]
    groups: list[list[_Fragment]] = [[]]
    for fragment in fragments:
        if groups[-1] and _ends_image(groups[-1][-1]):
            groups.append([])
        groups[-1].append(fragment)
    if len(groups) != count:
        raise DecodeError(
            f"PixelData: {len(fragments)} fragments without an offset table make "
            f"{len(groups)} frames, NumberOfFrames is {count}"
        )
    return groups


def _ends_image(fragment: _Fragment) -> bool:
    return bytes(fragment.value[-3:]).rstrip(b"\0\xff").endswith(_END_OF_IMAGE)
