"""The identity block into a result, as bytes: Explicit VR Little Endian (PS3.5 7.1.2)."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from dicom_xai.identity.block import (
    BLOCK_TAGS,
    EMPTY_WHEN_ABSENT_TAGS,
    LONG_LENGTH,
    Block,
    Element,
    vr_of,
)


def splice(encoded: bytes, block: Block) -> bytes:
    """The data set with the block's elements in it, and no other patient or study elements.

    Parameters
    ----------
    encoded : bytes
        A data set in Explicit VR Little Endian without file meta information, or the part of it
        before the pixel data; sequences of defined length.
    block : Block
        Of the source. Type 2 elements that it lacks are written empty.

    Returns
    -------
    bytes
        In tag order, ready for `compare` after `read_block`.
    """
    pieces = {tag: piece for tag, piece in _split(encoded) if tag not in BLOCK_TAGS}
    for tag in EMPTY_WHEN_ABSENT_TAGS:
        pieces[tag] = _write(Element(tag, vr_of(tag, None), b""))
    for tag, element in block.items():
        pieces[tag] = _write(element)
    return b"".join(pieces[tag] for tag in sorted(pieces))


def _split(encoded: bytes) -> Iterable[tuple[int, bytes]]:
    at = 0
    while at < len(encoded):
        group, number, vr = struct.unpack_from("<HH2s", encoded, at)
        if vr.decode("ascii") in LONG_LENGTH:
            length, header = struct.unpack_from("<I", encoded, at + 8)[0], 12
        else:
            length, header = struct.unpack_from("<H", encoded, at + 6)[0], 8
        end = at + header + length
        if end > len(encoded):
            raise ValueError(f"element at byte {at} ends at {end} of {len(encoded)}")
        yield (group << 16) | number, encoded[at:end]
        at = end


def _write(element: Element) -> bytes:
    """One element in Explicit VR Little Endian (PS3.5 7.1.2)."""
    vr = element.vr
    if isinstance(element.value, bytes):
        value = element.value
    else:
        items = (b"".join(map(_write, item)) for item in element.value)
        value = b"".join(struct.pack("<HHI", 0xFFFE, 0xE000, len(i)) + i for i in items)
    if vr not in LONG_LENGTH and len(value) > 0xFFFE:
        vr = "UN"  # PS3.5 6.2.2: too long for a 16-bit length
    tag = struct.pack("<HH", element.tag >> 16, element.tag & 0xFFFF)
    if vr in LONG_LENGTH:
        return tag + vr.encode() + b"\0\0" + struct.pack("<I", len(value)) + value
    return tag + vr.encode() + struct.pack("<H", len(value)) + value
