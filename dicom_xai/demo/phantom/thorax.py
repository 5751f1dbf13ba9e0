"""What a chest radiograph shows: anatomy, findings, and what misleads.

What is painted is attenuation in the unit "whole body, soft tissue"; lengths are centimetres, x to
the right of the picture (the patient's left), y down, the origin between the lungs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dicom_xai.demo.phantom.draw import Image, enlarge, letter, smooth_field, soft

#: The classes, in the order of the bundled model's outputs.
CHEST_FINDINGS = ("nodule", "consolidation", "pneumothorax")

#: Anatomy is painted on a grid of at most so many pixels a side; noise on the final one.
_PAINT_PIXELS = 768


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """One view, all arrays ``(rows, columns)``."""

    attenuation: Image  #: with noise
    truth: dict[str, NDArray[np.bool_]]  #: where each finding lies
    shutter: NDArray[np.bool_] | None  #: where the collimator blackened it


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    """One lung. All arrays are ``(rows, columns)``; `inside_cm` is the distance to its border."""

    u: Image  #: centimetres from the midline, lateral positive
    wall: Image  #: the chest wall's u at each pixel
    inside_cm: Image
    lung: Image


def paint(
    rng: np.random.Generator,
    findings: frozenset[str],
    field: tuple[float, float],
    matrix: tuple[int, int],
    view: str,
) -> Picture:
    """One view of a chest.

    Parameters
    ----------
    rng : numpy.random.Generator
        Decides everything that is not given.
    findings : frozenset of str
        Out of `CHEST_FINDINGS`; what is not in it is not there.
    field : tuple of float
        Height and width of the detector, cm.
    matrix : tuple of int
        Rows and columns of the picture.
    view : str
        PA or AP, which magnifies the heart.
    """
    shrink = min(1.0, _PAINT_PIXELS / max(matrix))
    shape = (round(matrix[0] * shrink), round(matrix[1] * shrink))
    x, y = _coordinates(rng, shape, field)
    apex, base, width = (
        float(-13 + rng.uniform(-1, 1)),
        float(9 + rng.uniform(-1.5, 1.5)),
        float(13 + rng.uniform(-1, 1)),
    )
    domes = (base - rng.uniform(0.5, 2.0), base)  # the right dome stands higher
    sides = [
        _side(sign * x, y, apex, dome, width) for sign, dome in zip((-1, 1), domes, strict=True)
    ]
    lungs = np.maximum(sides[0].lung, sides[1].lung)
    heart = _heart(rng, x, y, 1.15 if view == "AP" else 1.0)
    truth = {name: np.zeros(shape, dtype=bool) for name in CHEST_FINDINGS}

    body = _body(x, y, width)
    vessels = _vessels(rng, x, y, shape)
    aerated = np.ones(shape, dtype=np.float32)
    picture = body * np.float32(0.95)
    if "pneumothorax" in findings:
        collapse, line, truth["pneumothorax"] = _pneumothorax(
            rng, sides[rng.integers(2)], y, apex, dome=base
        )
        picture += line - np.float32(rng.uniform(0.09, 0.15)) * collapse
        aerated -= collapse
    depth = np.float32(0.75) + np.float32(0.25) * soft(
        np.maximum(sides[0].inside_cm, sides[1].inside_cm) - 1.5, 2.0
    )
    picture -= np.float32(rng.uniform(0.5, 0.6)) * lungs * depth
    picture += lungs * vessels * aerated * (1 - np.float32(0.7) * heart)
    picture += heart * lungs * np.float32(rng.uniform(0.38, 0.48))
    picture += _abdomen(rng, x, y, sides, body)
    picture += _bones(rng, x, y, sides, shape, apex)
    open_lung = (lungs > 0.98) & (heart < 0.02)
    free = open_lung & (np.maximum(sides[0].inside_cm, sides[1].inside_cm) > 1.3)
    free &= ~truth["pneumothorax"]
    if "consolidation" in findings:
        patch, truth["consolidation"] = _consolidation(rng, x, y, shape, free, lungs * (1 - heart))
        picture += patch
        free &= ~truth["consolidation"]
    if "nodule" in findings:
        bump, truth["nodule"] = _nodules(rng, x, y, free if free.any() else open_lung)
        picture += bump
    picture += _confounders(rng, x, y, sides, lungs, body)

    picture = enlarge(picture, matrix)
    noise = rng.standard_normal(matrix, dtype=np.float32)
    noise *= np.float32(rng.uniform(0.004, 0.02) * (max(matrix) / 1024) ** 0.5)
    picture += noise * (np.float32(0.5) + picture)
    _mark(rng, picture)
    truth = {
        name: mask if mask.shape == matrix else enlarge(mask.astype(np.float32), matrix) > 0.5
        for name, mask in truth.items()
    }
    return Picture(picture, truth, _shutter(rng, matrix, truth))


def _coordinates(
    rng: np.random.Generator, shape: tuple[int, int], field: tuple[float, float]
) -> tuple[Image, Image]:
    """Patient centimetres of every pixel: shifted, turned, scaled to the patient's size."""
    fits = min(field[0] / 36.0, field[1] / 34.0)
    size = rng.uniform(0.88, 1.08) * min(1.12, fits)
    angle = math.radians(rng.normal(0, 2.5))
    shift = (rng.normal(0, 0.6), rng.normal(0, 0.6))
    rows = (np.arange(shape[0], dtype=np.float32) + 0.5) / shape[0] - 0.5
    columns = (np.arange(shape[1], dtype=np.float32) + 0.5) / shape[1] - 0.5
    down = (rows * field[0] - 1.0 - shift[0])[:, None] / size
    right = (columns * field[1] - shift[1])[None, :] / size
    x = right * math.cos(angle) + down * math.sin(angle)
    y = down * math.cos(angle) - right * math.sin(angle)
    return x.astype(np.float32), y.astype(np.float32)


def _body(x: Image, y: Image, width: float) -> Image:
    """The trunk with shoulders and neck, thinner towards its edge."""
    shoulder = soft(y + 16.5 - 0.34 * np.clip(np.abs(x) - 4.5, 0, None), 1.3)
    half = np.float32(width + 3.2) + 4.5 * soft(-y - 7, 4.0)
    trunk = soft(half - np.abs(x), 1.4) * shoulder
    neck = soft(5.5 - np.abs(x), 1.2) * soft(-y - 12, 2.0)
    return np.maximum(trunk, neck * np.float32(0.9))


def _side(u: Image, y: Image, apex: float, dome: float, width: float) -> _Side:
    t = (y - apex) / (9 - apex)
    wall = width * _arch(t) - np.float32(5) * (t < 0)
    floor = dome + 0.065 * (u - 5.0) ** 2
    inner = 1.9 + 0.8 * t
    inside = np.minimum(np.minimum(wall - u, u - inner), np.minimum(floor - y, y - apex))
    inside = inside.astype(np.float32)
    return _Side(u, wall.astype(np.float32), inside, soft(inside - 0.15, 0.3))


def _arch(t: Image) -> Image:
    """The chest wall's half width from apex (0) to base (1), as a part of the widest."""
    bend = np.clip((0.7 - t) / 0.7, 0, 1.05)
    return np.asarray(np.sqrt(np.clip(1 - bend**1.7, 0, 1)))


def _heart(rng: np.random.Generator, x: Image, y: Image, magnified: float) -> Image:
    cx, cy = 2.3 + rng.uniform(-0.4, 0.6), 4.2 + rng.uniform(-0.6, 0.6)
    a, b = magnified * rng.uniform(6.0, 7.4), magnified * rng.uniform(4.4, 5.2)
    angle = math.radians(rng.uniform(20, 40))
    along = (x - cx) * math.cos(angle) + (y - cy) * math.sin(angle)
    across = (y - cy) * math.cos(angle) - (x - cx) * math.sin(angle)
    ventricle = soft(1 - np.hypot(along / a, across / b), 0.06)
    knob = soft(1 - np.hypot(x - rng.uniform(2.2, 2.9), y + 5.5) / rng.uniform(1.3, 1.9), 0.12)
    return np.maximum(ventricle, knob)


def _vessels(rng: np.random.Generator, x: Image, y: Image, shape: tuple[int, int]) -> Image:
    """Zero crossings of a smooth field look like branching vessels; they fade from the hila."""
    from_hilum = np.hypot(np.abs(x) - 3.2, y - 0.5)
    fine = smooth_field(rng, shape, (26, 22))
    fade = np.exp(-from_hilum / 5.5)
    ridges = np.exp(-((fine / 0.22) ** 2)) * (np.float32(0.02) + np.float32(0.13) * fade)
    hilum = np.float32(rng.uniform(0.07, 0.13)) * soft(1 - from_hilum / 2.6, 0.35)
    haze = smooth_field(rng, shape, (7, 6)) * np.float32(0.015)
    return np.asarray(ridges + hilum + haze)


def _abdomen(
    rng: np.random.Generator, x: Image, y: Image, sides: list[_Side], body: Image
) -> Image:
    below = soft(y - 8.5, 2.5) * (1 - np.maximum(sides[0].lung, sides[1].lung)) * body
    out = below * np.float32(0.14)
    if rng.random() < 0.6:
        bubble = np.hypot((x - rng.uniform(5, 8)) / rng.uniform(1.5, 3), (y - 12.5) / 1.2)
        out -= np.float32(0.18) * soft(1 - bubble, 0.12) * soft(y - 10.8, 0.2)
    return np.asarray(out)


def _bones(
    rng: np.random.Generator,
    x: Image,
    y: Image,
    sides: list[_Side],
    shape: tuple[int, int],
    apex: float,
) -> Image:
    """Ribs are one pattern, periodic along the trunk; spine, clavicles and scapulae are added."""
    out = np.zeros(shape, dtype=np.float32)
    warp = smooth_field(rng, shape, (4, 4)) * np.float32(0.05)
    step, strength = rng.uniform(2.3, 2.7), rng.uniform(0.06, 0.1)
    for side in sides:
        u = side.u
        cage = soft(side.wall + 0.5 - u, 0.4) * soft(u - 0.8, 0.6)
        cage *= soft(y - apex - 0.3, 0.6) * soft(12 - y, 2.0)
        # posterior ribs fall outwards, anterior ones fall inwards and are fainter
        back = (y + 0.9 - 0.35 * u - 0.012 * u * u) / step + warp
        front = (y + 0.55 * u - 0.3) / (step * 1.25) - warp
        out += np.float32(strength) * cage * _rib(back, 0.2)
        out += np.float32(0.4 * strength) * cage * soft(u - 3.5, 1.5) * _rib(front, 0.24)
        bar = y - (apex + 2.2 - 0.18 * u + 0.5 * np.sin(u * 0.55))
        clavicle = soft(0.55 - np.abs(bar), 0.12) * soft(u - 1.2, 0.3) * soft(13.5 - u, 0.6)
        out += np.float32(1.2 * strength) * clavicle
        blade = soft(u - (11.2 - 0.25 * (y + 6)), 0.15) * soft(y + 12, 1.0) * soft(-y, 2.0)
        out += np.float32(0.5 * strength) * blade * soft(17 - u, 1.0)
    disc = np.abs(np.mod(y / 2.6, 1) - 0.5)
    column = soft(1.7 - np.abs(x), 0.25)
    out += np.float32(0.1) * column * (np.float32(0.6) + np.float32(0.4) * soft(0.4 - disc, 0.06))
    trachea = soft(0.8 - np.abs(x + 0.2), 0.25) * soft(-3.5 - y, 0.8) * soft(y + 17, 1.0)
    return np.asarray(out - np.float32(0.14) * trachea)


def _rib(phase: Image, half: float) -> Image:
    """A flat bone with dense edges, once in each unit of phase."""
    off = np.abs(np.mod(phase, 1) - 0.5)
    plate = soft((half - off).astype(np.float32), 0.035)
    edge = np.exp(-(((off - half * 0.85) / 0.04) ** 2))
    return np.asarray(np.float32(0.75) * plate + np.float32(0.45) * edge)


def _pneumothorax(
    rng: np.random.Generator, side: _Side, y: Image, apex: float, dome: float
) -> tuple[Image, Image, NDArray[np.bool_]]:
    """Air between wall and collapsed lung: no vessels, darker, and a thin pleural line."""
    depth = rng.uniform(1.8, 4.5)
    reach = rng.uniform(0.35, 0.75)
    t = (y - apex) / (dome - apex)
    shift = depth * 0.9
    pleura = side.wall.max() * _arch((y - shift - apex) / (9 - apex))
    pleura -= depth * soft((reach - t).astype(np.float32), 0.25)
    pleura -= np.where(y < apex + shift, 20, 0)
    gap = (side.u - pleura).astype(np.float32)
    inside = side.lung * soft((reach + 0.1 - t).astype(np.float32), 0.06)
    collapse = soft(gap, 0.08) * inside
    ridge = np.exp(-((gap / 0.1) ** 2)) * inside * soft(side.inside_cm - 0.5, 0.2)
    line = np.float32(rng.uniform(0.1, 0.18)) * ridge
    return collapse, line.astype(np.float32), collapse > 0.5


def _consolidation(
    rng: np.random.Generator,
    x: Image,
    y: Image,
    shape: tuple[int, int],
    free: NDArray[np.bool_],
    room: Image,
) -> tuple[Image, NDArray[np.bool_]]:
    """A fluffy patch that stays inside the lung, with a few open airways in it."""
    cx, cy = _somewhere(rng, x, y, free)
    a, b = rng.uniform(2.6, 4.6), rng.uniform(2.6, 4.6)
    angle = rng.uniform(0, np.pi)
    along = (x - cx) * math.cos(angle) + (y - cy) * math.sin(angle)
    across = (y - cy) * math.cos(angle) - (x - cx) * math.sin(angle)
    edge = 1 - np.hypot(along / a, across / b) + smooth_field(rng, shape, (16, 14)) * 0.18
    patch = soft(edge.astype(np.float32), 0.25) * room
    airways = np.exp(-((smooth_field(rng, shape, (14, 12)) / 0.1) ** 2)) * np.float32(0.35)
    return np.float32(rng.uniform(0.2, 0.36)) * patch * (1 - airways), patch > 0.5


def _nodules(
    rng: np.random.Generator, x: Image, y: Image, free: NDArray[np.bool_]
) -> tuple[Image, NDArray[np.bool_]]:
    """One or two balls of 2 to 4 cm, slightly lobed."""
    out = np.zeros(x.shape, dtype=np.float32)
    mask = np.zeros(x.shape, dtype=bool)
    for _ in range(1 + (rng.random() < 0.25)):
        cx, cy = _somewhere(rng, x, y, free)
        radius = rng.uniform(1.0, 2.0)
        angle = np.arctan2(y - cy, x - cx)
        lobes = 1 + 0.07 * np.sin(rng.integers(2, 5) * angle + rng.uniform(0, 6))
        r = (np.hypot(x - cx, y - cy) / (radius * lobes)).astype(np.float32)
        ball = np.sqrt(np.clip(1 - r * r, 0, 1)) * np.float32(0.6) + soft(1 - r, 0.08) * 0.4
        out = np.maximum(out, np.float32(rng.uniform(0.22, 0.36)) * ball)
        mask |= r < 1
    return out.astype(np.float32), mask


def _somewhere(
    rng: np.random.Generator, x: Image, y: Image, free: NDArray[np.bool_]
) -> tuple[float, float]:
    places = np.flatnonzero(free)
    index = places[rng.integers(len(places))]
    return float(x.flat[index]), float(y.flat[index])


def _confounders(
    rng: np.random.Generator,
    x: Image,
    y: Image,
    sides: list[_Side],
    lungs: Image,
    body: Image,
) -> Image:
    """Vessels end on, granulomas, nipple shadows, skin folds, electrodes with leads."""
    out = np.zeros(x.shape, dtype=np.float32)
    free = lungs > 0.98
    for _ in range(rng.integers(2, 7)):  # far smaller than any nodule
        cx, cy = _somewhere(rng, x, y, free)
        r = np.hypot(x - cx, y - cy) / rng.uniform(0.15, 0.28)
        out += np.float32(rng.uniform(0.06, 0.15)) * soft((1 - r).astype(np.float32), 0.3)
    if rng.random() < 0.15:
        cx, cy = _somewhere(rng, x, y, free)
        r = np.hypot(x - cx, y - cy) / rng.uniform(0.2, 0.3)
        out += np.float32(0.5) * soft((1 - r).astype(np.float32), 0.2)
    if rng.random() < 0.2:  # a pair, at its place, faint and flat
        cx, cy = rng.uniform(7.5, 9), rng.uniform(4.5, 6.5)
        r = np.hypot(np.abs(x) - cx, y - cy) / 0.5
        out += np.float32(0.06) * soft((1 - r).astype(np.float32), 0.15)
    if rng.random() < 0.25:  # a step that crosses the lung, with vessels on both sides
        side = sides[rng.integers(2)]
        edge = side.u - rng.uniform(7, 10) - rng.uniform(-0.2, 0.2) * y - 0.03 * y * y
        fold = np.exp(-np.clip(edge, 0, None) / 0.8) * (edge > 0)
        out += np.float32(0.06) * fold.astype(np.float32) * soft(y + 9, 3.0) * body
    if rng.random() < 0.25:
        for cx, cy in ((-8, -9), (8.5, -9), (9.5, 6)):
            cx, cy = cx + rng.normal(0, 1), cy + rng.normal(0, 1)
            r = np.hypot(x - cx, y - cy).astype(np.float32)
            out += np.float32(0.6) * soft(0.45 - r, 0.05)
            lead = np.abs(x - cx - 0.8 * np.sin(0.3 * (y - cy))).astype(np.float32)
            out += np.float32(0.35) * soft(0.1 - lead, 0.06) * (y > cy)
    return out


def _mark(rng: np.random.Generator, picture: Image) -> None:
    """A lead letter: R at the picture's left or L at its right, in place."""
    sign = str(rng.choice(["L", "R"]))
    rows, columns = picture.shape
    glyph = letter(sign, max(7, rows // 28))
    top = int(rows * rng.uniform(0.03, 0.12))
    left = int(columns * (rng.uniform(0.03, 0.08) if sign == "R" else rng.uniform(0.88, 0.93)))
    left = min(left, columns - glyph.shape[1])
    place = picture[top : top + glyph.shape[0], left : left + glyph.shape[1]]
    place[glyph] = np.float32(rng.uniform(1.2, 1.35))


def _shutter(
    rng: np.random.Generator, matrix: tuple[int, int], truth: dict[str, NDArray[np.bool_]]
) -> NDArray[np.bool_] | None:
    """A blackened collimation border, never over a lesion."""
    if rng.random() > 0.35:
        return None
    rows, columns = matrix
    margins = rng.uniform(0.005, 0.05, 4)
    mask = np.ones(matrix, dtype=bool)
    top, bottom = int(rows * margins[0]), rows - int(rows * margins[1])
    left, right = int(columns * margins[2]), columns - int(columns * margins[3])
    mask[top:bottom, left:right] = False
    for lesion in truth.values():
        mask &= ~lesion
    return mask
