"""Models in 8 bits: explained straight through with a warning, or refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
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
