"""Exported networks: gradients against torch autograd, the prediction bit for bit.

The gradient is taken at the image, at the layer that CAM methods look at, and at one in the trunk.
Each network meets both exporters, each of their opsets several networks of every kind; FULL_GRID=1
runs them all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from torch import nn
from torch.overrides import TorchFunctionMode

from dicom_xai.autodiff.backward import pull_back
from dicom_xai.autodiff.emit import Graph
from dicom_xai.autodiff.layers import explained_scores, image_input, path, target_layer
from dicom_xai.autodiff.rules import GRADIENT
from tests.make import networks
from tests.make.monai_networks import MONAI
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
    **MONAI,
}

EXPORTS = [
    ("torchscript", 13), ("torchscript", 17), ("torchscript", 20),
    ("dynamo", 18), ("dynamo", 20), ("dynamo", 21), ("dynamo", 23),
]  # fmt: skip

IMPOSSIBLE = {("vit-fused", ("torchscript", 13))}
"""The old exporter has no fused attention at opset 13."""

GRID = [(n, e) for n in NETWORKS for e in EXPORTS if (n, e) not in IMPOSSIBLE]
SLOW_TO_EXPORT = {"monai-swin-unetr"}
"""Half a minute and more; its windows are in `swin`, its decoder in `monai-unetr`."""


def chosen(index: int, name: str) -> list[tuple[str, int]]:
    """One export by each exporter; the opsets take turns."""
    given = [e for e in EXPORTS if (name, e) not in IMPOSSIBLE]
    each = [[e for e in given if e[0] == exporter] for exporter in ("torchscript", "dynamo")]
    return [several[index % len(several)] for several in each]


PAIRS = [
    (name, export)
    for index, name in enumerate(name for name in NETWORKS if name not in SLOW_TO_EXPORT)
    for export in chosen(index, name)
]

CASES = [pair for pair in GRID if "FULL_GRID" in os.environ or pair in PAIRS]


@cache
def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network and two images for it."""
    make, size = NETWORKS[name]
    return seeded(make()), image(2, 1, *size)


class Kept(TorchFunctionMode):
    """Every tensor that torch makes inside, in order, with its gradient kept."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for item in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(item, torch.Tensor) and item.requires_grad and not item.is_leaf:
                item.retain_grad()
                self.tensors.append(item)
        return made

    def same_as(self, value: np.ndarray) -> torch.Tensor | None:
        """The first that holds these numbers in this order, whatever its shape."""
        for item in self.tensors:
            if item.numel() == value.size and item.grad is not None:
                apart = np.abs(item.detach().numpy().ravel() - value.ravel()).max()
                if apart <= CLOSE * np.abs(value).max():
                    return item
        return None


@dataclass(frozen=True)
class Truth:
    """What torch makes of a network's two images."""

    seed: torch.Tensor
    g: torch.Tensor
    kept: Kept


@cache
def truth(name: str) -> Truth:
    """The gradient at the image for one random cotangent, and whatever lies between."""
    model, picture = network(name)
    x = picture.clone().requires_grad_()
    with Kept() as kept:
        y = model(x)
    seed = image(*y.shape, seed=1)
    (y * seed).sum().backward()
    assert x.grad is not None
    return Truth(seed, x.grad, kept)


def assert_gradient(name: str, exporter: str, opset: int) -> None:
    """Compare one export's gradients and prediction with torch and the plain session."""
    _, picture = network(name)
    plain, wanted = exported(network(name)[0], picture, exporter, opset), truth(name)
    feeds = {"image": picture.numpy()}
    features = features_of(plain, feeds, wanted.kept)
    whole = with_gradients(plain, ["image", *features])
    prediction, *found = run(whole, {**feeds, "seed": wanted.seed.numpy()})
    assert np.array_equal(prediction, run(plain, feeds)[0])
    for g, right in zip(found, [wanted.g, *features.values()], strict=True):
        expected = right.numpy().reshape(g.shape)
        assert np.abs(expected).max() > 0
        assert np.abs(g - expected).max() <= CLOSE * np.abs(expected).max()


def features_of(
    plain: onnx.ModelProto, feeds: dict[str, np.ndarray], kept: Kept
) -> dict[str, torch.Tensor]:
    """Torch's gradients at the layer that CAM methods look at and midway to it, by name."""
    graph = Graph(plain)
    scores, x = explained_scores(graph, None), image_input(graph, None)
    layer = target_layer(graph, scores, x, "auto").tensor.name
    names = [name for node in path(graph, x.name, layer) for name in node.output if name]
    shown = onnx.ModelProto()
    shown.CopyFrom(plain)
    shown.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    values = run(shown, feeds)[len(plain.graph.output) :]
    pairs = zip(names, (kept.same_as(value) for value in values), strict=True)
    shared = {name: found.grad for name, found in pairs if found is not None}
    assert layer in shared, f"torch has no tensor like {layer}"
    trunk = [name for name in shared if name != layer]
    return {name: shared[name] for name in (layer, trunk[len(trunk) // 2])}


def with_gradients(model: onnx.ModelProto, sources: list[str]) -> onnx.ModelProto:
    """The model with a cotangent input and the sources' gradients as last outputs."""
    graph = Graph(model)
    end = model.graph.output[0]
    shapes = [tuple(size or 0 for size in shape or ()) for shape in graph.facts.shapes(end.name)]
    graph.facts.add_input("seed", onnx.TensorProto.FLOAT, shapes)
    seed = {end.name: graph.tensor("seed")}
    found = pull_back(graph, graph.forward, seed, sources, GRADIENT)
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    whole.graph.node.extend(graph.nodes)
    whole.graph.initializer.extend(graph.initializers)
    value = helper.make_tensor_value_info
    whole.graph.input.append(value("seed", onnx.TensorProto.FLOAT, [None] * len(shapes[0])))
    for name in sources:
        g = found[name]
        whole.graph.output.append(value(g.name, onnx.TensorProto.FLOAT, [None] * g.rank))
    return whole


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return list(session.run(None, feeds))


@pytest.mark.parametrize(("name", "export"), CASES, ids=lambda item: str(item))
def test_gradients_at_image_and_features_are_those_of_autograd(
    name: str, export: tuple[str, int]
) -> None:
    assert_gradient(name, *export)


@pytest.mark.parametrize("export", EXPORTS, ids=str)
def test_every_export_meets_networks_of_every_kind(export: tuple[str, int]) -> None:
    met = {name for name, other in PAIRS if other == export}
    assert any(name.endswith("-3d") for name in met)
    assert any("unet" in name or "segresnet" in name for name in met)
    assert any("vit" in name or "swin" in name or "unetr" in name for name in met)
    assert any("resnet" in name or "densenet" in name for name in met)
    assert any(name in MONAI for name in met)
