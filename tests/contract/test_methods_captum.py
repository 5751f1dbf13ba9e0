"""Maps of the compiled graph against captum's, 2D and 3D."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import (
    LRP,
    Deconvolution,
    GradientShap,
    GuidedBackprop,
    GuidedGradCam,
    InputXGradient,
    LayerGradCam,
    LayerGradientXActivation,
    Saliency,
)
from captum.attr import IntegratedGradients as CaptumIntegratedGradients
from captum.attr._utils.lrp_rules import EpsilonRule

from dicom_xai.autodiff import ExpectedGradients, IntegratedGradients, LayerwiseRelevance
from tests.contract.judged import (
    NAMES,
    TARGET,
    Functional,
    Judged,
    Pooled,
    assert_close,
    judge,
    judged,
    over_channels,
)
from tests.make.networks import image, seeded

# What captum says whenever it rewires ReLU, and whenever an image has no gradient yet.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU"),
    pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients"),
]


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> Judged:
    return judged(request.param)


def test_saliency_is_the_largest_of_captums_over_channels(case: Judged) -> None:
    signed = Saliency(case.network).attribute(case.x, target=TARGET, abs=False)
    assert_close(case.map("saliency"), signed.abs().amax(1, keepdim=True))


def test_input_times_gradient_is_captums(case: Judged) -> None:
    wanted = InputXGradient(case.network).attribute(case.x, target=TARGET)
    assert_close(case.map("input-x-gradient"), over_channels(wanted))


@pytest.mark.parametrize(
    ("quadrature", "theirs"),
    [("midpoint", "riemann_middle"), ("gauss-legendre", "gausslegendre")],
)
def test_integrated_gradients_and_their_residual_are_captums(
    case: Judged, quadrature: str, theirs: str
) -> None:
    network, x = case.network, case.x
    found = case.explained(IntegratedGradients(9, baseline=-2.0, quadrature=quadrature))
    wanted, gap = CaptumIntegratedGradients(network).attribute(
        x, -2.0, TARGET, n_steps=9, method=theirs, return_convergence_delta=True
    )
    assert_close(found["attribution"], over_channels(wanted))
    rise = (network(x) - network(torch.full_like(x, -2.0)))[range(len(x)), TARGET]
    residual = (gap.abs() / rise.abs()).detach().numpy()
    # Both are small differences of sums: what rounding leaves is relative to the sums.
    assert np.abs(found["completeness_residual"][:, 0] - residual).max() <= 1e-4


def test_expected_gradients_are_what_captums_samples_scatter_around(case: Judged) -> None:
    # captum draws a background and a place for each sample, so that only means can be compared:
    # eight of them, whose scatter says how far their own mean may lie from the expectation.
    backgrounds = image(6, *case.x.shape[1:], seed=9)
    means = []
    for seed in range(8):
        np.random.seed(seed)
        shap = GradientShap(case.network).attribute(
            case.x, backgrounds, n_samples=200, stdevs=0.0, target=TARGET
        )
        means.append(over_channels(shap).detach().numpy())
    wanted, error = np.mean(means, 0), np.std(means, 0, ddof=1) / len(means) ** 0.5
    found = case.map(ExpectedGradients(np.repeat(backgrounds.numpy(), 130, 0)))

    def size(x: np.ndarray) -> float:
        return float(np.sqrt((x**2).mean()))

    assert size(error) <= 0.05 * size(wanted)
    # 1 for an exact map; ours is of 780 samples, captum's mean of 1600.
    assert size(found - wanted) <= 2 * size(error)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("guided-backpropagation", GuidedBackprop), ("deconvnet", Deconvolution)],
)
def test_another_rule_for_relu_is_captums(case: Judged, name: str, theirs: type) -> None:
    wanted = theirs(case.network).attribute(case.x, target=TARGET)
    assert_close(case.map(name), over_channels(wanted))


def test_grad_cam_is_captums_with_negatives_cut(case: Judged) -> None:
    captum = LayerGradCam(case.network, case.network.features)
    wanted = captum.attribute(case.x, target=TARGET, relu_attributions=True)
    assert_close(case.map("grad-cam"), wanted)


def test_hires_cam_is_captums_layer_gradient_times_activation(case: Judged) -> None:
    captum = LayerGradientXActivation(case.network, case.network.features)
    wanted = over_channels(captum.attribute(case.x, target=TARGET)).relu()
    assert_close(case.map("hires-cam"), wanted)


@pytest.mark.parametrize("name", ["pooled-2d", "pooled-3d"])
def test_an_inner_layer_is_explained_as_captum_does(name: str) -> None:
    case = judged(name)
    inner, layer = case.network.features.pool1, case.inner_layer()
    captum = LayerGradCam(case.network, inner)
    wanted = captum.attribute(case.x, target=TARGET, relu_attributions=True)
    assert_close(case.map("grad-cam", layer), wanted)
    product = LayerGradientXActivation(case.network, inner).attribute(case.x, target=TARGET)
    assert_close(case.map("hires-cam", layer), over_channels(product).relu())


def test_guided_grad_cam_is_captums_when_it_interpolates_linearly(case: Judged) -> None:
    captum = GuidedGradCam(case.network, case.network.features)
    mode = {4: "bilinear", 5: "trilinear"}[case.x.ndim]
    wanted = captum.attribute(case.x, target=TARGET, interpolate_mode=mode)
    assert_close(case.map("guided-grad-cam"), over_channels(wanted))


def test_lrp_epsilon_is_captums_where_captums_is_right() -> None:
    # captum has no 3D, drops inputs below 0 and treats biases otherwise than the definition.
    network = seeded(Pooled(2, bias=False))
    for module in network.modules():
        module.rule = EpsilonRule(1e-6)
    case = judge(network, 2)
    case = Judged(network, case.x.abs(), case.plain)
    wanted = over_channels(LRP(network).attribute(case.x, target=TARGET))
    # Epsilon moves every denominator, also those near 0, which round in another order here.
    assert_close(case.map(LayerwiseRelevance("epsilon")), wanted, 1e-2)


def test_a_relu_that_captum_does_not_see_is_guided_too() -> None:
    modules = judged("pooled-2d")
    case = judge(seeded(Functional(2)), 2)
    plain = over_channels(Saliency(case.network).attribute(case.x, target=TARGET, abs=False))
    missed = GuidedBackprop(case.network).attribute(case.x, target=TARGET)
    assert torch.equal(over_channels(missed), plain)
    wanted = GuidedBackprop(modules.network).attribute(modules.x, target=TARGET)
    assert_close(case.map("guided-backpropagation"), over_channels(wanted))
