"""A model shows what it must before it serves."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import numpy_helper

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
