"""Raw maps onto the absolute scale and onto the source's pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from dicom_xai.config import (
    Code,
    HeatmapScale,
    ModelCard,
    ModelClass,
    ModelInput,
    ModelOutput,
    Windowing,
    WindowSource,
)
from dicom_xai.explain.heatmap import explain, to_source
from dicom_xai.study import Placement, Prediction

CODE = Code(value="1", scheme="99TEST", meaning="test")


def card(*thresholds: float, full_scale: float = 2.0, threshold: float = 0.5) -> ModelCard:
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
                kind="image2d",
                size=(8, 8),
                windowing=Windowing(source=WindowSource.PERCENTILE),
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


@pytest.mark.parametrize("source", [(64, 64), (100, 40), (17, 33)])
def test_a_stretched_map_equals_torchs_bilinear_interpolation(source):
    heat = torch.rand((5, 7), generator=torch.Generator().manual_seed(0))
    placement = Placement(source, (80, 56), (80 / source[0], 56 / source[1]))
    expected = functional.interpolate(heat[None, None], source, mode="bilinear")[0, 0]
    # float32 rounding of two matrix products
    assert torch.allclose(to_source(heat, placement), expected, atol=1e-5)


def test_a_letterboxed_source_sees_the_middle_of_the_map():
    # a 40 x 80 source on an 80 x 80 grid: rows 20 to 60 of the grid are image
    placement = Placement((40, 80), (80, 80), (1.0, 1.0), (20.0, 0.0))
    heat = torch.zeros((8, 8))
    heat[4, 2] = 1.0  # grid rows 40 to 50, columns 20 to 30; centre (45, 25)
    seen = to_source(heat, placement)
    assert seen.shape == (40, 80)
    assert np.unravel_index(int(seen.argmax()), seen.shape) in [
        (24, 24),
        (24, 25),
        (25, 24),
        (25, 25),
    ]


def test_interpolation_never_exceeds_the_maps_own_maximum():
    heat = torch.rand((6, 6), generator=torch.Generator().manual_seed(1))
    seen = to_source(heat, Placement((123, 77), (48, 48), (48 / 123, 48 / 77)))
    assert float(seen.max()) <= float(heat.max()) + 1e-6


def test_outside_the_input_grid_there_is_no_heat():
    placement = Placement((30, 30), (10, 10), (1.0, 1.0), (-10.0, -10.0))
    seen = to_source(torch.ones((5, 5)), placement)
    assert seen[10:20, 10:20].min() == 1
    assert seen.sum() == 100
