"""Elements of our own as bytes, Explicit VR Little Endian (PS3.5 7.1.2).

A per-frame item is built hundreds of times for each result. As pydicom data sets that takes half a
second, as bytes that are joined a few milliseconds. What is written here is ours and well formed;
nothing that was received passes through without a check of its own (`source`).

Within an item the caller gives elements in tag order; on the top level order does not matter, since
`identity.splice` sorts.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable

from pydicom import Dataset
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from dicom_xai.errors import EncodeError
from dicom_xai.identity.block import LONG_LENGTH

_NUMBER = {"US": "H", "UL": "I", "FD": "d", "FL": "f"}


@functools.cache
def _head(keyword: str) -> tuple[bytes, str]:
    """Tag and VR as bytes, and the VR."""
    tag = tag_for_keyword(keyword)
    assert tag is not None, keyword
    vr: str = dictionary_VR(tag)
    return struct.pack("<HH2s", tag >> 16, tag & 0xFFFF, vr.encode()), vr


def element(keyword: str, value: bytes) -> bytes:
    """One element with these value bytes, whose number is even.

    Raises
    ------
    EncodeError
        They are more than the element's VR can hold.
    """
    head, vr = _head(keyword)
    if vr in LONG_LENGTH:
        return head + struct.pack("<xxI", len(value)) + value
    if len(value) > 0xFFFE:
        raise EncodeError(f"{keyword} would be {len(value)} bytes, which VR {vr} cannot hold")
    return head + struct.pack("<H", len(value)) + value


def text(keyword: str, *values: str) -> bytes:
    """One element of text: ASCII, padded as its VR wants it (PS3.5 6.2)."""
    value = "\\".join(values).encode("ascii")
    padding = b"\0" if _head(keyword)[1] == "UI" else b" "
    return element(keyword, value + padding * (len(value) % 2))


def numbers(keyword: str, *values: float) -> bytes:
    """One element of binary numbers."""
    return element(keyword, struct.pack(f"<{len(values)}{_NUMBER[_head(keyword)[1]]}", *values))


def tag(keyword: str, *values: str) -> bytes:
    """One element that points at others (VR AT), all given by keyword."""
    return element(keyword, b"".join(_head(value)[0][:4] for value in values))


def sequence(keyword: str, items: Iterable[bytes]) -> bytes:
    """One sequence of defined length; each item is its elements, joined."""
    joined = b"".join([struct.pack("<HHI", 0xFFFE, 0xE000, len(i)) + i for i in items])
    return element(keyword, joined)


def dump(dataset: Dataset) -> bytes:
    """All elements of a data set that pydicom holds."""
    body = DicomBytesIO()
    body.is_implicit_VR, body.is_little_endian = False, True
    write_dataset(body, dataset)
    encoded: bytes = body.getvalue()
    return encoded
