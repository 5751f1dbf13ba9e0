"""Segmentation models, on slices and on volumes: scores, regions and maps of one run."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dicom_xai.config import MinimumRegion, ModelCard, parse
from dicom_xai.decode.normalize import model_inputs
from dicom_xai.errors import ModelInputError
from dicom_xai.explain import EXPLAINERS
from dicom_xai.explain.heatmap import explain
from dicom_xai.explain.mapping import to_source
from dicom_xai.explain.served import ServedModel
from dicom_xai.infer.session import Device
from dicom_xai.study import Geometry, Inputs, Prediction, Volume
from tests.make.models import SEGMENTERS, write_segmenters
from tests.make.volumes import Array, a_stack, turned

HEIGHTS = [4.0 * n for n in range(30)]
#: Where it is brighter, in the patient, mm.
CENTRE, RADIUS = np.array([30.0, 70.0, 60.0]), 25.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_segmenters(tmp_path_factory.mktemp("segmenters"))


@pytest.fixture(scope="module")
def served(folder: Path) -> dict[str, ServedModel]:
    return {
        name: ServedModel(card_of(folder, name), Device("cpu"), [EXPLAINERS["grad-cam"]], 1, 1)
        for name in SEGMENTERS
    }


def card_of(folder: Path, name: str) -> ModelCard:
    card, _ = parse(folder / f"{name}.yaml", ModelCard)
    return card.model_copy(update={"file": folder / card.file})


def a_ball(places: Array) -> Array:
    """A soft ball of 100 HU in 20 HU; its surface is at 60."""
    depth = RADIUS - np.linalg.norm(places - CENTRE, axis=-1)
    return np.asarray(60 + np.clip(depth * 10, -40, 40))


def a_volume(turn: Array | None = None) -> Volume:
    middle = np.array([57.5, 57.5, 58.0])
    turn = np.eye(3) if turn is None else turn
    first = CENTRE - turn @ middle
    return a_stack(
        a_ball,
        turn=turn,
        heights=HEIGHTS[::-1],
        shape=(24, 24),
        spacing=(5.0, 5.0),
        first=(first[0], first[1], first[2]),
    )


def predicted(model: ServedModel, volume: Volume) -> tuple[Inputs, Prediction]:
    inputs = model_inputs(volume, model.card.inputs[0])
    return inputs, model.predict(inputs, "grad-cam")


@pytest.mark.parametrize("name", list(SEGMENTERS))
@pytest.mark.parametrize("turn", [np.eye(3), turned(0.3, 0.2, -0.1)], ids=["axial", "oblique"])
def test_the_region_is_the_ball_in_the_patient(
    served: dict[str, ServedModel], name: str, turn: Array
) -> None:
    model, volume = served[name], a_volume(turn)
    _, prediction = predicted(model, volume)
    (finding,) = explain(prediction, model.card, 1, "grad-cam", "").findings
    assert finding.is_positive
    region = finding.region
    # 65.4 ml; cells of 0.15 ml, and slices 4 mm thick, cut its surface
    assert region.volume_ml == pytest.approx(4 / 3 * np.pi * 2.5**3, rel=0.05)
    every = range(len(volume.frames))
    found = to_source(region.probability, region.placements, every).numpy() >= region.threshold
    truth = np.stack([frame.values.numpy() for frame in volume.frames]) >= 60
    dice = 2 * (found & truth).sum() / (found.sum() + truth.sum())
    assert dice > 0.93  # voxels of 5 x 5 x 4 mm, read from cells of 6 x 5 x 5 mm
    for index, peak in enumerate(region.frame_peaks):
        if found[index].any():
            assert peak >= region.threshold


@pytest.mark.parametrize("name", list(SEGMENTERS))
def test_the_map_of_a_region_lies_in_it(served: dict[str, ServedModel], name: str) -> None:
    model, volume = served[name], a_volume()
    _, prediction = predicted(model, volume)
    assert served[name].self_tests["grad-cam"].is_bit_identical
    (finding,) = explain(prediction, model.card, 1, "grad-cam", "").findings
    attribution = finding.attribution
    heat = to_source(attribution.heat, attribution.placements, range(len(volume.frames))).numpy()
    truth = np.stack([frame.values.numpy() for frame in volume.frames]) >= 60
    assert truth.flat[int(heat.argmax())]


@pytest.mark.parametrize("name", list(SEGMENTERS))
def test_what_is_dark_scores_low_and_has_no_region(
    served: dict[str, ServedModel], name: str
) -> None:
    model = served[name]
    dark = a_stack(
        lambda p: np.full(p.shape[:-1], 20.0),
        turn=np.eye(3),
        heights=HEIGHTS,
        shape=(24, 24),
        spacing=(5.0, 5.0),
    )
    _, prediction = predicted(model, dark)
    (finding,) = explain(prediction, model.card, 1, "grad-cam", "").findings
    assert not finding.is_positive
    assert finding.region.volume_ml == 0
    assert not prediction.raw_maps.any()


@pytest.mark.parametrize(("ml", "is_positive"), [(55.0, True), (80.0, False)])
@pytest.mark.parametrize("name", list(SEGMENTERS))
def test_a_score_is_what_a_region_of_the_minimum_size_reaches(
    served: dict[str, ServedModel], name: str, ml: float, is_positive: bool
) -> None:
    inputs = model_inputs(a_volume(), served[name].card.inputs[0])
    prediction = with_minimum(served[name], MinimumRegion(ml=ml, cells=None)).predict(inputs, "")
    assert (prediction.unit_scores[0] >= 0.5) is np.bool_(is_positive)
    cells = int(np.ceil(ml / inputs.cell_ml))
    expected = prediction.probabilities.flatten().sort(descending=True).values[cells - 1]
    assert prediction.unit_scores[0] == pytest.approx(float(expected))


def test_a_region_larger_than_all_there_is_scores_nothing(served: dict[str, ServedModel]) -> None:
    model = with_minimum(served["brighter-3d"], MinimumRegion(ml=None, cells=10**9))
    prediction = model.predict(model_inputs(a_volume(), model.card.inputs[0]), "")
    assert prediction.unit_scores.tolist() == [0.0]


def test_millilitres_without_spacing_are_refused(served: dict[str, ServedModel]) -> None:
    model = with_minimum(served["brighter-slices"], MinimumRegion(ml=1.0, cells=None))
    bare = replace(a_volume(), geometry=Geometry())
    with pytest.raises(ModelInputError, match="minimum_region is in ml"):
        model.predict(model_inputs(bare, model.card.inputs[0]), "")


def test_margins_count_for_nothing(served: dict[str, ServedModel]) -> None:
    model = served["brighter-3d"]
    inputs = model_inputs(a_volume(), model.card.inputs[0])
    bright = replace(inputs, images=torch.ones_like(inputs.images))
    prediction = model.predict(bright, "")
    assert (prediction.probabilities[0, 0][~inputs.inside[0]] == 0).all()
    assert (prediction.probabilities[0, 0][inputs.inside[0]] > 0.99).all()


def with_minimum(model: ServedModel, region: MinimumRegion) -> ServedModel:
    """The same model under a card that wants regions of that size."""
    output = model.card.outputs[0].model_copy(update={"minimum_region": region})
    changed = copy.copy(model)
    changed._plain = copy.copy(model._plain)
    changed.card = changed._plain.card = model.card.model_copy(update={"outputs": (output,)})
    return changed
