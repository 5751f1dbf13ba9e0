"""Segmentation: which pixels belong to a finding, for software (PS3.3 A.51, A.51.3).

highdicom writes the skeleton of one pixel at the first plane's place; the frames with their items
are joined to it as bytes, which takes milliseconds where its own constructor takes up to seconds.
It never sees a source's header: it gets a stand-in with the checked attributes of `Source`. So a
defect in a header cannot stop a result, private SOP classes and enhanced multi-frame images work as
any other, and no patient value passes through a validator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from highdicom import AlgorithmIdentificationSequence
from highdicom.color import CIELabColor
from highdicom.seg import Segmentation, SegmentDescription
from pydicom import Dataset
from pydicom.datadict import tag_for_keyword
from pydicom.sr.coding import Code as Concept
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
)

from dicom_xai import identity, uids
from dicom_xai.config import Code, Compression, ModelCard, ModelClass, SegmentationKind
from dicom_xai.encode import elements, pixeldata, provenance
from dicom_xai.encode.pixeldata import Image, PixelData
from dicom_xai.encode.provenance import Run
from dicom_xai.encode.source import Source, most_lossy
from dicom_xai.errors import EncodeError
from dicom_xai.study import Frame, Geometry, ObjectKind

_ARTIFICIAL_INTELLIGENCE = Concept("123110", "DCM", "Artificial Intelligence")
_SEGMENTATION = Code(value="113076", scheme="DCM", meaning="Segmentation")
#: FRACTIONAL: what stands for probability 1.
MAX_FRACTIONAL_VALUE = 255
#: Planes are evenly spaced when no distance differs by more than this share from the mean, and
#: upright when the cosine between their line and the normal is this near to 1: highdicom's numbers.
_SPACING_TOLERANCE, _UPRIGHT_TOLERANCE = 0.01, 1e-3


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
    """Which planes can share one Segmentation, in its order, and why some can have none.

    Planes of one series with one orientation, spacing and matrix form a spatial one. Frames of one
    instance without a place in the patient form one without spatial groups, in frame order. What
    remains is told by the Secondary Capture alone.

    Returns
    -------
    groups : list of tuple of Plane
        Each ascending along the normal that points where a column's times a row's direction does,
        or by frame number.
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
        distances = _positions(members) @ _normal(members[0].source.orientation)
        if len(np.unique(distances)) < len(members):
            skipped.append("several frames at one position")
        else:
            made.append(tuple(members[n] for n in np.argsort(distances)))
    made += [tuple(sorted(members, key=lambda p: p.frame.number)) for members in alone.values()]
    return sorted(made, key=lambda group: min(plane.index for plane in group)), skipped


def slice_spacing(geometry: Geometry) -> float | None:
    """The distance from each slice of a stack to the next, in mm; None where it varies.

    It is SpacingBetweenSlices, from the centre of a slice to the centre of the next (PS3.3
    C.7.6.16.2.1).
    """
    # of the whole stack, as highdicom has it: slices without a region have no frame, and only this
    # distance says that some are missing between two frames. It is one number for all frames: of
    # uneven slices none is true, and on a tilted gantry centres are further apart than planes.
    if len(geometry.origins_mm) < 2:
        return None
    return _even_step(np.array(geometry.origins_mm), _normal(geometry.orientation))


def _positions(planes: Sequence[Plane]) -> npt.NDArray[np.float64]:
    return np.array([[float(x) for x in plane.source.position] for plane in planes])


def _normal(orientation: Sequence[str | float]) -> npt.NDArray[np.float64]:
    row, column = np.array([float(x) for x in orientation]).reshape(2, 3)
    return np.cross(column, row)


def _even_step(origins: npt.NDArray[np.float64], normal: npt.NDArray[np.float64]) -> float | None:
    """The distance between planes that are evenly spaced on a line along their normal, else None.

    Parameters
    ----------
    origins : ndarray, (planes, 3)
        In order along the normal, at least two; mm.
    """
    steps = np.diff(origins @ normal)
    lines = origins[1:] - origins[0]
    upright = np.abs(lines @ normal) / np.linalg.norm(lines, axis=1)
    is_even = np.allclose(steps, steps.mean(), rtol=_SPACING_TOLERANCE, atol=0)
    is_upright = (np.abs(upright - 1) < _UPRIGHT_TOLERANCE).all()
    return float(abs(steps.mean())) if is_even and is_upright else None


@dataclass(frozen=True, slots=True)
class Segment:
    """One class's region: what the Segment Sequence says about it."""

    name: ModelClass
    outline: tuple[int, int, int]
    threshold: float  #: of the heat, 1.0 = the card's full scale; or of the probability
    score: float
    is_probability: bool  #: the region comes from the model's probabilities, not from heat


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """All pixels of one Segmentation.

    `frames` are by segment number, from 1 (LABELMAP: 0 alone), and index of the source frame;
    frames that would be empty are missing. BINARY: ``(bytes,)`` uint8, packed as
    `pixeldata.bits` wants it. FRACTIONAL: ``(rows, columns)`` uint8, 0 to `MAX_FRACTIONAL_VALUE`.
    LABELMAP: ``(rows, columns)`` uint8 or, with more than 255 segments, uint16: segment numbers,
    0 = background.
    """

    kind: SegmentationKind
    segments: tuple[Segment, ...]
    frames: Mapping[tuple[int, int], Image]
    has_overlap: bool  #: BINARY: a pixel belongs to several segments


def compression_of(kind: SegmentationKind, wanted: Compression) -> Compression:
    """How a Segmentation is compressed where a destination wants this.

    Never lossy. Single bits stay as they are: of what the standard allows for them, JPEG 2000,
    most viewers can read nothing.
    """
    is_rle = wanted is Compression.RLE and kind is not SegmentationKind.BINARY
    return Compression.RLE if is_rle else Compression.NONE


def segmentation(
    run: Run,
    card: ModelCard,
    group: Sequence[Plane],
    region: Region,
    compression: Compression,
    ordinal: int,
    slice_spacing_mm: float | None,
    block: identity.Block,
    layer: str,
) -> Segmented:
    """The Segmentation of one group of planes.

    Parameters
    ----------
    group : sequence of Plane
        Those with at least one frame in the region, as `groups` gave them.
    compression : Compression
        As `compression_of` gave it.
    ordinal : int
        Which of the job's Segmentations, from 0.
    slice_spacing_mm : float or None
        As `slice_spacing` gave it: the planes in the group may have gaps.
    block : Block
        The identity of the first plane's instance, as received.
    layer : str
        What the heat was computed for.

    Raises
    ------
    EncodeError
        The planes do not form a Segmentation; the Secondary Capture can still be sent.
    IdentityError
        The file reads back with another identity than the source's: nothing is sent.
    """
    source = group[0].source
    # segment by segment, plane by plane: the order of the dimension indices
    ranks = {plane.index: rank for rank, plane in enumerate(group, 1)}
    order = sorted(region.frames, key=lambda key: (key[0], ranks[key[1]]))
    pixels = _pixel_data([region.frames[key] for key in order], region.kind, source, compression)
    dataset = _skeleton(run, card, group, region, compression, ordinal, slice_spacing_mm, layer)
    provenance.describe(dataset, run, ObjectKind.SEG, block, _title(run, region))
    dataset.Rows, dataset.Columns = source.rows, source.columns
    dataset.NumberOfFrames = len(order)
    if _is_sequence(group):
        _order_by_frame_number(dataset, region)
    is_flat = region.kind is SegmentationKind.LABELMAP or len(region.segments) == 1
    if source.has_plane and is_flat and _is_volume(group, slice_spacing_mm):
        dataset.DimensionOrganizationType = "3D"
    planes = {plane.index: plane for plane in group}
    derivations = {plane.index: _derivation(plane) for plane in group}
    items = [
        _frame_item(
            region, segment, planes[i], ranks[i], derivations[i], is_sequence=_is_sequence(group)
        )
        for segment, i in order
    ]
    more = elements.sequence("PerFrameFunctionalGroupsSequence", items) + provenance.references(
        run, provenance.frames_by_instance((p.frame, p.source) for p in group), derived=True
    )
    # a Segmentation tells the side by its frames' anatomy, not by the series (PS3.3 C.7.3.1)
    placed = identity.without(block, "Laterality", "ImageLaterality")
    file = provenance.as_file(dataset, more, pixels, placed)
    syntax = str(pixels.transfer_syntax)
    return Segmented(
        dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.SeriesInstanceUID, syntax, file
    )


def _pixel_data(
    frames: Sequence[Image], kind: SegmentationKind, source: Source, compression: Compression
) -> PixelData:
    if kind is SegmentationKind.BINARY:
        streams = [pixeldata.bits(frames, source.rows * source.columns)]
    else:
        streams = pixeldata.compressed(frames, compression)
    return pixeldata.pixel_data(streams, compression)


def _is_sequence(group: Sequence[Plane]) -> bool:
    """Whether the planes are frames of one instance whose only order is their number."""
    return len(group) > 1 and not group[0].source.has_plane


def _order_by_frame_number(dataset: Dataset, region: Region) -> None:
    """Make the frame's number in its source a dimension (PS3.3 C.7.6.17, C.7.6.16.2.2)."""
    dimension = Dataset()
    dimension.DimensionIndexPointer = tag_for_keyword("InStackPositionNumber")
    dimension.FunctionalGroupPointer = tag_for_keyword("FrameContentSequence")
    dimension.DimensionOrganizationUID = dataset.DimensionOrganizationSequence[
        0
    ].DimensionOrganizationUID
    dimension.DimensionDescriptionLabel = "Frame Number"
    if region.kind is SegmentationKind.LABELMAP:
        dataset.DimensionIndexSequence = [dimension]  # in the place of the frame's label
    else:
        dataset.DimensionIndexSequence.append(dimension)


def _frame_item(
    region: Region,
    segment: int,
    plane: Plane,
    rank: int,
    derivation: bytes,
    *,
    is_sequence: bool,
) -> bytes:
    """One item of the per-frame functional groups (PS3.3 A.51.5)."""
    is_labelmap, is_spatial = region.kind is SegmentationKind.LABELMAP, plane.source.has_plane
    indices = ([] if is_labelmap else [segment]) + ([rank] if is_spatial or is_sequence else [])
    content = b""
    if is_sequence:
        content = elements.text("StackID", "1")
        content += elements.numbers("InStackPositionNumber", plane.frame.number)
    # without segments and places highdicom's dimension is the frame's label
    content += elements.numbers("DimensionIndexValues", *(indices or [1]))
    content += b"" if indices else elements.text("FrameLabel", "Frame")
    item = [derivation, elements.sequence("FrameContentSequence", [content])]
    if is_spatial:
        position = elements.text("ImagePositionPatient", *plane.source.position)
        item.append(elements.sequence("PlanePositionSequence", [position]))
    if not is_labelmap and len(region.segments) > 1:
        number = elements.numbers("ReferencedSegmentNumber", segment)
        item.append(elements.sequence("SegmentIdentificationSequence", [number]))
    return b"".join(item)


def _derivation(plane: Plane) -> bytes:
    """Which image a frame comes from (PS3.3 C.7.6.16.2.6)."""
    instance, is_multi_frame = plane.frame.instance, plane.source.is_multi_frame
    number = elements.text("ReferencedFrameNumber", str(plane.frame.number))
    image = [
        provenance.reference(instance.sop_class_uid, instance.sop_instance_uid),
        number if is_multi_frame else b"",
        elements.text("SpatialLocationsPreserved", "YES"),
        provenance.PURPOSE_SOURCE_IMAGE,
    ]
    source = elements.sequence("SourceImageSequence", [b"".join(image)])
    code = elements.dump(provenance.code_item(_SEGMENTATION))
    return elements.sequence(
        "DerivationImageSequence", [source + elements.sequence("DerivationCodeSequence", [code])]
    )


def _is_volume(group: Sequence[Plane], slice_spacing_mm: float | None) -> bool:
    """Whether the frames are a 3D volume set (PS3.3 C.7.6.17).

    highdicom says so too where a region skips every other slice: who then takes the slice spacing
    for the distance of the frames puts them at the wrong places.
    """
    if len(group) < 2:
        return False
    step = _even_step(_positions(group), _normal(group[0].source.orientation))
    if step is None or slice_spacing_mm is None:
        return step is not None
    return math.isclose(step, slice_spacing_mm, rel_tol=_SPACING_TOLERANCE)


def _skeleton(
    run: Run,
    card: ModelCard,
    group: Sequence[Plane],
    region: Region,
    compression: Compression,
    ordinal: int,
    slice_spacing_mm: float | None,
    layer: str,
) -> Dataset:
    """All that does not depend on the frames, but for series and references."""
    source, kind = group[0].source, region.kind
    instance_uid = run.uid(ObjectKind.SEG, "instance", ordinal, compression)
    descriptions = [
        _description(run, card, segment, number, ordinal, layer, kind)
        for number, segment in enumerate(region.segments, 1)
    ]
    try:
        made = Segmentation(
            source_images=[_stand_in(instance_uid, group, slice_spacing_mm)],
            pixel_array=np.ones((1, 1, 1), np.uint8),
            segmentation_type=kind.name,
            fractional_type="PROBABILITY",
            max_fractional_value=MAX_FRACTIONAL_VALUE,
            segment_descriptions=descriptions,
            series_instance_uid=run.uid(ObjectKind.SEG, "series", ordinal, compression),
            series_number=provenance.SERIES_NUMBERS[ObjectKind.SEG],
            sop_instance_uid=instance_uid,
            instance_number=1,
            manufacturer=provenance.MANUFACTURER,
            manufacturer_model_name=identity.MODEL_NAME,
            software_versions=provenance.SOFTWARE,
            device_serial_number=uids.IMPLEMENTATION_CLASS_UID,
            content_label="AI_RESEARCH",
            content_description=_stated_threshold(run, region),
            transfer_syntax_uid=ExplicitVRLittleEndian,
            omit_empty_frames=True,
        )
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        # no text of the library's: it may quote the header
        message = f"the planes form no Segmentation: {type(error).__name__} in highdicom"
        raise EncodeError(message) from error
    dataset = Dataset(made)
    for keyword in ("PixelData", "PerFrameFunctionalGroupsSequence", "SourceImageSequence"):
        delattr(dataset, keyword)
    dataset.SegmentsOverlap = _overlap(region)
    dataset.ContentCreatorName = ""
    if not source.has_plane:
        dataset.PatientOrientation = list(source.patient_orientation) or ""
    elif not slice_spacing_mm:
        # highdicom takes 1 mm for the distance of one plane from the next
        del dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices
    dimension_uid = UID(run.uid(ObjectKind.SEG, "dimensions", ordinal, compression))
    for item in (*dataset.DimensionOrganizationSequence, *dataset.DimensionIndexSequence):
        item.DimensionOrganizationUID = dimension_uid
    return dataset


def _overlap(region: Region) -> str:
    """PS3.3 C.8.20.2: of several probabilities nobody can say whether they overlap."""
    if region.kind is SegmentationKind.FRACTIONAL and len(region.segments) > 1:
        return "UNDEFINED"
    return "YES" if region.has_overlap else "NO"


def _title(run: Run, region: Region) -> str:
    if region.kind is SegmentationKind.FRACTIONAL:
        return "probability"
    if region.segments[0].is_probability:
        return "region"
    return f"heat map region {run.method}"


def _stated_threshold(run: Run, region: Region) -> str:
    if region.kind is SegmentationKind.FRACTIONAL:
        return f"Model probability, {MAX_FRACTIONAL_VALUE} = 1"
    lowest = min(segment.threshold for segment in region.segments)
    if region.segments[0].is_probability:
        return f"Model probability >= {lowest:.3g}"
    return provenance.ascii_text(f"{run.method} heat >= {lowest:.3g} of full scale", 64)


def _meaning(segment: Segment, kind: SegmentationKind) -> str:
    """What a pixel of the segment says."""
    if kind is SegmentationKind.FRACTIONAL:
        return f"Probability of the model, {MAX_FRACTIONAL_VALUE} = 1; AI, research"
    scale = "" if segment.is_probability else " of the model card's full scale"
    quantity = "Probability" if segment.is_probability else "Heat"
    strongest = "; the strongest at each pixel" if kind is SegmentationKind.LABELMAP else ""
    return f"{quantity} at or above {segment.threshold:.3g}{scale}{strongest}; AI, research"


def _description(
    run: Run,
    card: ModelCard,
    segment: Segment,
    number: int,
    ordinal: int,
    layer: str,
    kind: SegmentationKind,
) -> Dataset:
    parameters = {
        "score": f"{segment.score:.4f}",
        "score_threshold": f"{segment.name.threshold:.6g}",
    }
    if not segment.is_probability:
        parameters = {
            "method": run.method,
            "layer": layer,
            "heat_threshold": f"{segment.threshold:.6g}",
            "full_scale": f"{card.heatmap.full_scale:.6g}",
            **parameters,
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
    description.SegmentDescription = _meaning(segment, kind)
    return description


def _concept(code: Code) -> Concept:
    return Concept(code.value, code.scheme, provenance.ascii_text(code.meaning, 64))


def _stand_in(uid: str, group: Sequence[Plane], slice_spacing_mm: float | None) -> Dataset:
    """A well-formed image of one pixel at the first plane's place, for highdicom's constructor."""
    source, lossy = group[0].source, most_lossy(plane.source for plane in group)
    dataset = Dataset()
    is_spatial = source.has_plane
    dataset.SOPClassUID = CTImageStorage if is_spatial else SecondaryCaptureImageStorage
    for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        setattr(dataset, keyword, UID(uid))  # the true ones are written with the references
    for keyword in identity.EMPTY_WHEN_ABSENT:
        setattr(dataset, keyword, None)
    dataset.Modality = source.modality or "OT"
    dataset.Rows = dataset.Columns = 1
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
    dataset.LossyImageCompression = "01" if lossy.is_lossy else "00"
    if lossy.lossy_ratios:
        dataset.LossyImageCompressionRatio = list(lossy.lossy_ratios)
        dataset.LossyImageCompressionMethod = list(lossy.lossy_methods)
    return dataset
