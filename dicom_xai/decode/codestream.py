"""What a compressed frame says about itself, before a codec allocates anything for it.

Only headers are read: the marker segments of JPEG and JPEG-LS (ITU-T T.81 annex B, T.87 annex C)
up to the first scan, the main header of JPEG 2000 (T.800 annex A), if need be inside its boxes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from dicom_xai.errors import DecodeError

_START_OF_IMAGE, _START_OF_SCAN, _ADOBE, _JFIF = 0xD8, 0xDA, 0xEE, 0xE0
_NO_LENGTH = {0x01, *range(0xD0, 0xD9)}
#: Start of Frame by process (T.81 Table B.1; T.87 C.2.2 for JPEG-LS).
PROCESSES = {
    0xC0: "baseline",
    0xC1: "extended",
    0xC2: "progressive",
    0xC3: "lossless",
    0xF7: "JPEG-LS",
}
_FRAME_MARKERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
_CODING_STYLE, _START_OF_TILE = 0xFF52, 0xFF90
_BOX_SIGNATURE = b"\x00\x00\x00\x0cjP  "
_RGB_IDS = ((82, 71, 66), (114, 103, 98))  #: "RGB" and "rgb"


@dataclass(frozen=True, slots=True)
class Codestream:
    """What stands in a compressed frame's own header.

    Attributes
    ----------
    process : str
        A value of `PROCESSES`, another JPEG process by its marker, or ``JPEG 2000``.
    precision : int
        Bits of a sample.
    signed : bool
        Only JPEG 2000 can say so.
    is_ycc : bool or None
        A stream of three components says that they are luminance and chrominance, or that
        they are not; None where it says nothing. A JPEG 2000 one that holds a transformation from
        red, green and blue says that they are these: the decoder undoes it.
    """

    process: str
    rows: int
    columns: int
    samples: int
    precision: int
    signed: bool = False
    is_ycc: bool | None = None


def read_jpeg(frame: bytes | memoryview) -> Codestream:
    """The header of a JPEG or JPEG-LS frame.

    Raises
    ------
    DecodeError
        It is none, or it is cut off.
    """
    found: Codestream | None = None
    ids: tuple[int, ...] = ()
    adobe: int | None = None
    is_jfif = False
    for marker, segment in _segments(frame):
        if marker in _FRAME_MARKERS:
            if len(segment) < 6 or len(segment) != 6 + 3 * segment[5]:
                raise DecodeError("JPEG: a frame header of the wrong length")
            precision, rows, columns, samples = struct.unpack_from(">BHHB", segment)
            process = PROCESSES.get(marker, f"process of marker FF{marker:02X}")
            found = Codestream(process, rows, columns, samples, precision)
            ids = tuple(segment[6::3])
        elif marker == _ADOBE and len(segment) >= 12 and segment[:5] == b"Adobe":
            adobe = segment[11]
        elif marker == _JFIF and segment[:4] == b"JFIF":
            is_jfif = True
    if found is None:
        raise DecodeError("JPEG: no frame header before the first scan")
    is_ycc = None
    if found.samples == 3:
        is_ycc = _is_ycc(adobe, ids, is_jfif)
    return Codestream(
        found.process, found.rows, found.columns, found.samples, found.precision, is_ycc=is_ycc
    )


def _is_ycc(adobe: int | None, ids: tuple[int, ...], is_jfif: bool) -> bool | None:
    """Whether three components are YCbCr: Adobe's word, then RGB spelled as ids, then JFIF."""
    if adobe is not None:
        return adobe == 1
    if ids in _RGB_IDS:
        return False
    return True if is_jfif else None


def _segments(frame: bytes | memoryview) -> list[tuple[int, bytes]]:
    """Marker and content of each segment before the first scan."""
    if bytes(frame[:2]) != bytes((0xFF, _START_OF_IMAGE)):
        raise DecodeError("JPEG: no start of image")
    found: list[tuple[int, bytes]] = []
    at = 2
    while at + 1 < len(frame):
        if frame[at] != 0xFF:
            raise DecodeError(f"JPEG: byte {at} of a frame is no marker")
        marker = frame[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        at += 2
        if marker in _NO_LENGTH:
            continue
        if at + 2 > len(frame):
            break
        (length,) = struct.unpack_from(">H", frame, at)
        if length < 2 or at + length > len(frame):
            break
        if marker == _START_OF_SCAN:
            return found
        found.append((marker, bytes(frame[at + 2 : at + length])))
        at += length
    raise DecodeError("JPEG: cut off before the first scan")


def bare_jpeg2000(frame: bytes | memoryview) -> bytes | memoryview:
    """The codestream itself, where it comes in the boxes of a JP2 file (T.800 annex I).

    PS3.5 A.4.4 allows no boxes, and what they say about colour must not count.
    """
    if bytes(frame[:8]) != _BOX_SIGNATURE:
        return frame
    at = 0
    while at + 8 <= len(frame):
        length, kind = struct.unpack_from(">L4s", frame, at)
        header = 8
        if length == 1 and at + 16 <= len(frame):
            (length,) = struct.unpack_from(">Q", frame, at + 8)
            header = 16
        end = len(frame) if length == 0 else at + length
        if end < at + header or end > len(frame):
            break
        if kind == b"jp2c":
            return frame[at + header : end]
        at = end
    raise DecodeError("JPEG 2000: boxes without a codestream")


def read_jpeg2000(frame: bytes | memoryview) -> Codestream:
    """The image and tile size segment of a bare JPEG 2000 or HTJ2K codestream (T.800 A.5.1).

    Raises
    ------
    DecodeError
        It is none, it is cut off, or its components differ or are subsampled.
    """
    if bytes(frame[:4]) != b"\xff\x4f\xff\x51" or len(frame) < 42:
        raise DecodeError("JPEG 2000: no codestream header")
    length, _, right, bottom, left, top = struct.unpack_from(">HHLLLL", frame, 4)
    (samples,) = struct.unpack_from(">H", frame, 40)
    if length != 38 + 3 * samples or 4 + length > len(frame) or not samples:
        raise DecodeError("JPEG 2000: an image size segment of the wrong length")
    components = {bytes(frame[42 + 3 * index : 45 + 3 * index]) for index in range(samples)}
    if len(components) != 1:
        raise DecodeError("JPEG 2000: its components differ in precision, sign or sampling")
    ((depth, step_x, step_y),) = components
    if (step_x, step_y) != (1, 1):
        raise DecodeError("JPEG 2000: subsampled components")
    is_ycc = False if samples == 3 and _is_transformed(frame, 4 + length) else None
    return Codestream(
        "JPEG 2000",
        rows=max(0, bottom - top),
        columns=max(0, right - left),
        samples=samples,
        precision=(depth & 0x7F) + 1,
        signed=bool(depth & 0x80),
        is_ycc=is_ycc,
    )


def _is_transformed(frame: bytes | memoryview, at: int) -> bool:
    """Whether the main header, from this segment on, tells a component transformation (A.6.1)."""
    while at + 9 <= len(frame):
        marker, length = struct.unpack_from(">HH", frame, at)
        if marker == _CODING_STYLE:
            return frame[at + 8] == 1
        if marker == _START_OF_TILE or length < 2:
            break
        at += 2 + length
    raise DecodeError("JPEG 2000: no coding style in the main header")
