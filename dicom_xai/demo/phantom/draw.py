"""Soft shapes and smooth random fields: what the phantoms are painted with.

Coordinates are physical, so that a picture looks the same in any matrix. Arrays are float32 where
it matters for speed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.floating[Any]]

_GLYPHS = {
    "L": ("1....", "1....", "1....", "1....", "1....", "1....", "11111"),
    "R": ("1111.", "1...1", "1...1", "1111.", "1.1..", "1..1.", "1...1"),
}


def soft(distance: Image, width: float) -> Image:
    """0 where the distance is below ``-width``, 1 above ``width``, a smooth step between."""
    t = distance * np.float32(0.5 / width)
    t += np.float32(0.5)
    np.clip(t, 0, 1, out=t)
    out = t * t
    t *= -2
    t += 3
    out *= t
    return out


def smooth_field(rng: np.random.Generator, shape: tuple[int, int], cells: tuple[int, int]) -> Image:
    """A random field of unit variance that changes over ``1/cells`` of the picture.

    Parameters
    ----------
    shape : tuple of int
        Rows, columns of the field.
    cells : tuple of int
        How many random values lie along rows and columns.
    """
    grid = rng.standard_normal((cells[0] + 3, cells[1] + 3), dtype=np.float32)
    field = _spline(shape[0], cells[0]) @ grid @ _spline(shape[1], cells[1]).T
    return np.asarray(field * np.float32(2.0))


def _spline(count: int, cells: int) -> Image:
    """Cubic B-spline weights of `count` points over `cells` + 3 knots: ``(count, cells + 3)``."""
    at = (np.arange(count, dtype=np.float32) + 0.5) * (cells / count)
    base = np.minimum(at.astype(np.int64), cells - 1)
    f = at - base
    weights = np.stack(
        [(1 - f) ** 3, 3 * f**3 - 6 * f**2 + 4, -3 * f**3 + 3 * f**2 + 3 * f + 1, f**3], axis=1
    )
    out = np.zeros((count, cells + 3), dtype=np.float32)
    np.put_along_axis(out, base[:, None] + np.arange(4), (weights / 6).astype(np.float32), axis=1)
    return out


def enlarge(picture: Image, shape: tuple[int, int]) -> Image:
    """The picture on a finer grid, bilinear, the same field of view."""
    if picture.shape == shape:
        return picture
    for axis, count in enumerate(shape):
        size = picture.shape[axis]
        at = (np.arange(count, dtype=np.float32) + 0.5) * (size / count) - 0.5
        low = np.clip(np.floor(at).astype(np.int64), 0, size - 2)
        part = np.clip(at - low, 0, 1).astype(np.float32)
        part = part.reshape((-1, 1) if axis == 0 else (1, -1))
        first = np.take(picture, low, axis=axis)
        second = np.take(picture, low + 1, axis=axis)
        picture = first + (second - first) * part
    return picture


def letter(sign: str, height: int) -> NDArray[np.bool_]:
    """A block letter, `height` pixels high, as a mask."""
    rows = np.array([[cell == "1" for cell in row] for row in _GLYPHS[sign]])
    scale = max(1, height // 7)
    return np.kron(rows, np.ones((scale, scale), dtype=bool))
