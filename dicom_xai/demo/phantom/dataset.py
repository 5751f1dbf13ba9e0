"""The DICOM side of a phantom: who, when, and the modules that all its objects share.

Names and identifiers are clearly synthetic. Objects are complete: a validator finds no error.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from dicom_xai import __version__, uids


def fresh_uid() -> str:
    """A UID that nobody has used (PS3.5 B.2)."""
    return f"2.25.{uuid.uuid4().int}"


@dataclass(frozen=True, slots=True)
class Subject:
    """Whose study it is, and when it was made. Nobody: every value is invented."""

    patient_name: str
    patient_id: str
    birth_date: str  #: DICOM DA
    sex: str  #: M, F or O
    study_date: str  #: DICOM DA
    study_time: str  #: DICOM TM
    accession_number: str
    study_id: str

    @classmethod
    def synthetic(cls, rng: np.random.Generator, when: datetime | None = None) -> Subject:
        """An invented person, and `when` the study was made (1 January 2026 if not said)."""
        when = when or datetime(2026, 1, 1, 12)
        number = int(rng.integers(1, 1_000_000))
        birth = f"{rng.integers(1930, 2006)}{rng.integers(1, 13):02}{rng.integers(1, 29):02}"
        return cls(
            patient_name=f"PHANTOM^SYNTHETIC {number:06}",
            patient_id=f"PHANTOM-{number:06}",
            birth_date=birth,
            sex=str(rng.choice(["F", "M", "O"])),
            study_date=f"{when:%Y%m%d}",
            study_time=f"{when:%H%M%S}",
            accession_number=f"PH{number:06}",
            study_id=f"{number % 10000}",
        )


@dataclass(frozen=True, slots=True, eq=False)
class Phantom:
    """A study (one series) and the truth about it.

    Attributes
    ----------
    datasets : tuple of Dataset
        Complete, with file meta information and pixel data, in InstanceNumber order.
    truth : mapping of str to ndarray
        For each class that the phantom could show: ``(images, rows, columns)`` bool on the
        source's pixels, True inside a lesion. All False where there is none.
    findings : frozenset of str
        The classes that it does show.
    """

    datasets: tuple[Dataset, ...]
    truth: Mapping[str, NDArray[np.bool_]]
    findings: frozenset[str]

    @property
    def files(self) -> tuple[bytes, ...]:
        """Each object as a DICOM file."""
        return tuple(to_bytes(ds) for ds in self.datasets)


def to_bytes(ds: Dataset) -> bytes:
    """A data set with file meta information as a DICOM file (PS3.10)."""
    file = BytesIO()
    dcmwrite(file, ds, enforce_file_format=True)
    return file.getvalue()


def new_dataset(
    sop_class_uid: str, subject: Subject, new_uid: Callable[[], str], *, study: str, series: str
) -> Dataset:
    """Patient, Study, Series, Equipment and SOP Common of one object (PS3.3 C.7, C.12.1).

    Parameters
    ----------
    sop_class_uid : str
    subject : Subject
    new_uid : callable
        Gives the SOP Instance UID.
    study, series : str
        Their Instance UIDs.
    """
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = sop_class_uid
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = new_uid()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.ImplementationClassUID = uids.IMPLEMENTATION_CLASS_UID
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.PatientName = subject.patient_name
    ds.PatientID = subject.patient_id
    ds.PatientBirthDate = subject.birth_date
    ds.PatientSex = subject.sex
    ds.StudyInstanceUID = study
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = subject.study_date
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = subject.study_time
    ds.StudyID = subject.study_id
    ds.AccessionNumber = subject.accession_number
    ds.ReferringPhysicianName = ""
    ds.SeriesInstanceUID = series
    ds.SeriesNumber = 1
    ds.Manufacturer = "dicom_xai"
    ds.ManufacturerModelName = "Synthetic phantom"
    ds.SoftwareVersions = __version__
    ds.BurnedInAnnotation = "NO"
    return ds


def set_pixels(
    ds: Dataset, stored: NDArray[np.generic], bits_stored: int, photometric: str
) -> None:
    """Image Pixel Module of one 16-bit grayscale frame (PS3.3 C.7.6.3)."""
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = photometric
    ds.Rows, ds.Columns = stored.shape
    ds.BitsAllocated = 16
    ds.BitsStored = bits_stored
    ds.HighBit = bits_stored - 1
    ds.PixelRepresentation = int(np.issubdtype(stored.dtype, np.signedinteger))
    ds.PixelData = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
    ds["PixelData"].VR = "OW"
