"""Models with several inputs and outputs."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import parser

from dicom_xai.autodiff import IntegratedGradients, TopClasses, compile
from dicom_xai.errors import ConfigError

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
two (float[batch, 1] age, float[batch, 1, 6, 6] picture)
    => (float[batch, 2] risk, float[batch, 3] finding)
{
    features = Conv <pads = [1, 1, 1, 1]> (picture, w)
    active = Relu (features)
    mean = GlobalAveragePool (active)
    flat = Flatten (mean)
    all = Concat <axis = 1> (flat, age)
    risk = MatMul (all, wr)
    finding = MatMul (all, wf)
}
"""

WEIGHTS = {"w": (2, 1, 3, 3), "wr": (3, 2), "wf": (3, 3)}


@pytest.fixture
def model() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    found = parser.parse_model(TEXT)
    for name, shape in WEIGHTS.items():
        values = rng.standard_normal(shape).astype(np.float32)
        found.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return found


FEEDS = {
    "age": np.array([[0.3], [0.7]], np.float32),
    "picture": np.random.default_rng(1).standard_normal((2, 1, 6, 6)).astype(np.float32),
}


def run(model: onnx.ModelProto, **more: object) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    names = [item.name for item in session.get_outputs()]
    given = {**FEEDS, **{name: np.asarray(value) for name, value in more.items()}}
    return dict(zip(names, session.run(None, given), strict=True))


@pytest.mark.parametrize(("output", "weights"), [("risk", "wr"), ("finding", "wf")])
def test_any_output_is_explained_on_the_image_s_input(
    output: str, weights: str, model: onnx.ModelProto
) -> None:
    compiled = compile(model, "cam", output=output)
    found = run(compiled.model, target=[1, 0])
    stored = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    active = run(compiled_features(model))["active"]
    wanted = np.einsum("bkhw,kb->bhw", active, stored[weights][:2, [1, 0]])
    assert compiled.report.layer == "active"
    assert np.allclose(found["attribution"][:, 0], wanted, rtol=1e-4, atol=1e-6)
    assert list(found)[:2] == ["risk", "finding"]


def compiled_features(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its features as an output, for the oracle."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    shown.graph.output.append(onnx.helper.make_tensor_value_info("active", 1, [None] * 4))
    return shown


def test_the_order_of_classes_is_that_of_the_explained_output(model: onnx.ModelProto) -> None:
    found = run(compile(model, select=TopClasses(3), output="finding").model)
    assert found["attribution_class"].tolist() == np.argsort(-found["finding"], 1).tolist()


def test_a_method_that_runs_the_model_elsewhere_needs_one_input(model: onnx.ModelProto) -> None:
    with pytest.raises(ConfigError, match="age"):
        compile(model, IntegratedGradients())


@pytest.mark.parametrize("name", ["age", "w"])
def test_an_input_or_weight_by_the_name_of_the_map_is_to_be_renamed(
    name: str, model: onnx.ModelProto
) -> None:
    for item in (*model.graph.input, *model.graph.initializer):
        item.name = "attribution" if item.name == name else item.name
    for node in model.graph.node:
        node.input[:] = ["attribution" if item == name else item for item in node.input]
    with pytest.raises(ConfigError, match="rename it in the model"):
        compile(model, output="finding")
