"""Rules against torch autograd on ONNX Runtime in float32: at kinks, and where no float64 judge is.

The reference evaluator computes some operators in float32 (Gelu, GroupNormalization), knows some
for one rank only (LRN) or not at all (negative pads); ONNX has no float64 for some (Celu).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch.nn import functional

from dicom_xai.autodiff.emit import Graph
from dicom_xai.autodiff.rules import GRADIENT
from dicom_xai.errors import UnsupportedOperatorError
from tests.contract import test_vjp_rules
from tests.contract.vjp import Case, case, with_vjp

CLOSE = 1e-5
"""Relative to the largest value: float32 on both sides, operations in another order."""

Function = Callable[..., torch.Tensor]
RNG = np.random.default_rng(5)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


GAMMA, BETA = floats(4), floats(4)

SMOOTH: list[tuple[Case, Function]] = [
    (case("Gelu", (5, 4), opset=20), functional.gelu),
    (case("Celu", (5, 4), alpha=0.7), lambda x: functional.celu(x, 0.7)),
    (case("Cast", (5, 4), to=onnx.TensorProto.FLOAT16), lambda x: x.half()),
    (case("LpNormalization", (5, 3, 4), axis=1, p=1), lambda x: functional.normalize(x, 1, 1)),
    (case("LRN", (5, 6, 3, 2), size=3, alpha=0.3),
     lambda x: functional.local_response_norm(x, 3, 0.3)),
    (case("LRN", (5, 6, 7, 1), size=5, alpha=0.3, beta=0.5, bias=2.0),
     lambda x: functional.local_response_norm(x, 5, 0.3, 0.5, 2.0)),
    (case("GroupNormalization", (5, 4, 3), GAMMA, BETA, num_groups=2, opset=21),
     lambda x: functional.group_norm(x, 2, torch.tensor(GAMMA), torch.tensor(BETA))),
    (case("GroupNormalization", (5, 4, 3, 2, 2), GAMMA, BETA, num_groups=4, opset=21),
     lambda x: functional.group_norm(x, 4, torch.tensor(GAMMA), torch.tensor(BETA))),
    (case("MeanVarianceNormalization", (5, 3, 4, 5)),
     lambda x: (x - x.mean((0, 2, 3), keepdim=True))
     / x.std((0, 2, 3), correction=0, keepdim=True)),
    (case("Pad", (5, 4, 5), np.array([0, -1, 2, 0, 0, -2])),
     lambda x: functional.pad(x, (2, -2, -1, 0))),
]  # fmt: skip


ZERO = np.array([-1, -0.5, 0, 0.5, 1], np.float32)
TIES = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [2, 1, 2, 2], [-1, -1, -1, -1]], np.float32)

POOLS: dict[str, Function] = {
    "MaxPool": lambda x, k, s, p: functional.max_pool2d(x, k, s, p, ceil_mode=True),
    "AveragePool": lambda x, k, s, p: functional.avg_pool2d(
        x, k, s, p, ceil_mode=True, count_include_pad=False
    ),
}
WINDOWS = [([2, 2], [3, 3], [1, 1], (5, 8)), ([1, 2], [2, 3], [0, 1], (6, 8))]
"""Kernel, strides, padding and size; rounding up would lay a last window on padding alone."""

KINKS: list[tuple[Case, Function, tuple[np.ndarray, ...]]] = [
    (case("Relu", (5,)), torch.relu, (ZERO,)),
    (case("LeakyRelu", (5,), alpha=0.2), lambda x: functional.leaky_relu(x, 0.2), (ZERO,)),
    (case("PRelu", (5,), np.array([0.3], np.float32)),
     lambda x: functional.prelu(x, torch.tensor([0.3])), (ZERO,)),
    (case("Elu", (5,)), functional.elu, (ZERO,)),
    (case("Selu", (5,)), functional.selu, (ZERO,)),
    (case("Abs", (5,)), torch.abs, (ZERO,)),
    (case("Sign", (5,)), torch.sign, (ZERO,)),
    (case("Clip", (5,), np.float32(-0.5).reshape(()), np.float32(0.5).reshape(())),
     lambda x: functional.hardtanh(x, -0.5, 0.5), (ZERO,)),
    (case("HardSigmoid", (5,), alpha=1 / 6), functional.hardsigmoid, (ZERO * 3,)),
    (case("HardSwish", (5,)), functional.hardswish, (ZERO * 3,)),
    (case("ThresholdedRelu", (5,), alpha=0.5), lambda x: functional.threshold(x, 0.5, 0), (ZERO,)),
    (case("Max", (5,), (5,)), torch.maximum, (ZERO, np.abs(ZERO))),
    (case("Min", (5,), (5,)), torch.minimum, (ZERO, np.abs(ZERO))),
    (case("Pow", (5,), np.array(2, np.float32)), lambda x: x**2, (ZERO,)),
    (case("Pow", (5,), np.array(1, np.float32)), lambda x: x**1, (ZERO,)),
    (case("ReduceMax", (4, 4), np.array([1])), lambda x: x.amax(1, keepdim=True), (TIES,)),
    (case("ReduceMin", (4, 4), np.array([1])), lambda x: x.amin(1, keepdim=True), (TIES,)),
    (case("ReduceL2", (4, 4), np.array([1])), lambda x: x.norm(2, 1, True), (TIES,)),
    (case("ReduceL1", (4, 4), np.array([1])), lambda x: x.norm(1, 1, True), (TIES,)),
    (case("GlobalMaxPool", (1, 1, 4, 4)), lambda x: x.amax((2, 3), keepdim=True),
     (TIES.reshape(1, 1, 4, 4),)),
    *(
        (case("MaxPool", (1, 1, 4, 4), opset=opset, kernel_shape=[3, 3], strides=[2, 2],
              pads=[1, 1, 1, 1]),
         lambda x: functional.max_pool2d(x, 3, 2, 1), (TIES.reshape(1, 1, 4, 4),))
        for opset in (13, 18)
    ),
]  # fmt: skip


def assert_as_torch(item: Case, function: Function, feeds: dict[str, np.ndarray]) -> None:
    """Compare every input's cotangent with autograd's, for one random cotangent."""
    xs = [torch.tensor(value, requires_grad=True) for value in feeds.values()]
    y = function(*xs)
    seed = torch.tensor(RNG.standard_normal(tuple(y.shape)), dtype=y.dtype)
    y.backward(seed)
    whole = with_vjp(
        item.model(onnx.TensorProto.FLOAT, free_batch=False), f"y{item.used}", (None,) * y.ndim
    )
    session = onnxruntime.InferenceSession(whole.SerializeToString())
    found: list[Any] = session.run(None, {**feeds, "seed": seed.numpy()})
    for x, g in zip(xs, found, strict=True):
        wanted = np.zeros_like(g) if x.grad is None else x.grad.numpy()
        assert g.shape == wanted.shape
        assert np.abs(g - wanted).max() <= CLOSE * (1e-2 + np.abs(wanted).max())


@pytest.mark.parametrize(("item", "function"), SMOOTH, ids=lambda item: str(item)[:60])
def test_the_rule_is_that_of_autograd(item: Case, function: Function) -> None:
    assert_as_torch(item, function, item.feeds(np.float32))


@pytest.mark.parametrize("op_type", POOLS)
@pytest.mark.parametrize(("kernel", "strides", "pads", "size"), WINDOWS, ids=["padded", "bare"])
def test_a_window_that_would_start_behind_the_image_is_left_out_as_torch_leaves_it_out(
    kernel: list[int],
    strides: list[int],
    pads: list[int],
    size: tuple[int, ...],
    op_type: str,
) -> None:
    wanted = POOLS[op_type]
    windows = {"kernel_shape": kernel, "strides": strides, "pads": pads * 2, "ceil_mode": 1}
    item = case(op_type, (5, 2, *size), opset=22, **windows)
    assert_as_torch(item, lambda x: wanted(x, kernel, strides, pads), item.feeds(np.float32))
    for opset in (13, 18, 21):
        older = case(op_type, (5, 2, *size), opset=opset, **windows)
        with pytest.raises(UnsupportedOperatorError, match=f"opset {opset}.*ceil_mode"):
            Graph(older.model(onnx.TensorProto.FLOAT, free_batch=False))


@pytest.mark.parametrize(
    ("item", "function", "values"), KINKS, ids=[str(line[0])[:60] for line in KINKS]
)
def test_a_kink_is_taken_as_autograd_takes_it(
    item: Case, function: Function, values: tuple[np.ndarray, ...]
) -> None:
    names = [f"x{i}" for i, shape in enumerate(item.inputs) if isinstance(shape, tuple)]
    assert_as_torch(item, function, dict(zip(names, values, strict=True)))


def quantised(scale: np.ndarray, zero: np.ndarray, axis: int) -> onnx.ModelProto:
    """A value rounded to 8 bits, turned, and back."""
    make = helper.make_node
    nodes = [
        make("QuantizeLinear", ["x", "scale", "zero"], ["q"], axis=axis),
        make("Reshape", ["q", "shape"], ["turned"]),
        make("DequantizeLinear", ["turned", "scale", "zero"], ["y"], axis=axis),
    ]
    stored = [
        numpy_helper.from_array(scale, "scale"),
        numpy_helper.from_array(zero, "zero"),
        numpy_helper.from_array(np.array([5, 3, 2, 2]), "shape"),
    ]
    graph = helper.make_graph(
        nodes,
        "quantised",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [5, 3, 4])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [5, 3, 2, 2])],
        stored,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


@pytest.mark.parametrize("per_channel", [False, True])
def test_rounding_to_8_bits_is_passed_straight_through_and_clipping_stops(
    per_channel: bool,
) -> None:
    scale = np.array([0.01, 0.02, 0.1], np.float32)
    zero = np.array([3, 0, -7], np.int8)
    x = torch.tensor(3 * floats(5, 3, 4), requires_grad=True)
    seed = torch.tensor(floats(5, 3, 2, 2))
    if per_channel:
        y = torch.fake_quantize_per_channel_affine(
            x, torch.tensor(scale), torch.tensor(zero.astype(np.int32)), 1, -128, 127
        )
        model = quantised(scale, zero, 1)
    else:
        y = torch.fake_quantize_per_tensor_affine(x, 0.02, 3, -128, 127)
        model = quantised(np.float32(0.02), np.int8(3), 1)
    y.reshape(5, 3, 2, 2).backward(seed)
    whole = with_vjp(model, "y", (5, 3, 2, 2))
    session = onnxruntime.InferenceSession(whole.SerializeToString())
    (found,) = session.run(None, {"x": x.detach().numpy(), "seed": seed.numpy()})
    assert 0 < np.count_nonzero(found) < found.size
    assert np.abs(found - x.grad.numpy()).max() <= CLOSE


def test_every_rule_is_in_a_table() -> None:
    tested = {item.op_type for item in test_vjp_rules.CASES} | {line[0].op_type for line in SMOOTH}
    refused = {"LSTM", "GRU", "RNN"}
    assert set(GRADIENT) - tested == {"QuantizeLinear", "DequantizeLinear"} | refused
