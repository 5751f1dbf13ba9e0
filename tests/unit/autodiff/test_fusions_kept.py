"""What ONNX Runtime fuses in the vendor's graph it still fuses in the compiled one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from dicom_xai.autodiff import BySeed, compile
from tests.make import networks
from tests.make.networks import exported, image, seeded

CLOSE = 1e-4
"""Relative to the largest value: float32, and fused functions that are rounded otherwise."""


class Tokens(nn.Module):
    """A function between two dense layers."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.wide, self.narrow, self.head = nn.Linear(16, 48), nn.Linear(48, 16), nn.Linear(16, 3)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.narrow(self.function(self.wide(x.flatten(1, 2))))
        return self.head(x.mean(1))


class RootMeanSquare(nn.Module):
    """RMSNorm in small operators, by a quotient or by a reciprocal root."""

    def __init__(self, *, by_quotient: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(48))
        self.by_quotient = by_quotient

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        square = x.pow(2).mean(-1, keepdim=True) + 1e-6
        return (
            x / torch.sqrt(square) if self.by_quotient else x * torch.rsqrt(square)
        ) * self.scale


def cubed(x: torch.Tensor) -> torch.Tensor:
    """The argument of HuggingFace's NewGELU."""
    return torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))


FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "new-gelu": lambda x: 0.5 * x * (1.0 + cubed(x)),
    "new-gelu-turned": lambda x: (1.0 + cubed(x)) * (x * 0.5),
    "half-last": lambda x: x * (1.0 + cubed(x)) * 0.5,
    "half-inside": lambda x: x * (0.5 * (1.0 + cubed(x))),
    "fast-gelu": lambda x: (
        x * 0.5 * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x)))
    ),
    "tanh-gelu": nn.GELU(approximate="tanh"),
    "quick-gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "quick-gelu-turned": lambda x: torch.sigmoid(x * 1.702) * x,
    "silu": nn.SiLU(),
    "rms-norm": RootMeanSquare(by_quotient=True),
    "rms-norm-reciprocal": RootMeanSquare(by_quotient=False),
}  # fmt: skip

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (networks.ResNet, (33, 33)),
    "densenet": (networks.DenseNet, (32, 32)),
    "efficientnet": (networks.EfficientNet, (32, 32)),
    "convnext": (networks.ConvNeXt, (32, 32)),
    "vit": (networks.ViT, (32, 32)),
    "swin": (networks.Swin, (32, 32)),
    "unet": (networks.UNet, (32, 32)),
    "segresnet": (networks.SegResNet, (16, 16)),
    "dynunet": (networks.DynUNet, (16, 16)),
    "unetr": (networks.UNETR, (32, 32)),
    **{
        name: (lambda function=function: Tokens(function), (24, 16))
        for name, function in FUNCTIONS.items()
    },
}


def fused(model: onnx.ModelProto, path: Path) -> Counter[str]:
    """How often each operator of ONNX Runtime's own stands in what it makes of a model."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # it warns that such a file is for this machine alone
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(model.SerializeToString(), options)
    return Counter(node.op_type for node in onnx.load(path).graph.node if node.domain)


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    names = [item.name for item in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_fusion_of_the_plain_model_is_in_the_compiled_one(name: str, tmp_path: Path) -> None:
    make, size = NETWORKS[name]
    network, x = seeded(make()), image(2, 1, *size)
    plain = exported(network, x, "torchscript", 17)
    compiled = compile(plain, "saliency", select=BySeed()).model
    before = fused(plain, tmp_path / "plain.onnx")
    after = fused(compiled, tmp_path / "compiled.onnx")
    assert not before - after
    leaf = x.clone().requires_grad_()
    scores = network(leaf)
    seed = image(*scores.shape, seed=1)
    (scores * seed).sum().backward()
    found = run(compiled, {"image": x.numpy(), "seed": seed.numpy()})
    assert np.array_equal(found["scores"], run(plain, {"image": x.numpy()})["scores"])
    assert leaf.grad is not None
    wanted = leaf.grad.abs().amax(1, keepdim=True).numpy()
    assert np.abs(found["attribution"] - wanted).max() <= CLOSE * wanted.max()
