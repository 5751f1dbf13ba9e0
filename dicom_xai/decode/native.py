"""Uncompressed Pixel Data: frame by frame, looked at in place (PS3.5 section 8)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dicom_xai.decode.layout import Layout
from dicom_xai.errors import DecodeError


@dataclass(frozen=True, slots=True)
class Element:
    """Where the value of Pixel Data lies among the bytes.

    `is_words` is VR OW: cells of up to 8 bits are swapped in pairs when big endian (PS3.5 8.1.1).
    """

    offset: int
    length: int
    is_words: bool
    big_endian: bool


def frames(layout: Layout, element: Element, data: bytes) -> Iterator[np.ndarray]:
    """The stored values of each frame.

    Yields
    ------
    ndarray, (rows, columns) or (rows, columns, 3) of `Layout.stored_type`
        Two axes are grey or luminance, three are RGB.

    Raises
    ------
    DecodeError
        Pixel Data has not the size that the attributes make.
    """
    _check_size(layout, element, data)
    for index in range(layout.frames):
        yield _frame(layout, layout.stored(_cells(layout, element, data, index)))


def _frame(layout: Layout, values: np.ndarray) -> np.ndarray:
    rows, columns = layout.rows, layout.columns
    if layout.samples == 1:
        return values.reshape(rows, columns)
    if layout.photometric == "YBR_FULL_422":
        # PS3.3 C.7.6.3.1.2: Y1 Y2 Cb Cr for two neighbouring pixels
        return values.reshape(rows, columns // 2, 4)[..., :2].reshape(rows, columns)
    if layout.planar:
        color = np.moveaxis(values.reshape(3, rows, columns), 0, -1)
    else:
        color = values.reshape(rows, columns, 3)
    return color if layout.photometric == "RGB" else color[..., 0]


def _cells(layout: Layout, element: Element, data: bytes, index: int) -> np.ndarray:
    """The cells of one frame in native byte order; a view of the bytes wherever that can be."""
    count = _cell_count(layout)
    first = count * index
    if layout.bits_allocated > 8:
        order = ">" if element.big_endian else "<"
        start = element.offset + first * layout.cell_bytes
        cells = np.frombuffer(data, f"{order}u{layout.cell_bytes}", count, start)
        return cells.astype(layout.cell_type, copy=False)
    # frames of single bits follow each other without a gap (PS3.5 8.1.1)
    per_byte = 8 // layout.bits_allocated
    start, stop = first // per_byte, -(-(first + count) // per_byte)
    packed = _bytes(element, data, start, stop)
    if layout.bits_allocated == 8:
        return packed
    return np.unpackbits(packed, bitorder="little")[first - start * 8 :][:count]


def _bytes(element: Element, data: bytes, start: int, stop: int) -> np.ndarray:
    if not (element.big_endian and element.is_words):
        return np.frombuffer(data, np.uint8, stop - start, element.offset + start)
    even, end = start // 2 * 2, stop + stop % 2
    words = np.frombuffer(data, np.uint8, end - even, element.offset + even)
    return words.reshape(-1, 2)[:, ::-1].reshape(-1)[start - even : stop - even]


def _check_size(layout: Layout, element: Element, data: bytes) -> None:
    """Refuse pixel data of another size than the attributes make, by arithmetic alone.

    Some writers pad Pixel Data with more zeros than the one of PS3.5 8.1.1; less than a frame of
    them is taken as that. Anything else more means that the header is wrong.
    """
    bits = _cell_count(layout) * layout.frames * layout.bits_allocated
    size = -(-bits // 8)
    end, surplus = element.offset + element.length, element.length - size
    is_padding = surplus <= 1 or not any(data[end - surplus : end])
    if not 0 <= surplus < max(2, size // layout.frames) or not is_padding:
        raise DecodeError(
            f"PixelData: {element.length} bytes, but Rows, Columns, NumberOfFrames, "
            f"SamplesPerPixel and BitsAllocated make {size}"
        )


def _cell_count(layout: Layout) -> int:
    """Cells of one frame: YBR_FULL_422 shares colour between two pixels."""
    samples = 2 if layout.photometric == "YBR_FULL_422" else layout.samples
    return layout.rows * layout.columns * samples
