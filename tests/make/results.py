"""What the encoders take, made small: source files, volumes, explanations, jobs, a model card.

A source is a complete file of a made-up patient; its volume has the header that a decoder gives.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
)

from dicom_xai import uids
from dicom_xai.config import (
    Code,
    HeatmapScale,
    InputKind,
    ModelCard,
    ModelClass,
    ModelInput,
    ModelOutput,
    StackRule,
    Windowing,
    WindowSource,
)
from dicom_xai.decode.geometry import stack
from dicom_xai.decode.planes import planes_of
from dicom_xai.encode.source import Described, describe
from dicom_xai.study import (
    Attribution,
    Explanation,
    Finding,
    Frame,
    Geometry,
    Instance,
    Job,
    Per,
    Placement,
    Priority,
    Purpose,
    Reference,
    Region,
    Sender,
    Unit,
    Volume,
)

MAP_SIZE = 16

_CATEGORY = Code(value="49755003", scheme="SCT", meaning="Morphologically Abnormal Structure")


def card(
    kind: InputKind = InputKind.IMAGE2D, *, calibrated: bool = False, segmenting: bool = False
) -> ModelCard:
    """A model card with three classes."""
    types = {
        "nodule": Code(value="27925004", scheme="SCT", meaning="Nodule"),
        "consolidation": Code(value="9656002", scheme="SCT", meaning="Consolidation"),
        "pneumothorax": Code(value="36118008", scheme="SCT", meaning="Pneumothorax"),
    }
    classes = tuple(
        ModelClass(
            name=name, label=name.capitalize(), threshold=0.5, category=_CATEGORY, type=concept
        )
        for name, concept in types.items()
    )
    return ModelCard(
        name="tiny",
        version="1.2.0",
        file=Path("tiny.onnx"),
        sha256="ab" * 32,
        intended_use="Tests.",
        manufacturer="dicom_xai tests",
        calibrated=calibrated,
        inputs=(
            ModelInput(
                name="image",
                kind=kind,
                size=(256, 256),
                windowing=Windowing(source=WindowSource.SOURCE),
            ),
        ),
        outputs=(
            ModelOutput(
                name="logits",
                kind="segmentation" if segmenting else "classification",
                activation="sigmoid",
                classes=classes,
            ),
        ),
        heatmap=HeatmapScale(full_scale=2.5, threshold=0.875),
    )


def header(modality: str = "CR", rows: int = 64, columns: int = 48, number: int = 1) -> Dataset:
    """A complete image of a made-up patient; a CT has a plane, slices 2.5 mm apart."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.SOPClassUID = CTImageStorage if modality == "CT" else ComputedRadiographyImageStorage
    ds.SOPInstanceUID = UID(f"1.2.826.0.1.3680043.10.1.{number}")
    ds.StudyInstanceUID = UID("1.2.826.0.1.3680043.10.2")
    ds.SeriesInstanceUID = UID(f"1.2.826.0.1.3680043.10.3.{len(modality)}")
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"] if modality == "CT" else ["ORIGINAL", "PRIMARY"]
    ds.StudyDate, ds.StudyTime = "20260102", "101112"
    ds.ContentDate, ds.ContentTime = "20260102", "101500"
    ds.AccessionNumber = "ACC-0001"
    ds.ReferringPhysicianName = "Referring^Rita"
    ds.StudyDescription = "Made-up study"
    ds.Modality = modality
    ds.Manufacturer = "Made-up scanners"
    ds.PatientName = "M\xfcller^J\xf6rg"
    ds.PatientID = "ID-4711"
    ds.IssuerOfPatientID = "Ward 9"
    ds.PatientBirthDate = "19700131"
    ds.PatientSex = "O"
    ds.PatientAge = "055Y"
    ds.StudyID = "S1"
    ds.SeriesNumber, ds.InstanceNumber = 1, number
    ds.BodyPartExamined = "HEAD" if modality == "CT" else "CHEST"
    if modality == "CT":
        ds.FrameOfReferenceUID = UID("1.2.826.0.1.3680043.10.4")
        ds.PositionReferenceIndicator = ""
        ds.ImagePositionPatient = ["-120.0", "-120.0", f"{2.5 * number:g}"]
        ds.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
        ds.PixelSpacing = ["0.4688", "0.4688"]
        ds.SliceThickness = "2.5"
        ds.KVP = "120"
        ds.AcquisitionNumber = 1
        ds.RescaleIntercept, ds.RescaleSlope = "0", "1"
    else:
        ds.PatientOrientation = ["L", "F"]
        ds.ImagerPixelSpacing = ["0.16", "0.16"]
        ds.ViewPosition = "PA"
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows, ds.Columns = rows, columns
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    return ds


def enhanced_header(rows: int = 32, columns: int = 32, frames: int = 3) -> Dataset:
    """An enhanced CT as far as its planes go."""
    ds = header("CT", rows, columns)
    ds.SOPClassUID = EnhancedCTImageStorage
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(ds, keyword)
    del ds.SliceThickness
    ds.NumberOfFrames = frames
    measures, orientation, shared = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = ["0.5", "0.5"], "3"
    orientation.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
    shared.PixelMeasuresSequence = [measures]
    shared.PlaneOrientationSequence = [orientation]
    ds.SharedFunctionalGroupsSequence = [shared]
    ds.PerFrameFunctionalGroupsSequence = []
    for n in range(frames):
        position, item = Dataset(), Dataset()
        position.ImagePositionPatient = ["0", "0", str(3 * n)]
        item.PlanePositionSequence = [position]
        ds.PerFrameFunctionalGroupsSequence.append(item)
    return ds


def as_file(ds: Dataset, transfer_syntax: UID = ExplicitVRLittleEndian) -> bytes:
    """The data set as a stored file, black pixels added."""
    if "PixelData" not in ds:
        count = int(ds.get("NumberOfFrames", 1) or 1)
        ds.PixelData = b"\0" * (2 * ds.Rows * ds.Columns * count)
        ds["PixelData"].VR = "OW"
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = transfer_syntax
    ds.file_meta.ImplementationClassUID = UID(uids.IMPLEMENTATION_CLASS_UID)
    buffer = BytesIO()
    dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()


def patched(file: bytes, **values: bytes | None) -> bytes:
    """An Explicit VR Little Endian file with exactly these value bytes; None removes an element."""
    at = file.index(b"DICM") + 4
    start = at + 12 + struct.unpack_from("<I", file, at + 8)[0]
    end = file.index(struct.pack("<HH2s", 0x7FE0, 0x0010, b"OW"), start)
    elements, at = {}, start
    while at < end:
        group, number, vr = struct.unpack_from("<HH2s", file, at)
        is_long = vr in (b"SQ", b"UN", b"UT", b"OB", b"OW", b"UC", b"UR")
        (length,) = struct.unpack_from("<I" if is_long else "<H", file, at + (8 if is_long else 6))
        size = (12 if is_long else 8) + length
        elements[(group << 16) | number] = file[at : at + size]
        at += size
    for keyword, value in values.items():
        tag = tag_for_keyword(keyword)
        assert tag is not None
        elements.pop(tag, None)
        if value is not None:
            head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + dictionary_VR(tag).encode()
            elements[tag] = head + struct.pack("<H", len(value)) + value
    return file[:start] + b"".join(elements[tag] for tag in sorted(elements)) + file[end:]


def instance(file: bytes) -> Instance:
    """The stored file's facts."""
    ds = dcmread(BytesIO(file), stop_before_pixels=True)
    return Instance(
        sop_instance_uid=str(ds.file_meta.MediaStorageSOPInstanceUID),
        sop_class_uid=str(ds.file_meta.MediaStorageSOPClassUID),
        series_instance_uid=str(ds.SeriesInstanceUID),
        study_instance_uid=str(ds.StudyInstanceUID),
        transfer_syntax_uid=str(ds.file_meta.TransferSyntaxUID),
        spool_key=str(ds.file_meta.MediaStorageSOPInstanceUID),
        sha256=hashlib.sha256(file).hexdigest(),
        size_bytes=len(file),
        sender=Sender("SCANNER", "DICOM_XAI", "127.0.0.1"),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """All that the encoders take, but for the plan."""

    job: Job
    card: ModelCard
    volume: Volume
    explanation: Explanation
    read_source: Callable[[Instance], bytes]
    described: Mapping[str, Described]
    display_of: Callable[[Sequence[int]], torch.Tensor]
    heat_of: Callable[[Finding, Sequence[int]], torch.Tensor]

    probability_of: Callable[[Finding, Sequence[int]], torch.Tensor]


def volume_of(files: Sequence[bytes], spacing_mm: float | None = None) -> Volume:
    """The frames of the files, in their order; values are zero."""
    frames = []
    for file in files:
        ds = dcmread(BytesIO(file), stop_before_pixels=True)
        shape = (int(ds.Rows), int(ds.Columns))
        made = instance(file)
        count = int(ds.get("NumberOfFrames", 1) or 1)
        black = partial(torch.zeros, shape)
        frames += [Frame(made, ds, n + 1, shape, black, lambda: None) for n in range(count)]
    positions = tuple(spacing_mm * i for i in range(len(frames))) if spacing_mm else ()
    return Volume(tuple(frames), Geometry(positions_mm=positions, slice_spacing_mm=spacing_mm))


def blob(rows: int, columns: int, row: float, column: float, size: float) -> torch.Tensor:
    """A round hill of height 1; centre and width as shares of the image."""
    y = torch.linspace(0, 1, rows)[:, None] - row
    x = torch.linspace(0, 1, columns)[None, :] - column
    return torch.exp(-(y * y + x * x) / (2 * size * size))


def case(
    files: Sequence[bytes],
    *,
    kind: InputKind = InputKind.IMAGE2D,
    positives: int = 1,
    purpose: Purpose = Purpose.TRIAGE,
    generation: int = 0,
    predecessors: tuple[Reference, ...] = (),
    method: str = "grad-cam",
    note: str = "",
    heat_frames: Sequence[int] | None = None,
    calibrated: bool = False,
    segmenting: bool = False,
) -> Case:
    """A unit of these files with so many positive classes, each with a hill of heat.

    The hill is a little lower on each frame, so that no two regions are the same.

    `heat_frames` are the frames that have heat; all of them by default. A segmenting model gives
    the same hills as probabilities, with or without a method.
    """
    model = card(kind, calibrated=calibrated, segmenting=segmenting)
    volume = volume_of(files, 2.5 if kind is InputKind.SLICES else None)
    total = len(volume.frames)
    hot = set(range(total) if heat_frames is None else heat_frames)
    placements = tuple(
        Placement(
            source_size=(f.values.shape[0], f.values.shape[1]),
            input_size=(256, 256),
            scale=(256 / f.values.shape[0], 256 / f.values.shape[1]),
        )
        for f in volume.frames
    )
    findings = []
    for c, name in enumerate(model.classes):
        positive = c < positives
        score = 0.9 - 0.1 * c if positive else 0.2 - 0.05 * c
        frame_scores = tuple(score if i in hot else score / 4 for i in range(total))
        heat = torch.zeros(total, MAP_SIZE, MAP_SIZE)
        for i in hot:
            heat[i] = (0.95 - 0.04 * (i % 8)) * blob(MAP_SIZE, MAP_SIZE, *_centre(c), 0.12)
        peaks = tuple(heat.amax(dim=(1, 2)).tolist())
        attribution = Attribution(heat, 0.35, placements, peaks) if positive and method else None
        region = Region(heat, name.threshold, placements, peaks, 12.5) if segmenting else None
        findings.append(
            Finding(c, name.name, score, frame_scores, frame_scores, positive, attribution, region)
        )
    instances = tuple({f.instance.sop_instance_uid: f.instance for f in volume.frames}.values())
    job = Job(
        job_id=1,
        token=1,
        unit=Unit(Per.STUDY, instances[0].study_instance_uid),
        route="tests",
        route_json="{}",
        model=model.name,
        model_digest=model.sha256,
        purpose=purpose,
        generation=generation,
        priority=Priority.ROUTINE,
        ready_at=0.0,
        deadline_at=2.0,
        created_at="20260102101600.250000+0100",
        explainer=method,
        attempts=1,
        instances=instances,
        predecessors=predecessors,
    )
    stored = {instance(file).sop_instance_uid: file for file in files}

    def display_of(frames: Sequence[int]) -> torch.Tensor:
        rows, columns = volume.frames[frames[0]].values.shape
        grid = (torch.arange(rows)[:, None] // 32 + torch.arange(columns)[None, :] // 32) % 2
        ramp = torch.linspace(0.15, 0.75, columns)[None, :].expand(rows, columns)
        return (ramp + 0.1 * grid).expand(len(frames), -1, -1)

    def heat_of(finding: Finding, frames: Sequence[int]) -> torch.Tensor:
        assert finding.attribution is not None
        return large(finding.attribution.heat, frames)

    def probability_of(finding: Finding, frames: Sequence[int]) -> torch.Tensor:
        # no nearer to zero than a byte can tell: what is empty is empty by any rounding
        assert finding.region is not None
        values = large(finding.region.probability, frames)
        return torch.where(values < 1 / 255, 0.0, values)

    def large(maps: torch.Tensor, frames: Sequence[int]) -> torch.Tensor:
        size = volume.frames[frames[0]].values.shape
        small = maps[list(frames)][:, None]
        resized = torch.nn.functional.interpolate(
            small, size=tuple(size), mode="bilinear", align_corners=False
        )
        return resized[:, 0]

    return Case(
        job,
        model,
        volume,
        Explanation(tuple(findings), method, "features.9" if method else "", note),
        lambda wanted: stored[wanted.sop_instance_uid],
        {uid: described(file) for uid, file in stored.items()},
        display_of,
        heat_of,
        probability_of,
    )


def stacked(files: Sequence[bytes], **options: Any) -> Case:
    """A case of slices, in the order and with the geometry that decoding finds in their headers."""
    by_uid = {instance(file).sop_instance_uid: file for file in files}
    found = stack(
        [
            plane
            for file in files
            for plane in planes_of(instance(file), dcmread(BytesIO(file), stop_before_pixels=True))
        ],
        StackRule(),
    )
    ordered = dict.fromkeys(plane.sop_instance_uid for plane in found.planes)
    made = case([by_uid[uid] for uid in ordered], kind=InputKind.SLICES, **options)
    return replace(made, volume=Volume(made.volume.frames, found.geometry))


def described(file: bytes) -> Described:
    """What a decoder's process says of a stored file."""
    return describe(file, dcmread(BytesIO(file), stop_before_pixels=True))


def _centre(c: int) -> tuple[float, float]:
    return [(0.35, 0.3), (0.6, 0.7), (0.45, 0.42)][c % 3]


def random_pixels(ds: Dataset, seed: int = 0) -> Dataset:
    """The same data set with noise in place of black."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 4096, (ds.Rows, ds.Columns), dtype=np.uint16)
    ds.PixelData = values.tobytes()
    ds["PixelData"].VR = "OW"
    return ds
