"""From the model's grid back onto the source's pixels, exactly and for many frames at once.

Maps and probabilities alike. Interpolation is bilinear, on volumes trilinear; it never exceeds the
map's own values, and is zero where the source lies outside the grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from dicom_xai.errors import InvariantError
from dicom_xai.study import Placement, Placements, VolumePlacement

#: Frames that are read off an oblique grid together.
_TOGETHER = 8
#: Frames whose amounts are found together, and how finely.
_AMOUNTS_TOGETHER = 64
_AMOUNT_PIXELS = 64
#: An axis of the grid that moves less than this part of a cell over a whole frame stands still.
_STILL_CELLS = 1e-3


def to_source(values: torch.Tensor, placements: Placements, frames: Sequence[int]) -> torch.Tensor:
    """Some frames of a map at the source's resolution.

    Parameters
    ----------
    values : Tensor, (frames, map rows, map columns) or (*map grid) float32
        Covers the whole input grid; the latter where placements are of a volume.
    placements : tuple of Placement or of VolumePlacement
        One for each source frame.
    frames : sequence of int
        Which of them, at least one; their sources have one size.

    Returns
    -------
    Tensor, (frames, source rows, source columns) float32
        Zero where the source lies outside the input grid.
    """
    chosen = [placements[index] for index in frames]
    if len({placement.source_size for placement in chosen}) != 1:
        raise InvariantError("frames of several sizes are mapped one by one")
    flat = [each for each in chosen if isinstance(each, Placement)]
    if flat:
        return _flat_to_source(values[list(frames)], flat)
    solid = [each for each in chosen if isinstance(each, VolumePlacement)]
    if _axes(solid[0]) is not None:
        return _aligned_to_source(values, solid)
    parts = [solid[start : start + _TOGETHER] for start in range(0, len(solid), _TOGETHER)]
    return torch.cat([_oblique_to_source(values, part) for part in parts])


def frame_peaks(values: torch.Tensor, placements: Placements) -> tuple[float, ...]:
    """What each frame of `to_source` does not exceed, without computing it.

    For two-dimensional maps the maximum of the frame's own; for volumes that of the cells between
    which the frame lies.
    """
    solid = [each for each in placements if isinstance(each, VolumePlacement)]
    if not solid:
        return _floats(values.amax(dim=(1, 2)))
    axes = _axes(solid[0])
    if axes is None:
        return _oblique_peaks(values, solid)
    across = next(axis for axis in range(3) if axis not in axes)
    between = _slabs(values, solid, across)
    return _floats(between.amax(dim=(1, 2)).clamp(min=0))


def frame_amounts(values: torch.Tensor, placements: Placements) -> tuple[float, ...]:
    """How much each frame shows: the mean of its positive values, looked at every few pixels."""
    coarse: Placements = tuple(_coarser(placement) for placement in placements)  # type: ignore[assignment]
    amounts: list[float] = []
    for start in range(0, len(coarse), _AMOUNTS_TOGETHER):
        part = range(start, min(start + _AMOUNTS_TOGETHER, len(coarse)))
        if len({coarse[index].source_size for index in part}) == 1:
            found = [to_source(values, coarse, part)]
        else:
            found = [to_source(values, coarse, [index]) for index in part]
        for each in found:
            amounts += _floats(each.clamp(min=0).mean(dim=(1, 2)))
    return tuple(amounts)


def _coarser(placement: Placement | VolumePlacement) -> Placement | VolumePlacement:
    """The same frame in at most `_AMOUNT_PIXELS` rows and columns, each pixel several wide."""
    rows, columns = (max(1, count // _AMOUNT_PIXELS) for count in placement.source_size)
    size = (placement.source_size[0] // rows, placement.source_size[1] // columns)
    if isinstance(placement, Placement):
        scale = (placement.scale[0] * rows, placement.scale[1] * columns)
        return replace(placement, source_size=size, scale=scale)
    per_row, per_column = np.array(placement.per_row), np.array(placement.per_column)
    origin = np.array(placement.origin) + per_row * (rows - 1) / 2 + per_column * (columns - 1) / 2
    return VolumePlacement(
        source_size=size,
        input_size=placement.input_size,
        origin=_three(origin),
        per_row=_three(per_row * rows),
        per_column=_three(per_column * columns),
    )


def _three(vector: NDArray[np.float64]) -> tuple[float, float, float]:
    first, second, third = vector.tolist()
    return first, second, third


def _floats(values: torch.Tensor) -> tuple[float, ...]:
    return tuple(float(value) for value in values.tolist())


def _flat_to_source(values: torch.Tensor, placements: Sequence[Placement]) -> torch.Tensor:
    rows, columns = (
        torch.stack([_of(placement, axis, values) for placement in dict.fromkeys(placements)])
        for axis in (0, 1)
    )
    if rows.shape[0] > 1:
        numbers = {placement: n for n, placement in enumerate(dict.fromkeys(placements))}
        each = [numbers[placement] for placement in placements]
        rows, columns = rows[each], columns[each]
    out: torch.Tensor = rows @ values @ columns.transpose(1, 2)
    return out


def _of(placement: Placement, axis: int, values: torch.Tensor) -> torch.Tensor:
    centres = torch.arange(placement.source_size[axis], dtype=torch.float64) + 0.5
    centres = centres * placement.scale[axis] + placement.offset[axis]
    cells = values.shape[1 + axis]
    return _weights(centres.to(values.device), placement.input_size[axis], cells).to(values.dtype)


def _weights(centres: torch.Tensor, grid: int, cells: int) -> torch.Tensor:
    """Interpolation along one axis, as a matrix ``(centres, cells)``: the operation is separable.

    Centres are places on the input grid, ``grid`` its size, ``cells`` how many the map has on it.
    """
    is_inside = (centres >= 0) & (centres <= grid)
    at = (centres * (cells / grid) - 0.5).clamp(0, cells - 1)
    nearness = 1 - (at[..., None] - torch.arange(cells, device=centres.device)).abs()
    return nearness.clamp(min=0) * is_inside[..., None]


def _axes(placement: VolumePlacement) -> tuple[int, int] | None:
    """The grid's axes along which rows and columns run; None when the grid lies obliquely."""
    steps = np.abs([placement.per_row, placement.per_column])
    steps *= np.array(placement.source_size)[:, None]
    axes = steps.argmax(axis=1)
    rest = steps.copy()
    rest[[0, 1], axes] = 0
    if axes[0] == axes[1] or rest.max() > _STILL_CELLS:
        return None
    return int(axes[0]), int(axes[1])


def _slabs(
    values: torch.Tensor, placements: Sequence[VolumePlacement], across: int
) -> torch.Tensor:
    """The map interpolated to each frame's place on the axis across: ``(frames, *other axes)``."""
    at = torch.tensor([placement.origin[across] for placement in placements], dtype=torch.float64)
    size = placements[0].input_size[across]
    weights = _weights(at.to(values.device), size, values.shape[across]).to(values.dtype)
    slabs: torch.Tensor = torch.tensordot(weights, values.movedim(across, 0), dims=1)
    return slabs


def _aligned_to_source(values: torch.Tensor, placements: Sequence[VolumePlacement]) -> torch.Tensor:
    axes = _axes(placements[0])
    assert axes is not None
    across = next(axis for axis in range(3) if axis not in axes)
    slabs = _slabs(values, placements, across)
    if axes[0] > axes[1]:
        slabs = slabs.transpose(1, 2)
    rows, columns = (_along(placements, axis, side, values) for side, axis in enumerate(axes))
    out: torch.Tensor = rows @ slabs @ columns.transpose(1, 2)
    return out


def _along(
    placements: Sequence[VolumePlacement], axis: int, side: int, values: torch.Tensor
) -> torch.Tensor:
    """Weights of each frame's rows or columns, ``(frames or 1, pixels, cells)``."""
    first = placements[0]
    step = (first.per_row, first.per_column)[side][axis]
    starts = [placement.origin[axis] for placement in placements]
    if max(starts) - min(starts) <= _STILL_CELLS:
        starts = starts[:1]
    pixels = torch.arange(first.source_size[side], dtype=torch.float64) * step
    centres = torch.tensor(starts, dtype=torch.float64)[:, None] + pixels
    weights = _weights(centres.to(values.device), first.input_size[axis], values.shape[axis])
    return weights.to(values.dtype)


def _oblique_to_source(values: torch.Tensor, placements: Sequence[VolumePlacement]) -> torch.Tensor:
    rows, columns = placements[0].source_size
    size = np.array(placements[0].input_size)

    def normal(places: NDArray[np.float64]) -> torch.Tensor:
        """As grid_sample counts: last axis first, -1 and 1 at the borders of the grid."""
        return torch.from_numpy((places * (2 / size))[..., ::-1].copy()).to(values)

    origins = normal(np.array([placement.origin for placement in placements]) - size / 2)
    plane = (
        normal(np.multiply.outer(np.arange(rows), placements[0].per_row))[:, None]
        + normal(np.multiply.outer(np.arange(columns), placements[0].per_column))[None]
    )
    places = origins[:, None, None] + plane
    found = functional.grid_sample(
        values[None, None],
        places[None],
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )[0, 0]
    return found.mul_(places.abs_().amax(dim=-1) <= 1)


def _oblique_peaks(
    values: torch.Tensor, placements: Sequence[VolumePlacement]
) -> tuple[float, ...]:
    """Every cell that an interpolated pixel can touch is a neighbour of one that is looked at."""
    first = placements[0]
    cells = np.array(values.shape) / np.array(first.input_size)
    picks = []
    for count, step in zip(first.source_size, (first.per_row, first.per_column), strict=True):
        stride = max(1, math.floor(0.5 / float(np.abs(np.array(step) * cells).max())))
        picks.append(np.unique(np.append(np.arange(0, count, stride), count - 1)))
    rows = np.multiply.outer(picks[0], first.per_row)[:, None]
    plane = (rows + np.multiply.outer(picks[1], first.per_column)).reshape(-1, 3)
    around = functional.max_pool3d(values[None, None], 3, stride=1, padding=1)[0, 0].cpu().numpy()
    reach = np.array(values.shape)
    peaks = []
    for placement in placements:
        index = np.rint((plane + placement.origin) * cells - 0.5).astype(np.int64)
        near = index[((index >= -1) & (index <= reach)).all(axis=1)].clip(0, reach - 1)
        peaks.append(max(0.0, float(around[tuple(near.T)].max())) if len(near) else 0.0)
    return tuple(peaks)
