"""Compressed frames become stored values: the only place that decodes with imagecodecs.

Rules: what a frame says about itself is compared with the header before a codec may allocate; the
header decides what a sample's bits mean. imagecodecs lets go of the GIL, holds no GPL code, and its
own errors never get into a message. HTJ2K goes to OpenJPEG like JPEG 2000: OpenJPH is twice as
fast, but its binding drops errors on the floor and gives half an image for a whole one.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import TypeVar

import imagecodecs
import numpy as np
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

from dicom_xai.decode.codestream import Codestream, bare_jpeg2000, read_jpeg, read_jpeg2000
from dicom_xai.decode.layout import Layout
from dicom_xai.errors import DecodeError

_Frame = bytes | memoryview
_Out = TypeVar("_Out")


class Coding(Enum):
    """How a frame is coded."""

    RLE = auto()  #: PackBits by byte plane (PS3.5 annex G)
    DCT = auto()  #: JPEG baseline and extended
    LOSSLESS = auto()  #: JPEG process 14
    LS = auto()  #: JPEG-LS
    J2K = auto()  #: JPEG 2000, High-Throughput too


CODINGS: dict[str, Coding] = {
    RLELossless: Coding.RLE,
    JPEGBaseline8Bit: Coding.DCT,
    JPEGExtended12Bit: Coding.DCT,
    JPEGLossless: Coding.LOSSLESS,
    JPEGLosslessSV1: Coding.LOSSLESS,
    JPEGLSLossless: Coding.LS,
    JPEGLSNearLossless: Coding.LS,
    JPEG2000Lossless: Coding.J2K,
    JPEG2000: Coding.J2K,
    HTJ2KLossless: Coding.J2K,
    HTJ2KLosslessRPCL: Coding.J2K,
    HTJ2K: Coding.J2K,
}
_LOSSY = frozenset({JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless, JPEG2000, HTJ2K})
#: What a frame header may say, by coding; extended is a superset of baseline.
_PROCESSES = {
    Coding.DCT: ("baseline", "extended"),
    Coding.LOSSLESS: ("lossless",),
    Coding.LS: ("JPEG-LS",),
}
#: What imagecodecs raises: its codecs' errors are RuntimeErrors.
_CODEC_ERRORS = (RuntimeError, ValueError, MemoryError)


def decode_frame(layout: Layout, syntax: UID, frame: _Frame) -> np.ndarray:
    """The stored values of one compressed frame.

    Parameters
    ----------
    layout : Layout
        What the header says.
    syntax : UID
        A key of `CODINGS`.
    frame : bytes or memoryview
        All its fragments.

    Returns
    -------
    ndarray, (rows, columns) or (rows, columns, 3) of `Layout.stored_type`
        Two axes are grey or luminance, three are RGB.

    Raises
    ------
    DecodeError
        The frame is damaged, cut off, or contradicts the header.
    """
    coding = CODINGS[syntax]
    if coding is Coding.RLE:
        return _color(layout, layout.stored(_rle(layout, frame)))
    if coding is Coding.J2K:
        frame = bare_jpeg2000(frame)
        says = read_jpeg2000(frame)
    else:
        says = read_jpeg(frame)
    _check(layout, coding, says, frame)
    samples = _SAMPLES[coding](layout, says, frame)
    values = _values(layout, says, samples, is_lossy=syntax in _LOSSY)
    return values if values.ndim == 2 else _color(layout, values, says.is_ycc)


def _check(layout: Layout, coding: Coding, says: Codestream, frame: _Frame) -> None:
    """The frame is what transfer syntax and header promise, and it has its end."""
    wanted_processes = _PROCESSES.get(coding)
    if wanted_processes and says.process not in wanted_processes:
        raise DecodeError(
            f"a frame is coded as {says.process}, the transfer syntax says "
            f"{' or '.join(wanted_processes)}"
        )
    found = says.rows, says.columns, says.samples
    wanted = layout.rows, layout.columns, layout.samples
    if found != wanted:
        raise DecodeError(
            "a frame has {} rows, {} columns and {} samples, the header says {}, {} and {}".format(
                *found, *wanted
            )
        )
    if says.precision > layout.bits_allocated:
        raise DecodeError(
            f"a frame has samples of {says.precision} bits, BitsAllocated is "
            f"{layout.bits_allocated}"
        )
    # libjpeg fills what is missing with grey, so it must not get to see a cut frame; writers pad
    # with zeros or with ones
    if not bytes(frame[-64:]).rstrip(b"\0\xff").endswith(b"\xff\xd9"):
        raise DecodeError("a frame is cut off: it does not end with an end-of-image marker")


def _rle(layout: Layout, frame: _Frame) -> np.ndarray:
    """Cells, ``(rows, columns)`` or ``(rows, columns, 3)``; planes in any case (PS3.5 G.2)."""
    segments = layout.samples * layout.cell_bytes
    found = int.from_bytes(bytes(frame[:4]), "little")
    if found != segments:
        raise DecodeError(
            f"RLE: a frame has {found} segments, SamplesPerPixel and BitsAllocated make {segments}"
        )
    size = layout.rows * layout.columns * segments
    dtype = layout.cell_type.newbyteorder("<")
    # the buffer bounds what is written: PackBits alone could claim 64 times a frame's bytes
    cells = _run(imagecodecs.dicomrle_decode, frame, dtype=dtype, out=bytearray(size))
    if len(cells) != size:
        raise DecodeError(f"RLE: a frame decodes to {len(cells)} bytes, {size} wanted")
    planes = np.frombuffer(cells, dtype).astype(layout.cell_type, copy=False)
    planes = planes.reshape(layout.samples, layout.rows, layout.columns)
    return planes[0] if layout.samples == 1 else np.moveaxis(planes, 0, -1)


def _dct(layout: Layout, says: Codestream, frame: _Frame) -> np.ndarray:
    """Grey, RGB, or of luminance and chrominance the luminance alone."""
    if says.samples == 1:
        return _run(imagecodecs.jpeg8_decode, frame)
    if _is_rgb(layout, says.is_ycc):
        return _run(imagecodecs.jpeg8_decode, frame, colorspace="RGB", outcolorspace="RGB")
    return _run(imagecodecs.jpeg8_decode, frame, colorspace="YCBCR", outcolorspace="GRAYSCALE")


def _lossless(layout: Layout, says: Codestream, frame: _Frame) -> np.ndarray:
    if says.samples == 1:
        return _run(imagecodecs.jpeg8_decode, frame)
    # the same name on both sides: nothing is transformed
    return _run(imagecodecs.jpeg8_decode, frame, colorspace="RGB", outcolorspace="RGB")


def _ls(layout: Layout, says: Codestream, frame: _Frame) -> np.ndarray:
    return _run(imagecodecs.jpegls_decode, frame)


def _j2k(layout: Layout, says: Codestream, frame: _Frame) -> np.ndarray:
    return _run(imagecodecs.jpeg2k_decode, frame, planar=False, numthreads=1)


_SAMPLES: dict[Coding, Callable[[Layout, Codestream, _Frame], np.ndarray]] = {
    Coding.DCT: _dct,
    Coding.LOSSLESS: _lossless,
    Coding.LS: _ls,
    Coding.J2K: _j2k,
}


def _run(codec: Callable[..., _Out], frame: _Frame, **options: object) -> _Out:
    try:
        return codec(frame, **options)
    except _CODEC_ERRORS as error:
        raise DecodeError(f"a frame is damaged: {type(error).__name__}") from error


def _values(layout: Layout, says: Codestream, samples: np.ndarray, *, is_lossy: bool) -> np.ndarray:
    """Samples of a codestream as stored values.

    The bits of a sample are two's complement when PixelRepresentation says so, whatever the
    codestream says: JPEG and JPEG-LS have no sign, and some JPEG 2000 writers forget it. Bits
    above BitsStored are none of the value's (PS3.5 8.1.1), but for a lossy codec, which may
    overshoot: there they are clipped.
    """
    shape = (layout.rows, layout.columns)
    if samples.shape not in (shape, (*shape, layout.samples)) or samples.dtype.kind not in "iu":
        raise DecodeError("a frame decodes to another shape than its header says")
    cells = samples.astype(layout.cell_type, copy=False)
    surplus = says.precision - layout.bits_stored
    if surplus > 0 and not is_lossy:
        return layout.stored(cells, high_bit=min(layout.high_bit, says.precision - 1))
    values = layout.stored(cells, says.precision, says.precision - 1)
    if surplus <= 0:
        return values
    low = -(1 << (layout.bits_stored - 1)) if layout.signed else 0
    return values.clip(low, low + (1 << layout.bits_stored) - 1)


def _color(layout: Layout, values: np.ndarray, is_ycc: bool | None = None) -> np.ndarray:
    """RGB as it is, of luminance and chrominance the luminance."""
    if values.ndim == 2 or _is_rgb(layout, is_ycc):
        return values
    return values[..., 0]


def _is_rgb(layout: Layout, is_ycc: bool | None) -> bool:
    """Whether decoded samples are red, green and blue.

    YBR_ICT and YBR_RCT are undone by the decoder (PS3.3 C.7.6.3.1.2). A stream's own word goes
    before the header's (PS3.5 8.2.4): writers forget to change the latter when they compress.
    """
    if is_ycc is not None:
        return not is_ycc
    return not layout.photometric.startswith("YBR_FULL")
