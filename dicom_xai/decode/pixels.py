"""Bytes of a stored object become stored values, and what turns them into modality units.

Rules: every size is checked by arithmetic before anything is allocated; pixel data is looked at in
place, never copied as a whole; an attribute that is missing or contradicts the others is an error
that names it, never a guess. Torch stays out: this half also runs in processes that only decode;
`frames` is the other.
"""

from __future__ import annotations

import copyreg
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.filereader import read_dataset, read_preamble
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from dicom_xai.decode import codecs, encapsulated, lut, native
from dicom_xai.decode.attributes import (
    PYDICOM_ERRORS,
    functional_group,
    integer,
    items,
    number,
    text,
)
from dicom_xai.decode.color import luminance_of, palette_of
from dicom_xai.decode.layout import MONOCHROME, Layout
from dicom_xai.deflate import inflate
from dicom_xai.errors import DecodeError

#: Largest decoded object, as float32: 2048 slices of 512 x 512.
DECODED_BYTES_LIMIT = 2 * 1024**3

#: Transfer syntaxes that are decoded.
SERVED: frozenset[str] = frozenset(
    {
        ImplicitVRLittleEndian,
        ExplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
        *codecs.CODINGS,
    }
)
_PIXEL_DATA_TAG = (0x7FE0, 0x0010)
#: Float Pixel Data, Double Float Pixel Data, Pixel Data: where a header ends.
_BULK_TAGS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
_TABLE_LENGTHS = "ExtendedOffsetTableLengths"
_UNDEFINED = 0xFFFFFFFF


def read_header(data: bytes) -> Dataset:
    """The data set of a stored file up to its pixel data, with file meta information.

    Parameters
    ----------
    data : bytes
        A whole DICOM file: preamble, file meta, data set (PS3.10).

    Raises
    ------
    DecodeError
        Not a DICOM file, damaged, or deflated to more than the limit.
    """
    return _read(data)[0]


@dataclass(frozen=True, slots=True)
class Rescale:
    """Modality units from stored values: ``value * slope + intercept`` (PS3.3 C.11.1.1.2)."""

    slope: float = 1.0
    intercept: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """The frames of one object as stored, and what makes modality units of them.

    Cheap to pickle: one array, perhaps a mask, and a header without pixel data.

    Attributes
    ----------
    header : Dataset
        The source data set without its pixel data, with file meta information.
    stored : ndarray, (frames, rows, columns)
        Stored values in native byte order, in the integer type that holds them; of a colour image
        the luminance, float32 or the integer type.
    valid : ndarray, (frames, rows, columns) bool, or None
        False on pixel padding (PS3.3 C.7.5.1.1.2); None where nothing is padded.
    modality : tuple of Rescale or LookupTable
        For each frame.
    """

    header: Dataset
    stored: np.ndarray
    valid: np.ndarray | None
    modality: tuple[Rescale | lut.LookupTable, ...]


def _values(values: list[object]) -> MultiValue:
    return MultiValue(_itself, values)


def _itself(value: object) -> object:
    return value


# the values of a LUT descriptor that was looked at hold a function that pickle cannot name
copyreg.pickle(MultiValue, lambda several: (_values, (list(several),)))


def decode(data: bytes, *, limit_bytes: int = DECODED_BYTES_LIMIT) -> Decoded:
    """Every frame of an object, as stored.

    Colour becomes luminance. MONOCHROME1 is *not* inverted here: values are what the modality
    measured; `normalize` knows what is bright.

    Parameters
    ----------
    data : bytes
        The file as stored.
    limit_bytes : int
        Largest size of all frames together as float32.

    Raises
    ------
    DecodeError
        Damaged, too large, without pixel data, in a transfer syntax that is not served, or
        described by attributes that are missing or contradict each other or a compressed frame.
        The study is not retried.
    """
    header, data, offset = _read(data)
    syntax = _transfer_syntax(header)
    element = _pixel_element(data, offset, syntax)
    layout = Layout.of(header, is_compressed=syntax.is_encapsulated)
    layout.check_limit(limit_bytes)
    is_big = element.big_endian
    modality = _modalities(header, layout, is_big)
    palette = palette_of(header, layout, big_endian=is_big)
    stored = _stored(layout, _frames(header, layout, element, data, syntax), palette)
    return Decoded(header, stored, _valid(header, layout, stored), modality)


def _read(data: bytes) -> tuple[Dataset, bytes, int]:
    """The header, the bytes in which its pixel data lies, and where in them its element starts."""
    file = BytesIO(data)
    try:
        read_preamble(file, False)
        meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
        if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            data = inflate(memoryview(data)[file.tell() :])
            file = BytesIO(data)
            header = read_dataset(file, False, True, stop_when=_is_bulk)
            header.file_meta = FileMetaDataset(meta)
            return header, data, file.tell()
        file.seek(0)
        header = dcmread(file, stop_before_pixels=True)
        header.buffer = None  # would keep the whole file alive, in every pickle too
    except PYDICOM_ERRORS as error:
        # pydicom's messages may quote values, so only the error's class is passed on.
        raise DecodeError(f"the file cannot be read: {type(error).__name__}") from error
    except zlib.error as error:
        raise DecodeError(f"the deflated data set cannot be read: {error}") from error
    return header, data, file.tell()


def _is_bulk(tag: BaseTag, vr: str | None, length: int) -> bool:
    return tag in _BULK_TAGS


def _transfer_syntax(header: Dataset) -> UID:
    syntax = UID(text(header.file_meta, "TransferSyntaxUID"))
    if not syntax:
        raise DecodeError("TransferSyntaxUID is missing")
    if syntax not in SERVED:
        raise DecodeError(f"transfer syntax {syntax.name} is not served")
    return syntax


def _pixel_element(data: bytes, offset: int, syntax: UID) -> native.Element:
    is_big = syntax == ExplicitVRBigEndian
    order: Literal["big", "little"] = "big" if is_big else "little"
    head = data[offset : offset + 12]
    tag = tuple(int.from_bytes(head[i : i + 2], order) for i in (0, 2))
    if len(head) < 8 or tag != _PIXEL_DATA_TAG:
        raise DecodeError("PixelData is missing")
    if syntax == ImplicitVRLittleEndian:
        start, vr = 8, b"OW"
        length = int.from_bytes(head[4:8], "little")
    else:
        start, vr = 12, head[4:6]
        if vr not in (b"OB", b"OW"):
            raise DecodeError("PixelData: VR OB or OW wanted")
        length = int.from_bytes(head[8:12], order)
    if (length == _UNDEFINED) != syntax.is_encapsulated:
        found = "undefined" if length == _UNDEFINED else "defined"
        raise DecodeError(f"PixelData: {found} length in transfer syntax {syntax.name}")
    present = len(data) - offset - start
    if length != _UNDEFINED and length > present:
        raise DecodeError(f"PixelData: {length} bytes announced, {present} in the file")
    return native.Element(offset + start, length, vr == b"OW", is_big)


def _frames(
    header: Dataset, layout: Layout, element: native.Element, data: bytes, syntax: UID
) -> Iterator[np.ndarray]:
    """The stored values of one frame after the other, RGB where there is colour."""
    if not syntax.is_encapsulated:
        yield from native.frames(layout, element, data)
        return
    table = None
    offsets, lengths = (header.get(name) for name in ("ExtendedOffsetTable", _TABLE_LENGTHS))
    if isinstance(offsets, bytes) and isinstance(lengths, bytes):
        table = encapsulated.OffsetTable(offsets, lengths)
    streams = encapsulated.frames(data, element.offset, layout.frames, table)
    for frame_number, stream in enumerate(streams, 1):
        try:
            yield codecs.decode_frame(layout, syntax, stream)
        except DecodeError as error:
            raise DecodeError(f"frame {frame_number}, {syntax.name}: {error}") from error.__cause__


def _stored(layout: Layout, frames: Iterator[np.ndarray], palette: np.ndarray | None) -> np.ndarray:
    """All frames, ``(frames, rows, columns)``; beside them never more than one."""
    stored: np.ndarray | None = None
    for index, frame in enumerate(frames):
        plane = luminance_of(frame) if palette is None else palette[frame]
        if stored is None:
            stored = np.empty((layout.frames, layout.rows, layout.columns), plane.dtype)
        stored[index] = plane
    assert stored is not None
    return stored


def _valid(header: Dataset, layout: Layout, stored: np.ndarray) -> np.ndarray | None:
    """False where a cell is padding; None where none is.

    Source: PS3.3 C.7.5.1.1.2 (one value, or a range to Pixel Padding Range Limit inclusive).
    """
    value = integer(header, "PixelPaddingValue")
    limit = integer(header, "PixelPaddingRangeLimit")
    if value is None:
        if limit is not None:
            raise DecodeError("PixelPaddingRangeLimit without PixelPaddingValue")
        return None
    if layout.photometric not in MONOCHROME:
        return None
    low, high = sorted(_as_stored(v, layout) for v in (value, value if limit is None else limit))
    valid = (stored < low) | (stored > high)
    return None if valid.all() else valid


def _as_stored(value: int, layout: Layout) -> int:
    """A padding value as a cell would hold it: writers give -2000 as 63536 and the reverse."""
    cell = np.array([value & ((1 << 8 * layout.cell_bytes) - 1)], layout.cell_type)
    return int(layout.stored(cell)[0])


def _modalities(
    header: Dataset, layout: Layout, big_endian: bool
) -> tuple[Rescale | lut.LookupTable, ...]:
    """That of each frame; worked out once for all that have no functional groups of their own."""
    own = min(layout.frames, len(items(header, "PerFrameFunctionalGroupsSequence")))
    each = [_modality(header, number, layout, big_endian) for number in range(1, own + 1)]
    if own < layout.frames:
        common = _modality(header, layout.frames, layout, big_endian)
        each += [common] * (layout.frames - own)
    return tuple(each)


def _modality(
    header: Dataset, frame_number: int, layout: Layout, big_endian: bool
) -> Rescale | lut.LookupTable:
    """What turns a frame's stored values into modality units.

    Source: PS3.3 C.11.1 (Modality LUT) and C.7.6.16.2.9 (Pixel Value Transformation).
    """
    if layout.photometric not in MONOCHROME:
        return Rescale()
    group = functional_group(header, frame_number, "PixelValueTransformationSequence")
    source = header if group is None else group
    slope, intercept = number(source, "RescaleSlope"), number(source, "RescaleIntercept")
    if (slope is None) != (intercept is None):
        name = "RescaleSlope" if slope is None else "RescaleIntercept"
        raise DecodeError(f"{name} is missing while its partner is there")
    if slope == 0:
        raise DecodeError("RescaleSlope: 0")
    tables = items(header, "ModalityLUTSequence") if group is None else []
    if tables:
        if (slope, intercept) not in ((None, None), (1.0, 0.0)):
            raise DecodeError("ModalityLUTSequence and RescaleSlope are both there")
        return lut.read(tables[0], signed=layout.signed, big_endian=big_endian)
    if slope is None or intercept is None:
        if text(header, "SOPClassUID") == CTImageStorage:
            raise DecodeError("RescaleSlope and RescaleIntercept are missing in a CT image")
        return Rescale()
    return Rescale(slope, intercept)
