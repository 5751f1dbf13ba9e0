"""Exported networks: the input gradient against torch autograd, the prediction bit for bit.

Each network meets two exports, each export several networks; FULL_GRID=1 runs them all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from torch import nn

from dicom_xai.autodiff.backward import pull_back
from dicom_xai.autodiff.emit import Graph
from dicom_xai.autodiff.rules import GRADIENT
from tests.make import networks
from tests.make.networks import exported, image, seeded

CLOSE = 1e-4
"""Relative to the largest value: float32, and a forward that rounds otherwise than torch's."""

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (networks.ResNet, (33, 33)),
    "resnet-3d": (lambda: networks.ResNet(3), (17, 17, 17)),
    "densenet": (networks.DenseNet, (32, 32)),
    "densenet-3d": (lambda: networks.DenseNet(3), (16, 16, 16)),
    "efficientnet": (networks.EfficientNet, (32, 32)),
    "convnext": (networks.ConvNeXt, (32, 32)),
    "vit": (networks.ViT, (32, 32)),
    "vit-fused": (lambda: networks.ViT(fused=True), (32, 32)),
    "swin": (networks.Swin, (32, 32)),
    "unet": (networks.UNet, (32, 32)),
    "unet-3d": (lambda: networks.UNet(3), (16, 16, 16)),
    "segresnet": (networks.SegResNet, (16, 16)),
    "segresnet-3d": (lambda: networks.SegResNet(3), (8, 8, 8)),
    "dynunet": (networks.DynUNet, (16, 16)),
    "unetr": (networks.UNETR, (32, 32)),
}

EXPORTS = [
    ("torchscript", 13), ("torchscript", 17), ("torchscript", 20),
    ("dynamo", 18), ("dynamo", 20), ("dynamo", 21), ("dynamo", 23),
]  # fmt: skip

IMPOSSIBLE = {("vit-fused", ("torchscript", 13))}
"""The old exporter has no fused attention at opset 13."""

GRID = [(n, e) for n in NETWORKS for e in EXPORTS if (n, e) not in IMPOSSIBLE]
PAIRS = [
    (name, EXPORTS[(2 * index + step) % len(EXPORTS)])
    for index, name in enumerate(NETWORKS)
    for step in (0, 3)
]
"""Two exports per network, so that every export meets several networks of each kind."""

CASES = [pair for pair in GRID if "FULL_GRID" in os.environ or pair in PAIRS]


@cache
def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network and two images for it."""
    make, size = NETWORKS[name]
    return seeded(make()), image(2, 1, *size)


def assert_gradient(name: str, exporter: str, opset: int) -> None:
    """Compare one export's compiled gradient and prediction with torch and the plain session."""
    model, picture = network(name)
    x = picture.clone().requires_grad_()
    y = model(x)
    seed = image(*y.shape, seed=1)
    (y * seed).sum().backward()
    plain = exported(model, picture, exporter, opset)
    whole = with_gradient(plain)
    feeds = {"image": picture.numpy(), "seed": seed.numpy()}
    prediction, g = run(whole, feeds)
    assert np.abs(g - x.grad.numpy()).max() <= CLOSE * x.grad.abs().max().item()
    assert np.array_equal(prediction, run(plain, {"image": feeds["image"]})[0])


def with_gradient(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with a cotangent input and the image's gradient as last output."""
    graph = Graph(model)
    end, first = model.graph.output[0], model.graph.input[0]
    shapes = [tuple(size or 0 for size in shape or ()) for shape in graph.facts.shapes(end.name)]
    graph.facts.add_input("seed", onnx.TensorProto.FLOAT, shapes)
    seed = {end.name: graph.tensor("seed")}
    found = pull_back(graph, graph.forward, seed, [first.name], GRADIENT)[first.name]
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    whole.graph.node.extend(graph.nodes)
    whole.graph.initializer.extend(graph.initializers)
    value = helper.make_tensor_value_info
    whole.graph.input.append(value("seed", onnx.TensorProto.FLOAT, [None] * len(shapes[0])))
    whole.graph.output.append(value(found.name, onnx.TensorProto.FLOAT, [None] * found.rank))
    return whole


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return list(session.run(None, feeds))


@pytest.mark.parametrize(("name", "export"), CASES, ids=lambda item: str(item))
def test_the_input_gradient_is_that_of_autograd(name: str, export: tuple[str, int]) -> None:
    assert_gradient(name, *export)
