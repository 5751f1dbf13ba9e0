"""Compressed objects, made by imagecodecs and by pydicom's own RLE encoder."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import imagecodecs
import numpy as np
from pydicom import Dataset
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.pixels import get_encoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

#: Largest error of a stored value that each lossy syntax may make on `smooth`, as encoded here.
#: JPEG-LS promises its own; the others are half again what was measured.
NEAR = 2
LOSSY_ERROR: dict[str, int] = {
    JPEGBaseline8Bit: 6,
    JPEGExtended12Bit: 60,
    JPEGLSNearLossless: NEAR,
    JPEG2000: 36,
    HTJ2K: 52,
}


def _jpeg2000(values: np.ndarray, bits: int) -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(values, codecformat="j2k", reversible=True, level=0))


def _jpeg2000_lossy(values: np.ndarray, bits: int) -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(values, codecformat="j2k", level=80))


def _bits(values: np.ndarray, bits: int) -> np.ndarray:
    """As unsigned numbers of so many bits: what a codec without signs gets."""
    unsigned = values.astype(f"u{values.dtype.itemsize}")
    return np.asarray(unsigned & np.array((1 << bits) - 1, unsigned.dtype))


_ENCODERS: dict[str, Callable[[np.ndarray, int], bytes]] = {
    JPEGBaseline8Bit: lambda v, b: imagecodecs.jpeg8_encode(v, level=95),
    JPEGExtended12Bit: lambda v, b: imagecodecs.jpeg8_encode(v, level=95, bitspersample=b),
    JPEGLossless: lambda v, b: imagecodecs.jpeg8_encode(
        _bits(v, b), lossless=True, predictor=6, bitspersample=b
    ),
    JPEGLosslessSV1: lambda v, b: imagecodecs.jpeg8_encode(
        _bits(v, b), lossless=True, predictor=1, bitspersample=b
    ),
    JPEGLSLossless: lambda v, b: imagecodecs.jpegls_encode(_bits(v, b)),
    JPEGLSNearLossless: lambda v, b: imagecodecs.jpegls_encode(v, level=NEAR),
    JPEG2000Lossless: _jpeg2000,
    JPEG2000: _jpeg2000_lossy,
    HTJ2KLossless: lambda v, b: imagecodecs.htj2k_encode(v, reversible=True),
    HTJ2KLosslessRPCL: lambda v, b: imagecodecs.htj2k_encode(v, reversible=True, tlm=True),
    HTJ2K: lambda v, b: imagecodecs.htj2k_encode(v, reversible=False, level=0.0005),
}


def smooth(
    rows: int = 64, columns: int = 48, *, bits: int = 12, signed: bool = False
) -> np.ndarray:
    """A picture that uses most of the range and that lossy codecs like: ``(rows, columns)``."""
    y, x = np.mgrid[0:rows, 0:columns]
    shape = np.sin(x / 9) * np.cos(y / 11) * 0.45 + 0.5
    low = 1 << (bits - 1) if signed else 0
    dtype = f"{'i' if signed else 'u'}{1 if bits <= 8 else 2}"
    return (shape * ((1 << bits) - 1)).astype(np.int64).__sub__(low).astype(dtype)


def frame_of(values: np.ndarray, syntax: str, bits: int) -> bytes:
    """One frame's codestream.

    Parameters
    ----------
    values : ndarray, (rows, columns) or (rows, columns, 3)
    bits : int
        Precision, for the codecs that let one choose.
    """
    if syntax == RLELossless:
        return _rle(values)
    return bytes(_ENCODERS[syntax](np.ascontiguousarray(values), bits))


def _rle(values: np.ndarray) -> bytes:
    return bytes(
        get_encoder(RLELossless).encode(
            values,
            encoding_plugin="pydicom",
            rows=values.shape[0],
            columns=values.shape[1],
            number_of_frames=1,
            samples_per_pixel=1 if values.ndim == 2 else 3,
            bits_allocated=8 * values.dtype.itemsize,
            bits_stored=8 * values.dtype.itemsize,
            pixel_representation=int(values.dtype.kind == "i"),
            photometric_interpretation="MONOCHROME2" if values.ndim == 2 else "RGB",
            planar_configuration=0,
        )
    )


def encapsulated(
    ds: Dataset,
    frames: list[bytes],
    syntax: str,
    *,
    table: Literal["basic", "extended", "none"] = "basic",
    fragments: int = 1,
) -> Dataset:
    """A copy of `ds` that holds these frames, each in so many fragments."""
    made = copy.deepcopy(ds)
    if table == "extended":
        made.PixelData, offsets, lengths = encapsulate_extended(frames)
        made.ExtendedOffsetTable, made.ExtendedOffsetTableLengths = offsets, lengths
    else:
        is_basic = table == "basic"
        made.PixelData = encapsulate(frames, fragments_per_frame=fragments, has_bot=is_basic)
    made["PixelData"].VR = "OB"
    made["PixelData"].is_undefined_length = True
    made.file_meta.TransferSyntaxUID = UID(syntax)
    return made


def an_image_object(
    ds: Dataset, values: np.ndarray, *, bits: int, photometric: str = "MONOCHROME2"
) -> Dataset:
    """`ds` described as ``(frames, rows, columns)`` or ``(frames, rows, columns, 3)`` values."""
    ds.NumberOfFrames, ds.Rows, ds.Columns = values.shape[:3]
    ds.SamplesPerPixel = 1 if values.ndim == 3 else 3
    ds.PhotometricInterpretation = photometric
    if values.ndim == 4:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8 * values.dtype.itemsize, bits, bits - 1
    ds.PixelRepresentation = int(values.dtype.kind == "i")
    return ds
