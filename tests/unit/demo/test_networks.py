"""The bundled networks, on ones too small to learn."""

from __future__ import annotations

import torch

from dicom_xai.demo.networks import SmallResNet, multiply_adds
from dicom_xai.demo.tasks import TASKS


def test_maps_and_bias_add_up_to_the_logits(network: SmallResNet) -> None:
    image = torch.randn(3, 1, 64, 64)
    maps = network.maps(network.features(image))
    assert maps.shape == (3, 2, 8, 8)
    # sums of 64 float32 terms in another order
    torch.testing.assert_close(
        maps.sum(dim=(2, 3)) + network.head.bias, network(image), atol=1e-4, rtol=1e-4
    )


def test_the_positive_part_of_a_map_is_grad_cam_by_autograd(network: SmallResNet) -> None:
    image = torch.randn(1, 1, 64, 64)
    features = network.features(image).detach().requires_grad_(True)
    logits = (
        torch.nn.functional.linear(
            features.mean(dim=(2, 3)), network.head.weight * network.gain, network.head.bias
        )
    )[0]
    for index in range(2):
        (gradient,) = torch.autograd.grad(logits[index], features, retain_graph=True)
        weights = gradient.mean(dim=(2, 3), keepdim=True)
        grad_cam = torch.relu((weights * features).sum(dim=1))[0]
        expected = torch.relu(network.maps(features))[0, index]
        torch.testing.assert_close(grad_cam, expected, atol=1e-5, rtol=1e-4)  # order of sums


def test_folding_the_gain_changes_no_logit(network: SmallResNet) -> None:
    image = torch.randn(2, 1, 64, 64)
    before = network(image)
    network.fold_gain()
    torch.testing.assert_close(network(image), before, atol=1e-5, rtol=1e-5)


def test_multiply_adds_are_counted_by_hand() -> None:
    network = SmallResNet(1, channels=(1, 1, 1), dilations=())
    # stem 32x32, middle 16x16 and two in its block, last 8x8; 9 a cell; one in the head
    assert multiply_adds(network, (64, 64)) == 9 * (32 * 32 + 3 * 16 * 16 + 8 * 8) + 1


def test_a_network_of_volumes_adds_up_its_maps_too() -> None:
    torch.manual_seed(7)
    network = TASKS["ct-3d"].network(2).eval()
    image = torch.randn(2, 1, 8, 16, 16)
    maps = network.maps(network.features(image))
    assert maps.shape == (2, 2, 4, 4, 4)
    torch.testing.assert_close(
        maps.sum(dim=(2, 3, 4)) + network.head.bias, network(image), atol=1e-4, rtol=1e-4
    )
