"""The two bundled classifiers: residual networks, scaled down, that end in a global average.

The head is linear on the averaged features, so that Grad-CAM of the last layer says exactly where
the logit comes from (Selvaraju et al. 2017, section 3.1: Grad-CAM of such a network is CAM).
"""

from __future__ import annotations

import torch
from torch import nn

#: The head's weights are learnt at this fraction of their size. A lesion of a few cells has to move
#: an average over a thousand of them; plain weights would need very many steps to grow so large.
_HEAD_GAIN = 64.0


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside the identity (He et al. 2016, figure 2).

    Parameters
    ----------
    channels : int
    dilation : int
        Of both convolutions: how far they look without losing resolution.
    """

    def __init__(self, channels: int, dilation: int = 1) -> None:
        super().__init__()
        self.first = _convolution(channels, channels, dilation=dilation)
        self.second = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.relu(x + self.second(torch.relu(self.first(x))))
        return out


class SmallResNet(nn.Module):
    """One grayscale image to one logit a class, with features of stride 8.

    Parameters
    ----------
    classes : int
    channels : tuple of int
        After the stem (stride 2), and at strides 4 and 8.
    dilations : tuple of int
        One residual block at stride 8 for each.
    """

    stride = 8

    def __init__(
        self,
        classes: int,
        channels: tuple[int, int, int] = (12, 16, 32),
        dilations: tuple[int, ...] = (1, 2),
    ) -> None:
        super().__init__()
        stem, middle, last = channels
        self.body = nn.Sequential(
            _convolution(1, stem, stride=2),
            nn.ReLU(),
            _convolution(stem, middle, stride=2),
            nn.ReLU(),
            ResidualBlock(middle),
            _convolution(middle, last, stride=2),
            nn.ReLU(),
            *(ResidualBlock(last, dilation) for dilation in dilations),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(last, classes)
        self.gain = _HEAD_GAIN

    def features(self, image: torch.Tensor) -> torch.Tensor:
        """Last features, never negative.

        Parameters
        ----------
        image : Tensor, (batch, 1, rows, columns) float32

        Returns
        -------
        Tensor, (batch, channels, rows / 8, columns / 8) float32
        """
        out: torch.Tensor = self.body(image)
        return out

    def maps(self, features: torch.Tensor) -> torch.Tensor:
        """What each cell adds to each logit: ``(batch, classes, rows / 8, columns / 8)``.

        Their sum over the cells and the head's bias make the logit; their positive part is
        Grad-CAM in its raw unit.
        """
        cells = features.shape[2] * features.shape[3]
        return torch.einsum("ck,bkij->bcij", self.head.weight * (self.gain / cells), features)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits, ``(batch, classes)`` float32."""
        pooled = self.pool(self.features(image)).flatten(1)
        return nn.functional.linear(pooled, self.head.weight * self.gain, self.head.bias)

    @torch.no_grad()
    def fold_gain(self) -> None:
        """Put the gain into the weights, once training is over: a plain linear head is exported."""
        self.head.weight.mul_(self.gain)
        self.gain = 1.0


def multiply_adds(model: SmallResNet, size: tuple[int, int]) -> int:
    """Multiply-adds of one image of `size`, convolutions and head; one is two FLOP."""
    total = 0

    def count(module: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d)
        kernel = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
        total += output[0].numel() * kernel

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        model(torch.zeros(1, 1, *size))
    for hook in hooks:
        hook.remove()
    return total + model.head.weight.numel()


def _convolution(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False),
        nn.BatchNorm2d(outputs),
    )
