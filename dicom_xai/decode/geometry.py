"""Planes become a stack: one per model, ordered along the normal, and every oddity in words.

Works on plane records alone, so that the order is known while pixels are still being decoded. What
a model can do without is left out and named in `Geometry.problems`: duplicates, other stacks,
localizers. Problems speak of counts, millimetres, keywords and slice numbers only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from dicom_xai.config import Preference, StackAttribute, StackOrientation, StackRule
from dicom_xai.decode.planes import ACQUISITION_TIME, DIFFUSION_GRADIENT
from dicom_xai.errors import GeometryError
from dicom_xai.study import Frame, Geometry, PlaneRecord, Stack, Volume

#: Two slices closer than this are at the same place: written positions are rounded (DS, PS3.5 6.2).
_SAME_PLACE_MM = 0.01
#: Direction cosines and pixel spacing agree within this: DS values are rounded.
_COSINE_TOLERANCE = 1e-3
#: Planes at one place whose origins are further apart than this are no copies of each other.
_BESIDE_MM = 1.0
#: More slabs side by side than any scanner takes: such planes are left together.
_MOST_SLABS = 16
#: A step this much longer than the median one means a missing slice.
_GAP_FACTOR = 1.5
#: Steps that differ from the median by more than this part of it are uneven.
_UNEVEN_PART = 0.05
#: In-plane drift over the whole stack that says gantry tilt or a moved table.
_DRIFT_MM = 1.0
#: What may tell frames at one place apart, the surest first. Times come last: they may differ from
#: slice to slice of one stack.
_SEPARATORS: tuple[str, ...] = (
    StackAttribute.ECHO_TIME,
    StackAttribute.ECHO_NUMBERS,
    StackAttribute.B_VALUE,
    StackAttribute.INVERSION_TIME,
    StackAttribute.TEMPORAL_POSITION,
    StackAttribute.IMAGE_TYPE,
    StackAttribute.CONVOLUTION_KERNEL,
    DIFFUSION_GRADIENT,
    StackAttribute.ACQUISITION_NUMBER,
    StackAttribute.TRIGGER_TIME,
    ACQUISITION_TIME,
)
#: Of the planes that a separator sets apart, at least this part lies where others lie too.
_SHARED_PART = 0.5
#: Patient x, y, z (PS3.3 C.7.6.2.1.1): the normal of such a stack runs along it.
_AXES = (StackOrientation.SAGITTAL, StackOrientation.CORONAL, StackOrientation.AXIAL)

_Planes = list[PlaneRecord]


def stack(planes: Iterable[PlaneRecord], rule: StackRule | None) -> Stack:
    """Which planes of a unit the model and the results see, and in what order.

    Planes with a place in the patient are sorted by their distance along the normal, ascending.
    They form several stacks where series, frame of reference, matrix, spacing or orientation
    differ, where some are localizers, where slabs lie side by side, and where several lie at each
    place and an attribute tells them apart: echo time, b-value, time point and the like. With a
    rule one stack is kept: the one that the rule prefers, then the one with the most slices. Of
    planes at the same place the one with the lowest InstanceNumber is kept. Planes without any
    place (projections) are all kept, by series, InstanceNumber and frame number.

    Source: PS3.3 C.7.6.2.1.1 (Image Position and Image Orientation).

    Parameters
    ----------
    planes : iterable of PlaneRecord
        Of one unit, in any order.
    rule : StackRule or None
        Of the model's card; None keeps every stack, one after the other.

    Returns
    -------
    Stack
        `positions_mm`, `origins_mm`, `orientation` and `slice_spacing_mm` are empty for
        projections and where several stacks are kept. `pixel_spacing_mm` comes from PixelSpacing
        alone: ImagerPixelSpacing is measured at the detector, not in the patient (PS3.3 10.7.1.3).

    Raises
    ------
    GeometryError
        There are no planes, places exist but none is usable, or no stack is what the rule wants.
    """
    given = list(planes)
    if not given:
        raise GeometryError("no frames to stack")
    broken = [plane for plane in given if plane.defect]
    placed = [plane for plane in given if plane.position_mm is not None and not plane.defect]
    if not placed and broken:
        raise GeometryError(f"no slice has a usable place in the patient: {broken[0].defect}")
    if not placed:
        return _projections(given, rule)
    if rule is None:
        return _every(given, _stacks(placed))
    problems = []
    if len(placed) < len(given):
        reason = f" ({broken[0].defect})" if broken else ""
        problems.append(f"{_images(len(given) - len(placed))} without position left out{reason}")
    return _ordered(_chosen(_stacks(placed), rule, problems), problems)


def attach(stacked: Stack, frames: Iterable[Frame]) -> Volume:
    """The decoded frames in the stack's order; frames that it leaves out may be among them.

    Raises
    ------
    GeometryError
        A frame of the stack is missing.
    """
    known = {(frame.instance.sop_instance_uid, frame.number): frame for frame in frames}
    try:
        ordered = tuple(known[plane.key] for plane in stacked.planes)
    except KeyError as error:
        raise GeometryError(
            f"{len(stacked.planes)} frames in the stack, {len(known)} decoded, some are missing"
        ) from error
    return Volume(ordered, stacked.geometry)


def _order(plane: PlaneRecord) -> tuple[int, int, str]:
    return plane.instance_number, plane.number, plane.sop_instance_uid


def _stacks(planes: _Planes) -> list[_Planes]:
    """Groups of planes that can be one volume, in the order of their first plane."""
    grids: dict[tuple[object, ...], list[_Planes]] = {}
    groups: list[_Planes] = []
    for plane in sorted(planes, key=_order):
        grid = (
            plane.series_instance_uid,
            plane.frame_of_reference_uid,
            plane.rows,
            plane.columns,
            "LOCALIZER" in _values(plane, StackAttribute.IMAGE_TYPE),
        )
        alike = grids.setdefault(grid, [])
        for group in alike:
            if _is_parallel(group[0], plane):
                group.append(plane)
                break
        else:
            alike.append([plane])
            groups.append(alike[-1])
    slabs = (slab for group in groups for slab in _side_by_side(group))
    return [part for slab in slabs for part in _separated(slab, _SEPARATORS)]


def _is_parallel(one: PlaneRecord, other: PlaneRecord) -> bool:
    assert one.orientation is not None
    assert other.orientation is not None
    if (one.pixel_spacing_mm is None) != (other.pixel_spacing_mm is None):
        return False
    for a, b in zip(one.pixel_spacing_mm or (), other.pixel_spacing_mm or (), strict=True):
        if abs(a - b) > _COSINE_TOLERANCE * b:
            return False
    cosines = zip(one.orientation, other.orientation, strict=True)
    return all(abs(a - b) <= _COSINE_TOLERANCE for a, b in cosines)


def _side_by_side(planes: _Planes) -> list[_Planes]:
    """The group in parts, where planes lie at one place of the normal but beside each other."""
    normal = _normal(planes[0])
    origins = np.array([plane.position_mm for plane in planes])
    along, places = origins @ normal, _places(planes)
    lateral = origins - np.outer(along, normal)
    firsts = np.unique(places, return_index=True)[1]
    is_beside = np.linalg.norm(lateral - lateral[firsts[places]], axis=1) > _BESIDE_MM
    if not is_beside.any():
        return [planes]
    order = np.argsort(places, kind="stable")
    held = np.split(order, np.flatnonzero(np.diff(places[order])) + 1)
    # a tilted gantry shifts the slices of each slab by the same from one to the next
    upright = lateral - np.outer(along, _tilt(held, lateral, along))
    slabs: list[NDArray[np.float64]] = []
    rest = upright[max(held, key=lambda at: int(is_beside[at].sum()))]
    while len(rest):
        slabs.append(rest[0])
        rest = rest[np.linalg.norm(rest - rest[0], axis=1) > _BESIDE_MM]
        if len(slabs) > _MOST_SLABS:
            return [planes]
    nearest = np.argmin([np.linalg.norm(upright - slab, axis=1) for slab in slabs], axis=0)
    main = int(np.bincount(nearest).argmax())
    for number, slab in enumerate(slabs):
        own = nearest == number
        is_far = np.linalg.norm(slab - slabs[main]) > _half_width_mm(planes[0])
        if not is_far and np.isin(places[own], places[~own]).mean() < _SHARED_PART:
            nearest[own] = main  # somebody moved: one stack with a step, not two beside each other
    return [
        [planes[index] for index in np.flatnonzero(nearest == number)]
        for number in dict.fromkeys(nearest.tolist())
    ]


def _half_width_mm(plane: PlaneRecord) -> float:
    """Half of a plane's shorter side; endless where its spacing is not known."""
    if plane.pixel_spacing_mm is None:
        return math.inf
    sides = zip((plane.rows, plane.columns), plane.pixel_spacing_mm, strict=True)
    return min(count * spacing for count, spacing in sides) / 2


def _tilt(
    held: list[NDArray[np.int64]], lateral: NDArray[np.float64], along: NDArray[np.float64]
) -> NDArray[np.float64]:
    """How far planes shift beside the normal for each mm along it: the usual least shift."""
    shifts = []
    for below, above in itertools.pairwise(held):
        from_below = lateral[above] - lateral[below[0]]
        least = from_below[np.argmin(np.linalg.norm(from_below, axis=1))]
        shifts.append(least / (along[above[0]] - along[below[0]]))
    return np.asarray(np.median(shifts, axis=0)) if shifts else np.zeros(3)


def _separated(planes: _Planes, separators: Sequence[str]) -> list[_Planes]:
    """The group in parts, where it holds several frames at each place that an attribute tells."""
    places = _places(planes)
    held = np.bincount(places)
    if not separators or held.max() == 1:
        return [planes]
    first, rest = separators[0], separators[1:]
    parts: dict[tuple[str, ...], list[int]] = {}
    for index, plane in enumerate(planes):
        parts.setdefault(_values(plane, first), []).append(index)
    # more values than frames at one place: it changes from slice to slice, as a time may
    if 1 < len(parts) <= held.max() and all(
        np.mean(held[places[part]] > 1) >= _SHARED_PART for part in parts.values()
    ):
        apart = ([planes[index] for index in part] for part in parts.values())
        return [piece for part in apart for piece in _separated(part, rest)]
    return _separated(planes, rest)


def _places(planes: _Planes) -> NDArray[np.int64]:
    """The number of the place of each plane, from the lowest along the normal up."""
    along = np.array([plane.position_mm for plane in planes]) @ _normal(planes[0])
    order = np.argsort(along, kind="stable")
    is_new = np.concatenate([[False], np.diff(along[order]) > _SAME_PLACE_MM])
    places = np.empty(len(planes), dtype=np.int64)
    places[order] = np.cumsum(is_new)
    return places


def _values(plane: PlaneRecord, keyword: str) -> tuple[str, ...]:
    return next((values for name, values in plane.facts if name == keyword), ())


def _normal(plane: PlaneRecord) -> NDArray[np.float64]:
    assert plane.orientation is not None
    cross = np.cross(plane.orientation[:3], plane.orientation[3:])
    return np.asarray(cross / np.linalg.norm(cross))


def _chosen(stacks: list[_Planes], rule: StackRule, problems: list[str]) -> _Planes:
    """The stack that the rule wants most; what is left out, and why, goes to `problems`."""
    fit = [planes for planes in stacks if _fits(planes, rule)]
    if not fit:
        largest = max(stacks, key=_slices)
        raise GeometryError(
            f"{len(stacks)} stack(s), the largest with {_slices(largest)} slice(s) and "
            f"{_lies(largest)}; the model card's stack section wants at least "
            f"{rule.minimum_slices} slice(s), orientation {rule.orientation}"
        )
    ranked = sorted(fit, key=lambda planes: (*_ranks(planes, rule), -_slices(planes)))
    kept = ranked[0]
    if len(stacks) > 1:
        left_out = sum(len(planes) for planes in stacks if planes is not kept)
        reason = _why(kept, stacks, fit, rule)
        problems.append(
            f"{_images(left_out)} of {len(stacks) - 1} other stack(s) left out; kept the one of "
            f"{len(kept)}: {reason}"
        )
    return kept


def _fits(planes: _Planes, rule: StackRule) -> bool:
    wanted = rule.orientation in (StackOrientation.ANY, _lies(planes))
    return wanted and _slices(planes) >= rule.minimum_slices


def _slices(planes: _Planes) -> int:
    return int(_places(planes).max()) + 1


def _lies(planes: _Planes) -> StackOrientation:
    return _AXES[int(np.argmax(np.abs(_normal(planes[0]))))]


def _ranks(planes: _Planes, rule: StackRule) -> tuple[float, ...]:
    return tuple(_rank(planes[0], wish) for wish in rule.prefer)


def _rank(plane: PlaneRecord, wish: Preference) -> float:
    """How far from the wish, 0 or the number itself; less is better."""
    values = _values(plane, wish.attribute)
    if wish.equals is not None:
        return 0.0 if any(_is_same(value, wish.equals) for value in values) else 1.0
    found = [_number(value) for value in values]
    usable = [value for value in found if value is not None]
    if not usable:
        return math.inf
    return min(usable) if wish.choose == "lowest" else -max(usable)


def _is_same(found: str, wanted: str) -> bool:
    numbers = _number(found), _number(wanted)
    return found == wanted if None in numbers else numbers[0] == numbers[1]


def _number(text: str) -> float | None:
    try:
        found = float(text)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def _why(kept: _Planes, stacks: list[_Planes], fit: list[_Planes], rule: StackRule) -> str:
    """What decided for the kept stack, in the words of the card."""
    rivals = [planes for planes in fit if planes is not kept]
    if not rivals:
        return f"the only one of orientation {rule.orientation}, {rule.minimum_slices} up"
    own = _ranks(kept, rule)
    for index, wish in enumerate(rule.prefer):
        if any(_ranks(planes, rule)[index] > own[index] for planes in rivals):
            return str(wish)
    others = max(_slices(planes) for planes in rivals)
    return "the most slices" if _slices(kept) > others else "the first of several like it"


def _projections(planes: _Planes, rule: StackRule | None) -> Stack:
    ordered = sorted(planes, key=lambda plane: (plane.series_instance_uid, *_order(plane)))
    if rule is not None and rule.minimum_slices > len(ordered):
        raise GeometryError(
            f"{_images(len(ordered))} without position; the model card's stack section wants at "
            f"least {rule.minimum_slices} slice(s)"
        )
    problems = []
    if len(ordered) > 1 and ordered[0].modality in ("CT", "MR", "PT"):
        problems.append("no positions: slices are in the order of InstanceNumber")
    spacings = {plane.pixel_spacing_mm for plane in ordered}
    if len(spacings) > 1:
        problems.append("images differ in PixelSpacing")
    spacing = ordered[0].pixel_spacing_mm if len(spacings) == 1 else None
    return Stack(tuple(ordered), Geometry(pixel_spacing_mm=spacing, problems=tuple(problems)))


def _every(planes: _Planes, stacks: list[_Planes]) -> Stack:
    """All stacks, one after the other, then what has no place."""
    used = {plane.key for part in stacks for plane in part}
    rest = [plane for plane in planes if plane.key not in used]
    parts = [_ordered(part, []) for part in stacks]
    if len(parts) == 1 and not rest:
        return parts[0]
    if rest:
        parts.append(_projections(rest, None))
    spacings = {part.geometry.pixel_spacing_mm for part in parts}
    problems = dict.fromkeys(problem for part in parts for problem in part.geometry.problems)
    return Stack(
        tuple(plane for part in parts for plane in part.planes),
        Geometry(
            pixel_spacing_mm=next(iter(spacings)) if len(spacings) == 1 else None,
            problems=tuple(problems),
        ),
    )


def _ordered(planes: _Planes, problems: list[str]) -> Stack:
    normal = _normal(planes[0])
    along = np.array([plane.position_mm for plane in planes]) @ normal
    order = sorted(range(len(planes)), key=lambda i: (along[i], _order(planes[i])))
    kept: list[int] = []
    for index in order:
        if not kept or along[index] - along[kept[-1]] > _SAME_PLACE_MM:
            kept.append(index)
        elif _order(planes[index]) < _order(planes[kept[-1]]):
            kept[-1] = index
    if len(kept) < len(planes):
        problems.append(
            f"{_images(len(planes) - len(kept))} at the position of another left out (the lowest "
            "InstanceNumber is kept)"
        )
    chosen = [planes[index] for index in kept]
    positions = along[kept]
    origins = np.array([plane.position_mm for plane in chosen])
    spacing = _spacing(positions, problems)
    _report_drift(origins, normal, problems)
    assert chosen[0].orientation is not None
    geometry = Geometry(
        pixel_spacing_mm=chosen[0].pixel_spacing_mm,
        orientation=chosen[0].orientation,
        positions_mm=tuple(positions.tolist()),
        origins_mm=tuple((x, y, z) for x, y, z in origins.tolist()),
        slice_spacing_mm=spacing,
        problems=tuple(problems),
    )
    return Stack(tuple(chosen), geometry)


def _spacing(positions: NDArray[np.float64], problems: list[str]) -> float | None:
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


def _report_drift(
    origins: NDArray[np.float64], normal: NDArray[np.float64], problems: list[str]
) -> None:
    offsets = origins - origins[0]
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
