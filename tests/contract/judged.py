"""Small networks whose maps other libraries judge: every ReLU is a module of its own, named so.

captum rewires ReLU modules only and MONAI only modules whose name holds "relu"; `Functional` and
`Renamed` are what each of them misses. Ours sees the exported nodes.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from dicom_xai.autodiff import compile
from dicom_xai.autodiff.methods import Parametrised
from tests.make.networks import AVERAGE, AVGPOOL, CONV, MAXPOOL, NORM, exported, image, seeded

CLOSE = 1e-5
"""Relative to the largest value: float32 sums of some hundred products, in another order."""

TARGET = [2, 0, 1]


class Pooled(nn.Module):
    """Max pooling between two normalised convolutions, global average, linear."""

    def __init__(self, dims: int, channels: int = 2, *, bias: bool = True) -> None:
        super().__init__()
        conv, norm = CONV[dims], NORM[dims]
        self.features = nn.Sequential(OrderedDict(
            conv1=conv(channels, 4, 3, 1, 1, bias=bias), norm1=norm(4) if bias else nn.Identity(),
            relu1=nn.ReLU(), pool1=MAXPOOL[dims](2),
            conv2=conv(4, 6, 3, 1, 1, bias=bias), norm2=norm(6) if bias else nn.Identity(),
            relu2=nn.ReLU(),
        ))  # fmt: skip
        self.pool = AVERAGE[dims](1)
        self.head = nn.Linear(6, 3, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.flatten(self.pool(self.features(x)), 1))


class Joined(nn.Module):
    """A shortcut that is added, one that is concatenated, average pooling between."""

    def __init__(self, dims: int, channels: int = 2) -> None:
        super().__init__()
        conv = CONV[dims]
        self.stem = nn.Sequential(OrderedDict(conv=conv(channels, 4, 3, 2, 1), relu=nn.ReLU()))
        self.added = nn.Sequential(OrderedDict(conv=conv(4, 4, 3, 1, 1), relu=nn.ReLU()))
        self.shrink = AVGPOOL[dims](2)
        self.beside = nn.Sequential(OrderedDict(conv=conv(4, 5, 3, 1, 1), relu=nn.ReLU()))
        self.features = nn.Sequential(OrderedDict(norm=NORM[dims](9), relu=nn.ReLU()))
        self.pool = AVERAGE[dims](1)
        self.head = nn.Linear(9, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.shrink(x + self.added(x))
        x = self.features(torch.cat([x, self.beside(x)], 1))
        return self.head(torch.flatten(self.pool(x), 1))


class Flattened(nn.Module):
    """Two dense layers on the flattened features: gradients differ from place to place."""

    def __init__(self, dims: int, channels: int = 2) -> None:
        super().__init__()
        conv = CONV[dims]
        self.features = nn.Sequential(OrderedDict(
            conv1=conv(channels, 4, 3, 2, 1), relu1=nn.ReLU(),
            conv2=conv(4, 5, 3, 2, 1), relu2=nn.ReLU(),
        ))  # fmt: skip
        self.head = nn.Sequential(OrderedDict(
            flat=nn.Flatten(), wide=nn.Linear(5 * 3**dims, 8), relu=nn.ReLU(), out=nn.Linear(8, 3)
        ))  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


class Functional(Pooled):
    """`Pooled` with ReLU as a function, which captum does not see."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        f = self.features
        x = f.pool1(torch.relu(f.norm1(f.conv1(x))))
        x = torch.relu(f.norm2(f.conv2(x)))
        return self.head(torch.flatten(self.pool(x), 1))


class Renamed(nn.Module):
    """`Pooled` with other names, by which MONAI does not find its ReLU."""

    def __init__(self, twin: Pooled) -> None:
        super().__init__()
        self.parts = nn.Sequential(*twin.features, twin.pool, nn.Flatten(), twin.head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts(x)


@dataclass(frozen=True)
class Judged:
    """A network, three images for it, and its export."""

    network: nn.Module
    x: torch.Tensor
    plain: onnx.ModelProto

    def explained(
        self, method: str | Parametrised, layer: str = "auto", only: int | None = None
    ) -> dict[str, np.ndarray]:
        """All outputs for `TARGET`, of all images or only one."""
        x, target = self.x, TARGET
        if only is not None:
            x, target = x[only : only + 1], TARGET[only : only + 1]
        compiled = compile(self.plain, method, layer=layer).model
        feeds = {"image": x.numpy(), "target": np.array(target)}
        return answers(session(compiled), feeds)

    def map(
        self, method: str | Parametrised, layer: str = "auto", only: int | None = None
    ) -> np.ndarray:
        """The attribution alone, ``(batch, 1, *spatial)``."""
        return self.explained(method, layer, only)["attribution"]

    def scores(self) -> torch.Tensor:
        """Torch's scores of `TARGET`, ``(batch,)``."""
        with torch.no_grad():
            return self.network(self.x)[range(len(TARGET)), TARGET]

    def inner_layer(self) -> str:
        """The tensor that the maximum pooling gives."""
        return next(node.output[0] for node in self.plain.graph.node if node.op_type == "MaxPool")


MAKERS = {"pooled": Pooled, "joined": Joined, "flattened": Flattened}
NAMES = [f"{name}-{dims}d" for name in MAKERS for dims in (2, 3)]


@cache
def judged(name: str) -> Judged:
    """One of `NAMES`; made and exported once for all tests."""
    kind, _, dims = name.partition("-")
    spatial = int(dims[0])
    return judge(seeded(MAKERS[kind](spatial)), spatial)


def judge(network: nn.Module, dims: int) -> Judged:
    """Images and export of a network with two channels."""
    x = image(len(TARGET), 2, *[12 if dims == 2 else 9] * dims, seed=4)
    return Judged(network, x, exported(network, x, "torchscript", 17))


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """On one thread of the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def answers(
    loaded: onnxruntime.InferenceSession, feeds: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Outputs by name."""
    names = [item.name for item in loaded.get_outputs()]
    return dict(zip(names, loaded.run(None, feeds), strict=True))


def over_channels(x: torch.Tensor) -> torch.Tensor:
    """The sum, as every map of ours has one channel."""
    return x.sum(1, keepdim=True)


def assert_close(
    found: np.ndarray, wanted: torch.Tensor | np.ndarray, close: float = CLOSE
) -> None:
    """Largest difference relative to the largest value, which must not be 0."""
    expected = wanted.detach().numpy() if isinstance(wanted, torch.Tensor) else wanted
    assert found.shape == expected.shape
    assert np.abs(expected).max() > 0
    assert np.abs(found - expected).max() <= close * np.abs(expected).max()
