"""Secondary Capture: a colour picture that every viewer can show (PS3.3 A.8.1)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import imagecodecs
import numpy as np
import numpy.typing as npt
from highdicom.sc import SCImage
from pydicom import Dataset
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from dicom_xai import identity
from dicom_xai.config import Compression
from dicom_xai.encode import provenance
from dicom_xai.encode.provenance import Run
from dicom_xai.encode.source import Source
from dicom_xai.study import Instance, ObjectKind

JPEG_QUALITY = 90

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
    title: str,
    derivation: str,
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
    title : str
        For the series description; ASCII.
    derivation : str
        How the pixels were made, in a sentence; ASCII.

    Raises
    ------
    IdentityError
        The file reads back with another identity than the source's: nothing is sent.
    """
    series_uid = run.uid(kind, "series", 0, compression)
    instance_uid = run.uid(kind, "instance", ordinal, compression)
    pixels, syntax, photometric = _compressed(picture, compression)
    # one black pixel: highdicom shall write the module skeleton, the pixels are encoded here
    dataset: Dataset = SCImage(
        pixel_array=np.zeros((1, 1, 3), np.uint8),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        study_instance_uid=instance_uid,  # replaced by the source's with the identity block
        series_instance_uid=series_uid,
        series_number=provenance.SERIES_NUMBERS[kind],
        sop_instance_uid=instance_uid,
        instance_number=instance_number,
        manufacturer=provenance.MANUFACTURER,
        patient_orientation=("L", "P"),
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    del dataset.PixelData
    dataset.Rows, dataset.Columns = picture.shape[:2]
    dataset.PhotometricInterpretation = photometric
    dataset.ImageType = ["DERIVED", "SECONDARY"]
    dataset.ConversionType = "WSD"
    dataset.BurnedInAnnotation = "YES"
    provenance.describe(dataset, run, kind, block, title)
    dataset.DateOfSecondaryCapture = dataset.ContentDate
    dataset.TimeOfSecondaryCapture = dataset.ContentTime
    provenance.refer(dataset, run, [references], derived=kind is ObjectKind.SC)
    if kind is ObjectKind.SC:
        dataset.DerivationDescription = provenance.ascii_text(derivation, 1024)
    dataset.PatientOrientation = ""
    placed = _with_laterality(dataset, block)
    if source is not None:
        _place(dataset, source)
    _tell_losses(dataset, source, compression, picture.size, len(pixels))
    file = provenance.as_file(dataset, pixels, placed, syntax)
    return Captured(SecondaryCaptureImageStorage, instance_uid, series_uid, str(syntax), file)


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
    if source.pixel_spacing:
        dataset.PixelSpacing = list(source.pixel_spacing)
        if source.pixel_spacing_calibration_type:
            dataset.PixelSpacingCalibrationType = source.pixel_spacing_calibration_type
            dataset.PixelSpacingCalibrationDescription = (
                source.pixel_spacing_calibration_description
            )
    if source.has_plane:
        dataset.ImagePositionPatient = list(source.position)
        dataset.ImageOrientationPatient = list(source.orientation)
        dataset.SliceThickness = source.slice_thickness or None
        dataset.FrameOfReferenceUID = UID(source.frame_of_reference_uid)
        dataset.PositionReferenceIndicator = source.position_reference_indicator


def _tell_losses(
    dataset: Dataset,
    source: Source | None,
    compression: Compression,
    raw_size: int,
    compressed_size: int,
) -> None:
    """Once lossy, always lossy: the source's compression and then ours (PS3.3 C.7.6.1.1.5)."""
    is_lossy = bool(source and source.is_lossy)
    ratios = list(source.lossy_ratios) if source else []
    methods = list(source.lossy_methods) if source else []
    if compression is Compression.JPEG:
        is_lossy = True
        ratios.append(f"{raw_size / compressed_size:.2f}")
        methods.append("ISO_10918_1")
    dataset.LossyImageCompression = "01" if is_lossy else "00"
    if ratios:
        dataset.LossyImageCompressionRatio = ratios
        dataset.LossyImageCompressionMethod = methods


def _compressed(picture: Picture, compression: Compression) -> tuple[bytes | memoryview, UID, str]:
    """Value of Pixel Data, transfer syntax, photometric interpretation (PS3.5 8.2)."""
    if compression is Compression.RLE:
        return _encapsulated(_rle(picture)), RLELossless, "RGB"
    if compression is Compression.JPEG:
        stream = imagecodecs.jpeg8_encode(
            picture,
            level=JPEG_QUALITY,
            colorspace="RGB",
            outcolorspace="YCBCR",
            subsampling="422",
        )
        return _encapsulated(bytes(stream)), JPEGBaseline8Bit, "YBR_FULL_422"
    return picture.data.cast("B"), ExplicitVRLittleEndian, "RGB"


def _rle(picture: Picture) -> bytes:
    """One frame as three byte segments, red, green, blue; rows apart (PS3.5 G.3, G.5)."""
    segments = []
    for channel in range(3):
        plane = np.ascontiguousarray(picture[:, :, channel])
        segment = bytes(imagecodecs.packbits_encode(plane))  # a two-dimensional array: by rows
        segments.append(segment + b"\0" * (len(segment) % 2))
    offsets = [64]
    for segment in segments:
        offsets.append(offsets[-1] + len(segment))
    header = struct.pack("<16I", 3, *offsets[:3], *[0] * 12)
    return b"".join([header, *segments])


def _encapsulated(stream: bytes) -> bytes:
    """One frame as one fragment after an offset table with one entry (PS3.5 A.4)."""
    stream += b"\0" * (len(stream) % 2)
    table = struct.pack("<HHII", 0xFFFE, 0xE000, 4, 0)
    return table + struct.pack("<HHI", 0xFFFE, 0xE000, len(stream)) + stream
