"""Frames as the value of Pixel Data: native, run-length encoded, or JPEG (PS3.5 8, A.4).

Codecs release the interpreter's lock, so the frames of a stack are compressed by as many threads as
torch may use.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import imagecodecs
import numpy as np
import numpy.typing as npt
import torch
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless

from dicom_xai.config import Compression
from dicom_xai.errors import EncodeError

JPEG_QUALITY = 90
#: Of Pixel Data in one piece; 0xFFFFFFFF means another thing (PS3.5 7.1.1).
MAX_NATIVE_BYTES = 0xFFFFFFFE

#: ``(rows, columns)`` uint8 or uint16, or ``(rows, columns, 3)`` uint8: RGB.
Image = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
Buffer = bytes | memoryview

TRANSFER_SYNTAXES = {
    Compression.NONE: ExplicitVRLittleEndian,
    Compression.RLE: RLELossless,
    Compression.JPEG: JPEGBaseline8Bit,
}


@dataclass(frozen=True, slots=True, eq=False)
class PixelData:
    """The value of Pixel Data in pieces, without the padding of the last."""

    pieces: tuple[Buffer, ...]
    transfer_syntax: UID

    @property
    def size_bytes(self) -> int:
        return sum(len(piece) for piece in self.pieces)


def compressed(images: Sequence[Image], compression: Compression) -> list[Buffer]:
    """Each image as its own stream, or as its pixels where nothing is to be compressed.

    Parameters
    ----------
    images : sequence of ndarray
        C-contiguous.
    compression : Compression
        JPEG is for RGB alone: 4:2:2, which is to be told as YBR_FULL_422.
    """
    encode: dict[Compression, Callable[[Image], Buffer]] = {
        Compression.NONE: lambda image: image.data.cast("B"),
        Compression.RLE: _rle,
        Compression.JPEG: _jpeg,
    }
    threads = torch.get_num_threads()
    if compression is Compression.NONE or len(images) == 1 or threads == 1:
        return [encode[compression](image) for image in images]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(encode[compression], images))


def pixel_data(streams: Sequence[Buffer], compression: Compression) -> PixelData:
    """The frames of one object, as `compressed` gave them.

    Raises
    ------
    EncodeError
        They are too many bytes for one object.
    """
    syntax = TRANSFER_SYNTAXES[compression]
    if compression is not Compression.NONE:
        return PixelData(_encapsulated(streams), syntax)
    made = PixelData(tuple(streams), syntax)
    if made.size_bytes > MAX_NATIVE_BYTES:
        raise EncodeError(
            f"{len(streams)} frames are {made.size_bytes} bytes, which no object can hold "
            "uncompressed; set compress: rle or jpeg at the destination"
        )
    return made


def bits(frames: Sequence[Image], pixels: int) -> Buffer:
    """Frames of single bits as one run of bytes: the first pixel in the lowest bit (PS3.5 8.1.1).

    Parameters
    ----------
    frames : sequence of ndarray, (bytes,) uint8
        Each packed on its own, the rest of its last byte zero.
    pixels : int
        Of one frame. Frames follow each other without a gap, in the middle of a byte if need be.
    """
    if pixels % 8 == 0:
        return b"".join(frame.data for frame in frames)
    loose = [
        np.unpackbits(frame.view(np.uint8), count=pixels, bitorder="little") for frame in frames
    ]
    return np.packbits(np.concatenate(loose), bitorder="little").tobytes()


def _jpeg(image: Image) -> bytes:
    stream = imagecodecs.jpeg8_encode(
        image, level=JPEG_QUALITY, colorspace="RGB", outcolorspace="YCBCR", subsampling="422"
    )
    return bytes(stream)


def _rle(image: Image) -> bytes:
    """One byte segment per channel, the high byte of a cell first; rows apart (PS3.5 G.2, G.5)."""
    cells = image.astype(image.dtype.newbyteorder(">"), copy=False)
    planes = cells.view(np.uint8).reshape(*image.shape[:2], -1)
    segments = []
    for channel in range(planes.shape[2]):
        plane = np.ascontiguousarray(planes[:, :, channel])
        segment = bytes(imagecodecs.packbits_encode(plane))  # a two-dimensional array: by rows
        segments.append(segment + b"\0" * (len(segment) % 2))
    offsets = [64]
    for segment in segments:
        offsets.append(offsets[-1] + len(segment))
    rest = [0] * (15 - len(segments))
    header = struct.pack("<16I", len(segments), *offsets[: len(segments)], *rest)
    return b"".join([header, *segments])


def _encapsulated(streams: Sequence[Buffer]) -> tuple[Buffer, ...]:
    """Each frame as one fragment, after a table of where they start (PS3.5 A.4)."""
    offsets, pieces = [0], []
    for stream in streams:
        padding = len(stream) % 2
        pieces += [struct.pack("<HHI", 0xFFFE, 0xE000, len(stream) + padding), stream]
        pieces += [b"\0"] * padding
        offsets.append(offsets[-1] + 8 + len(stream) + padding)
    if offsets[-1] > MAX_NATIVE_BYTES:
        raise EncodeError(
            f"{len(streams)} frames are {offsets[-1]} bytes compressed, which no object can hold"
        )
    table = struct.pack(f"<{len(streams)}I", *offsets[:-1])
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(table)), table, *pieces
