"""Images as stored files and as decoded frames: built by code, or the real ones of pydicom."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from pydicom import Dataset
from pydicom.data import get_testdata_file
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from dicom_xai.demo.phantom import fresh_uid, to_bytes
from dicom_xai.demo.phantom.dataset import set_pixels
from dicom_xai.study import Frame, Instance, Sender

CPU = torch.device("cpu")


def an_instance(ds: Dataset | None = None) -> Instance:
    """An instance with the data set's UIDs; it never met a spool."""
    uids = {
        keyword: str(ds.get(keyword, "")) if ds is not None else ""
        for keyword in ("SOPInstanceUID", "SOPClassUID", "SeriesInstanceUID", "StudyInstanceUID")
    }
    return Instance(
        sop_instance_uid=uids["SOPInstanceUID"],
        sop_class_uid=uids["SOPClassUID"],
        series_instance_uid=uids["SeriesInstanceUID"],
        study_instance_uid=uids["StudyInstanceUID"],
        transfer_syntax_uid=ExplicitVRLittleEndian,
        spool_key="key",
        sha256="0" * 64,
        size_bytes=0,
        sender=Sender("SENDER", "DICOM_XAI", "127.0.0.1"),
    )


def an_object(
    stored: np.ndarray, *, sop_class_uid: str = SecondaryCaptureImageStorage, **attributes: object
) -> Dataset:
    """A one-frame grayscale object of 16 bits; `attributes` replace its own, None removes."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = sop_class_uid
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = fresh_uid()
    ds.StudyInstanceUID = ds.SeriesInstanceUID = "1.2.3"
    ds.Modality = "OT"
    set_pixels(ds, stored, 16, "MONOCHROME2")
    for keyword, value in attributes.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    return ds


def a_file(stored: np.ndarray, **attributes: object) -> bytes:
    """`an_object` as a file."""
    return to_bytes(an_object(stored, **attributes))


def a_frame(
    values: object, *, valid: object = None, number: int = 1, **attributes: object
) -> Frame:
    """A decoded frame with these values; its header has what decoding leaves."""
    array = np.asarray(values, dtype=np.float32)
    ds = an_object(np.zeros(array.shape, dtype=np.int16), **attributes)
    del ds.PixelData
    mask = None if valid is None else torch.as_tensor(np.asarray(valid, dtype=bool))
    rows, columns = array.shape
    return Frame(
        an_instance(ds),
        ds,
        number,
        (rows, columns),
        lambda: torch.from_numpy(array),
        lambda: mask,
    )


def a_slice(
    z: float, *, number: int = 1, shape: tuple[int, int] = (4, 4), **attributes: object
) -> Frame:
    """An axial CT slice at height `z` mm."""
    defaults: dict[str, object] = {
        "sop_class_uid": CTImageStorage,
        "Modality": "CT",
        "InstanceNumber": number,
        "ImagePositionPatient": [0, 0, z],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [0.5, 0.5],
        "FrameOfReferenceUID": "1.2.3.4",
    }
    wanted = {key: value for key, value in {**defaults, **attributes}.items() if value is not None}
    return a_frame(np.zeros(shape), **wanted)


def real_file(name: str) -> bytes:
    """A file of the pydicom wheel or of pydicom-data; never fetched."""
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str), name
    return Path(path).read_bytes()
