"""Head CT series with or without haemorrhage, in Hounsfield units.

What is painted is a solid: HU as a function of the place in the head, sampled on each slice's
plane. Head coordinates are millimetres, x to the left, y to the back, z up, the origin in mid
brain; patient coordinates differ from them by how the head lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.uid import CTImageStorage

from dicom_xai.demo.phantom.dataset import Phantom, Subject, fresh_uid, new_dataset, set_pixels
from dicom_xai.demo.phantom.draw import Image, smooth_field, soft

#: The one class, as the bundled model names it.
HAEMORRHAGE = "haemorrhage"

#: Outer skull surface: half axes in mm, and what turns its implicit function into millimetres.
_AXES_MM = (72.0, 90.0, 80.0)
_MEAN_RADIUS_MM = 78.0
_BOTTOM_MM = -48.0
_PADDING = -2000


def head_ct(
    rng: np.random.Generator,
    slices: int = 40,
    *,
    haemorrhage: bool | None = None,
    matrix: int = 512,
    tilt_degrees: float | None = None,
    subject: Subject | None = None,
    new_uid: Callable[[], str] = fresh_uid,
) -> Phantom:
    """One axial series from the skull base to the vertex.

    Head size, position and turn, gantry tilt, field of view, slice spacing, noise, storage (signed
    with pixel padding, or unsigned 12 bit) and confounders (calcifications, falx, venous sinus,
    petrous bone with beam hardening) vary from call to call.

    Parameters
    ----------
    rng : numpy.random.Generator
        Decides everything but the UIDs.
    slices : int
        At least 2; they always cover the whole head.
    haemorrhage : bool, optional
        One or two hyperdense (55 to 85 HU) bleeds, or none; either when not given.
    matrix : int
        Rows and columns.
    tilt_degrees : float, optional
        Gantry tilt; mostly none when not given.
    subject : Subject, optional
        Invented when not given.
    new_uid : callable
        Where UIDs come from.

    Raises
    ------
    ValueError
        Fewer than 2 slices.
    """
    if slices < 2:
        raise ValueError(f"slices: {slices}, at least 2 wanted")
    if haemorrhage is None:
        haemorrhage = bool(rng.random() < 0.5)
    if tilt_degrees is None:
        tilt_degrees = float(rng.uniform(-15, 15)) if rng.random() < 0.25 else 0.0
    subject = subject or Subject.synthetic(rng)
    scan = _Scan.random(rng, slices, matrix, tilt_degrees)
    head = _Head.random(rng, matrix, bleeds=int(rng.integers(1, 3)) if haemorrhage else 0)
    study, series, frame_of_reference = new_uid(), new_uid(), new_uid()
    datasets, masks = [], []
    for index in range(slices):
        hu, bleeding = head.slice(*scan.plane(index), index / slices)
        hu += _noise(rng, hu.shape, scan.noise_hu)
        ds = new_dataset(CTImageStorage, subject, new_uid, study=study, series=series)
        ds.FrameOfReferenceUID = frame_of_reference
        scan.describe(ds, index)
        scan.store(ds, hu)
        datasets.append(ds)
        masks.append(bleeding)
    findings = frozenset({HAEMORRHAGE}) if haemorrhage else frozenset()
    return Phantom(tuple(datasets), {HAEMORRHAGE: np.stack(masks)}, findings)


@dataclass(frozen=True, slots=True)
class _Scan:
    """Where the slices lie in the patient, and how they are stored."""

    slices: int
    matrix: int
    spacing_mm: float
    step_mm: float  #: of the table, along patient z
    tilt: float  #: radians
    center_mm: tuple[float, float]
    noise_hu: float
    is_padded: bool

    @classmethod
    def random(
        cls, rng: np.random.Generator, slices: int, matrix: int, tilt_degrees: float
    ) -> _Scan:
        return cls(
            slices=slices,
            matrix=matrix,
            spacing_mm=round(float(rng.uniform(225, 255)) / matrix, 6),
            step_mm=round(float(rng.uniform(120, 130)) / (slices - 1), 3),
            tilt=math.radians(tilt_degrees),
            center_mm=(float(rng.normal(0, 5)), float(rng.normal(0, 5))),
            noise_hu=float(rng.uniform(2.5, 5.5)) * matrix / 512,
            is_padded=bool(rng.random() < 0.5),
        )

    def corner(self, index: int) -> tuple[float, float, float]:
        """Image Position (Patient) of a slice: the table moves along z, also when tilted."""
        half = self.spacing_mm * (self.matrix - 1) / 2
        return (
            self.center_mm[0] - half,
            self.center_mm[1] - half * math.cos(self.tilt),
            _BOTTOM_MM + index * self.step_mm - half * math.sin(self.tilt),
        )

    def plane(self, index: int) -> tuple[Image, Image, Image]:
        """Patient coordinates of the pixels: x ``(1, columns)``, y and z ``(rows, 1)``, in mm."""
        corner = self.corner(index)
        along = np.arange(self.matrix, dtype=np.float32) * np.float32(self.spacing_mm)
        x = corner[0] + along[None, :]
        y = corner[1] + along[:, None] * math.cos(self.tilt)
        z = corner[2] + along[:, None] * math.sin(self.tilt)
        return x.astype(np.float32), y.astype(np.float32), z.astype(np.float32)

    def describe(self, ds: Dataset, index: int) -> None:
        """Series, plane and acquisition attributes (PS3.3 A.3)."""
        ds.Modality = "CT"
        ds.StudyDescription = "Head phantom"
        ds.SeriesDescription = "Axial synthetic head, not a patient"
        ds.BodyPartExamined = "HEAD"
        ds.PatientPosition = "HFS"
        ds.PositionReferenceIndicator = ""
        ds.InstanceNumber = index + 1
        ds.AcquisitionNumber = 1
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.PixelSpacing = [f"{self.spacing_mm:.6f}"] * 2
        ds.SliceThickness = f"{self.step_mm:.3f}"
        ds.ImagePositionPatient = [f"{value:.6f}" for value in self.corner(index)]
        column = (0.0, math.cos(self.tilt), math.sin(self.tilt))
        ds.ImageOrientationPatient = ["1", "0", "0", *(f"{value:.8f}" for value in column)]
        ds.GantryDetectorTilt = f"{math.degrees(self.tilt):.2f}"
        ds.KVP = "120"
        ds.LossyImageCompression = "00"
        ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "-1024", "1", "HU"
        ds.WindowCenter, ds.WindowWidth = "40", "80"
        ds.WindowCenterWidthExplanation = "BRAIN"

    def store(self, ds: Dataset, hu: Image) -> None:
        """HU to stored values; outside the reconstructed circle there is padding or air."""
        stored = np.rint(hu) + 1024
        at = np.arange(self.matrix, dtype=np.float32) - (self.matrix - 1) / 2
        outside = np.hypot(at[:, None], at[None, :]) > self.matrix / 2
        if self.is_padded:
            whole = np.clip(stored, 0, 4095).astype(np.int16)
            whole[outside] = _PADDING
            set_pixels(ds, whole, 16, "MONOCHROME2")
            ds.add_new("PixelPaddingValue", "SS", _PADDING)
        else:
            stored[outside] = 0
            set_pixels(ds, np.clip(stored, 0, 4095).astype(np.uint16), 12, "MONOCHROME2")


def _noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> Image:
    """Noise with the short correlation of a reconstruction kernel."""
    white = rng.standard_normal(shape, dtype=np.float32)
    grain = white + 0.5 * (np.roll(white, 1, 0) + np.roll(white, 1, 1))
    return np.asarray(grain * np.float32(sigma / math.sqrt(1.5)))


@dataclass(frozen=True, slots=True)
class _Ball:
    """An ellipsoid in the head: centre and half axes in mm, HU inside."""

    center: tuple[float, float, float]
    axes: tuple[float, float, float]
    hu: float

    def is_near(self, z: tuple[float, float]) -> bool:
        """Whether a slice that spans these heights can meet it, its soft border included."""
        return z[0] < self.center[2] + 1.6 * self.axes[2] and z[1] > (
            self.center[2] - 1.6 * self.axes[2]
        )

    def radius(self, x: Image, y: Image, z: Image) -> Image:
        """1 on its surface, less inside."""
        parts = [
            (value - middle) / axis
            for value, middle, axis in zip((x, y, z), self.center, self.axes, strict=True)
        ]
        return np.asarray(np.sqrt(parts[0] ** 2 + parts[1] ** 2 + parts[2] ** 2))


_DEEP_GREY = tuple(_Ball((side * 20, 0, 6), (9, 16, 12), 36) for side in (-1, 1))


def _near(balls: tuple[_Ball, ...], heights: tuple[float, float]) -> Iterator[_Ball]:
    return (ball for ball in balls if ball.is_near(heights))


@dataclass(frozen=True, slots=True, eq=False)
class _Head:
    """One head: how it lies, how large it is, and what is in it."""

    turn: NDArray[np.float64]  #: rotation, patient to head coordinates
    shift: tuple[float, float, float]
    size: float
    skull_mm: float
    textures: tuple[tuple[Image, Image], ...]  #: pairs that are blended along z
    fluid: tuple[_Ball, ...]
    calcifications: tuple[_Ball, ...]
    bleeds: tuple[_Ball, ...]

    @classmethod
    def random(cls, rng: np.random.Generator, matrix: int, bleeds: int) -> _Head:
        wide = rng.uniform(0.8, 1.3)
        fluid = [
            _Ball((side * 10, 2 + 4 * part, 16 - 6 * part), (6 * wide, 20 * wide, 8 * wide), 7)
            for side in (-1, 1)
            for part in (-1, 1)
        ]
        fluid.append(_Ball((0, 4, 0), (2.5 * wide, 9, 8), 7))
        fluid.append(_Ball((0, 42, -30), (7 * wide, 5, 7), 7))
        calcifications = []
        if rng.random() < 0.6:
            size = rng.uniform(1.8, 3.2)
            calcifications.append(_Ball((0, 18, 4), (size,) * 3, rng.uniform(120, 300)))
        if rng.random() < 0.5:
            size = rng.uniform(1.5, 2.6)
            for side in (-1, 1):
                place = (side * 15, 26, 12)
                calcifications.append(_Ball(place, (size, 1.6 * size, size), 160))
        shape = (matrix, matrix)
        textures = tuple(
            (smooth_field(rng, shape, (n, n)), smooth_field(rng, shape, (n, n))) for n in (30, 20)
        )
        return cls(
            turn=_rotation(np.deg2rad(rng.normal(0, 5)), np.deg2rad(rng.normal(0, 2.5))),
            shift=(float(rng.normal(0, 4)), float(rng.normal(0, 4)), float(rng.normal(0, 3))),
            size=float(rng.uniform(0.92, 1.06)),
            skull_mm=float(rng.uniform(5, 8)),
            textures=textures,
            fluid=tuple(fluid),
            calcifications=tuple(calcifications),
            bleeds=tuple(_bleed(rng) for _ in range(bleeds)),
        )

    def slice(self, x: Image, y: Image, z: Image, part: float) -> tuple[Image, NDArray[np.bool_]]:
        """HU of one plane, and where it bleeds.

        Parameters
        ----------
        x, y, z : ndarray
            Patient coordinates in mm that broadcast to ``(rows, columns)``.
        part : float
            How far along the stack, 0..1: blends the textures.
        """
        px, py, pz = (p - s for p, s in zip((x, y, z), self.shift, strict=True))
        hx, hy, hz = (
            ((row[0] * px + row[1] * py + row[2] * pz) / self.size).astype(np.float32)
            for row in self.turn
        )
        gyri, blur = (
            first * np.float32(math.cos(4 * part)) + second * np.float32(math.sin(4 * part))
            for first, second in self.textures
        )
        depth = _depth(hx, hy, hz)  # below the outer skull surface, mm
        inner = depth - np.float32(self.skull_mm)
        hu = np.full(depth.shape, -1000, dtype=np.float32)
        rest = np.abs(np.hypot(x, y) - 107) - 2.5
        _over(hu, np.float32(60), soft(-rest, 1.0) * (y > 55))
        _over(hu, 30 - 90 * soft(depth + 4.5, 1.0), soft(depth + 7, 0.8))
        _over(hu, self._bone(depth), soft(depth, 0.7))
        _over(hu, np.float32(9), soft(inner, 0.7))
        brain = soft(inner - 1.5 - 0.5 * blur, 0.8)
        heights = float(hz.min()), float(hz.max())
        _over(hu, self._brain(hx, hy, hz, inner, gyri, blur), brain)
        if heights[0] < -12:
            self._base(hu, hx, hy, hz)
        bleeding = np.zeros(depth.shape, dtype=bool)
        for ball in _near(self.bleeds, heights):
            radius = ball.radius(hx, hy, hz) + np.float32(0.12) * blur
            _over(hu, np.float32(22), soft(1.3 - radius, 0.1) * brain)
            clot = soft(1 - radius, 0.06) * brain
            _over(hu, ball.hu + 3 * gyri, clot)
            bleeding |= clot > 0.5
        return hu, bleeding

    def _bone(self, depth: Image) -> Image:
        marrow = soft(depth - 1.8, 0.5) * soft(self.skull_mm - 1.8 - depth, 0.5)
        return np.asarray(1350 - 650 * marrow)

    def _brain(self, x: Image, y: Image, z: Image, inner: Image, gyri: Image, blur: Image) -> Image:
        hu = np.full(inner.shape, 37, dtype=np.float32) + np.float32(0.7) * gyri
        _over(hu, np.float32(29), soft(inner - 9 + 4 * gyri, 2.0))
        heights = float(z.min()), float(z.max())
        for nucleus in _near(_DEEP_GREY, heights):
            _over(hu, np.float32(nucleus.hu), soft(1 - nucleus.radius(x, y, z), 0.15))
        sulci = np.exp(-((blur / 0.13) ** 2)) * np.exp(-np.clip(inner - 2, 0, None) / 7)
        _over(hu, np.float32(11), np.float32(0.7) * sulci)
        falx = soft(1.1 - np.abs(x), 0.5) * soft(38 - inner, 6.0) * soft(z - 12, 4.0)
        _over(hu, np.float32(46), np.float32(0.8) * falx)
        sinus = np.hypot(x, inner - 3.5) - 3.5
        _over(hu, np.float32(57), soft(-sinus, 0.8) * (y > 30) * (z > -15))
        for ball in _near((*self.fluid, *self.calcifications), heights):
            _over(hu, np.float32(ball.hu), soft(1 - ball.radius(x, y, z), 0.15))
        return hu

    def _base(self, hu: Image, x: Image, y: Image, z: Image) -> None:
        """Petrous ridges with the dark band between them, and air in the front."""
        u = np.abs(x)
        near = np.exp(-(((z + 42) / 9) ** 2))
        ridge = soft(7 - np.abs(y - 12 + 0.5 * (u - 30)), 1.5) * soft(u - 12, 2) * soft(58 - u, 2)
        hu -= 14 * near * soft(12 - u, 9) * soft(22 - np.abs(y - 14), 12)
        _over(hu, np.float32(1000), ridge * soft(near - 0.5, 0.15))
        cells = _Ball((0, -66, -46), (15, 15, 18), -900)
        _over(hu, np.float32(cells.hu), soft(1 - cells.radius(x, y, z), 0.1))


def _bleed(rng: np.random.Generator) -> _Ball:
    """An ellipsoid of 8 to 25 mm off the midline, inside the brain."""
    axes = rng.uniform(10, 20) * rng.uniform(0.75, 1.25, 3)
    side = rng.choice([-1.0, 1.0])
    angle, out = rng.uniform(0, 2 * np.pi), rng.uniform(0, 1) ** 0.5
    x = side * (32 + 13 * out * np.cos(angle))
    y = 34 * out * np.sin(angle)
    center = (float(x), float(y), float(rng.uniform(-14, 38)))
    return _Ball(center, (float(axes[0]), float(axes[1]), float(axes[2])), rng.uniform(56, 82))


def _depth(x: Image, y: Image, z: Image) -> Image:
    """Millimetres below the outer skull: an ellipsoid above, more of a tube below."""
    up = np.where(z > 0, z / _AXES_MM[2], z / (2.2 * _AXES_MM[2]))
    egg = 1 + 0.08 * y / _AXES_MM[1]  # broader at the back
    radius = np.sqrt((x / (_AXES_MM[0] * egg)) ** 2 + (y / _AXES_MM[1]) ** 2 + up**2)
    depth = (1 - radius) * _MEAN_RADIUS_MM
    return np.asarray(depth, dtype=np.float32)


def _over(hu: Image, value: Image | np.float32, cover: Image) -> None:
    """Paint `value` over `hu` where `cover` is 1, mixed where it is between."""
    hu += (value - hu) * cover


def _rotation(about_z: float, about_y: float) -> NDArray[np.float64]:
    cz, sz, cy, sy = np.cos(about_z), np.sin(about_z), np.cos(about_y), np.sin(about_y)
    first = np.array([[cz, sz, 0], [-sz, cz, 0], [0, 0, 1]])
    second = np.array([[cy, 0, -sy], [0, 1, 0], [sy, 0, cy]])
    return np.asarray(second @ first)
