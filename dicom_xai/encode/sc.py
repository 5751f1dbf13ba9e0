"""Secondary Capture: colour pictures that every viewer can show (PS3.3 A.8.1, A.8.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from highdicom.sc import SCImage
from pydicom import Dataset
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    MultiFrameTrueColorSecondaryCaptureImageStorage,
)

from dicom_xai import identity
from dicom_xai.config import Compression
from dicom_xai.encode import elements, provenance
from dicom_xai.encode.pixeldata import Buffer, compressed, pixel_data
from dicom_xai.encode.provenance import Run
from dicom_xai.encode.source import Source, most_lossy
from dicom_xai.study import Frame, Instance, ObjectKind

#: Body Part Examined of which there is one (PS3.16 Annex L), as the validator has it.
UNPAIRED = frozenset(
    """
    ABDOMEN ABDOMENPELVIS AORTA BACK BLADDER BRAIN CEREBELLUM CERVIX CHEST CHESTABDOMEN
    CHESTABDPELVIS COCCYX COLON CORONARYARTERY CSPINE CTSPINE DUODENUM ESOPHAGUS FACE GALLBLADDER
    HEAD HEADNECK HEART ILEUM ILIUM JAW JEJUNUM LARYNX LIVER LSPINE LSSPINE MAXILLA MEDIASTINUM
    MOUTH NECK NECKCHEST NECKCHESTABDOMEN NECKCHESTABDPELV NOSE PANCREAS PELVIS PENIS PHARYNX
    PROSTATE RECTUM SCALP SKULL SPINE SPLEEN SSPINE STERNUM STOMACH THYMUS THYROID TLSPINE TONGUE
    TRACHEA TSPINE URETER URETHRA UTERUS VAGINA VULVA WHOLEBODY
    """.split()
)

Picture = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Captured:
    """A finished Secondary Capture file and what names it."""

    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    transfer_syntax_uid: str
    file: bytes


@dataclass(frozen=True, slots=True)
class Caption:
    """What a Secondary Capture says about itself, in words; ASCII."""

    title: str  #: for the series description
    derivation: str  #: how the pixels were made, in a sentence


def capture(
    run: Run,
    kind: ObjectKind,
    picture: Picture,
    compression: Compression,
    ordinal: int,
    instance_number: int,
    source: Source | None,
    references: tuple[Instance, tuple[int, ...]],
    block: identity.Block,
    caption: Caption,
) -> Captured:
    """A picture as a Secondary Capture of the source's patient and study.

    Parameters
    ----------
    kind : ObjectKind
        SC, whose pixels derive from the source, or NOTE, which only refers to it.
    picture : ndarray, (rows, columns, 3) uint8
        RGB, C-contiguous. The source's pixels lie 1:1 at its top left.
    ordinal, instance_number : int
        Which of the job's objects of this kind, from 0; which of its series, from 1.
    source : Source or None
        Spacing and place of the picture's top left; None for a picture of text.
    references : (Instance, frame numbers)
        The source, and which frames of it when it is a multi-frame image.
    block : Block
        The source's identity, as received.

    Raises
    ------
    IdentityError
        The file reads back with another identity than the source's: nothing is sent.
    """
    streams = compressed([picture], compression)
    pixels = pixel_data(streams, compression)
    uid = run.uid(kind, "instance", ordinal, compression)
    series_uid = run.uid(kind, "series", 0, compression)
    dataset = _skeleton(run, kind, uid, series_uid, instance_number, compression, block, caption)
    dataset.Rows, dataset.Columns = picture.shape[:2]
    placed = _with_laterality(dataset, block)
    if source is not None:
        _place(dataset, source)
    _tell_losses(dataset, source, compression, picture.size / len(streams[0]))
    more = provenance.references(run, [references], derived=kind is ObjectKind.SC)
    file = provenance.as_file(dataset, more, pixels, placed)
    return Captured(dataset.SOPClassUID, uid, series_uid, str(pixels.transfer_syntax), file)


@dataclass(frozen=True, slots=True, eq=False)
class StackFrame:
    """One frame of a stack: where it comes from, and its picture's stream."""

    frame: Frame
    source: Source
    stream: Buffer  #: as `pixeldata.compressed` gave it


def capture_stack(
    run: Run,
    frames: Sequence[StackFrame],
    size: tuple[int, int],
    compression: Compression,
    ordinal: int,
    block: identity.Block,
    caption: Caption,
) -> Captured:
    """The pictures of a stack as one multi-frame Secondary Capture (PS3.3 A.8.5).

    Parameters
    ----------
    frames : sequence of StackFrame
        In the order in which a viewer shall page. Where all have a place in the patient, with one
        orientation and one spacing, each frame tells its plane.
    size : (rows, columns)
        Of each picture.
    ordinal : int
        Which of the job's objects of this kind, from 0.
    block : Block
        The identity of the first frame's instance, as received.

    Raises
    ------
    EncodeError
        The stack is more than an object can hold.
    IdentityError
        The file reads back with another identity than the source's: nothing is sent.
    """
    kind, first = ObjectKind.SC, frames[0].source
    streams = [frame.stream for frame in frames]
    pixels = pixel_data(streams, compression)
    uid = run.uid(kind, "instance", ordinal, compression)
    series_uid = run.uid(kind, "stack series", ordinal, compression)
    dataset = _skeleton(run, kind, uid, series_uid, 1, compression, block, caption)
    dataset.SOPClassUID = MultiFrameTrueColorSecondaryCaptureImageStorage
    dataset.Rows, dataset.Columns = size
    dataset.NumberOfFrames = len(frames)
    placed = _with_laterality(dataset, block)
    raw_bytes = 3 * size[0] * size[1] * len(frames)
    source = most_lossy(frame.source for frame in frames)
    _tell_losses(dataset, source, compression, raw_bytes / sum(map(len, streams)))
    instances = provenance.frames_by_instance((f.frame, f.source) for f in frames)
    more = [_pages(len(frames)), provenance.references(run, instances, derived=True)]
    grids = {(f.source.orientation, f.source.pixel_spacing) for f in frames}
    if len(grids) == 1 and all(frame.source.has_plane for frame in frames):
        dataset.FrameOfReferenceUID = UID(first.frame_of_reference_uid)
        dataset.PositionReferenceIndicator = first.position_reference_indicator
        more.append(_planes(frames))
    elif len(grids) == 1:
        dataset.PatientOrientation = list(first.patient_orientation) or ""
        _space(dataset, first)
    file = provenance.as_file(dataset, b"".join(more), pixels, placed)
    return Captured(dataset.SOPClassUID, uid, series_uid, str(pixels.transfer_syntax), file)


def _skeleton(
    run: Run,
    kind: ObjectKind,
    uid: str,
    series_uid: str,
    instance_number: int,
    compression: Compression,
    block: identity.Block,
    caption: Caption,
) -> Dataset:
    """All that does not depend on the pixels."""
    # one black pixel: highdicom shall write the module skeleton, the pixels are encoded here
    dataset: Dataset = SCImage(
        pixel_array=np.zeros((1, 1, 3), np.uint8),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        study_instance_uid=uid,  # replaced by the source's with the identity block
        series_instance_uid=series_uid,
        series_number=provenance.SERIES_NUMBERS[kind],
        sop_instance_uid=uid,
        instance_number=instance_number,
        manufacturer=provenance.MANUFACTURER,
        patient_orientation=("L", "P"),
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    del dataset.PixelData
    dataset.PhotometricInterpretation = "YBR_FULL_422" if compression is Compression.JPEG else "RGB"
    dataset.ImageType = ["DERIVED", "SECONDARY"]
    dataset.ConversionType = "WSD"
    dataset.BurnedInAnnotation = "YES"
    dataset.PatientOrientation = ""
    provenance.describe(dataset, run, kind, block, caption.title)
    dataset.DateOfSecondaryCapture = dataset.ContentDate
    dataset.TimeOfSecondaryCapture = dataset.ContentTime
    if kind is ObjectKind.SC:
        dataset.DerivationDescription = provenance.ascii_text(caption.derivation, 1024)
    return dataset


def _pages(count: int) -> bytes:
    """What tells the frames apart for a viewer that knows no planes (PS3.3 C.8.6.3, C.8.6.4)."""
    if count == 1:
        return b""
    return elements.tag("FrameIncrementPointer", "PageNumberVector") + elements.text(
        "PageNumberVector", *(str(n + 1) for n in range(count))
    )


def _planes(frames: Sequence[StackFrame]) -> bytes:
    """Functional groups: one grid for all, a position for each (PS3.3 A.8.5.4)."""
    first = frames[0].source
    measures = elements.text("PixelSpacing", *first.pixel_spacing)
    if first.slice_thickness:
        measures = elements.text("SliceThickness", first.slice_thickness) + measures
    orientation = elements.text("ImageOrientationPatient", *first.orientation)
    shared = elements.sequence("PlaneOrientationSequence", [orientation]) + elements.sequence(
        "PixelMeasuresSequence", [measures]
    )
    positions = [elements.text("ImagePositionPatient", *f.source.position) for f in frames]
    each = [elements.sequence("PlanePositionSequence", [position]) for position in positions]
    return elements.sequence("SharedFunctionalGroupsSequence", [shared]) + elements.sequence(
        "PerFrameFunctionalGroupsSequence", each
    )


def _with_laterality(dataset: Dataset, block: identity.Block) -> identity.Block:
    """Laterality is type 2C: for a paired body part, unless Image Laterality stands (C.7.3.1).

    The source's value always travels. Where it has none, the attribute is written empty when the
    body part is paired or not stated, and left out when there is only one of it.
    """
    if identity.text_of(block, "Laterality"):
        return block
    body_part = identity.text_of(block, "BodyPartExamined").upper()
    if body_part not in UNPAIRED and not identity.text_of(block, "ImageLaterality"):
        dataset.Laterality = ""
    return identity.without(block, "Laterality")


def _place(dataset: Dataset, source: Source) -> None:
    """Spacing, and the plane where the source has one (PS3.3 C.7.6.2, C.8.6.2)."""
    dataset.PatientOrientation = list(source.patient_orientation) or ""
    _space(dataset, source)
    if source.has_plane:
        dataset.ImagePositionPatient = list(source.position)
        dataset.ImageOrientationPatient = list(source.orientation)
        dataset.SliceThickness = source.slice_thickness or None
        dataset.FrameOfReferenceUID = UID(source.frame_of_reference_uid)
        dataset.PositionReferenceIndicator = source.position_reference_indicator


def _space(dataset: Dataset, source: Source) -> None:
    if source.pixel_spacing:
        dataset.PixelSpacing = list(source.pixel_spacing)
        if source.pixel_spacing_calibration_type:
            dataset.PixelSpacingCalibrationType = source.pixel_spacing_calibration_type
            dataset.PixelSpacingCalibrationDescription = (
                source.pixel_spacing_calibration_description
            )


def _tell_losses(
    dataset: Dataset, source: Source | None, compression: Compression, ratio: float
) -> None:
    """Once lossy, always lossy: the source's compression and then ours (PS3.3 C.7.6.1.1.5)."""
    is_lossy = bool(source and source.is_lossy)
    ratios = list(source.lossy_ratios) if source else []
    methods = list(source.lossy_methods) if source else []
    if compression is Compression.JPEG:
        is_lossy = True
        ratios.append(f"{ratio:.2f}")
        methods.append("ISO_10918_1")
    dataset.LossyImageCompression = "01" if is_lossy else "00"
    if ratios:
        dataset.LossyImageCompressionRatio = ratios
        dataset.LossyImageCompressionMethod = methods
