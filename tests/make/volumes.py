"""Stacks of slices anywhere in the patient, and interpolation written out as its definition."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from dicom_xai.config import StackRule
from dicom_xai.decode.geometry import attach, stack
from dicom_xai.decode.planes import planes_of
from dicom_xai.study import Frame, Volume
from tests.make.images import a_slice

Array = NDArray[np.float64]


def turned(x: float, y: float, z: float) -> Array:
    """A rotation by three angles, in radians."""

    def about(axis: int, angle: float) -> Array:
        i, j = [other for other in range(3) if other != axis]
        out = np.eye(3)
        out[i, i] = out[j, j] = math.cos(angle)
        out[i, j], out[j, i] = -math.sin(angle), math.sin(angle)
        return out

    return about(0, x) @ about(1, y) @ about(2, z)


def a_stack(
    paint: Callable[[Array], Array],
    *,
    turn: Array,
    heights: Sequence[float],
    shape: tuple[int, int] = (20, 16),
    spacing: tuple[float, float] = (1.0, 1.25),
    first: tuple[float, float, float] = (-10.0, 5.0, 7.0),
    tilt: float = 0.0,
) -> Volume:
    """Slices painted by a function of patient coordinates, sorted as the pipeline sorts them.

    Parameters
    ----------
    paint : callable
        Places ``(..., 3)`` mm to values.
    turn : ndarray, (3, 3)
        Its columns are the directions of rows, of columns and of the normal.
    heights : sequence of float
        Of the slices along the normal, in any order, mm.
    tilt : float
        How far slices shift along their columns for each mm of height.
    """
    frames = []
    for number, height in enumerate(heights):
        origin = np.array(first) + turn[:, 2] * height + turn[:, 1] * tilt * height
        rows = np.arange(shape[0])[:, None, None] * turn[:, 1] * spacing[0]
        columns = np.arange(shape[1])[None, :, None] * turn[:, 0] * spacing[1]
        frames.append(
            a_painted_slice(paint(origin + rows + columns), number, origin, turn, spacing)
        )
    planes = [plane for frame in frames for plane in planes_of(frame.instance, frame.header)]
    return attach(stack(planes, StackRule()), frames)


def a_painted_slice(
    values: Array, number: int, origin: Array, turn: Array, spacing: tuple[float, float]
) -> Frame:
    """A slice with these values at that place."""
    rows, columns = values.shape
    frame = a_slice(
        0.0,
        number=number,
        shape=(rows, columns),
        ImagePositionPatient=[f"{value:.9f}" for value in origin],
        ImageOrientationPatient=[f"{value:.9f}" for value in (*turn[:, 0], *turn[:, 1])],
        PixelSpacing=list(spacing),
    )
    made = torch.from_numpy(values.astype(np.float32))
    return replace(frame, size=(made.shape[0], made.shape[1]), make_values=lambda: made)


def trilinear(values: Array, at: Array) -> Array:
    """Values at fractional indices ``(..., 3)``, ends held: eight corners and their weights."""
    last = np.array(values.shape) - 1
    at = np.clip(at, 0, last)
    low = np.minimum(np.floor(at).astype(int), np.maximum(last - 1, 0))
    part = at - low
    out = np.zeros(at.shape[:-1])
    for corner in itertools.product((0, 1), repeat=3):
        weight = np.prod(np.where(corner, part, 1 - part), axis=-1)
        index = np.minimum(low + corner, last)
        out += weight * values[tuple(np.moveaxis(index, -1, 0))]
    return out
