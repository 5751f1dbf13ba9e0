"""The bundled classifiers: residual networks, scaled down, that end in a global average.

On images or, with strides of three axes, on volumes.

The head is linear on the averaged features, so that Grad-CAM of the last layer says exactly where
the logit comes from (Selvaraju et al. 2017, section 3.1: Grad-CAM of such a network is CAM).
"""

from __future__ import annotations

import math

import torch
from torch import nn

#: The head's weights are learnt at this fraction of their size. A lesion of a few cells has to move
#: an average over a thousand of them; plain weights would need very many steps to grow so large.
_HEAD_GAIN = 64.0


class ResidualBlock(nn.Module):
    """Two convolutions, 3 wide, beside the identity (He et al. 2016, figure 2).

    Parameters
    ----------
    channels : int
    dilation : int
        Of both convolutions: how far they look without losing resolution.
    axes : int
        2 for images, 3 for volumes.
    """

    def __init__(self, channels: int, dilation: int = 1, axes: int = 2) -> None:
        super().__init__()
        plain = (1,) * axes
        self.first = _convolution(channels, channels, plain, dilation)
        self.second = _convolution(channels, channels, plain, dilation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.relu(x + self.second(torch.relu(self.first(x))))
        return out


class SmallResNet(nn.Module):
    """One grayscale image or volume to one logit a class.

    Parameters
    ----------
    classes : int
    channels : tuple of int
        After each of the three strides.
    dilations : tuple of int
        One residual block on the last grid for each.
    strides : tuple of tuple of int
        Along each axis, of stem, middle and last.
    gain : float
        See `_HEAD_GAIN`; in proportion to the number of cells.
    """

    def __init__(
        self,
        classes: int,
        channels: tuple[int, int, int] = (12, 16, 32),
        dilations: tuple[int, ...] = (1, 2),
        strides: tuple[tuple[int, ...], ...] = ((2, 2), (2, 2), (2, 2)),
        gain: float = _HEAD_GAIN,
    ) -> None:
        super().__init__()
        stem, middle, last = channels
        axes = len(strides[0])
        #: How many input cells one feature cell covers, along each axis.
        self.stride = tuple(math.prod(each) for each in zip(*strides, strict=True))
        self.body = nn.Sequential(
            _convolution(1, stem, strides[0]),
            nn.ReLU(),
            _convolution(stem, middle, strides[1]),
            nn.ReLU(),
            ResidualBlock(middle, axes=axes),
            _convolution(middle, last, strides[2]),
            nn.ReLU(),
            *(ResidualBlock(last, dilation, axes) for dilation in dilations),
        )
        self.pool = nn.AdaptiveAvgPool2d(1) if axes == 2 else nn.AdaptiveAvgPool3d(1)
        self.head = nn.Linear(last, classes)
        self.gain = gain

    def features(self, image: torch.Tensor) -> torch.Tensor:
        """Last features, never negative.

        Parameters
        ----------
        image : Tensor, (batch, 1, *size) float32

        Returns
        -------
        Tensor, (batch, channels, *cells) float32
            Each cell covers `stride` of the input.
        """
        out: torch.Tensor = self.body(image)
        return out

    def maps(self, features: torch.Tensor) -> torch.Tensor:
        """What each cell adds to each logit: ``(batch, classes, *cells)``.

        Their sum over the cells and the head's bias make the logit; their positive part is
        Grad-CAM in its raw unit.
        """
        cells = math.prod(features.shape[2:])
        weights = self.head.weight * (self.gain / cells)
        flat = torch.einsum("ck,bkp->bcp", weights, features.flatten(2))
        return flat.reshape(*flat.shape[:2], *features.shape[2:])

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits, ``(batch, classes)`` float32."""
        pooled = self.pool(self.features(image)).flatten(1)
        return nn.functional.linear(pooled, self.head.weight * self.gain, self.head.bias)

    @torch.no_grad()
    def fold_gain(self) -> None:
        """Put the gain into the weights, once training is over: a plain linear head is exported."""
        self.head.weight.mul_(self.gain)
        self.gain = 1.0


def multiply_adds(model: SmallResNet, size: tuple[int, ...]) -> int:
    """Multiply-adds of one image of `size`, convolutions and head; one is two FLOP."""
    total = 0

    def count(module: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d | nn.Conv3d)
        kernel = module.in_channels * math.prod(module.kernel_size)
        total += output[0].numel() * kernel

    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    hooks = [m.register_forward_hook(count) for m in convolutions]
    with torch.no_grad():
        model(torch.zeros(1, 1, *size))
    for hook in hooks:
        hook.remove()
    return total + model.head.weight.numel()


def _convolution(
    inputs: int, outputs: int, stride: tuple[int, ...], dilation: int = 1
) -> nn.Sequential:
    if len(stride) == 2:
        across, down = stride
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, (across, down), dilation, dilation, bias=False),
            nn.BatchNorm2d(outputs),
        )
    first, second, third = stride
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, 3, (first, second, third), dilation, dilation, bias=False),
        nn.BatchNorm3d(outputs),
    )
