"""Maps become the frames of a Segmentation: packed bits, probabilities as bytes, labels.

All is computed on the maps' device, many frames at a time; what is copied to the host is what the
file will hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from dicom_xai.config import SegmentationKind
from dicom_xai.encode.color import Layer
from dicom_xai.encode.maps import MapValues
from dicom_xai.encode.pixeldata import Image
from dicom_xai.encode.seg import MAX_FRACTIONAL_VALUE

#: What is below is stored as zero.
LOWEST_FRACTION = 0.5 / MAX_FRACTIONAL_VALUE
#: Moves the lowest bit of each of eight bytes into the highest byte, the first byte's lowest: the
#: sum of 2 to the power of 56 - 7 i.
_GATHER_BITS = sum(1 << (56 - 7 * i) for i in range(8))


class Gathered:
    """The frames of one kind of Segmentation as batches come.

    Attributes
    ----------
    frames : dict of (int, int) to ndarray
        As in `seg.Region`, by index of the map and of the frame; LABELMAP: map 0 alone, labels are
        1 + the index of the map.
    present : set of (int, int)
        Which map has pixels on which frame.
    overlapping : set of int
        BINARY: frames on which regions overlap.
    """

    def __init__(self, kind: SegmentationKind) -> None:
        self.kind = kind
        self.frames: dict[tuple[int, int], Image] = {}
        self.present: set[tuple[int, int]] = set()
        self.overlapping: set[int] = set()

    def add(self, batch: Sequence[int], maps: Sequence[MapValues | None]) -> None:
        """Take a batch of frames.

        Parameters
        ----------
        batch : sequence of int
            Indices of the frames, all of one size.
        maps : sequence of MapValues or None
            Of each map; None where it has nothing on this batch.
        """
        if self.kind is SegmentationKind.LABELMAP:
            self._add_labels(batch, maps)
            return
        for m, found in enumerate(maps):
            if found is None:
                continue
            if self.kind is SegmentationKind.BINARY:
                images = dict(zip(found.layer.frames, packed(found.layer.mask), strict=True))
            else:
                images = dict(zip(found.frames, quantised(found.values), strict=True))
                images = {n: image for n, image in images.items() if image.any()}
            for n, image in images.items():
                self.frames[m, batch[n]] = image
                self.present.add((m, batch[n]))
        if self.kind is SegmentationKind.BINARY:
            layers = [found.layer for found in maps if found is not None]
            self.overlapping |= {batch[n] for n in _overlapping(layers)}

    def _add_labels(self, batch: Sequence[int], maps: Sequence[MapValues | None]) -> None:
        found = {m: values.layer for m, values in enumerate(maps) if values is not None}
        places = sorted({n for layer in found.values() for n in layer.frames})
        if not places:
            return
        dtype = torch.uint8 if len(maps) <= 255 else torch.int16
        labels = _strongest(found, places, dtype)
        for m in found:
            is_there = (labels == m + 1).view(torch.uint8).amax(dim=(1, 2)).tolist()
            self.present |= {
                (m, batch[n]) for n, is_m in zip(places, is_there, strict=True) if is_m
            }
        images = labels.cpu().numpy().astype(np.uint8 if len(maps) <= 255 else np.uint16)
        for n, image in zip(places, images, strict=True):
            self.frames[0, batch[n]] = image


def packed(masks: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Masks as bits, the first pixel in the lowest bit.

    Parameters
    ----------
    masks : Tensor, (frames, rows, columns) bool

    Returns
    -------
    ndarray, (frames, bytes) uint8
        Each frame on its own, the rest of its last byte zero.
    """
    flat = masks.flatten(1).view(torch.uint8)
    flat = F.pad(flat, (0, -flat.shape[1] % 8)) if flat.shape[1] % 8 else flat
    words = flat.contiguous().view(torch.int64)
    return ((words * _GATHER_BITS) >> 56).bitwise_and_(0xFF).to(torch.uint8).cpu().numpy()


def quantised(probabilities: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Probabilities 0..1 of any shape as bytes, `MAX_FRACTIONAL_VALUE` = 1; halves to even."""
    scaled = (probabilities * MAX_FRACTIONAL_VALUE).round_().clamp_(0, MAX_FRACTIONAL_VALUE)
    return scaled.to(torch.uint8).cpu().numpy()


def _overlapping(layers: Sequence[Layer]) -> set[int]:
    """On which frames of the batch a pixel is in several masks."""
    several = sorted({n for layer in layers for n in layer.frames})
    counts = {n: sum(n in layer.frames for layer in layers) for n in several}
    found = set()
    for n in (n for n, count in counts.items() if count > 1):
        masks = [layer.mask[layer.frames.index(n)] for layer in layers if n in layer.frames]
        if bool((torch.stack(masks).sum(dim=0, dtype=torch.uint8) > 1).any()):
            found.add(n)
    return found


def _strongest(layers: dict[int, Layer], places: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """``(len(places), rows, columns)``: 1 + the map that is strongest at each pixel, or 0.

    Of equally strong ones the first, which is the more probable finding.
    """
    first, some = next(iter(layers.items()))
    if len(layers) == 1:
        return some.mask.to(dtype) * (first + 1)
    shape = (len(places), *some.mask.shape[1:])
    labels = torch.zeros(shape, dtype=dtype, device=some.mask.device)
    best = torch.full(shape, -torch.inf, device=some.mask.device)
    for m, layer in layers.items():
        at = [places.index(n) for n in layer.frames]
        is_better = layer.mask & (layer.heat > best[at])
        labels[at] = torch.where(is_better, m + 1, labels[at])
        best[at] = torch.where(is_better, layer.heat, best[at])
    return labels
