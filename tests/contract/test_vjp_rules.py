"""Every rule against finite differences in float64, and ONNX Runtime against the reference.

A new operator is one line in `CASES`.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.contract.vjp import BATCH, Case, assert_is_derivative, case, with_vjp

N = BATCH
RNG = np.random.default_rng(3)

SINGLE = 1e-4
"""Relative to the largest value: the same nodes in float32 on another runtime."""


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape)


def positive(*shape: int) -> np.ndarray:
    return 0.5 + np.abs(floats(*shape))


ELEMENTWISE = [
    case("Add", (N, 3, 4), (3, 1)),
    case("Add", (N, 1, 4), (1, 3, 1)),
    case("Sub", (3,), (N, 3)),
    case("Mul", (N, 3, 4), (N, 1, 4)),
    case("Mul", (N, 3), ()),
    case("Div", (N, 3), (N, 1), low=0.5, high=3),
    case("Sum", (N, 3), (3,), (N, 1)),
    case("Mean", (N, 3), (3,), (N, 1)),
    case("Max", (N, 3), (3,), (N, 1)),
    case("Min", (N, 3), (N, 3)),
    case("Neg", (N, 3)),
    case("Pow", (N, 3), np.array(2.0)),
    case("Pow", (N, 3), np.array(3.0)),
    case("Pow", (N, 3), (3,), low=0.5, high=2),
    case("Sqrt", (N, 3), low=0.5),
    case("Reciprocal", (N, 3), low=0.5),
    case("Exp", (N, 3)),
    case("Log", (N, 3), low=0.5),
    case("Abs", (N, 3)),
    case("Erf", (N, 3)),
    case("Sin", (N, 3)),
    case("Cos", (N, 3)),
    case("Atan", (N, 3)),
    case("Where", np.array([True, False, True]), (N, 3), (1, 3)),
    case("Identity", (N, 3)),
    case("Dropout", (N, 3)),
    case("Floor", (N, 3)),
    case("Ceil", (N, 3)),
    case("Round", (N, 3)),
    case("Sign", (N, 3)),
]

ACTIVATIONS = [
    case("Relu", (N, 4)),
    case("LeakyRelu", (N, 4), alpha=0.2),
    case("LeakyRelu", (N, 4), alpha=-0.2),
    case("PRelu", (N, 3, 4), (3, 1)),
    case("PRelu", (N, 4), floats(1)),
    case("Elu", (N, 4), alpha=1.5),
    case("Selu", (N, 4)),
    case("Sigmoid", (N, 4)),
    case("Tanh", (N, 4)),
    case("Softplus", (N, 4)),
    case("Softsign", (N, 4)),
    case("HardSigmoid", (N, 4), low=-4, high=4),
    case("HardSwish", (N, 4), low=-5, high=5),
    case("Swish", (N, 4), opset=24),
    case("Swish", (N, 4), opset=24, alpha=1.7),
    case("Mish", (N, 4)),
    case("Gelu", (N, 4), opset=20, approximate="tanh"),
    case("ThresholdedRelu", (N, 4), alpha=0.7),
    case("Clip", (N, 4), np.array(-1.0), np.array(0.5)),
    case("Clip", (N, 4), None, np.array(0.5)),
    case("Softmax", (N, 3, 4)),
    case("Softmax", (N, 3, 4), axis=1),
    case("LogSoftmax", (N, 3, 4), axis=1),
]

PRODUCTS = [
    case("MatMul", (N, 3, 4), (4, 2)),
    case("MatMul", (N, 2, 3, 4), (2, 4, 2)),
    case("MatMul", (N, 1, 3, 4), (2, 4, 2)),
    case("MatMul", (3, 4), (N, 4, 2)),
    case("MatMul", (4,), (N, 4, 2)),
    case("MatMul", (N, 3, 4), (4,)),
    case("MatMul", (4,), (4,)),
    case("MatMul", (N, 4), (4,)),
    case("Gemm", (N, 4), (4, 3), (3,), alpha=0.5, beta=2.0),
    case("Gemm", (N, 4), (3, 4), (N, 1), transB=1),
    case("Gemm", (4, 3), (4, 2), transA=1),
    case("Gemm", (4, 3), (2, 4), (3, 2), transA=1, transB=1),
    case("Einsum", (N, 3, 4), (N, 4, 2), equation="bij,bjk->bik"),
    case("Einsum", (N, 3, 4), (4, 3), equation="bij,ji->b"),
    case("Einsum", (N, 2, 3, 4), (N, 2, 6, 4), equation="bhxd,bhyd->bhxy"),
    case("Einsum", (N, 3, 4), (N, 4, 2), equation="bij,bjk->bki"),
    case("Einsum", (3, 4), (2, 4), equation="ij,kj"),
    case("Einsum", (N, 3, 4), equation="bij->bj"),
    case("Einsum", (N, 3), (N, 4), equation="bi,bj"),
    case("Einsum", (N, 2, 3, 4), equation="...ij->...ji"),
    case("Einsum", (N, 2, 3), (1, 2, 3, 4), equation="...i,...ij->...j"),
    case("Einsum", (N, 1, 3), (2, 3), equation="b...i,...i"),
    case("Conv", (N, 2, 9), floats(3, 2, 3), floats(3), pads=[1, 1]),
    case("Conv", (N, 2, 9, 8), floats(3, 2, 3, 3), floats(3), pads=[1, 1, 1, 1]),
    case("Conv", (N, 2, 9, 8), floats(3, 2, 3, 3), (3,), strides=[2, 3], pads=[1, 0, 1, 0]),
    case("Conv", (N, 2, 9, 8), floats(3, 2, 3, 3), dilations=[2, 1], pads=[2, 1, 2, 1]),
    case("Conv", (N, 2, 9, 8), floats(3, 2, 3, 3), strides=[3, 2], dilations=[2, 2]),
    case("Conv", (N, 4, 7, 8), floats(6, 2, 3, 3), group=2, pads=[1, 1, 1, 1]),
    case("Conv", (N, 4, 7, 8), floats(4, 1, 3, 3), group=4, strides=[2, 2], pads=[1, 1, 1, 1]),
    case("Conv", (N, 2, 7, 8), floats(3, 2, 3, 3), pads=[0, 1, 2, 1]),
    case("Conv", (N, 2, 7, 8), floats(3, 2, 3, 3), strides=[2, 2], pads=[0, 1, 2, 1]),
    case("Conv", (N, 2, 7, 8), floats(3, 2, 3, 3), strides=[2, 2], auto_pad="SAME_UPPER"),
    case("Conv", (N, 2, 7, 8), floats(3, 2, 3, 3), strides=[2, 2], auto_pad="SAME_LOWER"),
    case("Conv", (N, 2, 7, 8), floats(3, 2, 2, 2), auto_pad="SAME_UPPER"),
    case("Conv", (N, 2, 7, 8), floats(3, 2, 3, 3), strides=[2, 2], auto_pad="VALID"),
    case("Conv", (N, 2, 5, 5), floats(3, 2, 1, 1), pads=[1, 1, 1, 1]),
    case("Conv", (N, 2, 5, 5), floats(3, 2, 1, 1), strides=[3, 3], pads=[2, 2, 2, 2]),
    case("Conv", (N, 1, 5, 6, 7), floats(2, 1, 3, 3, 3), strides=[2, 1, 2], pads=[1] * 6),
    case("Conv", (N, 2, 4, 5, 4), floats(2, 1, 3, 3, 3), group=2, pads=[1] * 6),
    case("Conv", (N, 2, 6), (3, 2, 3)),
    case("Conv", (N, 2, 6, 5), (3, 2, 3, 3), pads=[1, 1, 1, 1]),
    case("Conv", (N, 2, 8, 7), (3, 2, 3, 2), strides=[2, 3], dilations=[2, 1], pads=[1, 0, 2, 1]),
    case("Conv", (N, 4, 6, 5), (6, 2, 3, 3), group=2, pads=[0, 1, 2, 1]),
    case("Conv", (N, 4, 6, 5), (4, 1, 3, 3), group=4, strides=[2, 2], auto_pad="SAME_UPPER"),
    case("ConvTranspose", (N, 2, 3, 4), (2, 3, 3, 2), strides=[2, 3], pads=[1, 0, 1, 0]),
    case("ConvTranspose", (N, 4, 3, 4), (4, 1, 2, 2), group=4, strides=[2, 2],
         output_padding=[1, 1]),
    case("ConvTranspose", (N, 2, 5), floats(2, 3, 3), strides=[2], pads=[1, 1]),
    case("ConvTranspose", (N, 2, 5, 4), floats(2, 3, 3, 3), (3,), strides=[2, 3]),
    case("ConvTranspose", (N, 2, 4, 4), floats(2, 3, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1],
         output_padding=[1, 1]),
    case("ConvTranspose", (N, 2, 4, 4), floats(2, 3, 2, 2), strides=[2, 2], output_padding=[1, 1]),
    case("ConvTranspose", (N, 2, 4, 4), floats(2, 3, 3, 3), dilations=[2, 1]),
    case("ConvTranspose", (N, 2, 4, 4), floats(2, 3, 3, 3), pads=[0, 1, 2, 1]),
    case("ConvTranspose", (N, 1, 3, 4, 3), floats(1, 2, 2, 2, 2), strides=[2, 2, 2]),
    case("ConvTranspose", (N, 2, 5, 4), floats(2, 3, 3, 3), strides=[2, 2], auto_pad="SAME_UPPER"),
    case("ConvTranspose", (N, 2, 5, 4), floats(2, 3, 3, 3), strides=[2, 2], auto_pad="SAME_LOWER"),
    case("Conv", (N, 16, 9, 8), floats(3, 16, 3, 3), dilations=[2, 1], pads=[0, 1, 2, 1]),
]  # fmt: skip

POOLINGS = [
    case("MaxPool", (N, 2, 9), kernel_shape=[3], strides=[2], pads=[1, 1]),
    case("MaxPool", (N, 2, 9, 8), kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    case("MaxPool", (N, 2, 9, 8), kernel_shape=[2, 2], strides=[2, 2]),
    case("MaxPool", (N, 2, 9, 8), kernel_shape=[3, 2], strides=[2, 3], ceil_mode=1),
    case("MaxPool", (N, 2, 9, 8), kernel_shape=[2, 2], dilations=[2, 3]),
    case("MaxPool", (N, 1, 5, 6, 5), kernel_shape=[3, 2, 3], strides=[2, 2, 2]),
    case("MaxPool", (N, 2, 9), opset=13, kernel_shape=[3], strides=[2], pads=[1, 1]),
    case("MaxPool", (N, 2, 9, 8), opset=13, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4),
    case("MaxPool", (N, 2, 9, 8), opset=13, kernel_shape=[3, 2], strides=[2, 3], ceil_mode=1),
    case("MaxPool", (N, 2, 9, 8), opset=13, kernel_shape=[2, 2], dilations=[2, 3]),
    case("MaxPool", (N, 1, 5, 6, 5), opset=13, kernel_shape=[3, 2, 3], strides=[2, 2, 2]),
    case("MaxPool", (N, 2, 9, 8), kernel_shape=[3, 2], strides=[2, 2], auto_pad="SAME_UPPER"),
    case("MaxPool", (N, 2, 9, 8), opset=13, kernel_shape=[3, 2], strides=[2, 2],
         auto_pad="SAME_UPPER"),
    case("AveragePool", (N, 2, 9), kernel_shape=[3], strides=[2], pads=[1, 1]),
    case("AveragePool", (N, 2, 8, 6), kernel_shape=[2, 3], strides=[2, 3]),
    case("AveragePool", (N, 2, 9, 8), kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    case("AveragePool", (N, 2, 9, 8), kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1],
         count_include_pad=1),
    case("AveragePool", (N, 2, 9, 8), kernel_shape=[3, 2], strides=[2, 3], ceil_mode=1),
    case("AveragePool", (N, 2, 8, 8), kernel_shape=[3, 3], strides=[1, 1], pads=[1, 1, 1, 1]),
    case("AveragePool", (N, 2, 8, 7), kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"),
    case("AveragePool", (N, 1, 5, 6, 4), kernel_shape=[2, 2, 2], strides=[2, 2, 2]),
    case("AveragePool", (N, 1, 7, 6, 8), kernel_shape=[3, 2, 3], strides=[2] * 3,
         pads=[1, 0, 1, 1, 1, 1]),
    case("AveragePool", (N, 2, 8, 9), kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4,
         ceil_mode=1, count_include_pad=1),
    case("AveragePool", (N, 2, 9, 10), opset=19, kernel_shape=[3, 2], dilations=[2, 3]),
    case("GlobalAveragePool", (N, 3, 4, 5)),
    case("GlobalMaxPool", (N, 3, 4, 5)),
]  # fmt: skip

REDUCTIONS = [
    case("ReduceSum", (N, 3, 4), ints(1), keepdims=0),
    case("ReduceSum", (N, 3, 4), ints(-1, 1)),
    case("ReduceSum", (N, 3, 4)),
    case("ReduceSum", (N, 3), ints(), noop_with_empty_axes=1),
    case("ReduceMean", (N, 3, 4), opset=13, axes=[1, 2], keepdims=0),
    case("ReduceMean", (N, 3, 4), ints(0, 2)),
    case("ReduceMax", (N, 3, 4), ints(1)),
    case("ReduceMax", (N, 3, 4), opset=13, axes=[2], keepdims=0),
    case("ReduceMin", (N, 3, 4), ints(2), keepdims=0),
    case("ReduceL1", (N, 3, 4), ints(1)),
    case("ReduceL2", (N, 3, 4), ints(1), keepdims=0),
    case("ReduceSumSquare", (N, 3, 4), ints(2)),
    case("ReduceLogSumExp", (N, 3, 4), ints(2), keepdims=0),
    case("ReduceLogSum", (N, 3, 4), ints(2), low=0.5),
]

LAYOUTS = [
    case("Reshape", (N, 3, 4), ints(0, -1)),
    case("Reshape", (N, 3, 4), ints(-1, 2, 6)),
    case("Flatten", (N, 3, 4)),
    case("Squeeze", (N, 1, 4, 1), ints(1, 3)),
    case("Unsqueeze", (N, 3), ints(0, 2)),
    case("Transpose", (N, 3, 4), perm=[1, 2, 0]),
    case("Transpose", (N, 3)),
    case("Expand", (N, 1, 4), ints(2, 1, 3, 1)),
    case("Tile", (N, 3), ints(2, 3)),
    case("Concat", (N, 2, 3), (N, 1, 3), (N, 4, 3), axis=1),
    case("Concat", (N, 2), (N, 3), axis=-1),
    case("Split", (N, 5), ints(2, 3), outputs=2, used=1, axis=1),
    case("Split", (N, 6), outputs=3, used=0, axis=-1, num_outputs=3),
    case("Slice", (N, 7), ints(1), ints(6), ints(1), ints(2)),
    case("Slice", (N, 7, 6), ints(1, -4), ints(5, 2**62), ints(1, 2)),
    case("Slice", (N, 7), ints(-1), ints(-(2**62)), ints(1), ints(-2)),
    case("Slice", (N, 7), ints(5), ints(1), ints(-1), ints(-1)),
    case("Slice", (N, 6), ints(0), ints(2**62), ints(0)),
    case("DepthToSpace", (N, 8, 3, 2), blocksize=2),
    case("DepthToSpace", (N, 8, 3, 2), blocksize=2, mode="CRD"),
    case("SpaceToDepth", (N, 2, 4, 6), blocksize=2),
    case("Trilu", (N, 4, 4), upper=0),
    case("Trilu", (N, 4, 4), ints(1).reshape(())),
    case("CumSum", (N, 4), ints(1).reshape(())),
    case("CumSum", (N, 4), ints(1).reshape(()), exclusive=1, reverse=1),
]

NORMS = [
    case("BatchNormalization", (N, 3, 4), floats(3), floats(3), floats(3), positive(3)),
    case("BatchNormalization", (N, 3), floats(3), floats(3), floats(3), positive(3), epsilon=0.1),
    case("LayerNormalization", (N, 3, 4), floats(4), floats(4)),
    case("LayerNormalization", (N, 3, 4), floats(3, 4), axis=1, epsilon=0.1),
    case("InstanceNormalization", (N, 3, 4, 2), floats(3), floats(3)),
    case("RMSNormalization", (N, 3, 4), floats(4), opset=23),
    case("LpNormalization", (N, 3, 4), axis=1),
]

INDEXING = [
    case("Gather", (N, 4, 3), ints(2).reshape(()), axis=1),
    case("Gather", (N, 4, 3), ints(1, 2), axis=1),
    case("Gather", (N, 5, 3), ints(4, 2, 0), axis=1),
    case("Gather", (N, 4, 3), ints(3, 0, 3, -1), axis=1),
    case("Gather", (N, 4), ints(3, 0, 3, 1).reshape(2, 2), axis=-1),
    case("GatherElements", (3, 4), ints(0, 1, 1, 2, 0, 0, 1, 2).reshape(2, 4), axis=0),
    case("GatherND", (3, 4), ints(0, 1, 2, 3, 0, 1).reshape(3, 2)),
    case("ScatterElements", (3, 4), ints(0, 2, 1, 3, 0, 1).reshape(3, 2), (3, 2), axis=1),
    case(
        "ScatterElements",
        (3, 2),
        ints(1, 1, 0, 0, 0, 1).reshape(3, 2),
        (3, 2),
        axis=1,
        reduction="add",
    ),
    case("ScatterND", (3, 4), ints(0, 2).reshape(2, 1), (2, 4)),
    case("ScatterND", (3, 4), ints(2, 2).reshape(2, 1), (2, 4), reduction="add"),
    case("TopK", (N, 6), ints(3), outputs=2, axis=1),
    case("TopK", (N, 6), ints(2), outputs=2, axis=-1, largest=0),
]

RESAMPLING = [
    case("Pad", (N, 4, 5), ints(0, 1, 2, 0, 0, 3), np.array(0.5)),
    case("Pad", (N, 4, 5), ints(0, 1, 2, 0, 0, 3), mode="reflect"),
    case("Pad", (N, 4, 5), ints(0, 1, 2, 0, 0, 3), mode="edge"),
    case("Pad", (N, 4, 5), ints(1, 2), None, ints(2), mode="edge"),
    case("Pad", (N, 4, 5), ints(0, 1, 2, 0, 0, 3), mode="wrap", opset=19),
    *(
        case("Resize", (N, 1, 4, 5), None, None, ints(*sizes), mode=mode, axes=[2, 3],
             coordinate_transformation_mode=where)
        for sizes in [(8, 10), (6, 3)]
        for mode in ("nearest", "linear", "cubic")
        for where in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
    ),
    *(
        case("Resize", (N, 1, 4, 5), None, np.array([1, 1, 0.6, 2.3], np.float32), mode=mode,
             coordinate_transformation_mode=where)
        for mode in ("nearest", "linear")
        for where in ("half_pixel", "half_pixel_symmetric")
    ),
    *(
        case("Resize", (N, 1, 5, 4), None, np.array([1, 1, 1.5, 1.5], np.float32),
             nearest_mode=mode, coordinate_transformation_mode="asymmetric")
        for mode in ("floor", "ceil", "round_prefer_ceil", "round_prefer_floor")
    ),
    case("Resize", (N, 1, 6, 7), None, None, ints(3, 4), axes=[2, 3], mode="cubic",
         exclude_outside=1),
    case("Resize", (N, 1, 8, 9), None, None, ints(3, 4), axes=[2, 3], mode="linear", antialias=1),
    case("Resize", (N, 1, 8, 9), None, None, ints(3, 4), axes=[2, 3], mode="cubic", antialias=1),
    case("Resize", (N, 1, 4, 5), None, None, ints(8, 8), axes=[2, 3], mode="linear",
         keep_aspect_ratio_policy="not_larger"),
    case("Resize", (N, 1, 4, 5), None, None, ints(8, 8), axes=[2, 3], mode="linear",
         keep_aspect_ratio_policy="not_smaller"),
    case("Resize", (N, 2, 3), None, np.array([1, 1, 3], np.float32), mode="nearest"),
    case("Resize", (N, 1, 2, 3, 2), None, np.array([1, 1, 2, 2, 3], np.float32), mode="linear"),
]  # fmt: skip

EXPANDED = [
    case("Shrink", (N, 6), lambd=0.5, bias=0.2),
]

CASES = [
    *ELEMENTWISE, *ACTIVATIONS, *PRODUCTS, *POOLINGS, *REDUCTIONS, *LAYOUTS, *NORMS, *INDEXING,
    *RESAMPLING, *EXPANDED,
]  # fmt: skip


@pytest.mark.parametrize("free_batch", [False, True], ids=["fixed", "free"])
@pytest.mark.parametrize("item", CASES, ids=str)
def test_the_rule_is_the_derivative(item: Case, free_batch: bool) -> None:
    assert_is_derivative(item, free_batch=free_batch)


@pytest.mark.parametrize("item", CASES, ids=str)
def test_onnx_runtime_computes_the_same(item: Case) -> None:
    _, wanted = assert_is_derivative(item, free_batch=item.has_batch)
    single = item.model(onnx.TensorProto.FLOAT, free_batch=item.has_batch)
    whole = with_vjp(single, f"y{item.used}", (None,) * wanted["seed"].ndim)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(whole.SerializeToString(), options)
    feeds = {name: wanted[name].astype(np.float32) for name in [*item.feeds(), "seed"]}
    names = [output.name for output in session.get_outputs()]
    for name, found in zip(names, session.run(None, feeds), strict=True):
        assert np.abs(found - wanted[name]).max() <= SINGLE * (1e-3 + np.abs(wanted[name]).max())
