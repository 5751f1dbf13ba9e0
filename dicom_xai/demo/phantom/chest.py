"""Chest radiographs with nodule, consolidation and pneumothorax, each present or not on its own.

Here they become DICOM; `thorax` paints them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
from pydicom import Dataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
)

from dicom_xai.demo.phantom.dataset import Phantom, Subject, fresh_uid, new_dataset, set_pixels
from dicom_xai.demo.phantom.thorax import CHEST_FINDINGS, Picture, paint

_BITS_STORED = 12
_FIELDS_CM = ((43.0, 35.0), (42.0, 42.0), (35.0, 43.0))  #: rows, columns


def chest(
    rng: np.random.Generator,
    *,
    modality: str = "DX",
    findings: Collection[str] | None = None,
    matrix: int | tuple[int, int] | None = None,
    views: tuple[str, ...] = ("PA",),
    photometric: str | None = None,
    subject: Subject | None = None,
    new_uid: Callable[[], str] = fresh_uid,
) -> Phantom:
    """One frontal chest study: an image for each view, the same findings in all of them.

    Anatomy, size, rotation, exposure, noise, collimation, marker and confounders (end-on vessels,
    granulomas, nipple shadows, skin folds, electrodes) vary from call to call.

    Parameters
    ----------
    rng : numpy.random.Generator
        Decides everything but the UIDs.
    modality : str
        DX or CR.
    findings : collection of str, optional
        Out of `CHEST_FINDINGS`; each present with a chance of 0.4 when not given.
    matrix : int or tuple of int, optional
        Rows, with columns to make pixels square, or rows and columns; 1024 to 2500 pixels on
        the longer side when not given.
    views : tuple of str
        PA or AP, one image each.
    photometric : str, optional
        MONOCHROME1 or MONOCHROME2; either when not given.
    subject : Subject, optional
        Invented when not given.
    new_uid : callable
        Where UIDs come from.

    Raises
    ------
    ValueError
        A modality, view or finding that does not exist here.
    """
    if modality not in ("DX", "CR"):
        raise ValueError(f"modality {modality!r}: DX or CR wanted")
    if not views or any(view not in ("PA", "AP") for view in views):
        raise ValueError(f"views {views!r}: PA or AP wanted")
    if findings is None:
        findings = [name for name in CHEST_FINDINGS if rng.random() < 0.4]
    if unknown := set(findings) - set(CHEST_FINDINGS):
        raise ValueError(f"findings {sorted(unknown)}: {', '.join(CHEST_FINDINGS)} wanted")
    subject = subject or Subject.synthetic(rng)
    field = _FIELDS_CM[rng.integers(len(_FIELDS_CM))]
    if matrix is None:
        matrix = round(int(rng.integers(1024, 2501)) * field[0] / max(field))
    if isinstance(matrix, int):
        matrix = (matrix, round(matrix * field[1] / field[0]))
    study, series = new_uid(), new_uid()
    datasets, masks = [], []
    for number, view in enumerate(views, start=1):
        picture = paint(rng, frozenset(findings), field, matrix, view)
        ds = new_dataset(
            DigitalXRayImageStorageForPresentation
            if modality == "DX"
            else ComputedRadiographyImageStorage,
            subject,
            new_uid,
            study=study,
            series=series,
        )
        ds.Modality = modality
        ds.InstanceNumber = number
        spacing = (field[0] * 10 / matrix[0], field[1] * 10 / matrix[1])
        _describe(ds, view, spacing)
        _expose(ds, rng, picture, photometric or str(rng.choice(["MONOCHROME1", "MONOCHROME2"])))
        datasets.append(ds)
        masks.append(picture.truth)
    truth = {name: np.stack([mask[name] for mask in masks]) for name in CHEST_FINDINGS}
    return Phantom(tuple(datasets), truth, frozenset(findings))


def _describe(ds: Dataset, view: str, spacing_mm: tuple[float, float]) -> None:
    """Series, anatomy and detector attributes (PS3.3 A.2 CR, A.26 DX)."""
    ds.StudyDescription = "Chest phantom"
    ds.SeriesDescription = f"{view} synthetic chest, not a patient"
    ds.BodyPartExamined = "CHEST"
    ds.ViewPosition = view
    ds.PatientOrientation = ["L", "F"]
    ds.PixelSpacing = ds.ImagerPixelSpacing = [f"{value:.6f}" for value in spacing_mm]
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "0", "1", "US"
    ds.ImageType = ["ORIGINAL", "PRIMARY", ""]
    ds.LossyImageCompression = "00"
    ds.AcquisitionNumber = 1
    ds.KVP = "120"
    if ds.Modality == "CR":
        ds.PlateID = ""
        return
    ds.ImageLaterality = "U"
    ds.PresentationIntentType = "FOR PRESENTATION"
    ds.PixelIntensityRelationship = "LOG"
    ds.PixelIntensityRelationshipSign = 1
    ds.PresentationLUTShape = "IDENTITY"
    ds.DetectorType = "DIRECT"
    ds.PositionerType = "NONE"
    ds.AcquisitionContextSequence = []
    ds.AnatomicRegionSequence = [_code("51185008", "SCT", "Chest")]
    code, meaning = {
        "PA": ("399348003", "postero-anterior"),
        "AP": ("399321003", "antero-posterior"),
    }[view]
    item = _code(code, "SCT", meaning)
    item.ViewModifierCodeSequence = []
    ds.ViewCodeSequence = [item]


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def _expose(ds: Dataset, rng: np.random.Generator, picture: Picture, photometric: str) -> None:
    """Attenuation to stored values and the VOI window that shows them."""
    top = 2**_BITS_STORED - 1
    gain, offset = rng.uniform(0.45, 0.7) * top, rng.uniform(0.03, 0.2) * top
    stored = picture.attenuation * np.float32(gain) + np.float32(offset)
    if picture.shutter is not None:
        stored[picture.shutter] = 0
    low = float(gain * rng.uniform(0.05, 0.2) + offset)
    high = float(gain * rng.uniform(1.1, 1.3) + offset)
    if photometric == "MONOCHROME1":
        stored = top - stored
        low, high = top - high, top - low
        if ds.Modality == "DX":
            ds.PresentationLUTShape = "INVERSE"
            ds.PixelIntensityRelationshipSign = -1
    whole = np.clip(np.rint(stored), 0, top).astype(np.uint16)
    set_pixels(ds, whole, _BITS_STORED, photometric)
    ds.WindowCenter = f"{(low + high) / 2:.1f}"
    ds.WindowWidth = f"{high - low:.1f}"
