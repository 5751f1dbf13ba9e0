"""The identity block of a stored file, by structure alone.

pydicom's reader is not used: it parses the character set and repairs what it finds.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian

from dicom_xai.errors import IdentityError
from dicom_xai.identity.block import (
    LONG_LENGTH,
    TRAVELLING_TAGS,
    Block,
    Element,
    Items,
    name_of,
    text_of,
    vr_of,
)

#: Identity stands before any pixel: no more of a deflated data set is needed, before or after.
_MAX_INFLATED_BYTES = 16_000_000
#: Tags and length that give a sequence its shape (PS3.5 7.5).
_ITEM, _ITEM_END, _SEQUENCE_END, _UNDEFINED = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD, 0xFFFFFFFF
_MAX_DEPTH = 16
#: What a file that is cut off or malformed makes of this walk.
_UNREADABLE = (
    *(EOFError, ValueError, TypeError, LookupError, AttributeError, struct.error),
    zlib.error,
)
_SWAP_BYTES = {
    **dict.fromkeys(("US", "SS", "OW", "AT"), 2),
    **dict.fromkeys(("UL", "SL", "FL", "OF", "OL"), 4),
    **dict.fromkeys(("FD", "OD", "SV", "UV", "OV"), 8),
}


class Readable(Protocol):
    """Bytes, or what gives them by and by: `spool.View`."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> bytes: ...


def read_block(file: Readable) -> Block:
    """The identity block and the place elements of a stored file, as received.

    About 0.3 ms: nothing behind the last of them is read, nor the value of anything else before.

    Parameters
    ----------
    file : bytes or spool.View
        Preamble, file meta information and data set (PS3.10 7.1), any transfer syntax.

    Raises
    ------
    IdentityError
        The file cannot be read as far as its identity goes.
    """
    try:
        return {element.tag: element for element in _travelling(file)}
    except _UNREADABLE as error:
        message = f"a file of {len(file)} bytes cannot be read for its identity"
        raise IdentityError(f"{message}: {error}") from error


def _travelling(file: Readable) -> list[Element]:
    if file[128:132] != b"DICM":
        raise EOFError("no DICM prefix")
    meta, start = _read(file, 132, len(file), _Form(False, "<"), _META_TAGS)
    syntax = text_of({element.tag: element for element in meta}, "TransferSyntaxUID")
    if syntax == DeflatedExplicitVRLittleEndian:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        deflated = file[start : start + _MAX_INFLATED_BYTES]
        file, start = inflater.decompress(deflated, _MAX_INFLATED_BYTES), 0
    # as in pydicom, what stands there wins over what the transfer syntax says
    is_implicit = not file[start + 4 : start + 6].isalpha()
    form = _Form(is_implicit, ">" if syntax == ExplicitVRBigEndian else "<")
    return _read(file, start, len(file), form, _WANTED)[0]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Which elements to keep, and the tag behind which none of them can come."""

    tags: Collection[int]
    stop: int


_META_TAGS = _Wanted(range(0x00020000, 0x00030000), 0x0002FFFF)
_WANTED = _Wanted(frozenset(TRAVELLING_TAGS), TRAVELLING_TAGS[-1])


@dataclass(frozen=True, slots=True)
class _Form:
    """How elements are encoded (PS3.5 7.1)."""

    is_implicit: bool
    order: str  #: ``<`` or ``>``
    depth: int = 0


def _read(
    data: Readable, at: int, end: int, form: _Form, wanted: _Wanted | None = None
) -> tuple[list[Element], int]:
    """The wanted elements from `at` on, not parsed, and where reading stopped."""
    last = wanted.stop if wanted else 0xFFFFFFFF
    found: list[Element] = []
    while at < end:
        group, number = struct.unpack(f"{form.order}HH", data[at : at + 4])
        tag = (group << 16) | number
        if tag == _ITEM_END:
            return found, at + 8
        if tag > last:
            break
        vr, length, at = _head(data, at, tag, form)
        is_wanted = number != 0 if wanted is None else tag in wanted.tags
        if length == _UNDEFINED:
            is_items = vr in ("SQ", "UN")
            inner = _Form(True, "<", form.depth) if vr == "UN" else form
            items, at = _read_items(data, at, end, inner, is_items)
            value: bytes | Items = items
            vr = "SQ"
        else:
            if at + length > end:
                raise EOFError(f"it ends inside {name_of(tag)}")
            value = data[at : at + length] if is_wanted else b""
            at += length
        if is_wanted:
            found.append(_from_bytes(tag, vr, value, form))
    return found, at


def _head(data: Readable, at: int, tag: int, form: _Form) -> tuple[str, int, int]:
    """VR, length and where the value starts."""
    vr = data[at + 4 : at + 6]
    if form.is_implicit or not (vr.isalpha() and vr.isupper()):  # some writers switch in sequences
        (length,) = struct.unpack(f"{form.order}I", data[at + 4 : at + 8])
        return vr_of(tag, None), length, at + 8
    name = vr.decode("ascii")
    if name in LONG_LENGTH:
        (length,) = struct.unpack(f"{form.order}I", data[at + 8 : at + 12])
        return name, length, at + 12
    (length,) = struct.unpack(f"{form.order}H", data[at + 6 : at + 8])
    return name, length, at + 8


def _read_items(
    data: Readable, at: int, end: int, form: _Form, are_elements: bool = True
) -> tuple[Items, int]:
    """The items of a sequence, up to `end` or its delimiter; fragments are only skipped."""
    if form.depth >= _MAX_DEPTH:
        raise ValueError(f"sequences nested more than {_MAX_DEPTH} deep")
    inner = _Form(form.is_implicit, form.order, form.depth + 1)
    items = []
    while at < end:
        group, number, length = struct.unpack(f"{form.order}HHI", data[at : at + 8])
        tag, at = (group << 16) | number, at + 8
        if tag == _SEQUENCE_END:
            break
        if tag != _ITEM:
            raise ValueError("no item where one should be")
        stop = end if length == _UNDEFINED else at + length
        if stop > end:
            raise EOFError("it ends inside an item")
        if are_elements:
            elements, at = _read(data, at, stop, inner)
            items.append(tuple(sorted(elements, key=lambda element: element.tag)))
        else:
            at = stop
    return tuple(items), at


def _from_bytes(tag: int, found: str, value: bytes | Items, form: _Form) -> Element:
    vr = vr_of(tag, found)
    if not isinstance(value, bytes):
        return Element(tag, "SQ", value)
    if vr == "SQ":
        inner = _Form(True, "<", form.depth) if found == "UN" else form  # PS3.5 6.2.2
        return Element(tag, vr, _read_items(value, 0, len(value), inner)[0])
    width = _SWAP_BYTES.get(vr, 1)
    if form.order == ">" and width > 1 and len(value) % width == 0:
        value = b"".join(value[i : i + width][::-1] for i in range(0, len(value), width))
    if len(value) % 2:
        value += b"\0" if vr in ("UI", "OB", "UN") else b" "
    return Element(tag, vr, value)
