"""Frames become a volume: ordered along the normal, and what is odd about them said in words.

Nothing is refused here that a model which looks at single slices could still use: duplicates, gaps
and strays are named in `Geometry.problems`. Problems speak of counts, millimetres and instance
numbers only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from pydicom import Dataset

from dicom_xai.decode.attributes import functional_group, integer, numbers, text
from dicom_xai.errors import DecodeError, GeometryError
from dicom_xai.study import Frame, Geometry, Volume

#: Two slices closer than this are at the same place: written positions are rounded (DS, PS3.5 6.2).
_SAME_PLACE_MM = 0.01
#: Direction cosines, pixel spacing and unit length agree within this: DS values are rounded.
_COSINE_TOLERANCE = 1e-3
#: A step this much longer than the median one means a missing slice.
_GAP_FACTOR = 1.5
#: Steps that differ from the median by more than this part of it are uneven.
_UNEVEN_PART = 0.05
#: In-plane drift over the whole stack that says gantry tilt or a moved table.
_DRIFT_MM = 1.0


def stack(frames: tuple[Frame, ...]) -> Volume:
    """The frames of a unit, in the order in which the model and the results see them.

    Frames with a position and orientation are sorted by their distance along the normal,
    ascending. If they form several stacks (series, orientation, frame of reference, matrix or
    spacing differ), the one with the most frames is kept and the others are named as a problem. Of
    frames at the same position the one with the lowest InstanceNumber is kept. Frames that have
    neither (projections) are all kept, by series, InstanceNumber and frame number.

    Source: PS3.3 C.7.6.2.1.1 (Image Position and Image Orientation), C.7.6.16.2.3 and .4 (Plane
    Position and Plane Orientation of multi-frame objects).

    Parameters
    ----------
    frames : tuple of Frame
        Of one unit, in any order.

    Returns
    -------
    Volume
        `positions_mm`, `orientation` and `slice_spacing_mm` are empty for projections.
        `pixel_spacing_mm` comes from PixelSpacing alone: ImagerPixelSpacing is measured at the
        detector, not in the patient (PS3.3 10.7.1.3).

    Raises
    ------
    GeometryError
        There are no frames, or positions exist but none is usable.
    """
    if not frames:
        raise GeometryError("no frames to stack")
    planes = [_plane(frame) for frame in frames]
    broken = [plane for plane in planes if plane.defect]
    placed = [plane for plane in planes if plane.is_placed]
    if not placed and broken:
        raise GeometryError(f"no slice has a usable place in the patient: {broken[0].defect}")
    if not placed:
        return _projections(planes)
    problems = []
    if len(placed) < len(planes):
        reason = f" ({broken[0].defect})" if broken else ""
        problems.append(f"{_images(len(planes) - len(placed))} without position left out{reason}")
    stacks = _stacks(placed)
    largest = max(stacks, key=len)
    others = [len(other) for other in stacks if other is not largest]
    if others:
        problems.append(
            f"{_images(sum(others))} of {len(others)} other orientation(s), series or matrix left "
            f"out; the largest stack has {len(largest)}"
        )
    return _volume(largest, problems)


@dataclass(frozen=True, slots=True, eq=False)
class _Plane:
    """Where one frame lies. `defect` says why a position that is there cannot be used."""

    frame: Frame
    instance_number: int
    spacing: tuple[float, float] | None
    position: np.ndarray | None = None
    orientation: np.ndarray | None = None
    defect: str = ""

    @property
    def is_placed(self) -> bool:
        return self.position is not None and self.orientation is not None and not self.defect

    @property
    def normal(self) -> np.ndarray:
        assert self.orientation is not None
        cross = np.cross(self.orientation[:3], self.orientation[3:])
        return np.asarray(cross / np.linalg.norm(cross))

    @property
    def order(self) -> tuple[int, int, str]:
        return self.instance_number, self.frame.number, self.frame.instance.sop_instance_uid


def _plane(frame: Frame) -> _Plane:
    header = frame.header
    try:
        instance_number = integer(header, "InstanceNumber") or 0
    except DecodeError:
        instance_number = 0  # only decides between equals; the standard lets it be empty
    spacing = _pixel_spacing(frame)
    try:
        position = _attribute(frame, "PlanePositionSequence", "ImagePositionPatient")
        orientation = _attribute(frame, "PlaneOrientationSequence", "ImageOrientationPatient")
    except DecodeError as error:
        return _Plane(frame, instance_number, spacing, defect=str(error))
    if position is None and orientation is None:
        return _Plane(frame, instance_number, spacing)
    if position is None or orientation is None:
        name = "ImagePositionPatient" if position is None else "ImageOrientationPatient"
        return _Plane(frame, instance_number, spacing, defect=f"{name} is missing")
    if len(position) != 3 or len(orientation) != 6:
        found = f"{len(position)} and {len(orientation)}"
        message = f"ImagePositionPatient and ImageOrientationPatient have {found} values"
        return _Plane(frame, instance_number, spacing, defect=message)
    cosines = np.array(orientation)
    lengths = np.linalg.norm(cosines.reshape(2, 3), axis=1)
    if np.abs(lengths - 1).max() > 1e-2 or abs(cosines[:3] @ cosines[3:]) > 1e-2:
        message = "ImageOrientationPatient holds no two perpendicular unit vectors"
        return _Plane(frame, instance_number, spacing, defect=message)
    return _Plane(frame, instance_number, spacing, np.array(position), cosines)


def _attribute(frame: Frame, macro: str, keyword: str) -> tuple[float, ...] | None:
    """From the frame's functional group where it has one, else from the data set itself."""
    group: Dataset | None = functional_group(frame.header, frame.number, macro)
    return numbers(frame.header if group is None else group, keyword)


def _pixel_spacing(frame: Frame) -> tuple[float, float] | None:
    """None also where it is not two positive numbers: some projections come with zeros."""
    try:
        found = _attribute(frame, "PixelMeasuresSequence", "PixelSpacing")
    except DecodeError:
        return None
    if found is None or len(found) != 2 or min(found) <= 0:
        return None
    return found[0], found[1]


def _projections(planes: list[_Plane]) -> Volume:
    def order(plane: _Plane) -> tuple[str, int, int, str]:
        return (plane.frame.instance.series_instance_uid, *plane.order)

    planes = sorted(planes, key=order)
    problems = []
    if len(planes) > 1 and text(planes[0].frame.header, "Modality") in ("CT", "MR", "PT"):
        problems.append("no positions: slices are in the order of InstanceNumber")
    spacings = {plane.spacing for plane in planes}
    if len(spacings) > 1:
        problems.append("images differ in PixelSpacing")
    spacing = planes[0].spacing if len(spacings) == 1 else None
    frames = tuple(plane.frame for plane in planes)
    return Volume(frames, Geometry(pixel_spacing_mm=spacing, problems=tuple(problems)))


def _stacks(planes: list[_Plane]) -> list[list[_Plane]]:
    """Groups of planes that can be one volume, in the order of their first slice."""
    stacks: list[list[_Plane]] = []
    for plane in sorted(planes, key=lambda plane: plane.order):
        for group in stacks:
            if _fits(group[0], plane):
                group.append(plane)
                break
        else:
            stacks.append([plane])
    return stacks


def _fits(one: _Plane, other: _Plane) -> bool:
    assert one.orientation is not None
    assert other.orientation is not None
    same_series = one.frame.instance.series_instance_uid == other.frame.instance.series_instance_uid
    same_matrix = one.frame.values.shape == other.frame.values.shape
    same_reference = text(one.frame.header, "FrameOfReferenceUID") == text(
        other.frame.header, "FrameOfReferenceUID"
    )
    if one.spacing is None or other.spacing is None:
        same_spacing = one.spacing is other.spacing
    else:
        same_spacing = np.allclose(one.spacing, other.spacing, rtol=_COSINE_TOLERANCE)
    same_cosines = np.abs(one.orientation - other.orientation).max() <= _COSINE_TOLERANCE
    return bool(same_series and same_matrix and same_reference and same_spacing and same_cosines)


def _volume(planes: list[_Plane], problems: list[str]) -> Volume:
    normal = planes[0].normal
    located = sorted(
        ((float(plane.position @ normal), plane) for plane in planes if plane.position is not None),
        key=lambda pair: (pair[0], pair[1].order),
    )
    kept: list[tuple[float, _Plane]] = []
    for at, plane in located:
        if not kept or at - kept[-1][0] > _SAME_PLACE_MM:
            kept.append((at, plane))
        elif plane.order < kept[-1][1].order:
            kept[-1] = (kept[-1][0], plane)
    if len(kept) < len(located):
        problems.append(
            f"{_images(len(located) - len(kept))} at the position of another left out (the lowest "
            "InstanceNumber is kept)"
        )
    positions = tuple(at for at, _ in kept)
    spacing = _spacing(positions, problems)
    _report_drift([plane for _, plane in kept], normal, problems)
    orientation = planes[0].orientation
    assert orientation is not None
    geometry = Geometry(
        pixel_spacing_mm=planes[0].spacing,
        orientation=tuple(float(value) for value in orientation),
        positions_mm=positions,
        slice_spacing_mm=spacing,
        problems=tuple(problems),
    )
    return Volume(tuple(plane.frame for _, plane in kept), geometry)


def _spacing(positions: tuple[float, ...], problems: list[str]) -> float | None:
    """The median step; gaps and uneven steps go to `problems`."""
    if len(positions) < 2:
        return None
    steps = np.diff(positions)
    median = float(np.median(steps))
    gaps = np.flatnonzero(steps > _GAP_FACTOR * median)
    for index in gaps[:5]:
        problems.append(
            f"gap of {steps[index]:.2f} mm between slices {index + 1} and {index + 2} "
            f"(usual step {median:.2f} mm)"
        )
    if len(gaps) > 5:
        problems.append(f"{len(gaps) - 5} more gaps")
    rest = np.delete(steps, gaps)
    if np.abs(rest - median).max() > _UNEVEN_PART * median + _SAME_PLACE_MM:
        problems.append(f"uneven slice spacing: {rest.min():.2f} to {rest.max():.2f} mm")
    return median


def _report_drift(planes: list[_Plane], normal: np.ndarray, problems: list[str]) -> None:
    offsets = np.array([plane.position for plane in planes]) - planes[0].position
    drift = offsets - np.outer(offsets @ normal, normal)
    furthest = float(np.linalg.norm(drift, axis=1).max())
    if furthest > _DRIFT_MM:
        along = float(np.ptp(offsets @ normal))
        angle = math.degrees(math.atan2(furthest, along)) if along else 90.0
        problems.append(
            f"slices shift by up to {furthest:.1f} mm in their plane "
            f"({angle:.1f} degrees: gantry tilt or a moved table)"
        )


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"
