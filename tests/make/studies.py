"""Small studies of nobody, as files: quick to make, to send and to triage."""

from __future__ import annotations

from io import BytesIO
from itertools import count

import numpy as np
from pydicom import Dataset, dcmread

from dicom_xai.demo.phantom import Phantom, chest, head_ct, to_bytes

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
