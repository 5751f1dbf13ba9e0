"""A stack of slices becomes a regular grid in the patient, and says exactly where it lies.

Two steps, both linear in the values: slices are shrunk with antialiasing to about the grid's
spacing, then the grid is read off by trilinear interpolation. Each shrunk row, column and slice
stands where the values that it averages stand on average, so a ramp stays that ramp. Slices may be
oblique, tilted, unevenly spaced: every slice keeps its own origin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from dicom_xai.config import Align, Grid, ModelInput
from dicom_xai.decode.window import Ramp, common_ramp, shown_through
from dicom_xai.errors import ModelInputError
from dicom_xai.study import Frame, Geometry, Inputs, Volume, VolumePlacement

Vector = NDArray[np.float64]

#: Slices that are windowed and shrunk together.
_TOGETHER = 8
#: Patient directions in DICOM's coordinates: x to the left, y to the back, z up (PS3.3
#: C.7.6.2.1.1).
_DIRECTIONS = {
    "L": (1.0, 0.0, 0.0),
    "R": (-1.0, 0.0, 0.0),
    "P": (0.0, 1.0, 0.0),
    "A": (0.0, -1.0, 0.0),
    "S": (0.0, 0.0, 1.0),
    "I": (0.0, 0.0, -1.0),
}


def volume_inputs(volume: Volume, spec: ModelInput, give_way: Callable[[], None]) -> Inputs:
    """The one image of a volume3d model.

    Parameters
    ----------
    volume : Volume
        One stack, in modality units.
    spec : ModelInput
        With a grid.
    give_way : callable
        Called after each batch of slices.

    Returns
    -------
    Inputs
        Images ``(1, 1, *size)``.

    Raises
    ------
    ModelInputError
        Fewer than two slices with positions, or no PixelSpacing.
    """
    assert spec.grid is not None
    source = _Source.of(volume, spec)
    target = _Target.of(source, spec.grid, spec.size)
    low, high = spec.scaling
    ramp = common_ramp(volume.frames, spec.windowing)
    shrunk = _shrunk(
        volume.frames, source, target, ramp, spec.photometric == "MONOCHROME2", give_way
    )
    values, inside = _read_off(shrunk, source, target)
    values = torch.where(inside, values, 0.0)
    cell_mm3 = math.prod(spec.grid.spacing_mm)
    return Inputs(
        images=(values * (high - low) + low)[None, None],
        placements=placements_of(volume.geometry, source.size, target),
        inside=inside[None],
        cell_ml=cell_mm3 / 1000,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Source:
    """Where the slices lie, in mm: all that PS3.3 C.7.6.2.1.1's equation needs."""

    size: tuple[int, int]
    origins: Vector  #: (slices, 3)
    along: Vector  #: (slices,) distance along the normal
    row: Vector  #: direction in which columns grow
    column: Vector  #: direction in which rows grow
    spacing: tuple[float, float]  #: between rows, between columns

    @classmethod
    def of(cls, volume: Volume, spec: ModelInput) -> _Source:
        geometry, name = volume.geometry, f"input {spec.name!r}"
        if len(geometry.positions_mm) < 2:
            raise ModelInputError(
                f"{name}: {len(geometry.positions_mm)} slice(s) with a position; a volume3d model "
                "wants at least 2 (minimum_slices in the card's stack section)"
            )
        if geometry.pixel_spacing_mm is None:
            raise ModelInputError(f"{name}: PixelSpacing is missing; a volume3d model needs it")
        rows, columns = volume.frames[0].size
        return cls(
            size=(rows, columns),
            origins=np.array(geometry.origins_mm),
            along=np.array(geometry.positions_mm),
            row=np.array(geometry.orientation[:3]),
            column=np.array(geometry.orientation[3:]),
            spacing=geometry.pixel_spacing_mm,
        )

    @property
    def normal(self) -> Vector:
        cross = np.cross(self.row, self.column)
        return np.asarray(cross / np.linalg.norm(cross))

    @property
    def index_of(self) -> Vector:
        """Millimetres from a slice's origin to row and column: ``(2, 3)``.

        Inverts the equation with the direction cosines as they are written, rounding and all.
        """
        steps = [self.column * self.spacing[0], self.row * self.spacing[1], self.normal]
        return np.asarray(np.linalg.inv(np.stack(steps, axis=1))[:2])

    @property
    def step(self) -> float:
        return float(np.median(np.diff(self.along)))

    def extent(self, direction: Vector) -> tuple[float, float]:
        """From where to where the volume reaches along a direction, whole voxels."""
        row = self.row @ direction * self.spacing[1]
        column = self.column @ direction * self.spacing[0]
        across = [
            (c * row + r * column)
            for r in (-0.5, self.size[0] - 0.5)
            for c in (-0.5, self.size[1] - 0.5)
        ]
        ends = self.origins @ direction
        half = abs(float(self.normal @ direction)) * self.step / 2
        return float(ends.min() + min(across) - half), float(ends.max() + max(across) + half)


@dataclass(frozen=True, slots=True, eq=False)
class _Target:
    """The model's grid: cell ``(i, j, k)`` has its centre at `corner` + (index + 0.5) steps."""

    size: tuple[int, ...]
    directions: Vector  #: (3, 3), one row for each axis of the grid
    spacing: Vector  #: (3,) mm
    corner: Vector  #: (3,) mm

    @classmethod
    def of(cls, source: _Source, grid: Grid, size: tuple[int, ...]) -> _Target:
        if grid.orientation == "source":
            directions = np.stack([source.normal, source.column, source.row])
        else:
            directions = np.array([_DIRECTIONS[letter] for letter in grid.orientation])
        spacing = np.array(grid.spacing_mm)
        starts = []
        for direction, mm, cells, align in zip(directions, spacing, size, grid.align, strict=True):
            first, last = source.extent(direction)
            start = {
                Align.START: first,
                Align.CENTER: (first + last - mm * cells) / 2,
                Align.END: last - mm * cells,
            }[align]
            starts.append(start)
        # directions are orthonormal, so their transpose takes distances back to a place
        corner = np.linalg.solve(directions, np.array(starts))
        return cls(size, directions, spacing, corner)

    def step_along(self, direction: Vector) -> float:
        """How far apart the grid's planes are along a direction, of the axis nearest to it."""
        return float(np.max(np.abs(self.directions @ direction) * self.spacing))


def placements_of(
    geometry: Geometry, source_size: tuple[int, int], target: _Target
) -> tuple[VolumePlacement, ...]:
    """Where each slice lies on the grid: PS3.3 C.7.6.2.1.1's equation, then the grid's inverse."""
    assert geometry.pixel_spacing_mm is not None
    onto = target.directions / target.spacing[:, None]
    per_column = onto @ np.array(geometry.orientation[:3]) * geometry.pixel_spacing_mm[1]
    per_row = onto @ np.array(geometry.orientation[3:]) * geometry.pixel_spacing_mm[0]
    origins = (np.array(geometry.origins_mm) - target.corner) @ onto.T
    first, second, third = target.size
    return tuple(
        VolumePlacement(
            source_size=source_size,
            input_size=(first, second, third),
            origin=_three(origin),
            per_row=_three(per_row),
            per_column=_three(per_column),
        )
        for origin in origins
    )


def _three(vector: Vector) -> tuple[float, float, float]:
    first, second, third = vector.tolist()
    return first, second, third


@dataclass(frozen=True, slots=True, eq=False)
class _Shrunk:
    """Fewer slices, rows and columns, and where each is: `rows` and `columns` as source indices."""

    values: torch.Tensor  #: (slices, rows, columns) float32
    origins: Vector
    along: Vector
    rows: Vector
    columns: Vector


def _shrunk(
    frames: Sequence[Frame],
    source: _Source,
    target: _Target,
    ramp: Ramp,
    bright_is_high: bool,
    give_way: Callable[[], None],
) -> _Shrunk:
    """Window and shrink to about the grid's spacing; finer is never made coarser than it."""
    size = [
        max(1, math.ceil(count / max(1.0, target.step_along(direction) / mm)))
        for count, direction, mm in zip(
            source.size, (source.column, source.row), source.spacing, strict=True
        )
    ]
    planes = []
    for start in range(0, len(frames), _TOGETHER):
        part = frames[start : start + _TOGETHER]
        planes.append(_resized(shown_through(part, ramp, bright_is_high=bright_is_high), size))
        give_way()
    values = torch.cat(planes)
    weights = _slice_weights(source.along, target.step_along(source.normal))
    if weights.shape[0] < len(frames):
        mixing = torch.from_numpy(weights).to(values)
        values = torch.tensordot(mixing, values, dims=1)
    return _Shrunk(
        values=values,
        origins=weights @ source.origins,
        along=weights @ source.along,
        rows=_resized_index(source.size[0], size[0]),
        columns=_resized_index(source.size[1], size[1]),
    )


def _resized(pictures: torch.Tensor, size: list[int]) -> torch.Tensor:
    if list(pictures.shape[1:]) == size:
        return pictures
    return functional.interpolate(
        pictures[:, None], size, mode="bilinear", antialias=True, align_corners=False
    )[:, 0]


def _resized_index(count: int, fewer: int) -> Vector:
    """Where each of `fewer` rows is on average: the same filter over the rows' own numbers."""
    numbers = torch.arange(count, dtype=torch.float64)[None, None]
    return np.asarray(_resized(numbers, [1, fewer])[0, 0].numpy())


def _slice_weights(along: Vector, step: float) -> Vector:
    """Which slices make each of fewer slices: ``(fewer, slices)``, triangles that sum to 1."""
    fewer = max(2, math.ceil((along[-1] - along[0]) / step) + 1)
    if step <= float(np.median(np.diff(along))) or fewer >= len(along):
        return np.eye(len(along))
    centres, width = np.linspace(along[0], along[-1], fewer, retstep=True)
    near = np.clip(1 - np.abs(along[None, :] - centres[:, None]) / width, 0, None)
    total = near.sum(axis=1)
    # in a gap there is nothing to average: the slices on both sides are interpolated
    return np.asarray(near[total > 0] / total[total > 0, None])


def _read_off(
    shrunk: _Shrunk, source: _Source, target: _Target
) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid's values, and which of its cells have their centre in the source."""
    device = shrunk.values.device
    places = _centres(target, device)
    along = places @ _on(source.normal, device)
    slices = _fraction(along, _on(shrunk.along, device))
    origins = _on(shrunk.origins, device)
    low = slices.long().clamp_(max=max(0, len(origins) - 2))
    part = (slices - low)[..., None]
    high = (low + 1).clamp_(max=len(origins) - 1)
    offset = places - (origins[low] * (1 - part) + origins[high] * part)
    rows, columns = (offset @ _on(source.index_of, device).T).unbind(-1)
    half = source.step / 2
    inside = (along >= source.along[0] - half) & (along <= source.along[-1] + half)
    for index, count in ((rows, source.size[0]), (columns, source.size[1])):
        inside &= (index >= -0.5) & (index <= count - 0.5)
    at = [
        _fraction(columns, _on(shrunk.columns, device)),
        _fraction(rows, _on(shrunk.rows, device)),
        slices,
    ]
    counts = reversed(shrunk.values.shape)
    normal = torch.stack(
        [index * (2 / max(1, count - 1)) - 1 for index, count in zip(at, counts, strict=True)], -1
    )
    values = functional.grid_sample(
        shrunk.values[None, None],
        normal[None].to(shrunk.values.dtype),
        mode="bilinear",
        padding_mode="border",
        align_corners=True,
    )
    return values[0, 0], inside


def _on(array: Vector, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _centres(target: _Target, device: torch.device) -> torch.Tensor:
    """Patient coordinates of all cells, ``(*size, 3)`` float64 mm."""
    out = _on(target.corner, device)
    for axis, (count, direction, mm) in enumerate(
        zip(target.size, target.directions, target.spacing, strict=True)
    ):
        index = torch.arange(count, dtype=torch.float64, device=device) + 0.5
        shape = [count if axis == other else 1 for other in range(3)]
        out = out + index.reshape(*shape, 1) * _on(direction * mm, device)
    return out


def _fraction(at: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Where values lie in an ascending table, as a fractional index within its ends."""
    if len(table) == 1:
        return torch.zeros_like(at)
    low = torch.searchsorted(table, at.contiguous(), right=True).sub_(1).clamp_(0, len(table) - 2)
    first = table[low]
    return (low + (at - first) / (table[low + 1] - first)).clamp_(0, len(table) - 1)
