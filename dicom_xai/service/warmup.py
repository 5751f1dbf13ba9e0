"""The first study must not pay for what the first run of each stage costs.

Imports, fonts, kernels and memory are paid for here: a made-up image goes through the pipeline once
for each model, with thresholds so low that a Segmentation is made too. Nothing of it is kept.
"""

from __future__ import annotations

import copy
import hashlib
from io import BytesIO

import numpy as np
from pydicom import Dataset, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    CTImageStorage,
    ExplicitVRLittleEndian,
)

from dicom_xai import uids
from dicom_xai.config import InputKind, ModelCard
from dicom_xai.explain.served import ServedModel
from dicom_xai.service.files import route_for, run_unit
from dicom_xai.study import Instance, Per, Sender, Unit

_SIZE = 512
_CREATED_AT = "20260101000000.000000+0000"


def warm_up(model: ServedModel, explainer: str) -> None:
    """Run one made-up unit through decode, infer, explain and encode."""
    lenient = copy.copy(model)
    lenient.card = _finds_everything(model.card)
    is_series = model.card.inputs[0].kind is not InputKind.IMAGE2D
    files = [_image(is_series, number) for number in range(2 if is_series else 1)]
    members = [(_instance(data, number), data) for number, data in enumerate(files)]
    first = members[0][0]
    unit = Unit(Per.SERIES, first.study_instance_uid, first.series_instance_uid)
    route = route_for(lenient.card, explainer, slices=1)
    run_unit(unit, members, lenient, route, _CREATED_AT, {})


def _finds_everything(card: ModelCard) -> ModelCard:
    output = card.outputs[0]
    classes = tuple(item.model_copy(update={"threshold": 1e-9}) for item in output.classes)
    scale = card.heatmap.model_copy(update={"threshold": 1e-9})
    return card.model_copy(
        update={
            "outputs": (output.model_copy(update={"classes": classes}),),
            "heatmap": scale,
            "stack": None,
        }
    )


def _image(is_series: bool, number: int) -> bytes:
    """A CT slice or a radiograph of noise, of nobody."""
    ds = Dataset()
    ds.SOPClassUID = CTImageStorage if is_series else ComputedRadiographyImageStorage
    ds.SOPInstanceUID = uids.derive("warm-up", str(number))
    ds.StudyInstanceUID = uids.derive("warm-up", "study")
    ds.SeriesInstanceUID = uids.derive("warm-up", "series")
    ds.FrameOfReferenceUID = uids.derive("warm-up", "frame of reference")
    ds.Modality = "CT" if is_series else "CR"
    ds.InstanceNumber = number + 1
    ds.Rows = ds.Columns = _SIZE
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.RescaleSlope, ds.RescaleIntercept = 1, -1024 if is_series else 0
    ds.WindowCenter, ds.WindowWidth = 1024, 2048
    if is_series:
        ds.PixelSpacing, ds.SliceThickness = [1, 1], 1
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.ImagePositionPatient = [0, 0, number]
    noise = np.random.default_rng(number).integers(0, 4096, (_SIZE, _SIZE), np.uint16)
    ds.PixelData = noise.tobytes()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = BytesIO()
    dcmwrite(file, ds, enforce_file_format=True)
    return file.getvalue()


def _instance(data: bytes, number: int) -> Instance:
    return Instance(
        sop_instance_uid=uids.derive("warm-up", str(number)),
        sop_class_uid="",
        series_instance_uid=uids.derive("warm-up", "series"),
        study_instance_uid=uids.derive("warm-up", "study"),
        transfer_syntax_uid=ExplicitVRLittleEndian,
        spool_key="",
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        sender=Sender("", "", ""),
    )
