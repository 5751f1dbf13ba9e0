"""Small networks of the usual families, and their exports.

Weights are random but fixed; every network is in evaluation mode. Sizes are the smallest that keep
the family's operators and their corner cases.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import onnx
import torch
from torch import nn
from torch.onnx import TrainingMode

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


class Inverted(nn.Module):
    """Expansion, depthwise convolution, squeeze and excitation, projection; SiLU throughout."""

    def __init__(self, dims: int, into: int, out: int, stride: int) -> None:
        super().__init__()
        conv, norm, wide = CONV[dims], NORM[dims], 4 * into
        self.widen = nn.Sequential(
            conv(into, wide, 1, bias=False), norm(wide), nn.SiLU(),
            conv(wide, wide, 3, stride, 1, groups=wide, bias=False), norm(wide), nn.SiLU(),
        )  # fmt: skip
        self.gate = nn.Sequential(
            AVERAGE[dims](1), conv(wide, 4, 1), nn.SiLU(), conv(4, wide, 1), nn.Sigmoid()
        )
        self.narrow = nn.Sequential(conv(wide, out, 1, bias=False), norm(out))
        self.is_residual = stride == 1 and into == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.widen(x)
        out = self.narrow(wide * self.gate(wide))
        return x + out if self.is_residual else out


class EfficientNet(nn.Module):
    """Mobile inverted bottlenecks behind an asymmetrically padded stem, as TensorFlow pads."""

    def __init__(self, dims: int = 2, channels: int = 1, classes: int = 3) -> None:
        super().__init__()
        conv, norm = CONV[dims], NORM[dims]
        self.pad = nn.ConstantPad2d((0, 1, 0, 1), 0.0) if dims == 2 else nn.Identity()
        self.stem = nn.Sequential(conv(channels, 8, 3, 2, bias=False), norm(8), nn.SiLU())
        self.blocks = nn.Sequential(
            Inverted(dims, 8, 8, 1), Inverted(dims, 8, 12, 2), Inverted(dims, 12, 12, 1)
        )
        self.last = nn.Sequential(conv(12, 16, 1, bias=False), norm(16), nn.SiLU())
        self.pool = AVERAGE[dims](1)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, classes))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.blocks(self.stem(self.pad(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.flatten(self.pool(self.features(x)), 1))


class ConvNeXtBlock(nn.Module):
    """Depthwise 7 x 7, LayerNorm over channels, GELU, layer scale; Liu et al. 2022."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.wide = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.narrow(nn.functional.gelu(self.wide(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Patchify stem, two stages, normalised pooled head."""

    def __init__(self, channels: int = 1, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 4, 4)
        self.stages = nn.Sequential(ConvNeXtBlock(8), nn.Conv2d(8, 16, 2, 2), ConvNeXtBlock(16))
        self.norm = nn.LayerNorm(16, eps=1e-6)
        self.head = nn.Linear(16, classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.stages(self.stem(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.features(x).mean((-2, -1))))


class Attention(nn.Module):
    """Self-attention; `fused` leaves it to torch, which newer opsets export as one node."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        batch, tokens, width = x.shape
        each = width // self.heads
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, each).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = nn.functional.scaled_dot_product_attention(q, k, v, bias)
        else:
            scores = q @ k.transpose(-2, -1) * each**-0.5
            y = torch.softmax(scores if bias is None else scores + bias, -1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """A transformer block with normalisation first."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, fused)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches of 8, a class token, learnt positions; 32 x 32 images."""

    def __init__(
        self, channels: int = 1, classes: int = 3, width: int = 24, *, fused: bool = False
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, 8, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 17, width))
        self.blocks = nn.Sequential(Block(width, 4, fused), Block(width, 4, fused))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class SwinBlock(nn.Module):
    """Attention in 4 x 4 windows, shifted by 2 in every second block; Liu et al. 2021."""

    def __init__(self, width: int, grid: int, shift: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, 2, False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.table = nn.Parameter(torch.zeros(49, 2))
        self.shift = shift
        here = torch.stack(torch.meshgrid(*[torch.arange(4)] * 2, indexing="ij"), -1).reshape(16, 2)
        step = here[:, None] - here[None] + 3
        self.register_buffer("index", step[..., 0] * 7 + step[..., 1])
        region = torch.zeros(1, grid, grid, 1)
        edges = [slice(0, -4), slice(-4, -shift), slice(-shift, None)] if shift else [slice(None)]
        for number, (rows, columns) in enumerate((r, c) for r in edges for c in edges):
            region[:, rows, columns] = number
        window = self.windows(region)[..., 0]
        apart = window[:, None] != window[:, :, None]
        self.register_buffer("mask", apart.float() * -100.0)

    @staticmethod
    def windows(x: torch.Tensor) -> torch.Tensor:
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 4, 4, width // 4, 4, channels)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, height, width, channels = x.shape
        y = torch.roll(self.norm1(x), (-self.shift, -self.shift), (1, 2)) if self.shift else (
            self.norm1(x)
        )  # fmt: skip
        bias = self.table[self.index.reshape(-1)].reshape(16, 16, 2).permute(2, 0, 1)
        bias = bias[None] + self.mask[:, None]
        y = self.attention(self.windows(y), bias.repeat(batch, 1, 1, 1))
        y = y.reshape(batch, height // 4, width // 4, 4, 4, channels).permute(0, 1, 3, 2, 4, 5)
        y = y.reshape(batch, height, width, channels)
        x = x + (torch.roll(y, (self.shift, self.shift), (1, 2)) if self.shift else y)
        return x + self.mlp(self.norm2(x))


class Swin(nn.Module):
    """Two stages of windowed attention with patch merging between; 32 x 32 images."""

    def __init__(self, channels: int = 1, classes: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, 12, 4, 4)
        self.first = nn.Sequential(SwinBlock(12, 8, 0), SwinBlock(12, 8, 2))
        self.merge = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 24, bias=False))
        self.second = SwinBlock(24, 4, 0)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.patches(x).permute(0, 2, 3, 1))
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        x = self.norm(self.second(self.merge(torch.cat(corners, -1))))
        return self.head(x.mean((1, 2)))


class UNet(nn.Module):
    """Strided encoder, transposed decoder, skips; instance normalisation and PReLU."""

    def __init__(self, dims: int = 2, channels: int = 1, classes: int = 2) -> None:
        super().__init__()
        conv, norm, up = CONV[dims], INSTANCE[dims], UP[dims]
        self.down1 = nn.Sequential(conv(channels, 4, 3, 2, 1), norm(4), nn.PReLU())
        self.down2 = nn.Sequential(conv(4, 8, 3, 2, 1), norm(8), nn.PReLU())
        self.bottom = nn.Sequential(conv(8, 8, 3, 1, 1), norm(8), nn.PReLU())
        self.up2 = nn.Sequential(up(16, 4, 3, 2, 1, output_padding=1), norm(4), nn.PReLU())
        self.up1 = up(8, classes, 3, 2, 1, output_padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.down1(x)
        second = self.down2(first)
        y = self.up2(torch.cat([second, self.bottom(second)], 1))
        return self.up1(torch.cat([first, y], 1))


class SegResNet(nn.Module):
    """Residual blocks with group normalisation, added skips, linear up-sampling."""

    def __init__(self, dims: int = 2, channels: int = 1, classes: int = 2) -> None:
        super().__init__()
        conv = CONV[dims]
        self.stem = conv(channels, 8, 3, 1, 1, bias=False)
        self.body = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(4, width), nn.ReLU(), conv(width, width, 3, 1, 1, bias=False)
            )
            for width in (8, 16)
        )
        self.down = conv(8, 16, 3, 2, 1, bias=False)
        self.squeeze = conv(16, 8, 1, bias=False)
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[dims]
        self.up = nn.Upsample(scale_factor=2, mode=mode, align_corners=False)
        self.head = nn.Sequential(nn.GroupNorm(4, 8), nn.ReLU(), conv(8, classes, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.body[0](x)
        y = self.down(x)
        y = y + self.body[1](y)
        return self.head(x + self.up(self.squeeze(y)))


class DynUNet(nn.Module):
    """nnU-Net's blocks: convolution, affine instance normalisation, leaky ReLU."""

    def __init__(self, dims: int = 2, channels: int = 1, classes: int = 2) -> None:
        super().__init__()
        self.first = self.block(dims, channels, 4, 1)
        self.second = self.block(dims, 4, 8, 2)
        self.bottom = self.block(dims, 8, 8, 2)
        self.up2 = UP[dims](8, 8, 2, 2, bias=False)
        self.join2 = self.block(dims, 16, 8, 1)
        self.up1 = UP[dims](8, 4, 2, 2, bias=False)
        self.join1 = self.block(dims, 8, 4, 1)
        self.head = CONV[dims](4, classes, 1)

    @staticmethod
    def block(dims: int, into: int, out: int, stride: int) -> nn.Module:
        conv, norm = CONV[dims], INSTANCE[dims]
        return nn.Sequential(
            conv(into, out, 3, stride, 1, bias=False), norm(out, affine=True), nn.LeakyReLU(0.01),
            conv(out, out, 3, 1, 1, bias=False), norm(out, affine=True), nn.LeakyReLU(0.01),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.first(x)
        second = self.second(first)
        y = self.join2(torch.cat([self.up2(self.bottom(second)), second], 1))
        return self.head(self.join1(torch.cat([self.up1(y), first], 1)))


class UNETR(nn.Module):
    """A transformer over patches of 8, decoded by transposed convolutions; 32 x 32 images."""

    def __init__(self, channels: int = 1, classes: int = 2, width: int = 24) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, 8, 8)
        self.positions = nn.Parameter(torch.zeros(1, 16, width))
        self.blocks = nn.ModuleList(Block(width, 4, False) for _ in range(2))
        self.skip = nn.Sequential(
            nn.ConvTranspose2d(width, 8, 2, 2), nn.InstanceNorm2d(8), nn.LeakyReLU()
        )
        self.up = nn.ConvTranspose2d(width, 8, 2, 2)
        self.join = nn.Sequential(nn.Conv2d(16, 8, 3, 1, 1), nn.InstanceNorm2d(8), nn.LeakyReLU())
        self.out = nn.ConvTranspose2d(8, 4, 4, 4)
        self.image = nn.Conv2d(channels, 4, 3, 1, 1)
        self.head = nn.Conv2d(8, classes, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2) + self.positions
        half = self.blocks[0](x)
        deep, half = (
            t.transpose(1, 2).reshape(t.shape[0], -1, 4, 4) for t in (self.blocks[1](half), half)
        )
        y = self.join(torch.cat([self.up(deep), self.skip(half)], 1))
        return self.head(torch.cat([self.out(y), self.image(image)], 1))


INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
UP = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
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
    free: Sequence[int] = (),
    beside: Mapping[str, torch.Tensor] = MappingProxyType({}),
    folds: bool = True,
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
    free : sequence of int
        Further axes of the image that are left free; the old exporter only.
    beside : mapping of str to torch.Tensor
        What the network takes beside the image, in its order.
    folds : bool
        Whether normalisations go into the convolutions before them; the old exporter can leave
        them alone.
    """
    if exporter not in EXPORTERS:
        raise ValueError(f"exporter is {exporter!r}; one of {EXPORTERS} is needed")
    given, inputs = (x, *beside.values()), ["image", *beside]
    axes = {name: {0: "batch"} for name in (*inputs, *names)} if dynamic_batch else None
    if axes is not None:
        axes["image"].update((axis, f"size_{axis}") for axis in free)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            program = torch.onnx.export(
                network, given, dynamo=True, opset_version=opset, verbose=False,
                input_names=inputs, output_names=list(names),
                dynamic_shapes=({0: torch.export.Dim("batch")},) * len(given)
                if dynamic_batch
                else None,
            )  # fmt: skip
            assert program is not None
            return program.model_proto
        file = io.BytesIO()
        torch.onnx.export(
            network, given, file, dynamo=False, opset_version=opset,
            input_names=inputs, output_names=list(names), dynamic_axes=axes,
            training=TrainingMode.EVAL if folds else TrainingMode.PRESERVE,
        )  # fmt: skip
        return onnx.load_from_string(file.getvalue())
