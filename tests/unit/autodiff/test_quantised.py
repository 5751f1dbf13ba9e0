"""Models in 8 bits: explained straight through with a warning, or refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)

from dicom_xai.autodiff import compile
from dicom_xai.errors import UnsupportedOperatorError
from tests.make.networks import ResNet, exported, image, seeded
from tests.unit.autodiff.test_fusions_kept import fused
from tests.unit.autodiff.test_methods import TARGET, run


class OneImage(CalibrationDataReader):
    """What the ranges are taken from."""

    def __init__(self, x: torch.Tensor) -> None:
        self.left = [{"image": x.numpy()}]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.left.pop() if self.left else None


def quantised(plain: onnx.ModelProto, x: torch.Tensor, folder: Path, kind: QuantType) -> Path:
    """The model with QuantizeLinear and DequantizeLinear around every operator.

    Weights of 7 bits, as ONNX Runtime advises: products of 8 overflow where a processor adds them
    up in 16, and then integers and reals differ.
    """
    onnx.save(plain, folder / "plain.onnx")
    quantize_static(
        folder / "plain.onnx", folder / "quantised.onnx", OneImage(x), per_channel=True,
        quant_format=QuantFormat.QDQ, activation_type=kind, weight_type=QuantType.QInt8,
        reduce_range=True,
    )  # fmt: skip
    return folder / "quantised.onnx"


@pytest.mark.parametrize("opset", [13, 17, 20])
@pytest.mark.parametrize("kind", [QuantType.QUInt8, QuantType.QInt8], ids=["unsigned", "signed"])
def test_rounding_is_passed_straight_through_and_said_aloud(
    kind: QuantType, opset: int, tmp_path: Path
) -> None:
    network, x = seeded(ResNet()), image(2, 1, 33, 33)
    plain = exported(network, x, "torchscript", opset)
    model = onnx.load(quantised(plain, x, tmp_path, kind))
    for method in ("grad-cam", "saliency"):
        compiled = compile(model, method)
        assert any("straight-through" in warning for warning in compiled.report.warnings)
        found = run(compiled.model, x, target=TARGET)
        wanted = run(compile(plain, method).model, x, target=TARGET)["attribution"]
        assert np.array_equal(found["scores"], run(model, x)["scores"])
        # 8 bits move activations by a percent, and some across the kink of a Relu.
        assert np.corrcoef(found["attribution"].ravel(), wanted.ravel())[0, 1] > 0.9
    assert not compile(model, "eigen-cam").report.warnings[2:]


@pytest.mark.parametrize("method", ["grad-cam", "saliency", "eigen-cam"])
def test_the_runtime_still_computes_with_integers(method: str, tmp_path: Path) -> None:
    network, x = seeded(ResNet()), image(2, 1, 33, 33)
    model = onnx.load(
        quantised(exported(network, x, "torchscript", 17), x, tmp_path, QuantType.QUInt8)
    )
    plain, explained = (
        fused(each, tmp_path / "optimised.onnx") for each in (model, compile(model, method).model)
    )
    integers = [op_type for op_type in plain if op_type.startswith("Q")]
    assert "QLinearConv" in integers
    assert all(explained[op_type] >= plain[op_type] for op_type in integers)


#: What ends a small network, and the scale of the integers behind it: its own rule compares its
#: value with another one, or divides by it.
ENDS = {
    "ReduceMin": (["axes"], 0.011),
    "ReduceL2": (["axes"], 0.011),
    "ReduceMax": (["axes"], 0.011),
    "Sqrt": ([], 0.013),
    "Clip": (["low", "high"], 0.0031),
    "HardSigmoid": ([], 1 / 256),
}


@pytest.mark.parametrize("op_type", ENDS)
def test_a_rule_that_needs_its_own_value_gets_it_unrounded(op_type: str) -> None:
    more, scale = ENDS[op_type]
    values = {
        "axes": np.array([2, 3]),
        "low": np.float32(0.1),
        "high": np.float32(0.8),
        "scale": np.float32(scale),
        "zero": np.uint8(0),
        "two": np.float32(2),
        "shape": np.array([0, -1]),
    }

    def model(*rounding: onnx.NodeProto) -> onnx.ModelProto:
        make = helper.make_node
        graph = helper.make_graph(
            [
                make("Mul", ["image", "two"], ["x"]),
                make(op_type, ["x", *more], ["y"]),
                *rounding,
                make("Flatten", ["z"], ["scores"]),
            ],
            "small",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, [2, 3, 4, 4])],
            [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [2, None])],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
        )
        return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)])

    reals = model(helper.make_node("Identity", ["y"], ["z"]))
    integers = model(
        helper.make_node("QuantizeLinear", ["y", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["z"]),
    )
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(3)) + 0.05
    wanted, found = (
        run(compile(each, "input-x-gradient").model, x, target=TARGET)["attribution"]
        for each in (reals, integers)
    )
    assert np.isfinite(found).all()
    assert np.array_equal(found, wanted)


def test_the_darkest_pixels_of_an_image_in_8_bits_have_a_gradient() -> None:
    make = helper.make_node
    graph = helper.make_graph(
        [
            make("QuantizeLinear", ["image", "scale", "zero"], ["q"]),
            make("DequantizeLinear", ["q", "scale", "zero"], ["x"]),
            make("ReduceSum", ["x", "axes"], ["scores"], keepdims=0),
        ],
        "small",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [2, 3, 4, 4])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [2, 3])],
        [
            numpy_helper.from_array(np.float32(1 / 255), "scale"),
            numpy_helper.from_array(np.uint8(0), "zero"),
            numpy_helper.from_array(np.array([2, 3]), "axes"),
        ],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)])
    found = run(compile(model, "saliency").model, torch.zeros(2, 3, 4, 4), target=TARGET)
    assert np.array_equal(found["attribution"], np.ones((2, 1, 4, 4), np.float32))


@pytest.mark.parametrize("method", ["guided-backpropagation", "deconvnet", "lrp"])
def test_rules_for_activations_that_quantising_hides_are_refused(
    method: str, tmp_path: Path
) -> None:
    network, x = seeded(ResNet()), image(2, 1, 33, 33)
    plain = exported(network, x, "torchscript", 17)
    model = onnx.load(quantised(plain, x, tmp_path, QuantType.QUInt8))
    with pytest.raises(UnsupportedOperatorError) as caught:
        compile(model, method)
    assert caught.value.op_type in ("QuantizeLinear", "DequantizeLinear")
