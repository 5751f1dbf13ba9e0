"""What the encoders may know about a source object: read from its header, checked, never repaired.

Headers are full of defects, and a library that validates one refuses to make anything from it. So
nothing of the received header goes into an encoder: each attribute that a result needs is read
here, by its raw text, and is either well formed or absent. Patient and study elements travel as
received bytes (`identity`).

It depends on one object's bytes alone, so that it can be done as the object arrives, in another
process: what is given back pickles, and this module never loads torch or highdicom.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from pydicom import Dataset, Sequence
from pydicom.datadict import tag_for_keyword
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    ComputedRadiographyImageStorage,
    CTImageStorage,
    DigitalMammographyXRayImageStorageForPresentation,
    DigitalMammographyXRayImageStorageForProcessing,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSNearLossless,
    MRImageStorage,
    SecondaryCaptureImageStorage,
    UltrasoundImageStorage,
)
from pydicom.valuerep import format_number_as_ds

from dicom_xai import identity, uids
from dicom_xai.errors import EncodeError

Texts = tuple[str, ...]

_SYNTAX = "TransferSyntaxUID"

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

#: Frames coded so have lost something, whatever their header says.
LOSSY_SYNTAXES = frozenset({JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless})
#: Frames coded so may have lost something: their header is believed when it says that none has.
PERHAPS_LOSSY_SYNTAXES = frozenset({JPEG2000, HTJ2K})


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


@dataclass(frozen=True, slots=True)
class Described:
    """All that the results need to know of one stored object."""

    block: identity.Block  #: its identity block, as received
    frames: tuple[Source, ...]  #: one for each of its frames, in frame order


def describe(data: bytes, header: Dataset) -> Described:
    """What the results need to know of a stored object that could be decoded.

    Parameters
    ----------
    data : bytes
        The whole file as stored.
    header : Dataset
        The same object without its pixel data. Decoding has checked its size and its number of
        frames.

    Raises
    ------
    IdentityError
        The file cannot be read as far as its identity goes.
    EncodeError
        The header does not say how many rows and columns the image has.
    """
    return Described(identity.read_block(data), normalise(header))


def normalise(header: Dataset) -> tuple[Source, ...]:
    """What a header says of each frame, attribute by attribute (table `RULES`).

    Raises
    ------
    EncodeError
        The header does not say how many rows and columns the image has.
    """
    root = {name: accept(_texts(header, word)) for name, (word, _, accept) in RULES.items()}
    shared = _items(header, "SharedFunctionalGroupsSequence")[:1]
    for_all = {**root, **_grouped(shared)}
    count = int(_first(root["number_of_frames"]) or "1")
    sop_class_uid = _first(_texts(header, "SOPClassUID"))
    is_multi_frame = count > 1 and sop_class_uid not in SINGLE_FRAME_CLASSES
    size = _size(header, "Rows"), _size(header, "Columns")
    own = _items(header, "PerFrameFunctionalGroupsSequence")
    is_lossy = _is_lossy(_first(root["lossy"]), _first(_texts(header.file_meta, _SYNTAX)))
    if not own:
        return (_source(for_all, size, is_multi_frame, is_lossy),) * count
    each = [_grouped(own[i : i + 1]) for i in range(count)]
    return tuple(_source({**for_all, **mine}, size, is_multi_frame, is_lossy) for mine in each)


def most_lossy(sources: Iterable[Source]) -> Source:
    """Of the sources of one object that which lost most: its losses stand for all.

    An object is lossy when any part of it is, and the values of its ratio and method are successive
    compressions of one image (PS3.3 C.7.6.1.1.5): those of several sources may not be strung
    together. The first of several like it is taken.
    """
    return max(sources, key=lambda source: (source.is_lossy, _loss(source)))


def _loss(source: Source) -> float:
    return math.prod(float(ratio) for ratio in source.lossy_ratios)


def _is_lossy(said: str, syntax: str) -> bool:
    """Once lossy, always lossy; writers forget to say so (PS3.3 C.7.6.1.1.5)."""
    if said == "01" or syntax in LOSSY_SYNTAXES:
        return True
    return not said and syntax in PERHAPS_LOSSY_SYNTAXES


def _source(
    found: Mapping[str, Texts], size: tuple[int, int], is_multi_frame: bool, is_lossy: bool
) -> Source:
    tells_how = is_lossy and len(found["lossy_ratios"]) == len(found["lossy_methods"])
    return Source(
        rows=size[0],
        columns=size[1],
        is_multi_frame=is_multi_frame,
        modality=_first(found["modality"]),
        pixel_spacing=found["pixel_spacing"],
        pixel_spacing_calibration_type=_first(found["pixel_spacing_calibration_type"]),
        pixel_spacing_calibration_description=_first(
            found["pixel_spacing_calibration_description"]
        ),
        slice_thickness=_first(found["slice_thickness"]),
        position=found["position"],
        orientation=found["orientation"],
        frame_of_reference_uid=_first(found["frame_of_reference_uid"]),
        position_reference_indicator=_first(found["position_reference_indicator"]),
        patient_orientation=found["patient_orientation"],
        is_lossy=is_lossy,
        lossy_ratios=found["lossy_ratios"] if tells_how else (),
        lossy_methods=found["lossy_methods"] if tells_how else (),
    )


def _first(values: Texts) -> str:
    return values[0] if values else ""


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


def _grouped(groups: list[Dataset]) -> dict[str, Texts]:
    """What functional groups, a frame's own or the shared ones, say (PS3.3 C.7.6.16)."""
    found = {
        name: accept(_texts(item, keyword))
        for functional_groups in groups
        for name, (keyword, group, accept) in RULES.items()
        if group
        for item in _items(functional_groups, group)[:1]
    }
    return {name: values for name, values in found.items() if values}


def _size(header: Dataset, keyword: str) -> int:
    value = header.get(keyword)
    if not isinstance(value, int) or value <= 0:
        raise EncodeError(f"{keyword} is missing or no positive number")
    return value


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
    elif isinstance(value, Sequence):
        parts = []  # no text of items: pydicom's, of a broken one, grows with each level around it
    else:
        parts = [str(part) for part in value]
    texts = tuple(part.strip(" \0") for part in parts)
    return texts if any(texts) else ()


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
