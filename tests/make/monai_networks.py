"""MONAI's own networks as hospitals train them, at the smallest sizes that keep their forms."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what MONAI's own imports say
    from monai.networks.nets import (
        UNETR,
        AttentionUnet,
        BasicUNet,
        DenseNet,
        DynUNet,
        EfficientNet,
        ResNet,
        SegResNet,
        SENet,
        SwinUNETR,
        UNet,
        ViT,
    )

CLASSES, REGIONS = 3, 2
"""Outputs of a classifier and of a segmentation; every network takes one channel."""


class First(nn.Module):
    """A network's first output alone: MONAI's ViT gives its hidden states beside the scores."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.whole(x)[0]


def resnet(dims: int, block: str) -> nn.Module:
    return ResNet(
        block, [1, 1, 1, 1], [4, 8, 8, 12],
        spatial_dims=dims, n_input_channels=1, num_classes=CLASSES,
    )  # fmt: skip


def senet() -> nn.Module:
    return SENet(
        2, 1, "se_resnet_bottleneck", [1, 1, 1, 1], groups=1, reduction=4, dropout_prob=None,
        inplanes=8, downsample_kernel_size=1, input_3x3=False, num_classes=CLASSES,
    )  # fmt: skip


def densenet(dims: int) -> nn.Module:
    return DenseNet(
        dims, 1, CLASSES, init_features=8, growth_rate=4, block_config=(2, 2), bn_size=2
    )


def efficientnet() -> nn.Module:
    blocks = ["r1_k3_s11_e1_i32_o32_se0.25", "r2_k5_s22_e4_i32_o48_se0.25"]
    return EfficientNet(blocks, 2, 1, CLASSES, width_coefficient=0.25, image_size=33)


def vit(dims: int) -> nn.Module:
    size = {2: 32, 3: 16}[dims]
    return First(
        ViT(
            1, (size,) * dims, (8,) * dims, hidden_size=24, mlp_dim=48, num_layers=2, num_heads=4,
            classification=True, num_classes=CLASSES, spatial_dims=dims,
        )
    )  # fmt: skip


def unetr() -> nn.Module:
    return UNETR(
        1, REGIONS, (32, 32), feature_size=4, hidden_size=24, mlp_dim=48, num_heads=4,
        spatial_dims=2,
    )  # fmt: skip


def swin_unetr() -> nn.Module:
    return SwinUNETR(
        1, REGIONS, spatial_dims=2, feature_size=12, depths=(2, 1, 1, 1), num_heads=(2, 2, 2, 2)
    )


def segresnet() -> nn.Module:
    return SegResNet(3, 8, 1, REGIONS, blocks_down=(1, 1, 1), blocks_up=(1, 1))


def dynunet() -> nn.Module:
    return DynUNet(3, 1, REGIONS, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 8])


MONAI: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "monai-resnet": (lambda: resnet(2, "basic"), (33, 33)),
    "monai-resnet-3d": (lambda: resnet(3, "bottleneck"), (24, 24, 24)),
    "monai-senet": (senet, (32, 32)),
    "monai-densenet": (lambda: densenet(2), (32, 32)),
    "monai-densenet-3d": (lambda: densenet(3), (16, 16, 16)),
    "monai-efficientnet": (efficientnet, (33, 33)),
    "monai-vit": (lambda: vit(2), (32, 32)),
    "monai-vit-3d": (lambda: vit(3), (16, 16, 16)),
    "monai-unet-3d": (
        lambda: UNet(3, 1, REGIONS, (4, 8, 8), (2, 2), num_res_units=1), (16, 16, 16),
    ),
    "monai-attention-unet": (lambda: AttentionUnet(2, 1, REGIONS, (4, 8, 8), (2, 2)), (16, 16)),
    "monai-basic-unet": (lambda: BasicUNet(2, 1, REGIONS, (4, 4, 8, 8, 8, 4)), (32, 32)),
    "monai-segresnet-3d": (segresnet, (8, 8, 8)),
    "monai-dynunet-3d": (dynunet, (8, 8, 8)),
    "monai-unetr": (unetr, (32, 32)),
    "monai-swin-unetr": (swin_unetr, (64, 64)),
}  # fmt: skip
"""A network and the size of an image for it, by name."""
