"""Findings, and their maps and regions on absolute scales."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dicom_xai.config import (
    Code,
    Grid,
    HeatmapScale,
    ModelCard,
    ModelClass,
    ModelInput,
    ModelOutput,
    Windowing,
    WindowSource,
)
from dicom_xai.explain.heatmap import explain
from dicom_xai.study import Placement, Prediction, VolumePlacement

CODE = Code(value="1", scheme="99TEST", meaning="test")


def card(
    *thresholds: float, full_scale: float = 2.0, threshold: float = 0.5, is_volume: bool = False
) -> ModelCard:
    grid = Grid(spacing_mm=(1, 1, 1), orientation="SPL")
    shape = {"kind": "volume3d", "size": (4, 8, 8), "grid": grid}
    flat = {"kind": "image2d", "size": (8, 8)}
    return ModelCard(
        name="test",
        version="1",
        file="test.onnx",
        sha256="0" * 64,
        intended_use="Tests.",
        manufacturer="tests",
        calibrated=False,
        inputs=(
            ModelInput(
                name="image",
                windowing=Windowing(source=WindowSource.PERCENTILE),
                **(shape if is_volume else flat),
            ),
        ),
        outputs=(
            ModelOutput(
                name="logits",
                kind="classification",
                activation="sigmoid",
                classes=tuple(
                    ModelClass(
                        name=f"class-{i}", label=f"Class {i}", threshold=t, category=CODE, type=CODE
                    )
                    for i, t in enumerate(thresholds)
                ),
            ),
        ),
        heatmap=HeatmapScale(full_scale=full_scale, threshold=threshold),
    )


def prediction(scores, targets=None, maps=None) -> Prediction:
    scores = np.asarray(scores, np.float32)
    frames = len(scores)
    return Prediction(
        scores=scores,
        unit_scores=scores.max(axis=0),
        target_classes=np.empty((frames, 0), np.int64) if targets is None else np.asarray(targets),
        raw_maps=None if maps is None else torch.as_tensor(maps, dtype=torch.float32),
        placements=(Placement((8, 8), (8, 8)),) * frames,
    )


def test_positives_come_first_and_then_the_higher_score():
    made = explain(prediction([[0.9, 0.6, 0.8]]), card(0.95, 0.5, 0.5), 3, "", "")
    assert [finding.class_index for finding in made.findings] == [2, 1, 0]
    assert [finding.is_positive for finding in made.findings] == [True, True, False]


def test_the_unit_scores_as_its_best_frame():
    made = explain(prediction([[0.1], [0.7], [0.3]]), card(0.5), 1, "", "")
    assert made.findings[0].score == pytest.approx(0.7)
    assert made.findings[0].frame_scores == pytest.approx((0.1, 0.7, 0.3))


def test_heat_is_the_raw_map_over_the_cards_full_scale_and_never_the_images_own_maximum():
    raw = [[[[0.0, 0.5], [1.0, 3.0]]]]
    made = explain(prediction([[0.9]], [[0]], raw), card(0.5), 1, "grad-cam", "layer")
    attribution = made.findings[0].attribution
    assert attribution is not None
    assert attribution.heat[0].tolist() == [[0.0, 0.25], [0.5, 1.5]]
    assert attribution.threshold == pytest.approx(0.25)


def test_each_class_gets_the_map_that_explains_it_in_each_frame():
    raw = [[[[1.0]], [[2.0]]], [[[3.0]], [[4.0]]]]
    made = explain(
        prediction([[0.9, 0.8], [0.7, 0.9]], [[0, 1], [1, 0]], raw), card(0.5, 0.5), 2, "m", "l"
    )
    heat = {
        finding.class_index: finding.attribution.heat.flatten().tolist()
        for finding in made.findings
    }
    assert heat == {0: [0.5, 2.0], 1: [1.0, 1.5]}


def test_only_so_many_classes_as_the_route_wants_get_a_map():
    raw = torch.ones((1, 3, 1, 1))
    made = explain(
        prediction([[0.9, 0.8, 0.7]], [[0, 1, 2]], raw), card(0.5, 0.5, 0.5), 2, "m", "l"
    )
    assert [finding.attribution is not None for finding in made.findings] == [True, True, False]


def test_without_maps_the_note_says_why():
    made = explain(prediction([[0.9]]), card(0.5), 1, "", "", "no time")
    assert made.findings[0].attribution is None
    assert (made.method, made.note) == ("", "no time")


def test_frames_weigh_as_they_score():
    made = explain(prediction([[0.1], [0.7], [0.3]]), card(0.5), 1, "", "")
    assert made.findings[0].frame_weights == made.findings[0].frame_scores


#: Three slices across the first, second and last of four planes of an 8 x 8 grid.
SLICES = tuple(
    VolumePlacement((8, 8), (4, 8, 8), (plane + 0.5, 0.5, 0.5), (0, 1, 0), (0, 0, 1))
    for plane in (0, 1, 3)
)


def volume_prediction(**changes) -> Prediction:
    given = {
        "scores": np.array([[0.8]], np.float32),
        "unit_scores": np.array([0.8], np.float32),
        "target_classes": np.array([[0]]),
        "raw_maps": None,
        "placements": SLICES,
    }
    return Prediction(**{**given, **changes})


def test_a_volume_weighs_each_slice_by_the_heat_that_it_can_show():
    maps = torch.zeros((1, 1, 4, 8, 8))
    maps[0, 0, 1, 2, 3] = 3.0
    (finding,) = explain(
        volume_prediction(raw_maps=maps), card(0.5, is_volume=True), 1, "m", "l"
    ).findings
    assert finding.attribution.heat.shape == (4, 8, 8)
    assert finding.attribution.frame_peaks == (0.0, 1.5, 0.0)
    assert finding.frame_weights == pytest.approx((0.0, 1.5 / 64, 0.0))
    assert finding.frame_scores == ()  # it says nothing about single slices


def test_a_volume_without_map_weighs_all_slices_the_same():
    (finding,) = explain(volume_prediction(), card(0.5, is_volume=True), 1, "", "").findings
    assert finding.frame_weights == pytest.approx((0.8, 0.8, 0.8))


def test_a_segmentation_has_a_region_with_its_volume():
    probabilities = torch.zeros((1, 1, 4, 8, 8))
    probabilities[0, 0, 3, :2, :2] = 0.9
    probabilities[0, 0, 0, 0, 0] = 0.4
    (finding,) = explain(
        volume_prediction(probabilities=probabilities, cell_ml=0.25),
        card(0.5, is_volume=True),
        1,
        "",
        "",
    ).findings
    assert finding.region.volume_ml == 1.0
    assert finding.region.threshold == 0.5
    assert finding.region.frame_peaks == pytest.approx((0.4, 0.0, 0.9))
    assert finding.frame_scores == finding.region.frame_peaks
    assert finding.frame_weights == pytest.approx((0.4 / 64, 0.0, 3.6 / 64))


def test_a_region_without_spacings_has_no_volume():
    made = prediction([[0.9]])
    probabilities = torch.ones((1, 1, 8, 8))
    made = dataclasses.replace(made, probabilities=probabilities)
    (finding,) = explain(made, card(0.5), 1, "", "").findings
    assert finding.region.volume_ml is None
