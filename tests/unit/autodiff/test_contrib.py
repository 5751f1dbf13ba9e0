"""Models that ONNX Runtime has optimised and saved are explained like the originals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from dicom_xai.autodiff import compile
from dicom_xai.autodiff.contrib import BODIES, DOMAIN
from tests.contract.vjp import with_vjp
from tests.make.networks import DynUNet, ResNet, ViT, exported, image, seeded
from tests.unit.autodiff.test_methods import TARGET, assert_close, input_gradient, run


def optimised(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The model as ONNX Runtime saves it with its fusions, layouts aside."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(model.SerializeToString(), options)
    return onnx.load(path)


@pytest.mark.parametrize(
    ("make", "fused"),
    [
        (ResNet, {"FusedConv"}),
        (ViT, {"BiasGelu"}),
    ],
)
def test_an_optimised_model_is_explained_like_the_original(
    make: type[nn.Module], fused: set[str], tmp_path: Path
) -> None:
    network, x = seeded(make()), image(2, 1, 32, 32)
    plain = optimised(exported(network, x, "torchscript", 20), tmp_path / "optimised.onnx")
    assert fused <= {node.op_type for node in plain.graph.node if node.domain == DOMAIN}
    found = run(compile(plain, "saliency").model, x, target=TARGET)
    assert_close(found["attribution"], input_gradient(network, x).abs())
    assert np.array_equal(found["scores"], run(plain, x)["scores"])


def test_a_leaky_fused_convolution_is_explained(tmp_path: Path) -> None:
    network, x = seeded(DynUNet()), image(2, 1, 16, 16)
    plain = optimised(exported(network, x, "torchscript", 17), tmp_path / "optimised.onnx")
    picture = x.clone().requires_grad_()
    y = network(picture)
    (y[:, 1] * (y.argmax(1) == 1)).sum().backward()
    found = run(compile(plain, "saliency").model, x, target=[1, 1])
    assert_close(found["attribution"], picture.grad.abs())


W, B, SQUARE = (np.random.default_rng(i).standard_normal(s).astype(np.float32) for i, s in
                enumerate([(4, 3), (4,), (4, 4)]))  # fmt: skip

SINGLE = {
    "Gelu": ([], {}),
    "BiasGelu": ([B], {}),
    "FastGelu": ([B], {}),
    "QuickGelu": ([], {"alpha": 1.5}),
    "FusedMatMul": ([W], {"alpha": 0.5}),
    "FusedMatMul ": ([np.ascontiguousarray(W.T)], {"transB": 1}),
    "FusedMatMul  ": ([np.ascontiguousarray(W[:2])], {"transA": 1}),
    "FusedGemm": ([W, B[:3]], {"activation": "Relu"}),
    "FusedGemm ": ([W], {"activation": "LeakyRelu", "activation_alpha": 0.3}),
    "SkipLayerNormalization": ([SQUARE[None, :2], B, B, B], {"epsilon": 1e-5}),
}


@pytest.mark.parametrize("name", SINGLE)
def test_a_fused_operator_s_derivative_is_that_of_differences(name: str) -> None:
    constants, attributes = SINGLE[name]
    names = [f"c{index}" for index in range(len(constants))]
    node = helper.make_node(
        name.strip(), ["x", *names], ["y"], name="it", domain=DOMAIN, **attributes
    )
    shape = [2, 4] if "Gemm" in name else [1, 2, 4]
    model = helper.make_model(
        helper.make_graph(
            [node],
            "one",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(c, n) for n, c in zip(names, constants, strict=True)],
        ),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)],
        ir_version=8,
    )
    rng = np.random.default_rng(3)
    x = rng.standard_normal(shape).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    y = session.run(None, {"x": x})[0]
    seed = rng.standard_normal(y.shape).astype(np.float32)
    whole = onnxruntime.InferenceSession(with_vjp(model, "y", y.shape).SerializeToString())
    (g,) = whole.run(None, {"x": x, "seed": seed})
    direction = rng.standard_normal(shape).astype(np.float32)
    step = 1e-2
    ends = [session.run(None, {"x": x + sign * step * direction})[0] for sign in (1, -1)]
    wanted = ((ends[0] - ends[1]) * seed).sum() / (2 * step)
    # Float32 differences: rounding 1e-5 relative to the step, truncation of the same order.
    assert abs((g * direction).sum() - wanted) <= 2e-3 * np.abs(g * direction).sum()


def test_every_fused_operator_is_tested() -> None:
    assert set(BODIES) == {name.strip() for name in SINGLE} | {"FusedConv"}
