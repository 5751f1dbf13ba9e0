"""Bytes of a stored object become stored values, and what turns them into modality units.

Rules: every size is checked by arithmetic before anything is allocated; pixel data is looked at in
place, never copied as a whole; an attribute that is missing or contradicts the others is an error
that names it, never a guess. Torch stays out: this half also runs in processes that only decode;
`frames` is the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.filereader import read_dataset, read_preamble
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from dicom_xai.decode import lut
from dicom_xai.decode.attributes import (
    PYDICOM_ERRORS,
    functional_group,
    integer,
    items,
    number,
    required,
    text,
)
from dicom_xai.errors import DecodeError

#: Largest decoded object, as float32: 2048 slices of 512 x 512.
DECODED_BYTES_LIMIT = 2 * 1024**3

_NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)
_MONOCHROME = ("MONOCHROME1", "MONOCHROME2")
_COLOR = ("RGB", "YBR_FULL", "YBR_FULL_422")
#: Luminance of RGB (PS3.3 C.7.6.3.1.2, YBR_FULL; ITU-R BT.601).
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_PIXEL_DATA_TAG = (0x7FE0, 0x0010)


def read_header(data: bytes) -> Dataset:
    """The data set of a stored file up to its pixel data, with file meta information.

    Parameters
    ----------
    data : bytes
        A whole DICOM file: preamble, file meta, data set (PS3.10).

    Raises
    ------
    DecodeError
        Not a DICOM file, damaged, or deflated (which could inflate without bound).
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
        Compressed, damaged, too large, without pixel data, or described by attributes that are
        missing or contradict each other. The study is not retried.
    """
    header, offset = _read(data)
    syntax = _transfer_syntax(header)
    element = _pixel_element(data, offset, syntax)
    layout = _Layout.of(header, syntax)
    layout.check_size(element, data, limit_bytes)
    modality = tuple(_modality(header, number, layout) for number in range(1, layout.frames + 1))
    stored = _stored_values(layout, element, data)
    return Decoded(header, stored, _valid(header, layout, stored), modality)


def _read(data: bytes) -> tuple[Dataset, int]:
    """The header, and where the element that ended it starts."""
    file = BytesIO(data)
    try:
        read_preamble(file, False)
        meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
        if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            raise DecodeError("transfer syntax Deflated Explicit VR Little Endian is not served")
        file.seek(0)
        header = dcmread(file, stop_before_pixels=True)
        header.buffer = None  # would keep the whole file alive, in every pickle too
    except PYDICOM_ERRORS as error:
        # pydicom's messages may quote values, so only the error's class is passed on.
        raise DecodeError(f"the file cannot be read: {type(error).__name__}") from error
    return header, file.tell()


def _transfer_syntax(header: Dataset) -> UID:
    syntax = UID(text(header.file_meta, "TransferSyntaxUID"))
    if not syntax:
        raise DecodeError("TransferSyntaxUID is missing")
    if syntax not in _NATIVE:
        raise DecodeError(
            f"transfer syntax {syntax.name} is not served: send it uncompressed "
            "(Implicit or Explicit VR Little Endian, Explicit VR Big Endian)"
        )
    return syntax


@dataclass(frozen=True, slots=True)
class _Layout:
    """How pixel cells lie in Pixel Data (PS3.3 C.7.6.3, PS3.5 section 8)."""

    rows: int
    columns: int
    frames: int
    samples: int
    photometric: str
    planar: bool  #: colour by plane
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    big_endian: bool

    @classmethod
    def of(cls, header: Dataset, syntax: UID) -> _Layout:
        """Read and check the Image Pixel attributes."""
        frames = integer(header, "NumberOfFrames")
        photometric = text(header, "PhotometricInterpretation")
        samples = required(header, "SamplesPerPixel")
        layout = cls(
            rows=required(header, "Rows"),
            columns=required(header, "Columns"),
            frames=1 if frames is None else frames,
            samples=samples,
            photometric=photometric,
            planar=samples > 1 and required(header, "PlanarConfiguration") == 1,
            bits_allocated=required(header, "BitsAllocated"),
            bits_stored=required(header, "BitsStored"),
            high_bit=required(header, "HighBit"),
            signed=required(header, "PixelRepresentation") == 1,
            big_endian=syntax == ExplicitVRBigEndian,
        )
        layout._check(required(header, "PixelRepresentation"))
        return layout

    def _check(self, pixel_representation: int) -> None:
        for keyword, value in (
            ("Rows", self.rows),
            ("Columns", self.columns),
            ("NumberOfFrames", self.frames),
        ):
            if value < 1:
                raise DecodeError(f"{keyword}: {value}, at least 1 wanted")
        wanted = {1: _MONOCHROME, 3: _COLOR}.get(self.samples)
        if wanted is None:
            raise DecodeError(f"SamplesPerPixel: {self.samples}, 1 or 3 wanted")
        if self.photometric not in wanted:
            raise DecodeError(
                f"PhotometricInterpretation: {self.photometric or 'missing'} with "
                f"{self.samples} samples, {' or '.join(wanted)} wanted"
            )
        if self.photometric == "YBR_FULL_422" and (self.planar or self.columns % 2):
            raise DecodeError("YBR_FULL_422 wants PlanarConfiguration 0 and an even Columns")
        if self.bits_allocated not in (8, 16):
            raise DecodeError(f"BitsAllocated: {self.bits_allocated}, 8 or 16 wanted")
        if not 1 <= self.bits_stored <= self.bits_allocated:
            raise DecodeError(f"BitsStored: {self.bits_stored} of {self.bits_allocated} allocated")
        if not self.bits_stored - 1 <= self.high_bit < self.bits_allocated:
            raise DecodeError(f"HighBit: {self.high_bit} with BitsStored {self.bits_stored}")
        if pixel_representation not in (0, 1):
            raise DecodeError(f"PixelRepresentation: {pixel_representation}, 0 or 1 wanted")

    def check_size(self, element: _Element, data: bytes, limit_bytes: int) -> None:
        """Refuse what would not fit, and pixel data of another size, by arithmetic alone.

        Some writers pad Pixel Data with more zeros than the one of PS3.5 8.1.1; less than a frame
        of them is taken as that. Anything else more means that the header is wrong.
        """
        decoded = self.rows * self.columns * self.frames * 4
        if decoded > limit_bytes:
            raise DecodeError(
                f"Rows {self.rows}, Columns {self.columns} and NumberOfFrames {self.frames} need "
                f"{decoded} bytes decoded; the limit is {limit_bytes}"
            )
        end, size = element.offset + element.length, self.size_bytes
        surplus = element.length - size
        is_padding = surplus <= 1 or not any(data[end - surplus : end])
        if not 0 <= surplus < max(2, size // self.frames) or not is_padding:
            raise DecodeError(
                f"PixelData: {element.length} bytes, but Rows, Columns, NumberOfFrames, "
                f"SamplesPerPixel and BitsAllocated make {size}"
            )

    @property
    def samples_stored(self) -> int:
        """Samples per pixel in the stream: YBR_FULL_422 shares colour between two pixels."""
        return 2 if self.photometric == "YBR_FULL_422" else self.samples

    @property
    def size_bytes(self) -> int:
        """What all frames take in Pixel Data, without the pad byte."""
        cells = self.rows * self.columns * self.samples_stored * self.frames
        return cells * self.bits_allocated // 8


@dataclass(frozen=True, slots=True)
class _Element:
    """Where the value of Pixel Data lies in the file."""

    offset: int
    length: int
    is_words: bool  #: VR OW: 8-bit cells are swapped in pairs when big endian (PS3.5 8.1.1)


def _pixel_element(data: bytes, offset: int, syntax: UID) -> _Element:
    order: Literal["big", "little"] = "big" if syntax == ExplicitVRBigEndian else "little"
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
    if length == 0xFFFFFFFF:
        raise DecodeError("PixelData: undefined length in an uncompressed transfer syntax")
    present = len(data) - offset - start
    if length > present:
        raise DecodeError(f"PixelData: {length} bytes announced, {present} in the file")
    return _Element(offset + start, length, vr == b"OW")


def _stored_values(layout: _Layout, element: _Element, data: bytes) -> np.ndarray:
    """Stored values, ``(frames, rows, columns)``, luminance (float32) where there is colour."""
    count = layout.size_bytes * 8 // layout.bits_allocated
    wide = layout.bits_allocated == 16
    if layout.big_endian and not wide and element.is_words:
        padded = np.frombuffer(data, np.uint8, count + count % 2, element.offset)
        cells = padded.reshape(-1, 2)[:, ::-1].reshape(-1)[:count]
    else:
        order = ">" if layout.big_endian else "<"
        cells = np.frombuffer(data, f"{order}u2" if wide else "u1", count, element.offset)
    cells = _sign_and_mask(cells.astype(cells.dtype.newbyteorder("="), copy=False), layout)
    rows, columns, frames = layout.rows, layout.columns, layout.frames
    if layout.samples == 1:
        return cells.reshape(frames, rows, columns)
    if layout.photometric == "YBR_FULL_422":
        # PS3.3 C.7.6.3.1.2: Y1 Y2 Cb Cr for two neighbouring pixels
        return cells.reshape(frames, rows, columns // 2, 4)[..., :2].reshape(frames, rows, columns)
    if layout.planar:
        color = np.moveaxis(cells.reshape(frames, 3, rows, columns), 1, -1)
    else:
        color = cells.reshape(frames, rows, columns, 3)
    if layout.photometric == "YBR_FULL":
        return color[..., 0]
    return np.asarray(color @ _LUMINANCE)


def _sign_and_mask(cells: np.ndarray, layout: _Layout) -> np.ndarray:
    """The stored value of each cell: BitsStored bits ending at HighBit (PS3.5 8.1.1).

    Bits outside (old overlays) are dropped, the sign is extended.
    """
    allocated, stored = layout.bits_allocated, layout.bits_stored
    native = np.dtype(f"u{allocated // 8}")
    kind = np.dtype(f"i{allocated // 8}") if layout.signed else native
    if stored == allocated:
        return cells.view(kind) if layout.signed else cells
    raised = cells << (allocated - 1 - layout.high_bit)
    return raised.view(kind) >> (allocated - stored)


def _valid(header: Dataset, layout: _Layout, stored: np.ndarray) -> np.ndarray | None:
    """False where a cell is padding; None where none is.

    Source: PS3.3 C.7.5.1.1.2 (one value, or a range to Pixel Padding Range Limit inclusive).
    """
    value = integer(header, "PixelPaddingValue")
    limit = integer(header, "PixelPaddingRangeLimit")
    if value is None:
        if limit is not None:
            raise DecodeError("PixelPaddingRangeLimit without PixelPaddingValue")
        return None
    if layout.samples != 1:
        return None
    low, high = sorted(_as_stored(v, layout) for v in (value, value if limit is None else limit))
    valid = (stored < low) | (stored > high)
    return None if valid.all() else valid


def _as_stored(value: int, layout: _Layout) -> int:
    """A padding value as a cell would hold it: writers give -2000 as 63536 and the reverse."""
    cell = np.array([value & ((1 << layout.bits_allocated) - 1)])
    return int(_sign_and_mask(cell.astype(f"u{layout.bits_allocated // 8}"), layout)[0])


def _modality(header: Dataset, frame_number: int, layout: _Layout) -> Rescale | lut.LookupTable:
    """What turns a frame's stored values into modality units.

    Source: PS3.3 C.11.1 (Modality LUT) and C.7.6.16.2.9 (Pixel Value Transformation).
    """
    if layout.samples != 1:
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
        return lut.read(tables[0], signed=layout.signed, big_endian=layout.big_endian)
    if slope is None or intercept is None:
        if text(header, "SOPClassUID") == CTImageStorage:
            raise DecodeError("RescaleSlope and RescaleIntercept are missing in a CT image")
        return Rescale()
    return Rescale(slope, intercept)
