"""A model shows what it must before it serves."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from dicom_xai.autodiff.methods import METHODS
from dicom_xai.errors import ModelCardError
from dicom_xai.explain.selftest import GRADIENT_TOLERANCE, applicability, gradient_error
from dicom_xai.infer.model import Model
from dicom_xai.infer.session import Device

CPU = Device("cpu")


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


def test_each_method_applies_or_says_why_not(cxr_card):
    found = applicability(Model(cxr_card, CPU, 1))
    assert set(found) == set(METHODS)
    assert found["grad-cam"] == ""
    assert "attention" in found["gradient-attention-rollout"]


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
