"""A model shows what it must before it serves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from dicom_xai import autodiff
from dicom_xai.autodiff.methods import METHODS
from dicom_xai.config import ModelCard, parse
from dicom_xai.errors import ModelCardError
from dicom_xai.explain.selftest import (
    GRADIENT_TOLERANCE,
    applicability,
    gradient_error,
    map_error,
    noise,
)
from dicom_xai.infer.model import Model
from dicom_xai.infer.session import Device, Session

CPU = Device("cpu")
BUNDLED = Path(__file__).parents[3] / "config" / "models"
WRONG: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rolled": lambda made: made.roll(1, -1),
    "flipped": lambda made: made.flip(-1),
    "constant": lambda made: made.mean().expand_as(made),
}


def test_the_compiled_gradient_agrees_with_finite_differences(cxr_card):
    assert gradient_error(Model(cxr_card, CPU, 1), 1) < GRADIENT_TOLERANCE / 2


def test_a_gradient_of_another_function_is_refused(cxr_card):
    model = Model(cxr_card, CPU, 1)
    for item in model.proto.graph.initializer:  # the session keeps the true weights
        values = numpy_helper.to_array(item)
        if values.ndim == 2:
            item.CopyFrom(numpy_helper.from_array(values * np.float32(1.2), item.name))
    with pytest.raises(ModelCardError, match="differs from finite differences by"):
        gradient_error(model, 1)


@pytest.mark.parametrize("name", ["phantom-cxr", "phantom-ct-head", "phantom-ct-3d"])
def test_a_map_with_the_right_sum_at_wrong_places_fails_by_far(name):
    card, _ = parse(BUNDLED / f"{name}.yaml", ModelCard)
    model = Model(card.model_copy(update={"file": BUNDLED / card.file}), CPU, 1)
    explained = Session(
        autodiff.compile(model.proto, "input-x-gradient").model.SerializeToString(), CPU, 1
    )
    image = noise(model.card, 1, CPU)
    feeds = {model.input_name: image, "target": torch.zeros(1, dtype=torch.int64)}
    right = explained.run(feeds, ["attribution"])["attribution"][0]

    def scored(moved: torch.Tensor) -> float:
        run = model.session.run({model.input_name: moved}, [model.output_name])
        return float(run[model.output_name][0, 0])

    assert map_error(right, image, scored) < GRADIENT_TOLERANCE / 2
    for spoil in WRONG.values():
        assert map_error(spoil(right), image, scored) > 2 * GRADIENT_TOLERANCE


def test_each_method_applies_or_says_why_not(cxr_card):
    found = applicability(Model(cxr_card, CPU, 1))
    assert set(found) == set(METHODS)
    assert found["grad-cam"] == ""
    assert "attention" in found["gradient-attention-rollout"]


def test_methods_are_tried_on_the_layer_of_the_card(cxr_card):
    heatmap = cxr_card.heatmap.model_copy(update={"layer": "nowhere"})
    found = applicability(Model(cxr_card.model_copy(update={"heatmap": heatmap}), CPU, 1))
    assert "nowhere" in found["grad-cam"]


def test_a_graph_that_ends_in_its_activation_is_judged_before_it(cxr_card, tmp_path):
    model = onnx.load(cxr_card.file)
    model.graph.node.append(helper.make_node("Sigmoid", ["logits"], ["scores"], name="end"))
    output = model.graph.output[0]
    output.name = "scores"
    path = tmp_path / "scores.onnx"
    onnx.save(model, path)
    (given,) = cxr_card.outputs
    card = cxr_card.model_copy(
        update={
            "file": path,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "outputs": (given.model_copy(update={"name": "scores", "activation": "none"}),),
        }
    )
    assert gradient_error(Model(card, CPU, 1), 1) < GRADIENT_TOLERANCE / 2
