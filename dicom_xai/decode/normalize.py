"""A volume becomes the model's input: each frame an image, slices with neighbours, or one grid.

Rule: training uses these functions too, so that a model is served what it was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from dicom_xai.config import InputKind, ModelInput, ResizeRule
from dicom_xai.decode.resample import volume_inputs
from dicom_xai.decode.window import shown
from dicom_xai.errors import ModelInputError
from dicom_xai.study import Frame, Geometry, Inputs, Placement, Volume

#: Frames that are windowed and resized together: enough for every core, and little memory.
_TOGETHER = 8


def model_inputs(
    volume: Volume, spec: ModelInput, give_way: Callable[[], None] = lambda: None
) -> Inputs:
    """All frames of a unit as the model wants them.

    Windowed as the card says, bright as the card says, resized with antialiasing, scaled. Padding,
    letterbox margins and what lies outside the source hold the lowest value. With neighbours a
    slice's channels are the slices around it in the stack, lowest first; beyond the ends of the
    stack its end slice is repeated.

    Parameters
    ----------
    volume : Volume
        In modality units.
    spec : ModelInput
        From the model card.
    give_way : callable
        Called after each batch of slices; what is more urgent may run in it.

    Returns
    -------
    Inputs
        Images in ``spec.scaling``, on the frames' device. With neighbours they are views of one
        stack: each slice is in memory once.

    Raises
    ------
    ModelInputError
        There are no frames; a volume3d input lacks positions or spacing; slices with neighbours
        differ in size.
    """
    if not volume.frames:
        raise ModelInputError(f"input {spec.name!r}: no frames")
    if spec.kind is InputKind.VOLUME3D:
        return volume_inputs(volume, spec, give_way)
    if spec.neighbours and len({frame.size for frame in volume.frames}) > 1:
        raise ModelInputError(
            f"input {spec.name!r}: slices of several sizes have no neighbours; one stack is wanted"
        )
    frames, around = volume.frames, spec.neighbours
    rows, columns = spec.size
    low, high = spec.scaling
    padded = torch.empty((len(frames) + 2 * around, rows, columns), device=frames[0].values.device)
    images = padded[around : around + len(frames)]
    placements = tuple(_placement(frame, (rows, columns), spec.resize) for frame in frames)
    for start, stop in _runs(frames):
        _fit(
            shown(frames[start:stop], spec.windowing, bright_is_high=_is_bright_high(spec)),
            placements[start],
            images[start:stop],
        )
        give_way()
    images.mul_(high - low).add_(low)
    padded[:around], padded[around + len(frames) :] = images[:1], images[-1:]
    return Inputs(
        images=padded.unfold(0, 2 * around + 1, 1).movedim(-1, 1),
        placements=placements,
        inside=torch.stack([_inside(placement, images.device) for placement in placements]),
        cell_ml=_cell_ml(placements[0], volume.geometry),
    )


def _is_bright_high(spec: ModelInput) -> bool:
    return spec.photometric == "MONOCHROME2"


def _runs(frames: Sequence[Frame]) -> list[tuple[int, int]]:
    """Neighbouring frames of one size, at most `_TOGETHER`, as start and stop."""
    runs: list[tuple[int, int]] = []
    for index, frame in enumerate(frames):
        start = runs[-1][0] if runs else 0
        if runs and index - start < _TOGETHER and frames[start].size == frame.size:
            runs[-1] = (start, index + 1)
        else:
            runs.append((index, index + 1))
    return runs


def _placement(frame: Frame, size: tuple[int, int], rule: ResizeRule) -> Placement:
    rows, columns = frame.size
    inner = size
    if rule is ResizeRule.LETTERBOX:
        scale = min(size[0] / rows, size[1] / columns)
        inner = (max(1, round(rows * scale)), max(1, round(columns * scale)))
    return Placement(
        source_size=(rows, columns),
        input_size=size,
        scale=(inner[0] / rows, inner[1] / columns),
        offset=(float((size[0] - inner[0]) // 2), float((size[1] - inner[1]) // 2)),
    )


def _box(placement: Placement) -> tuple[slice, slice]:
    """The rows and columns of the grid that the source covers."""
    sides = zip(placement.source_size, placement.scale, placement.offset, strict=True)
    rows, columns = (
        slice(int(offset), int(offset) + round(size * scale)) for size, scale, offset in sides
    )
    return rows, columns


def _fit(pictures: torch.Tensor, placement: Placement, out: torch.Tensor) -> None:
    """Resize ``(frames, rows, columns)`` 0..1 into `out`, margins 0."""
    rows, columns = _box(placement)
    inner = (rows.stop - rows.start, columns.stop - columns.start)
    if inner != placement.source_size:
        pictures = functional.interpolate(
            pictures[:, None], inner, mode="bilinear", antialias=True, align_corners=False
        )[:, 0]
    if inner != placement.input_size:
        out.zero_()
    out[:, rows, columns] = pictures


def _inside(placement: Placement, device: torch.device) -> torch.Tensor:
    inside = torch.zeros(placement.input_size, dtype=torch.bool, device=device)
    inside[_box(placement)] = True
    return inside


def _cell_ml(placement: Placement, geometry: Geometry) -> float | None:
    if geometry.pixel_spacing_mm is None or geometry.slice_spacing_mm is None:
        return None
    sides = [mm / s for mm, s in zip(geometry.pixel_spacing_mm, placement.scale, strict=True)]
    return sides[0] * sides[1] * geometry.slice_spacing_mm / 1000
