"""What training measures: the area under the curve, and the pointing game."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dicom_xai.demo.measure import _points_inside, area_under_curve
from dicom_xai.demo.samples import Sample
from dicom_xai.study import Placement, VolumePlacement


@pytest.mark.parametrize(
    ("scores", "labels", "area"),
    [
        ([0.1, 0.2, 0.8, 0.9], [False, False, True, True], 1.0),
        ([0.9, 0.8, 0.2, 0.1], [False, False, True, True], 0.0),
        ([0.5, 0.5], [False, True], 0.5),
        ([0.1, 0.3, 0.2, 0.4], [False, False, True, True], 0.75),
    ],
)
def test_area_under_the_curve_counts_ordered_pairs(
    scores: list[float], labels: list[bool], area: float
) -> None:
    assert area_under_curve(scores, labels) == area


def test_pointing_asks_the_source_pixel_under_the_maximum() -> None:
    raw = torch.zeros(8, 8)
    raw[2, 3] = 1  # the cell's middle: row 20, column 28 of the input
    truth = np.zeros((1, 1, 128, 64), dtype=bool)
    truth[0, 0, 40, 24] = True  # scale 0.5 and 1, offset 0 and 4
    placement = Placement((128, 64), (64, 64), (0.5, 1.0), (0.0, 4.0))
    nothing = np.zeros((1, 8, 8), dtype=np.float32)
    sample = Sample(np.zeros((1, 64, 64), np.float16), nothing, truth, (placement,))
    assert _points_inside(raw, sample, 0)
    moved = dataclasses.replace(sample, truth=np.roll(truth, 1, axis=2))
    assert not _points_inside(raw, moved, 0)


def test_pointing_asks_the_voxel_under_the_maximum() -> None:
    raw = torch.zeros(4, 8, 8)
    raw[2, 3, 5] = 1  # the cell's middle: 10, 14, 22 of the input
    placements = tuple(
        VolumePlacement((40, 50), (16, 32, 32), (11.0 - n, 2.0, 31.0), (0, 0.5, 0), (0, 0, -0.25))
        for n in range(4)
    )
    truth = np.zeros((1, 4, 40, 50), dtype=bool)
    truth[0, 1, 24, 36] = True
    nothing = np.zeros((1, 4, 8, 8), dtype=np.float32)
    sample = Sample(np.zeros((1, 16, 32, 32), np.float16), nothing, truth, placements)
    assert _points_inside(raw, sample, 0)
    moved = dataclasses.replace(sample, truth=np.roll(truth, 1, axis=1))
    assert not _points_inside(raw, moved, 0)
