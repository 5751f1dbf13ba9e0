"""What the encoders may know about a source image: read from its header, checked, never repaired.

Headers are full of defects, and a library that validates one refuses to make anything from it. So
nothing of the received header goes into an encoder: each attribute that a result needs is read
here, by its raw text, and is either well formed or absent. Patient and study elements are not
here at all; they travel as received bytes (`identity`).
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

from pydicom import Dataset, Sequence
from pydicom.datadict import tag_for_keyword
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    CTImageStorage,
    DigitalMammographyXRayImageStorageForPresentation,
    DigitalMammographyXRayImageStorageForProcessing,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    MRImageStorage,
    SecondaryCaptureImageStorage,
    UltrasoundImageStorage,
)
from pydicom.valuerep import format_number_as_ds

from dicom_xai import uids
from dicom_xai.study import Frame

Texts = tuple[str, ...]

#: Whose images have one frame by definition: a frame number may not be referred to, although
#: some scanners write several (PS3.3 Table 10-3).
SINGLE_FRAME_CLASSES = frozenset(
    {
        ComputedRadiographyImageStorage,
        CTImageStorage,
        DigitalMammographyXRayImageStorageForPresentation,
        DigitalMammographyXRayImageStorageForProcessing,
        DigitalXRayImageStorageForPresentation,
        DigitalXRayImageStorageForProcessing,
        MRImageStorage,
        SecondaryCaptureImageStorage,
        UltrasoundImageStorage,
    }
)


@dataclass(frozen=True, slots=True)
class Source:
    """One source frame, as far as results describe it. Empty means absent or malformed.

    Numbers are decimal strings as received (VR DS), so that a copy says what the source says.
    """

    rows: int
    columns: int
    is_multi_frame: bool  #: whether a reference can name a frame
    modality: str
    pixel_spacing: Texts  #: mm between rows, between columns; PixelSpacing only, never Imager's
    pixel_spacing_calibration_type: str
    pixel_spacing_calibration_description: str
    slice_thickness: str  #: mm
    position: Texts  #: ImagePositionPatient, mm
    orientation: Texts  #: ImageOrientationPatient
    frame_of_reference_uid: str
    position_reference_indicator: str
    patient_orientation: Texts
    is_lossy: bool
    lossy_ratios: Texts
    lossy_methods: Texts

    @property
    def has_plane(self) -> bool:
        """Whether the frame's place in the patient is known in full (PS3.3 C.7.6.2)."""
        return bool(
            self.frame_of_reference_uid
            and self.position
            and self.orientation
            and self.pixel_spacing
        )


def normalise(frame: Frame) -> Source:
    """What a frame's header says, attribute by attribute (table `RULES`)."""
    found: dict[str, Texts] = {}
    for name, (keyword, group, accept) in RULES.items():
        values = (accept(_texts(dataset, keyword)) for dataset in _places(frame, group))
        found[name] = next(filter(None, values), ())
    text = {name: values[0] if values else "" for name, values in found.items()}
    rows, columns = frame.values.shape
    is_lossy = text["lossy"] == "01"
    tells_how = is_lossy and len(found["lossy_ratios"]) == len(found["lossy_methods"])
    return Source(
        rows=rows,
        columns=columns,
        is_multi_frame=(
            int(text["number_of_frames"] or "1") > 1
            and frame.instance.sop_class_uid not in SINGLE_FRAME_CLASSES
        ),
        modality=text["modality"],
        pixel_spacing=found["pixel_spacing"],
        pixel_spacing_calibration_type=text["pixel_spacing_calibration_type"],
        pixel_spacing_calibration_description=text["pixel_spacing_calibration_description"],
        slice_thickness=text["slice_thickness"],
        position=found["position"],
        orientation=found["orientation"],
        frame_of_reference_uid=text["frame_of_reference_uid"],
        position_reference_indicator=text["position_reference_indicator"],
        patient_orientation=found["patient_orientation"],
        is_lossy=is_lossy,
        lossy_ratios=found["lossy_ratios"] if tells_how else (),
        lossy_methods=found["lossy_methods"] if tells_how else (),
    )


# ------------------------------------------------------------------ rules for values


def _words(pattern: str) -> Callable[[Texts], Texts]:
    compiled = re.compile(pattern)

    def accept(values: Texts) -> Texts:
        return values if values and all(compiled.fullmatch(value) for value in values) else ()

    return accept


def _numbers(count: int | None, *, positive: bool) -> Callable[[Texts], Texts]:
    def accept(values: Texts) -> Texts:
        if not values or (count is not None and len(values) != count):
            return ()
        numbers = [_number(value) for value in values]
        if any(not math.isfinite(n) or (positive and n <= 0) for n in numbers):
            return ()
        # a decimal string has at most 16 characters (PS3.5 6.2)
        pairs = zip(values, numbers, strict=True)
        return tuple(v if len(v) <= 16 else format_number_as_ds(n) for v, n in pairs)

    return accept


def _cosines(values: Texts) -> Texts:
    """Two unit vectors at a right angle; within 0.01, the roundings that scanners write."""
    accepted = _numbers(6, positive=False)(values)
    if not accepted:
        return ()
    x, y = [float(v) for v in accepted[:3]], [float(v) for v in accepted[3:]]
    dots = [sum(a * b for a, b in zip(p, q, strict=True)) for p, q in ((x, x), (y, y), (x, y))]
    return accepted if all(abs(d - t) < 0.01 for d, t in zip(dots, (1, 1, 0), strict=True)) else ()


def _uid(values: Texts) -> Texts:
    return values if len(values) == 1 and uids.is_valid(values[0]) else ()


def _pair(accept: Callable[[Texts], Texts]) -> Callable[[Texts], Texts]:
    return lambda values: accept(values) if len(values) == 2 else ()


_TEXT = _words(r"[\x20-\x5b\x5d-\x7e]{1,64}")

#: Name: keyword, functional group that holds it in enhanced images (PS3.3 C.7.6.16),
#: and the rule that its values must pass to count as present.
RULES: dict[str, tuple[str, str, Callable[[Texts], Texts]]] = {
    "number_of_frames": ("NumberOfFrames", "", _words(r"[0-9]{1,7}")),
    "modality": ("Modality", "", _words(r"[A-Z0-9_ ]{1,16}")),
    "pixel_spacing": ("PixelSpacing", "PixelMeasuresSequence", _numbers(2, positive=True)),
    "pixel_spacing_calibration_type": (
        "PixelSpacingCalibrationType",
        "",
        _words(r"GEOMETRY|FIDUCIAL"),
    ),
    "pixel_spacing_calibration_description": ("PixelSpacingCalibrationDescription", "", _TEXT),
    "slice_thickness": ("SliceThickness", "PixelMeasuresSequence", _numbers(1, positive=True)),
    "position": ("ImagePositionPatient", "PlanePositionSequence", _numbers(3, positive=False)),
    "orientation": ("ImageOrientationPatient", "PlaneOrientationSequence", _cosines),
    "frame_of_reference_uid": ("FrameOfReferenceUID", "", _uid),
    "position_reference_indicator": ("PositionReferenceIndicator", "", _TEXT),
    # letters of PS3.3 C.7.6.1.1.1; two directions
    "patient_orientation": (
        "PatientOrientation",
        "",
        _pair(_words(r"[APRLHFDEVTCX]{1,3}|[A-Z]{2,4}")),
    ),
    "lossy": ("LossyImageCompression", "", _words("00|01")),
    "lossy_ratios": ("LossyImageCompressionRatio", "", _numbers(None, positive=True)),
    "lossy_methods": ("LossyImageCompressionMethod", "", _words(r"[A-Z0-9_ ]{1,16}")),
}


# ------------------------------------------------------------------ reading


def _places(frame: Frame, group: str) -> list[Dataset]:
    """Where an attribute may stand: this frame's group, the shared group, the root."""
    places = []
    if group:
        per_frame = _items(frame.header, "PerFrameFunctionalGroupsSequence")
        mine = per_frame[frame.number - 1 : frame.number]
        for item in [*mine, *_items(frame.header, "SharedFunctionalGroupsSequence")[:1]]:
            places += _items(item, group)[:1]
    return [*places, frame.header]


def _items(dataset: Dataset, keyword: str) -> list[Dataset]:
    try:
        value = dataset.get(keyword)
    except (OSError, EOFError, ValueError, TypeError, KeyError, struct.error):
        return []
    return list(value) if isinstance(value, Sequence) else []


def _texts(dataset: Dataset, keyword: str) -> Texts:
    """The values as text without padding; pydicom's own parser would refuse or repair them."""
    tag = tag_for_keyword(keyword)
    if tag is None or tag not in dataset:
        return ()
    value = dataset.get_item(tag).value
    if isinstance(value, bytes):
        parts = value.decode("ascii", "replace").split("\\")
    elif value is None or isinstance(value, str | int | float):
        parts = [] if value is None else str(value).split("\\")
    else:
        parts = [str(part) for part in value]
    texts = tuple(part.strip(" \0") for part in parts)
    return texts if any(texts) else ()


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
