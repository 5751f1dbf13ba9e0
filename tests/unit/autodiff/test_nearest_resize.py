"""Which input each output of a nearest Resize copies, before ONNX Runtime itself."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from dicom_xai.autodiff.rules.resample import nearest, positions
from tests.contract.vjp import case, with_vjp

WHERE = ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel", "half_pixel_symmetric"]
ROUNDED = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]


def resizing(where: str, rounded: str, by: str) -> onnxruntime.InferenceSession:
    """One Resize along the last axis, to a size or by a scale that is fed."""
    names = ["x", "", "", "sizes"] if by == "sizes" else ["x", "", "scales"]
    kind = TensorProto.INT64 if by == "sizes" else TensorProto.FLOAT
    value = helper.make_tensor_value_info
    node = helper.make_node(
        "Resize", names, ["y"], coordinate_transformation_mode=where, nearest_mode=rounded
    )
    inputs = [value("x", TensorProto.FLOAT, [1, 1, None]), value(by, kind, [3])]
    graph = helper.make_graph(
        [node], "one", inputs, [value("y", TensorProto.FLOAT, [None, None, None])]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


@pytest.mark.parametrize("by", ["sizes", "scales"])
@pytest.mark.parametrize("rounded", ROUNDED)
@pytest.mark.parametrize("where", WHERE)
def test_every_output_copies_the_input_that_the_runtime_copies(
    where: str, rounded: str, by: str
) -> None:
    session = resizing(where, rounded, by)
    wrong = []
    for size in range(2, 41):
        x = np.arange(size, dtype=np.float32)
        for given in range(2, 81) if by == "sizes" else np.arange(1, 41, dtype=np.float32) / 10:
            wanted = np.array([1, 1, given], np.int64 if by == "sizes" else np.float32)
            copied = session.run(None, {"x": x[None, None], by: wanted})[0].ravel()
            out = len(copied)
            if out in (0, size):  # nothing, or the input as it is
                continue
            at = positions(
                where, size, out, given / size if by == "sizes" else float(given), np.float32
            )
            if not np.array_equal(nearest(at, rounded, size), copied):
                wrong.append((size, given))
    assert not wrong


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_scales_that_change_no_size_change_nothing(mode: str) -> None:
    item = case("Resize", (2, 1, 8, 8), None, np.array([1, 1, 1.1, 1], np.float32), mode=mode)
    whole = with_vjp(item.model(TensorProto.FLOAT, free_batch=False), "y0", (2, 1, 8, 8))
    session = onnxruntime.InferenceSession(whole.SerializeToString())
    x, seed = np.random.default_rng(0).standard_normal((2, 2, 1, 8, 8)).astype(np.float32)
    (found,) = session.run(None, {"x0": x, "seed": seed})
    assert np.array_equal(found, seed)
