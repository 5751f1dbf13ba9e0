"""Models that ONNX Runtime has optimised and saved are explained like the originals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers import optimizer
from torch import nn

from dicom_xai.autodiff import compile
from dicom_xai.autodiff.contrib import BODIES, DOMAIN
from dicom_xai.errors import UnsupportedOperatorError
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


def test_an_operator_that_the_opset_does_not_have_yet_is_refused_by_name(tmp_path: Path) -> None:
    plain = exported(seeded(ViT()), image(2, 1, 32, 32), "torchscript", 13)
    with pytest.raises(UnsupportedOperatorError, match="save the model at a later one") as caught:
        compile(optimised(plain, tmp_path / "optimised.onnx"), "saliency")
    assert (caught.value.op_type, caught.value.opset) == ("LayerNormalization", 13)


def test_a_leaky_fused_convolution_is_explained(tmp_path: Path) -> None:
    network, x = seeded(DynUNet()), image(2, 1, 16, 16)
    plain = optimised(exported(network, x, "torchscript", 17), tmp_path / "optimised.onnx")
    picture = x.clone().requires_grad_()
    y = network(picture)
    (y[:, 1] * (y.argmax(1) == 1)).sum().backward()
    found = run(compile(plain, "saliency").model, x, target=[1, 1])
    assert_close(found["attribution"], picture.grad.abs())


@pytest.mark.parametrize("method", ["guided-backpropagation", "lrp"])
def test_what_a_fused_operator_is_made_of_is_refused_under_its_own_name(
    method: str, tmp_path: Path
) -> None:
    network, x = seeded(ViT()), image(2, 1, 32, 32)
    plain = optimised(exported(network, x, "torchscript", 20), tmp_path / "optimised.onnx")
    with pytest.raises(UnsupportedOperatorError, match="use ") as caught:
        compile(plain, method)
    assert (caught.value.node, caught.value.op_type) in {
        (node.name, node.op_type) for node in plain.graph.node
    }


def by_transformer_tool(network: nn.Module, x: torch.Tensor, path: Path) -> onnx.ModelProto:
    """The model as ONNX Runtime's own tool for transformers saves it."""
    onnx.save(exported(network, x, "torchscript", 17), path)
    tool = optimizer.optimize_model(str(path), "vit", num_heads=4, hidden_size=24, opt_level=0)
    tool.save_model_to_file(str(path))
    return onnx.load(path)


@pytest.mark.parametrize("method", ["saliency", "grad-cam", "hires-cam", "attn-lrp"])
def test_a_model_by_the_transformer_tool_is_explained_like_the_original(
    method: str, tmp_path: Path
) -> None:
    network, x = seeded(ViT()), image(2, 1, 32, 32)
    plain = by_transformer_tool(network, x, tmp_path / "optimised.onnx")
    fused = {node.op_type for node in plain.graph.node if node.domain == DOMAIN}
    assert fused == {"SkipLayerNormalization", "BiasGelu"}
    wanted = run(compile(exported(network, x, "torchscript", 17), method).model, x, target=TARGET)
    found = run(compile(plain, method).model, x, target=TARGET)
    assert_close(found["attribution"], wanted["attribution"])
    assert np.array_equal(found["scores"], run(plain, x)["scores"])


def with_fused_attention(plain: onnx.ModelProto, op_type: str) -> onnx.ModelProto:
    """The model with each attention as one node of ONNX Runtime, its products before it or in it.

    The exported pattern is ``qkv + bias``, reshaped and turned, three picks, two products.
    """
    fused = onnx.ModelProto()
    fused.CopyFrom(plain)
    graph = fused.graph
    makers = {name: node for node in graph.node for name in node.output}

    def back(name: str, *op_types: str) -> onnx.NodeProto:
        node = makers[name]
        while node.op_type not in op_types:
            node = makers[node.input[0]]
        return node

    for count, last in enumerate(n for n in list(graph.node) if n.op_type == "Softmax"):
        product = next(n for n in graph.node if last.output[0] in n.input)
        turned = next(n for n in graph.node if product.output[0] in n.input)
        joined = next(n for n in graph.node if turned.output[0] in n.input)
        whole = back(product.input[1], "Add")
        weights = next(name for name in whole.input if name in makers)
        bias = next(name for name in whole.input if name not in makers)
        if op_type == "Attention":
            inputs = [*makers[weights].input, bias]
        else:
            pieces = [f"{word}{count}" for word in "qkv"]
            graph.initializer.append(
                numpy_helper.from_array(np.array([24, 24, 24], np.int64), f"sizes{count}")
            )
            cut = helper.make_node("Split", [weights, f"sizes{count}"], pieces, axis=2)
            graph.node.insert(list(graph.node).index(joined), cut)
            inputs = [*pieces, bias]
        whole_node = helper.make_node(
            op_type, inputs, joined.output, domain=DOMAIN, name=f"fused{count}", num_heads=4
        )
        graph.node[list(graph.node).index(joined)].CopyFrom(whole_node)
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if not needed.isdisjoint(node.output):
            needed.update(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    fused.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return fused


@pytest.mark.parametrize("op_type", ["Attention", "MultiHeadAttention"])
@pytest.mark.parametrize(
    "method", ["saliency", "grad-cam", "attn-lrp", "gradient-attention-rollout"]
)
def test_a_fused_attention_is_explained_like_its_parts(op_type: str, method: str) -> None:
    network, x = seeded(ViT()), image(2, 1, 32, 32)
    parts = exported(network, x, "torchscript", 17)
    plain = with_fused_attention(parts, op_type)
    assert [n.op_type for n in plain.graph.node if n.domain == DOMAIN] == [op_type] * 2
    assert not any(node.op_type == "Softmax" for node in plain.graph.node)
    wanted = run(compile(parts, method).model, x, target=TARGET)["attribution"]
    found = run(compile(plain, method).model, x, target=TARGET)
    assert_close(found["attribution"], wanted)
    assert np.array_equal(found["scores"], run(plain, x)["scores"])


W, B, SQUARE = (np.random.default_rng(i).standard_normal(s).astype(np.float32) for i, s in
                enumerate([(4, 3), (4,), (4, 4)]))  # fmt: skip

WIDE, KEY, BESIDE = (np.random.default_rng(i).standard_normal(s).astype(np.float32) for i, s in
                     enumerate([(4, 12), (1, 2, 4), (1, 2, 2, 2)]))  # fmt: skip

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
    "Attention": ([WIDE, WIDE[0], None, None, BESIDE], {"num_heads": 2}),
    "Attention ": ([WIDE], {"num_heads": 2, "scale": 0.3}),
    "MultiHeadAttention": ([KEY, KEY[:, ::-1], WIDE[1]], {"num_heads": 2}),
    "MultiHeadAttention ": ([KEY, KEY, None, None, BESIDE], {"num_heads": 2, "scale": 0.3}),
    "SkipLayerNormalization": ([SQUARE[None, :2], B, B, B], {"epsilon": 1e-5}),
}


@pytest.mark.parametrize("name", SINGLE)
def test_a_fused_operator_s_derivative_is_that_of_differences(name: str) -> None:
    constants, attributes = SINGLE[name]
    names = ["" if c is None else f"c{index}" for index, c in enumerate(constants)]
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
            [
                numpy_helper.from_array(np.ascontiguousarray(c), n)
                for n, c in zip(names, constants, strict=True)
                if c is not None
            ],
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


@pytest.mark.parametrize(
    ("op_type", "constants", "attributes"),
    [
        ("Attention", [WIDE], {"num_heads": 2, "unidirectional": 1}),
        ("MultiHeadAttention", [KEY, KEY], {"num_heads": 2, "unidirectional": 1}),
        ("FusedMatMul", [W], {"transBatchA": 1}),
    ],
)
def test_a_form_of_a_fused_operator_that_is_not_known_is_refused_by_name(
    op_type: str, constants: list[np.ndarray], attributes: dict[str, object]
) -> None:
    names = [f"c{index}" for index in range(len(constants))]
    nodes = [
        helper.make_node(op_type, ["x", *names], ["h"], name="it", domain=DOMAIN, **attributes),
        helper.make_node("Identity", ["h"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    model = helper.make_model(
        helper.make_graph(
            nodes, "one", [value("x", TensorProto.FLOAT, [1, 2, 4])],
            [value("y", TensorProto.FLOAT, [1, 2, 4])],
            [numpy_helper.from_array(c, n) for n, c in zip(names, constants, strict=True)],
        ),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)],
        ir_version=8,
    )  # fmt: skip
    with pytest.raises(UnsupportedOperatorError, match="form") as caught:
        compile(model, "saliency")
    assert (caught.value.op_type, caught.value.node) == (op_type, "it")


def test_every_fused_operator_is_tested() -> None:
    assert set(BODIES) == {name.strip() for name in SINGLE} | {"FusedConv"}
