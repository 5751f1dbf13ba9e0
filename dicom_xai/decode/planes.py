"""A header says where its frames lie: records that order a unit without its pixels.

Rule: no torch and no pixels here, so that any process can do it as instances arrive.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydicom import Dataset, Sequence

from dicom_xai.config import StackAttribute
from dicom_xai.decode.attributes import PYDICOM_ERRORS, integer, items, numbers, text
from dicom_xai.errors import DecodeError
from dicom_xai.study import Instance, PlaneRecord

#: More frames than any scanner writes; decoding has its own limit on their size.
_FRAMES_LIMIT = 65_536

#: What besides `StackAttribute` may tell frames at one place apart.
DIFFUSION_GRADIENT = "DiffusionGradientOrientation"
ACQUISITION_TIME = "AcquisitionTime"

#: Where multi-frame objects keep an attribute: functional group macro and keyword in it (PS3.3
#: C.8.13.5 MR, C.8.15.3 CT, C.7.6.16.2.2 Frame Content).
_IN_GROUPS: Mapping[str, tuple[tuple[str, str], ...]] = {
    StackAttribute.IMAGE_TYPE: (
        ("MRImageFrameTypeSequence", "FrameType"),
        ("CTImageFrameTypeSequence", "FrameType"),
    ),
    StackAttribute.ECHO_TIME: (("MREchoSequence", "EffectiveEchoTime"),),
    StackAttribute.B_VALUE: (("MRDiffusionSequence", "DiffusionBValue"),),
    StackAttribute.TEMPORAL_POSITION: (("FrameContentSequence", "TemporalPositionIndex"),),
    StackAttribute.TRIGGER_TIME: (
        ("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime"),
    ),
    StackAttribute.ACQUISITION_NUMBER: (("FrameContentSequence", "FrameAcquisitionNumber"),),
    StackAttribute.SLICE_THICKNESS: (("PixelMeasuresSequence", "SliceThickness"),),
    StackAttribute.INVERSION_TIME: (("MRModifierSequence", "InversionTimes"),),
    StackAttribute.CONVOLUTION_KERNEL: (("CTReconstructionSequence", "ConvolutionKernel"),),
}
_FACTS: tuple[str, ...] = (*StackAttribute, DIFFUSION_GRADIENT, ACQUISITION_TIME)


def planes_of(instance: Instance, header: Dataset) -> tuple[PlaneRecord, ...]:
    """Where each frame of an object lies, in frame order.

    A place that is missing is None; one that cannot be used is named in `PlaneRecord.defect`.

    Source: PS3.3 C.7.6.2 (Image Plane); C.7.6.16.2.1, .3 and .4 (Pixel Measures, Plane Position and
    Plane Orientation of multi-frame objects).

    Parameters
    ----------
    instance : Instance
        Whose header this is.
    header : Dataset
        Pixel data is not looked at.

    Raises
    ------
    DecodeError
        NumberOfFrames, Rows or Columns are no sensible numbers, or the functional groups cannot be
        read.
    """
    count = integer(header, "NumberOfFrames")
    count = 1 if count is None else count
    if not 1 <= count <= _FRAMES_LIMIT:
        raise DecodeError(f"NumberOfFrames: {count}, 1 to {_FRAMES_LIMIT} wanted")
    try:
        instance_number = integer(header, "InstanceNumber") or 0
    except DecodeError:
        instance_number = 0  # only decides between equals; the standard lets it be empty
    rows, columns = integer(header, "Rows") or 0, integer(header, "Columns") or 0
    common = _facts(header)
    shared = items(header, "SharedFunctionalGroupsSequence")[:1]
    frames = items(header, "PerFrameFunctionalGroupsSequence")
    out = []
    for index in range(count):
        groups = [*frames[index : index + 1], *shared]
        spacing = _pixel_spacing(header, groups)
        position, orientation, defect = _place(header, groups)
        facts = {**common, **_group_facts(groups)} if groups else common
        out.append(
            PlaneRecord(
                sop_instance_uid=instance.sop_instance_uid,
                series_instance_uid=instance.series_instance_uid,
                number=index + 1,
                instance_number=instance_number,
                rows=rows,
                columns=columns,
                modality=_word(header, "Modality"),
                frame_of_reference_uid=_word(header, "FrameOfReferenceUID"),
                pixel_spacing_mm=spacing,
                position_mm=position,
                orientation=orientation,
                facts=tuple(facts.items()),
                defect=defect,
            )
        )
    return tuple(out)


_Position = tuple[float, float, float]
_Orientation = tuple[float, float, float, float, float, float]


def _place(
    header: Dataset, groups: list[Dataset]
) -> tuple[_Position | None, _Orientation | None, str]:
    """Position, orientation, and why they cannot be used."""
    try:
        position = numbers(_group(header, groups, "PlanePositionSequence"), "ImagePositionPatient")
        orientation = numbers(
            _group(header, groups, "PlaneOrientationSequence"), "ImageOrientationPatient"
        )
    except DecodeError as error:
        return None, None, str(error)
    if position is None and orientation is None:
        return None, None, ""
    if position is None or orientation is None:
        name = "ImagePositionPatient" if position is None else "ImageOrientationPatient"
        return None, None, f"{name} is missing"
    if len(position) != 3 or len(orientation) != 6:
        found = f"{len(position)} and {len(orientation)}"
        return None, None, f"ImagePositionPatient and ImageOrientationPatient have {found} values"
    row, column = orientation[:3], orientation[3:]
    lengths = (sum(a * a for a in row) ** 0.5, sum(a * a for a in column) ** 0.5)
    across = abs(sum(a * b for a, b in zip(row, column, strict=True)))
    if max(abs(length - 1) for length in lengths) > 1e-2 or across > 1e-2:
        return None, None, "ImageOrientationPatient holds no two perpendicular unit vectors"
    x, y, z = position
    a, b, c, d, e, f = orientation
    return (x, y, z), (a, b, c, d, e, f), ""


def _group(header: Dataset, groups: list[Dataset], macro: str) -> Dataset:
    """The frame's own functional group, else the shared one, else the data set itself."""
    for group in groups:
        found = items(group, macro)
        if found:
            return found[0]
    return header


def _pixel_spacing(header: Dataset, groups: list[Dataset]) -> tuple[float, float] | None:
    """None also where it is not two positive numbers: some projections come with zeros."""
    try:
        found = numbers(_group(header, groups, "PixelMeasuresSequence"), "PixelSpacing")
    except DecodeError:
        return None
    if found is None or len(found) != 2 or min(found) <= 0:
        return None
    return found[0], found[1]


def _facts(header: Dataset) -> dict[str, tuple[str, ...]]:
    found = {keyword: _texts(header, keyword) for keyword in _FACTS}
    return {keyword: values for keyword, values in found.items() if values}


def _group_facts(groups: list[Dataset]) -> dict[str, tuple[str, ...]]:
    facts: dict[str, tuple[str, ...]] = {}
    for keyword, places in _IN_GROUPS.items():
        for macro, nested in places:
            for group in groups:
                inside = items(group, macro)[:1]
                values = _texts(inside[0], nested) if inside else ()
                if values:
                    facts.setdefault(str(keyword), values)
    for group in groups:
        for item in items(group, "MRDiffusionSequence")[:1]:
            for gradient in items(item, "DiffusionGradientDirectionSequence")[:1]:
                facts.setdefault(DIFFUSION_GRADIENT, _texts(gradient, DIFFUSION_GRADIENT))
    return facts


def _texts(ds: Dataset, keyword: str) -> tuple[str, ...]:
    """The values of an attribute as text, numbers in one form; none when it cannot be read."""
    try:
        value = ds.get(keyword)
        # no text of items: pydicom's, of a broken one, grows twofold with each level around it
        if value is None or value == "" or isinstance(value, Sequence | bytes):
            return ()
        several = value if not isinstance(value, str | int | float) else [value]
        return tuple(
            f"{float(item):g}" if isinstance(item, int | float) else str(item).strip(" \0")
            for item in several
        )
    except PYDICOM_ERRORS:
        return ()  # a stack is then told apart by what can be read


def _word(header: Dataset, keyword: str) -> str:
    try:
        return text(header, keyword)
    except DecodeError:
        return ""
