"""Small studies of nobody, as files: quick to make, to send and to triage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from itertools import count

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.uid import CTImageStorage

from dicom_xai.demo.phantom import Phantom, Subject, chest, fresh_uid, head_ct, to_bytes
from dicom_xai.demo.phantom.dataset import new_dataset, set_pixels

_seeds = count(20261123)


def a_radiograph(modality: str = "DX", views: tuple[str, ...] = ("PA",)) -> Phantom:
    """A chest study of small images, another one with each call."""
    rng = np.random.default_rng(next(_seeds))
    return chest(rng, modality=modality, views=views, matrix=(288, 256), findings={"nodule"})


def a_head(slices: int = 20) -> Phantom:
    """A head CT series of small slices, another one with each call."""
    rng = np.random.default_rng(next(_seeds))
    return head_ct(rng, slices=slices, matrix=128, haemorrhage=True, tilt_degrees=0.0)


def changed(file: bytes, **attributes: object) -> bytes:
    """A file with other values; None removes an attribute."""
    ds = dcmread(BytesIO(file))
    for keyword, value in attributes.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    return to_bytes(ds)


def header_of(file: bytes) -> Dataset:
    """What a file says, without its pixels."""
    return dcmread(BytesIO(file), stop_before_pixels=True)


def study_of(phantom: Phantom) -> str:
    """The Study Instance UID."""
    return str(phantom.datasets[0].StudyInstanceUID)


@dataclass(frozen=True)
class BallStudy:
    """A CT of a bright ball, cut obliquely and sent from the top down, and what does not belong.

    Attributes
    ----------
    files : tuple of bytes
        Slices from the last position to the first, a localizer and a slice sent twice under
        another UID among them.
    truth : mapping of str to ndarray
        For each slice of the stack, by SOP Instance UID, ``(rows, columns)`` bool: inside the ball.
    strays : frozenset of str
        SOP Instance UIDs of localizer and duplicate.
    """

    files: tuple[bytes, ...]
    truth: Mapping[str, NDArray[np.bool_]]
    strays: frozenset[str]
    study_instance_uid: str


def a_ball_study(slices: int = 24, matrix: int = 64) -> BallStudy:
    """100 HU in a ball of 25 mm, 20 HU around it; the normal leans 20 degrees to the front."""
    subject = Subject.synthetic(np.random.default_rng(next(_seeds)))
    study, series, frame_of_reference = fresh_uid(), fresh_uid(), fresh_uid()
    row, column = np.array([1.0, 0, 0]), np.array([0, math.cos(0.35), math.sin(0.35)])
    normal, spacing, step, centre = np.cross(row, column), 2.0, 4.0, np.array([8.0, -5.0, 12.0])
    grid = (np.arange(matrix) - matrix / 2) * spacing
    plane = grid[None, :, None] * row + grid[:, None, None] * column

    def a_slice(number: int, height: float, image_type: str = "AXIAL") -> Dataset:
        ds = new_dataset(CTImageStorage, subject, fresh_uid, study=study, series=series)
        ds.FrameOfReferenceUID, ds.PositionReferenceIndicator = frame_of_reference, ""
        ds.Modality, ds.BodyPartExamined, ds.InstanceNumber = "CT", "HEAD", number
        ds.ImageType = ["ORIGINAL", "PRIMARY", image_type]
        ds.PixelSpacing, ds.SliceThickness, ds.KVP = [spacing, spacing], step, "120"
        origin = centre + normal * height + plane[0, 0]
        ds.ImagePositionPatient = [f"{value:.6f}" for value in origin]
        ds.ImageOrientationPatient = [f"{value:.8f}" for value in (*row, *column)]
        ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "-1024", "1", "HU"
        ds.WindowCenter, ds.WindowWidth, ds.AcquisitionNumber = "60", "80", 1
        distance = np.linalg.norm(plane + normal * height, axis=-1)
        hu = 60 + np.clip((25 - distance) * 20, -40, 40)
        set_pixels(ds, (hu + 1024).round().astype(np.uint16), 12, "MONOCHROME2")
        return ds

    heights = [(n - slices / 2) * step for n in range(slices)]
    stack = [a_slice(slices - n, height) for n, height in enumerate(heights)]
    truth = {
        str(ds.SOPInstanceUID): np.linalg.norm(plane + normal * height, axis=-1) < 25
        for ds, height in zip(stack, heights, strict=True)
    }
    localizer = a_slice(900, 1.0, "LOCALIZER")
    duplicate = a_slice(901, heights[slices // 2])
    datasets = [*stack[::-1], duplicate]
    datasets.insert(3, localizer)
    return BallStudy(
        files=tuple(map(to_bytes, datasets)),
        truth=truth,
        strays=frozenset({str(localizer.SOPInstanceUID), str(duplicate.SOPInstanceUID)}),
        study_instance_uid=study,
    )
