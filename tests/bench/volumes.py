"""A CT of 300 slices of 512 x 512 on its way to the model and back, without the model."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.table import Table

from dicom_xai.config import Grid, InputKind, ModelInput, StackRule, Windowing, WindowSource
from dicom_xai.decode.geometry import attach, stack
from dicom_xai.decode.normalize import model_inputs
from dicom_xai.decode.planes import planes_of
from dicom_xai.explain.mapping import frame_peaks, to_source
from dicom_xai.study import Geometry, Volume
from tests.bench.timing import interleaved
from tests.make.images import a_slice

SLICES, MATRIX = 300, 512
WINDOW = Windowing(source=WindowSource.FIXED, center=40.0, width=80.0)
IMAGES = ModelInput(name="image", kind=InputKind.SLICES, size=(256, 256), windowing=WINDOW)


def a_grid(orientation: str) -> ModelInput:
    grid = Grid(spacing_mm=(4.5, 2.25, 2.25), orientation=orientation)
    return ModelInput(
        name="image", kind=InputKind.VOLUME3D, size=(32, 96, 96), grid=grid, windowing=WINDOW
    )


def run(_: Path) -> Table:
    """Medians of each step."""
    table = Table(title=f"{SLICES} slices of {MATRIX} x {MATRIX}, CPU, medians")
    table.add_column("step")
    table.add_column("ms", justify="right")
    for name, seconds in times().items():
        table.add_row(name, f"{seconds * 1e3:.0f}")
    return table


def times() -> dict[str, float]:
    """Seconds by step; one slice after the other is how it was before."""
    straight, oblique = _volume((0, 1, 0)), _volume((0, 0.9, -0.43588989))
    planes = [
        plane for frame in straight.frames for plane in planes_of(frame.instance, frame.header)
    ]
    spec = a_grid("SPL")
    heat = torch.rand(16, 24, 24)
    flat, there, aslant = (
        model_inputs(volume, each).placements
        for volume, each in ((straight, IMAGES), (straight, spec), (oblique, spec))
    )
    singles = [Volume((frame,), Geometry()) for frame in straight.frames]
    maps = torch.rand(SLICES, 32, 32)
    return interleaved(
        {
            "order the planes of 300 slices": lambda: stack(planes, StackRule()),
            "300 images of 256 x 256, one by one": lambda: [
                model_inputs(one, IMAGES) for one in singles
            ],
            "300 images of 256 x 256, together": lambda: model_inputs(straight, IMAGES),
            "one volume of 32 x 96 x 96, axial": lambda: model_inputs(straight, spec),
            "one volume of 32 x 96 x 96, oblique": lambda: model_inputs(oblique, spec),
            "peaks of 300 slices, oblique": lambda: frame_peaks(heat, aslant),
            "60 maps to the source, of images": lambda: to_source(maps, flat, range(60)),
            "60 maps to the source, volume, axial": lambda: to_source(heat, there, range(60)),
            "60 maps to the source, volume, oblique": lambda: to_source(heat, aslant, range(60)),
        },
        rounds=3,
        warm_up=1,
    )


def _volume(column: tuple[float, float, float]) -> Volume:
    frames = [
        a_slice(
            0.45 * n,
            number=n,
            shape=(MATRIX, MATRIX),
            ImageOrientationPatient=[1, 0, 0, *column],
            PixelSpacing=[0.45, 0.45],
        )
        for n in range(SLICES)
    ]
    planes = [plane for frame in frames for plane in planes_of(frame.instance, frame.header)]
    return attach(stack(planes, StackRule()), frames)
