"""Segmentation: the region at or above the heat threshold, for software (PS3.3 A.51).

highdicom never sees a source's header: it gets a stand-in with the checked attributes of `Source`,
and the references to the true images are written afterwards. So a defect in a header cannot stop
a result, private SOP classes and enhanced multi-frame images work as any other, and no patient
value passes through a validator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from highdicom import AlgorithmIdentificationSequence
from highdicom.color import CIELabColor
from highdicom.seg import Segmentation, SegmentDescription
from pydicom import Dataset
from pydicom.sr.coding import Code as Concept
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
)

from dicom_xai import identity, uids
from dicom_xai.config import Code, Compression, ModelCard, ModelClass
from dicom_xai.encode import provenance
from dicom_xai.encode.provenance import Run
from dicom_xai.encode.source import Source
from dicom_xai.errors import EncodeError
from dicom_xai.study import Frame, ObjectKind

_ARTIFICIAL_INTELLIGENCE = Concept("123110", "DCM", "Artificial Intelligence")

Mask = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Plane:
    """One source frame of a group, and what its header says."""

    index: int  #: into the volume's frames
    frame: Frame
    source: Source


@dataclass(frozen=True, slots=True)
class Segmented:
    """A finished Segmentation file and what names it."""

    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    transfer_syntax_uid: str
    file: bytes


def groups(planes: Sequence[Plane]) -> tuple[list[tuple[Plane, ...]], list[str]]:
    """Which planes can share one Segmentation, and why some can have none.

    Planes of one series with one orientation, spacing and matrix form a spatial one. A frame
    without a place in the patient gets its own, without spatial groups, if it is the only frame of
    its instance. What remains is told by the Secondary Capture alone.

    Returns
    -------
    groups : list of tuple of Plane
    skipped : list of str
        Reasons, without patient data.
    """
    spatial: dict[tuple[object, ...], list[Plane]] = {}
    alone: dict[str, list[Plane]] = {}
    for plane in planes:
        source, instance = plane.source, plane.frame.instance
        if source.has_plane:
            grid = (source.orientation, source.pixel_spacing, source.rows, source.columns)
            key = (instance.series_instance_uid, source.frame_of_reference_uid, *grid)
            spatial.setdefault(key, []).append(plane)
        else:
            alone.setdefault(instance.sop_instance_uid, []).append(plane)
    made: list[tuple[Plane, ...]] = []
    skipped = []
    for members in spatial.values():
        if len({plane.source.position for plane in members}) < len(members):
            skipped.append("several frames at one position")
        else:
            made.append(tuple(members))
    for members in alone.values():
        if len(members) > 1:
            skipped.append("several frames of one instance without positions")
        else:
            made.append(tuple(members))
    return sorted(made, key=lambda group: group[0].index), skipped


@dataclass(frozen=True, slots=True)
class Segment:
    """One class's region: what the Segment Sequence says about it."""

    name: ModelClass
    outline: tuple[int, int, int]
    threshold: float  #: on the heat's scale, 1.0 = the card's full scale
    score: float


def segmentation(
    run: Run,
    card: ModelCard,
    group: Sequence[Plane],
    masks: Mask,
    segments: Sequence[Segment],
    ordinal: int,
    slice_spacing_mm: float | None,
    block: identity.Block,
    layer: str,
) -> Segmented:
    """The binary Segmentation of one group of planes.

    Parameters
    ----------
    group : sequence of Plane
        Those with at least one pixel in a segment, as `groups` gave them.
    masks : ndarray, (planes, rows, columns, segments) uint8
        0 or 1, on the source's pixels.
    segments : sequence of Segment
        In the order of the masks' last axis; each has at least one pixel.
    slice_spacing_mm : float or None
        Of the whole series: the planes in the group may have gaps.
    block : Block
        The identity of the first plane's instance, as received.

    Raises
    ------
    EncodeError
        The planes do not form a Segmentation; the Secondary Capture can still be sent.
    IdentityError
        The file reads back with another identity than the source's: nothing is sent.
    """
    compression = Compression.NONE  # bits are never compressed: see the table of viewers
    series_uid = run.uid(ObjectKind.SEG, "series", ordinal, compression)
    instance_uid = run.uid(ObjectKind.SEG, "instance", ordinal, compression)
    stand_ins = [_stand_in(plane, slice_spacing_mm) for plane in group]
    descriptions = [
        _description(run, card, segment, number, ordinal, layer)
        for number, segment in enumerate(segments, 1)
    ]
    try:
        made = Segmentation(
            source_images=stand_ins,
            pixel_array=masks if masks.shape[3] > 1 else masks[:, :, :, 0],
            segmentation_type="BINARY",
            segment_descriptions=descriptions,
            series_instance_uid=series_uid,
            series_number=provenance.SERIES_NUMBERS[ObjectKind.SEG],
            sop_instance_uid=instance_uid,
            instance_number=1,
            manufacturer=provenance.MANUFACTURER,
            manufacturer_model_name=identity.MODEL_NAME,
            software_versions=provenance.SOFTWARE,
            device_serial_number=uids.IMPLEMENTATION_CLASS_UID,
            content_label="AI_RESEARCH",
            content_description=_stated_threshold(run, segments),
            transfer_syntax_uid=ExplicitVRLittleEndian,
            omit_empty_frames=True,
        )
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        # no text of the library's: it may quote the header
        message = f"{len(group)} planes form no Segmentation: {type(error).__name__} in highdicom"
        raise EncodeError(message) from error
    dataset = Dataset(made)
    pixels = dataset.pop("PixelData").value
    dataset.ContentCreatorName = ""
    if not group[0].source.has_plane:
        dataset.PatientOrientation = list(group[0].source.patient_orientation) or ""
    provenance.describe(dataset, run, ObjectKind.SEG, block, f"heat map region {run.method}")
    _refer_to_frames(dataset, run, group)
    dimension_uid = UID(run.uid(ObjectKind.SEG, "dimensions", ordinal, compression))
    for item in (*dataset.DimensionOrganizationSequence, *dataset.DimensionIndexSequence):
        item.DimensionOrganizationUID = dimension_uid
    if len(pixels) % 2 == 0 and (int(dataset.NumberOfFrames) * masks[0, :, :, 0].size + 7) // 8 % 2:
        pixels = pixels[:-1] + b"\0"  # highdicom pads with the character 0
    # a Segmentation tells the side by its frames' anatomy, not by the series (PS3.3 C.7.3.1)
    placed = identity.without(block, "Laterality", "ImageLaterality")
    file = provenance.as_file(dataset, pixels, placed, ExplicitVRLittleEndian)
    syntax = str(ExplicitVRLittleEndian)
    return Segmented(SegmentationStorage, instance_uid, series_uid, syntax, file)


def _stated_threshold(run: Run, segments: Sequence[Segment]) -> str:
    lowest = min(segment.threshold for segment in segments)
    return provenance.ascii_text(f"{run.method} heat >= {lowest:.3g} of full scale", 64)


def _description(
    run: Run, card: ModelCard, segment: Segment, number: int, ordinal: int, layer: str
) -> Dataset:
    parameters = {
        "method": run.method,
        "layer": layer,
        "heat_threshold": f"{segment.threshold:.6g}",
        "full_scale": f"{card.heatmap.full_scale:.6g}",
        "score": f"{segment.score:.4f}",
        "score_threshold": f"{segment.name.threshold:.6g}",
    }
    plain = {key: provenance.ascii_text(value, 128) for key, value in parameters.items()}
    description = SegmentDescription(
        segment_number=number,
        segment_label=provenance.ascii_text(segment.name.label, 64),
        segmented_property_category=_concept(segment.name.category),
        segmented_property_type=_concept(segment.name.type),
        algorithm_type="AUTOMATIC",
        algorithm_identification=AlgorithmIdentificationSequence(
            name=provenance.ascii_text(card.name, 64),
            family=_ARTIFICIAL_INTELLIGENCE,
            version=provenance.ascii_text(card.version, 64),
            source=provenance.ascii_text(card.manufacturer, 64),
            parameters=plain,
        ),
        tracking_uid=run.uid(
            ObjectKind.SEG, f"tracking {segment.name.name}", ordinal, Compression.NONE
        ),
        tracking_id=provenance.ascii_text(f"{card.name} {segment.name.name}", 64),
        display_color=CIELabColor.from_rgb(*segment.outline),
    )
    description.SegmentDescription = provenance.ascii_text(
        f"Heat at or above {segment.threshold:.3g} of the model card's full scale; AI, research",
        256,
    )
    return description


def _concept(code: Code) -> Concept:
    return Concept(code.value, code.scheme, provenance.ascii_text(code.meaning, 64))


def _stand_in(plane: Plane, slice_spacing_mm: float | None) -> Dataset:
    """A well-formed single-frame image at the source's place, for highdicom's constructor."""
    source = plane.source
    dataset = Dataset()
    is_spatial = source.has_plane
    dataset.SOPClassUID = CTImageStorage if is_spatial else SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = _stand_in_uid(plane)
    dataset.StudyInstanceUID = UID(plane.frame.instance.study_instance_uid)
    dataset.SeriesInstanceUID = UID(plane.frame.instance.series_instance_uid)
    for keyword in identity.EMPTY_WHEN_ABSENT:
        setattr(dataset, keyword, None)
    dataset.Modality = source.modality or "OT"
    dataset.Rows, dataset.Columns = source.rows, source.columns
    if source.pixel_spacing:
        dataset.PixelSpacing = list(source.pixel_spacing)
    dataset.SliceThickness = source.slice_thickness or None
    if is_spatial:
        dataset.FrameOfReferenceUID = UID(source.frame_of_reference_uid)
        dataset.PositionReferenceIndicator = source.position_reference_indicator or None
        dataset.ImagePositionPatient = list(source.position)
        dataset.ImageOrientationPatient = list(source.orientation)
        if slice_spacing_mm:
            dataset.SpacingBetweenSlices = slice_spacing_mm
    dataset.LossyImageCompression = "01" if source.is_lossy else "00"
    if source.lossy_ratios:
        dataset.LossyImageCompressionRatio = list(source.lossy_ratios)
        dataset.LossyImageCompressionMethod = list(source.lossy_methods)
    return dataset


def _stand_in_uid(plane: Plane) -> UID:
    return UID(uids.derive(plane.frame.instance.sop_instance_uid, str(plane.frame.number)))


def _refer_to_frames(dataset: Dataset, run: Run, group: Sequence[Plane]) -> None:
    """Put the true images where the stand-ins are referred to."""
    true = {str(_stand_in_uid(plane)): plane for plane in group}
    instances = {plane.frame.instance.sop_instance_uid: plane.frame.instance for plane in group}
    numbers: dict[str, list[int]] = {uid: [] for uid in instances}
    for plane in group:
        if plane.source.is_multi_frame:
            numbers[plane.frame.instance.sop_instance_uid].append(plane.frame.number)
    for item in _derivation_sources(dataset):
        if str(item.ReferencedSOPInstanceUID) not in true:
            continue  # highdicom shares one item among the segments of a plane: done already
        plane = true[str(item.ReferencedSOPInstanceUID)]
        frame = plane.frame
        item.ReferencedSOPClassUID = UID(frame.instance.sop_class_uid)
        item.ReferencedSOPInstanceUID = UID(frame.instance.sop_instance_uid)
        if plane.source.is_multi_frame:
            item.ReferencedFrameNumber = frame.number
    sources = [(instance, tuple(sorted(numbers[uid]))) for uid, instance in instances.items()]
    provenance.refer(dataset, run, sources, derived=True)


def _derivation_sources(dataset: Dataset) -> Iterator[Dataset]:
    for item in dataset.PerFrameFunctionalGroupsSequence:
        for derivation in item.DerivationImageSequence:
            yield from derivation.SourceImageSequence
