"""Reads attributes as decoding needs them: typed, and with an error that names the keyword.

A received header may hold anything: absent values, text where a number should be, several values
where one should be. Everything here answers with a plain Python value, with None for "absent", or
with DecodeError. Only keywords and geometry-like numbers get into messages, never patient data.
"""

from __future__ import annotations

import math
import struct

from pydicom import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError

from dicom_xai.errors import DecodeError

#: What pydicom raises on a damaged data set: when reading, and when a value is first converted.
PYDICOM_ERRORS = (
    InvalidDicomError,
    BytesLengthException,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,  # a sequence that is none; there is no file to fail
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)


def numbers(ds: Dataset, keyword: str) -> tuple[float, ...] | None:
    """All values of a numeric attribute, or None when it is absent or empty.

    Raises
    ------
    DecodeError
        A value is no finite number.
    """
    value = _value(ds, keyword)
    if value is None or value == "":
        return None
    items = [value] if isinstance(value, str | int | float) else list(value)  # type: ignore[call-overload]
    if not items:
        return None
    try:
        found = tuple(float(item) for item in items)
    except (TypeError, ValueError) as error:
        raise DecodeError(f"{keyword}: a value is no number") from error
    if not all(map(math.isfinite, found)):
        raise DecodeError(f"{keyword}: a value is not finite")
    return found


def number(ds: Dataset, keyword: str) -> float | None:
    """The one value of a numeric attribute, or None when it is absent or empty."""
    found = numbers(ds, keyword)
    if found is None:
        return None
    if len(found) != 1:
        raise DecodeError(f"{keyword}: {len(found)} values, one wanted")
    return found[0]


def integer(ds: Dataset, keyword: str) -> int | None:
    """The one value of an integer attribute, or None when it is absent or empty."""
    found = number(ds, keyword)
    if found is None:
        return None
    if found != int(found):
        raise DecodeError(f"{keyword}: {found:g} is no integer")
    return int(found)


def text(ds: Dataset, keyword: str) -> str:
    """The one value of a text attribute without padding; empty when absent.

    Meant for code strings and UIDs; the value may stand in messages.
    """
    value = _value(ds, keyword)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DecodeError(f"{keyword}: more than one value, one wanted")
    return value.strip(" \0")


def required(ds: Dataset, keyword: str) -> int:
    """An integer attribute that must be there.

    Raises
    ------
    DecodeError
        Absent, empty or no integer.
    """
    found = integer(ds, keyword)
    if found is None:
        raise DecodeError(f"{keyword} is missing")
    return found


def items(ds: Dataset, keyword: str) -> list[Dataset]:
    """The items of a sequence; none when it is absent."""
    value = _value(ds, keyword)
    if value is None:
        return []
    if isinstance(value, str | bytes | int | float):
        raise DecodeError(f"{keyword}: is no sequence")
    found: list[Dataset] = list(value)  # type: ignore[call-overload]
    return found


def functional_group(header: Dataset, frame_number: int, keyword: str) -> Dataset | None:
    """One functional group of a frame: its own, else the shared one, else None.

    Source: PS3.3 C.7.6.16 (Multi-frame Functional Groups).

    Parameters
    ----------
    header : Dataset
        Of a multi-frame object; any other has no functional groups.
    frame_number : int
        1-based.
    keyword : str
        The macro's sequence, such as ``PixelMeasuresSequence``.
    """
    groups = items(header, "PerFrameFunctionalGroupsSequence")
    own = groups[frame_number - 1 : frame_number]
    for group in (*own, *items(header, "SharedFunctionalGroupsSequence")):
        found = items(group, keyword)
        if found:
            return found[0]
    return None


def _value(ds: Dataset, keyword: str) -> object:
    try:
        return ds.get(keyword)
    except PYDICOM_ERRORS as error:
        raise DecodeError(f"{keyword}: cannot be read ({type(error).__name__})") from error
