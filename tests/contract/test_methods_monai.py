"""Maps of the compiled graph against MONAI's, 2D and 3D.

MONAI's raw maps are compared: its callers scale each image to 0..1 with the largest value at 0,
which ours never do.
"""

from __future__ import annotations

import copy
import warnings

import numpy as np
import onnx
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what MONAI's own imports say
    from monai.visualize import CAM, GradCAM, GradCAMpp, GuidedBackpropGrad, VanillaGrad

from tests.contract.judged import (
    NAMES,
    TARGET,
    Judged,
    Renamed,
    assert_close,
    judge,
    judged,
    over_channels,
)

POOLED = [name for name in NAMES if not name.startswith("flattened")]
"""Networks for which CAM is defined."""


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> Judged:
    return judged(request.param)


def monais(case: Judged, method: type, *layer: str) -> torch.Tensor:
    """What MONAI gives image by image, since it takes one class for the whole batch.

    It hooks what it is given, so it is given a copy.
    """
    network = copy.deepcopy(case.network)
    made = method(network, *layer)
    give = made.compute_map if layer else made
    images = (case.x[i : i + 1].clone().requires_grad_() for i in range(len(case.x)))
    return torch.cat([give(x, index) for x, index in zip(images, TARGET, strict=True)]).detach()


def test_saliency_and_input_times_gradient_are_made_of_monais(case: Judged) -> None:
    g = monais(case, VanillaGrad)
    assert_close(case.map("saliency"), g.abs().amax(1, keepdim=True))
    assert_close(case.map("input-x-gradient"), over_channels(case.x * g))


def test_guided_backpropagation_is_monais(case: Judged) -> None:
    g = monais(case, GuidedBackpropGrad)
    assert_close(case.map("guided-backpropagation"), over_channels(g))


def test_grad_cam_is_monais(case: Judged) -> None:
    assert_close(case.map("grad-cam"), monais(case, GradCAM, "features"))


@pytest.mark.parametrize("name", ["pooled-2d", "pooled-3d"])
def test_grad_cam_of_an_inner_layer_is_monais(name: str) -> None:
    case = judged(name)
    wanted = monais(case, GradCAM, "features.pool1")
    assert_close(case.map("grad-cam", case.inner_layer()), wanted)


@pytest.mark.parametrize("name", POOLED)
def test_cam_is_monais_without_the_bias_that_monai_adds_everywhere(name: str) -> None:
    case = judged(name)
    made = CAM(copy.deepcopy(case.network), "features", "head")
    wanted = made.compute_map(case.x, class_idx=TARGET).detach()
    bias = case.network.head.bias[TARGET].reshape(-1, *[1] * (wanted.ndim - 1))
    assert_close(case.map("cam"), wanted - bias)


@pytest.mark.parametrize("name", POOLED)
def test_grad_cam_plus_plus_of_a_pooled_head_is_monais_without_its_exponential(name: str) -> None:
    # The two forms of the denominator, and so MONAI's and the paper's, agree on such a head only.
    case = judged(name)
    factor = case.scores().exp().reshape(-1, *[1] * (case.x.ndim - 1))
    wanted = monais(case, GradCAMpp, "features") / factor
    # MONAI adds 1e-7 to a denominator of about the squared gradient, here above 1e-5.
    assert_close(case.map("grad-cam++"), wanted, 2e-2)


def test_grad_cam_plus_plus_of_a_large_score_stays_finite_where_monais_does_not() -> None:
    case = judged("pooled-2d")
    network = copy.deepcopy(case.network)
    with torch.no_grad():
        network.head.bias += 100
    moved = onnx.ModelProto()
    moved.CopyFrom(case.plain)
    stored = next(item for item in moved.graph.initializer if item.name == "head.bias")
    stored.CopyFrom(onnx.numpy_helper.from_array(network.head.bias.detach().numpy(), stored.name))
    large = Judged(network, case.x, moved)
    assert not monais(large, GradCAMpp, "features").isfinite().all()
    assert np.array_equal(large.map("grad-cam++"), case.map("grad-cam++"))


def test_a_relu_of_another_name_is_guided_too() -> None:
    twin = judged("pooled-2d")
    case = judge(Renamed(twin.network).eval(), 2)
    missed = monais(case, GuidedBackpropGrad)
    assert torch.equal(missed, monais(case, VanillaGrad))
    wanted = over_channels(monais(twin, GuidedBackpropGrad))
    assert_close(case.map("guided-backpropagation"), wanted)
