"""Colour becomes luminance, palettes included."""

from __future__ import annotations

import numpy as np
from pydicom import Dataset

from dicom_xai.decode import lut
from dicom_xai.decode.attributes import PYDICOM_ERRORS, numbers
from dicom_xai.decode.layout import PALETTE, Layout
from dicom_xai.errors import DecodeError

#: Luminance of RGB (PS3.3 C.7.6.3.1.2, YBR_FULL; ITU-R BT.601).
_WEIGHTS = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_COLORS = ("Red", "Green", "Blue")


def luminance_of(frame: np.ndarray) -> np.ndarray:
    """Luminance of an RGB frame, float32; any other frame as it is.

    Parameters
    ----------
    frame : ndarray, (rows, columns) or (rows, columns, 3)
    """
    return frame if frame.ndim == 2 else np.asarray(frame.astype(np.float32) @ _WEIGHTS)


def palette_of(header: Dataset, layout: Layout, *, big_endian: bool) -> np.ndarray | None:
    """The luminance of every stored value of a PALETTE COLOR image; None for any other.

    Source: PS3.3 C.7.6.3.1.5 (descriptors), .6 (data) and C.7.9.2 (segmented tables).

    Returns
    -------
    ndarray, (2**bits allocated,) float32, or None
        In the unit of the table's entries; values outside the table get its first or last entry.

    Raises
    ------
    DecodeError
        A table is missing, has another length than its descriptor says, or does not expand.
    """
    if layout.photometric != PALETTE:
        return None
    tables, first = [], 0
    for color in _COLORS:
        name = f"{color}PaletteColorLookupTable"
        descriptor = numbers(header, f"{name}Descriptor")
        if descriptor is None or len(descriptor) != 3:
            raise DecodeError(f"{name}Descriptor: three values wanted")
        count, first, bits = (int(value) for value in descriptor)
        count = count or 65536
        if not 1 <= count <= 65536 or bits not in (8, 16):
            raise DecodeError(f"{name}Descriptor: {count} entries of {bits} bits; 8 or 16 wanted")
        tables.append(_entries(header, color, count, bits, big_endian))
    if len({len(table) for table in tables}) != 1:
        raise DecodeError("the palette's tables differ in length")
    entries = np.stack(tables, axis=-1).astype(np.float32) @ _WEIGHTS
    values = np.arange(1 << layout.bits_allocated)
    return np.asarray(entries[(values - first).clip(0, len(entries) - 1)])


def _entries(header: Dataset, color: str, count: int, bits: int, big_endian: bool) -> np.ndarray:
    name = f"{color}PaletteColorLookupTableData"
    data = _bytes(header, name)
    if data is not None:
        return lut.entries(data, count, bits, big_endian=big_endian, name=name)
    name = f"Segmented{name}"
    data = _bytes(header, name)
    if data is None:
        raise DecodeError(f"{name.removeprefix('Segmented')} is missing")
    if bits == 8:
        words = lut.entries(data, len(data), bits, big_endian=big_endian, name=name)
    else:
        words = lut.entries(data, len(data) // 2, bits, big_endian=big_endian, name=name)
    return _expanded(words.tolist(), count, name)


def _bytes(header: Dataset, keyword: str) -> bytes | None:
    try:
        value = header.get(keyword)
    except PYDICOM_ERRORS as error:
        raise DecodeError(f"{keyword}: cannot be read ({type(error).__name__})") from error
    if value is not None and not isinstance(value, bytes):
        raise DecodeError(f"{keyword}: words wanted")
    return value


def _expanded(words: list[int], count: int, name: str) -> np.ndarray:
    """A segmented table written out (PS3.3 C.7.9.2): discrete and linear segments."""
    made: list[int] = []
    at = 0
    while at + 2 < len(words):
        kind, length = words[at : at + 2]
        at += 2
        if kind == 0:
            made += words[at : at + length]
            at += length
        elif kind == 1 and made and length:
            made += np.linspace(made[-1], words[at], length + 1)[1:].round().astype(int).tolist()
            at += 1
        else:
            raise DecodeError(f"{name}: a segment of type {kind}; discrete or linear ones wanted")
        if len(made) > count:
            break
    if len(made) != count:
        raise DecodeError(f"{name}: expands to {len(made)} entries, {count} wanted")
    return np.array(made, dtype=np.uint16)
