"""Maps of the compiled graph against those of pytorch-grad-cam, 2D and 3D.

Its raw maps are compared, before its callers cut them, scale each image to 0..1 and enlarge. Two
things of it are not copied: the 1e-6 that it adds to the denominator of Grad-CAM++, which decides
the map of a network with small gradients; and the sign of a principal component, which is whatever
the decomposition gives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from tests.contract.judged import CLOSE, NAMES, TARGET, Judged, assert_close, judged
from tests.make import networks
from tests.make.networks import exported, image, seeded
from tests.make.standins import stand_ins

with stand_ins():
    import pytorch_grad_cam as library
    from pytorch_grad_cam.base_cam import BaseCAM

CAMS: dict[str, type[BaseCAM]] = {
    "grad-cam": library.GradCAM,
    "grad-cam++": library.GradCAMPlusPlus,
    "xgrad-cam": library.XGradCAM,
    "hires-cam": library.HiResCAM,
    "layer-cam": library.LayerCAM,
    "eigen-cam": library.EigenCAM,
    "eigengrad-cam": library.EigenGradCAM,
}

OnGrid = Callable[[torch.Tensor], torch.Tensor] | None
"""How a transformer's tokens lie on the image, which the library has to be told."""

LIBRARYS = 1e-3
"""Relative: what the library's constants still do where gradients are a thousand times as large."""

ITERATED = 1e-3
"""Relative: what forty steps leave of a second component that is nearly as large as the first."""


def hooked(
    case: Judged, method: str, layer: str, on_grid: OnGrid = None
) -> tuple[BaseCAM, np.ndarray, np.ndarray]:
    """The library's object on a copy of the network, and what its hooks saw at the layer."""
    network = copy.deepcopy(case.network)
    cam = CAMS[method](network, [network.get_submodule(layer)], on_grid)
    kept = cam.activations_and_grads
    kept(case.x)[range(len(case.x)), TARGET].sum().backward()
    seen = kept.activations[0].numpy(), kept.gradients[0].numpy()
    kept.release()
    return cam, *seen


def librarys(
    case: Judged, method: str, layer: str = "features", on_grid: OnGrid = None
) -> np.ndarray:
    """The raw map, ``(batch, 1, *spatial)``, with what is below 0."""
    cam, a, g = hooked(case, method, layer, on_grid)
    return np.asarray(cam.get_cam_image(case.x, cam.target_layers[0], None, a, g, False))[:, None]


def features_and_gradient(case: Judged, layer: str) -> tuple[np.ndarray, np.ndarray]:
    """``(batch, channels, *spatial)`` each."""
    return hooked(case, "grad-cam", layer)[1:]


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> Judged:
    return judged(request.param)


def scaled(case: Judged, factor: float) -> Judged:
    """The same network with scores, and so gradients, that many times as large."""
    network = copy.deepcopy(case.network)
    head = network.head if isinstance(network.head, nn.Linear) else network.head.out
    with torch.no_grad():
        head.weight *= factor
    moved = onnx.ModelProto()
    moved.CopyFrom(case.plain)
    names = ("head.weight", "head.out.weight")
    (stored,) = (item for item in moved.graph.initializer if item.name in names)
    stored.CopyFrom(onnx.numpy_helper.from_array(head.weight.detach().numpy(), stored.name))
    return replace(case, network=network, plain=moved)


@pytest.mark.parametrize("method", ["grad-cam", "xgrad-cam", "hires-cam", "layer-cam"])
def test_a_cam_is_the_librarys_with_negatives_cut(case: Judged, method: str) -> None:
    assert_close(case.map(method), np.maximum(librarys(case, method), 0))


@pytest.mark.parametrize("method", ["grad-cam", "xgrad-cam", "hires-cam", "layer-cam"])
@pytest.mark.parametrize("name", ["pooled-2d", "pooled-3d"])
def test_a_cam_of_an_inner_layer_is_the_librarys(name: str, method: str) -> None:
    case = judged(name)
    wanted = np.maximum(librarys(case, method, "features.pool1"), 0)
    assert_close(case.map(method, case.inner_layer()), wanted)


def test_grad_cam_plus_plus_is_the_librarys_where_gradients_are_large(case: Judged) -> None:
    case = scaled(case, 1e3)
    assert_close(case.map("grad-cam++"), np.maximum(librarys(case, "grad-cam++"), 0), LIBRARYS)


@pytest.mark.parametrize("name", ["pooled-2d", "pooled-3d"])
def test_grad_cam_plus_plus_of_an_inner_layer_is_the_librarys_too(name: str) -> None:
    case = scaled(judged(name), 1e3)
    wanted = np.maximum(librarys(case, "grad-cam++", "features.pool1"), 0)
    assert_close(case.map("grad-cam++", case.inner_layer()), wanted, LIBRARYS)


@pytest.mark.parametrize("name", ["flattened-2d", "flattened-3d"])
def test_grad_cam_plus_plus_of_small_gradients_is_the_papers_and_not_the_librarys(
    name: str,
) -> None:
    case = scaled(judged(name), 1e-3)
    a, g = (item.astype(np.float64) for item in features_and_gradient(case, "features"))
    space = tuple(range(2, a.ndim))
    alpha = np.divide(
        g**2, 2 * g**2 + a.sum(space, keepdims=True) * g**3, where=g != 0, out=np.zeros_like(g)
    )
    weights = (alpha * np.maximum(g, 0)).sum(space, keepdims=True)
    wanted = np.maximum((weights * a).sum(1, keepdims=True), 0)
    assert_close(case.map("grad-cam++"), wanted)
    theirs = np.maximum(librarys(case, "grad-cam++"), 0)
    assert np.abs(theirs - wanted).max() > 0.5 * wanted.max()


TRANSFORMERS: dict[str, tuple[Callable[[], nn.Module], str, OnGrid]] = {
    "vit": (
        networks.ViT,
        "blocks.1.norm1",
        lambda t: t[:, 1:].transpose(1, 2).reshape(len(t), -1, 4, 4),
    ),
    "swin": (networks.Swin, "norm", lambda t: t.permute(0, 3, 1, 2)),
    "convnext": (networks.ConvNeXt, "stages", None),
}
"""A network, the module whose output is looked at by default, and where its tokens lie."""


@pytest.mark.parametrize(
    "method", ["grad-cam", "xgrad-cam", "hires-cam", "layer-cam", "eigengrad-cam"]
)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_cam_of_a_transformer_is_the_librarys_that_is_told_its_grid(
    name: str, method: str
) -> None:
    make, layer, on_grid = TRANSFORMERS[name]
    network, x = seeded(make()), image(3, 1, 32, 32, seed=4)
    case = Judged(network, x, exported(network, x, "torchscript", 17))
    wanted = librarys(case, method, layer, on_grid)
    if method == "eigengrad-cam":
        assert_same_but_for_sign(case.map(method), wanted)
    else:
        # XGrad-CAM divides by sums of tokens of either sign, of which little may be left.
        close = 1e-3 if method == "xgrad-cam" else CLOSE
        assert_close(case.map(method), np.maximum(wanted, 0), close)


def assert_same_but_for_sign(found: np.ndarray, wanted: np.ndarray) -> None:
    """Image by image, since the sign is."""
    for one, other in zip(found, wanted, strict=True):
        either = [np.maximum(sign * other, 0) for sign in (1, -1)]
        assert_close(one, min(either, key=lambda way: np.abs(one - way).max()), ITERATED)


@pytest.mark.parametrize("method", ["eigen-cam", "eigengrad-cam"])
def test_a_component_is_the_librarys_up_to_its_arbitrary_sign(case: Judged, method: str) -> None:
    assert_same_but_for_sign(case.map(method), librarys(case, method))


@pytest.mark.parametrize("method", ["eigen-cam", "eigengrad-cam"])
def test_the_sign_of_a_component_is_that_of_the_sum_over_channels(
    case: Judged, method: str
) -> None:
    a, g = features_and_gradient(case, "features")
    summed = (a if method == "eigen-cam" else a * g).sum(1, keepdims=True)
    for found, along in zip(case.map(method), summed, strict=True):
        assert (found * (along - along.mean())).sum() > 0
