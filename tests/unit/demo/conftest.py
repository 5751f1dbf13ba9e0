"""A network too small to learn."""

from __future__ import annotations

import pytest
import torch

from dicom_xai.demo.networks import SmallResNet


@pytest.fixture
def network() -> SmallResNet:
    torch.manual_seed(7)
    network = SmallResNet(2, channels=(4, 4, 6), dilations=(1, 2))
    network.train()(torch.randn(4, 1, 64, 64))  # gives batch norm some statistics
    return network.eval()
