"""A mark that tells one small image from every other, in its pixels and in every picture of it.

Sixteen bits, each a pair of blocks side by side, a dark and a bright one. Which of the two is the
brighter one outlives a window, a lossy compression and the heat over it, so a picture says whose
pixels it shows without any code of the service.
"""

from __future__ import annotations

import hashlib
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread

from dicom_xai.demo.phantom import to_bytes

BITS = 16
_BLOCK, _PAIRS = 6, 8  #: pixels along a block's side; pairs in one row of blocks
_TOP = _LEFT = 16


def marked(file: bytes) -> bytes:
    """An uncompressed monochrome image of at least 128 x 128 with the mark of its own UID."""
    ds = dcmread(BytesIO(file))
    pixels = ds.pixel_array.copy()
    bright, dark = int(pixels.max()), int(pixels.min())
    if ds.PhotometricInterpretation == "MONOCHROME1":
        bright, dark = dark, bright
    code = mark_for(str(ds.SOPInstanceUID))
    for bit in range(BITS):
        first, second = _blocks(bit)
        is_set = code >> bit & 1
        pixels[first] = bright if is_set else dark
        pixels[second] = dark if is_set else bright
    ds.PixelData = pixels.tobytes()
    return to_bytes(ds)


def mark_for(sop_instance_uid: str) -> int:
    """What is written into the image of this UID."""
    return int.from_bytes(hashlib.sha256(sop_instance_uid.encode()).digest()[: BITS // 8])


def is_marked(file: bytes) -> bool:
    """Whether an image bears the mark of its own UID."""
    ds = dcmread(BytesIO(file))
    return mark_shown(ds) == mark_for(str(ds.SOPInstanceUID))


def mark_shown(ds: Dataset) -> int:
    """What is read from an image, or from a picture that has one at its top left."""
    seen: NDArray[np.float64] = ds.pixel_array.astype(np.float64)
    if ds.SamplesPerPixel == 3:
        seen = seen.sum(axis=2)
    if ds.PhotometricInterpretation == "MONOCHROME1":
        seen = -seen
    code = 0
    for bit in range(BITS):
        first, second = _blocks(bit)
        code |= int(seen[first].mean() > seen[second].mean()) << bit
    return code


def _blocks(bit: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a bit's two blocks lie."""
    top = _TOP + bit // _PAIRS * _BLOCK
    left = _LEFT + bit % _PAIRS * 2 * _BLOCK
    rows = slice(top, top + _BLOCK)
    return (
        (rows, slice(left, left + _BLOCK)),
        (rows, slice(left + _BLOCK, left + 2 * _BLOCK)),
    )
