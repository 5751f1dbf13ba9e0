"""The band: wide enough, nothing clipped, the same everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from dicom_xai.encode import legend

PARTS = [
    legend.Line("AI - RESEARCH - NOT FOR DIAGNOSTIC USE", legend.YELLOW),
    legend.Line("Nodule: score 0.90 (threshold 0.50)", legend.WHITE, (0, 220, 255)),
    legend.HeatBar(0.35),
    legend.Line("model tiny 1.2.0", legend.GREY),
]
SIZES = [(128, 128), (2500, 2000), (2000, 2500), (300, 700), (101, 77), (3000, 100), (16, 16)]


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_image_and_band_tile_the_canvas(rows, columns):
    layout, band = legend.band_beside(rows, columns, PARTS)
    height, width = band.shape[:2]
    assert layout.width >= legend.MIN_WIDTH
    assert layout.width % 2 == 0
    assert layout.width == layout.band_left + width
    assert layout.height == layout.band_top + height
    assert layout.band_left >= columns or layout.band_top >= rows
    assert layout.height >= rows
    assert layout.width >= columns


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_no_text_touches_the_border(rows, columns):
    _, band = legend.band_beside(rows, columns, PARTS)
    inside = band[2:-2, 2:-2]
    border = np.ones(band.shape[:2], bool)
    border[2:-2, 2:-2] = False
    assert (band[border] == legend.BACKGROUND).all()
    assert (inside != legend.BACKGROUND).any()


def test_long_text_is_wrapped_and_makes_the_band_taller():
    long = [legend.Line("word " * 200), legend.Line("x" * 500)]
    layout, band = legend.band_beside(64, 64, long)
    assert layout.height > 64
    assert (band[:, -2:] == legend.BACKGROUND).all()
    assert (band[-2:] == legend.BACKGROUND).all()


def test_a_large_image_gets_larger_text():
    small, _ = legend.band_beside(512, 512, PARTS)
    large, _ = legend.band_beside(2500, 2000, PARTS)
    assert small.font_px == 14
    assert large.font_px > 2 * small.font_px


def test_the_bar_is_empty_below_the_threshold():
    _, band = legend.band_beside(400, 300, [legend.HeatBar(0.5)])
    reds = (band[..., 0].astype(int) - band[..., 2]) > 100
    columns = np.flatnonzero(reds.any(axis=0))
    bar = np.flatnonzero((band[..., 0] == legend.GREY[0]).any(axis=0))
    middle = (bar[0] + bar[-1]) / 2
    assert abs(columns[0] - middle) <= 2  # half a pixel of rounding on each side


def test_the_same_words_make_the_same_pixels():
    _, one = legend.band_beside(512, 512, PARTS)
    _, two = legend.band_beside(512, 512, list(PARTS))
    assert np.array_equal(one, two)
