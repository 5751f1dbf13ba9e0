"""What has no right derivative is refused by name, with a remedy; never a wrong number."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from dicom_xai.autodiff.backward import pull_back
from dicom_xai.autodiff.emit import Graph
from dicom_xai.autodiff.rules import GRADIENT
from dicom_xai.errors import UnsupportedOperatorError
from tests.contract.vjp import Case, case, with_vjp

WEIGHTS = np.ones((3, 2, 3, 3))
INDEX = np.zeros((5, 2), np.int64)

REFUSED = [
    (case("LSTM", (5, 2, 3), np.ones((1, 16, 3)), np.ones((1, 16, 4)), hidden_size=4), "eigen-cam"),
    (case("GRU", (5, 2, 3), np.ones((1, 12, 3)), np.ones((1, 12, 4)), hidden_size=4), "unrolled"),
    (case("Einsum", (5, 5), equation="ii->i"), "diagonal"),
    (case("MaxPool", (5, 1, 6, 6), kernel_shape=[2, 2], storage_order=1, outputs=2), "column"),
    (case("Clip", (5, 3), (), np.array(1.0)), "input 1"),
    (case("Dropout", (5, 3), np.array(0.5), np.array(True)), "training mode"),
    (case("GatherElements", (5, 2), INDEX, opset=13), "opset 16"),
    (case("GatherND", (5, 2), np.zeros((5, 1), np.int64), batch_dims=1), "batch_dims"),
    (case("ScatterElements", (5, 2), INDEX, (5, 2), reduction="mul"), "mul"),
    (case("Resize", (5, 1, 4, 4), np.ones(8), np.array([1, 1, 2, 2], np.float32),
          coordinate_transformation_mode="tf_crop_and_resize"), "region of interest"),
    (case("BatchNormalization", (5, 3, 2), *[np.ones(3)] * 4, outputs=3, training_mode=1),
     "training mode"),
    (case("ConvTranspose", (5, 2, 5, 5), WEIGHTS[:2], strides=[2, 2], output_padding=[1, 1],
          output_shape=[11, 11]), "say pads instead"),
    (case("ConvTranspose", (5, 2, 5, 5), WEIGHTS[:2], strides=[2, 2], output_padding=[1, 1],
          auto_pad="SAME_UPPER"), "say pads instead"),
    (case("Det", (5, 3, 3)), "no rule"),
    (case("Hardmax", (5, 3)), "no rule"),
]  # fmt: skip


@pytest.mark.parametrize(("item", "remedy"), REFUSED, ids=[str(line[0])[:50] for line in REFUSED])
def test_an_operator_without_a_right_derivative_is_refused(item: Case, remedy: str) -> None:
    model = item.model(TensorProto.FLOAT, free_batch=False)
    with pytest.raises(UnsupportedOperatorError, match=remedy) as caught:
        with_vjp(model, "y0", ())
    assert (caught.value.node, caught.value.op_type) == ("it", item.op_type)
    assert caught.value.opset == item.opset


def test_a_branch_that_uses_the_image_from_outside_is_refused() -> None:
    value = helper.make_tensor_value_info
    branches = {
        f"{word}_branch": helper.make_graph(
            [helper.make_node(op_type, ["x"], [word])],
            word,
            [],
            [value(word, TensorProto.FLOAT, [5, 3])],
        )
        for word, op_type in (("then", "Relu"), ("else", "Neg"))
    }
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("If", ["switch"], ["y"], name="it", **branches)],
            "branching",
            [value("switch", TensorProto.BOOL, []), value("x", TensorProto.FLOAT, [5, 3])],
            [value("y", TensorProto.FLOAT, [5, 3])],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    with pytest.raises(UnsupportedOperatorError, match="control flow"):
        pulled(model, "y", "x")


def test_a_size_that_is_free_and_needed_is_refused() -> None:
    value = helper.make_tensor_value_info
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Conv", ["x", "w"], ["y"], name="it", strides=[2, 2])],
            "free",
            [value("x", TensorProto.FLOAT, ["batch", 2, "height", "width"])],
            [value("y", TensorProto.FLOAT, ["batch", 3, "h", "w"])],
            [onnx.numpy_helper.from_array(WEIGHTS.astype(np.float32), "w")],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    with pytest.raises(UnsupportedOperatorError, match="must be fixed"):
        pulled(model, "y", "x")


def test_a_product_of_integers_that_stand_for_reals_is_refused() -> None:
    value, make = helper.make_tensor_value_info, helper.make_node
    model = helper.make_model(
        helper.make_graph(
            [
                make("QuantizeLinear", ["x", "s"], ["q"]),
                make("MatMulInteger", ["q", "w"], ["i"], name="it"),
                make("Cast", ["i"], ["y"], to=TensorProto.FLOAT),
            ],
            "integers",
            [value("x", TensorProto.FLOAT, [5, 3])],
            [value("y", TensorProto.FLOAT, [5, 2])],
            [
                onnx.numpy_helper.from_array(np.array(0.1, np.float32), "s"),
                onnx.numpy_helper.from_array(np.ones((3, 2), np.uint8), "w"),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    with pytest.raises(UnsupportedOperatorError, match="MatMulInteger"):
        pulled(model, "y", "x")


def pulled(model: onnx.ModelProto, output: str, source: str) -> None:
    graph = Graph(model)
    seed = {output: graph.tensor(output)}
    pull_back(graph, model.graph.node, seed, [source], GRADIENT)
