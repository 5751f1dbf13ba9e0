"""Small networks of the usual families, and their exports.

Weights are random but fixed; every network is in evaluation mode. Sizes are the smallest that keep
the family's operators and their corner cases.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

import onnx
import torch
from torch import nn

EXPORTERS = ("dynamo", "torchscript")


class Residual(nn.Module):
    """Two convolutions and a shortcut; a strided one changes the shortcut too."""

    def __init__(self, dims: int, into: int, out: int, stride: int) -> None:
        super().__init__()
        conv, norm = CONV[dims], NORM[dims]
        self.body = nn.Sequential(
            conv(into, out, 3, stride, 1, bias=False), norm(out), nn.ReLU(),
            conv(out, out, 3, 1, 1, bias=False), norm(out),
        )  # fmt: skip
        self.short = nn.Sequential(conv(into, out, 1, stride, bias=False), norm(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.short(x))


class ResNet(nn.Module):
    """Stem with max pooling, residual blocks, global average, linear."""

    def __init__(self, dims: int = 2, channels: int = 1, classes: int = 3, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            CONV[dims](channels, width, 5, 2, 2),
            NORM[dims](width),
            nn.ReLU(),
            MAXPOOL[dims](3, 2, 1),
        )
        self.blocks = nn.Sequential(
            Residual(dims, width, width, 1), Residual(dims, width, 2 * width, 2)
        )
        self.pool = AVERAGE[dims](1)
        self.head = nn.Linear(2 * width, classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.stem(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.flatten(self.pool(self.features(x)), 1))


class DenseNet(nn.Module):
    """Dense blocks with normalisation before activation, and an averaging transition."""

    def __init__(self, dims: int = 2, channels: int = 1, classes: int = 3, growth: int = 4) -> None:
        super().__init__()
        conv, norm = CONV[dims], NORM[dims]
        self.stem = conv(channels, 8, 3, 2, 1, bias=False)
        self.first = nn.ModuleList(self.layer(dims, 8 + i * growth, growth) for i in range(2))
        self.transition = nn.Sequential(
            norm(8 + 2 * growth),
            nn.ReLU(),
            conv(8 + 2 * growth, 8, 1, bias=False),
            AVGPOOL[dims](2),
        )
        self.second = nn.ModuleList(self.layer(dims, 8 + i * growth, growth) for i in range(2))
        self.last = norm(8 + 2 * growth)
        self.pool = AVERAGE[dims](1)
        self.head = nn.Linear(8 + 2 * growth, classes)

    @staticmethod
    def layer(dims: int, into: int, growth: int) -> nn.Module:
        return nn.Sequential(
            NORM[dims](into), nn.ReLU(), CONV[dims](into, 8, 1, bias=False),
            NORM[dims](8), nn.ReLU(), CONV[dims](8, growth, 3, 1, 1, bias=False),
        )  # fmt: skip

    def features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layer in self.first:
            x = torch.cat([x, layer(x)], 1)
        x = self.transition(x)
        for layer in self.second:
            x = torch.cat([x, layer(x)], 1)
        return torch.relu(self.last(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.flatten(self.pool(self.features(x)), 1))


CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAXPOOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVGPOOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
AVERAGE = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


def seeded(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network with fixed random weights and statistics that look trained.

    Weights are drawn anew in the order of the names, so that the numbers do not depend on how a
    module initialises itself.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(network.state_dict().items()):
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            tensor.copy_(0.5 + noise.abs())
        elif tensor.ndim > 1:
            tensor.copy_(noise * (1.5 / tensor[0].numel()) ** 0.5)
        elif name.endswith("weight"):
            tensor.copy_(1 + 0.2 * noise)
        else:
            tensor.copy_(0.1 * noise)
    return network.eval()


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    """A smooth-free random image, ``shape`` float32, about standard normal."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exported(
    network: nn.Module,
    x: torch.Tensor,
    exporter: str = "dynamo",
    opset: int = 18,
    *,
    dynamic_batch: bool = True,
    names: Sequence[str] = ("scores",),
) -> onnx.ModelProto:
    """A network as ONNX, by torch's new exporter or its old one.

    Parameters
    ----------
    network : torch.nn.Module
    x : torch.Tensor
        An example image, ``(batch, channels, *spatial)``; two or more images where the batch is
        free, since the new exporter takes a size of 1 for a constant.
    exporter : str
        ``dynamo`` or ``torchscript``.
    opset : int
    dynamic_batch : bool
        Whether the first axis is left free.
    names : sequence of str
        Names of the outputs.
    """
    if exporter not in EXPORTERS:
        raise ValueError(f"exporter is {exporter!r}; one of {EXPORTERS} is needed")
    axes = {name: {0: "batch"} for name in ("image", *names)} if dynamic_batch else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            program = torch.onnx.export(
                network, (x,), dynamo=True, opset_version=opset, verbose=False,
                input_names=["image"], output_names=list(names),
                dynamic_shapes=({0: torch.export.Dim("batch")},) if dynamic_batch else None,
            )  # fmt: skip
            assert program is not None
            return program.model_proto
        file = io.BytesIO()
        torch.onnx.export(
            network, (x,), file, dynamo=False, opset_version=opset,
            input_names=["image"], output_names=list(names),
            dynamic_axes=axes,
        )  # fmt: skip
        return onnx.load_from_string(file.getvalue())
